"""Preemption: a scheduler signals that a run must stop. All processes agree on the step to stop after, and save it."""

import signal
from collections.abc import Callable
from typing import Any

from mimkit.errors import STOP_SIGNALS, StoppedError
from mimkit.training.checkpoint import Checkpointer, TrainState


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


def interrupt(step: int, checkpoints: Checkpointer) -> None:
    """End with a KeyboardInterrupt that names the last checkpoint."""
    checkpoints.wait()
    latest = checkpoints.latest
    where = f"{latest}. Continue with --out {checkpoints.run} --resume auto." if latest else "not written yet."
    raise KeyboardInterrupt(f"Interrupted after step {step}; the last checkpoint is {where}")


def stop(step: int, by: str, checkpoints: Checkpointer, state: TrainState) -> None:
    """Write a checkpoint of the step that is done, unless it is bad, and end with a StoppedError.

    All processes must call this after the same step.

    Args:
        by: what stopped the run, such as the name of a signal.
    """
    engine = checkpoints.engine
    checkpoints.wait()
    by, how = f"Stopped by {by}", f"with --out {checkpoints.run} --resume auto."
    if bad := state.guard.check(engine.reduce, state.scaler):
        raise StoppedError(f"{by} at step {bad.step}, which is bad ({bad.reason}). Continue from before it {how}")
    if checkpoints.last_step != step + 1:
        state.meter.average(engine.reduce)
        checkpoints.save(step + 1, state)
        checkpoints.wait()
    engine.wait()
    raise StoppedError(f"{by} after step {step + 1}, which is saved. Continue {how}")
