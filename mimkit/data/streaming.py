"""Batches from a data set that is streamed: its rows can only be read in order."""

import heapq
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from mimkit.data.order import Plan
from mimkit.data.sample import Batch, Index, Sample, SampleLoader, collate, first_good
from mimkit.data.sources import Source

WINDOW = 2048  # size of the shuffle window, in rows


class Stream(IterableDataset[Batch]):
    """Micro-batches of one process from a streaming source, in the order of a `Plan`.

    The shards are permuted by (seed, epoch). Then each row is delayed by up to `WINDOW` rows, a number drawn from
    (seed, epoch, shard, row). The order is thus a pure function, independent of the number of workers and processes.
    Every worker reads all rows, and decodes only those of its own batches. A bad image is replaced by the next good one
    of its step.
    """

    def __init__(self, source: Source, sample_loader: SampleLoader, plan: Plan):
        self.source, self.plan = source, plan
        self.sample_loader = replace(sample_loader, value_range=source.value_range)

    def shuffled(self, epoch: int) -> Iterator[tuple[Index, dict[str, Any]]]:
        """Yield the ((shard, row), content) of all rows, in the order of an epoch."""
        rows, shards = self.source.rows, self.source.rows.num_shards
        window: list[tuple[float, int, int, dict[str, Any]]] = []
        place = 0
        for shard in map(int, np.random.default_rng([self.plan.seed, epoch]).permutation(shards)):
            delays = np.random.default_rng([self.plan.seed, epoch, shard])
            # iter(): in a worker, a plain loop over a `datasets` stream would yield only a part of the rows
            for row, content in enumerate(rows.shard(shards, shard).iter(1)):
                heapq.heappush(window, (place + WINDOW * delays.random(), shard, row, content))
                place += 1
                while window and window[0][0] < place:  # the window is empty if the first row has no delay
                    yield _unpack(heapq.heappop(window))
        while window:
            yield _unpack(heapq.heappop(window))

    def __iter__(self) -> Iterator[Any]:
        plan, info = self.plan, get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        count = 0
        for epoch in range(plan.start // plan.steps_per_epoch, -(-plan.steps // plan.steps_per_epoch)):
            rows = self.shuffled(epoch)
            begin = epoch * plan.steps_per_epoch
            for step in range(begin, min(plan.steps, begin + plan.steps_per_epoch)):
                step_rows = list(islice(rows, plan.batch_size))
                if step < plan.start:
                    # a sign of life from every worker: reading up to the start may take longer than the loader's `WAIT`
                    yield None
                    continue
                if len(step_rows) < plan.batch_size:
                    return  # the source is shorter than its declared length, which the run reports
                for part in range(plan.grad_accum_steps):
                    first = (part * plan.world_size + plan.rank) * plan.micro_batch_size
                    if count % workers == worker:
                        places = range(first, first + plan.micro_batch_size)
                        yield collate([self.load(step_rows, place, epoch) for place in places])
                    count += 1

    def load(self, step_rows: list[tuple[Index, dict[str, Any]]], place: int, epoch: int) -> Sample:
        """Load the row at `place` among the rows of a step; if it is bad, load the next good one instead."""
        rows = (step_rows[(place + i) % len(step_rows)] for i in range(len(step_rows)))
        return first_good(self.sample_loader(row, epoch, index) for index, row in rows)


def _unpack(item: tuple[float, int, int, dict[str, Any]]) -> tuple[Index, dict[str, Any]]:
    _, shard, row, content = item
    return (shard, row), {name: cell[0] for name, cell in content.items()}
