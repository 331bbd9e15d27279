"""The order of images: which images make up which step, on which process."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from mimkit.errors import UserError


@dataclass(frozen=True)
class Plan:
    """Which images make up which step, independent of how many processes compute it.

    Step s of an epoch consists of the rows [s * batch_size, (s + 1) * batch_size) of the epoch's permutation. Its rows
    are divided first among the gradient accumulation steps, then among the processes.

    Args:
        length: number of images in the data set. A last incomplete batch of an epoch is dropped.
        batch_size: images in a step, over all processes and gradient accumulation steps.
        steps: total number of optimizer steps; the run ends before the step of this number.
        seed: seed of the permutations.
        start: step at which the run begins or resumes.
        rank: rank of this process.
        world_size: number of processes.
        grad_accum_steps: number of gradient accumulation steps in each step.
        repeats: how often an image occurs in a step, each time with another augmentation. The number of steps in an
            epoch stays the same, so an epoch sees fewer images (Hoffer et al., "Augment your batch", CVPR 2020).

    Raises:
        UserError: `batch_size` is larger than the data set, or cannot be divided evenly.
    """

    length: int
    batch_size: int
    steps: int
    seed: int = 0
    start: int = 0
    rank: int = 0
    world_size: int = 1
    grad_accum_steps: int = 1
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % (divisor := self.world_size * self.grad_accum_steps):
            raise UserError(
                f"--batch-size {self.batch_size} cannot be shared by {self.world_size} processes x "
                f"{self.grad_accum_steps} gradient accumulation steps: choose a multiple of {divisor}."
            )
        if self.length < self.batch_size:
            raise UserError(
                f"--batch-size {self.batch_size} is more than the {self.length} images of the data set: choose a "
                "smaller one."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Number of complete batches in an epoch."""
        return self.length // self.batch_size

    @property
    def micro_batch_size(self) -> int:
        """Number of images in one forward pass of one process."""
        return self.batch_size // (self.world_size * self.grad_accum_steps)


class Order(Sampler[list[tuple[int, int]]]):
    """Sampler of the micro-batches of one process, as lists of (epoch, index).

    Each epoch has its own permutation, drawn from (seed, epoch).
    """

    def __init__(self, plan: Plan):
        self.plan = plan

    def __len__(self) -> int:
        return (self.plan.steps - self.plan.start) * self.plan.grad_accum_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        plan, permuted = self.plan, -1
        for step in range(plan.start, plan.steps):
            epoch, k = divmod(step, plan.steps_per_epoch)
            if epoch != permuted:
                order, permuted = np.random.default_rng([plan.seed, epoch]).permutation(plan.length), epoch
            places = np.arange(k * plan.batch_size, (k + 1) * plan.batch_size)
            for part in places.reshape(plan.grad_accum_steps, plan.world_size, plan.micro_batch_size)[:, plan.rank]:
                # the first number seeds the augmentation, so each repeat of an image needs a number of its own
                yield [(epoch * plan.repeats + int(i % plan.repeats), int(order[i // plan.repeats])) for i in part]


def evenly_spaced(length: int, count: int) -> list[int]:
    """Return `count` evenly spaced indices of a sequence, or all of them if it has fewer."""
    return [int(i) for i in np.linspace(0, length - 1, min(count, length))]
