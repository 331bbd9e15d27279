"""facebookresearch/dinov3: RoPE instead of positions, a key bias that is masked out, storage tokens for registers."""

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mimkit.conversion.family import Family, Remap
from mimkit.errors import UserError


def biases(m: Remap) -> None:
    """timm's networks keep q and v bias apart, or, where all released ones are 0 (_qkvb in no name), have none."""
    for match, bias in m.take(r"blocks\.(\d+)\.attn\.qkv\.bias"):
        q, _, v = bias.chunk(3)  # the middle third is masked out by attn.qkv.bias_mask
        parts = {f"blocks.{match[1]}.attn.{name}_bias": part.clone() for name, part in (("q", q), ("v", v))}
        if parts.keys() <= m.wanted:
            m.split(match[0], parts, "split; the key's is masked out")
        elif torch.count_nonzero(q) or torch.count_nonzero(v):
            raise UserError(f"{match[0]} is not 0, but the network has no such bias: give --from a name with _qkvb.")
        else:
            m.skip(match[0], "all 0")


def remap(m: Remap) -> None:
    """Names of timm's Eva."""
    m.drop(r"mask_token", "of masked pre-training")
    m.drop(r"rope_embed\.periods", "computed")
    m.drop(r"blocks\.\d+\.attn\.qkv\.bias_mask", "masks the key's bias, which timm leaves out")
    m.drop(r"local_cls_norm\..*", "of pre-training")
    m.rename(r"storage_tokens", "reg_token")
    biases(m)
    m.rename(r"blocks\.(\d+)\.ls([12])\.gamma", r"blocks.\1.gamma_\2")
    m.rename(r"blocks\.(\d+)\.mlp\.w1\.(.*)", r"blocks.\1.mlp.fc1_g.\2")
    m.rename(r"blocks\.(\d+)\.mlp\.w2\.(.*)", r"blocks.\1.mlp.fc1_x.\2")
    m.rename(r"blocks\.(\d+)\.mlp\.w3\.(.*)", r"blocks.\1.mlp.fc2.\2")
    m.rename(r"(cls_token|(?:patch_embed|blocks|norm)\..*)", r"\1")


FAMILY = Family(
    title="facebookresearch/dinov3",
    marks=(r"cls_token", r"storage_tokens", r"blocks\.0\.attn\.qkv\.weight", r"rope_embed\.periods"),
    remap=remap,
    data={"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD},
    aliases={
        "dinov3_s": "vit_small_patch16_dinov3.lvd1689m",
        "dinov3_b": "vit_base_patch16_dinov3.lvd1689m",
        "dinov3_l": "vit_large_patch16_dinov3.lvd1689m",
    },
)
