"""Start a network from any checkpoint, in the form that a task needs."""

from pathlib import Path
from typing import Any

from timm.models._input import _get_global_pool
from torch import nn

from mimkit.conversion.convert import as_own
from mimkit.conversion.family import families, own_family
from mimkit.data.transforms import Normalize, default_normalization
from mimkit.errors import UserError
from mimkit.io.hub import local_path
from mimkit.io.weights import on_meta, read_weights, split
from mimkit.models.factory import ANY_SIZE, create_network, has_weights, input_of

# Where the forms of a network differ: in pre-training it ends in a norm of its own, and HiViT has no relative bias
ENDS = ("fc_norm.", "norm.")
TABLE = "relative_position_bias_table"
FORM = ("unit_form", "multi_scale", "fc_norm", "use_fc_norm", "num_classes", "global_pool")


def network_folder(name: str) -> str:
    """A run -> the folder of its network: encoder/ of a pre-training, best/ of a fine-tuning; else the name itself."""
    inside = [local_path(name) / part for part in ("encoder", "best")]
    found = next((str(folder) for folder in inside if (folder / "config.json").is_file()), name)
    if local_path(found).is_dir() and not (local_path(found) / "config.json").is_file():
        raise UserError(f"--model {name} holds no config.json: pass a run, its encoder/, or a converted checkpoint.")
    if name.startswith("runs/") and not Path(name).exists():
        raise UserError(f"--model {name} is not there: `accelerate launch recipes/mae_hivit.py` makes runs/mae_hivit.")
    return found


def read_network(name: str, init: str | None = None, scratch: bool = False, **options: Any) -> tuple[Any, str]:
    """A network as its checkpoint has it: built with its own classes and form, loaded strictly.

    Args:
        name: a run, a folder that timm can read, or a name in timm.
        init: a file of weights for it; an MAE's decoder in it is left out.
        scratch: leave the weights of the file, folder or name, and start at random.
        options: timm's own.

    Returns:
        The network, and in words what it starts with.
    """
    name = network_folder(name)
    if init and not scratch:
        network = _from_file(name, local_path(init), options)
    else:
        network = create_network(name, weights=False if scratch else None, **options)
    loaded = not scratch and (init or has_weights(name))
    origin = f"all weights of {init or name}" if loaded else "weights at random"
    return network, f"{network.pretrained_cfg['architecture']}: {origin}"


def _from_file(name: str, file: Path, options: dict[str, Any]) -> Any:
    if file.is_dir():
        raise UserError(f"--init {file} is a folder, which says itself what it holds: pass it as --model.")
    layout = None if local_path(name).exists() else own_family(name)
    if layout and families()[layout].fits(read_weights(file)):
        target, _ = as_own(name, file, **options)
        form, state = {**target.net._model_args, "num_classes": target.net.num_classes}, target.state
    else:
        state = split(read_weights(file))[0]
        counts = [
            len(state[f"{head}.weight"])
            for head in _heads(on_meta(create_network, name, False))
            if f"{head}.weight" in state
        ]
        form = {"num_classes": counts[0] if counts else 0}
        if "fc_norm.weight" in state and "norm.weight" not in state:
            form["global_pool"] = "avg"
    return create_network(name, state=state, **form | options)


def _heads(network: Any) -> list[str]:
    found = network.pretrained_cfg.get("classifier") or []
    return [found] if isinstance(found, str) else list(found)


def load_network(
    name: str, init: str | None = None, scratch: bool = False, global_pool: str | None = None, **options: Any
) -> tuple[Any, str]:
    """`read`, in the form that classifies.

    If the network has the form of masked pre-training, or its pooling is to be another one, its weights move into the
    other form. That differs at its end (`ENDS`) and, for HiViT, by relative position biases, which start at 0.

    Args:
        global_pool: as in timm; the checkpoint's own by default.
    """
    own, words = read_network(name, init, scratch, **options)
    unit_form, pool = getattr(own, "unit_form", False), _get_global_pool(own)
    if not unit_form and global_pool in (None, pool):
        return own, words
    arguments = {key: value for key, value in own._model_args.items() if key not in FORM}
    arguments |= {"global_pool": global_pool} if global_pool else {}
    network = create_network(own.pretrained_cfg["architecture"], weights=False, num_classes=0, **arguments)
    network.pretrained_cfg.update(own.pretrained_cfg)
    if scratch:
        return network, words
    state, others = network.state_dict(), own.state_dict()
    fresh, left = state.keys() - others.keys(), others.keys() - state.keys()
    ends = (*ENDS, *(f"{head}." for head in _heads(own)))
    strange = [key for key in sorted(fresh) if not key.startswith(ends) and not key.endswith(TABLE)]
    strange += [key for key in sorted(left) if not key.startswith((*ends, "attn_pool."))]
    if strange:
        raise UserError(
            f"--global-pool {global_pool} does not go with {', '.join(strange)} of {name}: leave it at {pool}."
        )
    network.load_state_dict({key: others.get(key, tensor) for key, tensor in state.items()})
    tables = [key for key in fresh if key.endswith(TABLE)]
    news = sorted(fresh.difference(tables)) + ([f"{len(tables)} relative bias tables at 0"] if tables else [])
    changes = {"fresh": news, "left out": sorted(left)}
    return network, words + "".join(f"; {how}: {', '.join(what)}" for how, what in changes.items() if what)


def new_head(network: Any, classes: int, std: float | None) -> str:
    """A head for so many classes; with `std`, from a normal distribution of that deviation (MAE: 2e-5) and bias 0.
    -> it, in words"""
    network.reset_classifier(classes)
    head = network.get_classifier()
    for layer in head if isinstance(head, tuple) else (head,):
        if std is not None and hasattr(layer, "weight"):
            nn.init.trunc_normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
    return f"fresh head of {classes} classes ({', '.join(_heads(network))})"


def checkpoint_blocks(network: Any) -> None:
    """Recompute activations in the backward pass, where timm has that for the network."""
    try:
        network.set_grad_checkpointing(True)
    except AssertionError as error:
        raise UserError(f"--grad-checkpointing: timm has none for a {type(network).__name__}; leave it.") from error


def start_from(options: Any, **given: Any) -> tuple[Any, str, Normalize]:
    """`load`, as the options of a recipe say.

    Args:
        options: with `model`, `init`, `from_scratch`, `model_args`, `in_chans` and `drop_path`; `mean` and `std`, where
            they are not given, become those of the checkpoint.
        given: arguments of `load` that follow from other options, which `model_args` must leave alone; None for
            the checkpoint's own.

    Returns:
        The network, in words what it starts with, and the colors that it takes.
    """
    given |= {"in_chans": options.in_chans, "drop_path_rate": options.drop_path}
    if twice := options.model_args.keys() & {*given, "num_classes"} - {*ANY_SIZE}:
        raise UserError(f"--model-args has {', '.join(twice)}, which follows from an option or the data: leave it out.")
    given = {key: value for key, value in given.items() if value is not None}
    network, words = load_network(options.model, options.init, options.from_scratch, **given | options.model_args)
    own = input_of(network)[2].values
    if len(own[0]) == options.in_chans:
        options.mean, options.std = options.mean or own[0], options.std or own[1]
    normalize = default_normalization(options.in_chans, options.mean, options.std)
    options.mean, options.std = normalize.values
    return network, words, normalize
