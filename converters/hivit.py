"""HiViT files of github.com/zhangxiaosong18/hivit and of mmpretrain 1.2.0, for our HiViT.

Our names are those of the official repository. mmpretrain calls the position table `pos_embed` and the head `head.fc`,
and its networks have no last norm. While it trains, its MAE stretches the positions by 0.1 units; its own inference and
ours do not.
"""

import math
from typing import Any

import torch
from torch import Tensor

from mimkit.conversion.computed import is_relative_index
from mimkit.conversion.family import Family, Remap
from mimkit.errors import UserError
from mimkit.models.layers.pos_embed import is_sincos

LAST_NORMS = {"norm.weight", "fc_norm.weight"}


def is_row_first(table: Tensor) -> bool:
    """Return whether a table (1 n d) is mmpretrain's, whose first half encodes the row."""
    return table.ndim == 3 and is_sincos(torch.cat(table.chunk(2, dim=-1)[::-1], dim=-1))


def remap(m: Remap) -> None:
    """Keep the official names, rename mmpretrain's, and drop the decoder and what the network computes itself."""
    m.drop(r".*relative_position_index", "index buffer, recomputed", is_relative_index)
    m.drop(r"decoder_pos_embed", "sine-cosine positions of the decoder of pre-training", is_sincos)
    m.drop(r"neck\.decoder_pos_embed", "sine-cosine positions of the decoder of pre-training", is_row_first)
    m.drop(r"mask_token|decoder_.*|(neck|target_generator|data_preprocessor)\..*", "decoder of pre-training")
    if "pos_embed" in m.remaining:
        m.rename(r"pos_embed", "absolute_pos_embed")
        m.rename(r"head\.fc\.(.*)", r"head.\1")
        m.rename(r"((?:patch_embed|blocks)\..*)", r"\1")
        return
    m.rename(r"(absolute_pos_embed|(?:patch_embed|blocks|norm|fc_norm|head)\..*)", r"\1")
    if not LAST_NORMS & m.found.keys():
        raise UserError(
            f"The file has no {' or '.join(sorted(LAST_NORMS))}. Get a complete copy, "
            "or pass its folder as --model if mimkit wrote it."
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
    relative = any(name.endswith("position_bias_table") for name in state)
    arguments: dict[str, Any] = {
        "in_chans": channels,
        "patch_size": patch,
        "unit_form": not relative,
        "multi_scale": "norm.weight" in state and len(state["norm.weight"]) != width,
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "pos_antialias": False,
    }
    if side**2 == cells:
        arguments["img_size"] = 4 * patch * side
    if not LAST_NORMS & state.keys():  # mmpretrain's
        arguments["final_norm"] = False
        if relative or "head.weight" in state:  # a classifier's epsilon; that of its MAE is ours
            arguments["norm_eps"] = 1e-5
    return arguments


FAMILY = Family(
    title="zhangxiaosong18/hivit and mmpretrain's HiViT",
    marks=(r"patch_embed\.norm\.weight", r"blocks\.\d+\.reduction\.weight", r"(absolute_)?pos_embed"),
    remap=remap,
    options=options,
    reader=None,
    parity_test="test_hivit",
)
