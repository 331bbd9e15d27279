"""Masked autoencoding: choose units, encode the visible ones, predict the others.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, over any encoder that can skip units.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from mimkit.errors import UserError
from mimkit.methods.decoder import Decoder
from mimkit.models.protocols import UnitEncoder
from mimkit.units import UnitMask, gather, sample_mask, serialize, unit_grid


class MAEOutput(NamedTuple):
    """What a pre-training step gives."""

    loss: Tensor  # ()
    prediction: Tensor  # (b m p*q*c), of the units in `units.masked`; normalized where the targets are
    units: UnitMask  # what was seen, and what was predicted


def pixels(units: Tensor) -> Tensor:
    """(b m c p q) -> (b m p*q*c), the layout of predictions."""
    return rearrange(units, "b m c p q -> b m (p q c)")


def normalize_units(target: Tensor) -> Tensor:
    """Each unit (b m x) with mean 0 and variance 1 (MAE, section 4)."""
    var, mean = torch.var_mean(target, dim=-1, keepdim=True)
    return (target - mean) / (var + 1e-6).sqrt()


class MAE(nn.Module):
    """Masked autoencoder.

    Args:
        encoder: any `UnitEncoder`: a HiViT in its unit form, a `UnitViT`.
        decoder: `Decoder(encoder.out_dim, encoder.unit_size, ...)`.
        mask_ratio: share of the units that is masked.
        norm_targets: predict units normalized one by one.
        decode_ratio: predict only this share of the masked units, a random one; 1.0 predicts them all.
    """

    def __init__(
        self,
        encoder: UnitEncoder,
        decoder: Decoder,
        mask_ratio: float = 0.75,
        norm_targets: bool = True,
        decode_ratio: float = 1.0,
    ):
        super().__init__()
        if not hasattr(encoder, "encode_units"):
            raise UserError(
                f"{type(encoder).__name__} has no encode_units and cannot skip units: pass a HiViT built with "
                "unit_form=True, an SViT, or wrap a plain timm VisionTransformer as mimkit.models.vit.UnitViT(vit)."
            )
        if decoder.in_dim != encoder.out_dim:
            raise UserError(
                f"The decoder takes {decoder.in_dim} channels and the encoder gives {encoder.out_dim}: "
                f"build it as Decoder({encoder.out_dim}, ...)."
            )
        if decoder.unit_size != encoder.unit_size:
            raise UserError(
                f"The decoder predicts units of {decoder.unit_size} px and the encoder's have {encoder.unit_size} px: "
                f"build it as Decoder({encoder.out_dim}, {encoder.unit_size}, ...)."
            )
        for name, share, ok in (
            ("mask_ratio", mask_ratio, 0 < mask_ratio < 1),
            ("decode_ratio", decode_ratio, 0 < decode_ratio <= 1),
        ):
            if not ok:
                raise UserError(f"{name} is {share}: it must lie between 0 and 1.")
        self.encoder, self.decoder = encoder, decoder
        self.mask_ratio, self.norm_targets, self.decode_ratio = mask_ratio, norm_targets, decode_ratio

    def forward(
        self, images: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> MAEOutput:
        """Images (b c H W); mask noise (b n), or its generator -> loss (), prediction (b m p*q*c), units"""
        p = self.encoder.unit_size
        grid = unit_grid(images.shape[-2], images.shape[-1], p)
        mask = sample_mask(len(images), grid[0] * grid[1], self.mask_ratio, generator, noise)
        decoded = max(1, round(mask.masked.shape[1] * self.decode_ratio))
        mask = UnitMask(mask.visible.to(images.device), mask.masked[:, :decoded].to(images.device))

        units = serialize(images, p)
        latent = self.encoder.encode_units(gather(units, mask.visible), mask.visible, grid)
        prediction = self.decoder(latent, mask, grid)
        target = pixels(gather(units, mask.masked))
        if prediction.shape != target.shape:
            c, values = images.shape[1], prediction.shape[-1]
            raise UserError(
                f"The decoder predicts {values} values a unit, not {p} x {p} x {c}: build it with in_chans={c}."
            )
        if self.norm_targets:
            target = normalize_units(target)
        loss = (prediction.float() - target).square().mean()
        return MAEOutput(loss, prediction, mask)
