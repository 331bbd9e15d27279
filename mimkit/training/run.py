"""`Run` manages a training run: directory, checkpoints, metrics, distributed engine, and guards.

The training loop itself stays in the recipe:

    run = Run("mae", out=..., resume=..., ...)
    plan = run.make_plan(images, batch_size, epochs)
    run.write_config(options)
    model, stepper = run.prepare(model, optimizer)
    for step, micro_batches in run.steps(loader):
        for batch in micro_batches:
            with run.accelerator.accumulate(model): ...
            run.record(loss=loss)
        run.end_step(step)
        if run.due(step, save_every):
            run.save(step)
"""

from collections.abc import Iterator
from dataclasses import replace as with_changes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimkit.data.identity import names_hash
from mimkit.data.order import Plan
from mimkit.data.sample import Batch
from mimkit.data.sources import Source
from mimkit.errors import UserError, signal_handlers
from mimkit.training.anomaly import AnomalyGuard, Bad
from mimkit.training.checkpoint import Checkpointer, TrainState, step_of
from mimkit.training.display import Display
from mimkit.training.distributed import Engine
from mimkit.training.feed import Feed
from mimkit.training.metrics import Meter
from mimkit.training.precision import resolve_precision
from mimkit.training.preemption import Preemption, interrupt, stop
from mimkit.training.replay import read_about, replay_step
from mimkit.training.run_dir import RunDir
from mimkit.training.skip_steps import StepSkipper

LOG_EVERY = 20  # steps between two readings of what is accumulated on the device


