"""Read weight files safely, and write safetensors and config.json in the layout of timm's hub."""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mode
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf
from timm.models._manipulate import reinit_non_persistent_buffers
from torch import Tensor, nn

from mimkit.errors import UserError, reason_of, some
from mimkit.files import read_json, replacing
from mimkit.io.hub import local_path

State = dict[str, Tensor]
NAMES = ("model.safetensors", "pytorch_model.bin")  # the first of these that a folder holds is read
WRAPPERS = {  # keys under which files store a state dict, for each value of --weights, in order of preference
    "ema": ("state_dict_ema", "model_ema", "ema"),
    "teacher": ("teacher", "target_encoder"),
    "student": ("student", "encoder"),
    "model": ("state_dict", "model", "module"),
}
DECODER = {"decoder_embed.": "embed.", "decoder_blocks.": "blocks.", "decoder_norm.": "norm.", "decoder_pred.": "pred."}
COMPUTED = ("decoder_pos_embed", "relative_position_index")  # sin-cos positions and an index, which are recomputed
PREFIXES = ("module.", "_orig_mod.", "backbone.")
NETWORK_PREFIXES = ("model.", "net.")  # Lightning's usual names of the network, which then start all names
SCALAR = np.float64().__reduce__()[0]  # makes any scalar of numpy
# What training scripts save beside the weights: their options, and figures such as the best accuracy
PLAIN_OBJECTS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    SCALAR,
    (SCALAR, "numpy.core.multiarray.scalar"),  # its name in numpy 1
    *{type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"},
]


