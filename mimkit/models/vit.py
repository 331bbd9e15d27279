"""Any plain timm VisionTransformer as an encoder that can skip units. Its mask unit is one patch."""

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mimkit.errors import UserError
from mimkit.models.layers.pos_embed import sincos_positions
from mimkit.units import Grids, gather, one_grid


class UnitViT(nn.Module):
    """A plain timm ViT with the method `encode_units`. The ViT itself is unchanged and available as `vit`.

    Positions and prefix tokens come from the ViT's own `_pos_embed`, which runs on a map of zeros.

    Args:
        vit: a timm `VisionTransformer`. Build it with `num_classes=0, fc_norm=False`, so that its final norm is used,
            and with `dynamic_img_size=True` if the input size varies.
        fixed_positions: replace the learned position table by MAE's fixed sine-cosine table (MAE, section 3).

    Raises:
        UserError: the network is not a plain ViT, or its patches are not square or not embedded one by one.
    """

    def __init__(self, vit: nn.Module, fixed_positions: bool = False):
        super().__init__()
        if not isinstance(vit, VisionTransformer):
            raise UserError(
                f"{type(vit).__name__} is not a plain timm VisionTransformer, so it cannot skip mask units: choose a "
                "network such as vit_base_patch16_224, or a HiViT."
            )
        embed = vit.patch_embed
        if not (isinstance(embed, PatchEmbed) and embed.proj.kernel_size == embed.proj.stride):
            raise UserError(
                f"This ViT embeds images by a {type(embed).__name__}, which mixes patches, so it cannot drop patches "
                "as pixels: choose a ViT with a plain patch embedding, such as vit_base_patch16_224."
            )
        height, width = embed.patch_size
        if height != width:
            raise UserError(
                f"The ViT's patches of {height} x {width} px are not square: choose one with square patches."
            )
        self.vit = vit
        self.unit_size, self.out_dim, self.num_prefix_tokens = height, vit.embed_dim, vit.num_prefix_tokens
        for unused in (vit.fc_norm, vit.head, vit.attn_pool):
            if unused is not None:
                unused.requires_grad_(False)
        if fixed_positions and vit.pos_embed is not None:
            table = sincos_positions(vit.embed_dim, embed.grid_size)
            with torch.no_grad():
                vit.pos_embed.zero_().requires_grad_(False)[0, -len(table) :] = table

    def encode_units(self, units: Tensor, index: Tensor, grid: Grids) -> Tensor:
        """(b v c p p) -> (b k+v d): encode units at positions `index` (b v) of the grid (gh gw)

        Raises:
            UserError: the ViT was built for another grid, or there is one grid for each image.
        """
        grid = one_grid(grid)
        vit, embed = self.vit, self.vit.patch_embed
        if not vit.dynamic_img_size and grid != embed.grid_size:
            raise UserError(
                f"A grid of {grid} patches does not fit this ViT, which was built for {embed.grid_size}: build it with "
                "the matching img_size, or with dynamic_img_size=True."
            )
        x = embed.norm(F.linear(units.flatten(2), embed.proj.weight.flatten(1), embed.proj.bias))
        empty = x.new_zeros(1, *grid, x.shape[-1])
        table = vit._pos_embed(empty if vit.dynamic_img_size else empty.flatten(1, 2))
        k = self.num_prefix_tokens
        x = torch.cat([table[:, :k].expand(x.shape[0], -1, -1), x + gather(table[:, k:], index)], dim=1)
        x = vit.norm_pre(x)
        x = checkpoint_seq(vit.blocks, x) if vit.grad_checkpointing and vit.training else vit.blocks(x)
        return vit.norm(x)
