"""Batches from a data set that can only be read in order."""

import heapq
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from mimkit.data.order import Plan
from mimkit.data.sample import Batch, Index, Sample, SampleLoader, collate, first_good
from mimkit.data.sources import Source

WINDOW = 2048  # rows among which a stream is shuffled, beside the shuffle of its shards


class Stream(IterableDataset[Batch]):
    """Batches for one process from rows that come in order.

    Shards are permuted by (seed, epoch). Inside, a row moves back by up to `WINDOW` places, a number drawn from (seed,
    epoch, shard, row), so the order is a pure function as well. Every worker reads all rows and decodes only its own;
    in the place of a bad one stands the next good one of its step.
    """

    def __init__(self, source: Source, viewer: SampleLoader, plan: Plan):
        self.source, self.viewer, self.plan = source, viewer, plan

    def shuffled(self, epoch: int) -> Iterator[tuple[Index, dict[str, Any]]]:
        """((shard, row), row) of an epoch."""
        rows, shards = self.source.rows, self.source.rows.num_shards
        window: list[tuple[float, int, int, dict[str, Any]]] = []
        place = 0
        for shard in map(int, np.random.default_rng([self.plan.seed, epoch]).permutation(shards)):
            delays = np.random.default_rng([self.plan.seed, epoch, shard])
            # iter(): torch's workers would divide a plain loop over a `datasets` stream among them once more
            for row, content in enumerate(rows.shard(shards, shard).iter(1)):
                heapq.heappush(window, (place + WINDOW * delays.random(), shard, row, content))
                place += 1
                while window and window[0][0] < place:  # the first row may have no delay
                    yield _released(heapq.heappop(window))
        while window:
            yield _released(heapq.heappop(window))

    def __iter__(self) -> Iterator[Any]:
        plan, info = self.plan, get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        made = 0
        for epoch in range(plan.start // plan.steps_per_epoch, -(-plan.steps // plan.steps_per_epoch)):
            rows = self.shuffled(epoch)
            begin = epoch * plan.steps_per_epoch
            for step in range(begin, min(plan.steps, begin + plan.steps_per_epoch)):
                together = list(islice(rows, plan.batch_size))
                if step < plan.start:
                    yield None  # reading up to here may take longer than `WAIT`; all workers say it as often
                    continue
                if len(together) < plan.batch_size:
                    return  # shorter than it said: the run tells
                for part in range(plan.grad_accum_steps):
                    first = (part * plan.world_size + plan.rank) * plan.micro_batch_size
                    if made % workers == worker:
                        yield collate(
                            [self.view(together, i, epoch) for i in range(first, first + plan.micro_batch_size)]
                        )
                    made += 1

    def view(self, together: list[tuple[Index, dict[str, Any]]], place: int, epoch: int) -> Sample:
        """Of a row among those of a step."""
        rows = (together[(place + i) % len(together)] for i in range(len(together)))
        return first_good(self.viewer(row, epoch, index) for index, row in rows)


def _released(item: tuple[float, int, int, dict[str, Any]]) -> tuple[Index, dict[str, Any]]:
    _, shard, row, content = item
    return (shard, row), {name: cell[0] for name, cell in content.items()}
