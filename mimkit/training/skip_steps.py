"""Skip bad steps: return to the last state before one, and leave it out when the run comes to it again.

`AnomalyGuard` in anomaly.py finds the bad steps, and `Run.steps` in run.py calls both.
"""

from collections.abc import Callable, Iterator

from mimkit.data.sample import Batch
from mimkit.errors import UserError
from mimkit.training.anomaly import Bad, skipped_steps, too_many_skipped
from mimkit.training.checkpoint import Checkpointer, TrainState
from mimkit.training.distributed import Engine
from mimkit.training.feed import Feed
from mimkit.training.replay import save_batch, save_weights
from mimkit.training.run_dir import RunDir


class StepSkipper:
    """Returns from bad steps and skips them, and saves what `mimkit replay` needs to look at them.

    Args:
        recipe: name of the recipe, which replays a step.
        log: prints a line on the main process.
    """

    def __init__(
        self,
        recipe: str,
        directory: RunDir,
        engine: Engine,
        checkpoints: Checkpointer,
        state: TrainState,
        log: Callable[[str], None] = print,
    ):
        self.recipe, self.dir, self.engine, self.checkpoints = recipe, directory, engine, checkpoints
        self.state, self.guard, self.log = state, state.guard, log
        self.guard.skipped |= skipped_steps(directory.path)

    def skip(self, step: int, micro_batches: Iterator[Batch]) -> bool:
        """Return whether to skip a step. If so, save its batch and the weights before it."""
        if step not in self.guard.skipped:
            return False
        self._save_batch(step, micro_batches)
        folder, model = self.dir.replay(step), self.engine.full_state(self.state.model)
        if self.engine.is_main:
            save_weights(folder, model, self.recipe, step, self.guard.skipped[step])
        self.log(f"skipped step {step}: look at it with mimkit replay {folder}")
        return True

    def _save_batch(self, step: int, micro_batches: Iterator[Batch]) -> None:
        save_batch(self.dir.replay(step), self.engine.rank, list(micro_batches))
        self.engine.wait()

    def rewind(self, bad: Bad, feed: Feed) -> int:
        """Return to the last state before a bad step, and start the feed there. Return the number of steps done.

        Raises:
            UserError: if there were too many bad steps lately, or there is no state to return to.
        """
        self.checkpoints.wait()
        if lately := self.guard.skip(bad):
            feed.start(bad.step)
            self._save_batch(bad.step, feed.micro_batches())
            lr = max(group["lr"] for group in self.state.optimizer.param_groups)
            raise too_many_skipped(lately, self.dir.path, lr, self.engine.precision)
        start = self.checkpoints.restore(bad.step, self.state)
        if start is None:
            raise UserError(f"Step {bad.step} is bad ({bad.reason}), and no checkpoint precedes it. Start a new run.")
        self.log(f"WARNING: step {bad.step} is bad ({bad.reason}). Continuing without it from step {start}.")
        if self.engine.is_main:
            self.dir.truncate(start)
        self.state.meter.restart(start)
        self.state.optimizer.zero_grad()
        feed.start(start)
        return start
