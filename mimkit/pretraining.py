"""Around a masked pre-training run: where its weights come from, how it is watched, what it leaves."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer import checkpoint_filter_fn as fit_swin
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as fit_vit
from torch import nn

from mimkit import evaluation
from mimkit.checkpoint import (
    State,
    load_strictly,
    on_meta,
    read_decoder,
    read_json,
    read_weights,
    write_decoder,
    write_model,
)
from mimkit.converters.mae import split
from mimkit.data import Normalise, Size, look
from mimkit.errors import UserError
from mimkit.health import health
from mimkit.hub import place_of
from mimkit.mae import MAE, UnitEncoder
from mimkit.models.hivit import HiViT
from mimkit.models.hivit import checkpoint_filter_fn as fit_hivit
from mimkit.models.swin import MaskedSwin
from mimkit.models.vit import UnitViT
from mimkit.simmim import MapEncoder, PixelHead, SimMIM
from mimkit.sources import Source, open_labelled
from mimkit.training import Run
from mimkit.visualize import curves, reconstructions

Method = MAE | SimMIM


@contextmanager
def always_strict() -> Iterator[None]:
    """timm lets go of strictness where classes differ or a stem cannot be adapted: not in here."""
    loose = nn.Module.load_state_dict

    def load_state_dict(module: nn.Module, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return loose(module, state_dict, True, assign)

    setattr(nn.Module, "load_state_dict", load_state_dict)  # noqa: B010
    try:
        yield
    finally:
        setattr(nn.Module, "load_state_dict", loose)  # noqa: B010


ANY_SIZE = {"dynamic_img_size": True, "strict_img_size": False}  # timm's ways to say that images may be of any size


def input_of(network: Any) -> tuple[int, Size, Normalise, float]:
    """What a network's weights are for: channels, size, colours and the share of the scaled image."""
    config = network.pretrained_cfg
    try:
        channels, height, width = config["input_size"]
        return channels, (height, width), Normalise(config["mean"], config["std"]), config.get("crop_pct") or 1.0
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # of a config.json that was changed
        raise UserError(
            f"The {type(network).__name__} does not say its input_size, mean and std as it should ({error!r}): get "
            "another copy of its config.json."
        ) from error


def comes_with_weights(name: str) -> bool:
    """Whether `create` loads weights: from a folder, from a hub, or those that a timm name's tag says."""
    return (Path(name) / "config.json").is_file() or ":" in name or "." in name


def create(name: str, weights: bool | None = None, state: State | None = None, **options: Any) -> Any:
    """timm.create_model, whose errors are a sentence.

    Args:
        name: a folder that timm can read, or a name in timm.
        weights: whether to load those of the folder or of the name's tag, strictly; by default where there are any.
        state: load these, strictly; tables follow the input size as timm has it. Needs their `num_classes`.
        options: timm's own; `drop_path_rate`, `img_size` and those of `ANY_SIZE` are left out where a network knows no
            such thing.
    """
    place = place_of(name)
    folder = place if (place / "config.json").is_file() else None
    known = f"local-dir:{folder}" if folder else name
    if folder:
        read_json(folder / "config.json")  # or a sentence
    pretrained = state is not None or (comes_with_weights(name) if weights is None else weights)
    overlay = {"source": "", "state_dict": state, "num_classes": options["num_classes"]} if state is not None else None
    try:
        with always_strict():
            model: Any = timm.create_model(known, pretrained=pretrained, pretrained_cfg_overlay=overlay, **options)
    except Exception as error:  # timm's, torch's, safetensors' and the system's, and any of a wrong config.json
        lines = str(error).splitlines() or [type(error).__name__]
        reason = " ".join(" ".join(lines if lines[0].startswith("Error(s) in loading") else lines[:1]).split())
        for unknown in ("drop_path_rate", "img_size", *ANY_SIZE):
            if unknown in options and f"unexpected keyword argument '{unknown}'" in reason:
                return create(name, weights, state, **{k: v for k, v in options.items() if k != unknown})
        if isinstance(error, UserError):
            raise
        if "Unknown model" in reason:
            near = timm.list_models(f"*{name[:5]}*")[:5] or timm.list_models("hivit_*")
            raise UserError(f"--model {name} is not known to timm or mimkit: try {', '.join(near)}.") from error
        if isinstance(error, TypeError | AssertionError):
            raise UserError(f"--model {name} does not take these options ({reason}): choose another model.") from error
        if pretrained and (folder or state):  # says what is missing, unexpected or of another shape
            form = {k: v for k, v in options.items() if k != "img_size"} if state else {}
            try:
                own = on_meta(timm.create_model, known, **form)
            except Exception:  # there is no such network
                own = None
            if own:
                load_strictly(own, state or read_weights(name), "the file" if state else name, assign=True)
        raise UserError(f"--model {name} cannot be loaded ({reason}): check the name or the folder.") from error
    model.pretrained_cfg.pop("state_dict", None)
    return model


