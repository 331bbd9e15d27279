"""A whole run of a model of two parameters: its loop, its log, bad steps, signals, and resuming."""

import json
import os
import signal
import weakref
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import LoggerType
from two_parameters import batch

from mimkit.errors import StoppedError, UserError
from mimkit.training import precision
from mimkit.training.checkpoint import checkpoints, read_checkpoint
from mimkit.training.distributed import Engine
from mimkit.training.replay import save_batch, save_weights
from mimkit.training.run import Run

IMAGES, BATCH = 40, 8  # 5 steps per epoch


class Loader:
    """A loader of one batch per step, as `train_loader` returns it. It counts how often it was started."""

    def __init__(self, plan):
        self.batch_sampler, self.dataset, self.started = SimpleNamespace(plan=plan), None, []

    def __iter__(self):
        plan = self.batch_sampler.plan
        self.started.append(plan.start)
        return (batch(step, BATCH) for step in range(plan.start, plan.steps))


def train(out, epochs=12.0, *, bad=(), at=None, model=None, steps=None, resume="auto", save_every=2.0, **options):
    """Train two parameters on random numbers that the seed of each step gives.

    Args:
        bad: steps whose loss is not finite.
        at: called with the run and each step before its end.
        steps: collects the steps that were computed.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    run = Run("line", out=str(out), resume=resume, save_every=save_every, precision="fp32", **options)
    plan = run.make_plan(IMAGES, BATCH, epochs)
    run.write_config({"epochs": epochs, "lr": 0.1})
    torch.manual_seed(0)
    model = model or torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    distributed, stepper = run.prepare(model, optimizer)
    run.loader = Loader(plan)
    for step, micro_batches in run.steps(run.loader):
        for _ in micro_batches:
            with run.accelerator.accumulate(distributed):
                x = torch.rand(8, 1)
                loss = (distributed(x) - 3 * x).square().mean() * (float("nan") if step in bad else 1)
                run.accelerator.backward(loss)
                stepper.step()
                stepper.zero_grad()
            run.record(loss=loss)
            if steps is not None:
                steps.append(step)
        if at:
            at(run, step)
        run.end_step(step)
        if run.due(step, save_every):
            run.save(step)
    return run


def end(out):
    """The weights and the optimizer of the last checkpoint."""
    states, _ = read_checkpoint(checkpoints(out)[-1])
    return {f"{name}.{key}": tensor.tolist() for name, state in states.items() for key, tensor in state.items()}


def logged(out):
    """The lines of metrics.jsonl without what a clock gives."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("images_per_s", "waiting")} for line in lines]


def test_a_run_logs_and_saves(tmp_path, capsys):
    steps = []
    run = train(tmp_path / "run", steps=steps)
    assert steps == list(range(60))
    assert [line["step"] for line in logged(tmp_path / "run")] == [10, 20, 30, 40, 50, 60]  # each save reads the loss
    first, *_, last = logged(tmp_path / "run")
    assert last["loss"] < 0.5 * first["loss"]
    assert (last["epoch"], last["lr"]) == (12.0, 0.1)
    assert [folder.name[-2:] for folder in checkpoints(tmp_path / "run")] == ["50", "60"]
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config == {"epochs": 12.0, "lr": 0.1, "precision": "fp32", "out": str(tmp_path / "run"), "resume": None}
    assert "step 60/60 · loss " in capsys.readouterr().out
    assert run.folder == tmp_path / "run"


def test_the_loss_is_read_every_twenty_steps(tmp_path):
    train(tmp_path, save_every=0.0)
    assert [line["step"] for line in logged(tmp_path)] == [20, 40, 60]
    assert [folder.name[-2:] for folder in checkpoints(tmp_path)] == ["60"]  # one is always written at the end


def test_a_measurement_reads_the_loss_first(tmp_path):
    train(tmp_path, save_every=0.0, measure_every=3)
    assert [line["step"] for line in logged(tmp_path)] == [15, 20, 30, 40, 45, 60]


def test_what_is_due(tmp_path):
    run = Run("line", out=str(tmp_path))
    run.make_plan(IMAGES, BATCH, 3)
    assert [step for step in range(15) if run.due(step, 1)] == [4, 9, 14]
    assert [step for step in range(15) if run.due(step, 0.4)] == [1, 3, 5, 7, 9, 11, 13, 14]
    assert [step for step in range(15) if run.due(step, 0.01)] == list(range(15))
    assert [step for step in range(15) if run.due(step, 0)] == [14]
    run.bad = "a bad step"
    assert not any(run.due(step, 1) for step in range(15))


def test_keep_every_counts_checkpoints(tmp_path):
    train(tmp_path, keep=1, keep_every=2)
    assert [folder.name[-2:] for folder in checkpoints(tmp_path)] == ["20", "40", "60"]


def test_less_than_a_step_is_refused(tmp_path):
    run = Run("line", out=str(tmp_path / "run"))
    message = "--epochs 0.05 with 5 steps per epoch is less than one step. Train for longer."
    with pytest.raises(UserError, match=message):
        run.make_plan(IMAGES, BATCH, 0.05)
    assert not (tmp_path / "run").exists()


