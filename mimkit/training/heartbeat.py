"""Heartbeat between the processes of a distributed run.

A machine that is lost closes no connection, and a process that hangs keeps its own open; torch waits for either for 10
to 30 minutes. A shorter timeout of the process group does not help: while the main process measures kNN accuracy or
writes a checkpoint, the others wait in a collective operation for as long as that takes, so a timeout of two minutes
would end healthy runs. Here each process tells torch's store that it lives, from a thread of its own, and checks the
next process.
"""

import atexit
import os
import sys
from itertools import count
from threading import Event, Thread
from typing import Any

import torch

from mimkit.errors import PEER

BEAT, MISSED = 5.0, 16  # seconds between heartbeats, and how many may be missed: a loss is reported within two minutes
ENDED = "ended"


class Heartbeat:
    """End this process with a sentence if the next process stops sending heartbeats.

    The processes before it then find their connections closed. Turns are counted and no clock is read, so a run that
    was suspended finds all processes alive when it continues.

    Args:
        rank, world_size: this process, and the number of processes.
        group: process group on the CPUs, for one barrier.
    """

    def __init__(self, rank: int, world_size: int, group: Any):
        from torch.distributed.distributed_c10d import _get_default_store  # some builds of torch lack it

        self.next, self.missed, self.finished = (rank + 1) % world_size, 0, Event()
        # a clone, because a store answers one request at a time
        self.store, self.key = _get_default_store().clone(), f"mimkit/alive/{rank}"
        self.store.set(self.key, "0")
        torch.distributed.barrier(group)  # every key exists before anyone reads it
        self.beating = Thread(target=self._beat, daemon=True)
        self.beating.start()
        Thread(target=self._check, daemon=True).start()
        atexit.register(self._end)

    def _beat(self) -> None:
        before = ""
        try:
            for turn in count(1):
                self.store.set(self.key, str(turn))
                latest = self.store.get(f"mimkit/alive/{self.next}").decode()
                if latest != before or latest == ENDED:
                    before, self.missed = latest, 0
                if self.finished.wait(BEAT):
                    break
            self.store.set(self.key, ENDED)
        except RuntimeError:  # the first process, which holds the store, has ended; its closed connections tell
            self.finished.set()

    def _check(self) -> None:
        while not self.finished.wait(BEAT):
            self.missed += 1
            if self.missed > MISSED:
                reason = f"no sign of life from process {self.next} for {BEAT * MISSED:.0f} seconds"
                print(f"mimkit: {PEER.format(reason)}", file=sys.stderr, flush=True)
                os._exit(2)  # the training thread is waiting for that process

    def _end(self) -> None:
        """Stop before Python exits, because no thread may outlive it inside of torch."""
        self.finished.set()
        self.beating.join(BEAT)
