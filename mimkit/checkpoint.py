"""Weight files: read any safely, write safetensors + config.json in timm's hub layout."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from timm.models import load_state_dict, save_for_hf
from torch import Tensor, nn

from mimkit.decoder import Decoder
from mimkit.errors import UserError

State = dict[str, Tensor]
NAMES = ("model.safetensors", "pytorch_model.bin")  # in a folder, the first that is there


def read_weights(path: str | Path) -> State:
    """Tensors of a .safetensors file, of a .pth, .pt or .bin file, or of a folder with one of them or its shards.

    Pickles are read with weights_only; the wrappers `model`, `state_dict` and `module.` are taken off (by timm).
    """
    path = Path(path).expanduser()
    index = path / "model.safetensors.index.json"
    try:
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return {name: tensor for shard in shards for name, tensor in load_file(path / shard).items()}
        if path.is_dir():
            found = [path / name for name in NAMES if (path / name).is_file()]
            if not found:
                raise UserError(f"{path} holds no weights ({' or '.join(NAMES)}): pass the folder or file that does.")
            path = found[0]
        if not path.is_file():
            raise UserError(f"{path}: there is no such file or folder; check the path.")
        state = load_file(path) if path.suffix == ".safetensors" else load_state_dict(str(path), weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch, safetensors and pickle raise a dozen kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path} cannot be read as weights ({reason}): it is torn, or not only tensors.") from error
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def load_strictly(model: nn.Module, state: State, origin: str | Path) -> None:
    """Load every tensor, or say which ones do not fit and load none."""
    own = model.state_dict()
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [
            f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
            for k in sorted(own.keys() & state.keys())
            if own[k].shape != state[k].shape
        ],
    }
    if any(problems.values()):
        lists = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names)
        raise UserError(f"{origin} does not fit {type(model).__name__} ({lists}): check the model's name and options.")
    model.load_state_dict(state)


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place at the end, or vanishes when anything fails."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}-*"):  # by a process that was killed
        if (left / "old").is_dir() and not folder.exists():
            (left / "old").rename(folder)
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            folder.rename(old / "old")
            temporary.rename(folder)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replacing_file(file: str | Path) -> Iterator[Path]:
    """A temporary file beside `file`, with the same ending, that takes its place at the end, or vanishes."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{os.getpid()}-{file.name}")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_model(model: nn.Module, folder: str | Path, **data_config: Any) -> None:
    """Write a timm model so that `timm.create_model("local-dir:FOLDER", pretrained=True)` gives it back.

    Args:
        data_config: what travels with the weights: input_size (c H W), mean, std, interpolation.
    """
    with replacing(folder) as temporary:
        save_for_hf(model, str(temporary), safe_serialization=True, data_config=data_config)


def write_decoder(decoder: Decoder, folder: str | Path, **method: Any) -> None:
    """Write a decoder beside its encoder, with what it was trained for (mask_ratio, norm_targets)."""
    with replacing(folder) as temporary:
        save_file(decoder.state_dict(), temporary / NAMES[0])
        (temporary / "config.json").write_text(json.dumps({"decoder": decoder.config, **method}, indent=2))


def read_decoder(folder: str | Path) -> tuple[Decoder, dict[str, Any]]:
    """-> the decoder, and what it was trained for"""
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} holds no decoder (config.json and {NAMES[0]}): pass a run of mimkit.") from error
    decoder = Decoder(**config.pop("decoder"))
    load_strictly(decoder, read_weights(folder), folder)
    return decoder, config
