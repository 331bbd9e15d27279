"""Short runs of recipes, for the tests of several rooms."""

import time

import pytest
from accelerate.state import AcceleratorState, GradientState
from mimkit.recipes import mae_hivit

SHORT = ["--epochs", "4", "--batch-size", "8", "--workers", "0", "--save-every", "2"]
SMALL_DECODER = ["--decoder-dim", "24"]
TINY = [*SHORT, *SMALL_DECODER, "--model-args", "{embed_dim: 16, num_heads: 2}"]  # for mae_hivit.py
VIT = ["--config", "mae_vit_small", *SHORT, *SMALL_DECODER]  # these are for mae.py
VIT += ["--model-args", "{embed_dim: 32, depth: 2, num_heads: 2}"]
SVIT_SIZE = "{embed_dims: [8, 8, 16, 16], depths: [1, 1, 2, 1], num_heads: [1, 1, 2, 2]}"
SVIT = ["--config", "mae_svit_small", *SHORT, *SMALL_DECODER, "--model-args", SVIT_SIZE]
SIMMIM_SVIT = ["--config", "simmim_svit_small", *SHORT, "--model-args", SVIT_SIZE]  # for simmim.py


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
