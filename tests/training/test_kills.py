import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

SCRIPT = ROOT / "benchmarks" / "kills.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "options", "ran"),
    [
        ("cpu", [], r"one process, .* files of \S+ MB\n"),
        ("ddp", ["--streaming"], r"data-parallel, 2 processes, .* files of \S+ MB\n"),
        ("zero2", [], r"ZeRO-2, 2 processes, .* files of (\S+) MB and \1 MB\n"),
    ],
    ids=["cpu", "ddp, streaming", "zero2"],
)
def test_a_run_that_was_killed_ends_as_one_that_was_not(engine, options, ran):
    """The long form, with its figures, is benchmarks/kills.md."""
    words = [sys.executable, SCRIPT, "--kills", "3", "--engine", engine, "--epochs", "0.5", *options]
    job = subprocess.run(words, capture_output=True, text=True)
    assert job.returncode == 0, job.stdout + job.stderr
    assert re.search(ran, job.stdout), job.stdout
    assert job.stdout.endswith("all ends equal\n")
    assert job.stdout.count("in a save") >= 1


def test_ends_that_differ_are_seen(tmp_path, capsys):
    spec = spec_from_file_location("kills", SCRIPT)
    kills = module_from_spec(spec)
    spec.loader.exec_module(kills)
    for name, value in (("whole", 1.0), ("same", 1.0), ("near", 1.0 + 2**-23), ("far", 1.0 + 1e-5)):
        (tmp_path / name / "encoder").mkdir(parents=True)
        save_file({"weight": torch.tensor([value])}, tmp_path / name / "encoder" / "model.safetensors")
    found = {
        engine: [kills.compare(tmp_path / "whole", tmp_path / name, engine) for name in ("same", "near", "far")]
        for engine in ("cpu", "ddp", "zero2")
    }
    assert found == {"cpu": [0, 1, 1], "ddp": [0, 1, 1], "zero2": [0, 0, 1]}
