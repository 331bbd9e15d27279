"""DINOv2 files of github.com/facebookresearch/dinov2, with and without registers.

Training checkpoints have blocks grouped into chunks (`blocks.CHUNK.BLOCK`), and the giant model has a SwiGLU MLP.
"""

import re

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mimkit.conversion.family import Family, Remap


def positions(m: Remap, cls_token: str = r"cls_token", table: str = r"pos_embed") -> None:
    """Rename the class token and the position embeddings.

    If the file has registers, timm's network has no position embedding for the class token: it is added to the token.

    Args:
        m: the file's tensors.
        cls_token: pattern of the class token's name.
        table: pattern of the position embeddings' name.
    """
    first = next((tensor[:, :1] for name, tensor in m.remaining.items() if re.fullmatch(table, name)), None)
    if "reg_token" in m.found and first is not None:
        m.rename(cls_token, "cls_token", lambda t: t + first, "position embedding of the class token added")
        m.rename(table, "pos_embed", lambda t: t[:, 1:], "without the class token's position embedding")
    m.rename(cls_token, "cls_token")
    m.rename(table, "pos_embed")


def remap(m: Remap) -> None:
    """Rename registers, chunked blocks and SwiGLU layers, and keep all other names."""
    m.drop(r"mask_token", "used in masked pre-training only")
    m.drop(r"(dino|ibot)_head\..*", "projection head of pre-training")
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
