"""Files of github.com/open-mmlab/mmpretrain with its VisionTransformer.

mmpretrain converted MAE, DeiT, DeiT III, DINOv2 and others to this layout.
"""

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mimkit.conversion.computed import is_relative_index
from mimkit.conversion.family import Family, Remap


def remap(m: Remap) -> None:
    """Rename all tensors. The prefix `backbone.` was removed on reading, and the top-level `ln1` is the final norm."""
    m.drop(r"mask_token|(neck|target_generator|data_preprocessor)\..*", "used in pre-training only")
    m.drop(r".*relative_position_index", "index buffer, recomputed", is_relative_index)
    m.rename_all(
        {
            r"(cls_token|dist_token|pos_embed)": r"\1",
            r"rel_pos_bias\.(.*)": r"rel_pos_bias.\1",
            r"patch_embed\.projection\.(.*)": r"patch_embed.proj.\1",
            r"pre_norm\.(.*)": r"norm_pre.\1",
            r"layers\.(\d+)\.ln([12])\.(.*)": r"blocks.\1.norm\2.\3",
            r"layers\.(\d+)\.attn\.gamma1\.weight": r"blocks.\1.ls1.gamma",
            r"layers\.(\d+)\.ffn\.gamma2\.weight": r"blocks.\1.ls2.gamma",
            r"layers\.(\d+)\.((?:attn|gamma_[12])\b.*)": r"blocks.\1.\2",
            r"layers\.(\d+)\.ffn\.w12\.(.*)": r"blocks.\1.mlp.fc1.\2",
            r"layers\.(\d+)\.ffn\.w3\.(.*)": r"blocks.\1.mlp.fc2.\2",
            r"layers\.(\d+)\.ffn\.layers\.0\.0\.(.*)": r"blocks.\1.mlp.fc1.\2",
            r"layers\.(\d+)\.ffn\.layers\.1\.(.*)": r"blocks.\1.mlp.fc2.\2",
            r"ln1\.(.*)": r"norm.\1",
            r"ln2\.(.*)": r"fc_norm.\1",
            r"head\.(?:layers\.head|head|fc)\.(.*)": r"head.\1",
            r"head\.(?:layers\.head_dist|head_dist)\.(.*)": r"head_dist.\1",
        }
    )


FAMILY = Family(
    title="open-mmlab/mmpretrain",
    marks=(
        r"patch_embed\.projection\.weight",
        r"layers\.0\.ln1\.weight",
        r"layers\.0\.ffn\.(layers\.0\.0|w12)\.weight",
    ),
    remap=remap,
    data={"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD},
    reader=None,
    parity_test="test_mmpretrain",
)
