"""The directory of a run: which folder it is, its config.yaml, and its metrics.jsonl."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from mimkit.errors import UserError, some
from mimkit.files import read_json, read_metrics, read_options, replacing_file, resume_flags
from mimkit.training.checkpoint import STATE, checkpoints

# Options that may differ when a run is resumed
MAY_CHANGE = {"out", "resume", "workers", "track", "save_every", "keep", "keep_every", "knn_every", "eval_every"}
MAY_CHANGE |= {"max_bad", "max_spike", "grad_accum_steps", "grad_checkpointing", "compile", "threads"}
MAY_CHANGE |= {"head_std", "compare_scratch"}  # they matter at the start and at the end only


class RunDir:
    """The directory of a run. It holds config.yaml, metrics.jsonl and checkpoints/; `open` chooses it.

    Args:
        path: the directory. `write_config` creates it.
        may_exist: whether the directory may exist already; if not, another run has just taken it.
        resuming: whether the run continues from a checkpoint.
    """

    def __init__(self, path: Path, may_exist: bool = False, resuming: bool = False):
        self.path, self.may_exist, self.resuming = path, may_exist, resuming

    @classmethod
    def open(cls, out: str | None, name: str, resume: str | None) -> "RunDir":
        """Choose the directory of a run. A run that exists is never overwritten.

        Args:
            out: the directory; runs/NAME, or the next free runs/NAME-2, runs/NAME-3, ... by default.
            resume: 'auto' to continue the last run of this name (or in `out`) if there is one, or a run's directory.

        Raises:
            UserError: if `resume` holds no checkpoint, or `out` is a file or holds a run.
        """
        named = bool(out or resume)
        if resume not in (None, "auto"):
            folder = Path(resume or "")
            if not checkpoints(folder):
                raise UserError(f"--resume {resume} holds no checkpoint. Pass the directory of a run, or 'auto'.")
            return cls(folder, named, resuming=True)
        if not out:
            taken, latest = 0, Path()
            while (folder := Path(f"runs/{name}{f'-{taken + 1}' if taken else ''}")).exists():
                latest, taken = folder, taken + 1
            return cls(latest if resume and taken else folder, named, resuming=bool(resume))
        folder = Path(out)
        if folder.is_file():
            raise UserError(f"--out {folder} is a file. Choose a folder.")
        if not resume and (folder / "metrics.jsonl").exists():
            raise UserError(
                f"--out {folder} already holds a run. To continue it with its own options, pass "
                f"{resume_flags(folder)}. Otherwise choose another folder."
            )
        return cls(folder, named, resuming=bool(resume))

    def saved_options(self) -> dict[str, Any]:
        """Return the options of the run that is continued, as its config.yaml has them; empty for a new run."""
        return read_options(self.path) if self.resuming and (self.path / "config.yaml").exists() else {}

    def write_config(self, config: dict[str, Any], names: str = "") -> None:
        """Create the directory and write config.yaml: every option with its resolved value.

        Args:
            names: hash of the names of the images. If a checkpoint has one too, they are compared instead of --data:
                the same images may lie elsewhere, or be named otherwise.

        Raises:
            UserError: if a resumed run has other options or images than before, or another run has just created the
                directory.
        """
        config = json.loads(json.dumps(config | {"out": str(self.path), "resume": None}))
        before, trained_on = self.saved_options(), self._saved_names()
        if names and trained_on and names != trained_on:
            raise UserError(
                f"--data {config.get('data')} holds other images than those that {self.path} was trained on (by their "
                "number and names). Pass the same images, or start a new run with another --out."
            )
        same_place = os.path.realpath(str(before.get("data"))) == os.path.realpath(str(config.get("data")))
        may_change = MAY_CHANGE | ({"data"} if trained_on is None or (names and trained_on) or same_place else set())
        changed = [k for k in config if k in before and before[k] != config[k] and k not in may_change]
        if changed:
            listed = some(f"{k}: {before[k]} there, {config[k]} here" for k in changed)
            raise UserError(
                f"{self.path} has other options than this run ({listed}). Pass {resume_flags(self.path)} alone to "
                "continue it, or another --out."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=self.may_exist)
        except FileExistsError as error:
            raise UserError(f"Another run has just created {self.path}. Start again.") from error
        with replacing_file(self.path / "config.yaml") as file:
            file.write_text(yaml.safe_dump(config, sort_keys=False))

    def _saved_names(self) -> str | None:
        """Return the hash of the names of the images in the last checkpoint; None if there is no checkpoint."""
        found = checkpoints(self.path) if self.resuming else []
        for folder in reversed(found):
            with suppress(OSError, UserError):
                return str(read_json(folder / STATE).get("names") or "")
        return "" if found else None

    def replay(self, step: int) -> Path:
        """Return the folder of a skipped step, for `mimkit replay`."""
        return self.path / "replay" / f"step-{step:08d}"

    def log(self, step: int, **values: float) -> None:
        """Append a line to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def metrics(self) -> list[dict[str, float]]:
        """Return the lines of metrics.jsonl."""
        return read_metrics(self.path)

    def truncate(self, step: int) -> None:
        """Remove the lines of metrics.jsonl that were logged after `step`."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        with replacing_file(self.path / "metrics.jsonl") as file:
            file.write_text("".join(json.dumps(line) + "\n" for line in kept))
