"""Replay a step that a run skipped, and find where its numbers stop being finite.

A run saves the step to RUN/replay/step-N: the batch of each process, the weights before the step, and the reason.
"""

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn, optim
from torch.utils._pytree import tree_leaves

from mimkit.data.sample import Batch
from mimkit.errors import UserError
from mimkit.files import read_json, replacing, replacing_file
from mimkit.io.weights import State, load_strictly, read_weights
from mimkit.training.checkpoint import TrainState
from mimkit.training.distributed import Engine


def flatten(nest: Any, name: str = "") -> State:
    """Flatten nested dicts and lists of tensors. The names join keys and indices, such as 0.labels.3.boxes."""
    if isinstance(nest, Tensor):
        return {name: nest.to("cpu", copy=True).contiguous()}
    items = nest.items() if isinstance(nest, dict) else enumerate(nest)
    return {k: v for key, value in items for k, v in flatten(value, f"{name}.{key}" if name else f"{key}").items()}


def unflatten(tensors: State) -> Any:
    """Rebuild the nested dicts and lists that `flatten` was given."""
    if "" in tensors:
        return tensors[""]
    groups: dict[str, State] = {}
    for name, tensor in tensors.items():
        key, _, rest = name.partition(".")
        groups.setdefault(key, {})[rest] = tensor
    nest = {key: unflatten(group) for key, group in groups.items()}
    indices = [str(i) for i in range(len(nest))]
    return [nest[i] for i in indices] if nest.keys() == {*indices} else nest


def save_batch(folder: Path, rank: int, micro_batches: list[Batch]) -> None:
    """Write the micro-batches of one process: images, noise, labels, and the names of the images."""
    given = {str(i): {"images": x.images, "noise": x.noise, "labels": x.labels} for i, x in enumerate(micro_batches)}
    with replacing(folder / f"rank-{rank}") as temporary:
        save_file(flatten(given), temporary / "batch.safetensors")
        names = {"names": [batch.names for batch in micro_batches], "bad": [batch.bad for batch in micro_batches]}
        (temporary / "names.json").write_text(json.dumps(names, indent=1))


def save_weights(folder: Path, model: nn.Module, recipe: str, step: int, reason: str) -> None:
    """Write the weights before a skipped step, and which step it is."""
    with replacing(folder / "weights") as temporary:
        save_file(model.state_dict(), temporary / "model.safetensors")
    about = {"recipe": recipe, "step": step, "reason": reason}
    with replacing_file(folder / "about.json") as file:
        file.write_text(json.dumps(about, indent=1))


def load_batches(folder: Path) -> list[tuple[int, Batch]]:
    """Return (rank, micro-batch) of all processes.

    Raises:
        UserError: if there is none, or the names do not fit the images.
    """
    batches = []
    for rank, saved in sorted((int(path.name.removeprefix("rank-")), path) for path in folder.glob("rank-*")):
        tensors = unflatten(load_file(saved / "batch.safetensors"))
        about = read_json(saved / "names.json", names=list, bad=list)
        try:
            for part, names, bad in zip(tensors, about["names"], about["bad"], strict=True):
                batches.append((rank, Batch(**part, names=names, bad=[tuple(found) for found in bad])))
        except (TypeError, ValueError) as error:
            raise UserError(f"{saved} has names and images that do not match ({error}). Get another copy.") from error
    if not batches:
        raise UserError(
            f"{folder} holds no batch to replay. Pass RUN/replay/step-N, which a run writes for a bad step."
        )
    return batches


def read_about(folder: Path) -> dict[str, Any]:
    """Return what is known about a skipped step: recipe, step, reason."""
    if not (folder / "about.json").is_file():
        raise UserError(
            f"{folder} is not a step to replay. Pass RUN/replay/step-N, which a run writes. For the step that ends a "
            "run, only images and names are saved."
        )
    return read_json(folder / "about.json", recipe=str, step=int, reason=str)


class Tracer:
    """Finds where the numbers of a step stop being finite, by hooks on a model and its optimizer."""

    def __init__(self, model: nn.Module, optimizer: optim.Optimizer):
        self.first = ""  # the module whose output is not finite although its inputs are
        self.gradients: dict[str, float] = {}  # norms by parameter
        names = {id(p): name for name, p in model.named_parameters()}
        for name, module in model.named_modules():
            module.register_forward_hook(partial(self._check_output, name or "the method as a whole"))

        def observe(optimizer: optim.Optimizer, *_: Any) -> None:
            found = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self.gradients = {names[id(p)]: float(p.grad.float().norm()) for p in found}

        optimizer.register_step_pre_hook(observe)

    def _check_output(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self.first and not all_finite(output) and all_finite(inputs):
            self.first = f"{name} ({type(module).__name__})"

    def report(self, losses: list[float], batches: list[Batch]) -> str:
        """Return the loss and the images of each micro-batch, and where the numbers stopped being finite, as text."""
        lines = []
        for loss, batch in zip(losses, batches, strict=True):
            ranges = [(float(image.min()), float(image.max())) for image in batch.images]
            lines.append(f"loss {loss:.6g} of {len(batch.names)} images:")
            lines += [f"  {n}: {a:g} to {b:g}" for n, (a, b) in zip(batch.names, ranges, strict=True)]
        images_finite = all(all_finite(batch.images) for batch in batches)
        first = self.first or ("none" if images_finite else "the images themselves")
        lines.append(f"first output that is not finite: {first}")
        odd = [name for name, norm in self.gradients.items() if not math.isfinite(norm)]
        lines.append(f"gradients that are not finite: {', '.join(odd) or 'none'}")
        largest = sorted(self.gradients.items(), key=lambda item: -item[1] if math.isfinite(item[1]) else 0)[:3]
        lines.append("largest gradients: " + ", ".join(f"{name} {norm:.3g}" for name, norm in largest))
        return "\n".join(lines)


def all_finite(values: Any) -> bool:
    """Return whether all tensors in nested tuples, lists and dicts are finite."""
    return all(bool(leaf.isfinite().all()) for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def replay_step(
    folder: Path, state: TrainState, engine: Engine, seed_rank: Callable[[int], None], log: Callable[[str], None]
) -> Iterator[Iterator[Batch]]:
    """Yield the micro-batches of a skipped step once, then report where its numbers stop being finite.

    Args:
        folder: RUN/replay/step-N.
        state: the model and the optimizer to replay with. The weights before the step are loaded into them.
        seed_rank: seeds the generators as the process of this rank did.
        log: prints the report.
    """
    about, batches = read_about(folder), load_batches(folder)
    tracer = Tracer(state.model, state.optimizer)
    engine.accelerator.gradient_accumulation_steps = len(batches)  # those of all processes make one step here
    load_strictly(state.model, read_weights(folder / "weights"), folder)

    def micro_batches() -> Iterator[Batch]:
        seeded = -1
        for rank, batch in batches:
            if rank != seeded:
                seed_rank(rank)
                seeded = rank
            yield batch.to(engine.device)

    yield micro_batches()
    log(f"step {about['step']} was skipped because {about['reason']}")
    log(tracer.report([float(loss) for _, loss in state.guard.losses], [batch for _, batch in batches]))
