"""Runs of recipes that meet bad steps, and data workers that are stuck or dead."""

import json
import multiprocessing
import os
import re
import signal
import time

import numpy as np
import pytest
import torch
from conftest import command, losses
from mimkit.recipes import finetune, mae_hivit
from safetensors.torch import load_file
from short_runs import TINY, fails, run

from mimkit.data import loader, sample
from mimkit.training import replay, skip_steps
from mimkit.training.feed import Feed
from mimkit.training.run import Run

TINY = [*TINY, "--epochs", "8", "--knn-every", "0"]


@pytest.fixture
def runs(monkeypatch):
    """The runs that are started."""
    started, init = [], Run.__init__

    def note(run, *args, **options):
        init(run, *args, **options)
        started.append(run)

    monkeypatch.setattr(Run, "__init__", note)
    return started


@pytest.fixture
def poisoned(runs, monkeypatch):
    """Images of these steps are not finite, whenever they are met. -> the steps, and every step that was started"""
    bad, made, micro_batches = set(), [], Feed.micro_batches

    def poison(feed):
        step = runs[-1].step
        made.append(step)
        for batch in micro_batches(feed):
            yield batch._replace(images=batch.images * float("nan")) if step in bad else batch

    monkeypatch.setattr(Feed, "micro_batches", poison)
    return bad, made


