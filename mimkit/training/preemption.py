"""Stopping: a scheduler or a person signals that a run must stop. All processes agree on the step, and save it."""

import os
import signal
from collections.abc import Callable
from typing import Any

from mimkit.errors import STOP_SIGNALS, StoppedError
from mimkit.files import resume_flags
from mimkit.training.checkpoint import Checkpointer, TrainState

NOTICE = b"\nInterrupted: the run ends after this step and saves it. Interrupt again to end at once.\n"


class Preemption:
    """Notes the signals that schedulers send before they kill a job, and Ctrl-C.

    Args:
        any_process: returns whether a flag is true in any process, the same in all of them.
        end_at_once: handler of a second Ctrl-C.
        quiet: whether another process tells the user what the first Ctrl-C does.
    """

    def __init__(
        self,
        any_process: Callable[[bool], bool] = bool,
        end_at_once: Callable[..., Any] = signal.default_int_handler,
        quiet: bool = False,
    ):
        self.any_process, self.end_at_once, self.quiet = any_process, end_at_once, quiet
        self.signal_name = ""

    def handlers(self) -> dict[Any, Any]:
        """Return the handlers to install while training."""
        return dict.fromkeys([*STOP_SIGNALS, signal.SIGINT], self._note)

    def _note(self, number: int, frame: Any = None) -> None:
        name = signal.Signals(number).name
        if name == self.signal_name == "SIGINT":
            self.end_at_once(number, frame)
        if name == "SIGINT" and not self.quiet:
            os.write(2, NOTICE)  # the signal may have come inside a print, which cannot be entered twice
        self.signal_name = name

    def requested(self) -> bool:
        """Return whether any process was told to stop. All processes must ask after the same step."""
        return self.any_process(bool(self.signal_name))

    def __str__(self) -> str:
        return self.signal_name or "a signal to another process"


def stopped(by: str, message: str) -> BaseException:
    """Return what ends a run: a StoppedError, which may be queued again, or a KeyboardInterrupt, which may not.

    Args:
        by: what stopped the run, such as the name of a signal.
    """
    return KeyboardInterrupt(message) if by == "SIGINT" else StoppedError(message)


def interrupt(step: int, checkpoints: Checkpointer) -> None:
    """End with a KeyboardInterrupt that names the last checkpoint, without writing another one."""
    checkpoints.wait()
    latest = checkpoints.latest
    where = f"{latest}. Continue with {resume_flags(checkpoints.run)}" if latest else "not written yet"
    raise KeyboardInterrupt(f"Interrupted after step {step}; the last checkpoint is {where}.")


def stop(step: int, by: str, checkpoints: Checkpointer, state: TrainState) -> None:
    """Write a checkpoint of the step that is done, unless it is bad, and end as `stopped` says.

    All processes must call this after the same step.

    Args:
        by: what stopped the run, such as the name of a signal.
    """
    engine = checkpoints.engine
    checkpoints.wait()
    what, how = f"Stopped by {by}", f"with {resume_flags(checkpoints.run)}."
    if bad := state.guard.check(engine.reduce, state.scaler):
        raise stopped(by, f"{what} at step {bad.step}, which is bad ({bad.reason}). Continue from before it {how}")
    if checkpoints.last_step != step + 1:
        state.meter.average(engine.reduce)
        checkpoints.save(step + 1, state)
        checkpoints.wait()
    engine.wait()
    raise stopped(by, f"{what} after step {step + 1}, which is saved. Continue {how}")
