"""I-JEPA files of github.com/facebookresearch/ijepa.

A file holds an encoder (`--weights student`) and a target encoder (`--weights teacher`, the default), without class
token or head. The names are timm's.
"""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mimkit.conversion.family import Family, Remap


def remap(m: Remap) -> None:
    """Keep all names."""
    m.rename(r"(pos_embed|(?:patch_embed|blocks|norm)\..*)", r"\1")


FAMILY = Family(
    title="facebookresearch/ijepa",
    marks=(r"pos_embed", r"norm\.weight", r"blocks\.0\.attn\.qkv\.bias"),
    remap=remap,
    data={"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD},
    aliases={"ijepa_h": "vit_huge_patch14_gap_224.in1k_ijepa", "ijepa_g16": "vit_giant_patch16_gap_224.in22k_ijepa"},
)
