"""A run returns from bad steps and skips them, stops in good order, and feeds any step with its data."""

import re

import pytest
import torch
from two_parameters import FakeFeed, FakeScaler, batch, train, train_state, weights

from mimkit.data.order import Plan
from mimkit.data.sample import Batch
from mimkit.errors import StoppedError, UserError
from mimkit.io.weights import read_weights
from mimkit.training import feed as feed_module
from mimkit.training.anomaly import Bad
from mimkit.training.checkpoint import Checkpointer, checkpoints, read_checkpoint
from mimkit.training.distributed import Engine
from mimkit.training.feed import Feed
from mimkit.training.metrics import Meter
from mimkit.training.preemption import interrupt, stop
from mimkit.training.replay import load_batches, read_about
from mimkit.training.run_dir import RunDir
from mimkit.training.skip_steps import StepSkipper


class Trained:
    """A run that has trained, with what it printed."""

    def __init__(self, folder, *saved, steps, **more):
        self.printed, self.feed, self.ends = [], FakeFeed(), {0: None}
        self.dir = RunDir.open(str(folder), "mae", None)
        self.dir.write_config({})
        self.state, self.engine = train_state(**more), Engine()
        self.checkpoints = Checkpointer(folder, self.engine, keep=9, log=self.printed.append)
        self.skipper = StepSkipper("mae", self.dir, self.engine, self.checkpoints, self.state, self.printed.append)
        self.checkpoints.begin(self.state)
        self.ends[0] = weights(self.state)
        for done in range(1, steps + 1):
            train(self.state, done - 1)
            self.ends[done] = weights(self.state)
            self.dir.log(done, loss=1.0)
            if done in saved:
                self.checkpoints.save(done, self.state)

    def steps_logged(self):
        return [line["step"] for line in self.dir.metrics()]


BAD = Bad(7, "its loss is not finite")


@pytest.mark.parametrize(("bad", "start"), [(7, 6), (6, 6), (5, 3), (3, 3)])
def test_it_returns_to_the_last_checkpoint_before_a_bad_step(bad, start, tmp_path):
    run = Trained(tmp_path, 3, 6, steps=8)
    train(run.state, 8)
    run.state.model.weight.grad = torch.ones(1, 1)
    assert run.skipper.rewind(Bad(bad, "its loss is not finite"), run.feed) == start
    assert weights(run.state) == run.ends[start]
    assert run.state.model.weight.grad is None
    assert run.feed.starts == [start]
    assert run.steps_logged() == list(range(1, start + 1))
    meter = run.state.meter
    assert (meter.count, meter.sums, meter.since_step) == (0, {}, start)
    assert run.printed[-1] == (
        f"WARNING: step {bad} is bad (its loss is not finite). Continuing without it from step {start}."
    )
    assert run.state.guard.skipped == {bad: "its loss is not finite"}


def test_without_a_checkpoint_it_returns_to_the_start(tmp_path):
    run = Trained(tmp_path, steps=3)
    for bad in (2, 1):
        assert run.skipper.rewind(Bad(bad, "its loss is not finite"), run.feed) == 0
        assert weights(run.state) == run.ends[0]
        assert not run.state.optimizer.state_dict()["state"]
        assert run.steps_logged() == []
        train(run.state, 0)
    assert run.feed.starts == [0, 0]


def test_without_a_state_to_return_to_the_run_ends(tmp_path):
    run = Trained(tmp_path, 3, steps=3)
    with pytest.raises(UserError, match=r"Step 1 is bad \(its loss is not finite\), and no checkpoint precedes it."):
        run.skipper.rewind(Bad(1, "its loss is not finite"), run.feed)


def test_it_returns_past_a_corrupt_checkpoint(tmp_path):
    run = Trained(tmp_path, 3, 6, steps=8)
    run.checkpoints.wait()
    (run.checkpoints.folder(6) / "model.safetensors").write_bytes(b"")
    assert run.skipper.rewind(BAD, run.feed) == 3
    assert weights(run.state) == run.ends[3]


def test_a_checkpoint_that_is_being_written_counts(tmp_path):
    run = Trained(tmp_path, 6, steps=7)  # nothing has waited for the writer
    assert run.skipper.rewind(BAD, run.feed) == 6


