"""Runs of recipes under each engine of recipes/accelerate: they are the run of one process.

One test of two data-parallel processes is in the default tier, in test_distributed.py.
"""

import json
import pickle
import shutil
from pathlib import Path

import engine_probe
import pytest
import timm
import torch
from conftest import launched, launching, losses, write_images
from mimkit.recipes import mae_hivit
from safetensors.torch import load_file
from short_runs import SVIT, TINY, run

from mimkit.training.run import Run

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]
PROBE = Path(engine_probe.__file__)
CLOSE = 1e-4
# accelerate's name, the stage of ZeRO, and each process's fraction of the weights and of what is optimized
FACTS = {"ddp": ("MULTI_CPU", 0, 1, 1), "zero2": ("DEEPSPEED", 2, 1, 0.5), "zero3": ("DEEPSPEED", 3, 0.5, 0.5)}


def probed(engine, recipe, out, *argv):
    """Run a recipe under an engine, which must be the requested one and must share what it is meant to.

    -> its losses, and how much each process has compiled
    """
    launched(engine, PROBE, out, recipe, *argv, "--out", out)
    facts = [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(2)]
    name, stage, weights, optimized = FACTS[engine]
    for fact in facts:
        assert (fact["engine"], fact["stage"]) == (name, stage)
        for fraction, found in ((weights, fact["weights"]), (optimized, fact["optimized"])):
            assert found == (1 if fraction == 1 else pytest.approx(fraction, abs=0.01))
    return losses(out), [fact["compiled"] for fact in facts]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


def spoiled_ddp(recipe, out, *argv):
    """A run of two data-parallel processes, one step of which is bad. -> its folder"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPOILED", "2")
        probed("ddp", recipe, out, *argv)
    return out


@pytest.fixture(scope="module")
def ddp(data, tmp_path_factory):
    return spoiled_ddp("mae_hivit", tmp_path_factory.mktemp("ddp") / "run", *TINY, "--data", data)


def test_data_parallel_is_the_same_run(ddp, data, tmp_path, monkeypatch):
    """Also if a step is skipped, from before the first checkpoint."""
    prepare = Run.prepare

    def spoiled(run, model, optimizer, *args, **extra):
        engine_probe.spoil_gradient(run, model, 2)
        return prepare(run, model, optimizer, *args, **extra)

    monkeypatch.setattr(Run, "prepare", spoiled)
    run(mae_hivit, *TINY, "--data", data, "--out", tmp_path / "alone")
    assert losses(ddp) == pytest.approx(losses(tmp_path / "alone"), abs=CLOSE)
    assert (ddp / "replay" / "step-00000002" / "weights").is_dir()
    assert {f.name for f in (ddp / "replay" / "step-00000002").iterdir()} >= {"rank-0", "rank-1"}


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_zero_is_the_same_run(engine, ddp, data, tmp_path, monkeypatch):
    """Also if a step is skipped, from before the first checkpoint, and if the run is resumed."""
    recipe, tiny = ("mae_hivit", TINY) if engine == "zero2" else ("mae", SVIT)
    if engine == "zero3":  # each process has the batch statistics of its own images
        ddp = spoiled_ddp(recipe, tmp_path / "ddp", *tiny, "--data", data)
    expected = losses(ddp)
    monkeypatch.setenv("SPOILED", "2")
    out, before = tmp_path / "zero", None
    for resume in ([], ["--resume", "auto"]):
        curve, _ = probed(engine, recipe, out, *tiny, "--data", data, *resume)
        assert curve == pytest.approx(expected, abs=CLOSE)
        assert (out / "replay" / "step-00000002" / "weights").is_dir()
        encoder = timm.create_model(f"local-dir:{out}/encoder", pretrained=True).state_dict()
        assert before is None or all(torch.allclose(encoder[name], before[name], atol=1e-6) for name in encoder)
        before = encoder
        # an engine's file that was swapped is never read: the run continues from the checkpoint before
        swapped = next((out / "checkpoints" / "step-00000016").glob("pytorch_model/*optim_states.pt"))
        swapped.write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    assert not (tmp_path / "canary").exists()
    assert (out / "checkpoints" / "corrupt-step-00000016").exists()
    pickle.loads(swapped.read_bytes())  # it would have
    assert (tmp_path / "canary").exists()


class Canary:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_engines_go_with_the_options(engine, data, tmp_path):
    options = ["--precision", "bf16", "--grad-accum-steps", "2", "--grad-checkpointing", "true", "--compile", "true"]
    tiny = [*TINY, "--data", data, "--epochs", "2", "--save-every", "1"]
    curve, compiled = probed(engine, "mae_hivit", tmp_path / "mixed", *tiny, *options)
    assert all(1 <= number <= 20 for number in compiled), compiled  # not anew at each step
    run(mae_hivit, *tiny, "--out", tmp_path / "alone")
    exact = losses(tmp_path / "alone")
    assert curve == pytest.approx(exact, abs=0.03)
    assert curve != pytest.approx(exact, abs=1e-6)  # it did compute in bf16
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "mixed" / "encoder" / "model.safetensors").values()}
    assert dtypes == {torch.float32}


def test_another_engine_than_the_requested_one_is_refused(data, tmp_path):
    """accelerate trains data-parallel on CPUs if it is asked for FSDP, and says nothing."""
    job = launching("fsdp2", "mae_hivit", *TINY, "--data", data, "--out", tmp_path / "run")
    printed = job.communicate()[1]
    assert job.returncode
    assert "asked for FSDP, but data-parallel is running. FSDP needs GPUs" in printed
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_engine_is_refused(ddp, data, tmp_path):
    shutil.copytree(ddp, tmp_path / "run")
    job = launching("zero2", "mae_hivit", *TINY, "--data", data, "--out", tmp_path / "run", "--resume", "auto")
    printed = job.communicate()[1]
    assert "was written by data-parallel, 2 processes, but this is ZeRO-2, 2 processes" in printed
