"""A skipped step is saved as it was, and replayed to find where its numbers stop being finite."""

import json
import math
import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from two_parameters import batch, train_state, weights

from mimkit.data.sample import Batch
from mimkit.errors import UserError
from mimkit.training.distributed import Engine
from mimkit.training.replay import (
    Tracer,
    all_finite,
    flatten,
    load_batches,
    read_about,
    replay_step,
    save_batch,
    save_weights,
    unflatten,
)

# Nested tensors ------------------------------------------------------------------------------------------------------

tensors = st.lists(st.integers(1, 3), max_size=3).map(lambda shape: torch.rand(shape))
names = st.text(string.ascii_lowercase + "_", min_size=1, max_size=5)
nests = st.recursive(
    tensors,
    lambda inner: st.lists(inner, min_size=1, max_size=12) | st.dictionaries(names, inner, min_size=1, max_size=4),
    max_leaves=30,
)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))


@given(nests)
def test_nested_tensors_are_rebuilt(nest):
    assert equal(nest, unflatten(flatten(nest)))


def test_names_lead_to_the_tensors():
    nest = {"images": torch.ones(2), "labels": [{"boxes": torch.zeros(1, 4)}, {"boxes": torch.zeros(0, 4)}]}
    assert list(flatten(nest)) == ["images", "labels.0.boxes", "labels.1.boxes"]
    flat = flatten(nest)["images"]
    nest["images"].zero_()
    assert flat.sum() == 2  # a copy


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_batch_is_saved_as_it_was(tmp_path):
    """Also images of several sizes, with objects or none."""
    sizes, counts = [(20, 30), (16, 8), *[(9, 9)] * 9], [2, 0, *[1] * 9]
    images = [torch.rand(3, *size) for size in sizes]
    labels = [{"boxes": torch.rand(n, 4), "labels": torch.arange(n)} for n in counts]
    lists = Batch(images, torch.rand(11, 4), labels, [f"{i}.png" for i in range(11)], [("bad.png", "empty")])
    stacked = Batch(torch.rand(2, 3, 8, 8), torch.rand(2, 4), torch.tensor([1, 2]), ["a", "b"], [])
    for rank, micro_batches in enumerate(([lists, stacked], [stacked, stacked])):
        save_batch(tmp_path, rank, micro_batches)
    found = load_batches(tmp_path)
    assert [rank for rank, _ in found] == [0, 0, 1, 1]
    for (_, loaded), saved in zip(found, (lists, stacked, stacked, stacked), strict=True):
        torch.testing.assert_close(loaded[:3], saved[:3], rtol=0, atol=0)
        assert loaded[3:] == saved[3:]
    assert not torch.equal(found[0][1].images[2], images[3])


def test_ranks_are_in_their_order(tmp_path):
    for rank in (10, 9, 2):
        save_batch(tmp_path, rank, [batch(rank)])
    assert [(rank, found.names[0]) for rank, found in load_batches(tmp_path)] == [
        (2, "2-0.png"),
        (9, "9-0.png"),
        (10, "10-0.png"),
    ]


def test_names_that_do_not_match_the_images_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no batch to replay. Pass RUN/replay/step-N"):
        load_batches(tmp_path)
    save_batch(tmp_path, 0, [])
    (tmp_path / "rank-0/names.json").write_text('{"names": [[]], "bad": []}')
    message = r"rank-0 has names and images that do not match \(.*\). Get another copy."
    with pytest.raises(UserError, match=message):
        load_batches(tmp_path)
    for name in ("0", "0.images", "0.images.1.x", "x.images", ""):
        save_file({name: torch.ones(2)}, tmp_path / "rank-0/batch.safetensors")
        with pytest.raises(UserError, match=message):
            load_batches(tmp_path)


def test_what_is_known_about_a_step(tmp_path):
    with pytest.raises(UserError, match=r"is not a step to replay. Pass RUN/replay/step-N"):
        read_about(tmp_path)
    save_weights(tmp_path, nn.Linear(1, 1), "mae", 7, "its loss is not finite")
    assert read_about(tmp_path) == {"recipe": "mae", "step": 7, "reason": "its loss is not finite"}
    for content in ("{}", "[]", "x", '{"recipe": "mae"}', '{"recipe": 1, "step": 1, "reason": "x"}'):
        (tmp_path / "about.json").write_text(content)
        with pytest.raises(UserError, match=r"about.json .*\. Get another copy of it\.$"):
            read_about(tmp_path)


