import random

import numpy as np
import torch
from conftest import viewer

from mimkit.data.loader import train_loader
from mimkit.data.order import Plan
from mimkit.data.sample import seeded
from mimkit.data.sources import open_source
from mimkit.data.transforms import Normalize


def test_sample_depends_on_seed_epoch_and_index_only(folder):
    source = open_source(str(folder))
    row = source.rows[3]
    first = viewer(source)(row, 2, 3)
    torch.rand(100)
    random.random()
    again = viewer(source)(row, 2, 3)
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.noise, again.noise)
    for other in (viewer(source, seed=1)(row, 2, 3), viewer(source)(row, 1, 3), viewer(source)(row, 2, 4)):
        assert not torch.equal(first.noise, other.noise)
        assert not torch.equal(first.image, other.image)


def test_seeded_equals_seeding_by_the_usual_calls():
    """Runs of earlier versions, which used the usual calls, must resume with the same numbers."""
    words = np.random.SeedSequence((1, 2, 3)).generate_state(3)
    with seeded(1, 2, 3):
        drawn = random.random(), np.random.rand(5), np.random.randn(3), torch.rand(1)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))
    assert random.random() == drawn[0]
    assert np.array_equal(np.random.rand(5), drawn[1])
    assert np.array_equal(np.random.randn(3), drawn[2])
    assert torch.equal(torch.rand(1), drawn[3])


def test_seeded_restores_the_generators():
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    with seeded(1, 2, 3):
        torch.rand(3), random.random(), np.random.rand()
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


def test_uint8_and_float32_arrays_in_one_batch(tmp_path):
    np.save(tmp_path / "a.npy", np.full((5, 8, 8), 255, np.uint8))
    np.save(tmp_path / "b.npy", np.full((5, 8, 8), 1.0, np.float32))
    source = open_source(str(tmp_path))
    batch = next(iter(train_loader(source, viewer(source, in_chans=5), Plan(2, 2, 1), 0)))
    assert torch.allclose(batch.images, torch.ones(2, 5, 16, 16))


def test_arrays_with_five_channels_become_a_batch(tmp_path):
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", np.random.default_rng(i).random((5, 20, 24), dtype=np.float32))
    source = open_source(str(tmp_path))
    plan = Plan(4, 4, 1)
    batch = next(iter(train_loader(source, viewer(source, in_chans=5), plan, 0)))
    assert batch.images.shape == (4, 5, 16, 16)
    assert batch.images.dtype == torch.float32
    assert Normalize([0.5] * 5, [0.25] * 5)(batch.images).shape == (4, 5, 16, 16)
