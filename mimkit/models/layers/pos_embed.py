"""Position embeddings."""

import torch
from torch import Tensor

from mimkit.units import Grid


def sincos_positions(dim: int, grid: Grid, device: torch.device | None = None) -> Tensor:
    """Compute MAE's fixed sine-cosine table (n d) for a grid (gh gw).

    The first half of the channels encodes the column, the second half the row (MAE, He et al., CVPR 2022).
    """
    frequencies = 10000 ** -(torch.arange(dim // 4, device=device) / (dim / 4))
    rows, columns = torch.meshgrid(*(torch.arange(side, device=device) for side in grid), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (columns, rows)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)


def is_sincos(table: Tensor) -> bool:
    """Return whether a table (1 n d) is `sincos_positions` of some grid, in any precision.

    A first row of zeros is allowed, which MAE stores for the class token.
    """
    if table.ndim != 3 or table.shape[-1] % 4:
        return False
    rows = table[0].float()
    for cells in (rows, rows[1:]) if rows[:1].count_nonzero() == 0 else (rows,):
        n, dim = cells.shape
        grids = [(n // width, width) for width in range(1, n + 1) if n % width == 0]
        if any(torch.allclose(cells, sincos_positions(dim, grid), rtol=0, atol=1e-2) for grid in grids):
            return True
    return False
