"""Short runs of recipes, for the tests of several rooms."""

import time

import pytest
from accelerate.state import AcceleratorState, GradientState
from mimkit.recipes import mae_hivit

TINY = ["--epochs", "4", "--batch-size", "8", "--decoder-dim", "24", "--workers", "0", "--save-every", "2"]
TINY += ["--model-args", "{embed_dim: 16, num_heads: 2}"]  # of the preset's hivit_nano


def reset_accelerate():
    """Let another run start in this process: accelerate keeps its state in classes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(recipe, *argv):
    """Run a recipe as the first run of a process."""
    recipe.main([str(word) for word in argv])
    reset_accelerate()


def fails(capsys, *argv, recipe=mae_hivit, code=2):
    """Run a recipe that ends with one sentence and an exit code. -> the sentence"""
    with pytest.raises(SystemExit) as caught:
        recipe.main([str(word) for word in argv])
    assert caught.value.code == code
    reset_accelerate()
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.err.strip().splitlines()[-1]


def wait_for_loss(job, run):
    """Wait until a run that was launched has logged its first loss."""
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and "loss" in metrics.read_text()) and job.poll() is None:
        time.sleep(0.05)
