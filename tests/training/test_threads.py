"""CPU threads: the user's choice is kept, a launcher's is not, and threads wait without spinning."""

import ast
import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT

from mimkit.doctor import preflight
from mimkit.training import threads
from mimkit.training.distributed import Engine

GIVEN = {"ACCELERATE_MIXED_PRECISION": "no"}


def process(environment, parent=None, words=()):
    """A process as psutil shows it."""
    return SimpleNamespace(environ=lambda: environment, parent=lambda: parent, cmdline=lambda: list(words))


def launched_by(monkeypatch, *chain, threads_variable="1"):
    """Pretend that this process and its ancestors are these, the nearest first."""
    found = None
    for environment, words in reversed(chain):
        found = process(environment, found, words)
    monkeypatch.setattr(psutil, "Process", lambda: found)
    monkeypatch.setenv("OMP_NUM_THREADS", threads_variable)


@pytest.mark.parametrize(
    ("chain", "limited"),
    [
        ([({}, [])], False),  # a person started it
        ([(GIVEN, []), ({}, ["accelerate", "launch"])], True),
        ([(GIVEN, []), ({"OMP_NUM_THREADS": "1"}, ["accelerate", "launch"])], False),
        ([(GIVEN, []), ({}, ["accelerate", "launch", "--num_cpu_threads_per_process", "1"])], False),
        ([(GIVEN, []), ({}, ["accelerate", "launch", "--num-cpu-threads-per-process=1"])], False),
        ([(GIVEN, []), (GIVEN | {"OMP_NUM_THREADS": "1"}, ["deepspeed"]), ({}, ["accelerate"])], True),
        ([({"TORCHELASTIC_RUN_ID": "none"}, []), ({}, ["torchrun"])], True),
        ([(GIVEN, [])], False),  # the launcher has ended
    ],
)
def test_the_choice_of_a_launcher_is_told_from_that_of_the_user(chain, limited, monkeypatch):
    launched_by(monkeypatch, *chain)
    assert threads.limited_by_launcher() is limited


def test_processes_that_a_launcher_limits_share_the_cores(monkeypatch):
    launched_by(monkeypatch, (GIVEN, []), ({}, ["accelerate"]))
    torch.set_num_threads(1)
    for local_processes, expected in ((1, 6), (2, 3), (4, 1), (16, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_processes))
        threads.set_threads(None, 6)
        assert torch.get_num_threads() == expected
    launched_by(monkeypatch, (GIVEN, []), ({}, ["accelerate"]), threads_variable="2")  # accelerate counted the cores
    threads.set_threads(None, 6)
    assert torch.get_num_threads() == 1


def test_a_launcher_that_cannot_be_looked_at_is_left_alone(monkeypatch):
    denied = process(GIVEN, SimpleNamespace(environ=lambda: (_ for _ in ()).throw(psutil.AccessDenied())))
    monkeypatch.setattr(psutil, "Process", lambda: denied)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert not threads.limited_by_launcher()


def test_a_run_keeps_one_thread_and_takes_the_option(monkeypatch):
    """OMP_NUM_THREADS=1 was overridden by all cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    Engine()
    assert torch.get_num_threads() == 1
    Engine(threads=2)
    assert torch.get_num_threads() == 2


def test_threads_wait_without_spinning_unless_the_user_says_otherwise():
    names = ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"]
    clean = {name: value for name, value in os.environ.items() if name not in (*names, "KMP_BLOCKTIME")}
    code = f"import os, sys, mimkit.errors; print('torch' in sys.modules, *map(os.getenv, {names}))"
    stub = "import sys, types; sys.modules['mimkit.models'] = types.ModuleType('mimkit.models'); "
    for given, expected in (({}, "PASSIVE 0"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None")):
        done = subprocess.run([sys.executable, "-c", stub + code], env=clean | given, capture_output=True, text=True)
        assert done.stdout == f"False {expected}\n", done.stderr


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.py")), ids=lambda file: file.stem)
def test_recipes_import_mimkit_before_torch(file):
    """OpenMP reads how to wait when torch is imported."""
    body = ast.parse(file.read_text()).body
    imports = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in body
               if isinstance(node, ast.Import | ast.ImportFrom)]  # fmt: skip
    first = [name.split(".")[0] for name in imports if name.split(".")[0] not in sys.stdlib_module_names]
    assert first[:1] in ([], ["mimkit"])


def test_preflight_says_when_the_machine_is_loaded(monkeypatch):
    monkeypatch.setattr(preflight, "MAX_LOAD", 0.25)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2}, raising=False)
    for busy, said in (([100.0, 5.0, 5.0], None), ([0.0, 90.0, 30.0], "other processes use 1.2 of 2 CPU cores")):
        monkeypatch.setattr(psutil, "cpu_percent", lambda _, percpu, busy=busy: busy)
        preflight.check_load(findings := preflight.Findings())
        assert findings.lines.get("machine", "").startswith(said or "")
        assert bool(findings.lines) is bool(said)


@pytest.mark.distributed
@pytest.mark.parametrize(("processes", "given", "expected"), [(1, {}, 4), (2, {}, 2), (1, {"OMP_NUM_THREADS": "1"}, 1)])
def test_real_launchers(processes, given, expected, tmp_path):
    """Each process of accelerate launch gets its share of four cores, unless the user chose one thread."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, runpy, torch\n"
        f"runpy.run_path({str(ROOT / 'mimkit/training/threads.py')!r})['set_threads'](None, 4)\n"
        "os.write(1, f'threads {torch.get_num_threads()} {os.environ[\"OMP_NUM_THREADS\"]}\\n'.encode())\n"  # at once
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | given
    several = ["--config_file", ROOT / "recipes/accelerate/ddp.yaml"] if processes > 1 else []
    words = ["-m", "accelerate.commands.launch", *several, "--num_processes", processes, "--main_process_port", "0"]
    command = list(map(str, [sys.executable, *words, script]))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout.count(f"threads {expected} 1\n") == processes, done.stderr[-1000:]
