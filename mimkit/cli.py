"""The `mimkit` command. Each command imports what it uses, so that `mimkit --help` starts as fast as `import timm`."""

import pkgutil
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mimkit.recipes
from mimkit.config import PositiveInt, run_command
from mimkit.errors import UserError, cli_entry, did_you_mean

if TYPE_CHECKING:
    from mimkit.evaluation.features import Features

NOTES = {
    "hivit_nano": "small, for tests and demonstrations",
    "hivit_b": "the paper's base model; fits the released MAE weights",
    "hivit_b24": "the official README's 'base' row",
    "svit_nano": "small, for tests and demonstrations",
    "hpvit_s": "around vit_small_patch16_224; the others likewise",
}


def models(img_size: int | str = 224) -> None:
    """List the networks with their parameters, GMACs, and the strides of their feature maps.

    GMACs count convolutions, matrix products and attention.

    Args:
        img_size: Input size in pixels: 224 or HEIGHTxWIDTH.
    """
    import timm
    from rich.console import Console
    from rich.table import Table

    from mimkit.data.transforms import parse_size
    from mimkit.flops import count_gmacs
    from mimkit.io.weights import on_meta

    size = parse_size(img_size)
    table = Table("name", "parameters", f"GMACs at {size[0]}x{size[1]}", "strides", "note")
    for name in timm.list_models(["hivit_*", "hpvit_*", "svit_*"]):
        model = on_meta(timm.create_model, name, img_size=size)
        strides = ", ".join(str(stage["reduction"]) for stage in model.feature_info)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        table.add_row(name, f"{millions:.2f} M", f"{count_gmacs(model, 1, 3, *size):.2f}", strides, NOTES.get(name, ""))
    Console().print(table)


def _features(
    model: str,
    data: str,
    img_size: int | str | None,
    images: int | None,
    max_bad: float,
    chosen: tuple[str | None, str | None, str | None],
    value_range: tuple[float, float],
    model_args: dict[str, Any] | None,
) -> "list[Features]":
    """Compute a model's features of the training and the test part of a data set, by the chosen parts and columns."""
    import torch

    from mimkit.conversion.family import check_model
    from mimkit.data.loader import cpu_count
    from mimkit.data.sources import open_labeled, set_value_range
    from mimkit.data.transforms import Normalize, parse_size
    from mimkit.evaluation.features import extract_parts
    from mimkit.models.factory import create_network, has_weights, input_of
    from mimkit.models.pretrained import network_folder

    check_model(model)
    parts = set_value_range(value_range, *open_labeled(data, *chosen))
    print(parts[0].about)
    options = ({} if img_size is None else {"img_size": img_size}) | (model_args or {})
    if size := options.get("img_size"):
        options["img_size"] = size = parse_size(size)
    network = create_network(network_folder(model), **options)
    if not has_weights(network_folder(model)):
        print(f"{model} is neither a model folder nor a name with a tag, so its weights are random.")
    spec = input_of(network)
    size = size or spec.size
    on_gpu = torch.cuda.is_available()
    network.to("cuda" if on_gpu else "cpu")
    workers = cpu_count() if on_gpu else 0
    return extract_parts(network, parts, size, Normalize(spec.mean, spec.std), (images, None), workers, max_bad)


