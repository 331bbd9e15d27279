"""MAE files of github.com/facebookresearch/mae: encoder only, with decoder, and fine-tuned.

The encoder's names are timm's.
"""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mimkit.conversion.family import Family, Remap


def remap(m: Remap) -> None:
    """Keep the encoder's names, and drop the decoder."""
    m.drop(r"decoder_.*|mask_token", "decoder of pre-training")
    m.rename(r"(cls_token|pos_embed|(?:patch_embed|blocks|norm|fc_norm|head)\..*)", r"\1")


FAMILY = Family(
    title="facebookresearch/mae",
    marks=(r"cls_token", r"pos_embed", r"blocks\.0\.attn\.qkv\.bias", r"blocks\.0\.mlp\.fc1\.weight"),
    remap=remap,
    data={"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD},
    aliases={
        "vit_b_mae": "vit_base_patch16_224.mae",
        "vit_l_mae": "vit_large_patch16_224.mae",
        "vit_h_mae": "vit_huge_patch14_224.mae",
    },
)
