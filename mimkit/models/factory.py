"""Create a network by its name or from its folder, and make an encoder for pre-training out of it."""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer import checkpoint_filter_fn as filter_swin
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as filter_vit
from torch import nn

from mimkit.errors import UserError, did_you_mean, reason_of
from mimkit.files import read_json
from mimkit.io.hub import local_path
from mimkit.io.weights import PLAIN_OBJECTS, State, check_dims, check_finite, load_strictly, on_meta, read_weights
from mimkit.models.hivit import HiViT
from mimkit.models.hivit import checkpoint_filter_fn as filter_hivit
from mimkit.models.protocols import MapEncoder, UnitEncoder
from mimkit.models.svit import SViT
from mimkit.models.swin import MaskedSwin
from mimkit.models.vit import UnitViT

ANY_SIZE = {"dynamic_img_size": True, "strict_img_size": False}  # timm's options for input of any size


class InputSpec(NamedTuple):
    """The input that a network's weights are for."""

    in_chans: int
    size: tuple[int, int]  # height, width
    mean: list[float]  # per channel, in 0-1
    std: list[float]
    crop_pct: float = 1.0  # fraction of the scaled image that the crop shows
    crop_mode: str = "center"  # as in timm: center, squash or border
    interpolation: str = "bicubic"

    @property
    def crop(self) -> dict[str, Any]:
        """Return the arguments of `eval_transform`, which brings an image to this size."""
        return {key: getattr(self, key) for key in ("crop_pct", "crop_mode", "interpolation", "mean")}


def input_of(network: Any) -> InputSpec:
    """Return what a network's `pretrained_cfg` says about its input.

    Raises:
        UserError: if it does not, because someone changed its config.json.
    """
    config = network.pretrained_cfg
    try:
        channels, height, width = config["input_size"]
        mean, std = ([float(x) for x in config[name]] for name in ("mean", "std"))
        if not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise ValueError(f"mean {mean}, std {std}")
        kept = {key: config[key] for key in ("crop_pct", "crop_mode", "interpolation") if config.get(key)}
        return InputSpec(channels, (height, width), mean, std, **kept)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"The {type(network).__name__} lacks a valid input_size, mean or std ({error!r}). Get another copy of its "
            "config.json."
        ) from error


def has_weights(name: str) -> bool:
    """Return whether `create_network` loads weights: from a folder, from a hub, or those that a timm tag names."""
    return (Path(name) / "config.json").is_file() or ":" in name or "." in name


def check_name(name: str) -> None:
    """Refuse a name that is neither a folder, nor on a hub, nor known to timm, and name similar ones."""
    place, architecture = local_path(name), name.split(".")[0]
    if place.exists() or ":" in name:
        return
    if "/" in name:
        near = did_you_mean(place.name, [each.name for each in place.parent.glob("*/")])
        if not near and place.parts[:2] == ("runs", "mae_hivit"):
            near = " `accelerate launch recipes/mae_hivit.py` makes it."
        raise UserError(f"--model {name} does not exist. Pass a folder, or a network's name.{near}")
    if not timm.is_model(architecture):
        near = did_you_mean(architecture, timm.list_models()) or " `mimkit models` lists ours."
        if architecture.startswith(("hivit_", "hpvit_", "svit_")):
            near += " If it is a folder that `mimkit convert --out` writes, make it first."
        raise UserError(f"--model {name} is unknown to timm and mimkit.{near}")
    tags = timm.list_pretrained(f"{architecture}.*")
    if "." in name and name not in tags:
        near = f" Tags: {', '.join(tags[:4])}." if tags else " timm has none for it."
        raise UserError(f"--model {name} has an unknown tag of {architecture}.{did_you_mean(name, tags) or near}")


def architecture_of(name: str) -> str:
    """Return the name in timm of the network that a folder holds, or of a name without its tag."""
    config = local_path(name) / "config.json"
    return str(read_json(config).get("architecture")) if config.is_file() else name.split(".")[0]


def create_network(
    name: str, weights: bool | None = None, state: State | None = None, origin: str | Path = "", **options: Any
) -> Any:
    """Create a network as `timm.create_model` does, loading weights strictly.

    timm loads non-strictly if the number of classes differs from the checkpoint's, so the network is created with the
    checkpoint's own classifier, which is then reset.

    Args:
        name: a folder that timm can read, or a name in timm.
        weights: whether to load the weights of the folder or of the name's tag; by default if there are any.
        state: load these weights instead. Tables are adapted to the input size as in timm. Needs `num_classes`.
        origin: where `state` is from, for errors.
        options: timm's own. `drop_path_rate`, `img_size` and those of `ANY_SIZE` are omitted if the network does not
            know them.

    Raises:
        UserError: if the name is unknown, an option does not fit, or weights are missing, unexpected, misshapen or not
            finite.
    """
    check_name(name)
    place = local_path(name)
    folder = place if (place / "config.json").is_file() else None
    known = f"local-dir:{folder}" if folder else name
    if folder:
        read_json(folder / "config.json")  # raises a UserError if it is damaged
    load = state is not None or (has_weights(name) if weights is None else weights)
    overlay = {"source": "", "state_dict": state, "num_classes": options["num_classes"]} if state is not None else None
    classes = options.pop("num_classes", None) if load and state is None else None
    try:
        with torch.serialization.safe_globals(PLAIN_OBJECTS):
            model: Any = timm.create_model(known, pretrained=load, pretrained_cfg_overlay=overlay, **options)
    except Exception as error:  # timm's, torch's, safetensors' and the system's errors, and any of a wrong config.json
        options = options if classes is None else options | {"num_classes": classes}
        reason = reason_of(error)
        for unknown in ("drop_path_rate", "img_size", *ANY_SIZE):
            if unknown in options and f"unexpected keyword argument '{unknown}'" in reason:
                return create_network(
                    name, weights, state, origin, **{k: v for k, v in options.items() if k != unknown}
                )
        empty, given = None, state
        if load and (folder or state):
            form = {k: v for k, v in options.items() if k != "img_size"} if state else {}
            with suppress(Exception):  # there is no such network
                empty = on_meta(timm.create_model, known, **form)
        if empty:
            given = state or read_weights(name)
            check_dims(empty.state_dict(), given, origin or name)
        if isinstance(error, UserError):
            raise
        if isinstance(error, TypeError | AssertionError):
            raise UserError(f"--model {name} does not take these options ({reason}). Choose another model.") from error
        if empty and given:  # name what is missing, unexpected or misshapen
            load_strictly(empty, given, origin or name, assign=True)
        raise UserError(f"--model {name} cannot be loaded ({reason}). Check the name or the folder.") from error
    model.pretrained_cfg.pop("state_dict", None)
    if load:
        check_finite(model.state_dict(), origin or name)
    if classes is not None and classes != model.num_classes:
        model.reset_classifier(classes)
    return model


