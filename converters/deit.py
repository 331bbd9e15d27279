"""DeiT, distilled DeiT and DeiT III files of github.com/facebookresearch/deit.

The names are timm's, except for DeiT III's LayerScale.
"""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mimkit.conversion.family import Family, Remap


def remap(m: Remap) -> None:
    """Rename DeiT III's LayerScale, and keep all other names."""
    m.rename(r"blocks\.(\d+)\.gamma_([12])", r"blocks.\1.ls\2.gamma")
    m.rename(r"(cls_token|dist_token|pos_embed|(?:patch_embed|blocks|norm|head|head_dist)\..*)", r"\1")


FAMILY = Family(
    title="facebookresearch/deit",
    marks=(r"cls_token", r"pos_embed", r"head\.weight", r"blocks\.0\.attn\.qkv\.bias"),
    remap=remap,
    data={"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD},
    aliases={
        "deit_s": "deit_small_patch16_224.fb_in1k",
        "deit_b": "deit_base_patch16_224.fb_in1k",
        "deit_s_distilled": "deit_small_distilled_patch16_224.fb_in1k",
        "deit_b_distilled": "deit_base_distilled_patch16_224.fb_in1k",
        "deit3_s": "deit3_small_patch16_224.fb_in22k_ft_in1k",
        "deit3_b": "deit3_base_patch16_224.fb_in22k_ft_in1k",
        "deit3_l": "deit3_large_patch16_224.fb_in22k_ft_in1k",
        "deit3_h": "deit3_huge_patch14_224.fb_in22k_ft_in1k",
    },
)
