"""What a long run is guarded against: steps whose loss or gradient is not finite, and sudden losses.

Nothing is read from the device while training goes on: a run reads what was seen every so many steps. Then it goes back
to its last checkpoint and passes the bad step by; its batch is kept, for `mimkit replay`.
"""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mimkit.checkpoint import State, read_json, replacing, replacing_file
from mimkit.data import Batch
from mimkit.errors import UserError

PATIENCE, WINDOW = 3, 1000  # so many bad steps among so many end a run


class Bad(NamedTuple):
    """A step that spoils a run."""

    step: int
    reason: str


class Guard:
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


def passed_by(run: Path) -> dict[int, str]:
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


def flat(nest: Any, name: str = "") -> State:
    """Tensors in dicts and lists -> each by the keys and places that lead to it, such as 0.labels.3.boxes"""
    if isinstance(nest, Tensor):
        return {name: nest.to("cpu", copy=True).contiguous()}
    items = nest.items() if isinstance(nest, dict) else enumerate(nest)
    return {k: v for key, value in items for k, v in flat(value, f"{name}.{key}" if name else f"{key}").items()}


def nested(tensors: State) -> Any:
    """The reverse"""
    if "" in tensors:
        return tensors[""]
    parts: dict[str, State] = {}
    for name, tensor in tensors.items():
        key, _, rest = name.partition(".")
        parts.setdefault(key, {})[rest] = tensor
    found = {key: nested(part) for key, part in parts.items()}
    places = [str(i) for i in range(len(found))]
    return [found[i] for i in places] if found.keys() == {*places} else found


def keep_batch(folder: Path, rank: int, parts: list[Batch]) -> None:
    """One process's share of a bad step: images, noise and labels as they were, and names."""
    given = {str(i): {"images": x.images, "noise": x.noise, "labels": x.labels} for i, x in enumerate(parts)}
    with replacing(folder / f"rank-{rank}") as temporary:
        save_file(flat(given), temporary / "batch.safetensors")
        names = {"names": [batch.names for batch in parts], "bad": [batch.bad for batch in parts]}
        (temporary / "names.json").write_text(json.dumps(names, indent=1))


def keep_weights(folder: Path, model: nn.Module, recipe: str, step: int, reason: str) -> None:
    """Those before a bad step, and what is known of it."""
    with replacing(folder / "weights") as temporary:
        save_file(model.state_dict(), temporary / "model.safetensors")
    about = {"recipe": recipe, "step": step, "reason": reason}
    with replacing_file(folder / "about.json") as file:
        file.write_text(json.dumps(about, indent=1))


def kept_batches(folder: Path) -> list[tuple[int, Batch]]:
    """(process, batch) of all processes."""
    batches = []
    for rank, kept in sorted((int(path.name.removeprefix("rank-")), path) for path in folder.glob("rank-*")):
        parts = nested(load_file(kept / "batch.safetensors"))
        about = read_json(kept / "names.json", names=list, bad=list)
        try:
            for part, names, bad in zip(parts, about["names"], about["bad"], strict=True):
                batches.append((rank, Batch(**part, names=names, bad=[tuple(found) for found in bad])))
        except (TypeError, ValueError) as error:
            raise UserError(f"{kept} holds names and images of other parts ({error}): get another copy.") from error
    if not batches:
        raise UserError(f"{folder} holds no batch to replay: pass RUN/replay/step-N, which a run leaves on a bad step.")
    return batches


def about(folder: Path) -> dict[str, Any]:
    """What is known of a step that was passed by: recipe, step, reason."""
    if not (folder / "about.json").is_file():
        raise UserError(
            f"{folder} is no step to replay: pass RUN/replay/step-N, which a run leaves; of the step that ends a run "
            "there are images and names alone."
        )
    return read_json(folder / "about.json", recipe=str, step=int, reason=str)


class Tracer:
    """Inside, finds where numbers stop being finite in a step."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.first = ""  # module whose output is not, though its inputs are
        self.gradients: dict[str, float] = {}  # norms
        names = {id(p): name for name, p in model.named_parameters()}
        for name, module in model.named_modules():
            module.register_forward_hook(partial(self._see_output, name or "the method as a whole"))

        def see(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            found = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self.gradients = {names[id(p)]: float(p.grad.float().norm()) for p in found}

        optimizer.register_step_pre_hook(see)

    def _see_output(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self.first and not all_finite(output) and all_finite(inputs):
            self.first = f"{name} ({type(module).__name__})"

    def report(self, losses: list[float], batches: list[Batch]) -> str:
        """In words: each part's loss and its images, then where it began."""
        lines = []
        for loss, batch in zip(losses, batches, strict=True):
            ranges = [(float(image.min()), float(image.max())) for image in batch.images]
            lines.append(f"loss {loss:.6g} of {len(batch.names)} images:")
            lines += [f"  {n}: {a:g} to {b:g}" for n, (a, b) in zip(batch.names, ranges, strict=True)]
        given = all(all_finite(batch.images) for batch in batches)
        first = self.first or ("none" if given else "the images themselves")
        lines.append(f"first output that is not finite: {first}")
        odd = [name for name, norm in self.gradients.items() if not math.isfinite(norm)]
        lines.append(f"gradients that are not finite: {', '.join(odd) or 'none'}")
        largest = sorted(self.gradients.items(), key=lambda item: -item[1] if math.isfinite(item[1]) else 0)[:3]
        lines.append("largest gradients: " + ", ".join(f"{name} {norm:.3g}" for name, norm in largest))
        return "\n".join(lines)


def all_finite(values: Any) -> bool:
    """Of all tensors in a nest of tuples, lists and dicts."""
    return all(bool(leaf.isfinite().all()) for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
