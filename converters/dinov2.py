"""facebookresearch/dinov2, with and without registers; training checkpoints count their blocks in chunks."""

import re

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mimkit.conversion.family import Family, Remap


def positions(m: Remap, cls_token: str = r"cls_token", table: str = r"pos_embed") -> None:
    """Class token and positions, whose names match these. Where registers were found, timm keeps no position for the
    tokens before the grid: the class token has its own added."""
    first = next((tensor[:, :1] for name, tensor in m.left.items() if re.fullmatch(table, name)), None)
    if "reg_token" in m.found and first is not None:
        m.rename(cls_token, "cls_token", lambda t: t + first, "its position added")
        m.rename(table, "pos_embed", lambda t: t[:, 1:], "without the class token's")
    m.rename(cls_token, "cls_token")
    m.rename(table, "pos_embed")


def remap(m: Remap) -> None:
    """timm's names, but for registers, chunks and SwiGLU."""
    m.drop(r"mask_token", "of masked pre-training")
    m.drop(r"(dino|ibot)_head\..*", "the projection head of pre-training")
    m.rename(r"register_tokens", "reg_token")
    positions(m)
    m.rename(r"blocks\.(?:\d+\.)?(\d+)\.mlp\.w12\.(.*)", r"blocks.\1.mlp.fc1.\2")
    m.rename(r"blocks\.(?:\d+\.)?(\d+)\.mlp\.w3\.(.*)", r"blocks.\1.mlp.fc2.\2")
    m.rename(r"blocks\.(?:\d+\.)?(\d+)\.([a-z].*)", r"blocks.\1.\2")
    m.rename(r"((?:patch_embed|norm|head)\..*)", r"\1")


FAMILY = Family(
    title="facebookresearch/dinov2",
    marks=(r"cls_token", r"pos_embed", r"blocks\.(\d+\.)?0\.ls1\.gamma", r"blocks\.(\d+\.)?0\.attn\.qkv\.weight"),
    remap=remap,
    data={"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD},
    aliases={
        f"dinov2_{letter}{reg}": f"vit_{size}_patch14{'_reg4' if reg else ''}_dinov2.lvd142m"
        for letter, size in {"s": "small", "b": "base", "l": "large", "g": "giant"}.items()
        for reg in ("", "_reg")
    },
)
