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
