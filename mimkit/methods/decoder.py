"""The light transformer that predicts masked units from the latent of the visible ones (MAE, section 3)."""

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mimkit.errors import UserError
from mimkit.models.layers.pos_embed import sincos_positions
from mimkit.units import Grid, UnitMask, gather


class Decoder(nn.Module):
    """A light transformer that maps the latent of visible units to the pixels of masked units.

    The sequence holds the prefix tokens (without a position), the visible units, and one mask token for each unit to
    predict. Attention does not depend on their order, so nothing is shuffled back, and units that are not predicted
    cost nothing.

    Args:
        in_dim: width of the encoder's latent, `encoder.out_dim`.
        unit_size, in_chans: side of a unit in pixels, and channels. A prediction has unit_size ** 2 * in_chans values
            in the layout (p q c).
        dim, depth, num_heads: 512, 8 and 16 in MAE. HiViT uses a depth of 6.

    Raises:
        UserError: if `dim` is not divisible by `num_heads` and 4.
    """

    def __init__(
        self, in_dim: int, unit_size: int, in_chans: int = 3, dim: int = 512, depth: int = 8, num_heads: int = 16
    ):
        super().__init__()
        if dim % num_heads or dim % 4:
            raise UserError(
                f"The decoder width of {dim} is not divisible by {num_heads} heads and by 4. Change --decoder-dim or "
                "--decoder-heads."
            )
        self.in_dim, self.unit_size, self.dim = in_dim, unit_size, dim
        self.config = {
            "in_dim": in_dim,
            "unit_size": unit_size,
            "in_chans": in_chans,
            "dim": dim,
            "depth": depth,
            "num_heads": num_heads,
        }
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(Block(dim, num_heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.norm = norm(dim)
        self.pred = nn.Linear(dim, unit_size**2 * in_chans)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, units: UnitMask, grid: Grid) -> Tensor:
        """Latent (b k+v in_dim), indices of visible (b v) and masked units (b m), grid (gh gw) -> pixels (b m p*q*c)"""
        positions = sincos_positions(self.dim, grid, latent.device)[None].to(self.mask_token.dtype)
        x = self.embed(latent)
        v, m = units.visible.shape[1], units.masked.shape[1]
        visible = x[:, -v:] + gather(positions, units.visible)
        masked = self.mask_token + gather(positions, units.masked)
        x = torch.cat([x[:, :-v].to(visible.dtype), visible, masked.to(visible.dtype)], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x[:, -m:]))

    def no_weight_decay(self) -> set[str]:
        """Exempt the mask token from weight decay."""
        return {"mask_token"}