# Bad steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "start"), [(13, 10), (19, 10), (20, 20), (2, 0), (59, 50)])
def test_a_bad_step_is_skipped(step, start, tmp_path, capsys):
    steps = []
    run = train(tmp_path / "run", bad=[step], steps=steps)
    read = min(step - step % 10 + 10, 60)  # the losses are read before each checkpoint
    again = [other for other in range(start, 60) if other != step]
    assert steps == [*range(read), *again]
    printed = capsys.readouterr().out
    assert f"step {step} is bad (its loss is not finite). Continuing without it from step {start}." in printed
    assert run.loader.started == [0, start]
    folder = tmp_path / "run" / "replay" / f"step-{step:08d}"
    assert json.loads((folder / "rank-0" / "names.json").read_text())["names"][0][0] == f"{step}-0.png"

    # it is the run in which that step was left out
    told = tmp_path / "told" / "replay" / folder.name
    told.mkdir(parents=True)
    (told / "about.json").write_text('{"reason": "told"}')
    steps.clear()
    train(tmp_path / "told", steps=steps)
    assert steps == [other for other in range(60) if other != step]
    assert end(tmp_path / "run") == end(tmp_path / "told")
    assert logged(tmp_path / "run") == logged(tmp_path / "told")


def test_three_bad_steps_end_the_run(tmp_path):
    message = r"3 bad steps within 1000 \(step 3: its loss is not finite; step 11: .*; step 12: .* rate of 0.1 in fp32."
    with pytest.raises(UserError, match=message):
        train(tmp_path, bad=[3, 11, 12])
    kept = {folder.name: {file.name for file in folder.iterdir()} for folder in (tmp_path / "replay").iterdir()}
    whole = {"rank-0", "weights", "about.json"}
    assert kept == {"step-00000003": whole, "step-00000011": whole, "step-00000012": {"rank-0"}}


def test_a_spike_may_be_allowed_on_resume(tmp_path, capsys):
    """--max-spike may change."""

    def spike(run, step):
        if step == 25 and not run.skipping:
            run.guard.losses[-1] = (step, run.guard.losses[-1][1] * 50)

    train(tmp_path / "plain", at=spike)
    assert "is bad" not in capsys.readouterr().out
    stop_after(tmp_path / "run", 20)
    train(tmp_path / "run", at=spike, max_spike=10.0)
    assert "step 25 is bad (its loss is " in capsys.readouterr().out


def test_a_skipped_step_leaves_the_weights(tmp_path):
    skipped = []
    train(tmp_path, bad=[7], at=lambda run, step: skipped.append((step, run.step_skipped)))
    assert [step for step, left in skipped if left] == [7]
    assert skipped[:11] == [(step, False) for step in range(10)] + [(0, False)]


def test_a_step_that_the_scaler_drops_leaves_the_weights(tmp_path, monkeypatch):
    run = train(tmp_path)
    assert not run.step_skipped
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", True)
    assert run.step_skipped


# Stopping and resuming -----------------------------------------------------------------------------------------------