def knn(
    model: str,
    data: str = "sample",
    img_size: int | str | None = None,
    images: PositiveInt | None = None,
    max_bad: float = 0.01,
    parts: str | None = None,
    image_column: str | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
    label_column: str | None = None,
    model_args: dict[str, Any] | None = None,
) -> None:
    """Compute the accuracy of nearest-neighbor classification on a model's features, as DINO does.

    Args:
        model: The network: a run, a folder such as RUN/encoder or RUN/best, hf-hub:OWNER/NAME, or a name in timm.
        data: Labeled images: 'sample', a folder of class folders, parquet files, or a data set on the hub.
        img_size: Input size in pixels: 224 or HEIGHTxWIDTH. Default: the model's own.
        images: Number of training images to use. Default: all.
        max_bad: Fraction of images that may be impossible to decode.
        parts: Parts of the data to use, separated by commas, such as train,extra. Default: train, and val (else
            test) to evaluate on.
        image_column: Column of the images in tables. Default: the first one with image files.
        value_range: Values of floating-point images that become 0 and 1.
        label_column: Column of the labels in tables. Default: found by its type and name.
        model_args: Further arguments of the network in timm, such as {embed_dim: 160}.
    """
    from mimkit.evaluation.knn import knn as knn_accuracy

    reading = parts, image_column, label_column
    train, test = _features(model, data, img_size, images, max_bad, reading, value_range, model_args)
    for k, accuracy in knn_accuracy(train, test).items():
        print(f"kNN {accuracy:.2f} % (k = {k}, {len(train.y)} training and {len(test.y)} test images)")


def probe(
    model: str,
    data: str = "sample",
    img_size: int | str | None = None,
    images: PositiveInt | None = None,
    max_bad: float = 0.01,
    parts: str | None = None,
    image_column: str | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
    label_column: str | None = None,
    model_args: dict[str, Any] | None = None,
) -> None:
    """Compute the accuracy of a linear classifier on a model's frozen features.

    The weight decay is chosen on a fifth of the training images.

    Args:
        model: The network: a run, a folder such as RUN/encoder or RUN/best, hf-hub:OWNER/NAME, or a name in timm.
        data: Labeled images: 'sample', a folder of class folders, parquet files, or a data set on the hub.
        img_size: Input size in pixels: 224 or HEIGHTxWIDTH. Default: the model's own.
        images: Number of training images to use. Default: all.
        max_bad: Fraction of images that may be impossible to decode.
        parts: Parts of the data to use, separated by commas, such as train,extra. Default: train, and val (else
            test) to evaluate on.
        image_column: Column of the images in tables. Default: the first one with image files.
        value_range: Values of floating-point images that become 0 and 1.
        label_column: Column of the labels in tables. Default: found by its type and name.
        model_args: Further arguments of the network in timm, such as {embed_dim: 160}.
    """
    from mimkit.evaluation.probes import linear_probe

    reading = parts, image_column, label_column
    train, test = _features(model, data, img_size, images, max_bad, reading, value_range, model_args)
    result = linear_probe(train, test)
    print(
        f"linear probe {result.accuracy:.2f} % ({len(train.y)} training and {len(test.y)} test images; "
        f"weight decay {result.weight_decay:g}: {result.validation:.2f} % on held-out training images)"
    )


def reconstruct(
    run: str,
    images: str = "sample",
    out: str = "reconstructions.png",
    count: PositiveInt = 8,
    parts: str | None = None,
    image_column: str | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
) -> None:
    """Draw images, the same images masked, and their reconstructions by a pre-training run.

    Args:
        run: Directory of the run.
        images: Images: 'sample', an image, a folder of images, parquet or .tar files.
        out: Picture to write: .png, .pdf, .svg or .jpg.
        count: Number of images to show.
        parts: Parts of the data to use, separated by commas, such as train,unlabeled. Default: all.
        image_column: Column of the images in tables. Default: the first one with image files.
        value_range: Values of floating-point images that become 0 and 1.
    """
    from mimkit.data.loader import load_preview
    from mimkit.data.sources import open_images, set_value_range
    from mimkit.data.transforms import Normalize
    from mimkit.methods.checkpoint import load_run
    from mimkit.methods.reconstruction import reconstructions

    method, config = load_run(run)
    if Path(out).suffix.lower() not in (".png", ".pdf", ".svg", ".jpg"):
        raise UserError(f"--out {out} is no picture: give a name that ends in .png, .pdf, .svg or .jpg.")
    in_chans, *size = config["input_size"]
    (source,) = set_value_range(value_range, open_images(images, parts, image_column=image_column))
    if source.about:
        print(source.about)
    batch = load_preview(source, (size[0], size[1]), in_chans, count)
    if not len(batch.images):
        raise UserError(f"--images {images}: none can be decoded, such as {' ('.join(batch.bad[0])}).")
    for name, reason in batch.bad:
        print(f"skipped {name}, which cannot be used ({reason})")
    normalize = Normalize(config["mean"], config["std"])
    reconstructions(method, normalize(batch.images), normalize, Path(out))
    print(f"wrote {out}")


