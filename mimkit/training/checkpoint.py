"""Checkpoints of a run: written beside and renamed, checked by hash before they are read."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mimkit.errors import UserError
from mimkit.files import read_json, replacing
from mimkit.io.weights import State

MANIFEST, OWN = "manifest.json", "state.json"


def checkpoints(run: Path) -> list[Path]:
    """Of a run, the last one last."""
    found = (run / "checkpoints").glob("step-*")
    return sorted(folder for folder in found if folder.name.removeprefix("step-").isdecimal())


def step_of(folder: Path) -> int:
    """How many steps were done."""
    return int(folder.name.removeprefix("step-"))


def digest(file: Path) -> str:
    """SHA-256 of what is on the disk, in hex"""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write(folder: Path, states: dict[str, State], own: dict[str, Any]) -> None:
    """NAME.safetensors for each state, `own` as state.json, and what each file's hash is; all of it or nothing.

    Args:
        own: with `stays`, whether `trim` never removes it.
    """
    with replacing(folder) as temporary:
        seal(temporary, states, own)


def seal(folder: Path, states: dict[str, State], own: dict[str, Any]) -> None:
    """The same into a folder that is there, where engines may have left files of their own."""
    for name, state in states.items():
        save_file(state, folder / f"{name}.safetensors")
    (folder / "state.json").write_text(json.dumps(own, indent=1))
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    hashes = {file.relative_to(folder).as_posix(): digest(file) for file in files}
    (folder / MANIFEST).write_text(json.dumps(hashes, indent=1))
    digest(folder / MANIFEST)  # which is on the disk then, as the others are


def verify_checkpoint(folder: Path) -> str:
    """What a checkpoint suffers from; empty where every file is what was written, and none that is read was added."""
    try:
        hashes = dict(json.loads((folder / MANIFEST).read_text()))
        there = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
        read = {name for name in there if name != MANIFEST and not Path(name).name.startswith(".")}  # an engine's too
        # a name that is not among the files, such as ../x, is not looked at
        changed = [
            name
            for name in sorted(hashes.keys() | read)
            if name not in there or name not in hashes or digest(there[name]) != hashes[name]
        ]
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return str(error)
    return f"{', '.join(changed)}: not what was written" if changed else ""


def read(folder: Path) -> tuple[dict[str, State], dict[str, Any]]:
    """What `write` was given; in memory, as a mapped file could not be removed everywhere."""
    files = folder.glob("*.safetensors")
    try:
        states = {file.stem: {name: tensor.clone() for name, tensor in load_file(file).items()} for file in files}
    except SafetensorError as error:  # its hash was rewritten too
        raise UserError(f"{folder} cannot be read ({error}): start anew with another --out.") from error
    return states, read_json(folder / OWN)


def sweep(run: Path) -> None:
    """Remove what a process that was killed had begun to write: there is one writer."""
    for left in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


def trim(run: Path, done: int, keep: int) -> None:
    """Remove checkpoints up to step `done`, but so many of the last ones, and those that stay or cannot be read."""
    for old in [folder for folder in checkpoints(run) if step_of(folder) <= done][:-keep]:
        try:
            stays = read_json(old / OWN).get("stays")
        except (OSError, UserError):
            continue
        if not stays:
            shutil.rmtree(old, ignore_errors=True)
