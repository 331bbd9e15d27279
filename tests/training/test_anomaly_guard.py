"""What ends or interrupts a run: bad steps, and signals of a scheduler."""

import json
import math
import os
import signal

import pytest
import torch
from two_parameters import FakeScaler, train, train_state

from mimkit.errors import signal_handlers
from mimkit.training.anomaly import PATIENCE, WINDOW, AnomalyGuard, Bad, skipped_steps, too_many_skipped
from mimkit.training.preemption import Preemption


def observed(guard, losses, norms=()):
    for guard.step, loss in losses.items():
        guard.observe(torch.tensor(loss))
    for step, norm in norms:
        guard.norms.append((step, torch.tensor(norm)))
    return guard.check()


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_bad(loss):
    guard = AnomalyGuard()
    assert observed(guard, {0: 1.0, 1: 1e30}) is None
    assert observed(guard, {2: 1.0, 3: loss, 4: 1.0, 5: loss}) == Bad(3, "its loss is not finite")
    assert observed(guard, {6: 1.0}) is None  # what was read is forgotten
    assert guard.check() is None


def test_a_bad_micro_batch_spoils_its_step():
    guard = AnomalyGuard()
    guard.step = 7
    for loss in (1.0, math.nan, 1.0):
        guard.observe(torch.tensor(loss))
    assert guard.check() == Bad(7, "its loss is not finite")


def test_a_gradient_that_is_not_finite_is_bad():
    """The loss of its step is finite."""
    state = train_state()
    state.guard.watch(state.optimizer)
    for step in range(2):
        train(state, step)
    assert state.guard.check() is None
    state.model.bias.register_hook(lambda gradient: gradient + math.inf)
    train(state, 2)
    assert state.guard.check() == Bad(2, "its gradient is not finite")


def test_an_engine_may_know_the_norm_of_the_gradient():
    guard = AnomalyGuard()
    for guard.step, norm in enumerate((1.0, None, torch.tensor(2.0), math.inf)):
        guard.observe(torch.ones(()), norm)
    assert len(guard.norms) == 3
    assert guard.check() == Bad(3, "its gradient is not finite")


def test_the_first_bad_step_counts():
    bad = observed(AnomalyGuard(), {4: 1.0, 5: math.nan}, norms=[(4, math.inf), (5, 1.0)])
    assert bad == Bad(4, "its gradient is not finite")


def test_a_spike_is_bad_if_that_is_asked_for():
    losses = {20: 2.0, 21: 9.0, 22: 2.0}
    for max_spike, running_loss, bad in [
        (None, 2.0, None),
        (5.0, 2.0, None),
        (4.0, 2.0, Bad(21, "its loss is 9, and the running mean is 2")),
        (4.0, math.nan, None),  # nothing was read before
    ]:
        guard = AnomalyGuard(max_spike)
        guard.running_loss = running_loss
        assert observed(guard, losses) == bad


def test_gradients_that_overflow_at_any_scale():
    """The scaler of fp16 drops steps by itself. A few of these are normal."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer, scaler, guard = torch.optim.SGD([weight]), torch.amp.GradScaler("cpu", init_scale=4), AnomalyGuard()
    guard.watch(optimizer)
    found = []
    for guard.step in range(3):
        loss = (weight * torch.inf).sum()
        scaler.scale(loss).backward()
        guard.observe(torch.ones(()))  # a loss that is finite
        scaler.step(optimizer)
        scaler.update()
        found.append(guard.check(scaler=scaler))
    assert found[:2] == [None, None]  # scales of 2 and 1
    assert found[2].step == 2
    assert "scaled by 0.5 (fp16)" in found[2].reason


def test_a_scale_is_only_read_with_a_loss():
    assert AnomalyGuard().check(scaler=FakeScaler(scale=0.25)) is None


def test_all_processes_find_the_same_step():
    """`reduce` gives each of them the mean, in which a number that is not finite stays so."""
    guard = AnomalyGuard()
    for guard.step in range(3):
        guard.observe(torch.ones(()))
    other = torch.tensor([1.0, 1.0, math.nan])
    assert guard.check(lambda values: (values + other) / 2) == Bad(2, "its loss is not finite")


def test_three_of_a_thousand_steps_end_a_run():
    guard = AnomalyGuard()
    assert (PATIENCE, WINDOW) == (3, 1000)
    assert guard.skip(Bad(10, "a")) == {}
    assert guard.skip(Bad(900, "b")) == {}
    assert guard.skip(Bad(1010, "c")) == {}  # step 10 is not one of the last thousand any more
    assert guard.skip(Bad(1011, "d")) == {900: "b", 1010: "c", 1011: "d"}
    assert guard.skipped == {10: "a", 900: "b", 1010: "c", 1011: "d"}


@pytest.mark.parametrize(
    ("precision", "hint"),
    [("fp32", "a smaller --lr, or"), ("bf16", "--precision fp32, or"), ("fp16", "--precision fp32 or bf16, or")],
)
def test_the_error_names_the_steps_and_what_to_try(precision, hint, tmp_path):
    message = str(too_many_skipped({900: "a", 1010: "b", 1011: "c"}, tmp_path, 1.5e-4, precision))
    assert message.startswith(
        "3 bad steps within 1000 (step 900: a; step 1010: b; step 1011: c), at a learning rate of"
    )
    assert f"0.00015 in {precision}. Look at one with mimkit replay {tmp_path}/replay/step-00000900;" in message
    assert hint in message


def test_skipped_steps_are_known_from_the_folder(tmp_path):
    assert skipped_steps(tmp_path) == {}
    for step, reason in ((3, "a"), (12, "b")):
        folder = tmp_path / "replay" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "about.json").write_text(json.dumps({"reason": reason}))
    (tmp_path / "replay" / "step-00000013" / "rank-0").mkdir(parents=True)  # the step that ends a run is not skipped
    assert skipped_steps(tmp_path) == {3: "a", 12: "b"}


# Preemption ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_of_a_scheduler_or_a_person_asks_to_stop(name):
    before = signal.getsignal(getattr(signal, name))
    preemption = Preemption()
    with signal_handlers(preemption.handlers()):
        assert not preemption.requested()
        os.kill(os.getpid(), getattr(signal, name))
        assert preemption.requested()
        assert preemption.requested()  # it stays so
    assert str(preemption) == preemption.signal_name == name
    assert signal.getsignal(getattr(signal, name)) == before


def test_a_signal_to_another_process_asks_to_stop():
    asked = []
    preemption = Preemption(lambda flag: asked.append(flag) or True)
    assert preemption.requested()
    assert asked == [False]
    assert str(preemption) == "a signal to another process"


def test_other_signals_are_left_alone():
    assert {signal.Signals(number).name for number in Preemption().handlers()} == {"SIGTERM", "SIGUSR1", "SIGINT"}


def test_a_second_interrupt_ends_at_once(capfd):
    preemption = Preemption()
    with signal_handlers(preemption.handlers()), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        assert "Interrupt again to end at once." in capfd.readouterr().err
        signal.raise_signal(signal.SIGINT)


def test_one_process_tells_what_an_interrupt_does(capfd):
    preemption = Preemption(quiet=True)
    with signal_handlers(preemption.handlers()):
        signal.raise_signal(signal.SIGINT)
    assert preemption.requested()
    assert capfd.readouterr().err == ""
