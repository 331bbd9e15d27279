"""The `mimkit` command."""

import csv
import pkgutil
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table

import mimkit.models  # registers the networks with timm
import mimkit.recipes
from mimkit.config import PositiveInt, run_command
from mimkit.conversion import convert as convert_module
from mimkit.conversion import family as families_module
from mimkit.data.loader import eval_loader, limit_bad_images, load_preview
from mimkit.data.order import cpu_count
from mimkit.data.sources import open_all, open_labeled, open_source
from mimkit.data.transforms import Normalize, parse_size
from mimkit.doctor.loss_bands import health
from mimkit.errors import UserError, cli_entry
from mimkit.evaluation import features, probes
from mimkit.evaluation import knn as knn_module
from mimkit.evaluation.features import apply_to_images
from mimkit.files import replacing_file
from mimkit.flops import count_gmacs
from mimkit.io import onnx
from mimkit.io.hub import check_target, upload
from mimkit.io.model_card import find_pushable, lay_out, model_card
from mimkit.io.weights import on_meta
from mimkit.methods.checkpoint import load_run
from mimkit.methods.reconstruction import reconstructions
from mimkit.models.factory import create_network, has_weights, input_of
from mimkit.tasks.classification import classifier
from mimkit.tasks.dense_checkpoint import find_dense
from mimkit.tasks.detection import predict_objects
from mimkit.tasks.segmentation import predict_masks
from mimkit.training import replay as replay_module
from mimkit.training.run import replaying

NOTES = {
    "hivit_nano": "ours, for tests and demonstrations",
    "hivit_b": "the paper's base; the released MAE weights",
    "hivit_b24": "the official README's 'base' row",
    "svit_nano": "ours, for tests and demonstrations",
    "hpvit_s": "around vit_small_patch16_224, as the others around theirs",
}


def models(img_size: int | str = 224) -> None:
    """List the networks: parameters, GMACs (convolutions + matrix products + attention), strides of the feature maps.

    Args:
        img_size: input in pixels, 224 or HEIGHTxWIDTH.
    """
    size = parse_size(img_size)
    table = Table("name", "parameters", f"GMACs at {size[0]}x{size[1]}", "strides", "note")
    for name in timm.list_models(["hivit_*", "hpvit_*", "svit_*"]):
        model = on_meta(timm.create_model, name, img_size=size)
        strides = ", ".join(str(stage["reduction"]) for stage in model.feature_info)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        table.add_row(name, f"{millions:.2f} M", f"{count_gmacs(model, 1, 3, *size):.2f}", strides, NOTES.get(name, ""))
    Console().print(table)


def _features(
    model: str, data: str, img_size: int | str | None, images: int | None, max_bad: float
) -> list[features.Features]:
    train, test = open_labeled(data)
    options: dict[str, Any] = {} if img_size is None else {"img_size": parse_size(img_size)}
    network = create_network(model, **options)
    if not has_weights(model):
        print(f"{model} is neither a folder nor a name with a tag: its weights are random")
    _, own_size, normalize, _ = input_of(network)
    size = options.get("img_size", own_size)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    workers = cpu_count() if torch.cuda.is_available() else 0
    counts = images, None
    return features.extract_parts(network, (train, test), size, normalize, counts, workers, max_bad)


def knn(
    model: str,
    data: str = "sample",
    img_size: int | str | None = None,
    images: PositiveInt | None = None,
    max_bad: float = 0.01,
) -> None:
    """Accuracy of the nearest neighbors among the training images, weighted as in DINO (temperature .07).

    Args:
        model: directory of an encoder, such as RUN/encoder, or a name known to timm (random without a tag).
        data: labeled images: 'sample', a folder with class folders, parquet files, or the name of a set on the hub.
        img_size: input in pixels; the model's own by default.
        images: use so many training images only.
        max_bad: share of images of each part that may be impossible to decode; they are left out.
    """
    train, test = _features(model, data, img_size, images, max_bad)
    for k, accuracy in knn_module.knn(train, test).items():
        print(f"kNN {accuracy:.2f} % (k = {k}, {len(train.y)} training and {len(test.y)} test images)")


def probe(
    model: str,
    data: str = "sample",
    img_size: int | str | None = None,
    images: PositiveInt | None = None,
    max_bad: float = 0.01,
) -> None:
    """Accuracy of a linear classifier on pooled features; its decay is chosen on a fifth of the training images.

    Args:
        model: directory of an encoder, such as RUN/encoder, or a name known to timm (random without a tag).
        data: labeled images: 'sample', a folder with class folders, parquet files, or the name of a set on the hub.
        img_size: input in pixels; the model's own by default.
        images: use so many training images only.
        max_bad: share of images of each part that may be impossible to decode; they are left out.
    """
    train, test = _features(model, data, img_size, images, max_bad)
    found = probes.linear_probe(train, test)
    print(
        f"linear probe {found.accuracy:.2f} % ({len(train.y)} training and {len(test.y)} test images; "
        f"weight decay {found.weight_decay:g}: {found.validation:.2f} % on held-out training images)"
    )


