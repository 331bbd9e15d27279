"""Files: atomic writes, JSON, and the options and metrics of a run, which several rooms read."""

import json
import os
import secrets
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mimkit.errors import UserError


def read_json(file: Path, **needed: type) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        needed: keys that it must have, and the types of their values.

    Raises:
        UserError: if the file is not a JSON object with these keys.
    """
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}). Get another copy of it.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold a JSON object. Get another copy of it.")
    for name, kind in needed.items():
        if not isinstance(content.get(name), kind):
            raise UserError(f"{file} has no {name} of type {kind.__name__}. Get another copy of it.")
    return content


def _alive(process: int) -> bool:
    """Return whether a process exists."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _new_folder(parent: Path, prefix: str) -> Path:
    """Create a folder whose permissions the umask decides. Those of tempfile.mkdtemp are the owner's alone."""
    folder = parent / f"{prefix}{secrets.token_hex(4)}"
    folder.mkdir()
    return folder


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` at the end, or is removed if anything fails.

    The umask decides the permissions of the files in it, whoever writes them: safetensors' are the owner's alone.
    Temporary folders that killed processes left are removed.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}.mimkit-"
    for left in folder.parent.iterdir():
        process = left.name.removeprefix(prefix).split("-")[0]
        if left.name.startswith(prefix) and process.isdigit() and not _alive(int(process)):
            if (left / "old").is_dir() and not folder.exists():  # the process was killed between the two renames below
                (left / "old").rename(folder)
            shutil.rmtree(left, ignore_errors=True)
    prefix += f"{os.getpid()}-"
    temporary = _new_folder(folder.parent, prefix)
    try:
        yield temporary
        mode = temporary.stat().st_mode & 0o666
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(mode)
        if folder.exists():
            old = _new_folder(folder.parent, prefix)
            folder.rename(old / "old")
            temporary.rename(folder)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replacing_file(file: str | Path) -> Iterator[Path]:
    """Yield a temporary file of the same ending that replaces `file` at the end, or is removed if anything fails."""
    file = Path(file)
    if file.exists() and not file.is_file():  # replacing would remove a device or a folder
        raise UserError(f"{file} is not a regular file and cannot be replaced. Choose another name.")
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{os.getpid()}-{file.name}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def read_options(run: Path) -> dict[str, Any]:
    """Read the options of a run from its config.yaml."""
    content = yaml.safe_load((run / "config.yaml").read_text())
    if not isinstance(content, dict):
        raise UserError(f"{run}/config.yaml holds no options. Get another copy of it, or pass another run.")
    return content


def reading_flags(options: dict[str, Any], *columns: str) -> str:
    """Return the flags by which a command reads images as a run with these options did, with a leading space.

    Args:
        columns: options that name columns and that the command takes: image_column, label_column.
    """
    flags = "".join(f" --{key.replace('_', '-')} {shlex.quote(options[key])}" for key in columns if options.get(key))
    low, high = options.get("value_range") or (0, 1)
    return flags if (low, high) == (0, 1) else f"{flags} --value-range={low:g},{high:g}"


def resume_flags(run: Path) -> str:
    """Return the flags that continue a run with the options of its config.yaml, whatever flags it was started with."""
    return f"--config {shlex.quote(str(run / 'config.yaml'))} --resume auto"


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Read the lines of a run's metrics.jsonl. A killed run may leave an incomplete line, which is ignored."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.startswith('{"step"') and line.endswith("}")]