def test_a_skipped_step_is_saved_for_replay(tmp_path):
    run = Trained(tmp_path, 6, steps=8)
    assert not run.skipper.skip(7, iter(()))
    run.skipper.rewind(BAD, run.feed)
    assert not run.skipper.skip(6, iter(()))
    folder = tmp_path / "replay" / "step-00000007"
    assert not folder.exists()
    assert run.skipper.skip(7, iter([batch(7), batch(70)]))
    assert run.printed[-1] == f"skipped step 7: look at it with mimkit replay {folder}"
    assert read_about(folder) == {"recipe": "mae", "step": 7, "reason": "its loss is not finite"}
    assert [found.names[0] for _, found in load_batches(folder)] == ["7-0.png", "70-0.png"]
    assert read_weights(folder / "weights")["weight"].item() == run.ends[6][0]
    assert run.skipper.skip(7, iter([batch(7)]))  # whenever it comes to this step
    # a resumed run knows it, also if it starts anew
    again = train_state()
    StepSkipper("mae", run.dir, run.engine, run.checkpoints, again, print)
    assert again.guard.skipped == {7: "its loss is not finite"}


def test_the_third_bad_step_of_late_ends_the_run(tmp_path):
    run = Trained(tmp_path, 6, steps=8)
    run.state.guard.skipped.update({2: "a", 5: "b"})
    with pytest.raises(
        UserError, match=r"3 bad steps within 1000 \(step 2: a; step 5: b; step 7: its loss is not fini"
    ):
        run.skipper.rewind(BAD, run.feed)
    assert run.feed.starts == [7]
    ((rank, found),) = load_batches(tmp_path / "replay" / "step-00000007")  # its batch is saved all the same
    assert (rank, found.names[0]) == (0, "7-0.png")


# Signals -------------------------------------------------------------------------------------------------------------


def test_stopping_saves_the_step_that_is_done(tmp_path):
    run = Trained(tmp_path, 6, steps=8)
    message = (
        f"Stopped by SIGTERM after step 8, which is saved. Continue with --config {tmp_path}/config.yaml --resume auto."
    )
    with pytest.raises(StoppedError, match=f"^{re.escape(message)}$"):
        stop(7, "SIGTERM", run.checkpoints, run.state)
    assert checkpoints(tmp_path)[-1].name == "step-00000008"
    fresh = train_state()
    fresh.load_state_dict(read_checkpoint(checkpoints(tmp_path)[-1]), "checkpoint")
    assert weights(fresh) == run.ends[8]
    assert fresh.meter.count == 8  # what was accumulated since the last reading is logged later


def test_stopping_after_a_save_does_not_save_again(tmp_path):
    run = Trained(tmp_path, 8, steps=8)
    run.checkpoints.wait()
    before = (run.checkpoints.folder(8) / "manifest.json").stat().st_mtime_ns
    with pytest.raises(StoppedError, match="after step 8, which is saved"):
        stop(7, "SIGTERM", run.checkpoints, run.state)
    assert (run.checkpoints.folder(8) / "manifest.json").stat().st_mtime_ns == before


def test_the_meters_of_all_processes_are_averaged_in_all_of_them(tmp_path, monkeypatch):
    """Only the main process writes, and knows which checkpoint is complete. All of them must take part."""
    reduced = []
    monkeypatch.setattr(Engine, "reduce", lambda engine, value, how="mean": reduced.append(value) or value)
    for main in (True, False):
        run = Trained(tmp_path / str(main), 3, steps=3)
        train(run.state, 3)
        run.engine.is_main = main
        run.checkpoints.latest = run.checkpoints.folder(3) if main else None
        reduced.clear()
        with pytest.raises(StoppedError):
            stop(2, "SIGTERM", run.checkpoints, run.state)
        assert len(reduced) == 1, "the losses that the guard reads, and no sums"


def test_a_bad_step_is_not_saved(tmp_path):
    run = Trained(tmp_path, 6, steps=7)
    train(run.state, 7, scale=float("nan"))
    message = (
        r"Stopped by SIGTERM at step 7, which is bad \(its loss is not finite\). Continue from before it with --con"
    )
    with pytest.raises(StoppedError, match=message):
        stop(7, "SIGTERM", run.checkpoints, run.state)
    assert checkpoints(tmp_path)[-1].name == "step-00000006"


def test_a_scale_that_is_too_small_is_not_saved(tmp_path):
    run = Trained(tmp_path, 6, steps=8, scaler=FakeScaler(scale=0.5))
    with pytest.raises(StoppedError, match=r"even scaled by 0.5 \(fp16\)"):
        stop(7, "SIGTERM", run.checkpoints, run.state)


