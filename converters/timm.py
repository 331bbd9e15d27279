"""timm: nothing changes. SigLIP and EVA-02 come this way, and every other plain ViT that timm has."""

from mimkit.conversion.family import Family, Remap


def remap(m: Remap) -> None:
    """What timm's network has stays; what only pre-training has goes."""
    m.drop(r"mask_token|lm_head\..*", "of masked pre-training")
    m.drop(r".*relative_position_index", "an index, made anew")
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
