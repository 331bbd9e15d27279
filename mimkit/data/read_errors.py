"""Say why a data set cannot be read, and what to do about it."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mimkit.errors import BROKEN_STORAGE, PERMISSION, WRONG_PATH, UserError, is_full

WRAPPER = "An error occurred while generating the dataset"  # what `datasets` says whatever the cause is
SAME_COLUMNS = "give all files the same columns, of the same types"
LONGEST = 100  # characters of a cause


@contextmanager
def reading(data: str, files: Sequence[str] = ()) -> Iterator[None]:
    """Turn an error inside a `with` block, while `files` of the set `data` are read, into a `UserError`."""
    try:
        yield
    except Exception as error:  # pyarrow, tarfile and the system raise many kinds
        reason, hint = cause_of(error)
        if not hint:
            hint = "check that its files are complete"
            if damaged := next(filter(_is_damaged, files), None):
                hint = f"get another copy of {damaged}"
        raise UserError(f"--data {data} cannot be read ({reason}): {hint}.") from error


def cause_of(error: BaseException) -> tuple[str, str]:
    """Return the cause of an error of `datasets`, and what to do about it, which is empty if the cause is unknown.

    Raises:
        UserError: the cause is one.
    """
    from datasets.table import CastError

    chain = list(_chain(error))
    for cause in chain:
        if isinstance(cause, UserError):
            raise cause
        if isinstance(cause, OSError) and (hint := _hint(cause)):
            return ": ".join(filter(None, (cause.strerror or str(cause), _text(cause.filename)))), hint
        if isinstance(cause, CastError):
            return f"in one of its files, {cause.details()}"[:LONGEST].rstrip(" ."), SAME_COLUMNS
    lines = (line for cause in chain for line in str(cause).splitlines())
    reason = next((line for line in lines if line.strip() and line != WRAPPER), type(chain[-1]).__name__)
    reason = reason.split(". ")[0][:LONGEST].rstrip(" .,:")
    return reason, SAME_COLUMNS if reason.startswith("Couldn't cast") else ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, and the errors that it was raised from or while handling."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _hint(error: OSError) -> str:
    """Return what to do about an error of the system: about the cache, or about the files of the set."""
    if is_full(error):
        return "free some space, or set HF_HOME to a folder on another disk, where the cache goes"
    if error.errno in BROKEN_STORAGE:
        return "check that the disk or the network works"
    if error.errno not in (*PERMISSION, *WRONG_PATH):
        return ""
    if error.filename and _is_cache(os.path.abspath(_text(error.filename))):
        return "set HF_HOME to a folder that can be written, where the cache goes"
    return "check the path" if error.errno == errno.ENOENT else "change its permissions"


def _is_cache(path: str) -> bool:
    """Return whether a path lies in the cache of `datasets` or the hub, or leads to it."""
    import datasets

    caches = (str(cache) for cache in (datasets.config.HF_DATASETS_CACHE, datasets.config.HF_CACHE_HOME))
    return any(os.path.commonpath((path, cache)) in (path, cache) for cache in map(os.path.abspath, caches))


def _text(filename: object) -> str:
    return os.fsdecode(filename) if isinstance(filename, str | bytes) else ""


def _is_damaged(file: str) -> bool:
    """Return whether the end of a parquet file is not that of one. For other files, return False."""
    from pyarrow import parquet

    if not file.endswith(".parquet"):
        return False
    try:
        parquet.read_metadata(file)
    except Exception:  # pyarrow and the system raise many kinds
        return True
    return False
