"""Segment Anything files of github.com/facebookresearch/segment-anything: the image encoder."""

from mimkit.conversion.family import Family, Remap


def remap(m: Remap) -> None:
    """Rename the image encoder, and drop the prompt encoder and the mask decoder."""
    m.drop(r"(prompt_encoder|mask_decoder)\..*|pixel_(mean|std)", "not part of the image encoder")
    m.rename(r"image_encoder\.(blocks\.\d+\.mlp)\.lin([12])\.(.*)", r"\1.fc\2.\3")
    m.rename(r"image_encoder\.(.*)", r"\1")


FAMILY = Family(
    title="facebookresearch/segment-anything",
    marks=(r"image_encoder\.patch_embed\.proj\.weight", r"image_encoder\.blocks\.0\.mlp\.lin1\.weight"),
    remap=remap,
    aliases={
        "sam_b": "samvit_base_patch16.sa1b",
        "sam_l": "samvit_large_patch16.sa1b",
        "sam_h": "samvit_huge_patch16.sa1b",
    },
)
