"""Masked autoencoding (MAE): choose units at random, encode the visible ones, and predict the masked ones.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022. It works with any encoder that can skip units.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mimkit.errors import UserError
from mimkit.methods.decoder import Decoder
from mimkit.methods.protocols import Output
from mimkit.methods.targets import Pixels, Target
from mimkit.models.protocols import UnitEncoder
from mimkit.units import UnitMask, gather, sample_mask, serialize, unit_grid


class MAE(nn.Module):
    """Masked autoencoder.

    Args:
        encoder: any `UnitEncoder`, such as a HiViT in its unit form, an SViT, or a `UnitViT`.
        decoder: `Decoder(encoder.out_dim, encoder.unit_size, ...)`.
        mask_ratio: fraction of units to mask.
        norm_targets: predict pixels that are normalized per unit (MAE, section 3).
        decode_ratio: fraction of the masked units to predict, chosen at random.
        target: what to predict. By default it is `Pixels(norm_targets)`.

    Raises:
        UserError: if the encoder cannot skip units, the decoder does not fit it, or a ratio is out of range.
    """

    def __init__(
        self,
        encoder: UnitEncoder,
        decoder: Decoder,
        mask_ratio: float = 0.75,
        norm_targets: bool = True,
        decode_ratio: float = 1.0,
        target: Target | None = None,
    ):
        super().__init__()
        if not hasattr(encoder, "encode_units"):
            raise UserError(
                f"{type(encoder).__name__} has no encode_units and cannot skip units. Pass a HiViT built with "
                "unit_form=True, an SViT, or a plain timm VisionTransformer wrapped as mimkit.models.vit.UnitViT(vit)."
            )
        if decoder.in_dim != encoder.out_dim:
            raise UserError(
                f"The decoder takes {decoder.in_dim} channels, but the encoder returns {encoder.out_dim}. "
                f"Build it as Decoder({encoder.out_dim}, ...)."
            )
        if decoder.unit_size != encoder.unit_size:
            raise UserError(
                f"The decoder predicts units of {decoder.unit_size} px, but the encoder's have {encoder.unit_size} px. "
                f"Build it as Decoder({encoder.out_dim}, {encoder.unit_size}, ...)."
            )
        for name, ratio, valid in (
            ("mask_ratio", mask_ratio, 0 < mask_ratio < 1),
            ("decode_ratio", decode_ratio, 0 < decode_ratio <= 1),
        ):
            if not valid:
                raise UserError(f"{name} is {ratio}. It must lie between 0 and 1.")
        self.encoder, self.decoder = encoder, decoder
        self.mask_ratio, self.norm_targets, self.decode_ratio = mask_ratio, norm_targets, decode_ratio
        self.target = Pixels(norm_targets) if target is None else target

    @property
    def config(self) -> dict[str, Any]:
        """Keyword arguments that rebuild the method around its encoder and decoder.

        `decode_ratio` is not one of them: it saves time in training, and reconstructions show all masked units.
        """
        return {"mask_ratio": self.mask_ratio, "norm_targets": self.norm_targets}

    def forward(self, images: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Output:
        """Images (b c H W); mask noise (b n), or its generator -> L2 loss (), prediction (b m p*q*c), units

        Raises:
            UserError: if a side of the images is no multiple of the unit size, or the prediction does not fit the
                target.
        """
        p = self.encoder.unit_size
        grid = unit_grid(images.shape[-2], images.shape[-1], p)
        mask = sample_mask(len(images), grid[0] * grid[1], self.mask_ratio, generator, noise)
        decoded = max(1, round(mask.masked.shape[1] * self.decode_ratio))
        mask = UnitMask(mask.visible.to(images.device), mask.masked[:, :decoded].to(images.device))

        units = serialize(images, p)
        latent = self.encoder.encode_units(gather(units, mask.visible), mask.visible, grid)
        prediction = self.decoder(latent, mask, grid)
        target = self.target(images, units, mask.masked)
        if prediction.shape != target.shape:
            raise UserError(
                f"The decoder predicts {prediction.shape[-1]} values per unit, but the target has {target.shape[-1]}. "
                f"To predict pixels, build it with in_chans={images.shape[1]}."
            )
        loss = (prediction.float() - target).square().mean()
        return Output(loss, prediction, mask)
