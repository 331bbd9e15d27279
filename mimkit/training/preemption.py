"""Preemption: a scheduler signals that a run must stop, and all processes agree on the step to stop after."""

import signal
from collections.abc import Callable
from typing import Any

from mimkit.errors import STOP_SIGNALS


class Preemption:
    """Notes the signals that schedulers send before they kill a job.

    Args:
        any_process: returns whether a flag is true in any process, the same in all of them.
    """

    def __init__(self, any_process: Callable[[bool], bool] = bool):
        self.any_process, self.signal_name = any_process, ""

    def handlers(self) -> dict[Any, Any]:
        """Return the handlers to install while training."""
        return dict.fromkeys(STOP_SIGNALS, self._note)

    def _note(self, number: int, *_: Any) -> None:
        self.signal_name = signal.Signals(number).name

    def requested(self) -> bool:
        """Return whether any process was told to stop. All processes must ask after the same step."""
        return self.any_process(bool(self.signal_name))

    def __str__(self) -> str:
        return self.signal_name or "a signal to another process"
