"""Parameter groups, schedules and precision."""

import numpy as np
import pytest
import timm
import torch

from mimkit.errors import UserError
from mimkit.training import precision
from mimkit.training.optim import adamw, cosine, multistep, poly
from mimkit.training.precision import resolve_precision, seconds_of

SECONDS = seconds_of  # the fixture of conftest.py replaces it


def test_parameter_groups_and_schedule():
    model = timm.create_model("hivit_nano", img_size=32, patch_size=1)
    optimizer = adamw(model, 1.0, 0.05, (0.9, 0.95))
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    not_decayed = {names[id(p)] for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]}
    assert decayed | not_decayed == set(names.values())
    assert "blocks.4.attn.qkv.weight" in decayed
    assert {"absolute_pos_embed", "blocks.4.attn.relative_position_bias_table", "head.bias"} <= not_decayed
    expected = [s / 10 if s < 10 else 0.5 * (1 + np.cos(np.pi * (s - 10) / 90)) for s in range(100)]
    assert rates(cosine(optimizer, 100, 10), optimizer) == pytest.approx(expected, abs=1e-6)


def rates(schedule, optimizer):
    """The learning rate at each of a hundred steps."""
    found = []
    for step in range(100):
        schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.fixture
def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 1.0)


def test_linear_decay(optimizer):
    expected = [s / 10 if s < 10 else 1 - (s - 10) / 90 for s in range(100)]
    assert rates(poly(optimizer, 100, 10), optimizer) == pytest.approx(expected, abs=1e-6)


def test_drops_at_steps(optimizer):
    expected = [s / 10 if s < 10 else 1 if s < 60 else 0.1 if s < 80 else 0.01 for s in range(100)]
    assert rates(multistep(optimizer, 100, 10, [60, 80]), optimizer) == pytest.approx(expected, abs=1e-6)
    for at in ([80, 60], [60, 60], [5], [100]):
        with pytest.raises(UserError, match=r"cannot drop at steps \[.*Pass increasing --drop-epochs between the two."):
            multistep(optimizer, 100, 10, at)


def test_a_warmup_that_fills_the_run_is_refused(optimizer):
    message = "A warm-up of 100 steps fills the whole run of 100 steps. Pass fewer --warmup-epochs or more --epochs."
    for schedule in (cosine, poly):
        with pytest.raises(UserError, match=message.replace(".", r"\.")):
            schedule(optimizer, 100, 100)


def test_precision_is_what_the_device_computes_fast(monkeypatch):
    assert resolve_precision("bf16") == "bf16"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert 0 < SECONDS(torch.bfloat16) < 1
    for bf16, expected in [(1, "bf16"), (3, "fp32")]:
        monkeypatch.setattr(precision, "seconds_of", {torch.float32: 2, torch.bfloat16: bf16}.get)
        assert resolve_precision("auto") == expected
    for cuda, capability, expected in [(False, None, "fp32"), (True, (7, 5), "fp16"), (True, (9, 0), "bf16")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert resolve_precision("auto") == expected
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert resolve_precision("auto") == "fp32"
    with pytest.raises(UserError, match=r"--precision fp8 is unknown. Choose auto, fp32, bf16 or fp16"):
        resolve_precision("fp8")
