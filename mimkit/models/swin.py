"""timm's Swin as an encoder that computes visible units and mask tokens (SimMIM)."""

from einops import rearrange
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from mimkit.errors import UserError
from mimkit.units import UnitMask, replace_masked, unit_grid


class MaskedSwin(nn.Module):
    """timm's Swin with the method `encode_masked`. The Swin itself is unchanged and available as `swin`.

    A mask unit is one token of the last stage: 32 px for patches of 4 px.

    Args:
        swin: a timm `SwinTransformer`, built with `num_classes=0`.

    Raises:
        UserError: the network is not a `SwinTransformer`.
    """

    def __init__(self, swin: nn.Module):
        super().__init__()
        if not isinstance(swin, SwinTransformer):
            raise UserError(
                f"{type(swin).__name__} is not timm's SwinTransformer: choose one such as "
                "swin_base_patch4_window7_224, or an SViT."
            )
        self.swin = swin
        self.unit_size = swin.feature_info[-1]["reduction"]
        self.token_dim, self.out_dim = swin.embed_dim, swin.num_features
        swin.head.requires_grad_(False)

    def encode_masked(self, images: Tensor, mask: UnitMask, token: Tensor) -> Tensor:
        """(b c H W) -> (b n out_dim): encode all units, with a mask token in place of the masked ones

        Args:
            images: images (b c H W), multiples of the unit size.
            mask: visible units (b v) and masked units (b m).
            token: mask token (token_dim), which replaces the masked tokens after the patch embedding.
        """
        grid = unit_grid(images.shape[-2], images.shape[-1], self.unit_size)
        x = replace_masked(self.swin.patch_embed(images), mask.masked, grid, token)
        return rearrange(self.swin.norm(self.swin.layers(x)), "b gh gw d -> b (gh gw) d")
