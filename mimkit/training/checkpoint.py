"""Checkpoints of a run: what they hold, how they are written in the background, and how they are verified.

`TrainState` is what a checkpoint holds. `Checkpointer` writes, finds and loads checkpoints. Under ZeRO and FSDP2 the
engine writes the model and the optimizer itself (`Engine.save_shards`).
"""

import copy
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mimkit.errors import UserError, is_full
from mimkit.files import read_json, replacing, resume_flags
from mimkit.io.weights import State, load_strictly
from mimkit.training.anomaly import AnomalyGuard
from mimkit.training.distributed import Engine
from mimkit.training.metrics import Meter

MANIFEST, STATE = "manifest.json", "state.json"
Snapshot = tuple[dict[str, State], dict[str, Any]]  # tensors by file name, and everything else as JSON


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints in a run's directory, the latest one last."""
    found = (run / "checkpoints").glob("step-*")
    return sorted(folder for folder in found if folder.name.removeprefix("step-").isdecimal())


def step_of(folder: Path) -> int:
    """Return the number of steps that a checkpoint was written after."""
    return int(folder.name.removeprefix("step-"))


def digest(file: Path) -> str:
    """Flush a file to the disk and return its SHA-256 in hexadecimal."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_checkpoint(folder: Path, snapshot: Snapshot) -> None:
    """Write a checkpoint atomically: NAME.safetensors for each state, state.json, and the hashes of all files."""
    with replacing(folder) as temporary:
        seal(temporary, snapshot)


def seal(folder: Path, snapshot: Snapshot) -> None:
    """Write the files of a checkpoint into an existing folder, which may hold files of the engine, and hash all."""
    for name, state in snapshot[0].items():
        save_file(state, folder / f"{name}.safetensors")
    (folder / STATE).write_text(json.dumps(snapshot[1], indent=1))
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    hashes = {file.relative_to(folder).as_posix(): digest(file) for file in files}
    (folder / MANIFEST).write_text(json.dumps(hashes, indent=1))
    digest(folder / MANIFEST)  # flushes the manifest as well


def verify_checkpoint(folder: Path) -> str:
    """Return why a checkpoint is corrupt, or an empty string if every file is what was written and none was added."""
    try:
        hashes = dict(json.loads((folder / MANIFEST).read_text()))
        files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
        read = {name for name in files if name != MANIFEST and not Path(name).name.startswith(".")}  # an engine's too
        # a name that is not among the files, such as ../x, is never opened
        changed = [
            name
            for name in sorted(hashes.keys() | read)
            if name not in files or name not in hashes or digest(files[name]) != hashes[name]
        ]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return str(error)
    return f"{', '.join(changed)} differ from what was written" if changed else ""


def read_checkpoint(folder: Path) -> Snapshot:
    """Read what `write_checkpoint` wrote, into memory: on some systems a mapped file could not be removed."""
    try:
        files = folder.glob("*.safetensors")
        states = {file.stem: {name: tensor.clone() for name, tensor in load_file(file).items()} for file in files}
    except SafetensorError as error:  # someone changed the file and its hash
        raise UserError(f"{folder} cannot be read ({error}). Start a new run with another --out.") from error
    return states, read_json(folder / STATE)


def remove_unfinished(run: Path) -> None:
    """Remove what a killed process had begun to write. Only one process writes, so nothing else is at work."""
    for left in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


def remove_old(run: Path, step: int, keep: int) -> None:
    """Remove checkpoints up to `step`, except the last `keep`, permanent ones, and those that cannot be read."""
    for old in [folder for folder in checkpoints(run) if step_of(folder) <= step][:-keep]:
        try:
            permanent = read_json(old / STATE).get("permanent")
        except (OSError, UserError):
            continue
        if not permanent:
            shutil.rmtree(old, ignore_errors=True)


class TrainState:
    """The state of a run, as tensors for safetensors files and values for JSON.

    Args:
        model, optimizer: what is trained.
        meter, guard: what they have accumulated is part of the state.
        extra_modules: other modules that a checkpoint holds by name, such as an average of the weights.
        scaler: the gradient scaler of fp16, or None.
        sharded: whether the engine writes the model and the optimizer itself.
        images: number of images in the data set, whose order depends on it.
        names: hash of their names.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        meter: Meter,
        guard: AnomalyGuard,
        extra_modules: dict[str, nn.Module] | None = None,
        scaler: Any = None,
        sharded: bool = False,
        images: int = 0,
        names: str = "",
    ):
        self.model, self.optimizer, self.meter, self.guard = model, optimizer, meter, guard
        self.extra_modules, self.scaler, self.sharded, self.images = extra_modules or {}, scaler, sharded, images
        self.names = names
        self.bad_images: dict[str, str] = {}  # images that cannot be used, and why

    def state_dict(self) -> Snapshot:
        """Return copies in memory of all tensors, by file name, and of all other values."""
        states: dict[str, State] = {name: module.state_dict() for name, module in self.extra_modules.items()}
        values: dict[str, Any] = {
            **self.meter.state_dict(),
            **self.guard.state_dict(),
            "bad_images": self.bad_images,
            "images": self.images,
            "names": self.names,
        }
        if not self.sharded:
            adam = self.optimizer.state_dict()
            moments = {f"{i}.{k}": v for i, slots in adam["state"].items() for k, v in slots.items()}
            states |= {"optimizer": moments, "model": self.model.state_dict()}
            values |= {"param_groups": adam["param_groups"], "scaler": self.scaler.state_dict() if self.scaler else {}}
        copies = {name: {k: v.to("cpu", copy=True) for k, v in state.items()} for name, state in states.items()}
        return copies, copy.deepcopy(values)

    def load_state_dict(self, snapshot: Snapshot, origin: str | Path, device: torch.device | None = None) -> None:
        """Load what `state_dict` returned.

        Args:
            origin: where it comes from, named in errors.
            device: where the meters accumulate.

        Raises:
            UserError: if it is from a run on other data, or a tensor or a value is missing, unexpected or malformed.
        """
        states, values = snapshot
        if values.get("images") != self.images:
            raise UserError(
                f"{origin} is from a run on {values.get('images')} images, but --data has {self.images}, in another "
                "order. Pass the same data (before --parts existed, only train), or start a new run with --init."
            )
        try:
            for name, module in self.extra_modules.items():
                load_strictly(module, states.get(name, {}), origin)
            if "optimizer" in states:
                load_strictly(self.model, states["model"], origin)
                slots: dict[int, dict[str, Tensor]] = {}
                for name, tensor in states["optimizer"].items():
                    i, key = name.split(".", 1)
                    slots.setdefault(int(i), {})[key] = tensor
                self.optimizer.load_state_dict({"state": slots, "param_groups": values["param_groups"]})
                if self.scaler and values["scaler"]:
                    self.scaler.load_state_dict(values["scaler"])
            self.meter.load_state_dict(values, device)
            self.guard.load_state_dict(values)
            self.bad_images.update(values["bad_images"])
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:  # someone changed the file and its hash
            raise UserError(
                f"{origin} was not written by a run ({error!r}). Start a new one with another --out."
            ) from error


