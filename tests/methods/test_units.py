"""Mask units: serialization, gathering, random masks, and grids."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimkit.errors import UserError
from mimkit.models import UnitViT
from mimkit.units import gather, one_grid, sample_mask, scatter, serialize, unserialize

sizes = st.integers(1, 5)


@given(b=st.integers(1, 3), c=st.integers(1, 5), gh=sizes, gw=sizes, p=sizes)
@settings(max_examples=50, deadline=None)
def test_unserialize_inverts_serialize(b, c, gh, gw, p):
    images = torch.randn(b, c, gh * p, gw * p)
    units = serialize(images, p)
    assert units.shape == (b, gh * gw, c, p, p)
    assert torch.equal(
        units[:, gw * (gh - 1)], images[:, :, -p:, :p]
    )  # row-major order: the first unit of the last row
    assert torch.equal(unserialize(units, (gh, gw)), images)


@given(gh=sizes, gw=sizes, p=st.integers(2, 8), extra=st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_a_size_that_does_not_fit_is_refused_with_both_numbers(gh, gw, p, extra):
    side = gh * p + extra % p
    if side % p == 0:
        side += 1
    with pytest.raises(UserError, match=rf"height of {side} px .* unit of {p} px"):
        serialize(torch.zeros(1, 3, side, gw * p), p)
    with pytest.raises(UserError, match=rf"width of {side} px .* unit of {p} px"):
        serialize(torch.zeros(1, 3, gh * p, side), p)


def test_unserialize_refuses_another_grid():
    with pytest.raises(UserError, match="6 units do not fill a grid of 2 x 2"):
        unserialize(torch.zeros(1, 6, 3, 4, 4), (2, 2))


@given(b=st.integers(1, 4), n=st.integers(2, 40), ratio=st.floats(0, 0.95), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_a_mask_contains_each_unit_once_and_depends_on_its_seed(b, n, ratio, seed):
    if n * (1 - ratio) < 1:
        with pytest.raises(UserError, match=str(n)):
            sample_mask(b, n, ratio)
        return
    mask = sample_mask(b, n, ratio, torch.Generator().manual_seed(seed))
    both = torch.cat(mask, 1).sort(1).values
    assert torch.equal(both, torch.arange(n).expand(b, n))
    assert abs(mask.visible.shape[1] - n * (1 - ratio)) < 1
    again = sample_mask(b, n, ratio, torch.Generator().manual_seed(seed))
    assert torch.equal(mask.visible, again.visible)


def test_number_of_visible_units_and_order_of_noise():
    assert sample_mask(1, 196, 0.75).visible.shape[1] == 49
    assert sample_mask(1, 10, 0.9).visible.shape[1] == 1  # 10 * (1 - 0.9) is 0.999...
    noise = torch.tensor([[0.3, 0.1, 0.2, 0.9]])
    assert sample_mask(1, 4, 0.5, noise=noise).visible.tolist() == [[1, 2]]
    assert sample_mask(1, 4, 0.5, noise=noise).masked.tolist() == [[0, 3]]
    with pytest.raises(UserError, match=r"\(1, 5\)"):
        sample_mask(1, 5, 0.5, noise=noise)


@given(seed=st.integers(0, 99), n=st.integers(2, 12))
@settings(max_examples=30, deadline=None)
def test_scatter_inverts_gather(seed, n):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, n, 3, 4, generator=generator)
    index = sample_mask(2, n, 0.5, generator).visible
    picked = gather(x, index)
    assert torch.equal(picked[1, 0], x[1, index[1, 0]])
    assert torch.equal(scatter(torch.zeros_like(x), index, picked).count_nonzero(), picked.count_nonzero())
    assert torch.equal(scatter(x, index, picked), x)
    assert torch.equal(gather(x[:1], index)[1], x[0, index[1]])  # a batch of 1 serves every image


def test_one_grid_returns_a_tuple_unchanged_and_refuses_one_grid_per_image():
    assert one_grid((3, 5)) == (3, 5)
    with pytest.raises(UserError, match=r"shape \(2, 2\) holds one grid per image.*: pass one tuple \(gh, gw\)"):
        one_grid(torch.tensor([[3, 5], [4, 4]]))


@pytest.mark.parametrize("name", ["hivit_nano", "svit_nano", "vit_tiny_patch16_224"])
def test_unit_encoders_refuse_one_grid_per_image(name):
    if name.startswith("vit"):
        encoder = UnitViT(timm.create_model(name, embed_dim=32, depth=1, num_heads=2, img_size=64, num_classes=0))
    else:
        form = {"unit_form": True, "img_size": 64} if name.startswith("hivit") else {}
        encoder = timm.create_model(name, num_classes=0, **form)
    index, p = torch.tensor([[0, 2], [1, 3]]), encoder.unit_size
    units, side = torch.randn(2, 2, 3, p, p), 64 // p
    assert encoder.encode_units(units, index, (side, side)).shape == (2, encoder.num_prefix_tokens + 2, encoder.out_dim)
    with pytest.raises(UserError, match="one grid per image"):
        encoder.encode_units(units, index, torch.tensor([[side, side], [side, side]]))
