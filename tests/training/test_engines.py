import json
import pickle
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import ROOT, launched, launching, losses
from mimkit.recipes import mae_hivit
from safetensors.torch import load_file

ENGINES = {file.stem: file for file in sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))}
TINY = ["--epochs", "4", "--batch-size", "8", "--decoder-dim", "24", "--workers", "0", "--save-every", "2"]
CLOSE = 1e-4
# accelerate's name, the stage of ZeRO, and each process's share of the weights and of what is optimized
FACTS = {"ddp": ("MULTI_CPU", 0, 1, 1), "zero2": ("DEEPSPEED", 2, 1, 0.5), "zero3": ("DEEPSPEED", 3, 0.5, 0.5)}


def probed(engine, recipe, out, *argv):
    """A recipe under an engine, which is the one that was asked for and shares what it should
    -> its losses, and how much each process has compiled"""
    launched(engine, ROOT / "tests" / "training" / "engine_probe.py", out, recipe, "--out", out, *TINY, *argv)
    facts = [json.loads(Path(f"{out}-{rank}.json").read_text()) for rank in range(2)]
    name, stage, weights, optimized = FACTS[engine]
    for fact in facts:
        assert (fact["engine"], fact["stage"]) == (name, stage)
        for share, found in ((weights, fact["weights"]), (optimized, fact["optimized"])):
            assert found == (1 if share == 1 else pytest.approx(share, abs=0.01))
    return losses(out), [fact["compiled"] for fact in facts]


def test_each_engine_is_a_file():
    assert set(ENGINES) == {"cpu", "ddp", "fsdp2", "zero2", "zero3"}
    for file in ENGINES.values():
        assert "mixed_precision" not in yaml.safe_load(file.read_text())  # Run's


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "recipe"), [("zero2", "mae_hivit"), ("zero3", "mae_svit")])
def test_zero_is_the_same_run(engine, recipe, images, tmp_path, monkeypatch):
    """So it is when a step has to be passed by, from before the first checkpoint."""
    monkeypatch.setenv("SPOILED", "2")
    expected, _ = probed("ddp", recipe, tmp_path / "ddp", "--data", images)
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
    mae_hivit.main([str(word) for word in ("--data", images, "--out", tmp_path / "alone", *TINY)])
    exact = losses(tmp_path / "alone")
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
    argv = ["--data", images, "--out", tmp_path / "run", *TINY]
    launched(2, "mae_hivit", *argv)
    job = launching("zero2", "mae_hivit", *argv, "--resume", "auto", "--epochs", "4")
    assert "was written by data-parallel, 2 processes, and this is ZeRO-2, 2 processes" in job.communicate()[1]