def convert(
    from_: str | None = None,
    to: str = "hpvit",
    out: str | None = None,
    checkpoint: str | None = None,
    layout: str | None = None,
    weights: str | None = None,
    source_args: dict[str, Any] | None = None,
    depths: str | None = None,
    pool: str | None = None,
    pool_init: str | None = None,
    attention: str | None = None,
    window: PositiveInt | None = None,
    padding: tuple[int, int] | None = None,
    prefix: str | None = None,
    dry_run: bool = False,
    no_checks: bool = False,
    list_: bool = False,
) -> None:
    """Convert a released plain ViT to an HPViT or to timm's layout, and verify that nothing was lost.

    Args:
        from_: Network to convert: an alias (see --list), a plain ViT's name in timm, or a timm model folder.
        to: Target: hpvit, hpvit_s, hpvit_b, hpvit_l, hpvit_h, timm (the plain ViT), or, for their own files, hivit_* or
            svit_*.
        out: Folder to write.
        checkpoint: File or folder of weights. Default: the published weights.
        layout: Family of the checkpoint, such as mae, hf, timm or dinov2. An alias implies its own.
        weights: State dict to read from a file with several: ema, teacher, student or model.
        source_args: Arguments of the source network in timm that its name does not imply.
        depths: Number of blocks in each stage, such as 0-1-11-0, or coarse, light, fine, even or swin.
        pool: Pooling between the stages: dw, conv or avg.
        pool_init: Initial weights of the pools: aligned, average, or the share of the aligned tap, from 0 to 1.
        attention: Attention of the finer stages: subgrid, or local for comparison.
        window: Side of the attention windows inside a sub-grid, for large images.
        padding: Pixels of padding before and after the image: [4,8], [8,4] or [0,12].
        prefix: Whether to keep or drop class and register tokens.
        dry_run: Print the result, but write and push nothing.
        no_checks: Skip the checks. The report and config.json say so.
        list_: Print the aliases and families.
    """
    from mimkit.conversion.convert import convert as convert_checkpoint
    from mimkit.conversion.family import families, plain_vits

    if list_:
        for layout, family in families().items():
            print(f"--layout {layout}: {family.title}")
            for alias, name in family.aliases.items():
                print(f"  {alias:18s} {name}")
        print(f"\nand the {len(plain_vits())} plain ViTs of timm, with or without a tag")
        return
    if from_ is None:
        raise UserError("Nothing to convert: pass --from NAME, such as vit_b_mae, or --list.")
    options = {
        "depths": depths,
        "pool": pool,
        "pool_init": pool_init,
        "attention": attention,
        "window": window,
        "padding": padding,
        "prefix": prefix,
    }
    report = convert_checkpoint(
        from_,
        to,
        out,
        checkpoint,
        layout,
        weights,
        source_args,
        checks=not no_checks,
        dry_run=dry_run,
        **{name: value for name, value in options.items() if value is not None},
    )
    report.show()
    if not dry_run:
        print(
            f"\nwrote {out}/: model.safetensors, config.json, report.json and report.md; timm loads it after\n"
            f'`import mimkit`: timm.create_model("local-dir:{out}", pretrained=True)'
        )


