"""Metrics of training: values are accumulated on the device, and rates are measured between two readings."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Meter:
    """Accumulates values on the device without synchronization, and measures speed and the wait for data."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0  # micro-batches since the last reading
        self.restart(0)

    def restart(self, step: int) -> None:
        """Forget what was accumulated, and measure rates from `step` on."""
        self.sums, self.count, self.since_step = {}, 0, step
        self.restart_clock()

    def restart_clock(self) -> None:
        """Measure rates from now on; what has happened since the last reading, such as saving, is not training."""
        self.since, self.waited = time.perf_counter(), 0.0

    def update(self, **values: Tensor) -> None:
        """Add the values of a micro-batch."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.count += 1

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time spent inside as a wait for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def flush(self, step: int, reduce: Callable[[Tensor], Tensor] = lambda value: value) -> dict[str, float]:
        """Return the means since the last reading, and start anew. Empty if nothing was accumulated.

        Args:
            step: number of steps done.
            reduce: averages a tensor over the processes.

        Returns:
            The means by name, `steps_per_s`, and `waiting`, the fraction of time spent waiting for data.
        """
        if not self.count:
            return {}
        means = {name: reduce(value / self.count).item() for name, value in self.sums.items()}
        elapsed = time.perf_counter() - self.since
        rates = {"steps_per_s": (step - self.since_step) / elapsed, "waiting": round(self.waited / elapsed, 4)}
        self.restart(step)
        return means | rates

    def average(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums by their mean over the processes, so that a checkpoint of one process speaks for all."""
        self.sums = {name: reduce(value) for name, value in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and their count."""
        return {"count": self.count, "sums": {name: value.item() for name, value in self.sums.items()}}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        """Load what `state_dict` returned."""
        self.sums = {name: torch.tensor(value, device=device) for name, value in state["sums"].items()}
        self.count = state["count"]
