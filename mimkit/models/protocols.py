"""What a pre-training method expects of an encoder."""

from typing import Protocol

from torch import Tensor

from mimkit.units import Grid, UnitMask


class UnitEncoder(Protocol):
    """An encoder that computes only the units it is given."""

    unit_size: int  # side of a unit in pixels
    out_dim: int  # width of the latent
    num_prefix_tokens: int  # k: 0 for HiViT, 1 for a ViT with a class token

    def encode_units(self, units: Tensor, index: Tensor, grid: Grid) -> Tensor:
        """Pixels (b v c p p) at places (b v) of the grid (gh gw) -> (b k+v out_dim)"""


class MapEncoder(Protocol):
    """An encoder that computes the whole map, whose last stage has one token for each unit."""

    unit_size: int  # side of a unit in pixels: the stride of the last stage
    token_dim: int  # width of a mask token, that of the map after the stem
    out_dim: int  # width of the latent

    def encode_masked(self, images: Tensor, mask: UnitMask, token: Tensor) -> Tensor:
        """Images (b c H W), zero at masked places (b m); a token (token_dim) to put there -> latent (b n out_dim)"""