def split(state: State) -> tuple[State, State]:
    """Split the state dict of an MAE file (ViT or HiViT) into the encoder's and the decoder's.

    The decoder's is empty for an encoder-only file. Such a file of a HiViT still holds `mask_token`, which alone does
    not count as a decoder.
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
    """Read the tensors of a .safetensors, .pth, .pt or .bin file, or of a folder that holds one of them or its shards.

    Pickles are read with `weights_only=True`. Wrappers (`model`, `state_dict`, ...) and prefixes (`module.`,
    `backbone.`, `_orig_mod.`, and `model.` or `net.` if they start all names) are removed.

    Args:
        path: a local path, or hf-hub:OWNER/NAME.
        which: the state dict to read from a file with several: ema, teacher, student or model. By default it is the
            first of these that the file holds.

    Raises:
        UserError: the file is missing, corrupt, or holds more than tensors and plain containers.
    """
    return open_weights(path, which)[0]


def open_weights(path: str | Path, which: str | None = None) -> tuple[State, str]:
    """Like `read_weights`, but also return the name of the state dict that was selected."""
    path = local_path(path)
    if which not in (None, *WRAPPERS):
        raise UserError(f"--weights {which} is unknown: choose among {', '.join(WRAPPERS)}.")
    try:
        contents = [_load(file) for file in weight_files(path)]
    except UserError:
        raise
    except Exception as error:  # torch, safetensors and pickle raise a dozen types
        if "TorchScript" in str(error):
            raise UserError(f"{path} is a TorchScript archive, which holds code: save only its state_dict.") from error
        if kind := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} cannot be read as weights: it also holds a {kind[1]}, which could run code. In the program "
                "that wrote it, save the weights alone: torch.save(model.state_dict(), FILE)."
            ) from error
        raise UserError(
            f"{path} cannot be read as weights ({reason_of(error)}): pass an intact file that holds only tensors."
        ) from error
    parts = [unwrap(content, which, path) for content in contents]
    state = {str(name): tensor for part, _ in parts for name, tensor in part.items() if isinstance(tensor, Tensor)}
    if not state:
        raise UserError(f"{path} holds no tensors: pass a file of weights.")
    return strip(state), parts[0][1]


def weight_files(path: Path) -> list[Path]:
    """Return the files that hold the weights of a path: the path itself, or one or more files of a folder."""
    if path.is_dir():
        for name in NAMES:
            if (path / name).is_file():
                return [path / name]
            index = path / f"{name}.index.json"
            if index.is_file():
                return _shards(path, index)
        raise UserError(f"{path} holds no weights ({' or '.join(NAMES)}): pass the folder or file that holds them.")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file or folder; check the path.")
    return [path]


def _shards(folder: Path, index: Path) -> list[Path]:
    """Return the shards that an index names. All must be in the folder of the index."""
    names = read_json(index).get("weight_map")
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    wrong = [name for name in names if name != Path(name).name or not (folder / name).is_file()]
    if wrong or not names:
        raise UserError(
            f"{index} names {some(wrong) or 'nothing'}, but files in its own folder are needed: get all shards."
        )
    return [folder / name for name in names]


def _load(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return load_file(file)
    with file.open("rb") as opened:
        zipped = (
            opened.read(2) == b"PK"
        )  # only the zip format of torch.save, not the one before torch 1.6, can be mapped
    with torch.serialization.safe_globals(PLAIN_OBJECTS):
        return torch.load(file, "cpu", weights_only=True, mmap=zipped)


def unwrap(content: Any, which: str | None, path: Path) -> tuple[dict[str, Any], str]:
    """Return the state dict inside the content of a file, and the keys that lead to it, joined by dots."""
    every_key = [key for keys in WRAPPERS.values() for key in keys]
    wanted = [*WRAPPERS[which], *WRAPPERS["model"]] if which else every_key
    route: list[str] = []
    while isinstance(content, dict):
        inner = next((key for key in wanted if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        candidates = [key for key in every_key if isinstance(content.get(key), dict)]
        route.append(inner if len(candidates) == 1 else f"{inner} (of {', '.join(candidates)})")
        content = content[inner]
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not names and tensors: pass a file of weights.")
    if which not in (None, "model") and not any(key.split(" ")[0] in WRAPPERS[which] for key in route):
        raise UserError(f"{path} holds no {which} weights: it has {some(content)}.")
    return content, ".".join(route)


def strip(state: State) -> State:
    """Remove the prefixes that training adds to names, except where the shorter name is taken by another tensor."""
    stripped = {}
    for name, tensor in state.items():
        short = name
        while short.startswith(PREFIXES):
            short = short.split(".", 1)[1]
        stripped[short if short == name or short not in state else name] = tensor
    for prefix in NETWORK_PREFIXES:
        if stripped and all(name.startswith(prefix) for name in stripped):
            return strip({name.removeprefix(prefix): tensor for name, tensor in stripped.items()})
    return stripped


def misfits(own: State, state: State) -> tuple[list[str], list[str], list[str]]:
    """Compare a state dict with a network's own, and return the names that are missing, unexpected, or misshapen.

    Names with few parts come first, because those of the network itself tell more than those of its blocks.
    """

    def order(names: set[str]) -> list[str]:
        return sorted(names, key=lambda name: (name.count("."), name))

    misshapen = {name for name in own.keys() & state.keys() if own[name].shape != state[name].shape}
    return order(own.keys() - state.keys()), order(state.keys() - own.keys()), order(misshapen)


def other_size(own: State, state: State) -> str:
    """Say in which width and depth a state dict differs from a network's own, or return "".

    The width is the most frequent size of vectors, which are biases and scales. A depth is the number of modules in a
    list, such as `blocks`.
    """

    def depths(names: State) -> dict[str, set[str]]:
        lists = defaultdict(set)
        for name in names:
            for match in re.finditer(r"\.(\d+)(?=\.)", name):
                lists[name[: match.start()]].add(match[1])
        return lists

    def width(tensors: State) -> int:
        return mode([len(tensor) for tensor in tensors.values() if tensor.ndim == 1] or [0])

    ours, theirs = depths(own), depths(state)
    sizes = [("width", width(state), width(own))]
    sizes += [(f"depth of {name}", len(theirs[name]), len(ours[name])) for name in sorted(ours.keys() & theirs.keys())]
    return some([f"{name} {found} instead of {wanted}" for name, found, wanted in sizes if found != wanted], 2)


def check_dims(own: State, state: State, origin: str | Path) -> None:
    """Refuse tensors that have another number of dimensions than a network's own, which does not depend on its sizes.

    Args:
        origin: where the state dict is from, for the error.
    """
    odd = [
        f"{name} {tuple(tensor.shape)} has {tensor.ndim} dimensions instead of {own[name].ndim}"
        for name, tensor in sorted(state.items())
        if name in own and own[name].ndim != tensor.ndim
    ]
    if odd:
        raise UserError(f"{origin} is malformed: {some(odd)}. Get another copy of it.")


def check_values(state: State, origin: str | Path) -> None:
    """Refuse parameters that no network can compute with: sparse or integer tensors, and NaN or infinite values.

    Args:
        origin: where the state dict is from, for the error.
    """
    for name, tensor in state.items():
        if tensor.layout != torch.strided or not tensor.is_floating_point():
            raise UserError(
                f"{origin}: {name} is {tensor.layout}, {tensor.dtype}, not a dense floating-point tensor. Check the "
                "file."
            )
    check_finite(state, origin)


def check_finite(state: State, origin: str | Path) -> None:
    """Refuse weights with NaN or infinite values, or with negative variances, of which BatchNorm makes NaN.

    Args:
        origin: where the state dict is from, for the error.
    """
    if broken := [name for name, tensor in state.items() if not tensor.float().isfinite().all()]:
        raise UserError(
            f"{origin} has NaN or infinite values in {some(broken)}. Pass another file, or an earlier checkpoint."
        )
    if broken := [name for name, tensor in state.items() if name.endswith("running_var") and (tensor < 0).any()]:
        raise UserError(f"{origin} has negative variances in {some(broken)}. Get another copy of it.")


def load_strictly(model: nn.Module, state: State, origin: str | Path, assign: bool = False) -> None:
    """Load a state dict whose names and shapes all match, or load nothing.

    Args:
        origin: where the state dict is from, for the error.
        assign: use the given tensors as the parameters instead of copying them.

    Raises:
        UserError: names are missing, unexpected or of another shape, values are not finite, or a variance is negative.
    """
    own = model.state_dict()
    missing, unexpected, misshapen = misfits(own, state)
    shapes = [f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}" for name in misshapen]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    problems = {kind: names for kind, names in problems.items() if names}
    if problems:
        few = sum(map(len, problems.values())) <= 3
        lists = [f"{kind}: {some(names, 3 if few else 3 // len(problems))}" for kind, names in problems.items()]
        if shapes and (size := other_size(own, state)):
            counts = ", ".join(f"{len(names)} {kind}" for kind, names in problems.items())
            lists = [size, f"{counts}, such as {shapes[0]}"]
        raise UserError(
            f"{origin} does not fit {type(model).__name__} ({'; '.join(lists)}): check the model's name and options."
        )
    check_values({name: tensor for name, tensor in state.items() if own[name].is_floating_point()}, origin)
    model.load_state_dict(state, assign=assign)


def on_meta(build: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Build a network on the meta device, which has shapes but no memory."""
    with torch.device("meta"):
        return build(*args, **kwargs)


