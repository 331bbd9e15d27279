"""Parameter groups and the schedule: thin over timm and torch."""

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from mimkit.errors import UserError


def adamw(model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW without decay on 1-D tensors and on what any part of the model lists in `no_weight_decay()`."""
    spared = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if callable(getattr(module, "no_weight_decay", None))
        for name in module.no_weight_decay()
    }
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=spared)
    return torch.optim.AdamW(groups, lr=lr, betas=betas)


def cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> CosineLRScheduler:
    """Linear warm-up from 0, then half a cosine down to 0 (MAE, table 8). Call `step_update(step)` before each step."""
    if warmup >= steps:
        raise UserError(
            f"A warm-up of {warmup} steps fills the run of {steps}: give fewer --warmup-epochs, or more --epochs."
        )
    return CosineLRScheduler(
        optimizer,
        t_initial=steps - warmup,
        warmup_t=warmup,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )
