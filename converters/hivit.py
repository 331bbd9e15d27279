"""Released HiViT checkpoints, in the official spelling (ours) and mmpretrain's -> our HiViT."""

from mimkit.conversion import Family, Remap


def remap(m: Remap) -> None:
    """mmpretrain calls the bias table `pos_embed`, and the absolute positions too."""
    m.drop(r"mask_token|decoder_.*|(neck|target_generator|data_preprocessor)\..*", "the decoder of pre-training")
    m.drop(r".*relative_position_index|rel_pos_index", "an index, made anew")
    m.rename_all(
        {
            r"pos_embed": "absolute_pos_embed",
            r"patch_embed\.projection\.(.*)": r"patch_embed.proj.\1",
            r"blocks\.(\d+)\.attn\.(?:pos_embed|rel_pos_table)": r"blocks.\1.attn.relative_position_bias_table",
            r"head\.fc\.(.*)": r"head.\1",
            r"(absolute_pos_embed|(?:patch_embed|blocks|norm|fc_norm|head)\..*)": r"\1",
        }
    )


FAMILY = Family(
    title="zhangxiaosong18/hivit and mmpretrain's HiViT",
    marks=(r"patch_embed\.norm\.weight", r"blocks\.\d+\.reduction\.weight", r"(absolute_)?pos_embed"),
    remap=remap,
    reader=None,
    stand_in="test_hivit",
)