def as_timm(encoder: Any) -> Any:
    """The timm model that an encoder is, or holds."""
    if isinstance(encoder, UnitViT):
        return encoder.vit
    return encoder.swin if isinstance(encoder, MaskedSwin) else encoder


def as_unit_encoder(model: Any) -> UnitEncoder:
    """A timm model as an encoder that can skip units."""
    return model if hasattr(model, "encode_units") else UnitViT(model)


def as_map_encoder(model: Any) -> MapEncoder:
    """A timm model as an encoder that computes mask tokens too."""
    return model if hasattr(model, "encode_masked") else MaskedSwin(model)


def fit(state: State, model: nn.Module) -> State:
    """A checkpoint of another input size for this model: its tables follow."""
    filters: dict[type, Any] = {HiViT: fit_hivit, VisionTransformer: fit_vit, SwinTransformer: fit_swin}
    return next((change(state, model) for kind, change in filters.items() if isinstance(model, kind)), state)


def colours(in_chans: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> Normalise:
    """By the mean and deviation given, one for each channel or one for all; ImageNet's for RGB, else .5 and .25."""
    rgb = in_chans == 3
    values = {
        "mean": list(mean or (IMAGENET_DEFAULT_MEAN if rgb else [0.5])),
        "std": list(std or (IMAGENET_DEFAULT_STD if rgb else [0.25])),
    }
    for name, numbers in values.items():
        if len(numbers) not in (1, in_chans) or (name == "std" and min(numbers) <= 0):
            raise UserError(
                f"--{name} {numbers} does not fit {in_chans} channels: give one or {in_chans}, std above 0."
            )
        values[name] = numbers * (in_chans // len(numbers))
    return Normalise(**values)


def initialise(mae: Method, source: str) -> str:
    """Go on from released weights: a run of mimkit, or a file or folder of an encoder, with or without its decoder.

    Returns:
        What was taken, in words.
    """
    run = place_of(source)
    folder = encoder_of(run)
    if folder != run or (run / "decoder").is_dir():
        encoder, decoder = read_weights(folder), read_weights(run / "decoder")
    else:
        encoder, decoder = split(read_weights(folder))
    model = as_timm(mae.encoder)
    try:
        if (folder / "config.json").is_file():  # the size that its tables are for
            config = read_json(folder / "config.json")
            model.pretrained_cfg["input_size"] = config["pretrained_cfg"]["input_size"]
        encoder = fit(encoder, model)
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"--init {source} does not hold a {type(model).__name__} ({error}): check --model.") from error
    load_strictly(model, encoder, source)
    if not decoder:
        return f"encoder from {source}; it has no decoder, which starts at random"
    load_strictly(mae.decoder, decoder, source)
    return f"encoder and decoder from {source}"


def export(run: Run, mae: Method, size: Size, normalise: Normalise) -> None:
    """Write encoder/ (timm's layout) and decoder/ into the run's directory."""
    mae = run.whole(mae)
    if run.accelerator.is_main_process:
        model = as_timm(mae.encoder)
        mean, std = normalise.values
        data = {"input_size": (model.in_chans, *size), "interpolation": "bicubic", "crop_pct": 1.0}
        write_model(model, run.folder / "encoder", mean=mean, std=std, **data)
        write_decoder(mae.decoder, run.folder / "decoder", mask_ratio=mae.mask_ratio, norm_targets=mae.norm_targets)
    run.accelerator.wait_for_everyone()


def encoder_of(run: Path) -> Path:
    """Where a run has its encoder: in encoder/, or at its root where it was pushed to the hub."""
    return run / "encoder" if (run / "encoder").is_dir() else run


def load_run(name: str | Path) -> tuple[Method, dict[str, Any]]:
    """-> the MAE or SimMIM of a run's encoder/ and decoder/; its encoder's pretrained_cfg (input_size, mean, std)"""
    folder = place_of(name)
    if not (encoder_of(folder) / "config.json").is_file():
        raise UserError(f"--run {name} holds no encoder/: pass the directory of a run that has saved a checkpoint.")
    decoder, method = read_decoder(folder / "decoder")
    model = create(str(encoder_of(folder)))
    try:
        if isinstance(decoder, PixelHead):
            return SimMIM(as_map_encoder(model), decoder, method["mask_ratio"]).eval(), model.pretrained_cfg
        return MAE(as_unit_encoder(model), decoder, **method).eval(), model.pretrained_cfg
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}/decoder/config.json fits no method ({error!r}): get another copy of it.") from error


