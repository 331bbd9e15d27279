"""HiViT files of github.com/zhangxiaosong18/hivit and of mmpretrain, for our HiViT.

Our names are those of the official repository.
"""

import math
from typing import Any

from torch import Tensor

from mimkit.conversion.family import Family, Remap


def remap(m: Remap) -> None:
    """Rename mmpretrain's tensors, and drop the decoder. mmpretrain names bias tables `pos_embed` too."""
    m.drop(r"mask_token|decoder_.*|(neck|target_generator|data_preprocessor)\..*", "decoder of pre-training")
    m.drop(r".*relative_position_index|rel_pos_index", "index buffer, recomputed")
    m.rename_all(
        {
            r"pos_embed": "absolute_pos_embed",
            r"patch_embed\.projection\.(.*)": r"patch_embed.proj.\1",
            r"blocks\.(\d+)\.attn\.(?:pos_embed|rel_pos_table)": r"blocks.\1.attn.relative_position_bias_table",
            r"head\.fc\.(.*)": r"head.\1",
            r"(absolute_pos_embed|(?:patch_embed|blocks|norm|fc_norm|head)\..*)": r"\1",
        }
    )


def options(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the network that the tensors show.

    `img_size` is among them only if the grid of the position embeddings is square.
    """
    if not {"absolute_pos_embed", "patch_embed.proj.weight"} <= state.keys():
        return {}
    cells, width = state["absolute_pos_embed"].shape[1:]
    channels, patch = state["patch_embed.proj.weight"].shape[1:3]
    side = math.isqrt(cells)
    return {
        "in_chans": channels,
        "patch_size": patch,
        "unit_form": not any(name.endswith("position_bias_table") for name in state),
        "multi_scale": "norm.weight" in state and len(state["norm.weight"]) != width,
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
    } | ({"img_size": 4 * patch * side} if side**2 == cells else {})


FAMILY = Family(
    title="zhangxiaosong18/hivit and mmpretrain's HiViT",
    marks=(r"patch_embed\.norm\.weight", r"blocks\.\d+\.reduction\.weight", r"(absolute_)?pos_embed"),
    remap=remap,
    options=options,
    reader=None,
    parity_test="test_hivit",
)
