"""Start a network from any checkpoint, in the form that a task needs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.models._input import _get_global_pool
from torch import nn

from mimkit.errors import UserError, some
from mimkit.io.hub import local_path
from mimkit.io.weights import State, on_meta, read_weights, split
from mimkit.models.factory import ANY_SIZE, create_network, has_weights, input_of

# In pre-training a network ends in a norm of its own, and a HiViT has no relative position bias
FINAL_NORMS = ("fc_norm.", "norm.")
BIAS_TABLE = "relative_position_bias_table"
FORM = ("unit_form", "multi_scale", "fc_norm", "use_fc_norm", "num_classes", "global_pool")
# Reads a released file of a named network: (name, file, **options) -> (its arguments in timm, weights), or None
ReadReleased = Callable[..., tuple[dict[str, Any], State] | None]


def network_folder(name: str) -> str:
    """Return the folder of a run's network, encoder/ or best/; any other name is returned as it is."""
    inside = [local_path(name) / part for part in ("encoder", "best")]
    found = next((str(folder) for folder in inside if (folder / "config.json").is_file()), name)
    if local_path(found).is_dir() and not (local_path(found) / "config.json").is_file():
        raise UserError(f"--model {name} holds no config.json. Pass a run, its encoder/, or a converted checkpoint.")
    return found


def read_network(
    name: str,
    init: str | None = None,
    scratch: bool = False,
    read_released: ReadReleased | None = None,
    **options: Any,
) -> tuple[Any, str]:
    """Load a network as its checkpoint has it: with its own classes and form, strictly.

    Args:
        name: a run, a folder that timm can read, or a name in timm.
        init: a file of weights for it. An MAE decoder in it is ignored.
        scratch: ignore the weights of the file, folder or name, and start at random.
        read_released: reads `init` if it is a file that the authors of the network released; see
            `mimkit.conversion.convert.read_released`.
        options: of `create_network`.

    Returns:
        The network, and a description of what it starts from.
    """
    name = network_folder(name)
    if init and not scratch:
        network = _from_file(name, local_path(init), read_released, options)
    else:
        network = create_network(name, weights=False if scratch else None, **options)
    loaded = not scratch and (init or has_weights(name))
    origin = f"all weights of {init or name}" if loaded else "random weights"
    return network, f"{network.pretrained_cfg['architecture']}: {origin}"


def _from_file(name: str, file: Path, read_released: ReadReleased | None, options: dict[str, Any]) -> Any:
    if file.is_dir():
        raise UserError(f"--init {file} is a folder, which describes its own network. Pass it as --model.")
    released = read_released(name, file, **options) if read_released and not local_path(name).exists() else None
    if released:
        form, state = released
    else:
        state = split(read_weights(file))[0]
        heads = _head_names(on_meta(create_network, name, False))
        counts = [(*state[f"{head}.weight"].shape, 1)[0] for head in heads if f"{head}.weight" in state]
        form = {"num_classes": counts[0] if counts else 0}
        if "fc_norm.weight" in state and "norm.weight" not in state:
            form["global_pool"] = "avg"
    return create_network(name, state=state, origin=file, **form | options)


def _head_names(network: Any) -> list[str]:
    names = network.pretrained_cfg.get("classifier") or []
    return [names] if isinstance(names, str) else list(names)


