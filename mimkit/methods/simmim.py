"""SimMIM: replace masked units by mask tokens, compute the whole map, and predict the masked pixels.

Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", CVPR 2022. It is for networks that cannot skip
units.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mimkit.errors import UserError
from mimkit.methods.protocols import Output
from mimkit.methods.targets import Pixels
from mimkit.models.protocols import MapEncoder
from mimkit.units import UnitMask, gather, replace_masked, sample_mask, serialize, unit_grid


class PixelHead(nn.Module):
    """The mask token, and a linear layer from the latent of a unit to its pixels.

    The layer is SimMIM's 1 x 1 convolution and pixel shuffle, computed for masked units only.

    Args:
        in_dim, unit_size, token_dim: `out_dim`, `unit_size` and `token_dim` of the encoder.
        in_chans: number of channels of the images.
    """

    def __init__(self, in_dim: int, unit_size: int, token_dim: int, in_chans: int = 3):
        super().__init__()
        self.config = {"in_dim": in_dim, "unit_size": unit_size, "token_dim": token_dim, "in_chans": in_chans}
        self.mask_token = nn.Parameter(torch.zeros(token_dim))
        self.pred = nn.Linear(in_dim, unit_size**2 * in_chans)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Latent (b m in_dim) -> pixels (b m p*q*c)"""
        return self.pred(x)

    def no_weight_decay(self) -> set[str]:
        """Exempt the mask token from weight decay."""
        return {"mask_token"}


class SimMIM(nn.Module):
    """Masked image modeling of a network that cannot skip units.

    Args:
        encoder: any `MapEncoder`: an SViT, or a timm Swin as `MaskedSwin`.
        decoder: `PixelHead(encoder.out_dim, encoder.unit_size, encoder.token_dim, ...)`.
        mask_ratio: fraction of units to mask.

    Raises:
        UserError: if the encoder cannot take mask tokens, the head does not fit it, or the ratio is out of range.
    """

    norm_targets = False  # it predicts pixels as the network sees them (SimMIM, section 3.4)
    target = Pixels(norm=False)

    def __init__(self, encoder: MapEncoder, decoder: PixelHead, mask_ratio: float = 0.6):
        super().__init__()
        if not hasattr(encoder, "encode_masked"):
            raise UserError(
                f"{type(encoder).__name__} has no encode_masked. Pass an SViT, or mimkit.models.swin.MaskedSwin(swin)."
            )
        expected = (encoder.out_dim, encoder.unit_size, encoder.token_dim)
        if (built := tuple(decoder.config.values())[:3]) != expected:
            raise UserError(f"The head is PixelHead{built}, but the encoder needs PixelHead{expected}. Build that one.")
        if not 0 < mask_ratio < 1:
            raise UserError(f"mask_ratio is {mask_ratio}. It must lie between 0 and 1.")
        self.encoder, self.decoder, self.mask_ratio = encoder, decoder, mask_ratio

    @property
    def config(self) -> dict[str, Any]:
        """Keyword arguments that rebuild the method around its encoder and head."""
        return {"mask_ratio": self.mask_ratio}

    def forward(self, images: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Output:
        """Images (b c H W); mask noise (b n), or its generator -> L1 loss (), prediction (b m p*q*c), units

        Raises:
            UserError: if a side of the images is no multiple of the unit size, or the head has other channels.
        """
        p = self.encoder.unit_size
        grid = unit_grid(images.shape[-2], images.shape[-1], p)
        mask = sample_mask(len(images), grid[0] * grid[1], self.mask_ratio, generator, noise)
        mask = UnitMask(mask.visible.to(images.device), mask.masked.to(images.device))
        target = self.target(images, serialize(images, p), mask.masked)
        # masked pixels must not reach the network: an overlapping stem would mix them into the next unit
        zeros = images.new_zeros(images.shape[1])
        visible = replace_masked(rearrange(images, "b c h w -> b h w c"), mask.masked, grid, zeros)
        latent = self.encoder.encode_masked(rearrange(visible, "b h w c -> b c h w"), mask, self.decoder.mask_token)
        prediction = self.decoder(gather(latent, mask.masked))
        if prediction.shape != target.shape:
            raise UserError(
                f"The head predicts {prediction.shape[-1]} values per unit, but the target has {target.shape[-1]}. "
                f"Build it with in_chans={images.shape[1]}."
            )
        loss = (prediction.float() - target).abs().mean()
        return Output(loss, prediction, mask)