@pytest.mark.e2e
@pytest.mark.parametrize("step", [13, 19])  # the loss of the latter would be logged
def test_a_bad_step_is_skipped(step, images, tmp_path, capsys, monkeypatch, poisoned):
    bad, made = poisoned
    bad.add(step)
    out = tmp_path / "run"
    argv = ["--data", images, *TINY, "--save-every", "2.5"]  # of 4 steps: checkpoints at 10, 20, 30, 32
    run(mae_hivit, *argv, "--out", out)
    printed = capsys.readouterr().out
    assert f"step {step} is bad (its loss is not finite). Continuing without it from step 10" in printed
    assert made == [*range(20), *range(10, 32)]  # the losses are read before the checkpoint at 20
    weights = load_file(out / "encoder" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert np.isfinite(list(losses(out).values())).all()

    # it is the run in which that step's micro-batches were left out
    bad.clear()
    monkeypatch.setattr(skip_steps, "skipped_steps", lambda folder: {step: "told"})
    run(mae_hivit, *argv, "--out", tmp_path / "told")
    told = load_file(tmp_path / "told" / "encoder" / "model.safetensors")
    assert all(torch.equal(weights[name], told[name]) for name in weights)
    assert losses(out) == losses(tmp_path / "told")
    monkeypatch.undo()

    saved = out / "replay" / f"step-{step:08d}"
    names = json.loads((saved / "rank-0" / "names.json").read_text())["names"][0]
    assert len(names) == 8
    assert all(name.endswith(".png") for name in names)
    code, printed, _ = command(capsys, monkeypatch, "replay", saved)
    assert code == 0
    assert "loss nan of 8 images:" in printed
    assert names[0] in printed
    assert "first output that is not finite: the images themselves" in printed


@pytest.mark.e2e
def test_before_the_first_checkpoint_a_run_returns_to_its_start(images, tmp_path, capsys, poisoned):
    poisoned[0].add(2)
    out = tmp_path / "run"
    run(mae_hivit, "--data", images, *TINY, "--save-every", "100", "--out", out)
    printed = capsys.readouterr().out
    assert "step 2 is bad (its loss is not finite). Continuing without it from step 0" in printed
    assert poisoned[1] == [*range(20), *range(32)]
    values = json.loads((out / "checkpoints" / "step-00000032" / "state.json").read_text())
    assert values["skipped_steps"].keys() == {"2"}


@pytest.mark.e2e
def test_a_gradient_is_checked_where_the_loss_is_finite(images, tmp_path, capsys, monkeypatch, runs):
    backward, seen = torch.Tensor.backward, []

    def spoiled(loss, *args, **kwargs):
        backward(loss, *args, **kwargs)
        seen.extend([loss] if hasattr(runs[0], "state") else [])  # preflight has a copy
        if len(seen) == 7:
            runs[0].state.model.decoder.mask_token.grad.fill_(torch.inf)

    monkeypatch.setattr(torch.Tensor, "backward", spoiled)
    run(mae_hivit, "--data", images, *TINY, "--save-every", "100", "--out", tmp_path / "run")
    assert "step 6 is bad (its gradient is not finite)" in capsys.readouterr().out


@pytest.mark.e2e
def test_three_bad_steps_end_the_run(images, tmp_path, capsys, poisoned):
    poisoned[0].update((3, 11, 12))
    last = fails(capsys, "--data", images, *TINY, "--save-every", "2.5", "--out", tmp_path / "run")
    assert "3 bad steps within 1000 (step 3: its loss is not finite; step 11: " in last
    assert "in fp32. Look at one with mimkit replay" in last
    saved = {f.name: {x.name for x in f.iterdir()} for f in (tmp_path / "run" / "replay").iterdir()}
    whole = {"rank-0", "weights", "about.json"}
    assert saved == {"step-00000003": whole, "step-00000011": whole, "step-00000012": {"rank-0"}}
    (_, batch) = replay.load_batches(tmp_path / "run" / "replay" / "step-00000012")[0]
    assert len(batch.images) == len(batch.names) == 8


@pytest.mark.e2e
def test_a_spike_is_skipped_if_that_is_asked_for(images, tmp_path, capsys, monkeypatch):
    record = Run.record

    def spiked(run, **values):
        record(run, **{k: v * 50 if run.step == 25 else v for k, v in values.items()})

    monkeypatch.setattr(Run, "record", spiked)
    argv = ["--data", images, *TINY, "--save-every", "100"]
    run(mae_hivit, *argv, "--out", tmp_path / "plain")
    assert "is bad" not in capsys.readouterr().out
    run(mae_hivit, *argv, "--max-spike", "4", "--out", tmp_path / "run")
    assert "step 25 is bad (its loss is " in capsys.readouterr().out


@pytest.mark.e2e
def test_every_recipe_skips_bad_steps(images, tmp_path, capsys, poisoned):
    poisoned[0].add(5)
    argv = ["--data", images, "--epochs", "3", "--batch-size", "8", "--workers", "0", "--model-ema-decay", "0.9"]
    argv += ["--model", "hivit_nano", "--model-args", "{embed_dim: 16, num_heads: 2}", "--from-scratch"]
    run(finetune, *argv, "--img-size", "32", "--warmup-epochs", "0", "--out", tmp_path / "run")
    assert "step 5 is bad" in capsys.readouterr().out
    assert all(t.isfinite().all() for t in load_file(tmp_path / "run" / "last" / "model.safetensors").values())


@pytest.mark.e2e
@pytest.mark.parametrize("how", ["asleep", "stopped", "dead"])
def test_a_stuck_or_dead_worker_ends_the_run(how, images, tmp_path, capsys, monkeypatch):
    """A worker that is stopped cannot hand over the batch before either, which torch waits for without a limit."""
    monkeypatch.setattr(loader, "WAIT", 3)
    load = sample.SampleLoader.__call__
    ends = {"asleep": lambda: time.sleep(600), "dead": lambda: os._exit(9)}
    ends["stopped"] = lambda: os.kill(os.getpid(), signal.SIGSTOP)

    def wait(samples, row, epoch, index):
        if epoch == 1 and torch.utils.data.get_worker_info():
            ends[how]()
        return load(samples, row, epoch, index)

    monkeypatch.setattr(sample.SampleLoader, "__call__", wait)
    last = fails(capsys, "--data", images, *TINY, "--workers", "2", "--out", tmp_path / how)
    why = r"(DataLoader worker \(pid|it ended while)"  # whether it was caught while it handed a batch over
    assert re.search(rf"A data worker is stuck or dead \({why}", last)
    assert how == "dead" or not multiprocessing.active_children()  # which a process waits for when it ends


def test_there_is_nothing_to_replay(tmp_path, capsys, monkeypatch):
    code, _, said = command(capsys, monkeypatch, "replay", tmp_path)
    assert code == 2
    assert "is not a step to replay. Pass RUN/replay/step-N" in said
    for content in ("{}", "[]", "x", '{"recipe": "mae_hivit"}', '{"recipe": 1, "step": 1, "reason": "x"}'):
        (tmp_path / "about.json").write_text(content)
        code, _, said = command(capsys, monkeypatch, "replay", tmp_path)
        assert (code, said.endswith("Get another copy of it.\n")) == (2, True)
    for recipe in ("mae_hivit", "../mae"):  # without the config.yaml of its run, or of no recipe
        (tmp_path / "about.json").write_text(json.dumps({"recipe": recipe, "step": 1, "reason": "x"}))
        code, _, said = command(capsys, monkeypatch, "replay", tmp_path)
        assert (code, "is not inside its run: pass RUN/replay/step-N" in said) == (2, True)
