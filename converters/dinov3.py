"""DINOv3 files of github.com/facebookresearch/dinov3.

They have RoPE instead of position embeddings, a key bias that is masked out, and registers named storage tokens. The
target is timm's Eva.
"""

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mimkit.conversion.computed import is_key_mask, is_rope_periods
from mimkit.conversion.family import Family, Remap
from mimkit.errors import UserError


def biases(m: Remap) -> None:
    """Split the qkv bias.

    timm's networks with `_qkvb` in their name have a separate bias for q and for v. The others, whose released biases
    are all 0, have none.

    Raises:
        UserError: the bias is not 0, but the network has none.
    """
    for match, bias in m.take(r"blocks\.(\d+)\.attn\.qkv\.bias"):
        q, _, v = bias.chunk(3)  # attn.qkv.bias_mask masks out the key bias
        parts = {f"blocks.{match[1]}.attn.{name}_bias": part.clone() for name, part in (("q", q), ("v", v))}
        if parts.keys() <= m.wanted:
            m.split(match[0], parts, "split; the key bias is masked out")
        elif torch.count_nonzero(q) or torch.count_nonzero(v):
            raise UserError(f"{match[0]} is not 0, but the network has no such bias. Pass --from NAME with _qkvb.")
        else:
            m.skip(match[0], "all 0")


def remap(m: Remap) -> None:
    """Rename the tensors to those of timm's Eva."""
    m.drop(r"mask_token", "used in masked pre-training only")
    m.drop(r"rope_embed\.periods", "RoPE periods, recomputed", is_rope_periods)
    masks = r"blocks\.\d+\.attn\.qkv\.bias_mask"
    m.drop(masks, "mask of the key bias, which timm does not have", is_key_mask)
    m.drop(r"local_cls_norm\..*", "used in pre-training only")
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
