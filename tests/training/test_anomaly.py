import json
import multiprocessing
import os
import re
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import command, losses
from mimkit.recipes import finetune, mae_hivit
from safetensors.torch import load_file, save_file

from mimkit.data import loader, sample
from mimkit.data.sample import Batch
from mimkit.training import anomaly, replay
from mimkit.training.run import Run

TINY = ["--epochs", "8", "--batch-size", "8", "--decoder-dim", "24", "--workers", "0", "--knn-every", "0"]


@pytest.fixture
def poisoned(monkeypatch):
    """Images of these steps are not finite, whenever they are met; -> the steps, and every step that was begun"""
    bad, made, parts = set(), [], Run._parts

    def poison(run, batches):
        made.append(run.step)
        for batch in parts(run, batches):
            yield batch._replace(images=batch.images * float("nan")) if run.step in bad else batch

    monkeypatch.setattr(Run, "_parts", poison)
    return bad, made


@pytest.mark.parametrize("step", [13, 19])  # the loss of the latter would be logged
def test_a_bad_step_is_passed_by(step, images, tmp_path, capsys, monkeypatch, poisoned):
    bad, made = poisoned
    bad.add(step)
    out = tmp_path / "run"
    argv = ["--data", images, *TINY, "--save-every", "2.5"]  # of 4 steps: checkpoints at 10, 20, 30, 32
    mae_hivit.main([*argv, "--out", str(out)])
    said = capsys.readouterr().out
    assert f"step {step} is bad (its loss is not finite): going on without it from step 10" in said
    assert made == [*range(20), *range(10, 32)]  # read before the checkpoint at 20
    weights = load_file(out / "encoder" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert np.isfinite(list(losses(out).values())).all()

    # it is the run in which that step's parts were left out
    bad.clear()
    monkeypatch.setattr(anomaly, "skipped_steps", lambda folder: {step: "told"})
    mae_hivit.main([*argv, "--out", str(tmp_path / "told")])
    told = load_file(tmp_path / "told" / "encoder" / "model.safetensors")
    assert all(torch.equal(weights[name], told[name]) for name in weights)
    assert losses(out) == losses(tmp_path / "told")
    monkeypatch.undo()

    kept = out / "replay" / f"step-{step:08d}"
    names = json.loads((kept / "rank-0" / "names.json").read_text())["names"][0]
    assert len(names) == 8
    assert all(name.endswith(".png") for name in names)
    code, said, _ = command(capsys, monkeypatch, "replay", kept)
    assert code == 0
    assert "loss nan of 8 images:" in said
    assert names[0] in said
    assert "first output that is not finite: the images themselves" in said


def test_before_the_first_checkpoint_it_starts_anew(images, tmp_path, capsys, poisoned):
    poisoned[0].add(2)
    out = tmp_path / "run"
    mae_hivit.main(["--data", images, *TINY, "--save-every", "100", "--out", str(out)])
    assert "step 2 is bad (its loss is not finite): going on without it from step 0" in capsys.readouterr().out
    assert poisoned[1] == [*range(20), *range(32)]
    assert json.loads((out / "checkpoints" / "step-00000032" / "state.json").read_text())["passed"].keys() == {"2"}


def test_a_gradient_is_seen_where_the_loss_is_finite(images, tmp_path, capsys, monkeypatch):
    backward, seen = torch.Tensor.backward, []

    def spoiled(loss, *args, **kwargs):
        backward(loss, *args, **kwargs)
        seen.extend([loss] if hasattr(runs[0], "model") else [])  # preflight has a copy
        if len(seen) == 7:
            runs[0].model.decoder.mask_token.grad.fill_(torch.inf)

    runs, init = [], Run.__init__
    monkeypatch.setattr(Run, "__init__", lambda run, *args: (init(run, *args), runs.append(run))[0])
    monkeypatch.setattr(torch.Tensor, "backward", spoiled)
    mae_hivit.main(["--data", images, *TINY, "--save-every", "100", "--out", str(tmp_path / "run")])
    assert "step 6 is bad (its gradient is not finite)" in capsys.readouterr().out


def test_three_end_the_run(images, tmp_path, capsys, poisoned):
    poisoned[0].update((3, 11, 12))
    with pytest.raises(SystemExit) as stop:
        mae_hivit.main(["--data", images, *TINY, "--save-every", "2.5", "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "3 bad steps among 1000 (step 3: its loss is not finite; step 11: " in last
    assert "in fp32: look at one with mimkit replay" in last
    kept = {f.name: {x.name for x in f.iterdir()} for f in (tmp_path / "run" / "replay").iterdir()}
    whole = {"rank-0", "weights", "about.json"}
    assert kept == {"step-00000003": whole, "step-00000011": whole, "step-00000012": {"rank-0"}}
    (_, batch) = replay.load_batches(tmp_path / "run" / "replay" / "step-00000012")[0]
    assert len(batch.images) == len(batch.names) == 8


def test_gradients_that_overflow_at_any_scale():
    """Of fp16, whose scaler drops steps by itself: a few are as it should be."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer, scaler, guard = (
        torch.optim.SGD([weight]),
        torch.amp.GradScaler("cpu", init_scale=4),
        anomaly.AnomalyGuard(),
    )
    guard.watch(optimizer)
    accelerator, found = SimpleNamespace(scaler=scaler, reduce=lambda values, how: values), []
    for guard.step in range(3):
        loss = (weight * torch.inf).sum()
        scaler.scale(loss).backward()
        guard.see(torch.ones(()))  # a loss that is finite
        scaler.step(optimizer)
        scaler.update()
        found.append(guard.read(accelerator))
    assert found[:2] == [None, None]  # 2, 1
    assert found[2].step == 2
    assert "scaled by 0.5 (fp16)" in found[2].reason


def test_a_spike_is_passed_by_where_that_is_asked_for(images, tmp_path, capsys, monkeypatch):
    record = Run.record

    def spiked(run, **values):
        record(run, **{k: v * 50 if run.step == 25 else v for k, v in values.items()})

    monkeypatch.setattr(Run, "record", spiked)
    argv = ["--data", images, *TINY, "--save-every", "100"]
    mae_hivit.main([*argv, "--out", str(tmp_path / "plain")])
    assert "is bad" not in capsys.readouterr().out
    mae_hivit.main([*argv, "--max-spike", "4", "--out", str(tmp_path / "run")])
    assert "step 25 is bad (its loss is " in capsys.readouterr().out


def test_it_holds_for_every_recipe(images, tmp_path, capsys, poisoned):
    poisoned[0].add(5)
    argv = ["--data", images, "--epochs", "3", "--batch-size", "8", "--workers", "0", "--model-ema-decay", "0.9"]
    argv += ["--model", "hivit_nano", "--from-scratch", "--img-size", "32", "--warmup-epochs", "0"]
    finetune.main([*argv, "--out", str(tmp_path / "run")])
    assert "step 5 is bad" in capsys.readouterr().out
    assert all(t.isfinite().all() for t in load_file(tmp_path / "run" / "last" / "model.safetensors").values())


@pytest.mark.parametrize("how", ["asleep", "stopped", "dead"])
def test_a_stuck_or_dead_worker_ends_the_run(how, images, tmp_path, capsys, monkeypatch):
    """One that is stopped cannot hand over the batch before either, which torch waits for without a limit."""
    monkeypatch.setattr(loader, "WAIT", 3)
    view = sample.SampleLoader.__call__
    ends = {"asleep": lambda: time.sleep(600), "dead": lambda: os._exit(9)}
    ends["stopped"] = lambda: os.kill(os.getpid(), signal.SIGSTOP)

    def wait(viewer, row, epoch, index):
        if epoch == 1 and torch.utils.data.get_worker_info():
            ends[how]()
        return view(viewer, row, epoch, index)

    monkeypatch.setattr(sample.SampleLoader, "__call__", wait)
    with pytest.raises(SystemExit) as stop:
        mae_hivit.main(["--data", images, *TINY, "--workers", "2", "--out", str(tmp_path / how)])
    assert stop.value.code == 2
    why = r"(DataLoader worker \(pid|it ended while)"  # as it was caught handing a batch over or not
    assert re.search(rf"A data worker is stuck or dead \({why}", capsys.readouterr().err.splitlines()[-1])
    assert how == "dead" or not multiprocessing.active_children()  # which a process waits for when it ends


def test_nothing_to_replay(tmp_path, capsys, monkeypatch):
    code, _, said = command(capsys, monkeypatch, "replay", tmp_path)
    assert code == 2
    assert "is no step to replay: pass RUN/replay/step-N" in said
    for content in ("{}", "[]", "x", '{"recipe": "mae_hivit"}', '{"recipe": 1, "step": 1, "reason": "x"}'):
        (tmp_path / "about.json").write_text(content)
        code, _, said = command(capsys, monkeypatch, "replay", tmp_path)
        assert (code, said.endswith("get another copy of it.\n")) == (2, True)
    with pytest.raises(anomaly.UserError, match="holds no batch"):
        replay.load_batches(tmp_path)
    replay.save_batch(tmp_path / "odd", 0, [])
    (tmp_path / "odd/rank-0/names.json").write_text('{"names": [[]], "bad": []}')
    with pytest.raises(anomaly.UserError, match=r"names and images of other parts .*: get another copy"):
        replay.load_batches(tmp_path / "odd")
    for name in ("0", "0.images", "0.images.1.x", "x.images", ""):
        save_file({name: torch.ones(2)}, tmp_path / "odd/rank-0/batch.safetensors")
        with pytest.raises(anomaly.UserError, match=r"names and images of other parts .*: get another copy"):
            replay.load_batches(tmp_path / "odd")


def test_a_batch_is_kept_as_it_was(tmp_path):
    """Images of several sizes too, with objects or none."""
    sizes, counts = [(20, 30), (16, 8), *[(9, 9)] * 9], [2, 0, *[1] * 9]
    images = [torch.rand(3, *size) for size in sizes]
    labels = [{"boxes": torch.rand(n, 4), "labels": torch.arange(n)} for n in counts]
    lists = Batch(images, torch.rand(11, 4), labels, [f"{i}.png" for i in range(11)], [("bad.png", "empty")])
    stacked = Batch(torch.rand(2, 3, 8, 8), torch.rand(2, 4), torch.tensor([1, 2]), ["a", "b"], [])
    for rank, parts in enumerate(([lists, stacked], [stacked, stacked])):
        replay.save_batch(tmp_path, rank, parts)
    found = replay.load_batches(tmp_path)
    assert [rank for rank, _ in found] == [0, 0, 1, 1]
    for (_, batch), kept in zip(found, (lists, stacked, stacked, stacked), strict=True):
        torch.testing.assert_close(batch[:3], kept[:3], rtol=0, atol=0)
        assert batch[3:] == kept[3:]
    assert not torch.equal(found[0][1].images[2], images[3])
