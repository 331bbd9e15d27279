"""DINO files of github.com/facebookresearch/dino: backbones and training checkpoints.

A training checkpoint holds a student and a teacher; `--weights` selects one. The backbone's names are timm's.
"""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mimkit.conversion.family import Family, Remap


def remap(m: Remap) -> None:
    """Keep the backbone's names, and drop the projection head."""
    m.drop(r"head\.(mlp|last_layer)\..*", "projection head of pre-training")
    m.rename(r"(cls_token|pos_embed|(?:patch_embed|blocks|norm)\..*)", r"\1")


FAMILY = Family(
    title="facebookresearch/dino",
    marks=(r"cls_token", r"pos_embed", r"norm\.weight", r"blocks\.0\.attn\.qkv\.bias", r"blocks\.0\.mlp\.fc1\.weight"),
    remap=remap,
    data={"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD},
    aliases={
        "dino_s16": "vit_small_patch16_224.dino",
        "dino_s8": "vit_small_patch8_224.dino",
        "dino_b16": "vit_base_patch16_224.dino",
        "dino_b8": "vit_base_patch8_224.dino",
    },
)