class Watch:
    """kNN accuracy of an encoder on at most 5,000 + 2,000 labelled images, on the main process."""

    def __init__(self, run: Run, source: Source, size: Size, normalise: Normalise, required: bool):
        self.run, self.size, self.normalise = run, size, normalise
        self.parts: tuple[Source, Source] | None = None
        try:
            if source.streaming:
                raise UserError("a stream has no rows to choose from, which kNN needs: pass --streaming false.")
            if run.accelerator.is_main_process:
                parts = open_labelled(source.name)
                if parts[0].length < 10:
                    raise UserError(f"{parts[0].length} training images are fewer than its 10 neighbours.")
                self.parts = parts
        except UserError as error:
            if required:
                raise
            run.print(f"no kNN: {error}")

    def __call__(self, step: int, encoder: Any, when: str) -> None:
        """Measure, print and log."""
        encoder = self.run.whole(encoder)
        if self.parts:
            train, test = evaluation.extract_parts(
                as_timm(encoder),
                self.parts,
                self.size,
                self.normalise,
                images=(5_000, 2_000),
                workers=self.run.options.workers,
                max_bad=1.0,  # it is the images of training that are counted
                log=self.run.print_once,
            )
            found = evaluation.knn(train, test)
            words = ", ".join(f"{accuracy:.1f} % (k = {k})" for k, accuracy in found.items())
            self.run.print(f"kNN {when}: {words}, {len(train.y)} + {len(test.y)} images")
            self.run.log(step, **{f"knn_{k}": accuracy for k, accuracy in found.items()})
        self.run.accelerator.wait_for_everyone()


def finish(run: Run, mae: Method, source: Source, size: Size, normalise: Normalise) -> None:
    """The pictures, whether it went well, and what to do next."""
    mae = run.whole(mae)
    if not run.accelerator.is_main_process:
        return
    curves(run.metrics(), run.folder / "curves.png")
    images = look(source, size, as_timm(mae.encoder).in_chans, 8).images.to(run.accelerator.device)
    if len(images):
        reconstructions(mae, normalise(images), normalise, run.folder / "reconstructions.png")
    run.print("\n".join(health(run.folder)[0]))
    run.print(
        f"\nwrote {run.folder}/: curves.png, reconstructions.png, metrics.jsonl, config.yaml, checkpoints/, decoder/\n"
        f"and encoder/, which timm loads after `import mimkit` (without pretrained=True its weights would be random):\n"
        f'    timm.create_model("local-dir:{run.folder}/encoder", pretrained=True)\n'
        f"next: mimkit probe --model {run.folder}/encoder --data {run.options.data}\n"
        f"      mimkit reconstruct --run {run.folder} --images FOLDER --out picture.png"
    )


def describe(mae: Method, images: int, lr: float) -> str:
    """One line on a network and its learning rate."""
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (as_timm(mae.encoder), mae.decoder)]
    name = as_timm(mae.encoder).pretrained_cfg["architecture"]
    return f"{name}: encoder {sizes[0]:.2f} M + decoder {sizes[1]:.2f} M parameters; lr {lr:.3g}; {images:,} images"