def test_interrupting_names_the_last_checkpoint(tmp_path):
    run = Trained(tmp_path / "a", steps=2)
    with pytest.raises(KeyboardInterrupt, match=r"Interrupted after step 2; the last checkpoint is not written yet."):
        interrupt(2, run.checkpoints)
    run = Trained(tmp_path / "b", 2, steps=3)
    last = run.checkpoints.folder(2)
    how = f"--config {tmp_path}/b/config.yaml --resume auto."
    message = f"Interrupted after step 3; the last checkpoint is {last}. Continue with {how}"
    with pytest.raises(KeyboardInterrupt, match=f"^{re.escape(message)}$"):
        interrupt(3, run.checkpoints)


# Feed ----------------------------------------------------------------------------------------------------------------


def feed(batches, monkeypatch, max_bad=0.01, **plan):
    """A feed of these batches by step, what it printed, and the images that it knows to be bad."""
    printed, known, start = [], {}, [0]
    monkeypatch.setattr(feed_module, "restart", lambda loader, step: start.__setitem__(0, step))
    loader = type("Loader", (), {"__iter__": lambda _: iter(batches[start[0] :])})()
    plan = Plan(100, 2, steps=10, **plan)
    return Feed(loader, plan, torch.device("cpu"), max_bad, known, Meter(), printed.append), printed, known


def test_feed_starts_at_any_step(monkeypatch):
    fed, _, _ = feed([batch(step) for step in range(4)], monkeypatch)
    for start in (2, 0):
        fed.start(start)
        for step in range(start, 4):
            (found,) = fed.micro_batches()
            assert found.names[0] == f"{step}-0.png"
    with pytest.raises(UserError, match="The data ended before the run did: it has fewer images than it declares"):
        next(fed.micro_batches())


def test_feed_gives_the_micro_batches_of_a_step_when_they_are_asked_for(monkeypatch):
    fed, _, _ = feed([batch(i, 1) for i in range(4)], monkeypatch, grad_accum_steps=2)
    fed.start(0)
    micro_batches = fed.micro_batches()
    assert [next(micro_batches).names, next(micro_batches).names] == [["0-0.png"], ["1-0.png"]]
    assert next(micro_batches, None) is None
    assert [found.names for found in fed.micro_batches()] == [["2-0.png"], ["3-0.png"]]


def test_feed_measures_the_wait_for_data(monkeypatch):
    fed, _, _ = feed([batch(0)], monkeypatch)
    fed.start(0)
    fed.meter.waited = 0.0
    list(fed.micro_batches())
    assert fed.meter.waited > 0


def damaged(step, *names, images=2):
    return batch(step, images)._replace(bad=[(name, "truncated") for name in names])


def test_feed_names_each_bad_image_once(monkeypatch):
    batches = [damaged(0, "a.png"), damaged(1, "a.png", "b.png"), damaged(2, "a.png")]
    fed, printed, known = feed(batches, monkeypatch, max_bad=0.02)
    for _ in range(2):
        fed.start(0)
        for _ in batches:
            list(fed.micro_batches())
    assert known == {"a.png": "truncated", "b.png": "truncated"}
    assert printed == [f"skipped {name}, which cannot be used (truncated)" for name in ("a.png", "b.png")]


def test_feed_ends_the_run_if_too_many_images_are_bad(monkeypatch):
    """--max-bad is a fraction of all images: 2 of 100 are more than 1 %."""
    fed, _, _ = feed([damaged(0, "a.png"), damaged(1, "b.png")], monkeypatch)
    fed.start(0)
    list(fed.micro_batches())
    with pytest.raises(UserError, match=r"2 images cannot be used, more than the 1 allowed, such as a.png"):
        list(fed.micro_batches())


def test_feed_ends_the_run_if_an_image_has_no_replacement(monkeypatch):
    fed, _, _ = feed([damaged(0, "a.png", images=1)], monkeypatch)
    fed.start(0)
    message = r"a.png cannot be used \(truncated\), nor can the images that could replace it. Remove or repair them."
    with pytest.raises(UserError, match=message):
        list(fed.micro_batches())


def test_feed_moves_batches_to_the_device(monkeypatch):
    moved = []
    monkeypatch.setattr(Batch, "to", lambda found, device: moved.append(device) or found)
    fed, _, _ = feed([batch(0)], monkeypatch)
    fed.start(0)
    list(fed.micro_batches())
    assert moved == [torch.device("cpu")]
