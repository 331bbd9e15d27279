"""What a user did, said in one sentence instead of a traceback."""

import errno
import functools
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import yaml
from safetensors import SafetensorError

REQUEUE = 75  # sysexits.h: a temporary failure, try again
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]  # sent before a kill
WORKER = "A data worker is stuck or dead ({}): check memory and the disk of --data, then go on with --resume auto."
PEER = "Another process of this run ended or cannot be reached ({}): see what it said, then go on with --resume auto."
MEMORY = "Out of memory ({}): choose a smaller --batch-size, more --grad-accum-steps, or --grad-checkpointing true."
TORCHS = {  # errors that torch raises in whatever line a process has come to, by a part of their first line
    "DataLoader worker (pid": WORKER,
    "Pin memory thread exited": WORKER,  # it was waiting for such a worker
    "gloo/": PEER,
    "NCCL": PEER,
    "out of memory": MEMORY,
    "can't allocate memory": MEMORY,
}
P = ParamSpec("P")
R = TypeVar("R")


class UserError(ValueError):
    """Something the user gave does not fit. The message names the value, what was expected, and what to do."""


class StoppedError(BaseException):
    """A scheduler told a run to end, and it did so in good order; it can be resumed. Exit code `REQUEUE`.

    No `Exception`: a signal comes anywhere, and nothing on its way may take it for a bad image or file.
    """


def is_full(error: Exception) -> bool:
    """Whether a disk or a quota is; safetensors says the number of the system's error in words alone, torch none."""
    number = getattr(error, "errno", None) or next(iter(re.findall(r"os error (\d+)", str(error))), 0)
    return int(number) in (errno.ENOSPC, errno.EDQUOT) or "inline_container" in str(error)


def stop(number: int, *_: Any) -> None:
    """What a signal to stop does outside of training, which has a checkpoint to write first."""
    name = signal.Signals(number).name
    raise StoppedError(f"Stopped by {name} outside of training steps: start it as before, a run with --resume auto.")


@contextmanager
def signal_handlers(handlers: dict[Any, Any]) -> Iterator[None]:
    """Inside, these are what signals call."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def cli_entry(main: Callable[P, R]) -> Callable[P, R]:
    """Decorate an entry point: a wrong file, flag, shape or a full disk ends it with a sentence and exit code 2,
    a signal to stop with `REQUEUE`."""

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with signal_handlers(dict.fromkeys(STOP_SIGNALS, stop)):
                return main(*args, **kwargs)
        except UserError as error:
            message, code = str(error), 2
        except StoppedError as stopped:
            message, code = str(stopped), REQUEUE
        except KeyboardInterrupt as interrupt:
            message, code = str(interrupt) or "Interrupted.", 130
        except BrokenPipeError:
            message, code = "The reader of the output went away.", 141
        except OSError as error:
            if is_full(error):
                hint = "the disk is full: free some space, or choose another place"
            elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                hint = "it cannot be written or read: choose another place, or change its permissions"
            elif error.errno in (
                errno.ENOTDIR,
                errno.EISDIR,
                errno.EEXIST,
                errno.ENOENT,
                errno.ENAMETOOLONG,
                errno.EBUSY,
            ):
                hint = f"{error.strerror}: check the path"
            elif error.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT):
                hint = f"{error.strerror}: see whether the disk or the network is well, and start again"
            elif error.errno in (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM):
                hint = f"{error.strerror}: give fewer --workers, or raise the limit (ulimit -n, -u, -v)"
            else:
                raise
            message, code = f"{error.filename or 'writing'}: {hint}.", 2
        except (UnicodeError, yaml.YAMLError, json.JSONDecodeError, RecursionError) as error:
            message, code = f"A file or a name is not text, YAML or JSON as it should be ({error}): mend it.", 2
        except RuntimeError as error:
            reason = next(iter(str(error).splitlines()), "")
            advice = next((words for part, words in TORCHS.items() if part in reason), None)
            if advice is None:
                raise
            message, code = advice.format(reason), 2
        except SafetensorError as error:  # its own kind, also where the system's would do
            full = "writing a checkpoint: the disk is full: free some space, or choose another place."
            message, code = full if is_full(error) else f"Weights cannot be read ({error}): get another copy.", 2
        # names and reasons may have lines; in one piece, as several processes may say theirs at once
        sys.stderr.write(f"mimkit: {' '.join(message.split())}\n")
        sys.exit(code)

    return wrapped
