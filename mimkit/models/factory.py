"""Create a network by its name or from its folder, and make an encoder for pre-training out of it."""

from pathlib import Path
from typing import Any, NamedTuple

import timm
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer import checkpoint_filter_fn as filter_swin
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as filter_vit
from torch import nn

from mimkit.errors import UserError
from mimkit.files import read_json
from mimkit.io.hub import local_path
from mimkit.io.weights import State, load_strictly, on_meta, read_weights
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
    crop_pct: float  # fraction of the scaled image that the crop shows


def input_of(network: Any) -> InputSpec:
    """Return what a network's `pretrained_cfg` says about its input.

    Raises:
        UserError: if it does not, because someone changed its config.json.
    """
    config = network.pretrained_cfg
    try:
        channels, height, width = config["input_size"]
        mean, std = ([float(x) for x in config[name]] for name in ("mean", "std"))
        return InputSpec(channels, (height, width), mean, std, config.get("crop_pct") or 1.0)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"The {type(network).__name__} lacks a valid input_size, mean or std ({error!r}). Get another copy of its "
            "config.json."
        ) from error


def has_weights(name: str) -> bool:
    """Return whether `create_network` loads weights: from a folder, from a hub, or those that a timm tag names."""
    return (Path(name) / "config.json").is_file() or ":" in name or "." in name


def architecture_of(name: str) -> str:
    """Return the name in timm of the network that a folder holds, or of a name without its tag."""
    config = local_path(name) / "config.json"
    return str(read_json(config).get("architecture")) if config.is_file() else name.split(".")[0]


def create_network(name: str, weights: bool | None = None, state: State | None = None, **options: Any) -> Any:
    """Create a network as `timm.create_model` does, loading weights strictly.

    timm loads non-strictly if the number of classes differs from the checkpoint's, so the network is created with the
    checkpoint's own classifier, which is then reset.

    Args:
        name: a folder that timm can read, or a name in timm.
        weights: whether to load the weights of the folder or of the name's tag; by default if there are any.
        state: load these weights instead. Tables are adapted to the input size as in timm. Needs `num_classes`.
        options: timm's own. `drop_path_rate`, `img_size` and those of `ANY_SIZE` are omitted if the network does not
            know them.

    Raises:
        UserError: if the name is unknown, an option does not fit, or weights are missing, unexpected or misshapen.
    """
    place = local_path(name)
    folder = place if (place / "config.json").is_file() else None
    known = f"local-dir:{folder}" if folder else name
    if folder:
        read_json(folder / "config.json")  # raises a UserError if it is damaged
    load = state is not None or (has_weights(name) if weights is None else weights)
    overlay = {"source": "", "state_dict": state, "num_classes": options["num_classes"]} if state is not None else None
    classes = options.pop("num_classes", None) if load and state is None else None
    try:
        model: Any = timm.create_model(known, pretrained=load, pretrained_cfg_overlay=overlay, **options)
    except Exception as error:  # timm's, torch's, safetensors' and the system's errors, and any of a wrong config.json
        options = options if classes is None else options | {"num_classes": classes}
        lines = str(error).splitlines() or [type(error).__name__]
        reason = " ".join(" ".join(lines if lines[0].startswith("Error(s) in loading") else lines[:1]).split())
        for unknown in ("drop_path_rate", "img_size", *ANY_SIZE):
            if unknown in options and f"unexpected keyword argument '{unknown}'" in reason:
                return create_network(name, weights, state, **{k: v for k, v in options.items() if k != unknown})
        if isinstance(error, UserError):
            raise
        if "Unknown model" in reason:
            near = timm.list_models(f"*{name[:5]}*")[:5] or timm.list_models("hivit_*")
            raise UserError(
                f"--model {name} is unknown to timm and mimkit. Similar names: {', '.join(near)}."
            ) from error
        if isinstance(error, TypeError | AssertionError):
            raise UserError(f"--model {name} does not take these options ({reason}). Choose another model.") from error
        if load and (folder or state):  # name what is missing, unexpected or misshapen
            form = {k: v for k, v in options.items() if k != "img_size"} if state else {}
            try:
                empty = on_meta(timm.create_model, known, **form)
            except Exception:  # there is no such network
                empty = None
            if empty:
                load_strictly(empty, state or read_weights(name), "the file" if state else name, assign=True)
        raise UserError(f"--model {name} cannot be loaded ({reason}). Check the name or the folder.") from error
    model.pretrained_cfg.pop("state_dict", None)
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
