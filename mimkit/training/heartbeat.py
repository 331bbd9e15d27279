"""Signs of life among the processes of a run.

A machine that is lost closes no connection, and one that is stuck keeps its own: torch waits for either for 10 to 30
minutes. So each process tells the store that all met in that it lives, and looks whether the next one does.
"""

import atexit
import os
import sys
from itertools import count
from threading import Event, Thread
from typing import Any

import torch

from mimkit.errors import PEER

BEAT, MISSED = 5.0, 16  # seconds between signs of life, and how many may be missed: two minutes are promised
ENDED = "ended"


class Heartbeat:
    """Ends this process, with a sentence, when the next one gives no sign of life; those before it then find its
    connections closed.

    Turns are counted, and no clock is read: a run that was suspended finds all alive when it goes on.
    """

    def __init__(self, rank: int, world: int, group: Any):
        from torch.distributed.distributed_c10d import _get_default_store  # not every build of torch has it

        self.next, self.missed, self.over = (rank + 1) % world, 0, Event()
        # of its own: a store answers one question at a time
        self.store, self.own = _get_default_store().clone(), f"mimkit/alive/{rank}"
        self.store.set(self.own, "0")
        torch.distributed.barrier(group)  # all have, and nobody asks in vain
        self.looking = Thread(target=self._look, daemon=True)
        self.looking.start()
        Thread(target=self._judge, daemon=True).start()
        atexit.register(self._end)

    def _look(self) -> None:
        before = ""
        try:
            for turn in count(1):
                self.store.set(self.own, str(turn))
                found = self.store.get(f"mimkit/alive/{self.next}").decode()
                if found != before or found == ENDED:
                    before, self.missed = found, 0
                if self.over.wait(BEAT):
                    break
            self.store.set(self.own, ENDED)
        except RuntimeError:  # the first process, which keeps the store, has ended: its connections tell
            self.over.set()

    def _judge(self) -> None:
        while not self.over.wait(BEAT):
            self.missed += 1
            if self.missed > MISSED:
                said = f"no sign of life from process {self.next} for {BEAT * MISSED:.0f} seconds"
                print(f"mimkit: {PEER.format(said)}", file=sys.stderr, flush=True)
                os._exit(2)  # the thread that trains waits for that process

    def _end(self) -> None:
        """Before Python ends, which no thread inside of torch may outlive."""
        self.over.set()
        self.looking.join(BEAT)
