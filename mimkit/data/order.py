"""The order of images: which images make which step, on which process."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator
from torch.utils.data import Sampler

from mimkit.errors import UserError

STAND_IN = np.random.MT19937(0)  # for numpy's own generator: setting that one back would cost .1 ms an image


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Inside, every usual generator is a function of the key alone; afterwards they are as they were.

    But for the second of a pair of normal numbers that `np.random.randn` may hold ready: NumPy lets go of it.
    """
    before = random.getstate(), get_bit_generator(), torch.get_rng_state()
    words = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(words[0]))
    set_bit_generator(STAND_IN)
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))  # torch.manual_seed formats a traceback where CUDA is asleep
    try:
        yield
    finally:
        random.setstate(before[0])
        set_bit_generator(before[1])
        torch.set_rng_state(before[2])


@dataclass(frozen=True)
class Plan:
    """Which images make which step, whoever computes it: step s of an epoch is rows [s B, (s + 1) B) of its order.

    Args:
        length: images in an epoch, the rest of a last partial batch left out.
        batch_size: images in a step, over all processes and accumulated parts.
        steps, start: the run ends before step `steps`, and begins (or goes on) at `start`.
        rank, world: this process of so many.
        parts: parts that a step is accumulated from.
        repeats: times that an image stands in a step, each with an augmentation of its own; an epoch has as many steps
            as ever, and so fewer images (Hoffer et al., "Augment your batch", CVPR 2020).
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
        if self.batch_size % (self.world_size * self.grad_accum_steps):
            raise UserError(
                f"--batch-size {self.batch_size} cannot be shared by {self.world_size} processes x "
                f"{self.grad_accum_steps} accumulation steps: choose a multiple of {self.world_size * self.grad_accum_steps}."
            )
        if self.length < self.batch_size:
            raise UserError(
                f"--batch-size {self.batch_size} is more than the {self.length} images there are: choose a smaller one."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return self.length // self.batch_size

    @property
    def micro_batch_size(self) -> int:
        """Images of one forward pass of one process."""
        return self.batch_size // (self.world_size * self.grad_accum_steps)


class Order(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for one process: each epoch is its own permutation, drawn from (seed, epoch)."""

    def __init__(self, plan: Plan):
        self.plan = plan

    def __len__(self) -> int:
        return (self.plan.steps - self.plan.start) * self.plan.grad_accum_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        plan, drawn = self.plan, -1
        for step in range(plan.start, plan.steps):
            epoch, k = divmod(step, plan.steps_per_epoch)
            if epoch != drawn:
                order, drawn = np.random.default_rng([plan.seed, epoch]).permutation(plan.length), epoch
            places = np.arange(k * plan.batch_size, (k + 1) * plan.batch_size)
            for part in places.reshape(plan.grad_accum_steps, plan.world_size, plan.micro_batch_size)[:, plan.rank]:
                # what is drawn for an image follows from the first number
                yield [(epoch * plan.repeats + int(i % plan.repeats), int(order[i // plan.repeats])) for i in part]


def cpu_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Data workers for one process: one core of its share is left for training."""
    return min(16, max(0, cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def evenly_spaced(length: int, count: int) -> list[int]:
    """Places of so many rows, evenly spread."""
    return [int(i) for i in np.linspace(0, length - 1, min(count, length))]
