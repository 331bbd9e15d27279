"""timm's Swin as an encoder that computes mask tokens too."""

from einops import rearrange
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from mimkit.errors import UserError
from mimkit.units import UnitMask, replace_masked, unit_grid


class MaskedSwin(nn.Module):
    """`encode_masked` for timm's Swin, which stays what it is in `self.swin`.

    Args:
        swin: a timm `SwinTransformer` with `num_classes=0`. A mask unit is one token of its last stage: 32 px for
            patches of 4.
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
        """Images (b c H W), places (b v) and (b m), mask token (token_dim) -> latent of all units (b n out_dim)"""
        grid = unit_grid(images.shape[-2], images.shape[-1], self.unit_size)
        x = replace_masked(self.swin.patch_embed(images), mask.masked, grid, token)
        return rearrange(self.swin.norm(self.swin.layers(x)), "b gh gw d -> b (gh gw) d")
