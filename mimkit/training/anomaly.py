"""Guard a long run against anomalies: steps whose loss or gradient is not finite, and sudden spikes of the loss.

Nothing is read from the device while training goes on; the run checks what was observed every few steps. It then
returns to the last checkpoint before the bad step and skips that step (skip_steps.py). The batch is saved for `mimkit
replay`.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mimkit.errors import UserError
from mimkit.files import read_json

PATIENCE, WINDOW = 3, 1000  # this many bad steps within this many steps end a run


class Bad(NamedTuple):
    """A step that would spoil a run."""

    step: int
    reason: str


def skipped_steps(run: Path) -> dict[int, str]:
    """Return the steps that a run has skipped and saved for replay, with the reasons."""
    return {
        int(file.parent.name.removeprefix("step-")): read_json(file, reason=str)["reason"]
        for file in sorted((run / "replay").glob("step-*/about.json"))
    }


class AnomalyGuard:
    """Observes the loss of every step and the gradients that are applied.

    Args:
        max_spike: a step is also bad if its loss exceeds this multiple of the running mean. None disables this.
    """

    def __init__(self, max_spike: float | None = None):
        self.max_spike, self.step = max_spike, 0
        self.running_loss = math.nan  # mean loss at the last reading
        self.skipped: dict[int, str] = {}  # steps that are skipped, with the reasons
        self.losses: list[tuple[int, Tensor]] = []
        self.norms: list[tuple[int, Tensor]] = []

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Observe the gradients that this optimizer applies.

        Gradients that the scaler of fp16 drops are not among them. It finds its scale by dropping them, and a scale
        below 1 is an anomaly.
        """
        optimizer.register_step_pre_hook(self._observe_gradients)

    def observe(self, loss: Tensor, norm: float | Tensor | None = None) -> None:
        """Observe the loss of a micro-batch and, if an engine knows it, the norm of the gradients of the step."""
        self.losses.append((self.step, loss.detach().float()))
        if norm is not None:
            self.norms.append((self.step, torch.as_tensor(norm, dtype=torch.float32, device=loss.device)))

    def _observe_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            local = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in gradients]
            self.norms.append((self.step, torch.stack(torch._foreach_norm(local)).float().sum()))

    def check(self, reduce: Callable[[Tensor], Tensor] = lambda value: value, scaler: Any = None) -> Bad | None:
        """Return the first bad step since the last check, the same in all processes. All of them must call this.

        Args:
            reduce: averages a tensor over the processes.
            scaler: the gradient scaler of fp16, or None.
        """
        limit = self.running_loss * self.max_spike if self.max_spike else math.inf
        last = self.losses[-1:] if scaler else []
        scaled = [(step, torch.full_like(loss, scaler.get_scale())) for step, loss in last]
        losses, norms, scales = (self._read(seen, reduce) for seen in (self.losses, self.norms, scaled))
        self.losses, self.norms = [], []
        bad = [Bad(step, "its loss is not finite") for step, loss in losses if not math.isfinite(loss)]
        bad += [
            Bad(step, f"its loss is {loss:.4g}, and the running mean is {self.running_loss:.4g}")
            for step, loss in losses
            if loss > limit
        ]
        bad += [Bad(step, "its gradient is not finite") for step, norm in norms if not math.isfinite(norm)]
        small = "its gradient is not finite, even scaled by {:.3g} (fp16)"
        bad += [Bad(step, small.format(scale)) for step, scale in scales if scale < 1]
        return min(bad, key=lambda found: found.step, default=None)

    @staticmethod
    def _read(seen: list[tuple[int, Tensor]], reduce: Callable[[Tensor], Tensor]) -> list[tuple[int, float]]:
        """Read values from the device at once, averaged over the processes."""
        if not seen:
            return []
        values = reduce(torch.stack([value for _, value in seen])).tolist()
        return [(step, value) for (step, _), value in zip(seen, values, strict=True)]

    def skip(self, bad: Bad) -> dict[int, str]:
        """Skip a step from now on. Return the skipped steps of late if they are too many, else nothing."""
        self.skipped[bad.step] = bad.reason
        lately = {step: reason for step, reason in self.skipped.items() if step > bad.step - WINDOW}
        return lately if len(lately) >= PATIENCE else {}

    def state_dict(self) -> dict[str, Any]:
        """Return the running mean of the loss and the skipped steps."""
        return {"running_loss": self.running_loss, "skipped_steps": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned. Steps that are skipped already stay so."""
        self.running_loss = state["running_loss"]
        self.skipped |= {int(step): reason for step, reason in state["skipped_steps"].items()}


def too_many_skipped(steps: dict[int, str], folder: Path, lr: float, precision: str) -> UserError:
    """Return the error that ends a run with too many bad steps.

    Args:
        steps: the bad steps and their reasons.
        folder: the run's directory.
    """
    reasons = "; ".join(f"step {step}: {reason}" for step, reason in steps.items())
    hint = {"fp16": ", --precision fp32 or bf16", "bf16": ", --precision fp32"}.get(precision, "")
    return UserError(
        f"{len(steps)} bad steps within {WINDOW} ({reasons}), at a learning rate of {lr:.3g} in {precision}. Look at "
        f"one with mimkit replay {folder}/replay/step-{min(steps):08d}; then try a smaller --lr{hint}, or other data."
    )
