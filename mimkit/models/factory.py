"""Create a network by name or from a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer import checkpoint_filter_fn as fit_swin
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as fit_vit
from torch import nn

from mimkit.data.transforms import Normalize, Size
from mimkit.errors import UserError
from mimkit.files import read_json
from mimkit.io.hub import local_path
from mimkit.io.weights import State, load_strictly, on_meta, read_weights
from mimkit.models.hivit import HiViT
from mimkit.models.hivit import checkpoint_filter_fn as fit_hivit
from mimkit.models.protocols import MapEncoder, UnitEncoder
from mimkit.models.swin import MaskedSwin
from mimkit.models.vit import UnitViT


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


def input_of(network: Any) -> tuple[int, Size, Normalize, float]:
    """What a network's weights are for: channels, size, colors and the share of the scaled image."""
    config = network.pretrained_cfg
    try:
        channels, height, width = config["input_size"]
        return channels, (height, width), Normalize(config["mean"], config["std"]), config.get("crop_pct") or 1.0
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # of a config.json that was changed
        raise UserError(
            f"The {type(network).__name__} does not say its input_size, mean and std as it should ({error!r}): get "
            "another copy of its config.json."
        ) from error


def has_weights(name: str) -> bool:
    """Whether `create` loads weights: from a folder, from a hub, or those that a timm name's tag says."""
    return (Path(name) / "config.json").is_file() or ":" in name or "." in name


def create_network(name: str, weights: bool | None = None, state: State | None = None, **options: Any) -> Any:
    """timm.create_model, whose errors are a sentence.

    Args:
        name: a folder that timm can read, or a name in timm.
        weights: whether to load those of the folder or of the name's tag, strictly; by default where there are any.
        state: load these, strictly; tables follow the input size as timm has it. Needs their `num_classes`.
        options: timm's own; `drop_path_rate`, `img_size` and those of `ANY_SIZE` are left out where a network knows no
            such thing.
    """
    place = local_path(name)
    folder = place if (place / "config.json").is_file() else None
    known = f"local-dir:{folder}" if folder else name
    if folder:
        read_json(folder / "config.json")  # or a sentence
    pretrained = state is not None or (has_weights(name) if weights is None else weights)
    overlay = {"source": "", "state_dict": state, "num_classes": options["num_classes"]} if state is not None else None
    try:
        with always_strict():
            model: Any = timm.create_model(known, pretrained=pretrained, pretrained_cfg_overlay=overlay, **options)
    except Exception as error:  # timm's, torch's, safetensors' and the system's, and any of a wrong config.json
        lines = str(error).splitlines() or [type(error).__name__]
        reason = " ".join(" ".join(lines if lines[0].startswith("Error(s) in loading") else lines[:1]).split())
        for unknown in ("drop_path_rate", "img_size", *ANY_SIZE):
            if unknown in options and f"unexpected keyword argument '{unknown}'" in reason:
                return create_network(name, weights, state, **{k: v for k, v in options.items() if k != unknown})
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


def timm_model(encoder: Any) -> Any:
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


def adapt_to_input_size(state: State, model: nn.Module) -> State:
    """A checkpoint of another input size for this model: its tables follow."""
    filters: dict[type, Any] = {HiViT: fit_hivit, VisionTransformer: fit_vit, SwinTransformer: fit_swin}
    return next((change(state, model) for kind, change in filters.items() if isinstance(model, kind)), state)
