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
    """Latent + mask tokens -> pixels of the masked units.

    The sequence is the prefix tokens (position zero), the visible units and one mask token for each unit to predict;
    attention does not mind their order, so nothing is shuffled back, and a unit nobody asks for costs nothing.

    Args:
        in_dim: width of the encoder's latent, `encoder.out_dim`.
        unit_size, in_chans: what a prediction has: unit_size ** 2 * in_chans values, laid out (p q c).
        dim, depth, num_heads: 512, 8, 16 in MAE; HiViT takes a depth of 6.
    """

    def __init__(
        self, in_dim: int, unit_size: int, in_chans: int = 3, dim: int = 512, depth: int = 8, num_heads: int = 16
    ):
        super().__init__()
        if dim % num_heads or dim % 4:
            raise UserError(
                f"A decoder of width {dim} does not divide into {num_heads} heads and 4 sin-cos parts: change it."
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
        """(b k+v in_dim), places (b v) and (b m) of the grid (gh gw) -> (b m p*q*c)"""
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
        """The mask token."""
        return {"mask_token"}
