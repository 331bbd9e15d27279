"""Run: everything about a training run but the loop.

Accelerator, seeds, run directory, progress, metrics and checkpoints. The loop stays in the recipe:

    run = Run("mae_hivit", options, ...)
    model, optimizer = run.prepare(model, optimizer)
    for step, parts in run.steps(loader):
        for batch in parts:
            with run.accumulate(model): ...
        run.end_step(step)
"""

import copy
import dataclasses
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list, set_seed
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from safetensors import SafetensorError
from torch import Tensor, nn

from mimkit.data.loader import limit_bad_images, restart
from mimkit.data.order import Plan, cpu_count
from mimkit.data.sample import Batch
from mimkit.errors import STOP_SIGNALS, StoppedError, UserError, is_full, signal_handlers
from mimkit.files import read_metrics, read_options, replacing, replacing_file
from mimkit.io.weights import load_strictly, read_weights
from mimkit.training import anomaly, distributed, heartbeat, replay
from mimkit.training.checkpoint import checkpoints, read, seal, step_of, sweep, trim, verify_checkpoint, write
from mimkit.training.precision import keep_freed_memory, resolve_precision
from mimkit.training.run_dir import MAY_CHANGE

REPLAYED: list[Path] = []  # the step that `replaying` is about
LOG_EVERY = 20  # steps between readings of what is accumulated on the device


@contextmanager
def replaying(folder: Path) -> Iterator[None]:
    """Inside, a recipe makes one step only: that which a run passed by and left in this folder."""
    REPLAYED.append(folder)
    try:
        yield
    finally:
        REPLAYED.pop()


