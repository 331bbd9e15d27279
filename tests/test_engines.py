import json
import pickle
from importlib import import_module
from pathlib import Path

import engine_probe
import pytest
import timm
import torch
import yaml
from conftest import ROOT, launched, launching, losses
from safetensors.torch import load_file

from mimkit.training import Run

ENGINES = {file.stem: file for file in sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))}
TINY = ["--epochs", "4", "--batch-size", "8", "--decoder-dim", "24", "--workers", "0", "--save-every", "2"]
CLOSE = 1e-4
# accelerate's name, the stage of ZeRO, and each process's share of the weights and of what is optimised
FACTS = {"ddp": ("MULTI_CPU", 0, 1, 1), "zero2": ("DEEPSPEED", 2, 1, 0.5), "zero3": ("DEEPSPEED", 3, 0.5, 0.5)}


def probed(engine, recipe, out, *argv):
    """A recipe under an engine, which is the one that was asked for and shares what it should
    -> its losses, and how much each process has compiled"""
    launched(engine, ROOT / "tests" / "engine_probe.py", out, recipe, "--out", out, *TINY, *argv)
    found = [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(2)]
    name, stage, weights, optimised = FACTS[engine]
    for fact in found:
        assert (fact["engine"], fact["stage"]) == (name, stage)
        assert fact["weights"] == pytest.approx(weights, abs=0.01)
        assert fact["optimised"] == pytest.approx(optimised, abs=0.01)
    return losses(out), [fact["compiled"] for fact in found]


def alone(recipe, out, *argv):
    """The losses of one process, this one."""
    import_module(f"mimkit.recipes.{recipe}").main([str(word) for word in ("--out", out, *TINY, *argv)])
    return losses(out)


def test_each_engine_is_a_file():
    assert set(ENGINES) == {"cpu", "ddp", "fsdp2", "zero2", "zero3"}
    for file in ENGINES.values():
        assert "mixed_precision" not in yaml.safe_load(file.read_text())  # Run's


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "recipe"), [("zero2", "mae_hivit"), ("zero3", "mae_svit")])
def test_zero_is_the_same_run(engine, recipe, images, tmp_path, monkeypatch):
    """So it is when a step has to be passed by, from before the first checkpoint."""
    monkeypatch.setenv("SPOILED", "2")
    monkeypatch.setattr(Run, "prepare", engine_probe.spoiling)
    # in parts as large as a process's, which SViT normalises over
    expected = alone(recipe, tmp_path / "alone", "--data", images, "--grad-accum-steps", "2")
    out, before = tmp_path / "zero", None
    for again in (False, True):
        curve, _ = probed(engine, recipe, out, "--data", images, *(["--resume", "auto"] if again else []))
        assert curve == pytest.approx(expected, abs=CLOSE)
        assert (out / "replay" / "step-00000002" / "weights").is_dir()
        encoder = timm.create_model(f"local-dir:{out}/encoder", pretrained=True).state_dict()
        assert before is None or all(torch.allclose(encoder[name], before[name], atol=1e-6) for name in encoder)
        before = encoder
        # an engine's file that was swapped is never read: the run goes on from the checkpoint before
        swapped = next((out / "checkpoints" / "step-00000016").glob("pytorch_model/*optim_states.pt"))
        swapped.write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    assert not (tmp_path / "canary").exists()
    assert (out / "checkpoints" / "torn-step-00000016").exists()
    pickle.loads(swapped.read_bytes())  # it would have
    assert (tmp_path / "canary").exists()


class Canary:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_what_engines_go_with(engine, images, tmp_path):
    options = ["--precision", "bf16", "--grad-accum-steps", "2", "--grad-checkpointing", "true", "--compile", "true"]
    curve, compiled = probed(engine, "mae_hivit", tmp_path / "mixed", "--data", images, *options)
    assert all(1 <= number <= 20 for number in compiled), compiled  # not anew at each step
    exact = alone("mae_hivit", tmp_path / "alone", "--data", images)
    assert curve == pytest.approx(exact, abs=0.03)
    assert curve != pytest.approx(exact, abs=1e-6)  # it did compute in bf16
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "mixed" / "encoder" / "model.safetensors").values()}
    assert dtypes == {torch.float32}


@pytest.mark.slow
def test_another_engine_than_that_asked_for(images, tmp_path):
    """accelerate trains data-parallel on CPUs where it is asked for FSDP, and says nothing."""
    argv = ["--data", images, "--out", tmp_path / "run", *TINY]
    job = launching("fsdp2", "mae_hivit", *argv)
    said = job.communicate()[1]
    assert job.returncode
    assert "asked for FSDP, and data-parallel is running: FSDP needs GPUs" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_checkpoint_of_another_engine(images, tmp_path):
    alone("mae_hivit", tmp_path / "run", "--data", images)
    job = launching("zero2", "mae_hivit", "--data", images, "--out", tmp_path / "run", *TINY, "--resume", "auto")
    assert "was written by one process, and this is ZeRO-2, 2 processes" in job.communicate()[1]
