"""Feature pyramids for dense prediction: maps at strides 4, 8, 16 and 32 from any backbone of timm.

A plain ViT with another patch size than 16 gives maps at strides of 1/4, 1/2, 1 and 2 patches.
"""

from inspect import signature
from typing import Any

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mimkit.errors import UserError
from mimkit.models.hpvit import HPViT
from mimkit.models.layers.windows import windowed_map

NECKS = ("auto", "maps", "pyramid", "both")


def takes_windows(backbone: Any) -> bool:
    """Return whether the network supports `window`.

    Others already attend in windows or among super tokens, or have positions inside their attention.
    """
    return isinstance(backbone, VisionTransformer) or hasattr(backbone, "set_window")


class Pyramid(nn.Module):
    """Turn a backbone into four maps, normalized over channels. Each has half the size of the previous one.

    The `neck` decides where the maps come from:
        maps: the outputs of the backbone's stages. If the last stage is at 1/16, its mean pool is the 1/32 map.
        pyramid: the simple feature pyramid of a plain ViT (Li et al., "Exploring plain vision transformer backbones for
            object detection", ECCV 2022): deconvolutions of the 1/16 map, the map itself, and its mean pool.
        both: the pyramid plus the finer stages, added through 1 x 1 convolutions that start at 0. The maps of an HPViT
            then start as the pyramid of its plain ViT.
        auto: pyramid for a plain ViT; both for an HPViT without blocks after 1/16, which `both` would remove; maps for
            all others.

    Images are padded at the right and bottom to a multiple of `multiple`, with zeros, the mean of normalized images.

    Args:
        backbone: a timm network with `forward_intermediates`. Layers that the maps do not need are removed from it.
        neck: auto, maps, pyramid or both.
        window: largest side, in tokens, of attention windows for large images, for HiViT, HPViT and VisionTransformer.
            The last block of each quarter stays global. 0 leaves the backbone as it is.

    Raises:
        UserError: the backbone has no maps, or not those that the neck needs, or does not support `window`.
    """

    def __init__(self, backbone: Any, neck: str = "auto", window: int = 0):
        super().__init__()
        if neck not in NECKS:
            raise UserError(f"--neck {neck} is unknown: choose among {', '.join(NECKS)}.")
        name = backbone.pretrained_cfg["architecture"]
        if not all(hasattr(backbone, part) for part in ("forward_intermediates", "prune_intermediate_layers")):
            raise UserError(f"{name} returns no intermediate maps: choose a timm backbone with forward_intermediates.")
        infos = backbone.feature_info if isinstance(backbone.feature_info, list) else backbone.feature_info.info
        stages = {info["reduction"]: i for i, info in enumerate(infos)}  # stride -> index of the last map at it
        usable, has_patches = ([4, 8, 16], [4, 8, 16, 32]), "patch_size" in signature(type(backbone)).parameters
        if not has_patches and (coarse := sorted(r for r in stages if r >= 4)) in usable:  # leave out a ResNet's stem
            stages = {r: stages[r] for r in coarse}
        coarsest = max(stages)
        base = max((r for r in stages if r < 32), default=coarsest)  # stride of the map that a pyramid is built on
        ends_at_base = isinstance(backbone, HPViT) and not backbone.depths[3]
        if neck == "auto":
            neck = "pyramid" if len(stages) == 1 else "both" if ends_at_base else "maps"
        strides = sorted(stages)
        self.patch = 16 if len(stages) == 1 else 4  # usual patch size: that of a plain network, or of the finest map
        if neck in ("maps", "both") and strides not in usable:
            scaled = [self.patch * stride // strides[0] for stride in strides]
            patch_helps = has_patches and scaled in usable
            advice = f"pass --model-args.patch_size {self.patch}" if patch_helps else "pass --neck pyramid"
            raise UserError(
                f"--neck {neck} needs maps at 4, 8 and 16 px; {name}'s are at {', '.join(map(str, strides))}: {advice}."
            )
        if window and not takes_windows(backbone):
            raise UserError(
                f"--window is for HiViT, HPViT and VisionTransformer, and {name} is a {type(backbone).__name__}: leave "
                "it out, or convert a plain ViT to HPViT, which supports windows."
            )
        self.plain = isinstance(backbone, VisionTransformer)
        if window and not self.plain:
            backbone.set_window(window)  # before blocks are removed: the quarters count all blocks
        self.neck, self.window = neck, window
        self.multiple = coarsest if neck == "maps" and coarsest == 32 else 2 * base

        used_strides = {"maps": stages, "pyramid": [base], "both": [r for r in stages if r <= base]}[neck]
        self.indices = sorted(stages[r] for r in used_strides)
        self.backbone = backbone
        self.backbone.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        widths = [infos[i]["num_chs"] for i in self.indices]
        self.norms = nn.ModuleList(LayerNorm2d(width, eps=1e-6) for width in widths)
        self.up, self.side = nn.ModuleList(), nn.ModuleList()
        self.channels = widths if len(widths) == 4 else [*widths, widths[-1]]
        if neck != "maps":
            d = widths[-1]
            self.channels = [d // 4, d // 2, d, d]
            first = nn.ConvTranspose2d(d, d // 2, 2, 2), LayerNorm2d(d // 2, eps=1e-6), nn.GELU()
            self.up.append(nn.Sequential(*first, nn.ConvTranspose2d(d // 2, d // 4, 2, 2)))
            self.up.append(nn.ConvTranspose2d(d, d // 2, 2, 2))
            self.side.extend(
                nn.Conv2d(d, c, 1) for d, c in zip(widths[:-1], self.channels[: len(widths) - 1], strict=True)
            )
            for parameter in self.side.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(b c H W) -> four maps (b d h w) of the padded image, from fine to coarse"""
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple))
        try:
            if self.plain and self.window:
                features = [windowed_map(self.backbone, x, self.window)]
            else:
                features = self.backbone.forward_intermediates(x, indices=self.indices, intermediates_only=True)
        except AssertionError as error:  # from timm's networks that run on one input size only
            raise UserError(
                f"This backbone does not take images of {x.shape[-2]}x{x.shape[-1]} ({error}): pass --slide, to run it "
                "on crops of --img-size only, or choose another backbone."
            ) from error
        maps = [norm(m) for norm, m in zip(self.norms, features, strict=True)]
        if self.neck != "maps":
            base = maps[-1]
            sides = [side(m) for side, m in zip(self.side, maps[:-1], strict=True)]
            maps = [up(base) for up in self.up]
            maps = [m + side for m, side in zip(maps, sides, strict=True)] if sides else maps
            maps.append(base)
        return maps if len(maps) == 4 else [*maps, F.avg_pool2d(maps[-1], 2)]
