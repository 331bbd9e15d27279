"""What a long run is guarded against: steps whose loss or gradient is not finite, and sudden losses.

Nothing is read from the device while training goes on: a run reads what was seen every so many steps. Then it goes back
to its last checkpoint and passes the bad step by; its batch is kept, for `mimkit replay`.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from mimkit.errors import UserError
from mimkit.files import read_json

PATIENCE, WINDOW = 3, 1000  # so many bad steps among so many end a run


class Bad(NamedTuple):
    """A step that spoils a run."""

    step: int
    reason: str


class AnomalyGuard:
    """Sees the loss of every step and the gradients that are applied.

    Args:
        spike: a step's loss beyond so many times the mean of the steps logged before is bad too; None for any.
    """

    def __init__(self, spike: float | None = None):
        self.spike, self.step = spike, 0
        self.usual = math.nan  # mean loss of the steps that were logged last
        self.losses: list[tuple[int, Tensor]] = []
        self.gradients: list[tuple[int, Tensor]] = []

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """See the gradients that this optimizer applies.

        Those that fp16's scaler drops are none: it finds its scale by them, which is bad where it falls below 1.
        """
        optimizer.register_step_pre_hook(self._see_gradients)

    def see(self, loss: Tensor) -> None:
        """Of a part of the step."""
        self.losses.append((self.step, loss.detach().float()))

    def see_gradient(self, norm: float | Tensor, device: torch.device) -> None:
        """Of all gradients of the step, where an engine knows it."""
        self.gradients.append((self.step, torch.as_tensor(norm, dtype=torch.float32, device=device)))

    def _see_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        found = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if found:
            own = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in found]
            self.gradients.append((self.step, torch.stack(torch._foreach_norm(own)).float().sum()))

    def read(self, accelerator: Accelerator) -> Bad | None:
        """The first bad step since the last reading, the same in all processes, which must all ask."""
        limit = self.usual * self.spike if self.spike else math.inf
        scaler, last = accelerator.scaler, self.losses[-1:]
        scale = [(step, torch.full_like(loss, scaler.get_scale())) for step, loss in last] if scaler else []
        losses, gradients, scales = (self._means(accelerator, seen) for seen in (self.losses, self.gradients, scale))
        self.losses, self.gradients = [], []
        bad = [Bad(step, "its loss is not finite") for step, loss in losses if not math.isfinite(loss)]
        bad += [Bad(step, f"its loss is {loss:.4g}, {self.usual:.4g} before") for step, loss in losses if loss > limit]
        bad += [Bad(step, "its gradient is not finite") for step, norm in gradients if not math.isfinite(norm)]
        small = "its gradient is not finite, be it scaled by {:.3g} (fp16)"
        bad += [Bad(step, small.format(scale)) for step, scale in scales if scale < 1]
        return min(bad, key=lambda found: found.step, default=None)

    def _means(self, accelerator: Accelerator, seen: list[tuple[int, Tensor]]) -> list[tuple[int, float]]:
        """Over the processes, read from the device at once."""
        if not seen:
            return []
        values = accelerator.reduce(torch.stack([value for _, value in seen]), "mean").tolist()
        return [(step, value) for (step, _), value in zip(seen, values, strict=True)]


def skipped_steps(run: Path) -> dict[int, str]:
    """Steps of a run that it does not make, and why."""
    return {
        int(file.parent.name.removeprefix("step-")): read_json(file, reason=str)["reason"]
        for file in sorted((run / "replay").glob("step-*/about.json"))
    }


def diagnose(steps: dict[int, str], folder: Path, lr: float, precision: str) -> UserError:
    """What to say when there are too many of them."""
    named = "; ".join(f"step {step}: {reason}" for step, reason in steps.items())
    hint = "--precision fp32 or bf16" if precision == "fp16" else "--precision fp32" if precision == "bf16" else ""
    return UserError(
        f"{len(steps)} bad steps among {WINDOW} ({named}), at a learning rate of {lr:.3g} in {precision}: look at one "
        f"with mimkit replay {folder}/replay/step-{min(steps):08d}, then try a smaller --lr, a longer warm-up"
        f"{f', {hint}' if hint else ''}, or other data."
    )
