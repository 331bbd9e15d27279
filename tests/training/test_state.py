"""What a run continues from: the state of training, and its meter."""

import copy
import json
import math
import time

import pytest
import torch
from two_parameters import FakeScaler, train, train_state, weights

from mimkit.errors import UserError
from mimkit.training import metrics
from mimkit.training.metrics import Meter


def averaged(**more):
    """A state with a moving average of the weights and the scaler of fp16."""
    ema = {"ema": torch.nn.Linear(1, 1)}
    return train_state(extra_modules=ema, scaler=FakeScaler(scale=8.0), **more)


def as_json(snapshot):
    """A snapshot as a checkpoint gives it back."""
    return snapshot[0], json.loads(json.dumps(snapshot[1]))


@pytest.fixture
def trained():
    """A state after seven steps, of which two are skipped, that has met a bad image."""
    state = averaged()
    for step in range(7):
        train(state, step)
    state.guard.running_loss = 0.5
    state.guard.skipped.update({2: "its loss is not finite", 5: "its gradient is not finite"})
    state.bad_images["a.png"] = "truncated"
    state.scaler.scale = 64.0
    return state


def test_a_state_that_is_loaded_trains_on_in_the_same_way(trained):
    snapshot = trained.state_dict()
    fresh = averaged()
    fresh.load_state_dict(as_json(snapshot), "checkpoint")
    assert weights(fresh) == weights(trained)
    assert (fresh.scaler.scale, fresh.bad_images) == (64.0, {"a.png": "truncated"})
    assert fresh.guard.skipped == trained.guard.skipped
    assert fresh.guard.running_loss == 0.5
    assert fresh.meter.count == 7
    assert fresh.meter.sums["loss"].item() == pytest.approx(trained.meter.sums["loss"].item())
    ema, kept = (state.extra_modules["ema"].weight for state in (fresh, trained))
    assert torch.equal(ema, kept)
    for state in (trained, fresh):
        for step in range(7, 12):
            train(state, step)
    assert weights(fresh) == weights(trained)
    assert fresh.meter.flush(12)["loss"] == pytest.approx(trained.meter.flush(12)["loss"])


def test_a_snapshot_does_not_change_with_training(trained):
    snapshot = trained.state_dict()
    before = copy.deepcopy(snapshot)
    train(trained, 7)
    trained.guard.skipped[7] = "?"
    trained.bad_images["b.png"] = "?"
    torch.testing.assert_close(snapshot[0], before[0], rtol=0, atol=0)
    assert snapshot[1] == before[1]


def test_a_snapshot_is_tensors_and_json(trained):
    states, values = trained.state_dict()
    assert states.keys() == {"model", "optimizer", "ema"}
    assert all(isinstance(tensor, torch.Tensor) for state in states.values() for tensor in state.values())
    assert {name.split(".")[1] for name in states["optimizer"]} == {"step", "exp_avg", "exp_avg_sq"}
    known = {
        "count",
        "sums",
        "running_loss",
        "skipped_steps",
        "bad_images",
        "images",
        "names",
        "param_groups",
        "scaler",
    }
    assert json.loads(json.dumps(values)).keys() == known


def test_an_engine_that_shards_keeps_its_own_state(trained):
    trained.sharded = True
    states, values = trained.state_dict()
    assert states.keys() == {"ema"}
    assert not {"param_groups", "scaler"} & values.keys()
    fresh = averaged(sharded=True)
    before = weights(fresh)
    fresh.load_state_dict(as_json((states, values)), "checkpoint")
    assert (fresh.meter.count, weights(fresh)) == (7, before)


def test_a_running_loss_that_is_not_known_survives():
    state = train_state()
    fresh = train_state()
    fresh.guard.running_loss = 3.0
    fresh.load_state_dict(as_json(state.state_dict()), "checkpoint")
    assert math.isnan(fresh.guard.running_loss)


def test_steps_that_are_skipped_stay_skipped(trained):
    """A run that returns to a checkpoint of before knows more bad steps than the checkpoint."""
    snapshot = as_json(trained.state_dict())
    trained.guard.skipped[9] = "its loss is not finite"
    trained.load_state_dict(snapshot, "checkpoint")
    assert sorted(trained.guard.skipped) == [2, 5, 9]


def test_other_data_is_refused(trained):
    snapshot = as_json(trained.state_dict())
    message = r"checkpoint is from a run on 32 images, but --data has 31, in another order. Pass the same data \(before"
    with pytest.raises(UserError, match=f"{message} --parts existed, only train\\), or start"):
        averaged(images=31).load_state_dict(snapshot, "checkpoint")