def predict(
    model: str,
    images: str,
    out: str | None = None,
    top: PositiveInt = 1,
    crop_pct: float | None = None,
    max_bad: float = 0.01,
    parts: str | None = None,
    image_column: str | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
) -> None:
    """Predict labels with a classifier, masks with a segmenter, or objects with a detector.

    --model also takes a run of recipes/finetune.py, segment.py or detect.py, and uses its best/. A segmenter writes a
    new folder of masks, each of the size of its image and with the class values of the training data. A detector writes
    a new COCO file, whose annotations have scores.

    Args:
        model: The network: a run, a folder such as RUN/encoder or RUN/best, hf-hub:OWNER/NAME, or a name in timm.
        images: Images: 'sample', an image, a folder of images, parquet or .tar files.
        out: Table of labels to write (predictions.csv), folder of masks (predictions), or COCO file of objects
            (predictions.json).
        top: Number of labels per image, the most likely ones first.
        crop_pct: Fraction of the resized image to crop. Default: the model's own.
        max_bad: Fraction of images that may be impossible to decode.
        parts: Parts of the data to use, separated by commas, such as train,unlabeled. Default: all.
        image_column: Column of the images in tables. Default: the first one with image files.
        value_range: Values of floating-point images that become 0 and 1.
    """
    from mimkit.conversion.family import check_model
    from mimkit.tasks.dense_checkpoint import find_dense

    check_model(model)
    reading = parts, image_column, value_range
    if segmenter := find_dense(model, "segmenter"):
        from mimkit.tasks.segmentation import predict_masks

        out = out or "predictions"
        print(f"wrote {out}/: {predict_masks(segmenter, images, out, max_bad, *reading)} masks")
        return
    if detector := find_dense(model, "detector"):
        from mimkit.tasks.detection import predict_objects

        out = out or "predictions.json"
        print(f"wrote {out}: {predict_objects(detector, images, out, max_bad, *reading)} images")
        return
    out = out or "predictions.csv"
    count = _predict_labels(model, images, out, top, crop_pct, max_bad, *reading)
    print(f"wrote {out}: {count} images")


def _predict_labels(
    model: str,
    images: str,
    out: str,
    top: int,
    crop_pct: float | None,
    max_bad: float,
    parts: str | None,
    image_column: str | None,
    value_range: tuple[float, float],
) -> int:
    """Write a table of image, label and probability, and return the number of images."""
    import csv

    import torch

    from mimkit.data.loader import eval_loader, limit_bad_images
    from mimkit.data.sources import open_all, set_value_range
    from mimkit.data.transforms import Normalize
    from mimkit.evaluation.features import apply_to_images
    from mimkit.files import replacing_file
    from mimkit.models.factory import input_of
    from mimkit.tasks.classification import classifier

    network = classifier(model)
    spec = input_of(network)
    spec = spec._replace(crop_pct=crop_pct or spec.crop_pct)
    normalize = Normalize(spec.mean, spec.std)
    names = network.pretrained_cfg.get("label_names") or list(map(str, range(network.num_classes)))
    if top > len(names):
        raise UserError(f"--top {top} is more than the {len(names)} classes of {model}: ask for fewer.")
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    sources = set_value_range(value_range, *open_all(images, parts, image_column=image_column))
    if sources[0].about:
        print(sources[0].about)
    for source in sources:
        loader = eval_loader(source, spec.size, spec.in_chans, batch_size=64, **spec.crop)
        for batch in limit_bad_images(loader, max_bad * source.length, print):
            if len(batch.images):
                likely, labels = apply_to_images(network, [batch], normalize, network).x.softmax(1).topk(top)
                for name, shares, chosen in zip(batch.names, likely.tolist(), labels.tolist(), strict=True):
                    rows += [[name, names[label], f"{share:.4f}"] for share, label in zip(shares, chosen, strict=True)]
    with replacing_file(out) as file, open(file, "w", newline="") as opened:
        csv.writer(opened).writerows([["image", "label", "probability"], *rows])
    return len(rows) // top


def export(model: str, out: str = "model.onnx") -> None:
    """Export a network to ONNX or a torch.export program for any batch size, and verify its outputs.

    A classifier and a segmenter give logits, an encoder gives features and maps, and a detector gives the maps of its
    feature pyramid. All but classifiers take images of any size, if the network's operators allow it. The file holds
    the preprocessing (mean, std, input_size, interpolation, crop_pct, ...) and the names of the classes as JSON under
    the key `mimkit`. Of a run, best/ is used, or encoder/.

    Args:
        model: The network: a run, a folder such as RUN/encoder or RUN/best, hf-hub:OWNER/NAME, or a name in timm.
        out: File to write: .onnx or .pt2.
    """
    from mimkit.conversion.family import check_model
    from mimkit.tasks.export import export as export_network

    check_model(model)
    print(export_network(model, out))


