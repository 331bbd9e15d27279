"""Atomic writes, JSON, and the files of a run that several rooms read."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mimkit.errors import UserError


def read_json(file: Path, **needed: type) -> dict[str, Any]:
    """An object of JSON with what is needed, of these types, or a sentence."""
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}): get another copy of it.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object: get another copy of it.")
    for name, kind in needed.items():
        if not isinstance(content.get(name), kind):
            raise UserError(f"{file} has no {name} that is {kind.__name__}: get another copy of it.")
    return content


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place at the end, or vanishes when anything fails."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}.mimkit-"
    for left in folder.parent.iterdir():
        process = left.name.removeprefix(prefix).split("-")[0]
        if left.name.startswith(prefix) and process.isdigit() and not _alive(int(process)):
            if (left / "old").is_dir() and not folder.exists():  # it was killed between the two renames
                (left / "old").rename(folder)
            shutil.rmtree(left, ignore_errors=True)
    prefix += f"{os.getpid()}-"
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
            folder.rename(old / "old")
            temporary.rename(folder)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replacing_file(file: str | Path) -> Iterator[Path]:
    """A temporary file beside `file`, with the same ending, that takes its place at the end, or vanishes."""
    file = Path(file)
    if file.exists() and not file.is_file():  # a device, or a folder, would be gone
        raise UserError(f"{file} is no file that can be replaced: choose another name.")
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{os.getpid()}-{file.name}")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def read_options(run: Path) -> dict[str, Any]:
    """What a run was started with, its config.yaml."""
    content = yaml.safe_load((run / "config.yaml").read_text())
    if not isinstance(content, dict):
        raise UserError(f"{run}/config.yaml holds no options: get another copy of it, or pass another run.")
    return content


def read_metrics(run: Path) -> list[dict[str, float]]:
    """What a run has logged, the lines of its metrics.jsonl; a killed run may leave half a line."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.startswith('{"step"') and line.endswith("}")]