def without(name):
    return lambda states, values: values.pop(name)


def set_to(name, value):
    return lambda states, values: values.update({name: value})


def change(name, key, value):
    return lambda states, values: states[name].update({key: value})


ODD = {
    "sums": without("sums"),
    "count": without("count"),
    "param_groups": without("param_groups"),
    "scaler": without("scaler"),
    "running_loss": without("running_loss"),
    "skipped_steps": without("skipped_steps"),
    "bad_images": without("bad_images"),
    "sums are no numbers": set_to("sums", {"loss": "x"}),
    "sums are a list": set_to("sums", [1]),
    "a skipped step is no number": set_to("skipped_steps", {"x": "reason"}),
    "skipped steps are a list": set_to("skipped_steps", [1]),
    "bad images are a number": set_to("bad_images", 3),
    "no parameter groups": set_to("param_groups", []),
    "parameter groups are a number": set_to("param_groups", 3),
    "a parameter group is empty": set_to("param_groups", [{}]),
    "no model": lambda states, values: states.pop("model"),
    "the optimizer's names": change("optimizer", "step", torch.ones(1)),
    "the optimizer's numbers": change("optimizer", "first.step", torch.ones(1)),
}


@pytest.mark.parametrize("spoil", ODD.values(), ids=ODD)
def test_a_malformed_state_is_one_sentence(spoil, trained):
    states, values = as_json(trained.state_dict())
    spoil(states, values)
    message = r"checkpoint was not written by a run \(.+\). Start a new one with another --out."
    with pytest.raises(UserError, match=message):
        averaged().load_state_dict((states, values), "checkpoint")


@pytest.mark.parametrize("name", ["model", "ema"])
def test_weights_that_do_not_fit_are_named(name, trained):
    states, values = as_json(trained.state_dict())
    del states[name]["weight"]
    with pytest.raises(UserError, match=r"checkpoint.*weight"):
        averaged().load_state_dict((states, values), "checkpoint")


# Meter ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass as a test says."""
    now = [100.0]
    monkeypatch.setattr(metrics, "time", type("Clock", (), {"perf_counter": staticmethod(lambda: now[0])}))
    return now


def test_meter_gives_means_and_rates(clock):
    meter = Meter()
    meter.restart(4)
    for loss in (1.0, 2.0, 6.0):
        with meter.waiting_for_data():
            clock[0] += 0.5
        clock[0] += 1.5
        meter.update(loss=torch.tensor(loss), error=torch.tensor(10 * loss, requires_grad=True))
    assert meter.flush(7) == {"loss": 3.0, "error": 30.0, "steps_per_s": 0.5, "waiting": 0.25}
    assert meter.flush(8) == {}  # nothing since
    clock[0] += 2
    meter.update(loss=torch.tensor(5.0))
    assert meter.flush(11) == {"loss": 5.0, "steps_per_s": 2.0, "waiting": 0.0}  # from step 7 on


def test_meter_reduces_over_the_processes(clock):
    meter = Meter()
    meter.update(loss=torch.tensor(1.0))
    meter.update(loss=torch.tensor(3.0))
    clock[0] += 1
    assert meter.flush(1, reduce=lambda value: value + 10)["loss"] == 12
    meter.update(loss=torch.tensor(1.0))
    meter.average(lambda value: value + 4)
    clock[0] += 1
    assert meter.flush(2)["loss"] == 5


def test_saving_is_not_training(clock):
    meter = Meter()
    clock[0] += 1000
    meter.restart_clock()
    clock[0] += 1
    meter.update(loss=torch.tensor(1.0))
    assert meter.flush(4)["steps_per_s"] == 4


def test_meter_forgets_on_restart(clock):
    meter = Meter()
    meter.update(loss=torch.tensor(1.0))
    meter.restart(20)
    assert (meter.count, meter.sums, meter.since_step) == (0, {}, 20)
    assert meter.state_dict() == {"count": 0, "sums": {}}


def test_meter_does_not_wait_for_the_device(monkeypatch):
    """It reads numbers only when it is asked for the means."""
    read = []
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: read.append(tensor) or 1.0)
    meter = Meter()
    for _ in range(3):
        meter.update(loss=torch.ones(()))
    assert not read
    time.sleep(0.001)
    meter.flush(3)
    assert len(read) == 1