class Run:
    """A training run in its directory.

    Args:
        name: of the recipe; the directory is runs/NAME unless `options.out` says otherwise.
        options: a flat dataclass with at least out, resume, seed, precision, grad_accum_steps and track.

    The directory holds config.yaml, metrics.jsonl and checkpoints/step-N.
    """

    def __init__(self, name: str, options: Any):
        self.options, self.name = options, name
        self.folder = Path(options.out or f"runs/{name}")
        options.precision = resolve_precision(self._precision_before() or options.precision)
        cpu = distributed.on_cpu()
        if options.track and options.track not in map(str, get_available_trackers()):
            raise UserError(f"--track {options.track} is not installed: pip install mimkit[track], or leave it out.")
        self.accelerator = distributed.start(options.precision, options.grad_accum_steps, options.track)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if cpu and torch.get_num_threads() == 1:  # accelerate launch sets one thread where it finds no GPU
            torch.set_num_threads(max(1, cpu_count() // local))
        if cpu:
            keep_freed_memory()
        self.console = Console(quiet=not self.accelerator.is_main_process, highlight=False, soft_wrap=True)
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.twin: nn.Module | None = None  # what `whole` fills
        self.guard = anomaly.AnomalyGuard(getattr(options, "max_spike", None))
        self.bad: anomaly.Bad | None = None  # a step that is to be passed by
        self.passed: dict[int, str] = {}  # those that were, and why
        self.skipped: dict[str, str] = {}  # images that cannot be used, and why
        self.begun: tuple[dict[str, dict[str, Tensor]], dict[str, Any]] | None = None  # the state before a checkpoint
        self.named: set[str] = set()  # bad images, as they were said to be
        self.told = ""  # the signal to stop, where there was one
        self.cpus: Any = None
        if (world := self.accelerator.num_processes) > 1:
            self.cpus = torch.distributed.new_group(backend="gloo")
            heartbeat.Heartbeat(self.accelerator.process_index, world, self.cpus)
        self.saved: Path | None = None  # the last checkpoint
        self.saver = ThreadPoolExecutor(1)
        self.saving: Future[Path] | None = None
        self.folder = self._choose_folder(name)
        self.accelerator.project_configuration.set_directories(str(self.folder))
        self.accelerator.project_configuration.logging_dir = str(self.folder)
        set_seed(options.seed % 2**32)

    # The directory ---------------------------------------------------------------------------------------------------

    def _choose_folder(self, name: str) -> Path:
        """The main process chooses; a run that is there is never written over."""
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                found[0] = str(self._free_folder(name))
            except UserError as error:
                found[1] = str(error)
        broadcast_object_list(found)
        if found[1]:
            raise UserError(found[1])
        return Path(found[0])

    def _free_folder(self, name: str) -> Path:
        options, folder = self.options, self.folder
        if options.resume not in (None, "auto"):
            if not checkpoints(Path(options.resume)):
                raise UserError(f"--resume {options.resume} holds no checkpoint: pass a run's directory, or 'auto'.")
            return Path(options.resume)
        if not options.out:  # runs/NAME, runs/NAME-2, ...: the last one to go on with, else the first free one
            taken = 0
            while (taken_name := Path(f"runs/{name}{f'-{taken + 1}' if taken else ''}")).exists():
                folder, taken = taken_name, taken + 1
            return folder if options.resume and taken else taken_name
        if folder.is_file():
            raise UserError(f"--out {folder} is a file: choose a folder.")
        if not options.resume and (folder / "metrics.jsonl").exists():
            raise UserError(f"--out {folder} holds a run already: pass --resume auto to go on, or another folder.")
        return folder

    def _precision_before(self) -> str | None:
        """What 'auto' was to the run that is resumed, whose next machine may do something else well."""
        if self.options.precision != "auto" or not self.options.resume:
            return None
        folder = self._free_folder(self.name)
        return read_options(folder).get("precision") if (folder / "config.yaml").exists() else None

    def write_config(self) -> None:
        """config.yaml: every option as it was resolved. A resumed run must have the same ones."""
        path = self.folder / "config.yaml"
        config = json.loads(json.dumps(dataclasses.asdict(self.options) | {"out": str(self.folder), "resume": None}))
        if self.options.resume and path.exists():
            before = read_options(self.folder)
            changed = [k for k in config if k in before and before[k] != config[k] and k not in MAY_CHANGE]
            if changed:
                raise UserError(
                    f"{path} has other options than this run ("
                    + ", ".join(f"{k}: {before[k]} there, {config[k]} here" for k in changed)
                    + "): go on with the same ones, or start a new run with --out."
                )
        self.accelerator.wait_for_everyone()  # until all have read what was there
        if self.accelerator.is_main_process:
            try:
                self.folder.mkdir(parents=True, exist_ok=bool(self.options.out or self.options.resume))
            except FileExistsError as error:
                raise UserError(f"{self.folder} was begun by another run just now: start once more.") from error
            with replacing_file(path) as file:
                file.write_text(yaml.safe_dump(config, sort_keys=False))
            if self.options.track:
                flat = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.items()}
                self.accelerator.init_trackers(self.folder.name, flat)

    # Setting up ------------------------------------------------------------------------------------------------------

    def plan(self, length: int, batch_size: int, epochs: float) -> Plan:
        """Which images make which step, from where this run begins or goes on."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        plan = Plan(length, batch_size, 0, self.options.seed, 0, rank, world, self.options.grad_accum_steps)
        self.saved = self._last_whole() if self.options.resume else None
        start = step_of(self.saved) if self.saved else replay.read_about(REPLAYED[-1])["step"] if REPLAYED else 0
        steps = round(epochs * plan.steps_per_epoch)
        if steps < 1:
            raise UserError(f"--epochs {epochs:g} of {plan.steps_per_epoch} steps is not one step: train for longer.")
        self.data_plan = dataclasses.replace(plan, steps=steps, start=start)
        return self.data_plan

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, **beside: nn.Module) -> tuple[nn.Module, Any]:
        """Place both on the device and share them; go on from the last checkpoint when the run is resumed.

        Args:
            beside: what else a checkpoint holds, such as an average of the weights.
        """
        self.model, self.optimizer, self.beside, accelerator = model, optimizer, beside, self.accelerator
        self.twin = (
            distributed.twin_of(model).to(accelerator.device) if distributed.sharded_params(accelerator) else None
        )
        if self.twin and beside:
            raise UserError(
                "An average of the weights (--model-ema-decay) needs them whole, and "
                f"{distributed.describe(accelerator)} "
                "share them: leave it out, or launch with ddp.yaml or zero2.yaml."
            )
        clip, share = getattr(self.options, "clip_grad", None), self.data_plan.micro_batch_size
        if getattr(self.options, "compile", False) and not REPLAYED:  # hooks of a replay see each module
            distributed.compile_network(accelerator, model)
        prepared = distributed.prepare(accelerator, model, optimizer, share, self.options.precision, clip)
        for module in beside.values():
            module.to(accelerator.device)
        self.guard.watch(optimizer)
        self.passed = anomaly.skipped_steps(self.folder)
        if self.saved:
            self.load(self.saved)
        elif not distributed.sharded_checkpoint(accelerator):
            self.begun = self._state(0)
        elif not REPLAYED:
            self.save(-1)  # so that there is something to go back to
        self._trim_metrics(self.data_plan.start or -1)
        return prepared

    def whole(self, part: Any) -> Any:
        """A part of the network with all of its weights: itself, or a twin of it where processes share them.

        All processes must ask.
        """
        if not self.twin or not (names := [name for name, module in self.model.named_modules() if module is part]):
            return part
        distributed.gather(self.model, self.twin)
        return self.twin.get_submodule(names[0])

    def accumulate(self, model: nn.Module) -> Any:
        """accelerate's context: gradients are synchronized and applied at the last part of a step only."""
        return self.accelerator.accumulate(model)

    # Going through the data ------------------------------------------------------------------------------------------

    def steps(self, loader: Any) -> Iterator[tuple[int, Iterator[Batch]]]:
        """(step, its parts on the device), with the progress shown and every generator seeded by (seed, step, rank).

        A bad step is made by nobody: the run goes back to where it was whole, and there the step has no parts.
        """
        plan = self.data_plan
        if REPLAYED:
            yield from self._replay(REPLAYED[-1])
        batches = self._batches(loader, plan.start)
        self.waited, self.since, self.since_step = 0.0, time.perf_counter(), plan.start
        text = "{task.fields[text]}"
        columns = TextColumn("training"), BarColumn(), TextColumn(text)
        own = {signal.SIGINT: self._interrupt} | dict.fromkeys(STOP_SIGNALS, self._tell)
        progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        with progress as self.bar, signal_handlers(own):
            self.task = self.bar.add_task("", total=plan.steps, completed=plan.start, text="")
            self.step = plan.start
            while self.step < plan.steps:
                self._seed(self.accelerator.process_index)
                if not self.count:  # what was done since the last reading, such as a checkpoint, is not training
                    self.since, self.waited = time.perf_counter(), 0.0
                parts = self._parts(batches)
                yield self.step, iter(()) if self._pass_by(parts) else parts
                if self.bad:
                    batches = self._batches(loader, self._go_back(self.bad, loader))
                    continue
                if self._asked() and self.step + 1 < plan.steps:
                    self._stop()
                self.step += 1
            self._finish_saving()

    def _replay(self, folder: Path) -> Iterator[tuple[int, Iterator[Batch]]]:
        """The step that was passed by, once more, and where its numbers stop being finite; then the end."""
        batches, tracer = replay.load_batches(folder), replay.Tracer(self.model, self.optimizer)
        self.accelerator.gradient_accumulation_steps = len(batches)  # those of all processes make one step here
        load_strictly(self.model, read_weights(folder / "weights"), folder)
        self.step = self.data_plan.start
        reason = replay.read_about(folder)["reason"]
        self.bad = anomaly.Bad(self.step, reason)  # nothing is due
        yield self.step, self._kept(batches)
        self.print(f"step {self.step}, of which it was said: {reason}")
        losses = [float(loss) for _, loss in self.guard.losses]
        self.print(tracer.report(losses, [batch for _, batch in batches]))
        raise SystemExit(0)

    def _kept(self, batches: list[tuple[int, Batch]]) -> Iterator[Batch]:
        """On the device; each process's part under its own seed."""
        seeded = -1
        for rank, batch in batches:
            if rank != seeded:
                self._seed(rank)
                seeded = rank
            yield batch.to(self.accelerator.device)

    def _batches(self, loader: Any, start: int) -> Iterator[Batch]:
        """From step `start` on."""
        restart(loader, start)
        limit = self.options.max_bad * self.data_plan.length  # over the epochs each process meets all of them
        loaded = iter(loader)  # which draws a number, and may not do so inside the first step
        return limit_bad_images(
            loaded, limit, self.print_once if self.accelerator.is_main_process else print, self.skipped
        )

    def _seed(self, rank: int) -> None:
        key = [self.options.seed, self.step, rank]
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(seed)
        self.guard.step = self.step

    def _pass_by(self, parts: Iterator[Batch]) -> bool:
        """Whether this step is one of the bad ones; its batch and the weights before it are left to look at."""
        if self.step not in self.passed:
            return False
        folder = self._keep(self.step, parts)
        model = self.whole(self.model)
        if self.accelerator.is_main_process:
            replay.save_weights(folder, model, self.name, self.step, self.passed[self.step])
            self.print(f"passed step {self.step} by: look at it with mimkit replay {folder}")
        return True

    def _keep(self, step: int, parts: Iterator[Batch]) -> Path:
        """A bad step's batch. -> where it is"""
        folder = self.folder / "replay" / f"step-{step:08d}"
        replay.save_batch(folder, self.accelerator.process_index, list(parts))
        self.accelerator.wait_for_everyone()
        return folder

    def _go_back(self, bad: anomaly.Bad, loader: Any) -> int:
        """To the last whole checkpoint before a bad step, or to the start. -> the step to go on with"""
        self._finish_saving()
        self.passed[bad.step], self.bad = bad.reason, None
        lately = {step: reason for step, reason in self.passed.items() if step > bad.step - anomaly.WINDOW}
        if len(lately) >= anomaly.PATIENCE:
            lr = max(group["lr"] for group in self.optimizer.param_groups)
            self._keep(bad.step, self._parts(self._batches(loader, bad.step)))
            raise anomaly.diagnose(lately, self.folder, lr, self.options.precision)
        self.saved = self._last_whole(bad.step)
        start = step_of(self.saved) if self.saved else 0
        self.print(f"WARNING: step {bad.step} is bad ({bad.reason}): going on without it from step {start}.")
        if self.saved:
            self.load(self.saved)
        elif self.begun:
            self._restore(*self.begun, self.folder)
        else:
            raise UserError(f"Step {bad.step} is bad ({bad.reason}), and there is no checkpoint before it: start anew.")
        self._trim_metrics(start)
        self.sums, self.count, self.since_step, self.step = {}, 0, start, start
        self.optimizer.zero_grad()
        return start

    def _interrupt(self, *_: Any) -> None:
        self._finish_saving()
        how = f"{self.saved}: go on with --out {self.folder} --resume auto." if self.saved else "not written yet."
        raise KeyboardInterrupt(f"Interrupted after step {self.step}; the last checkpoint is {how}")

    def _tell(self, number: int, *_: Any) -> None:
        self.told = signal.Signals(number).name

    def _asked(self) -> bool:
        """Whether any process was told to stop; they agree after every step, by their CPUs alone."""
        told = torch.tensor(bool(self.told), dtype=torch.int32)
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, self.cpus)
        return bool(told)

    def _stop(self) -> None:
        """Leave a checkpoint of the step that is done, unless it is bad, and end."""
        self._finish_saving()
        if bad := self.guard.read(self.accelerator):
            raise StoppedError(
                f"Stopped by {self.told or 'the signal to another process'} at step {bad.step}, which is bad "
                f"({bad.reason}): go on from before it with --out {self.folder} --resume auto."
            )
        if self.saved != self._checkpoint(self.step):
            self.sums = {name: self.accelerator.reduce(value, "mean") for name, value in self.sums.items()}
            self.save(self.step)
            self._finish_saving()
        self.accelerator.wait_for_everyone()
        raise StoppedError(
            f"Stopped by {self.told or 'the signal to another process'} after step {self.step + 1}, which is saved: go "
            f"on with --out {self.folder} --resume auto."
        )

    def _parts(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for _ in range(self.data_plan.grad_accum_steps):
            begun = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - begun
            if batch is None:
                raise UserError("The data ended before the run did: it has fewer images than it said; check its files.")
            if len(batch.images) < self.data_plan.micro_batch_size:
                raise UserError(
                    f"{batch.bad[0][0]} cannot be used ({batch.bad[0][1]}), nor can those that could stand in for it: "
                    "remove or mend them."
                )
            yield batch.to(self.accelerator.device)

    def record(self, **values: Tensor) -> None:
        """Add up on the device; nothing is read before `end_step` logs it."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.count += 1
        self.guard.see(values["loss"])
        engine = getattr(self.accelerator, "deepspeed_engine_wrapped", None)
        if engine and self.accelerator.sync_gradients:  # where they are not finite it leaves the optimizer out
            self.guard.see_gradient(engine.engine.get_global_grad_norm(), self.accelerator.device)

    def total(self, *counts: Tensor) -> list[Tensor]:
        """Each added up over all processes."""
        return [self.accelerator.reduce(x.to(self.accelerator.device), "sum").cpu() for x in counts]

    def end_step(self, step: int) -> None:
        """Now and then: read the recorded values, show and log them."""
        done, plan = step + 1, self.data_plan
        # Before a checkpoint nothing stays unread, nor before a measurement, which is not training
        pauses = [getattr(self.options, name, 0) for name in ("save_every", "eval_every", "knn_every")]
        if REPLAYED:
            return  # `_replay` reads what was recorded
        if done % LOG_EVERY and not any(self.due(step, epochs) for epochs in pauses):
            return
        if self.saving and self.saving.done():
            self._finish_saving()
        self.bad = self.guard.read(self.accelerator)
        if self.bad or not self.count:  # all of them may have been passed by
            return
        means = {k: self.accelerator.reduce(v / self.count, "mean").item() for k, v in self.sums.items()}
        self.guard.usual = means["loss"]
        now = time.perf_counter()
        elapsed, steps = now - self.since, done - self.since_step
        rate = steps * plan.batch_size / elapsed
        left = (plan.steps - done) * plan.batch_size / rate
        shown = {
            **means,
            "lr": max(group["lr"] / (group.get("lr_scale", 1) or 1) for group in self.optimizer.param_groups),
            "images_per_s": round(rate, 1),
            "waiting": round(self.waited / elapsed, 4),
        }
        self.log(step=done, epoch=done / plan.steps_per_epoch, **shown)
        numbers = " · ".join(f"{k} {v:.4f}" for k, v in means.items())
        text = f"step {done}/{plan.steps} · {numbers} · {rate:.0f} images/s · waiting {shown['waiting']:.0%} · "
        text += f"{int(left // 60)}:{int(left % 60):02d} left"
        self.bar.update(self.task, completed=done, text=text)
        if not self.console.is_terminal and (done % (5 * LOG_EVERY) == 0 or done == plan.steps):
            self.print(text)
        self.sums, self.count, self.waited, self.since, self.since_step = {}, 0, 0.0, now, done

    def close(self) -> None:
        """Let go of the networks and the trackers, for another run in the same process."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.free_memory()
        del self.model, self.optimizer, self.beside

    def due(self, step: int, epochs: float) -> bool:
        """Whether `step` is the last one of the run, or of every so many epochs; after a bad step nothing is."""
        if self.bad:
            return False
        every = max(1, round(epochs * self.data_plan.steps_per_epoch))
        return step + 1 == self.data_plan.steps or (epochs > 0 and (step + 1) % every == 0)

    # Telling ---------------------------------------------------------------------------------------------------------

    def print(self, *text: Any) -> None:
        """On the main process only."""
        self.console.print(*text, markup=False)

    def print_once(self, text: str) -> None:
        """The same, unless it has been said before: a bad image is met again by each measurement."""
        if text not in self.named:
            self.named.add(text)
            self.print(text)

    def log(self, step: int, **values: float) -> None:
        """A line of metrics.jsonl, and the trackers."""
        if self.accelerator.is_main_process:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log(values, step=step)

    def metrics(self) -> list[dict[str, float]]:
        """What has been logged."""
        return read_metrics(self.folder)

    def _trim_metrics(self, start: int) -> None:
        """Forget what was logged after the checkpoint that the run goes on from."""
        if self.accelerator.is_main_process:
            kept = [line for line in self.metrics() if line["step"] <= start]
            with replacing_file(self.folder / "metrics.jsonl") as file:
                file.write_text("".join(json.dumps(line) + "\n" for line in kept))

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def _last_whole(self, before: float = math.inf) -> Path | None:
        """The checkpoint to go on from, chosen by the main process: the last one that is as it was written.

        Args:
            before: of those without this step.
        """
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            for folder in reversed([folder for folder in checkpoints(self.folder) if step_of(folder) <= before]):
                if not (reason := verify_checkpoint(folder)):
                    found = [str(folder), None]
                    break
                aside = folder.with_name(f"torn-{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
                self.print(f"WARNING: {folder} is torn ({reason}): it is now {aside.name}; looking for the one before.")
            if not found[0] and any((self.folder / "checkpoints").glob("torn-*")):
                found[1] = f"No checkpoint of {self.folder} is whole: start anew with another --out."
        broadcast_object_list(found)
        if found[1]:
            raise UserError(found[1])
        return Path(found[0]) if found[0] else None

    def save(self, step: int) -> None:
        """Write checkpoints/step-N, N steps being done, while training goes on; keep what the options say.

        All processes must ask. An engine that has its own files writes them while training waits.
        """
        self._finish_saving()
        folder = self._checkpoint(step)
        if self.accelerator.is_main_process:
            sweep(self.folder)
        if distributed.sharded_checkpoint(self.accelerator):
            self._save_parts(folder, self._averages(), self._own(step + 1))
        elif self.accelerator.is_main_process:
            self.saving = self.saver.submit(self._write, folder, *self._state(step + 1))
        self.begun = None

    def _own(self, done: int) -> dict[str, Any]:
        """What is known after so many steps, beside tensors."""
        every = self.options.keep_every * max(1, round(self.options.save_every * self.data_plan.steps_per_epoch))
        return {
            "step": done,
            "stays": bool(every) and done > 0 and done % every == 0,
            "count": self.count,
            "sums": {k: v.item() for k, v in self.sums.items()},
            "usual": self.guard.usual,
            "passed": self.passed,
            "skipped": self.skipped,
            "images": self.data_plan.length,
            "engine": distributed.describe(self.accelerator),
        }

    def _averages(self) -> dict[str, dict[str, Tensor]]:
        return {name: module.state_dict() for name, module in self.beside.items()}

    def _state(self, done: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Copies in memory of all that a run goes on with."""
        adam, scaler = self.optimizer.state_dict(), self.accelerator.scaler
        moments = {f"{i}.{k}": v for i, values in adam["state"].items() for k, v in values.items()}
        states = {"optimizer": moments, "model": self.model.state_dict(), **self._averages()}
        own = {"param_groups": adam["param_groups"], "scaler": scaler.state_dict() if scaler else {}}
        copies = {name: {k: v.to("cpu", copy=True) for k, v in state.items()} for name, state in states.items()}
        return copies, copy.deepcopy(self._own(done) | own)

    def _save_parts(self, folder: Path, states: dict[str, dict[str, Tensor]], own: dict[str, Any]) -> None:
        """Every process writes its part into the main one's temporary folder."""
        main = self.accelerator.is_main_process
        with replacing(folder) if main else nullcontext() as temporary:
            place = broadcast_object_list([str(temporary)])[0]
            with self._or_full():
                self.accelerator.save_state(place)
            self.accelerator.wait_for_everyone()
            if main:
                seal(Path(place), states, own)
        if main:
            trim(self.folder, step_of(folder), self.options.keep)
        self.saved = folder
        self.accelerator.wait_for_everyone()

    def _checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step + 1:08d}"

    def _write(self, folder: Path, states: dict[str, dict[str, Tensor]], own: dict[str, Any]) -> Path:
        write(folder, states, own)
        trim(self.folder, step_of(folder), self.options.keep)
        return folder

    def _finish_saving(self) -> None:
        """Wait for the checkpoint that is being written, if one is."""
        saving, self.saving = self.saving, None
        with self._or_full():
            self.saved = saving.result() if saving else self.saved

    @contextmanager
    def _or_full(self) -> Iterator[None]:
        """A sentence where the disk is full."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if not is_full(error):
                raise
            left = (
                f"{self.saved} is whole: go on with --out {self.folder} --resume auto" if self.saved else "none is left"
            )
            raise UserError(
                f"The disk is full, and a checkpoint could not be written; {left} when there is space."
            ) from error

    def load(self, folder: Path) -> None:
        """Weights, optimizer and scaler from a checkpoint; the rest of a run's state is a function of its step."""
        (states, own), engine = read(folder), distributed.describe(self.accelerator)
        if engine != own.get("engine") and (
            distributed.sharded_checkpoint(self.accelerator) or "optimizer" not in states
        ):
            raise UserError(
                f"{folder} was written by {own.get('engine')}, and this is {engine}: launch the same, or start a new "
                "run from its weights with --init."
            )
        if own.get("images") != (length := self.data_plan.length):
            raise UserError(
                f"{folder} is of a run on {own.get('images')} images, and --data has {length}, in another order: give "
                "the same data, or start a new run from its weights with --init."
            )
        try:
            self._restore(states, own, folder)
        except (KeyError, TypeError, AttributeError) as error:  # its hash was rewritten too
            raise UserError(f"{folder} is not what a run wrote ({error!r}): start anew with another --out.") from error
        if distributed.sharded_checkpoint(self.accelerator):
            self.accelerator.load_state(str(folder))
        self.print(f"going on from {folder}")

    def _restore(self, states: dict[str, dict[str, Tensor]], own: dict[str, Any], folder: Path) -> None:
        for name, module in self.beside.items():
            load_strictly(module, states.get(name, {}), folder)
        if "optimizer" in states:
            load_strictly(self.model, states["model"], folder)
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in states["optimizer"].items():
                i, key = name.split(".", 1)
                state.setdefault(int(i), {})[key] = tensor
            self.optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})
            if self.accelerator.scaler and own["scaler"]:
                self.accelerator.scaler.load_state_dict(own["scaler"])
        self.sums = {name: torch.tensor(value, device=self.accelerator.device) for name, value in own["sums"].items()}
        self.count, self.guard.usual = own["count"], own["usual"]
        self.passed |= {int(step): reason for step, reason in own["passed"].items()}
        self.skipped |= own["skipped"]