def reconstruct(run: str, images: str = "sample", out: str = "reconstructions.png", count: PositiveInt = 8) -> None:
    """Draw what a pre-training run makes of masked images: original, masked, reconstruction.

    Args:
        run: directory of the run.
        images: 'sample', a folder of images, parquet or .tar files.
        out: picture to write.
        count: images to show.
    """
    mae, config = load_run(run)
    if Path(out).suffix.lower() not in (".png", ".pdf", ".svg", ".jpg"):
        raise UserError(f"--out {out} is no picture: give a name that ends in .png, .pdf, .svg or .jpg.")
    in_chans, *size = config["input_size"]
    batch = load_preview(open_source(images), (size[0], size[1]), in_chans, count)
    if not len(batch.images):
        raise UserError(f"--images {images}: none can be decoded, such as {' ('.join(batch.bad[0])}).")
    for name, reason in batch.bad:
        print(f"skipped {name}, which cannot be used ({reason})")
    normalize = Normalize(config["mean"], config["std"])
    reconstructions(mae, normalize(batch.images), normalize, Path(out))
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
    """Turn a released plain ViT into an HPViT, or bring it to timm's layout, and prove that nothing was lost.

    Args:
        from_: alias (--list prints them), name of a plain ViT in timm, or folder of a timm model.
        to: hpvit, hpvit_s, hpvit_b, hpvit_l, hpvit_h, timm (the plain ViT), or a hivit_* or svit_* for its own.
        out: directory to write.
        checkpoint: file or folder of weights; the published ones by default.
        layout: the checkpoint's family, such as mae, hf, timm, dinov2; an alias has its own.
        weights: which of several states in a file: ema, teacher, student or model.
        source_args: arguments of the source's network in timm, where its name does not say.
        depths: blocks in each stage, such as 0-1-11-0, or coarse, light, fine, even, swin.
        pool: between stages: dw, conv or avg.
        pool_init: what pools start as: aligned, average, or the share of the aligned tap, from 0 to 1.
        attention: subgrid, or local for comparison.
        window: side of windows inside a sub-grid, for large images.
        padding: pixels before and after the image: [4,8], [8,4] or [0,12].
        prefix: keep or drop class and register tokens.
        dry_run: do and check all of it, but write nothing.
        no_checks: write without checks; report and config.json say so.
        list_: print aliases and families.
    """
    if list_:
        for layout, family in families_module.families().items():
            print(f"--layout {layout}: {family.title}")
            for alias, name in family.aliases.items():
                print(f"  {alias:18s} {name}")
        print(f"\nand the {len(families_module.plain_vits())} plain ViTs of timm, with or without a tag")
        return
    if from_ is None:
        raise UserError("Nothing to convert: pass --from NAME, such as vit_b_mae, or --list.")
    given = {
        "depths": depths,
        "pool": pool,
        "pool_init": pool_init,
        "attention": attention,
        "window": window,
        "padding": padding,
        "prefix": prefix,
    }
    report = convert_module.convert(
        from_,
        to,
        out,
        checkpoint,
        layout,
        weights,
        source_args,
        checks=not no_checks,
        dry_run=dry_run,
        **{name: value for name, value in given.items() if value is not None},
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
) -> None:
    """Label images by a fine-tuned classifier, their pixels by a segmenter, or find objects by a detector.

    Args:
        model: run of recipes/finetune.py, segment.py or detect.py, its last/ or best/, or any classifier that timm can
            load.
        images: an image, a folder of images, parquet or .tar files.
        out: table to write: image, label and probability (predictions.csv); for a segmenter a new folder of masks, each
            of the size of its image, in the class numbers of the data it was trained with (predictions); for a
            detector a new file of COCO's format, whose annotations have scores (predictions.json).
        top: how many labels for an image, the most likely first.
        crop_pct: share of the scaled image that is looked at; the model's own by default.
        max_bad: share of images that may be impossible to decode; they are left out.
    """
    if segmenter := find_dense(model, "segmenter"):
        out = out or "predictions"
        print(f"wrote {out}/: {predict_masks(segmenter, images, out, max_bad)} masks")
        return
    if detector := find_dense(model, "detector"):
        out = out or "predictions.json"
        print(f"wrote {out}: {predict_objects(detector, images, out, max_bad)} images")
        return
    out = out or "predictions.csv"
    network = classifier(model)
    in_chans, size, normalize, own_crop = input_of(network)
    names = network.pretrained_cfg.get("label_names") or list(map(str, range(network.num_classes)))
    if top > len(names):
        raise UserError(f"--top {top} is more than the {len(names)} classes of {model}: ask for fewer.")
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for source in open_all(images):
        loader = eval_loader(source, size, in_chans, batch_size=64, crop_pct=crop_pct or own_crop)
        for batch in limit_bad_images(loader, max_bad * source.length, print):
            if len(batch.images):
                likely, labels = apply_to_images(network, [batch], normalize, network).x.softmax(1).topk(top)
                for name, shares, chosen in zip(batch.names, likely.tolist(), labels.tolist(), strict=True):
                    rows += [[name, names[label], f"{share:.4f}"] for share, label in zip(shares, chosen, strict=True)]
    with replacing_file(out) as file, open(file, "w", newline="") as opened:
        table = csv.writer(opened)
        table.writerows([["image", "label", "probability"], *rows])
    print(f"wrote {out}: {len(rows) // top} images")


