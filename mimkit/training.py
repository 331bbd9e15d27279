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
import ctypes
import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator, DistributedType
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, parse_flag_from_env, set_seed
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from safetensors import SafetensorError
from torch import Tensor, nn

from mimkit.checkpoint import load_strictly, replacing_file
from mimkit.data import STOPS, Batch, Plan, cpu_count, guarded
from mimkit.errors import StoppedError, UserError, is_full
from mimkit.saving import checkpoints, read, step_of, trim, why_torn, write

LOG_EVERY = 20  # steps between readings of what is accumulated on the device
# When a run is resumed
MAY_CHANGE = {"out", "resume", "workers", "track", "save_every", "keep", "keep_every"}
MAY_CHANGE |= {"knn_every", "eval_every", "max_bad"}


def on_cpu() -> bool:
    """Whether accelerate will train on the CPU: there is nothing better, or it was told to."""
    told = parse_flag_from_env("ACCELERATE_USE_CPU")
    return told or not (torch.cuda.is_available() or torch.backends.mps.is_available())


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16 matrix products (AVX-512 BF16, AMX)."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def resolve_precision(precision: str) -> str:
    """'auto' -> what the device does well: bf16 on GPUs and CPUs that have it, fp16 on older GPUs, else fp32.

    On a CPU without them bf16 takes three times as long as fp32, with them less than half (docs/training.md).
    """
    if precision not in ("auto", "fp32", "bf16", "fp16"):
        raise UserError(f"--precision {precision} is unknown: choose auto, fp32, bf16 or fp16.")
    if precision != "auto":
        return precision
    if on_cpu():
        return "bf16" if multiplies_bf16() else "fp32"
    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one.

    It hands large blocks back to the system, and faulting them in again costs a few percent of a training step on a
    CPU, more where it is busy (benchmarks/mim_race.md). Other C libraries are left alone.
    """
    mmap_max, trim_threshold = -4, -1  # malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)
    except (OSError, AttributeError):
        pass


class Run:
    """A training run in its directory.

    Args:
        name: of the recipe; the directory is runs/NAME unless `options.out` says otherwise.
        options: a flat dataclass with at least out, resume, seed, precision, grad_accum_steps and track.

    The directory holds config.yaml, metrics.jsonl and checkpoints/step-N.
    """

    def __init__(self, name: str, options: Any):
        self.options = options
        options.precision = resolve_precision(options.precision)
        cpu = on_cpu()
        world = int(os.environ.get("WORLD_SIZE", 1))
        self.folder = Path(options.out or f"runs/{name}")
        if options.track and options.track not in map(str, get_available_trackers()):
            raise UserError(f"--track {options.track} is not installed: pip install mimkit[track], or leave it out.")
        try:
            self.accelerator = Accelerator(
                cpu=cpu,  # or several processes on CPUs would be so many runs of one, which accelerate calls alone
                mixed_precision={"fp32": "no"}.get(options.precision, options.precision),
                gradient_accumulation_steps=options.grad_accum_steps,
                kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if cpu and world > 1 else [],
                log_with=[options.track] if options.track else None,
            )
        except (ImportError, ValueError) as error:
            raise UserError(f"accelerate cannot start ({error}): check --precision {options.precision}.") from error
        if self.accelerator.distributed_type not in (
            DistributedType.NO,
            DistributedType.MULTI_CPU,
            DistributedType.MULTI_GPU,
        ):
            raise UserError(f"{self.accelerator.distributed_type.value} is not supported yet: launch without it.")
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if cpu and torch.get_num_threads() == 1:  # accelerate launch sets one thread where it finds no GPU
            torch.set_num_threads(max(1, cpu_count() // local))
        if cpu:
            keep_freed_memory()
        self.console = Console(quiet=not self.accelerator.is_main_process, highlight=False, soft_wrap=True)
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.named: set[str] = set()  # bad images, as they were said to be
        self.told = ""  # the signal to stop, where there was one
        self.cpus: Any = torch.distributed.new_group(backend="gloo") if self.accelerator.num_processes > 1 else None
        self.saved: Path | None = None  # the last checkpoint
        self.saver = ThreadPoolExecutor(1)
        self.saving: Future[Path] | None = None
        self.folder = self._choose_folder(name)
        self.accelerator.project_configuration.set_directories(str(self.folder))
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

    def write_config(self) -> None:
        """config.yaml: every option as it was resolved. A resumed run must have the same ones."""
        path = self.folder / "config.yaml"
        config = json.loads(json.dumps(dataclasses.asdict(self.options) | {"out": str(self.folder), "resume": None}))
        if self.options.resume and path.exists():
            before = yaml.safe_load(path.read_text())
            changed = [k for k in config if k in before and before[k] != config[k] and k not in MAY_CHANGE]
            if changed:
                raise UserError(
                    f"{path} has other options than this run ("
                    + ", ".join(f"{k}: {before[k]} there, {config[k]} here" for k in changed)
                    + "): go on with the same ones, or start a new run with --out."
                )
        self.accelerator.wait_for_everyone()  # until all have read what was there
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
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
        start = step_of(self.saved) if self.saved else 0
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
        self.model, self.optimizer, self.beside = model, optimizer, beside
        prepared, wrapped = self.accelerator.prepare(model, optimizer)
        for module in beside.values():
            module.to(self.accelerator.device)
        if self.saved:
            self.load(self.saved)
        self._trim_metrics()
        return prepared, wrapped

    def accumulate(self, model: nn.Module) -> Any:
        """accelerate's context: gradients are synchronised and applied at the last part of a step only."""
        return self.accelerator.accumulate(model)

    # Going through the data ------------------------------------------------------------------------------------------

    def steps(self, loader: Iterable[Batch]) -> Iterator[tuple[int, Iterator[Batch]]]:
        """(step, its parts on the device), with the progress shown and every generator seeded by (seed, step, rank)."""
        plan, rank = self.data_plan, self.accelerator.process_index
        limit = self.options.max_bad * plan.length  # over the epochs each process meets all of them
        self.waited, self.since, self.since_step = 0.0, time.perf_counter(), plan.start
        loaded = iter(loader)  # which draws a number, and may not do so inside the first step
        batches = guarded(loaded, limit, self.print_once if self.accelerator.is_main_process else print)
        text = "{task.fields[text]}"
        columns = TextColumn("training"), BarColumn(), TextColumn(text)
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as self.bar:
            self.task = self.bar.add_task("", total=plan.steps, completed=plan.start, text="")
            own: dict[int, Any] = {signal.SIGINT: self._interrupt} | dict.fromkeys(STOPS, self._tell)
            before = {number: signal.signal(number, handler) for number, handler in own.items()}
            try:
                for self.step in range(plan.start, plan.steps):
                    seed = int(np.random.SeedSequence([self.options.seed, self.step, rank]).generate_state(1)[0])
                    torch.default_generator.manual_seed(seed)
                    np.random.seed(seed)
                    if torch.cuda.is_initialized():
                        torch.cuda.manual_seed(seed)
                    if not self.count:  # what was done since the last reading, such as a checkpoint, is not training
                        self.since, self.waited = time.perf_counter(), 0.0
                    yield self.step, self._parts(batches)
                    if self._asked() and self.step + 1 < plan.steps:
                        self._stop()
                self._finish_saving()
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

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
        """Leave a checkpoint of the step that is done, and end."""
        self._finish_saving()
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
        for _ in range(self.data_plan.parts):
            begun = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - begun
            if batch is None:
                raise UserError("The data ended before the run did: it has fewer images than it said; check its files.")
            if not len(batch.images):
                raise UserError(
                    f"Not one image of a batch can be decoded, such as {batch.bad[0][0]}: remove or mend them."
                )
            yield batch.to(self.accelerator.device)

    def record(self, **values: Tensor) -> None:
        """Add up on the device; nothing is read before `end_step` logs it."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.count += 1

    def total(self, *counts: Tensor) -> list[Tensor]:
        """Each added up over all processes."""
        return [self.accelerator.reduce(x.to(self.accelerator.device), "sum").cpu() for x in counts]

    def end_step(self, step: int) -> None:
        """Now and then: read the recorded values, show and log them."""
        done, plan = step + 1, self.data_plan
        # Before a checkpoint nothing stays unread, nor before a measurement, which is not training
        pauses = [getattr(self.options, name, 0) for name in ("save_every", "eval_every", "knn_every")]
        if done % LOG_EVERY and not any(self.due(step, epochs) for epochs in pauses):
            return
        if self.saving and self.saving.done():
            self._finish_saving()
        means = {k: self.accelerator.reduce(v / self.count, "mean").item() for k, v in self.sums.items()}
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
        """Whether `step` is the last one of the run, or of every so many epochs."""
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
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]  # a killed run may leave half a line

    def _trim_metrics(self) -> None:
        """Forget what was logged after the checkpoint that the run goes on from."""
        if self.accelerator.is_main_process:
            kept = [line for line in self.metrics() if line["step"] <= self.data_plan.start and self.data_plan.start]
            with replacing_file(self.folder / "metrics.jsonl") as file:
                file.write_text("".join(json.dumps(line) + "\n" for line in kept))

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def _last_whole(self) -> Path | None:
        """The checkpoint to go on from, chosen by the main process: the last one that is as it was written."""
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            for folder in reversed(checkpoints(self.folder)):
                if not (reason := why_torn(folder)):
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
        """Write checkpoints/step-N, N steps being done, while training goes on; keep what the options say."""
        if not self.accelerator.is_main_process:
            return
        self._finish_saving()
        adam, scaler = self.optimizer.state_dict(), self.accelerator.scaler
        moments = {f"{i}.{k}": v for i, values in adam["state"].items() for k, v in values.items()}
        states = {"optimizer": moments, "model": self.model.state_dict()}
        states |= {name: module.state_dict() for name, module in self.beside.items()}
        copies = {name: {k: v.to("cpu", copy=True) for k, v in state.items()} for name, state in states.items()}
        own = {"step": step + 1, "param_groups": adam["param_groups"], "scaler": scaler.state_dict() if scaler else {}}
        own |= {"sums": {name: value.item() for name, value in self.sums.items()}, "count": self.count}
        every = self.options.keep_every * max(1, round(self.options.save_every * self.data_plan.steps_per_epoch))
        own["stays"] = bool(every) and (step + 1) % every == 0
        self.saving = self.saver.submit(self._write, self._checkpoint(step), copies, copy.deepcopy(own))

    def _checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step + 1:08d}"

    def _write(self, folder: Path, states: dict[str, dict[str, Tensor]], own: dict[str, Any]) -> Path:
        write(folder, states, own)
        trim(self.folder, step_of(folder), self.options.keep)
        return folder

    def _finish_saving(self) -> None:
        """Wait for the checkpoint that is being written, if one is."""
        saving, self.saving = self.saving, None
        try:
            self.saved = saving.result() if saving else self.saved
        except (OSError, SafetensorError) as error:
            if not is_full(error):
                raise
            left = (
                f"{self.saved} is whole: go on with --out {self.folder} --resume auto" if self.saved else "none is left"
            )
            raise UserError(
                f"The disk is full, and a checkpoint could not be written; {left} when there is space."
            ) from error

    def load(self, folder: Path) -> None:
        """Weights, optimiser and scaler from a checkpoint; the rest of a run's state is a function of its step."""
        states, own = read(folder)
        for name, module in {"model": self.model, **self.beside}.items():
            load_strictly(module, states.get(name, {}), folder)
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in states["optimizer"].items():
            i, key = name.split(".", 1)
            state.setdefault(int(i), {})[key] = tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})
        if self.accelerator.scaler and own["scaler"]:
            self.accelerator.scaler.load_state_dict(own["scaler"])
        self.sums = {name: torch.tensor(value, device=self.accelerator.device) for name, value in own["sums"].items()}
        self.count = own["count"]
        self.print(f"going on from {folder}")
