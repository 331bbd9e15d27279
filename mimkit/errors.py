"""User errors: reported as one sentence instead of a traceback, with an exit code.

With `MIMKIT_DEBUG=1` in the environment, the traceback is printed before the sentence.
"""

import difflib
import errno
import functools
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import yaml
from safetensors import SafetensorError

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure; the scheduler may start the job again
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]  # sent before a kill
RESUME = "resume with --config RUN/config.yaml --resume auto"
WORKER = "A data worker is stuck or dead ({}): check memory and the disk of --data, then " + RESUME + "."
PEER = "Another process of this run ended or cannot be reached ({}): read its message, then " + RESUME + "."
MEMORY = "Out of memory ({}): choose a smaller --batch-size, more --grad-accum-steps, or --grad-checkpointing true."
BUG = "{}. This is likely a bug: set MIMKIT_DEBUG=1 to see the traceback, and report it with that."
TORCH_ERRORS = {  # torch raises these as RuntimeError from any line; they are known by a part of their first line
    "DataLoader worker (pid": WORKER,
    "Pin memory thread exited": WORKER,  # the thread was waiting for a dead worker
    "gloo/": PEER,
    "NCCL": PEER,
    "out of memory": MEMORY,
    "can't allocate memory": MEMORY,
}
LONGEST = 290  # characters that an error has at most, which are about three lines of a terminal
PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
WRONG_PATH = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG, errno.EBUSY)
BROKEN_STORAGE = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
RESOURCE_LIMIT = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)
P = ParamSpec("P")
R = TypeVar("R")


class UserError(ValueError):
    """An error in what the user gave. The message names the value, what was expected, and what to do."""


class StoppedError(BaseException):
    """A scheduler stopped the run, which ended in good order and can be resumed. The exit code is `REQUEUE`.

    It is not an `Exception`: a signal can arrive anywhere, and a handler of bad images or files must not catch it.
    """


@functools.cache
def tell(sentence: str) -> None:
    """Print a sentence to stderr: once in a process, and in the main process of a distributed run only."""
    if os.environ.get("RANK", "0") == "0":
        text = sentence.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        print(f"mimkit: {' '.join(text.split())}", file=sys.stderr, flush=True)


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """Return a hint at the known names that resemble a misspelled one, or "" if none does."""
    known = {name.lower(): name for name in names}
    word = word.lower()
    longer = sorted((name for name in known if word and name.startswith(word)), key=len)
    near = [known[name] for name in (longer or difflib.get_close_matches(word, known, cutoff=0.7))[:3]]
    return f" Did you mean {', '.join(near[:-1])}{' or ' if near[1:] else ''}{near[-1]}?" if near else ""


def some(names: Iterable[Any], limit: int = 3) -> str:
    """Join the first names by commas, and count the others."""
    listed = list(map(str, names))
    others = f" and {len(listed) - limit:,} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + others


def shorten(message: str) -> str:
    """Put an error on one line of at most `LONGEST` characters.

    If it is longer, the middle is cut out of its longest words, which are paths and values that a user gave, and then
    out of the error itself.
    """

    def cut(text: str, width: int) -> str:
        return text if len(text) <= width else f"{text[: width // 2 - 2]}...{text[1 - width // 2 :]}"

    words = message.split()
    for width in (120, 80, 40):
        if len(" ".join(words)) > LONGEST:
            words = [cut(word, width) for word in words]
    return cut(" ".join(words), LONGEST)


def reason_of(error: BaseException) -> str:
    """Return the first line of what a library's error says, without a terminal's escape codes and torch's advice."""
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error)).rpartition("WeightsUnpickler error:")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:160]


def is_full(error: Exception) -> bool:
    """Return whether an error says that a disk or a quota is full.

    safetensors names the number of the system's error only in its text, and torch does not name it at all.
    """
    number = getattr(error, "errno", None) or next(iter(re.findall(r"os error (\d+)", str(error))), 0)
    return int(number) in (errno.ENOSPC, errno.EDQUOT) or "inline_container" in str(error)


def _stop(number: int, *_: Any) -> None:
    """Handle a stop signal outside of training steps, where there is no checkpoint to write first."""
    name = signal.Signals(number).name
    raise StoppedError(f"Stopped by {name} outside of training steps: start it again; {RESUME}.")


@contextmanager
def signal_handlers(handlers: dict[Any, Any]) -> Iterator[None]:
    """Install these signal handlers inside a `with` block, and restore the earlier ones after it."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _explain_os_error(error: OSError) -> str | None:
    """Say what to do about an error of the system, or return None if it is an unexpected one."""
    if is_full(error):
        hint = "the disk is full: free some space, or choose another place"
    elif error.errno in PERMISSION:
        hint = "it cannot be read or written: choose another place, or change its permissions"
    elif error.errno in WRONG_PATH:
        hint = f"{error.strerror}: check the path"
    elif error.errno in BROKEN_STORAGE:
        hint = f"{error.strerror}: check that the disk or the network works, and start again"
    elif error.errno in RESOURCE_LIMIT:
        hint = f"{error.strerror}: use fewer --workers, or raise the limit (ulimit -n, -u, -v)"
    else:
        return None
    return f"{error.filename or 'Writing a file'}: {hint}."


def explain(error: BaseException) -> tuple[str, int] | None:
    """Return the sentence and the exit code for an error, or None where only the traceback can explain it."""
    match error:
        case UserError():
            return str(error), 2
        case StoppedError():
            return str(error), REQUEUE
        case KeyboardInterrupt():
            return str(error) or "Interrupted.", 130
        case BrokenPipeError():
            return "The program that read the output has closed it.", 141
        case OSError():
            sentence = _explain_os_error(error)
            return (sentence, 2) if sentence else None
        case UnicodeError() | yaml.YAMLError() | json.JSONDecodeError() | RecursionError():
            return f"A file or a name is not valid text, YAML or JSON ({error}): correct it, or pass another one.", 2
        case RuntimeError():
            reason = next(iter(str(error).splitlines()), "")
            known = next((sentence for part, sentence in TORCH_ERRORS.items() if part in reason), None)
            if known is None:
                return BUG.format(f"{type(error).__name__}: {reason}"[:150].rstrip(" .:")), 1
            return known.format(reason), 2
        case SafetensorError():  # safetensors raises its own kind even for errors of the system
            if is_full(error):
                return "Writing weights: the disk is full: free some space, or choose another place.", 2
            return f"Weights cannot be read ({error}): get another copy of the file.", 2
    return None


def cli_entry(main: Callable[P, R]) -> Callable[P, R]:
    """Decorate an entry point so that errors end it with one sentence on stderr and an exit code.

    A wrong file, flag or shape and a full disk exit with code 2, a stop signal with `REQUEUE`, and an unexpected
    RuntimeError with code 1. Other unexpected errors keep their traceback.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with signal_handlers(dict.fromkeys(STOP_SIGNALS, _stop)):
                return main(*args, **kwargs)
        except (Exception, StoppedError, KeyboardInterrupt) as error:
            if (explained := explain(error)) is None:
                raise
            trace = traceback.format_exc() if os.environ.get("MIMKIT_DEBUG") == "1" else ""
        message, code = explained
        # Names and reasons may contain line breaks. Several processes may write at once, so this is a single write.
        sys.stderr.write(f"{trace}mimkit: {shorten(message)}\n")
        sys.exit(code)

    return wrapped
