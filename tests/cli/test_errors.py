"""Errors end a command with one sentence and an exit code, and MIMKIT_DEBUG=1 shows the traceback behind it."""

import errno
import json
import os
import signal
import sys

import pytest
import torch
import yaml
from safetensors import SafetensorError

from mimkit.errors import LONGEST, REQUEUE, StoppedError, UserError, cli_entry, reason_of, shorten, some


def ending(capsys, error):
    """Raise an error inside an entry point, and return the exit code and stderr."""

    @cli_entry
    def main():
        if callable(error):
            error()
        raise error

    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, capsys.readouterr().err


def multiply_wrong_shapes():
    torch.ones(2, 3) @ torch.ones(2, 3)


KNOWN = {
    "user": (UserError("--seed x is no number: pass one."), 2, "--seed x is no number: pass one."),
    "a long path": (UserError(f"{'x/' * 2000}a.pth is no file: pass one."), 2, "x/a.pth is no file: pass one."),
    "a long list": (UserError(f"{'a, ' * 2000}are too many: pass fewer."), 2, "are too many: pass fewer."),
    "a long name": (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000), 2, "xxx: File name too long: check"),
    "long yaml": (yaml.YAMLError("tab " * 2000), 2, "correct it, or pass another one."),
    "line breaks": (UserError("a\nb\n\n c: pass d."), 2, "a b c: pass d."),
    "stopped": (StoppedError("Stopped by SIGTERM."), REQUEUE, "Stopped by SIGTERM."),
    "interrupt": (KeyboardInterrupt(), 130, "Interrupted."),
    "pipe": (BrokenPipeError(), 141, "has closed it"),
    "full": (OSError(errno.ENOSPC, "No space left on device", "x.png"), 2, "x.png: the disk is full"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, "the disk is full"),
    "permission": (PermissionError(errno.EACCES, "Permission denied", "x.png"), 2, "change its permissions"),
    "path": (NotADirectoryError(errno.ENOTDIR, "Not a directory", "x/y"), 2, "x/y: Not a directory: check the path"),
    "storage": (OSError(errno.EIO, "Input/output error", "x"), 2, "check that the disk or the network works"),
    "limit": (OSError(errno.EMFILE, "Too many open files"), 2, "use fewer --workers"),
    "yaml": (yaml.YAMLError("tab"), 2, "not valid text, YAML or JSON (tab)"),
    "json": (json.JSONDecodeError("comma", "{", 1), 2, "not valid text, YAML or JSON (comma"),
    "unicode": (UnicodeDecodeError("utf-8", b"\x80", 0, 1, "start byte"), 2, "not valid text, YAML or JSON"),
    "recursion": (RecursionError("too deep"), 2, "not valid text, YAML or JSON (too deep)"),
    "worker": (RuntimeError("DataLoader worker (pid 7) is killed"), 2, "A data worker is stuck or dead"),
    "peer": (RuntimeError("[gloo/transport] closed by peer\nat x.cc"), 2, "Another process of this run ended"),
    "memory": (RuntimeError("CUDA out of memory. Tried"), 2, "choose a smaller --batch-size"),
    "weights": (SafetensorError("header too large"), 2, "Weights cannot be read (header too large)"),
    "full weights": (SafetensorError("I/O error: full (os error 28)"), 2, "the disk is full"),
    "signal": (lambda: os.kill(os.getpid(), signal.SIGTERM), REQUEUE, "Stopped by SIGTERM outside of training steps"),
    "bug": (
        RuntimeError("shape '[3]' is invalid\nsecond line"),
        1,
        "Error: shape '[3]' is invalid. This is likely",
    ),
    "bug in torch": (multiply_wrong_shapes, 1, "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
    "bug without words": (RuntimeError(), 1, "RuntimeError. This is likely a bug"),
    "not implemented": (NotImplementedError("x" * 900), 1, "NotImplementedError: xxx"),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_an_error_is_one_sentence_with_an_exit_code(kind, capsys):
    error, code, words = KNOWN[kind]
    ended, said = ending(capsys, error)
    assert ended == code
    assert said.startswith("mimkit: ")
    assert words in said
    assert said.count("\n") == 1
    assert said.endswith(".\n")
    assert len(said) < 300
    assert "Traceback" not in said
    assert ("MIMKIT_DEBUG=1" in said and "report" in said) == (code == 1)


@pytest.mark.parametrize("kind", ["user", "worker", "bug in torch", "signal"])
def test_debug_mode_shows_the_traceback_before_the_sentence(kind, capsys, monkeypatch):
    monkeypatch.setenv("MIMKIT_DEBUG", "1")
    writes = []
    monkeypatch.setattr(sys.stderr, "write", writes.append)
    error, code, words = KNOWN[kind]
    assert ending(capsys, error)[0] == code
    assert len(writes) == 1  # several processes may write at once
    *trace, sentence = writes[0].splitlines()
    assert trace[0] == "Traceback (most recent call last):"
    assert any("test_errors.py" in line for line in trace)
    assert sentence.startswith("mimkit: ")
    assert words in sentence


def test_debug_mode_shows_the_cause_too(capsys, monkeypatch):
    monkeypatch.setenv("MIMKIT_DEBUG", "1")

    def fail():
        try:
            multiply_wrong_shapes()
        except RuntimeError as error:
            raise UserError("The file does not fit: pass another one.") from error

    _, said = ending(capsys, fail)
    assert "mat1 and mat2" in said
    assert said.endswith("mimkit: The file does not fit: pass another one.\n")


def test_other_errors_keep_their_traceback():
    for error in (TypeError("x"), OSError(errno.ENOTEMPTY, "x"), KeyError("x")):

        @cli_entry
        def main(error=error):
            raise error

        with pytest.raises(type(error)):
            main()


def test_some_names_and_a_count():
    assert some([]) == ""
    assert some("abc") == "a, b, c"
    assert some(range(1200)) == "0, 1, 2 and 1,197 more"
    assert some("abc", 2) == "a, b and 1 more"


def test_errors_are_shortened_where_they_are_long():
    short = "/a/path/that/is/not/short/" * 4 + " is wrong: pass another."
    assert shorten(short) == short
    for message in ("x" * 5000, "a b " * 2000, f"{'/long' * 99} is wrong: pass {'y' * 900}.", "x" * (LONGEST + 1)):
        said = shorten(message)
        assert len(said) <= LONGEST
        assert said[:20] == message[:20]
        assert said[-15:] == message.strip()[-15:]
        assert "..." in said


def test_the_reason_of_an_error_is_its_first_line_without_escape_codes():
    assert reason_of(ValueError()) == "ValueError"
    assert reason_of(RuntimeError("\n \x1b[1mbold\x1b[0m words\nmore")) == "bold words"
    assert reason_of(RuntimeError("Error(s) in loading:\n\tMissing a\nb")) == "Error(s) in loading: Missing a"
    assert reason_of(RuntimeError("Advice. WeightsUnpickler error: \n\nUnsupported operand 7\n\nSee")) == (
        "Unsupported operand 7"
    )
