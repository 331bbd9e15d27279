"""Mask units: an image is a sequence of units, and masking is choosing which units to compute.

Axis letters, used throughout the repository: b batch, n all units, v visible units, m masked units, gh gw grid of
units, ih iw position inside a unit, p side of a unit in pixels, h heads, c image channels, d token channels.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from mimkit.errors import UserError

Grid = tuple[int, int]
Grids = Grid | Tensor  # one grid for the batch, or (b 2): one for each image


class UnitMask(NamedTuple):
    """Indices into the flattened grid: the units that are computed and the units that are predicted."""

    visible: Tensor  # (b v), int64
    masked: Tensor  # (b m), int64


def one_grid(grid: Grids) -> Grid:
    """Return the grid (gh gw) that all images of a batch share.

    Raises:
        UserError: `grid` is a tensor (b 2) with one grid per image, which no network supports yet.
    """
    if isinstance(grid, Tensor):
        raise UserError(
            f"A grid tensor of shape {tuple(grid.shape)} holds one grid per image, which no network supports yet: "
            "pass one tuple (gh, gw) for the whole batch."
        )
    return grid


def unit_grid(height: int, width: int, unit_size: int) -> Grid:
    """Return the grid (gh gw) of an image.

    Raises:
        UserError: a side of the image is not a multiple of the unit size. The message names the side.
    """
    if unit_size < 1:
        raise UserError(f"A mask unit of {unit_size} px is too small: use a unit size of at least 1 px.")
    for name, side in (("height", height), ("width", width)):
        if side < unit_size or side % unit_size:
            raise UserError(
                f"An image {name} of {side} px is not a multiple of the mask unit of {unit_size} px: "
                f"resize or pad it to {max(1, round(side / unit_size)) * unit_size} px, or choose another unit size."
            )
    return height // unit_size, width // unit_size


def serialize(images: Tensor, unit_size: int) -> Tensor:
    """Cut images into units in row-major order: (b c H W) -> (b n c p p)."""
    gh, gw = unit_grid(images.shape[-2], images.shape[-1], unit_size)
    return rearrange(images, "b c (gh p) (gw q) -> b (gh gw) c p q", gh=gh, gw=gw)


def unserialize(units: Tensor, grid: Grid) -> Tensor:
    """Assemble images from all their units, the inverse of `serialize`: (b n c p p) -> (b c H W)."""
    gh, gw = grid
    if units.shape[1] != gh * gw:
        raise UserError(
            f"{units.shape[1]} units do not fill a grid of {gh} x {gw} = {gh * gw}: pass the grid they were cut from."
        )
    return rearrange(units, "b (gh gw) c p q -> b c (gh p) (gw q)", gh=gh, gw=gw)


def _expand_index(index: Tensor, like: Tensor) -> Tensor:
    """Give an index (b v) the trailing axes of `like` without copying: (b v) -> (b v ...)."""
    return index.reshape(*index.shape, *[1] * (like.ndim - 2)).expand(-1, -1, *like.shape[2:])


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Select units by index: x (b n ...), index (b v) -> (b v ...). An x with a batch of 1 serves every image."""
    x = x.expand(index.shape[0], *x.shape[1:])
    return torch.gather(x, 1, _expand_index(index, x))


def scatter(base: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Copy `base` with the units at `index` replaced: base (b n ...), index (b v), values (b v ...) -> (b n ...)."""
    return torch.scatter(base, 1, _expand_index(index, values), values.to(base.dtype))


def replace_masked(x: Tensor, masked: Tensor, grid: Grid, token: Tensor) -> Tensor:
    """Fill the masked units of a map with a mask token: (b h w d) -> (b h w d).

    Args:
        x: map (b h w d), whose sides are multiples of the grid's.
        masked: indices (b m) of masked units.
        grid: grid of units (gh gw).
        token: mask token (d).
    """
    gh, gw = grid
    flags = torch.zeros(len(x), gh * gw, dtype=torch.bool, device=x.device).scatter(1, masked, True)
    units = rearrange(x, "b (gh i) (gw j) d -> b gh i gw j d", gh=gh, gw=gw)
    replaced = torch.where(rearrange(flags, "b (gh gw) -> b gh 1 gw 1 1", gh=gh), token.to(x.dtype), units)
    return rearrange(replaced, "b gh i gw j d -> b (gh i) (gw j) d")


def sample_mask(
    b: int,
    n: int,
    ratio: float,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> UnitMask:
    """Mask a fraction `ratio` of n units at random, independently for each image (MAE, section 3).

    The floor(n (1 - ratio)) units with the smallest noise stay visible. Both index tensors are sorted by noise, so
    their order is random, and the first k entries of `masked` are a random subset of the masked units.

    Args:
        b: number of images.
        n: number of units in an image.
        ratio: fraction of units to mask, from 0 to 1.
        generator: source of the noise, where none is passed.
        noise: random numbers (b n) to sort units by.

    Raises:
        UserError: the ratio leaves no unit visible, or the noise has another shape.
    """
    if noise is None:
        noise = torch.rand(b, n, generator=generator, device=generator.device if generator else None)
    if tuple(noise.shape) != (b, n):
        raise UserError(
            f"Mask noise of shape {tuple(noise.shape)} does not fit {b} images of {n} units: pass shape ({b}, {n})."
        )
    v = int(n * (1 - ratio) + 1e-6) if 0 <= ratio <= 1 else 0  # 10 * (1 - 0.9) is 0.999..., which counts as 1 unit
    if v < 1:
        raise UserError(
            f"A mask ratio of {ratio} leaves {v} of {n} units visible, but at least 1 is needed: "
            f"use a ratio between 0 and {1 - 1 / n:.3f}, or a larger image."
        )
    order = noise.argsort(dim=1)
    return UnitMask(visible=order[:, :v], masked=order[:, v:])
