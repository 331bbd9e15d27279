"""Checkpoints of segmenters and detectors: weights, and a description from which the network is built again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from mimkit.data.transforms import Normalize, default_normalization
from mimkit.errors import UserError, reason_of
from mimkit.files import read_json, replacing
from mimkit.io.hub import local_path
from mimkit.io.weights import load_strictly
from mimkit.models.factory import create_network


def write_dense(
    model: Any, folder: Path, kind: str, names: list[str], values: list[int], normalize: Normalize, **about: Any
) -> None:
    """Write a network into a folder: model.safetensors, and its description in KIND.json.

    Args:
        model: has a `pyramid` around a timm backbone, and `_model_args`, the arguments that it is built with.
        kind: segmenter or detector.
        names: names of the classes.
        values: the number that stands for each class in files of masks or annotations.
        normalize: normalization of the input.
        about: further entries of the description.
    """
    backbone = model.pyramid.backbone
    arguments = {key: value for key, value in backbone._model_args.items() if key != "num_classes"}
    mean, std = normalize.values
    description = {
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
        (temporary / f"{kind}.json").write_text(json.dumps(description, indent=1))


def find_dense(name: str, kind: str) -> Path | None:
    """Return the folder of a network of this kind: `name`, or best/ inside it. None if there is no such network."""
    return next((p for p in (local_path(name), local_path(name) / "best") if (p / f"{kind}.json").is_file()), None)


def read_dense(folder: Path, kind: str, build: Callable[..., Any]) -> tuple[Any, dict[str, Any]]:
    """Read what `write_dense` wrote. Return the network and its description.

    Args:
        build: the network's constructor, of the backbone, the number of classes, and the arguments by name.

    Raises:
        UserError: the files are damaged or do not fit each other.
    """
    try:
        description = read_json(folder / f"{kind}.json")
        state = load_file(folder / "model.safetensors")
        arguments = {"in_chans": description["in_chans"], **description["backbone_args"]}
        backbone = create_network(description["backbone"], weights=False, num_classes=0, **arguments)
        model = build(backbone, len(description["class_names"]), **description[f"{kind}_args"])
    except UserError:
        raise
    except Exception as error:  # of safetensors, JSON and the system, and any that a changed description causes
        raise UserError(f"{folder} is corrupt ({reason_of(error)}). Train again, or pass another run.") from error
    load_strictly(model, state, folder)
    return model, description


def continue_from(
    folder: Path, kind: str, build: Callable[..., Any], names: list[str], other_start: bool = False
) -> tuple[Any, dict[str, Any], str, Normalize]:
    """Read a network that is to be evaluated or trained further, like `read_dense`.

    Args:
        names: names of the classes in the data.
        other_start: whether the user has also asked for another start, which is refused.

    Returns:
        The network, its description, what it starts from, and the normalization of its input.

    Raises:
        UserError: the user asked for another start, or the data have other classes.
    """
    if other_start:
        raise UserError(f"--model {folder} is a run of this recipe. Omit --init, --from-scratch and --model-args.")
    network, description = read_dense(folder, kind, build)
    known = description["class_names"]
    if known != names:
        raise UserError(
            f"--model {folder} has {len(known)} classes ({', '.join(known[:4])}, ...), but --data has {len(names)} "
            f"({', '.join(names[:4])}, ...). Pass data of the same classes."
        )
    normalize = default_normalization(description["in_chans"], description["mean"], description["std"])
    return network, description, f"all weights of {folder}", normalize