# Tracing -------------------------------------------------------------------------------------------------------------


class Log(nn.Module):
    def forward(self, x):
        return x.log()


@pytest.fixture
def traced():
    """A network whose logarithm is not finite for images of zeros, and its tracer."""
    network = nn.Sequential(nn.Linear(1, 1, bias=False), Log(), nn.Linear(1, 1))
    for parameter in network.parameters():
        nn.init.ones_(parameter)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    tracer = Tracer(network, optimizer)

    def step(*values):
        loss = network(torch.tensor(values)[:, None]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return tracer, step


def report(tracer, loss, images):
    found = Batch(images, torch.rand(len(images), 1), torch.arange(len(images)), list("abc")[: len(images)], [])
    return tracer.report([loss], [found]).splitlines()


def test_tracer_finds_the_first_output_that_is_not_finite(traced):
    tracer, step = traced
    loss = step(1.0, 0.0)
    assert tracer.first == "1 (Log)"
    lines = report(tracer, loss, torch.tensor([[1.0, 2.0], [0.0, 0.5]]))
    assert lines[:3] == ["loss -inf of 2 images:", "  a: 1 to 2", "  b: 0 to 0.5"]
    assert lines[3] == "first output that is not finite: 1 (Log)"
    assert lines[4] == "gradients that are not finite: 0.weight, 2.weight"
    assert lines[5] == "largest gradients: 2.bias 2, 0.weight nan, 2.weight inf"


def test_tracer_finds_nothing_in_a_good_step(traced):
    tracer, step = traced
    lines = report(tracer, step(math.e, 1.0), torch.ones(2, 1))
    assert lines[0] == "loss 3 of 2 images:"
    assert lines[3:5] == ["first output that is not finite: none", "gradients that are not finite: none"]
    assert sorted(lines[5].removeprefix("largest gradients: ").split(", ")) == ["0.weight 2", "2.bias 2", "2.weight 1"]


def test_tracer_blames_the_images(traced):
    """A module whose inputs are not finite is not to blame."""
    tracer, step = traced
    loss = step(math.nan)
    assert tracer.first == ""
    assert "first output that is not finite: the images themselves" in report(tracer, loss, torch.tensor([[math.nan]]))


def test_all_finite_looks_into_nested_values():
    good, bad = torch.ones(2), torch.tensor([1.0, math.inf])
    assert all_finite([good, {"a": (good, None, "x")}])
    assert not all_finite([good, {"a": (good, bad)}])


def test_a_step_is_replayed_with_the_weights_and_the_seeds_of_before(tmp_path):
    saved = train_state()
    nn.init.constant_(saved.model.weight, 3.0)
    for rank in (0, 1):
        save_batch(tmp_path, rank, [batch(10 * rank), batch(10 * rank + 1)])
    save_weights(tmp_path, saved.model, "mae", 7, "its loss is not finite")
    state, engine, seeds, printed = train_state(), Engine(), [], []
    (micro_batches,) = [
        list(found) for found in _replayed(replay_step(tmp_path, state, engine, seeds.append, printed.append), state)
    ]
    assert weights(state) == weights(saved)
    assert seeds == [0, 1]
    assert engine.accelerator.gradient_accumulation_steps == 4  # one process computes the batches of both
    assert [found.names[0] for found in micro_batches] == ["0-0.png", "1-0.png", "10-0.png", "11-0.png"]
    assert printed[0] == "step 7 was skipped because its loss is not finite"
    assert printed[1].startswith("loss 0 of 2 images:\n  0-0.png: 0 to 0\n")
    assert "loss 11 of 2 images:\n  11-0.png: 11 to 11\n" in printed[1]


def _replayed(steps, state):
    """Each step's micro-batches, after a loss of each was observed."""
    for micro_batches in steps:
        found = list(micro_batches)
        for micro_batch in found:
            state.guard.observe(micro_batch.images.mean())
        yield found


def test_weights_of_another_network_are_refused(tmp_path):
    save_batch(tmp_path, 0, [batch(0)])
    save_weights(tmp_path, nn.Linear(1, 1, bias=False), "mae", 7, "its loss is not finite")
    with pytest.raises(UserError, match="bias"):
        next(replay_step(tmp_path, train_state(), Engine(), print, print))


def test_names_are_json(tmp_path):
    save_batch(tmp_path, 3, [batch(5)])
    assert json.loads((tmp_path / "rank-3" / "names.json").read_text()) == {
        "names": [["5-0.png", "5-1.png"]],
        "bad": [[]],
    }