def load_network(
    name: str,
    init: str | None = None,
    scratch: bool = False,
    global_pool: str | None = None,
    read_released: ReadReleased | None = None,
    **options: Any,
) -> tuple[Any, str]:
    """Load a network in the form that classifies. See `read_network` for the other arguments.

    If the network has the form of masked pre-training, or another pooling is asked for, its weights move into the other
    form. The forms differ in the final norm and, for HiViT, in relative position biases, which start at 0.

    Args:
        global_pool: as in timm; the checkpoint's own by default.
    """
    source, origin = read_network(name, init, scratch, read_released, **options)
    unit_form, pool = getattr(source, "unit_form", False), _get_global_pool(source)
    if not unit_form and global_pool in (None, pool):
        return source, origin
    arguments = {key: value for key, value in source._model_args.items() if key not in FORM}
    arguments |= {"global_pool": global_pool} if global_pool else {}
    network = create_network(source.pretrained_cfg["architecture"], weights=False, num_classes=0, **arguments)
    network.pretrained_cfg.update(source.pretrained_cfg)
    if scratch:
        return network, origin
    state, weights = network.state_dict(), source.state_dict()
    fresh, dropped = state.keys() - weights.keys(), weights.keys() - state.keys()
    ends = (*FINAL_NORMS, *(f"{head}." for head in _head_names(source)))
    odd = [key for key in sorted(fresh) if not key.startswith(ends) and not key.endswith(BIAS_TABLE)]
    odd += [key for key in sorted(dropped) if not key.startswith((*ends, "attn_pool."))]
    if odd:
        raise UserError(f"--global-pool {global_pool} does not fit {some(odd)} of {name}. Leave it at {pool}.")
    network.load_state_dict({key: weights.get(key, tensor) for key, tensor in state.items()})
    tables = [key for key in fresh if key.endswith(BIAS_TABLE)]
    news = sorted(fresh.difference(tables)) + ([f"{len(tables)} relative bias tables at 0"] if tables else [])
    changes = {"fresh": news, "dropped": sorted(dropped)}
    return network, origin + "".join(f"; {how}: {', '.join(what)}" for how, what in changes.items() if what)


def start_from(
    model: str,
    *,
    init: str | None = None,
    from_scratch: bool = False,
    model_args: dict[str, Any] | None = None,
    in_chans: int = 3,
    read_released: ReadReleased | None = None,
    **given: Any,
) -> tuple[Any, str, tuple[list[float] | None, list[float] | None]]:
    """Load the network that a task fine-tunes.

    Args:
        model, init, from_scratch: `name`, `init` and `scratch` of `load_network`.
        model_args: arguments of the network from the user, who must not repeat one that follows from another option.
        in_chans: channels of the images.
        given: arguments of `load_network` that follow from other options; None for the checkpoint's own.

    Returns:
        The network, a description of what it starts from, and the mean and deviation that its weights expect, which are
        None if they are for another number of channels.
    """
    model_args, given = model_args or {}, given | {"in_chans": in_chans}
    if repeated := model_args.keys() & {*given, "num_classes"} - {*ANY_SIZE}:
        raise UserError(f"--model-args has {', '.join(repeated)}, which follows from another option. Omit it.")
    given = {key: value for key, value in given.items() if value is not None}
    network, origin = load_network(model, init, from_scratch, read_released=read_released, **given | model_args)
    spec = input_of(network)
    return network, origin, (spec.mean, spec.std) if len(spec.mean) == in_chans else (None, None)


def new_head(network: Any, classes: int, std: float | None) -> str:
    """Give a network a new classification head, and return a description of it.

    Args:
        std: draw its weights from a truncated normal distribution of this deviation (MAE: 2e-5), with bias 0. None
            keeps the network's own initialization.
    """
    network.reset_classifier(classes)
    head = network.get_classifier()
    for layer in head if isinstance(head, tuple) else (head,):
        if std is not None and hasattr(layer, "weight"):
            nn.init.trunc_normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
    deviation = "" if std is None else f", std {std:g}"
    return f"fresh head of {classes} classes ({', '.join(_head_names(network))}){deviation}"


def checkpoint_blocks(network: Any) -> None:
    """Recompute activations in the backward pass, if timm can do that for the network."""
    try:
        network.set_grad_checkpointing(True)
    except AssertionError as error:
        raise UserError(
            f"--grad-checkpointing: timm does not support it for a {type(network).__name__}. Omit the option."
        ) from error