def adapt_to_input_size(state: State, model: nn.Module) -> State:
    """Adapt a checkpoint of another input size to a model, as timm does: resize its position tables."""
    filters: dict[type, Any] = {HiViT: filter_hivit, VisionTransformer: filter_vit, SwinTransformer: filter_swin}
    return next((filter_(state, model) for kind, filter_ in filters.items() if isinstance(model, kind)), state)


# Encoders of pre-training --------------------------------------------------------------------------------------------


def timm_model(encoder: Any) -> Any:
    """Return the timm model that an encoder is, or wraps."""
    if isinstance(encoder, UnitViT):
        return encoder.vit
    return encoder.swin if isinstance(encoder, MaskedSwin) else encoder


def size_of(encoder: Any) -> tuple[int, int]:
    """Return the width of an encoder's last stage, and its number of parameters."""
    model = timm_model(encoder)
    return model.feature_info[-1]["num_chs"], sum(p.numel() for p in model.parameters())


def as_unit_encoder(model: Any, fixed_positions: bool = False) -> UnitEncoder:
    """Return a timm model as an encoder that can skip units: a HiViT or an SViT itself, or a wrapped plain ViT."""
    return model if hasattr(model, "encode_units") else UnitViT(model, fixed_positions)


def as_map_encoder(model: Any) -> MapEncoder:
    """Return a timm model as an encoder that computes mask tokens: an SViT itself, or a wrapped Swin."""
    return model if hasattr(model, "encode_masked") else MaskedSwin(model)


def unit_encoder(name: str, multi_scale: bool = True, grad_checkpointing: bool = False, **options: Any) -> UnitEncoder:
    """Create an encoder that can skip units, for pre-training by MAE.

    Args:
        name: a HiViT, a plain ViT or an SViT: a name in timm, or a folder.
        multi_scale: give the decoder the features before each merge as well (HiViT only).
        grad_checkpointing: recompute activations to save memory.
        options: of `create_network`.

    Raises:
        UserError: if the network cannot skip units, such as a Swin.
    """
    network = _kind(name)
    if network == "SwinTransformer":
        raise UserError(f"--model {name} is a Swin, which cannot skip masked units. Use recipes/simmim.py instead.")
    forms: dict[str, dict[str, Any]] = {"HiViT": {"unit_form": True, "multi_scale": multi_scale}, "SViT": {}}
    model = create_network(name, num_classes=0, **forms.get(network, {"fc_norm": False}), **options)
    encoder = as_unit_encoder(model, fixed_positions=not has_weights(name))
    return _for_pretraining(encoder, grad_checkpointing)


def map_encoder(name: str, grad_checkpointing: bool = False, **options: Any) -> MapEncoder:
    """Create an encoder that computes the whole map, mask tokens included, for pre-training by SimMIM.

    Args:
        name: a Swin or an SViT: a name in timm, or a folder.
        grad_checkpointing: recompute activations to save memory.
        options: of `create_network`.

    Raises:
        UserError: if the network can skip units only, such as a HiViT.
    """
    network = _kind(name)
    if network in ("HiViT", "VisionTransformer"):
        raise UserError(f"--model {name} is a {network}, which can skip masked units. Use recipes/mae.py instead.")
    form: dict[str, Any] = {"drop_path_rate": 0.0} if network == "SwinTransformer" else {}  # timm's default is .1
    return _for_pretraining(as_map_encoder(create_network(name, num_classes=0, **form, **options)), grad_checkpointing)


def _kind(name: str) -> str:
    """Return the class of the network that `name` stands for, by the module of its entry point; "" for others."""
    try:
        entry = timm.model_entrypoint(architecture_of(name))
    except KeyError:  # unknown: create_network raises a UserError that names similar ones
        return ""
    kinds = {"hivit": "HiViT", "svit": "SViT", "swin_transformer": "SwinTransformer"}
    kinds |= dict.fromkeys(("vision_transformer", "deit"), "VisionTransformer")
    return kinds.get(entry.__module__.rsplit(".", 1)[-1], "")


def _for_pretraining(encoder: Any, grad_checkpointing: bool) -> Any:
    timm_model(encoder).set_grad_checkpointing(grad_checkpointing)
    if isinstance(encoder, SViT):
        encoder.freeze_tail()  # pre-training ends before it
    return encoder