def export(model: str, out: str = "model.onnx") -> None:
    """Write a fine-tuned model as ONNX or as a torch.export program, for any batch size, and check what it computes.

    Args:
        model: run of recipes/finetune.py, its last/ or best/, or any classifier that timm can load.
        out: file to write, .onnx or .pt2. It holds mean, std, input_size and label_names as JSON, named mimkit.
    """
    network = classifier(model)
    known = ("input_size", "mean", "std", "crop_pct", "label_names")
    about = {name: network.pretrained_cfg[name] for name in known if network.pretrained_cfg.get(name) is not None}
    difference = onnx.export_model(network, Path(out), about)
    print(f"wrote {out}: the same as the model to {difference:.1e} of its largest output")


def push(run: str, /, *, to: str, private: bool = False, dry_run: bool = False) -> None:
    """Push what a run or a folder holds to the Hugging Face hub, with a model card of the run's own figures.

    Args:
        run: of a pre-training, a fine-tuning, a segmenter or a detector (its best/; RUN/last for the last), or a folder
            that `mimkit convert` wrote.
        to: repository on the hub, OWNER/NAME; an old one gets a new commit.
        private: make a new repository private.
        dry_run: print the card and leave the hub alone.
    """
    check_target(to)
    found = find_pushable(run)
    if dry_run:
        print(model_card(found, to))
        return
    with tempfile.TemporaryDirectory() as place:
        lay_out(found, to, Path(place))
        print(f"pushed {found.folder} to {upload(Path(place), to, private)}")


def replay(step: str, /) -> None:
    """Make a step once more that a run passed by, and say where its numbers stop being finite.

    Args:
        step: RUN/replay/step-N, which a run leaves: its batch, the weights before it, the names of its images.
    """
    folder = Path(step)
    recipe, config = replay_module.read_about(folder)["recipe"], folder.parent.parent / "config.yaml"
    if recipe not in recipes() or not config.is_file():
        raise UserError(f"{step} is not in the run that left it: pass RUN/replay/step-N, beside RUN/config.yaml.")
    with tempfile.TemporaryDirectory() as place, replaying(folder):
        argv = ["--config", str(config), "--out", f"{place}/run", "--workers", "0", "--track", "null"]
        import_module(f"mimkit.recipes.{recipe}").main(argv)


def recipes() -> list[str]:
    """Their names."""
    return [module.name for module in pkgutil.iter_modules(mimkit.recipes.__path__)]


def doctor(*words: str) -> None:
    """Say whether a recipe is ready to run (doctor RECIPE FLAGS), or a run is healthy (doctor --run DIR).

    Of a recipe of pre-training with its own flags, such as `mimkit doctor mae_hivit --data DIR --batch-size 256`, it
    looks at images, colors, units, steps, speed, memory and disk; of another one it does what --dry-run does there. It
    trains nothing and writes nothing. Exit code 1: something would spoil the run, or the run is not healthy; 2: the
    recipe refuses the flags.
    """
    known = recipes()
    first, *flags = words or ("--help",)
    if first in ("--help", "-h"):
        print(f"usage: mimkit doctor RECIPE FLAGS | mimkit doctor --run DIR\n\n{doctor.__doc__}\nrecipes: {known}")
        return
    if first == "--run" and len(flags) == 1:
        said, wrong = health(Path(flags[0]))
        print("\n".join(said))
        if wrong:
            sys.exit(1)
        return
    if first not in known:
        raise UserError(f"mimkit doctor {first}: choose a recipe among {', '.join(known)}, or pass --run DIR.")
    recipe = import_module(f"mimkit.recipes.{first}")
    if not hasattr(recipe.Options, "dry_run"):
        raise UserError(f"mimkit doctor {first}: this recipe has no --dry-run; start it, it is short.")
    recipe.main([*flags, "--dry-run"])


@cli_entry
def main() -> None:
    """The command's entry point."""
    commands: list[Callable[..., None]] = [
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
    run_command(commands, "Masked image modeling for hierarchical vision transformers.", version("mimkit"))


if __name__ == "__main__":
    main()
