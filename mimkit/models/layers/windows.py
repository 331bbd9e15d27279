"""Windows of a map that blocks attend in, for large images: one rule for HiViT, HPViT and plain ViTs.

All but the last block of each quarter attend in windows (Li et al., "Exploring plain vision transformer backbones for
object detection", ECCV 2022). They follow the grid: as few as do for it, of equal sides, padded at the right and
bottom. Here k is the number of prefix tokens, m that of windows and h w the sides of one.
"""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from timm.models import checkpoint
from torch import Tensor

from mimkit.errors import UserError
from mimkit.units import Grid


def global_blocks(depth: int, window: int) -> Collection[int]:
    """Which of so many blocks attend to the whole map: all of them without windows."""
    if window < 0:
        raise UserError(f"window {window} is negative: give the largest side of a window, or 0 for none.")
    return [depth * (i + 1) // 4 - 1 for i in range(4)] if window else range(depth)


def window_sides(grid: Grid, window: int) -> Grid:
    """Sides (h w) of windows no larger than `window`; those of the grid where one is enough, or for 0."""
    if not window:
        return grid
    counts = [-(-side // window) for side in grid]
    return -(-grid[0] // counts[0]), -(-grid[1] // counts[1])


def cut(maps: Tensor, sides: Grid) -> Tensor:
    """Maps (b gh gw d) -> windows of these sides (b m h*w d), padded with zeros at the right and bottom"""
    h, w = sides
    maps = F.pad(maps, (0, 0, 0, -maps.shape[2] % w, 0, -maps.shape[1] % h))
    return rearrange(maps, "b (n h) (m w) d -> b (n m) (h w) d", h=h, w=w)


def into_windows(x: Tensor, grid: Grid, sides: Grid, prefix: int = 0) -> tuple[Tensor, Tensor | None]:
    """Tokens (b k+n d) of a grid -> each window with the prefix tokens (b*m k+h*w d), and what to add to attention so
    that no token looks at padding (b*m 1 1 k+h*w), if there is any"""
    if sides == grid:
        return x, None
    windows = cut(rearrange(x[:, prefix:], "b (h w) d -> b h w d", h=grid[0]), sides)
    copies = repeat(x[:, :prefix], "b k d -> b m k d", m=windows.shape[1])
    tokens = torch.cat([copies, windows], dim=2).flatten(0, 1)
    if not (grid[0] % sides[0] or grid[1] % sides[1]):
        return tokens, None
    padding = F.pad(1 - cut(x.new_ones(1, *grid, 1), sides)[0, :, :, 0], (prefix, 0))
    return tokens, repeat(padding, "m n -> (b m) 1 1 n", b=x.shape[0]) * torch.finfo(x.dtype).min


def out_of_windows(x: Tensor, grid: Grid, sides: Grid, prefix: int = 0) -> Tensor:
    """The way back, (b*m k+h*w d) -> (b k+n d); a prefix token is the mean of its copies"""
    if sides == grid:
        return x
    n, m = -(-grid[0] // sides[0]), -(-grid[1] // sides[1])
    x = rearrange(x, "(b m) n d -> b m n d", m=n * m)
    maps = rearrange(x[:, :, prefix:], "b (n m) (h w) d -> b (n h) (m w) d", n=n, h=sides[0])
    return torch.cat([x[:, :, :prefix].mean(1), maps[:, : grid[0], : grid[1]].flatten(1, 2)], dim=1)


def windowed_map(vit: Any, x: Tensor, window: int) -> Tensor:
    """(b c H W) -> the map (b d gh gw) after the last block of a timm VisionTransformer, in windows

    What its `forward_intermediates` does; but that tells blocks no grid, which they need here, also when they are
    computed anew in the backward pass.
    """
    k, grid = vit.num_prefix_tokens, vit.patch_embed.dynamic_feat_size(x.shape[-2:])
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    whole = global_blocks(len(vit.blocks), window)
    for i, block in enumerate(vit.blocks):
        sides = grid if i in whole else window_sides(grid, window)
        x, mask = into_windows(x, grid, sides, k)
        run = partial(checkpoint, block) if vit.grad_checkpointing else block
        x = out_of_windows(run(x, attn_mask=mask), grid, sides, k)
    return rearrange(x[:, k:], "b (h w) d -> b d h w", h=grid[0])
