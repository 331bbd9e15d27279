"""Parameter groups and learning rate schedules, thin over timm and torch."""

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.optim._param_groups import auto_group_layers
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from torch import nn

from mimkit.errors import UserError


def show_groups(groups: list[dict[str, Any]], lr: float, console: Console) -> None:
    """Print the parameter groups as a table: layer, scale, learning rate and weight decay."""
    table = Table("parameters", "tensors", "layer", "scale", "lr", "weight decay")
    for group in groups:
        names = group["param_names"]
        shown = names[0] if len(names) == 1 else f"{names[0]}, ..., {names[-1]}"
        numbers = f"{group['lr_scale']:.6g}", f"{lr * group['lr_scale']:.3g}", f"{group['weight_decay']:g}"
        table.add_row(shown, str(len(names)), str(group["layer"]), *numbers)
    Console(quiet=console.quiet, width=max(console.width, 140)).print(table)


POOLS = "pools."  # prefix of the names of an HPViT's pools


def no_decay_names(model: nn.Module) -> set[str]:
    """Return the names that any module of the model lists in `no_weight_decay()`."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if callable(getattr(module, "no_weight_decay", None))
        for name in module.no_weight_decay()
    }


def adamw(model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Create AdamW without weight decay on 1-D tensors and on names from `no_weight_decay_names`."""
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=no_decay_names(model))
    return torch.optim.AdamW(groups, lr=lr, betas=betas)


def layer_groups(model: Any, weight_decay: float, layer_decay: float, pool_scale: float = 1.0) -> list[dict[str, Any]]:
    """Group parameters by layer, for learning rates that shrink by `layer_decay` per layer (Clark et al., ELECTRA;
    BEiT).

    A timm schedule multiplies the rate of each group by its `lr_scale`.

    Args:
        model: any timm model. Its `group_matcher`, or else timm's guess, assigns parameters to layers.
        pool_scale: factor of the learning rate of an HPViT's pools, in whatever layer they are. They have no weight
            decay, because they start as a single tap, which preserves the source's tokens.
    """
    matched = hasattr(model, "group_matcher")
    layers = group_parameters(model, model.group_matcher(), reverse=True) if matched else auto_group_layers(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups: list[dict[str, Any]] = []
    for group in param_groups_layer_decay(model, weight_decay, no_decay_names(model), layer_decay=layer_decay):
        pools = [parameter for parameter in group["params"] if names[parameter].startswith(POOLS)]
        others = [parameter for parameter in group["params"] if not names[parameter].startswith(POOLS)]
        groups += [{**group, "params": others}] if others else []
        groups += [{**group, "params": pools, "lr_scale": pool_scale}] if pools else []
    for group in groups:
        group["param_names"] = [names[parameter] for parameter in group["params"]]
        group["layer"] = layers[group["param_names"][0]]
    return sorted(groups, key=lambda group: (group["layer"], -group["weight_decay"]))


def groups_with_head(
    model: nn.Module, backbone: str, weight_decay: float, layer_decay: float, pool_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Return `layer_groups` of a backbone without a head, with the rest of the model as the last layer.

    Args:
        backbone: name of the submodule.
    """
    inside = f"{backbone}."
    groups = layer_groups(model.get_submodule(backbone), weight_decay, layer_decay, pool_scale)
    for group in groups:
        pools = group["param_names"][0].startswith(POOLS)
        group["lr_scale"] = group.get("lr_scale", 1.0) * (1.0 if pools else layer_decay)
        group["param_names"] = [inside + name for name in group["param_names"]]
    last = 1 + max(group["layer"] for group in groups)
    rest = [(name, parameter) for name, parameter in model.named_parameters() if not name.startswith(inside)]
    for decay, flat in ((weight_decay, False), (0.0, True)):
        names, parameters = zip(*((n, p) for n, p in rest if (p.ndim <= 1) is flat), strict=True)
        about = {"lr_scale": 1.0, "weight_decay": decay, "layer": last}
        groups.append({"params": list(parameters), "param_names": list(names), **about})
    return groups


def cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> CosineLRScheduler:
    """Linear warm-up from 0, then half a cosine to 0 (MAE, table 8). Call `step_update(step)` before each step."""
    return CosineLRScheduler(optimizer, **_warmed_up(steps, warmup))


def poly(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> PolyLRScheduler:
    """Linear warm-up from 0, then linear decay to 0, which dense prediction calls poly."""
    return PolyLRScheduler(optimizer, power=1.0, **_warmed_up(steps, warmup))


def multistep(optimizer: torch.optim.Optimizer, steps: int, warmup: int, at: Sequence[int]) -> MultiStepLRScheduler:
    """Linear warm-up from 0, then a constant rate that drops to a tenth at each of the steps `at`."""
    if list(at) != sorted(set(at)) or not all(warmup < step < steps for step in at):
        raise UserError(
            f"The learning rate cannot drop at steps {list(at)} of {steps} with {warmup} steps of warm-up. Pass "
            "increasing --drop-epochs between the two."
        )
    about = _warmed_up(steps, warmup)
    del about["t_initial"]
    # timm counts from the end of the warm-up, and drops one step early
    return MultiStepLRScheduler(optimizer, decay_t=[step - warmup + 1 for step in at], decay_rate=0.1, **about)


def _warmed_up(steps: int, warmup: int) -> dict[str, Any]:
    if warmup >= steps:
        raise UserError(
            f"A warm-up of {warmup} steps fills the whole run of {steps} steps. Pass fewer --warmup-epochs or more "
            "--epochs."
        )
    return {"t_initial": steps - warmup, "warmup_t": warmup, "warmup_prefix": True, "t_in_epochs": False}