class Checkpointer:
    """Writes the checkpoints of a run in the background, and finds the one to continue from.

    All processes must call each method. If the engine shards the optimizer, every process writes its own files while
    training waits.

    Args:
        run: the run's directory; checkpoints go to checkpoints/step-N, where N steps are done.
        engine: the engine of the run.
        keep: number of latest checkpoints to keep.
        log: prints a line on the main process.
    """

    def __init__(self, run: Path, engine: Engine, keep: int = 2, log: Callable[[str], None] = print):
        self.run, self.engine, self.keep, self.log = run, engine, keep, log
        self.permanent_every = 0  # checkpoints at multiples of so many steps are never removed; 0 for none
        self.latest: Path | None = None  # the last complete checkpoint; only the main process knows it at all times
        self.last_step: int | None = None  # the step of the last call of `save`, the same in all processes
        self.initial: Snapshot | None = None  # the state to return to while there is no checkpoint
        self.writer = ThreadPoolExecutor(1)
        self.writing: Future[Path] | None = None

    def folder(self, step: int) -> Path:
        """Return where the checkpoint after `step` steps is."""
        return self.run / "checkpoints" / f"step-{step:08d}"

    def latest_valid(self, before: float = math.inf) -> Path | None:
        """Return the last valid checkpoint of at most `before` steps; rename corrupt ones to corrupt-step-N.

        Raises:
            UserError: if there are checkpoints, but all of them are corrupt.
        """
        found = self.engine.on_main(self._find_valid, before)
        self.latest = Path(found) if found else None
        return self.latest

    def _find_valid(self, before: float) -> str | None:
        for folder in reversed([folder for folder in checkpoints(self.run) if step_of(folder) <= before]):
            if not (reason := verify_checkpoint(folder)):
                return str(folder)
            renamed = folder.with_name(f"corrupt-{folder.name}")
            shutil.rmtree(renamed, ignore_errors=True)
            folder.rename(renamed)
            self.log(f"WARNING: {folder} is corrupt ({reason}). It is now {renamed.name}; looking for an earlier one.")
        if any((self.run / "checkpoints").glob("corrupt-*")):
            raise UserError(f"{self.run} has no valid checkpoint. Start a new run with another --out.")
        return None

    def begin(self, state: TrainState, save: bool = True) -> None:
        """Load the latest checkpoint if there is one; otherwise keep the initial state to return to.

        Args:
            save: whether an engine with sharded state, which cannot be kept in memory, may write a first checkpoint.
        """
        if self.latest:
            self.load(self.latest, state)
        elif not self.engine.sharded_checkpoint:
            self.initial = state.state_dict()
        elif save:
            self.save(0, state)

    def save(self, step: int, state: TrainState) -> None:
        """Write a checkpoint after `step` steps and remove old ones, while training continues."""
        self.wait()
        self.initial, self.last_step = None, step
        folder, main = self.folder(step), self.engine.is_main
        permanent = step > 0 and self.permanent_every > 0 and step % self.permanent_every == 0
        about = {"step": step, "permanent": permanent, "engine": str(self.engine)}
        if main:
            remove_unfinished(self.run)
        if not self.engine.sharded_checkpoint:
            if main:
                self.writing = self.writer.submit(self._write, folder, _with(about, state.state_dict()))
            return
        with self._disk_full(), replacing(folder) if main else nullcontext() as temporary:
            shared = Path(self.engine.on_main(str, temporary))
            self.engine.save_shards(shared)
            self.engine.wait()
            if main:
                seal(shared, _with(about, state.state_dict()))
        if main:
            remove_old(self.run, step, self.keep)
        self.latest = folder
        self.engine.wait()

    def _write(self, folder: Path, snapshot: Snapshot) -> Path:
        write_checkpoint(folder, snapshot)
        remove_old(self.run, step_of(folder), self.keep)
        return folder

    def load(self, folder: Path, state: TrainState) -> None:
        """Load a checkpoint into `state`, and the engine's own files into the engine.

        Raises:
            UserError: if another engine wrote it, or it does not fit the state.
        """
        snapshot = read_checkpoint(folder)
        written_by, sharded = snapshot[1].get("engine"), self.engine.sharded_checkpoint
        if written_by != str(self.engine) and (sharded or "optimizer" not in snapshot[0]):
            raise UserError(
                f"{folder} was written by {written_by}, but this is {self.engine}. Launch with the same engine, or "
                "start a new run from its weights with --init."
            )
        state.load_state_dict(snapshot, folder, self.engine.device)
        if sharded:
            self.engine.load_shards(folder)
        self.log(f"resuming from {folder}")

    def restore(self, before: int, state: TrainState) -> int | None:
        """Load the last valid checkpoint of at most `before` steps, or the initial state.

        Returns:
            The number of steps done in it, or None if there is neither.
        """
        self.wait()
        if latest := self.latest_valid(before):
            self.load(latest, state)
            return step_of(latest)
        if self.initial:
            state.load_state_dict(self.initial, self.run, self.engine.device)
            return 0
        return None

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete."""
        writing, self.writing = self.writing, None
        with self._disk_full():
            self.latest = writing.result() if writing else self.latest

    def poll(self) -> None:
        """Report an error of the background writer as soon as it has ended."""
        if self.writing and self.writing.done():
            self.wait()

    @contextmanager
    def _disk_full(self) -> Iterator[None]:
        """Turn the error of a full disk into a sentence."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if not is_full(error):
                raise
            hint = (
                f"{self.latest} is complete; continue with {resume_flags(self.run)}"
                if self.latest
                else "No checkpoint is left; start again"
            )
            raise UserError(
                f"The disk is full, and a checkpoint could not be written. {hint} when there is space."
            ) from error


def _with(about: dict[str, Any], snapshot: Snapshot) -> Snapshot:
    return snapshot[0], about | snapshot[1]
