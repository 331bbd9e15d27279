"""Any backbone of timm as maps at 1/4, 1/8, 1/16 and 1/32 of the input, for dense prediction.

Of a plain ViT with another patch than 16 they are 4, 2, 1 and 1/2 times as fine as its patches.
"""

from inspect import signature
from typing import Any

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mimkit.errors import UserError
from mimkit.models.layers.windows import windowed_map

NECKS = ("auto", "maps", "pyramid", "both")


def takes_windows(backbone: Any) -> bool:
    """Whether `window` is for this network: others attend in windows or among super tokens already, or have positions
    inside their attention."""
    return isinstance(backbone, VisionTransformer) or hasattr(backbone, "set_window")


class Pyramid(nn.Module):
    """Four maps, each half as wide and high as the one before, normalized over channels.

    What comes from where is the `neck`:
        maps: the ends of the backbone's own stages; one that ends at 1/16 is pooled to 1/32.
        pyramid: the simple feature pyramid of a plain ViT (Li et al., "Exploring plain vision transformer backbones for
            object detection", ECCV 2022): deconvolutions of the 1/16 map, the map itself, and the map pooled.
        both: that, and finer stages added through 1 x 1 convolutions, which start at 0: an HPViT's maps start as the
            pyramid of its plain ViT.
    By default a plain ViT has a pyramid; an HPViT, whose stages are as wide as its last one, both, unless it has blocks
    after 1/16, which that would remove; others have maps.

    Images are padded at the right and bottom with zeros, the mean of what a network takes, to a multiple of `multiple`.

    Args:
        backbone: of timm, with `forward_intermediates`. What the maps do not need is removed from it.
        window: largest side, in tokens, of windows that blocks of a HiViT, HPViT or VisionTransformer attend in, for
            large images; the last block of each quarter is global. 0: the backbone as it is.
    """

    def __init__(self, backbone: Any, neck: str = "auto", window: int = 0):
        super().__init__()
        if neck not in NECKS:
            raise UserError(f"--neck {neck} is unknown: choose among {', '.join(NECKS)}.")
        name = backbone.pretrained_cfg["architecture"]
        if not all(hasattr(backbone, part) for part in ("forward_intermediates", "prune_intermediate_layers")):
            raise UserError(f"{name} gives no maps of its stages: choose a backbone of timm that does.")
        infos = backbone.feature_info if isinstance(backbone.feature_info, list) else backbone.feature_info.info
        stages = {info["reduction"]: i for i, info in enumerate(infos)}  # the last one of each
        known, patched = ([4, 8, 16], [4, 8, 16, 32]), "patch_size" in signature(type(backbone)).parameters
        if not patched and (coarse := sorted(r for r in stages if r >= 4)) in known:  # a ResNet's stem is finer
            stages = {r: stages[r] for r in coarse}
        coarsest = max(stages)
        base = max((r for r in stages if r < 32), default=coarsest)  # what a pyramid is built on
        wide = len({info["num_chs"] for info in infos}) == 1
        beyond = coarsest > base and infos[stages[coarsest]]["module"] != infos[stages[base]]["module"]
        if neck == "auto":
            neck = "pyramid" if len(stages) == 1 else "both" if wide and not beyond else "maps"
        strides = sorted(stages)
        self.patch = 16 if len(stages) == 1 else 4  # a plain network's one map is its patches; others' finest map is
        if neck in ("maps", "both") and strides not in known:
            scaled = [self.patch * stride // strides[0] for stride in strides]
            other = patched and scaled in known
            advice = f"pass --model-args.patch_size {self.patch}" if other else "pass --neck pyramid"
            raise UserError(
                f"--neck {neck} needs maps at 4, 8 and 16 px; {name}'s are at {', '.join(map(str, strides))}: {advice}."
            )
        if window and not takes_windows(backbone):
            raise UserError(
                f"--window is for HiViT, HPViT and VisionTransformer, and {name} is a {type(backbone).__name__}: leave "
                "it out, or convert a plain ViT to HPViT, whose windows follow its positions."
            )
        self.plain = isinstance(backbone, VisionTransformer)
        if window and not self.plain:
            backbone.set_window(window)  # before blocks are removed: quarters are of all of them
        self.neck, self.window = neck, window
        self.multiple = coarsest if neck == "maps" and coarsest == 32 else 2 * base

        used = {"maps": stages, "pyramid": [base], "both": [r for r in stages if r <= base]}[neck]
        self.indices = sorted(stages[r] for r in used)
        self.backbone = backbone
        self.backbone.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        widths = [infos[i]["num_chs"] for i in self.indices]
        self.norms = nn.ModuleList(LayerNorm2d(width, eps=1e-6) for width in widths)
        self.up, self.side = nn.ModuleList(), nn.ModuleList()
        self.channels = widths if len(widths) == 4 else [*widths, widths[-1]]
        if neck != "maps":
            d = widths[-1]
            self.channels = [d // 4, d // 2, d, d]
            fine = nn.ConvTranspose2d(d, d // 2, 2, 2), LayerNorm2d(d // 2, eps=1e-6), nn.GELU()
            self.up.append(nn.Sequential(*fine, nn.ConvTranspose2d(d // 2, d // 4, 2, 2)))
            self.up.append(nn.ConvTranspose2d(d, d // 2, 2, 2))
            self.side.extend(
                nn.Conv2d(d, c, 1) for d, c in zip(widths[:-1], self.channels[: len(widths) - 1], strict=True)
            )
            for parameter in self.side.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(b c H W) -> 4 x (b d h w), of the padded image"""
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple))
        try:
            if self.plain and self.window:
                found = [windowed_map(self.backbone, x, self.window)]
            else:
                found = self.backbone.forward_intermediates(x, indices=self.indices, intermediates_only=True)
        except AssertionError as error:  # timm's, of networks whose tables do not follow
            raise UserError(
                f"This backbone does not take images of {x.shape[-2]}x{x.shape[-1]} ({error}): with --slide it sees "
                "crops only, of --img-size; or choose another one."
            ) from error
        maps = [norm(m) for norm, m in zip(self.norms, found, strict=True)]
        if self.neck != "maps":
            base = maps[-1]
            sides = [side(m) for side, m in zip(self.side, maps[:-1], strict=True)]
            maps = [up(base) for up in self.up]
            maps = [m + side for m, side in zip(maps, sides, strict=True)] if sides else maps
            maps.append(base)
        return maps if len(maps) == 4 else [*maps, F.avg_pool2d(maps[-1], 2)]
