"""open-mmlab/mmpretrain: its VisionTransformer and what it converted to it (MAE, DeiT, DeiT III, DINOv2, ...)."""

from mimkit.conversion import Family, Remap


def remap(m: Remap) -> None:
    """`backbone.` is taken off on reading; `ln1` at the end is the final norm, `head.` the classifier."""
    m.drop(r"mask_token|(neck|target_generator|data_preprocessor)\..*", "of pre-training")
    m.rename_all(
        {
            r"(cls_token|dist_token|pos_embed)": r"\1",
            r"patch_embed\.projection\.(.*)": r"patch_embed.proj.\1",
            r"pre_norm\.(.*)": r"norm_pre.\1",
            r"layers\.(\d+)\.ln([12])\.(.*)": r"blocks.\1.norm\2.\3",
            r"layers\.(\d+)\.attn\.gamma1\.weight": r"blocks.\1.ls1.gamma",
            r"layers\.(\d+)\.ffn\.gamma2\.weight": r"blocks.\1.ls2.gamma",
            r"layers\.(\d+)\.(attn\..*)": r"blocks.\1.\2",
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
    marks=(r"patch_embed\.projection\.weight", r"layers\.0\.ln1\.weight", r"layers\.0\.ffn\.layers\.0\.0\.weight"),
    remap=remap,
    reader=None,
)
