"""Protocols: what a pre-training method expects of an encoder. An encoder inherits from neither of them."""

from typing import Protocol

from torch import Tensor

from mimkit.units import Grids, UnitMask


class UnitEncoder(Protocol):
    """An encoder that can skip units: it computes only those that it is given."""

    unit_size: int  # side of a unit in pixels
    out_dim: int  # width of the latent
    num_prefix_tokens: int  # k: 0 for HiViT, 1 for a ViT with a class token

    def encode_units(self, units: Tensor, index: Tensor, grid: Grids) -> Tensor:
        """Pixels (b v c p p), their places (b v) in the grid (gh gw) -> latent (b k+v out_dim)"""


class MapEncoder(Protocol):
    """An encoder that computes the whole map. Its last stage has one token for each unit."""

    unit_size: int  # side of a unit in pixels: the stride of the last stage
    token_dim: int  # width of a mask token: that of the map after the stem
    out_dim: int  # width of the latent

    def encode_masked(self, images: Tensor, mask: UnitMask, token: Tensor) -> Tensor:
        """Images (b c H W), zero in masked units (b m); a mask token (token_dim) -> latent (b n out_dim)"""
