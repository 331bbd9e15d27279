"""Weight files: read any safely, write safetensors + config.json in timm's hub layout."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import save_for_hf
from timm.models._manipulate import reinit_non_persistent_buffers
from torch import Tensor, nn

from mimkit.errors import UserError
from mimkit.files import read_json, replacing
from mimkit.io.hub import local_path

State = dict[str, Tensor]
NAMES = ("model.safetensors", "pytorch_model.bin")  # in a folder, the first that is there
WRAPPERS = {  # names under which files keep a state, by what --weights calls them, the most wanted first
    "ema": ("state_dict_ema", "model_ema", "ema"),
    "teacher": ("teacher", "target_encoder"),
    "student": ("student", "encoder"),
    "model": ("state_dict", "model", "module"),
}
DECODER = {"decoder_embed.": "embed.", "decoder_blocks.": "blocks.", "decoder_norm.": "norm.", "decoder_pred.": "pred."}
COMPUTED = ("decoder_pos_embed", "relative_position_index")  # sin-cos positions and an index, made anew
PREFIXES = ("module.", "_orig_mod.", "backbone.")


def split(state: State) -> tuple[State, State]:
    """State of a file, of a ViT or a HiViT -> (encoder's, decoder's; the latter is empty in an encoder-only file).

    In encoder-only files of HiViT the decoder's `mask_token` is left over alone.
    """
    encoder, decoder = {}, {}
    for name, tensor in state.items():
        prefix = next((p for p in DECODER if name.startswith(p)), None)
        if prefix:
            decoder[DECODER[prefix] + name.removeprefix(prefix)] = tensor
        elif name == "mask_token":
            decoder[name] = tensor
        elif name not in COMPUTED:
            encoder[name] = tensor
    return encoder, decoder if len(decoder) > 1 else {}


def read_weights(path: str | Path, which: str | None = None) -> State:
    """Tensors of a .safetensors file, of a .pth, .pt or .bin file, or of a folder with one of them or its shards.

    Pickles are read with weights_only. Wrappers (`model`, `state_dict`, ...) and prefixes (`module.`, `backbone.`,
    `_orig_mod.`) are taken off.

    Args:
        which: of several states in a file, ema, teacher, student or model; by default the first of them that is there.
    """
    return open_weights(path, which)[0]


def open_weights(path: str | Path, which: str | None = None) -> tuple[State, str]:
    """The same, and which of the states in the file was taken."""
    path = local_path(path)
    if which not in (None, *WRAPPERS):
        raise UserError(f"--weights {which} is unknown: choose among {', '.join(WRAPPERS)}.")
    try:
        contents = [_load(file) for file in weight_files(path)]
    except UserError:
        raise
    except Exception as error:  # torch, safetensors and pickle raise a dozen kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        if "TorchScript" in str(error):
            raise UserError(f"{path} is a TorchScript archive, which holds code: save its state_dict alone.") from error
        raise UserError(f"{path} cannot be read as weights ({reason}): it is torn, or not only tensors.") from error
    parts = [unwrap(content, which, path) for content in contents]
    state = {str(name): tensor for part, _ in parts for name, tensor in part.items() if isinstance(tensor, Tensor)}
    if not state:
        raise UserError(f"{path} holds no tensors: pass a file of weights.")
    return strip(state), parts[0][1]


def weight_files(path: Path) -> list[Path]:
    """The file, or the files of a folder, that hold the weights."""
    if path.is_dir():
        for name in NAMES:
            if (path / name).is_file():
                return [path / name]
            index = path / f"{name}.index.json"
            if index.is_file():
                return _shards(path, index)
        raise UserError(f"{path} holds no weights ({' or '.join(NAMES)}): pass the folder or file that does.")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file or folder; check the path.")
    return [path]


def _shards(folder: Path, index: Path) -> list[Path]:
    """Files that an index names, each of them in its own folder."""
    names = read_json(index).get("weight_map")
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    odd = [name for name in names if name != Path(name).name or not (folder / name).is_file()]
    if odd or not names:
        raise UserError(f"{index} names {', '.join(odd) or 'nothing'}, where files beside it are needed: get the rest.")
    return [folder / name for name in names]


def _load(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return load_file(file)
    with file.open("rb") as opened:
        zipped = opened.read(2) == b"PK"  # what torch.save writes, unlike its format before 1.6, can be mapped
    with torch.serialization.safe_globals([argparse.Namespace]):  # the options of a run, kept beside its weights
        return torch.load(file, "cpu", weights_only=True, mmap=zipped)


def unwrap(content: Any, which: str | None, path: Path) -> tuple[dict[str, Any], str]:
    """A file's content -> the names and tensors in it, and the way to them."""
    wanted = (
        [*WRAPPERS[which], *WRAPPERS["model"]] if which else [name for names in WRAPPERS.values() for name in names]
    )
    way: list[str] = []
    while isinstance(content, dict):
        inner = next((name for name in wanted if isinstance(content.get(name), dict)), None)
        if inner is None:
            break
        others = [name for names in WRAPPERS.values() for name in names if isinstance(content.get(name), dict)]
        way.append(inner if len(others) == 1 else f"{inner} (of {', '.join(others)})")
        content = content[inner]
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not names and tensors: pass a file of weights.")
    if which not in (None, "model") and not any(step.split(" ")[0] in WRAPPERS[which] for step in way):
        raise UserError(f"{path} holds no {which} weights: it has {', '.join(map(str, list(content)[:5]))}, ...")
    return content, ".".join(way)


