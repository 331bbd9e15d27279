"""Mask units: an image is a sequence of units, and masking is choosing which of them to compute.

Axis letters, for the whole repository: b batch, n all units, v visible, m masked, gh gw the grid of units,
ih iw a place inside a unit, p the side of a unit in pixels, h heads, c channels of an image, d channels of a token.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from mimkit.errors import UserError

Grid = tuple[int, int]


class UnitMask(NamedTuple):
    """Places of units in the flattened grid: which ones are computed, and which ones are to be predicted."""

    visible: Tensor  # (b v), int64
    masked: Tensor  # (b m), int64


def unit_grid(height: int, width: int, unit_size: int) -> Grid:
    """The grid (gh gw) of an image; an error names the side that is no multiple of the unit."""
    if unit_size < 1:
        raise UserError(f"A mask unit of {unit_size} px is no unit: it needs at least 1 px.")
    for name, side in (("height", height), ("width", width)):
        if side < unit_size or side % unit_size:
            raise UserError(
                f"An image {name} of {side} px is not a multiple of the mask unit of {unit_size} px: "
                f"resize or pad it to {max(1, round(side / unit_size)) * unit_size} px, or choose another unit."
            )
    return height // unit_size, width // unit_size


def serialize(images: Tensor, unit_size: int) -> Tensor:
    """(b c H W) -> (b n c p p): units in row-major order."""
    gh, gw = unit_grid(images.shape[-2], images.shape[-1], unit_size)
    return rearrange(images, "b c (gh p) (gw q) -> b (gh gw) c p q", gh=gh, gw=gw)


def unserialize(units: Tensor, grid: Grid) -> Tensor:
    """(b n c p p), (gh gw) -> (b c H W): the inverse of `serialize`."""
    gh, gw = grid
    if units.shape[1] != gh * gw:
        raise UserError(f"{units.shape[1]} units do not fill a grid of {gh} x {gw} = {gh * gw}: pass their own grid.")
    return rearrange(units, "b (gh gw) c p q -> b c (gh p) (gw q)", gh=gh, gw=gw)


def _expand(index: Tensor, like: Tensor) -> Tensor:
    """(b v) -> (b v ...) with the trailing axes of `like`, without copying."""
    return index.reshape(*index.shape, *[1] * (like.ndim - 2)).expand(-1, -1, *like.shape[2:])


def gather(x: Tensor, index: Tensor) -> Tensor:
    """(b n ...), (b v) -> (b v ...): the units at these places. A batch axis of 1 in x serves every row of index."""
    x = x.expand(index.shape[0], *x.shape[1:])
    return torch.gather(x, 1, _expand(index, x))


def scatter(base: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """(b n ...), (b v), (b v ...) -> (b n ...): a copy of base with the values at these places."""
    return torch.scatter(base, 1, _expand(index, values), values.to(base.dtype))


def replace_masked(x: Tensor, masked: Tensor, grid: Grid, token: Tensor) -> Tensor:
    """Map (b h w d), places (b m) of the grid (gh gw), token (d) -> the map with the token all over masked units"""
    gh, gw = grid
    flags = torch.zeros(len(x), gh * gw, dtype=torch.bool, device=x.device).scatter(1, masked, True)
    units = rearrange(x, "b (gh i) (gw j) d -> b gh i gw j d", gh=gh, gw=gw)
    hidden = torch.where(rearrange(flags, "b (gh gw) -> b gh 1 gw 1 1", gh=gh), token.to(x.dtype), units)
    return rearrange(hidden, "b gh i gw j d -> b (gh i) (gw j) d")


def sample_mask(
    b: int,
    n: int,
    ratio: float,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> UnitMask:
    """Mask a share `ratio` of n units at random, each image on its own (MAE, section 3).

    The units with the least noise (b n) stay visible, as many as floor(n (1 - ratio)). Both index tensors run in the
    order of the noise, which is random, so any leading part of `masked` is a random part of it.
    """
    if noise is None:
        noise = torch.rand(b, n, generator=generator, device=generator.device if generator else None)
    if tuple(noise.shape) != (b, n):
        raise UserError(
            f"Mask noise of shape {tuple(noise.shape)} does not fit {b} images of {n} units: pass ({b}, {n})."
        )
    v = int(n * (1 - ratio) + 1e-6) if 0 <= ratio <= 1 else 0  # 10 * (1 - .9) is .999...: a whole unit all the same
    if v < 1:
        raise UserError(
            f"A mask ratio of {ratio} leaves {v} of {n} units visible: at least 1 is needed; "
            f"use a ratio between 0 and {1 - 1 / n:.3f}, or a larger image."
        )
    order = noise.argsort(dim=1)
    return UnitMask(visible=order[:, :v], masked=order[:, v:])