def stop_after(out, *steps, name="SIGTERM", **options):
    def at(run, step):
        if step + 1 in steps:
            os.kill(os.getpid(), getattr(signal, name))

    with pytest.raises(KeyboardInterrupt if name == "SIGINT" else StoppedError) as caught:
        train(out, at=at, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_run_that_is_stopped_and_resumed_is_the_run(name, tmp_path):
    """It is stopped between two readings of the loss, before a checkpoint, and when a checkpoint is due."""
    train(tmp_path / "whole")
    out = tmp_path / "run"
    for done in (7, 9, 20):
        message = f"Stopped by {name} after step {done}, which is saved. Continue with --config {out}/config.yaml --res"
        assert stop_after(out, done, name=name).startswith(message)
        assert checkpoints(out)[-1].name == f"step-{done:08d}"
    train(out)
    assert end(out) == end(tmp_path / "whole")
    assert logged(out) == logged(tmp_path / "whole")


def test_a_signal_in_the_last_step_changes_nothing(tmp_path):
    train(tmp_path, at=lambda run, step: step == 59 and os.kill(os.getpid(), signal.SIGTERM))
    assert checkpoints(tmp_path)[-1].name == "step-00000060"


def test_a_second_interrupt_saves_nothing_and_names_the_last_checkpoint(tmp_path):
    def interrupt_twice(run, step):
        if step == 23:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # a shell starts background jobs with this signal ignored
    with pytest.raises(
        KeyboardInterrupt, match=r"Interrupted after step 23; the last checkpoint is .*step-00000020. Con"
    ):
        train(tmp_path, at=interrupt_twice)
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoints(tmp_path)[-1].name == "step-00000020"


def test_a_resumed_run_is_told_apart_from_a_new_one(tmp_path):
    train(tmp_path)
    with pytest.raises(UserError, match=r"already holds a run. To continue it"):
        train(tmp_path, resume=None)
    with pytest.raises(UserError, match=r"epochs: 12.0 there, 6.0 here"):
        train(tmp_path, epochs=6.0)
    steps = []
    before = logged(tmp_path)
    train(tmp_path, steps=steps)  # it is complete
    assert (steps, logged(tmp_path)) == ([], before)


def test_a_corrupt_checkpoint_is_passed_over_on_resume(tmp_path):
    train(tmp_path / "whole")
    train(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-00000060" / "optimizer.safetensors").write_bytes(b"")
    steps = []
    train(tmp_path / "run", steps=steps)
    assert steps == list(range(50, 60))
    assert end(tmp_path / "run") == end(tmp_path / "whole")
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


def test_gradient_accumulation(tmp_path):
    run = Run("line", out=str(tmp_path), grad_accum_steps=4)
    plan = run.make_plan(IMAGES, BATCH, 3)
    assert (plan.grad_accum_steps, plan.micro_batch_size, plan.steps, plan.start) == (4, 2, 15, 0)
    assert run.accelerator.gradient_accumulation_steps == 4
    with pytest.raises(UserError, match="--batch-size 8 cannot be shared by 1 processes x 3"):
        Run("line", out=str(tmp_path), grad_accum_steps=3).make_plan(IMAGES, BATCH, 3)


def test_a_resumed_run_keeps_the_precision_that_was_resolved(tmp_path, monkeypatch):
    """Its next machine may be fast at something else."""
    for fast in (2, 1):
        monkeypatch.setattr(precision, "seconds_of", {torch.float32: 1.5, torch.bfloat16: fast}.get)
        AcceleratorState._reset_state(reset_partial_state=True)
        run = Run("line", out=str(tmp_path), resume="auto", precision="auto")
        run.write_config({})
        assert run.engine.precision == yaml.safe_load((tmp_path / "config.yaml").read_text())["precision"] == "fp32"
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(UserError, match="precision: fp32 there, bf16 here"):
        Run("line", out=str(tmp_path), resume="auto", precision="bf16").write_config({})


# The rest ------------------------------------------------------------------------------------------------------------


def test_a_run_replays_one_step_and_ends(tmp_path, capsys):
    folder, steps = tmp_path / "run" / "replay" / "step-00000007", []
    model = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(model.weight, 3.0)
    save_batch(folder, 0, [batch(7)])
    save_weights(folder, model, "line", 7, "its loss is not finite")
    fresh = torch.nn.Linear(1, 1)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "other", model=fresh, steps=steps, resume=None, replay=folder, bad=[7])
    assert (stop.value.code, steps) == (0, [7])
    printed = capsys.readouterr().out
    assert "step 7 was skipped because its loss is not finite" in printed
    assert "loss nan of 2 images:\n  7-0.png: 7 to 7\n" in printed
    assert "gradients that are not finite: weight, bias" in printed
    assert not checkpoints(tmp_path / "other")


def test_an_average_needs_complete_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "sharded_params", True)
    monkeypatch.setattr(Engine, "__str__", lambda engine: "ZeRO-3, 2 processes")
    run = Run("line", out=str(tmp_path))
    run.make_plan(IMAGES, BATCH, 3)
    model = torch.nn.Linear(1, 1)
    message = r"An average of the weights \(--model-ema-decay\) needs complete weights, but ZeRO-3, 2 processes shards"
    with pytest.raises(UserError, match=message):
        run.prepare(model, torch.optim.SGD(model.parameters()), ema=torch.nn.Linear(1, 1))


def test_a_closed_run_releases_the_model(tmp_path):
    """The next run in the same process may need the memory."""
    run = train(tmp_path)
    kept = [weakref.ref(run.state.model), weakref.ref(run.state.optimizer)]
    run.close()
    assert [ref() for ref in kept] == [None, None]


def test_data_workers_end_with_the_loop(tmp_path):
    """What iterates over the data is released when the loop ends, and its workers with it."""
    iterators = []

    class Iterator:
        def __init__(self, batches):
            self.batches = batches
            iterators.append(weakref.ref(self))

        def __iter__(self):
            return self

        def __next__(self):
            return next(self.batches)

    start = Loader.__iter__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "__iter__", lambda loader: Iterator(start(loader)))
        run = train(tmp_path, bad=[7])
    assert run.loader
    assert [ref() for ref in iterators] == [None, None]


def test_trackers_get_the_options_and_the_metrics(tmp_path, monkeypatch):
    """No tracker is installed here: accelerate is told that one is, and what it is given is kept."""
    given = []
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *_: [])
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name, config: given.append((name, config)))
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: given.append((step, values)))
    train(tmp_path / "run", track="tensorboard")
    assert given[0] == ("run", {"epochs": 12.0, "lr": 0.1, "precision": "fp32"})
    assert [step for step, _ in given[1:]] == [10, 20, 30, 40, 50, 60]
    assert {"loss", "lr", "epoch", "images_per_s", "waiting"} == given[1][1].keys()