class Run:
    """A training run, composed of its directory, engine, checkpoints, meter, guard and preemption.

    Args:
        name: of the recipe. The directory is runs/NAME unless `out` says otherwise.
        out, resume: see `RunDir.open`.
        seed: of everything that is random.
        precision: auto, fp32, bf16 or fp16.
        compile: use torch.compile.
        grad_accum_steps: number of gradient accumulation steps.
        save_every, measure_every: epochs between checkpoints, and between measurements. 0: at the end only.
        keep, keep_every: number of latest checkpoints to keep; keep every Nth one permanently, 0 for none.
        max_bad: fraction of images that may be impossible to decode.
        max_spike: see `AnomalyGuard`.
        track: name of an accelerate tracker.
        threads: number of CPU threads of each process; see `set_threads`.
        replay: a skipped step to replay, RUN/replay/step-N, instead of training.
    """

    def __init__(
        self,
        name: str,
        *,
        out: str | None = None,
        resume: str | None = None,
        seed: int = 0,
        precision: str = "auto",
        compile: bool = False,
        grad_accum_steps: int = 1,
        save_every: float = 0.0,
        measure_every: float = 0.0,
        keep: int = 2,
        keep_every: int = 0,
        max_bad: float = 0.01,
        max_spike: float | None = None,
        track: str | None = None,
        threads: int | None = None,
        replay: Path | None = None,
    ):
        from accelerate.utils import set_seed

        self.name, self.seed, self.compile, self.replay = name, seed, compile, replay
        self.save_every, self.measure_every, self.keep_every = save_every, measure_every, keep_every
        self.max_bad, self.track, self.grad_accum_steps = max_bad, track, grad_accum_steps
        # a resumed run keeps what 'auto' was resolved to: its next machine may be fast at something else
        auto = precision == "auto" and bool(resume)
        saved = RunDir.open(out, name, resume).saved_options() if auto else {}
        self.engine = Engine(resolve_precision(saved.get("precision", precision)), grad_accum_steps, track, threads)
        self.accelerator = self.engine.accelerator
        self.dir = self.engine.on_main(RunDir.open, out, name, resume)
        self.display = Display(quiet=not self.engine.is_main)
        self.checkpoints = Checkpointer(self.dir.path, self.engine, keep, self.display.print)
        self.meter, self.guard = Meter(), AnomalyGuard(max_spike)
        self.preemption = Preemption(self.engine.any, self._interrupt, quiet=not self.engine.is_main)
        self.bad: Bad | None = None  # a step to return from
        self.names = ""  # hash of the names of the images
        self.skipping = False  # whether the current step is skipped
        self.accelerator.project_configuration.set_directories(str(self.folder))
        self.accelerator.project_configuration.logging_dir = str(self.folder)
        set_seed(seed % 2**32)

    # Setup -----------------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """The run's directory."""
        return self.dir.path

    def make_plan(self, length: int, batch_size: int, epochs: float, repeats: int = 1) -> Plan:
        """Plan which images make which step, from the step that this run starts or continues at."""
        rank, world_size = self.engine.rank, self.engine.world_size
        plan = Plan(length, batch_size, 0, self.seed, 0, rank, world_size, self.grad_accum_steps, repeats)
        latest = self.checkpoints.latest_valid() if self.dir.resuming else None
        start = step_of(latest) if latest else read_about(self.replay)["step"] if self.replay else 0
        steps = round(epochs * plan.steps_per_epoch)
        if steps < 1:
            raise UserError(
                f"--epochs {epochs:g} with {plan.steps_per_epoch} steps per epoch is less than one step. Train for "
                "longer."
            )
        self.checkpoints.permanent_every = self.keep_every * max(1, round(self.save_every * plan.steps_per_epoch))
        self.plan = with_changes(plan, steps=steps, start=start)
        return self.plan

    def write_config(self, config: dict[str, Any], source: Source | None = None) -> None:
        """Create the directory and write config.yaml, with every option as it was resolved.

        Args:
            source: the images to train on, which must be the same if the run is resumed, wherever they lie.
        """
        config = config | {"precision": self.engine.precision}
        self.names = self.engine.on_main(names_hash, source) if source else ""
        self.engine.on_main(self.dir.write_config, config, self.names)
        if self.track and self.engine.is_main:
            flat = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.items()}
            self.accelerator.init_trackers(self.folder.name, flat)

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, clip_grad: float | None = None, **extra: nn.Module
    ) -> tuple[Any, Any]:
        """Distribute the model and the optimizer, and load the latest checkpoint if the run is resumed.

        Args:
            clip_grad: maximum norm of the gradient, for engines that clip by themselves.
            extra: other modules that a checkpoint holds, such as an average of the weights.
        """
        engine = self.engine
        if engine.sharded_params and extra:
            raise UserError(
                f"An average of the weights (--model-ema-decay) needs complete weights, but {engine} shards them. Omit "
                "the option, or launch with ddp.yaml or zero2.yaml."
            )
        # the hooks of a replay must see each module, so nothing is compiled then
        prepared = engine.prepare(
            model, optimizer, self.plan.micro_batch_size, clip_grad, self.compile and not self.replay
        )
        for module in extra.values():
            module.to(engine.device)
        self.guard.watch(optimizer)
        scaler, sharded = self.accelerator.scaler, engine.sharded_checkpoint
        self.state = TrainState(
            model, optimizer, self.meter, self.guard, extra, scaler, sharded, self.plan.length, self.names
        )
        log = self.display.print
        self.skipper = StepSkipper(self.name, self.dir, engine, self.checkpoints, self.state, log)
        self.checkpoints.begin(self.state, save=not self.replay)
        if engine.is_main:
            self.dir.truncate(self.plan.start or -1)
        return prepared

    # Training --------------------------------------------------------------------------------------------------------

    def steps(self, loader: Any) -> Iterator[tuple[int, Iterator[Batch]]]:
        """Yield (step, its micro-batches on the device), with every generator seeded by (seed, step, rank).

        After a bad step the run returns to a state before it. When it comes to that step again, the step is skipped:
        it has no micro-batches.
        """
        plan, state, device = self.plan, self.state, self.engine.device
        log = self.display.print_once if self.engine.is_main else print
        self.step = plan.start
        if self.replay:
            self.bad = Bad(self.step, "it is replayed")  # so that nothing is due
            for micro_batches in replay_step(self.replay, self.state, self.engine, self._seed, self.print):
                yield self.step, micro_batches
            raise SystemExit(0)
        # it ends with this generator, and so do its data workers
        feed = Feed(loader, plan, device, self.max_bad, state.bad_images, self.meter, log)
        feed.start(self.step)
        self.meter.since_step = self.step
        self.meter.restart_clock()
        with self.display.progress(plan.start, plan.steps), signal_handlers(self.preemption.handlers()):
            while self.step < plan.steps:
                self._seed()
                if not self.meter.count:
                    self.meter.restart_clock()
                micro_batches = feed.micro_batches()
                self.skipping = self.skipper.skip(self.step, micro_batches)
                yield self.step, iter(()) if self.skipping else micro_batches
                if self.bad:
                    self.step, self.bad = self.skipper.rewind(self.bad, feed), None
                    continue
                if self.preemption.requested() and self.step + 1 < plan.steps:
                    stop(self.step, str(self.preemption), self.checkpoints, state)
                self.step += 1
            self.checkpoints.wait()

    def _interrupt(self, *_: Any) -> None:
        interrupt(self.step, self.checkpoints)

    def _seed(self, rank: int | None = None) -> None:
        self.engine.seed(self.seed, self.step, rank)
        self.guard.step = self.step

    def record(self, **values: Tensor) -> None:
        """Accumulate the loss and other values of a micro-batch on the device, until `end_step` reads them."""
        self.meter.update(**values)
        self.guard.observe(values["loss"], self.engine.gradient_norm())

    @property
    def step_skipped(self) -> bool:
        """Whether the current step left the weights as they were: it is skipped, or fp16's scaler dropped it."""
        return self.skipping or self.accelerator.optimizer_step_was_skipped

    def end_step(self, step: int) -> None:
        """Every few steps, and before anything is due: check for anomalies, then read, show and log the metrics."""
        done, plan = step + 1, self.plan
        pauses = (self.save_every, self.measure_every)
        if self.replay or (done % LOG_EVERY and not any(self.due(step, epochs) for epochs in pauses)):
            return
        self.checkpoints.poll()
        self.bad = self.guard.check(self.engine.reduce, self.accelerator.scaler)
        metrics = {} if self.bad else self.meter.flush(done, self.engine.reduce)
        if not metrics:  # all steps since the last reading may have been skipped
            return
        rate, waiting = metrics.pop("steps_per_s") * plan.batch_size, metrics.pop("waiting")
        self.guard.running_loss = metrics["loss"]
        lr = max(group["lr"] / (group.get("lr_scale", 1) or 1) for group in self.state.optimizer.param_groups)
        rates = {"lr": lr, "images_per_s": round(rate, 1), "waiting": waiting}
        self.log(done, epoch=done / plan.steps_per_epoch, **metrics, **rates)
        line = done % (5 * LOG_EVERY) == 0 or done == plan.steps
        self.display.update(plan, done, metrics, rate, waiting, line)

    def due(self, step: int, epochs: float) -> bool:
        """Return whether `step` is the last one of the run or ends every `epochs` epochs, and no step was bad."""
        if self.bad:
            return False
        every = max(1, round(epochs * self.plan.steps_per_epoch))
        return step + 1 == self.plan.steps or (epochs > 0 and (step + 1) % every == 0)

    def save(self, step: int) -> None:
        """Write a checkpoint after `step`, while training continues. All processes must call this."""
        self.checkpoints.save(step + 1, self.state)

    # Output ----------------------------------------------------------------------------------------------------------

    def print(self, *text: Any) -> None:
        """Print a line on the main process."""
        self.display.print(*text)

    def log(self, step: int, **values: float) -> None:
        """Append to metrics.jsonl, and pass to the tracker."""
        if self.engine.is_main:
            self.dir.log(step, **values)
        self.accelerator.log(values, step=step)

    def close(self) -> None:
        """Release the model and the trackers, so that another run can start in the same process."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.free_memory()
        self.engine.model = self.engine.full_model = None
        del self.state, self.skipper
