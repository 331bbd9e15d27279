"""Networks for dense prediction on disk: weights, and what is needed to build them again and to read their output."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from mimkit.data.transforms import Normalize, default_normalization
from mimkit.errors import UserError
from mimkit.files import read_json, replacing
from mimkit.io.hub import local_path
from mimkit.io.weights import load_strictly
from mimkit.models.factory import create_network


def write_dense(
    model: Any, folder: Path, kind: str, names: list[str], values: list[int], normalize: Normalize, **about: Any
) -> None:
    """model.safetensors and KIND.json.

    Args:
        model: has a `pyramid`, and `_model_args` for what stands on it.
        kind: segmenter or detector.
        names, values: of its classes, and what stands for each in files.
        about: what else is to be known.
    """
    backbone = model.pyramid.backbone
    arguments = {key: value for key, value in backbone._model_args.items() if key != "num_classes"}
    mean, std = normalize.values
    own = {
        "backbone": backbone.pretrained_cfg["architecture"],
        "backbone_args": json.loads(json.dumps(arguments)),
        f"{kind}_args": model._model_args,
        "in_chans": len(mean),
        "mean": mean,
        "std": std,
        "class_names": names,
        "class_values": values,
        **about,
    }
    with replacing(folder) as temporary:
        tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
        save_file(tensors, temporary / "model.safetensors")
        (temporary / f"{kind}.json").write_text(json.dumps(own, indent=1))


def find_dense(name: str, kind: str) -> Path | None:
    """A run, its last/ or best/ -> the folder that holds its network, if it is one of that kind."""
    return next((p for p in (local_path(name), local_path(name) / "best") if (p / f"{kind}.json").is_file()), None)


def read_dense(folder: Path, kind: str, build: Callable[..., Any]) -> tuple[Any, dict[str, Any]]:
    """What `write_dense` left, and what is to be known about it.

    Args:
        build: (backbone, classes, **arguments) -> the network.
    """
    try:
        own = read_json(folder / f"{kind}.json")
        state = load_file(folder / "model.safetensors")
        arguments = {"in_chans": own["in_chans"], **own["backbone_args"]}
        backbone = create_network(own["backbone"], weights=False, num_classes=0, **arguments)
        model = build(backbone, len(own["class_names"]), **own[f"{kind}_args"])
    except UserError:
        raise
    except Exception as error:  # safetensors' errors, JSON's and the system's
        raise UserError(f"{folder} is torn ({error}): train again, or pass another run.") from error
    load_strictly(model, state, folder)
    return model, own


def continue_from(
    folder: Path, kind: str, build: Callable[..., Any], names: list[str], other_start: bool = False
) -> tuple[Any, dict[str, Any], str, Normalize]:
    """`read_dense`, for a network that is to be evaluated or trained further.

    Args:
        names: of the classes in the data.
        other_start: whether the user has also asked for another start, which is refused.

    Returns:
        The network, its description, what it starts from, and the normalization of its input.

    Raises:
        UserError: if the user asked for another start, or the data have other classes.
    """
    if other_start:
        raise UserError(f"--model {folder} is a run of this recipe. Omit --init, --from-scratch and --model-args.")
    network, own = read_dense(folder, kind, build)
    known = own["class_names"]
    if known != names:
        raise UserError(
            f"--model {folder} has {len(known)} classes ({', '.join(known[:4])}, ...), but --data has {len(names)} "
            f"({', '.join(names[:4])}, ...). Pass data of the same classes."
        )
    return network, own, f"all weights of {folder}", default_normalization(own["in_chans"], own["mean"], own["std"])