def strip(state: State) -> State:
    """Without the prefixes that training puts before names; what else is in the file keeps its own name."""
    stripped = {}
    for name, tensor in state.items():
        short = name
        while short.startswith(PREFIXES):
            short = short.split(".", 1)[1]
        stripped[short if short == name or short not in state else name] = tensor
    return stripped


def misfits(own: State, state: State) -> tuple[list[str], list[str], list[str]]:
    """Names that keep a state from being a network's own: missing, unexpected, of another shape."""
    misshapen = [name for name in sorted(own.keys() & state.keys()) if own[name].shape != state[name].shape]
    return sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys()), misshapen


def load_strictly(model: nn.Module, state: State, origin: str | Path, assign: bool = False) -> None:
    """Load every tensor, or say which ones do not fit and load none."""
    own = model.state_dict()
    missing, unexpected, misshapen = misfits(own, state)
    shapes = [f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}" for name in misshapen]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if any(problems.values()):
        lists = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise UserError(f"{origin} does not fit {type(model).__name__} ({lists}): check the model's name and options.")
    model.load_state_dict(state, assign=assign)


def on_meta(build: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A network without memory: shapes only."""
    with torch.device("meta"):
        return build(*args, **kwargs)


def assemble(net: nn.Module, state: State) -> Any:
    """Weights into a network on the meta device, without copying them."""
    net.load_state_dict(state, assign=True)
    return materialize(net)


def materialize(net: nn.Module) -> Any:
    """Compute what a network on the meta device has beside its weights."""
    for module in net.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    reinit_non_persistent_buffers(net)
    return net


def write_model(model: nn.Module, folder: str | Path, **data_config: Any) -> None:
    """Write a timm model that was trained here; `timm.create_model("local-dir:FOLDER", pretrained=True)` gives it back.

    Args:
        data_config: what travels with the weights: input_size (c H W), mean, std, interpolation.
    """
    disown(model)
    with replacing(folder) as temporary:
        save_model(model, temporary, **data_config)


def disown(model: Any) -> None:
    """Forget where the weights come from that timm's name stands for: these are others."""
    for key in ("tag", "license", "origin_url", "paper_ids", "paper_name", "notes", "description"):
        model.pretrained_cfg.pop(key, None)


def save_model(model: nn.Module, folder: Path, label_names: list[str] | None = None, **data_config: Any) -> None:
    """The same, into a folder that is there."""
    about = {"label_names": label_names} if label_names else {}
    save_for_hf(model, str(folder), model_config=about, safe_serialization=True, data_config=data_config)