def assemble(net: nn.Module, state: State) -> Any:
    """Give a network on the meta device these weights, without copying them."""
    net.load_state_dict(state, assign=True)
    return materialize(net)


def materialize(net: nn.Module) -> Any:
    """Compute the non-persistent buffers of a network that was on the meta device."""
    for module in net.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    reinit_non_persistent_buffers(net)
    return net


def write_model(model: nn.Module, folder: str | Path, **data_config: Any) -> None:
    """Write a trained timm model to a folder, which replaces an existing one only when it is complete.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` loads the model again.

    Args:
        data_config: the preprocessing that goes with the weights: input_size (c H W), mean, std, interpolation.
    """
    disown(model)
    with replacing(folder) as temporary:
        save_model(model, temporary, **data_config)


def disown(model: Any) -> None:
    """Remove the origin of timm's own weights from a model's `pretrained_cfg`, because its weights are now others."""
    for key in ("tag", "license", "origin_url", "paper_ids", "paper_name", "notes", "description"):
        model.pretrained_cfg.pop(key, None)


def save_model(model: nn.Module, folder: Path, label_names: list[str] | None = None, **data_config: Any) -> None:
    """Write a timm model's model.safetensors and config.json into an existing folder.

    Args:
        label_names: names of the classes.
        data_config: the preprocessing that goes with the weights, as for `write_model`.
    """
    about = {"label_names": label_names} if label_names else {}
    save_for_hf(model, str(folder), model_config=about, safe_serialization=True, data_config=data_config)
    config = without_repeated_classes(read_json(folder / "config.json"))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def without_repeated_classes(config: dict[str, Any]) -> dict[str, Any]:
    """Remove `num_classes` from the `model_args` of a config.json, which has an entry of its own for it.

    timm reads either. transformers passes the number of classes itself, and would pass it twice.
    """
    arguments = {key: value for key, value in config.get("model_args", {}).items() if key != "num_classes"}
    return {**config, "model_args": arguments}
