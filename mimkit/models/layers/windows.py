"""Window attention for large images, with one rule for HiViT, HPViT and plain ViTs.

The blocks are divided into four quarters. The last block of each quarter attends to the whole map, and all others
attend inside windows (Li et al., "Exploring plain vision transformer backbones for object detection", ECCV 2022).
The map is divided into as few windows as the largest side allows, all of equal size. It is padded at the right and
bottom where they do not fit. Axis letters here: k prefix tokens, m windows, h w sides of a window.
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
    """Return the indices of the blocks, among `depth`, that attend to the whole map: all of them for a window of 0."""
    if window < 0:
        raise UserError(f"window {window} is negative: give the largest side of a window, or 0 to disable windows.")
    return [depth * (i + 1) // 4 - 1 for i in range(4)] if window else range(depth)


def window_sides(grid: Grid, window: int) -> Grid:
    """Return the sides (h w) of the windows of a grid, each at most `window`; the grid itself for a window of 0."""
    if not window:
        return grid
    counts = [-(-side // window) for side in grid]
    return -(-grid[0] // counts[0]), -(-grid[1] // counts[1])


def cut_windows(maps: Tensor, sides: Grid) -> Tensor:
    """Cut maps into windows, with zero padding at the right and bottom: (b gh gw d) -> (b m h*w d)."""
    h, w = sides
    maps = F.pad(maps, (0, 0, 0, -maps.shape[2] % w, 0, -maps.shape[1] % h))
    return rearrange(maps, "b (n h) (m w) d -> b (n m) (h w) d", h=h, w=w)


def into_windows(x: Tensor, grid: Grid, sides: Grid, prefix: int = 0) -> tuple[Tensor, Tensor | None]:
    """Fold windows into the batch, each with a copy of the prefix tokens: (b k+n d) -> (b*m k+h*w d).

    Returns:
        The tokens, and a mask (b*m 1 1 k+h*w) to add to the attention logits so that no token attends to padding.
        The mask is None where there is no padding.
    """
    if sides == grid:
        return x, None
    windows = cut_windows(rearrange(x[:, prefix:], "b (h w) d -> b h w d", h=grid[0]), sides)
    copies = repeat(x[:, :prefix], "b k d -> b m k d", m=windows.shape[1])
    tokens = torch.cat([copies, windows], dim=2).flatten(0, 1)
    if not (grid[0] % sides[0] or grid[1] % sides[1]):
        return tokens, None
    padding = F.pad(1 - cut_windows(x.new_ones(1, *grid, 1), sides)[0, :, :, 0], (prefix, 0))
    return tokens, repeat(padding, "m n -> (b m) 1 1 n", b=x.shape[0]) * torch.finfo(x.dtype).min


def out_of_windows(x: Tensor, grid: Grid, sides: Grid, prefix: int = 0) -> Tensor:
    """Undo `into_windows`: (b*m k+h*w d) -> (b k+n d). A prefix token becomes the mean of its copies."""
    if sides == grid:
        return x
    n, m = -(-grid[0] // sides[0]), -(-grid[1] // sides[1])
    x = rearrange(x, "(b m) n d -> b m n d", m=n * m)
    maps = rearrange(x[:, :, prefix:], "b (n m) (h w) d -> b (n h) (m w) d", n=n, h=sides[0])
    return torch.cat([x[:, :, :prefix].mean(1), maps[:, : grid[0], : grid[1]].flatten(1, 2)], dim=1)


def windowed_map(vit: Any, x: Tensor, window: int) -> Tensor:
    """Run the blocks of a timm VisionTransformer in windows: (b c H W) -> last map (b d gh gw).

    timm's `forward_intermediates` does not pass the grid to the blocks. Windows need it, also when activations are
    recomputed in the backward pass, so the loop over blocks is written out here.
    """
    k, grid = vit.num_prefix_tokens, vit.patch_embed.dynamic_feat_size(x.shape[-2:])
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(x)))
    without_windows = global_blocks(len(vit.blocks), window)
    for i, block in enumerate(vit.blocks):
        sides = grid if i in without_windows else window_sides(grid, window)
        x, mask = into_windows(x, grid, sides, k)
        run = partial(checkpoint, block) if vit.grad_checkpointing else block
        x = out_of_windows(run(x, attn_mask=mask), grid, sides, k)
    return rearrange(x[:, k:], "b (h w) d -> b d h w", h=grid[0])
