"""Save the batch of a skipped step, and trace where its numbers stop being finite."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mimkit.data.sample import Batch
from mimkit.errors import UserError
from mimkit.files import read_json, replacing, replacing_file
from mimkit.io.weights import State


def flatten(nest: Any, name: str = "") -> State:
    """Tensors in dicts and lists -> each by the keys and places that lead to it, such as 0.labels.3.boxes"""
    if isinstance(nest, Tensor):
        return {name: nest.to("cpu", copy=True).contiguous()}
    items = nest.items() if isinstance(nest, dict) else enumerate(nest)
    return {k: v for key, value in items for k, v in flatten(value, f"{name}.{key}" if name else f"{key}").items()}


def unflatten(tensors: State) -> Any:
    """The reverse"""
    if "" in tensors:
        return tensors[""]
    parts: dict[str, State] = {}
    for name, tensor in tensors.items():
        key, _, rest = name.partition(".")
        parts.setdefault(key, {})[rest] = tensor
    found = {key: unflatten(part) for key, part in parts.items()}
    places = [str(i) for i in range(len(found))]
    return [found[i] for i in places] if found.keys() == {*places} else found


def save_batch(folder: Path, rank: int, parts: list[Batch]) -> None:
    """One process's share of a bad step: images, noise and labels as they were, and names."""
    given = {str(i): {"images": x.images, "noise": x.noise, "labels": x.labels} for i, x in enumerate(parts)}
    with replacing(folder / f"rank-{rank}") as temporary:
        save_file(flatten(given), temporary / "batch.safetensors")
        names = {"names": [batch.names for batch in parts], "bad": [batch.bad for batch in parts]}
        (temporary / "names.json").write_text(json.dumps(names, indent=1))


def save_weights(folder: Path, model: nn.Module, recipe: str, step: int, reason: str) -> None:
    """Those before a bad step, and what is known of it."""
    with replacing(folder / "weights") as temporary:
        save_file(model.state_dict(), temporary / "model.safetensors")
    read_about = {"recipe": recipe, "step": step, "reason": reason}
    with replacing_file(folder / "about.json") as file:
        file.write_text(json.dumps(read_about, indent=1))


def load_batches(folder: Path) -> list[tuple[int, Batch]]:
    """(process, batch) of all processes."""
    batches = []
    for rank, kept in sorted((int(path.name.removeprefix("rank-")), path) for path in folder.glob("rank-*")):
        parts = unflatten(load_file(kept / "batch.safetensors"))
        read_about = read_json(kept / "names.json", names=list, bad=list)
        try:
            for part, names, bad in zip(parts, read_about["names"], read_about["bad"], strict=True):
                batches.append((rank, Batch(**part, names=names, bad=[tuple(found) for found in bad])))
        except (TypeError, ValueError) as error:
            raise UserError(f"{kept} holds names and images of other parts ({error}): get another copy.") from error
    if not batches:
        raise UserError(f"{folder} holds no batch to replay: pass RUN/replay/step-N, which a run leaves on a bad step.")
    return batches


def read_about(folder: Path) -> dict[str, Any]:
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
