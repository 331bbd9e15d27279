"""Recognize tensors that files hold although a network computes them from its size."""

import math

import torch
from timm.models.beit import gen_relative_position_index
from torch import Tensor


def is_identity_kernel(weights: Tensor) -> bool:
    """Return whether a kernel (n 1 k k) copies the n = k x k neighbors of a position into n channels."""
    n = weights.shape[0] if weights.ndim == 4 else 0
    return n > 0 and torch.equal(weights.flatten(1), torch.eye(n, dtype=weights.dtype))


def is_relative_index(index: Tensor) -> bool:
    """Return whether an index (n n) into a relative position table is Swin's, or BEiT's if n has a class token."""
    n = index.shape[0] if index.ndim == 2 else 0
    side = math.isqrt(n)
    return n > 0 and torch.equal(index.long(), gen_relative_position_index((side, side))[-n:, -n:])


def is_range(index: Tensor) -> bool:
    """Return whether an index holds 0, 1, 2, ... ."""
    return torch.equal(index.flatten().long(), torch.arange(index.numel()))


def is_key_mask(mask: Tensor) -> bool:
    """Return whether the mask (3d) of a bias of q, k and v leaves out that of k."""
    thirds = mask.new_tensor([1, 0, 1]).repeat_interleave(mask.numel() // 3)
    return torch.equal(mask, thirds)


def is_rope_periods(periods: Tensor) -> bool:
    """Return whether RoPE's periods (n) are DINOv3's, 1 to 100 in geometric steps, in any precision."""
    expected = 100 ** (torch.arange(periods.numel()) / max(periods.numel(), 1))
    return periods.shape == expected.shape and torch.allclose(periods.float(), expected, rtol=2e-2)
