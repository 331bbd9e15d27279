"""Any plain timm VisionTransformer as an encoder that can skip units: its mask unit is one patch."""

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mimkit.errors import UserError
from mimkit.models.layers.pos_embed import sincos_positions
from mimkit.units import Grid, gather


class UnitViT(nn.Module):
    """`encode_units` for a plain timm ViT, which stays what it is in `self.vit`.

    Positions and prefix tokens come from the ViT's own `_pos_embed`, run on an empty map.

    Args:
        vit: a timm `VisionTransformer`, best built with `num_classes=0, fc_norm=False` (its final norm is then used),
            and with `dynamic_img_size=True` where the input size varies.
        fixed_positions: replace its learned position table by MAE's fixed sin-cos one (MAE, section 3).
    """

    def __init__(self, vit: nn.Module, fixed_positions: bool = False):
        super().__init__()
        if not isinstance(vit, VisionTransformer):
            raise UserError(
                f"{type(vit).__name__} is not a plain timm VisionTransformer, whose tokens can be dropped before the "
                "first block: choose one such as vit_base_patch16_224, or a HiViT."
            )
        embed = vit.patch_embed
        if not (isinstance(embed, PatchEmbed) and embed.proj.kernel_size == embed.proj.stride):
            raise UserError(
                f"This ViT embeds images by a {type(embed).__name__}, which looks across patches, so they cannot be "
                "dropped as pixels: choose a ViT with a plain patch embedding, such as vit_base_patch16_224."
            )
        height, width = embed.patch_size
        if height != width:
            raise UserError(f"Patches of {height} x {width} px are not square: choose a ViT with square patches.")
        self.vit = vit
        self.unit_size, self.out_dim, self.num_prefix_tokens = height, vit.embed_dim, vit.num_prefix_tokens
        for unused in (vit.fc_norm, vit.head, vit.attn_pool):
            if unused is not None:
                unused.requires_grad_(False)
        if fixed_positions and vit.pos_embed is not None:
            table = sincos_positions(vit.embed_dim, embed.grid_size)
            with torch.no_grad():
                vit.pos_embed.zero_().requires_grad_(False)[0, -len(table) :] = table

    def encode_units(self, units: Tensor, index: Tensor, grid: Grid) -> Tensor:
        """Units (b v c p p) at places index (b v) of the grid (gh gw) -> (b k+v d)"""
        vit, embed = self.vit, self.vit.patch_embed
        if not vit.dynamic_img_size and grid != embed.grid_size:
            raise UserError(
                f"A grid of {grid} patches is not the {embed.grid_size} that this ViT was built for: build it with "
                "that img_size, or with dynamic_img_size=True."
            )
        x = embed.norm(F.linear(units.flatten(2), embed.proj.weight.flatten(1), embed.proj.bias))
        empty = x.new_zeros(1, *grid, x.shape[-1])
        table = vit._pos_embed(empty if vit.dynamic_img_size else empty.flatten(1, 2))
        k = self.num_prefix_tokens
        x = torch.cat([table[:, :k].expand(x.shape[0], -1, -1), x + gather(table[:, k:], index)], dim=1)
        x = vit.norm_pre(x)
        x = checkpoint_seq(vit.blocks, x) if vit.grad_checkpointing and vit.training else vit.blocks(x)
        return vit.norm(x)
