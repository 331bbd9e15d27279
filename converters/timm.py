"""Files of timm (github.com/huggingface/pytorch-image-models) and of mimkit's own runs.

SigLIP, EVA-02 and every other plain ViT in timm are read by this family.
"""

from mimkit.conversion.computed import is_relative_index
from mimkit.conversion.family import Family, Remap


def remap(m: Remap) -> None:
    """Keep all names, and drop what only pre-training has."""
    m.drop(r"mask_token|lm_head\..*", "used in masked pre-training only")
    m.drop(r".*relative_position_index", "index buffer, recomputed", is_relative_index)
    m.rename(r"(.+)", r"\1")


FAMILY = Family(
    title="timm, and mimkit's own runs",
    marks=(r"patch_embed\.proj\.weight", r"blocks\.0\.norm1\.weight", r"blocks\.0\.attn\..*\.weight"),
    remap=remap,
    aliases={
        "vit_s": "vit_small_patch16_224.augreg_in21k_ft_in1k",
        "vit_b": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
        "vit_l": "vit_large_patch16_224.augreg_in21k_ft_in1k",
        "siglip_b16": "vit_base_patch16_siglip_224.webli",
        "siglip2_b16": "vit_base_patch16_siglip_224.v2_webli",
        "eva02_s": "eva02_small_patch14_224.mim_in22k",
        "eva02_b": "eva02_base_patch14_224.mim_in22k",
        "eva02_l": "eva02_large_patch14_224.mim_in22k",
    },
)