def push(run: str, /, *, to: str, private: bool = False, dry_run: bool = False) -> None:
    """Push a run or a model folder to the Hugging Face hub, with a model card of the run's own figures.

    Args:
        run: A run, whose encoder/ or best/ is pushed, RUN/last, or a converted folder.
        to: Repository on the hub, OWNER/NAME. An existing one gets a new commit.
        private: Make a new repository private.
        dry_run: Print the result, but write and push nothing.
    """
    from mimkit.io.hub import check_target, upload
    from mimkit.io.model_card import find_pushable, model_card, write_repository

    check_target(to)
    found = find_pushable(run)
    if dry_run:
        print(model_card(found, to))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_repository(found, to, Path(folder))
        print(f"pushed {found.folder} to {upload(Path(folder), to, private)}")


def replay(step: str, /) -> None:
    """Repeat a skipped training step, and report where its numbers stop being finite.

    Args:
        step: RUN/replay/step-N, with the batch of the step and the weights before it.
    """
    from mimkit.training.replay import read_about

    folder = Path(step)
    recipe, config = read_about(folder)["recipe"], folder.parent.parent / "config.yaml"
    if recipe not in recipes() or not config.is_file():
        raise UserError(f"{step} is not inside its run: pass RUN/replay/step-N, where RUN has a config.yaml.")
    with tempfile.TemporaryDirectory() as out:
        argv = ["--config", str(config), "--out", f"{out}/run", "--workers", "0", "--track", "null"]
        import_module(f"mimkit.recipes.{recipe}").main(argv, replay=folder)


def recipes() -> list[str]:
    """Return the names of the recipes."""
    return [module.name for module in pkgutil.iter_modules(mimkit.recipes.__path__)]


def doctor(*words: str) -> None:
    """Check whether a recipe is ready to run (doctor RECIPE FLAGS), or a run is healthy (doctor --run DIR).

    For a recipe and its flags, such as `mimkit doctor mae_hivit --data DIR --batch-size 256`, check the images, colors,
    units, steps, speed, memory and disk. For a recipe that does not pre-train, do what its --dry-run does. Nothing is
    trained or written. Exit code 1 means that something would spoil the run, or that the run is not healthy; 2 means
    that the recipe refuses the flags.
    """
    names = recipes()
    first, *flags = words or ("--help",)
    if first in ("--help", "-h"):
        text = "\n".join(line.strip() for line in (doctor.__doc__ or "").strip().splitlines())
        print(f"usage: mimkit doctor RECIPE FLAGS | mimkit doctor --run DIR\n\n{text}\n\nrecipes: {', '.join(names)}")
        return
    if first == "--run" and len(flags) == 1:
        from mimkit.doctor.loss_bands import health

        sentences, problems = health(Path(flags[0]))
        print("\n".join(sentences))
        if problems:
            sys.exit(1)
        return
    if first not in names:
        hint = did_you_mean(first, names) or f" Choose among {', '.join(names)}, or pass --run DIR."
        raise UserError(f"mimkit doctor {first}: there is no such recipe.{hint}")
    recipe = import_module(f"mimkit.recipes.{first}")
    if not hasattr(recipe.Options, "dry_run"):
        raise UserError(
            f"mimkit doctor {first}: this recipe has no --dry-run. Start the recipe itself, which is short."
        )
    recipe.main([*flags, "--dry-run"])


COMMANDS: list[Callable[..., None]] = [
    models,
    convert,
    knn,
    probe,
    reconstruct,
    predict,
    export,
    push,
    doctor,
    replay,
]


@cli_entry
def main() -> None:
    """Run the command that `sys.argv` names."""
    run_command(COMMANDS, "Masked image modeling for hierarchical vision transformers.", version("mimkit"))


if __name__ == "__main__":
    main()
