"""CLIP files of github.com/openai/CLIP and github.com/mlfoundations/open_clip: the image tower.

It has OpenCLIP's own names, or timm's below `visual.trunk`.
"""

from typing import Any

import torch
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor

from mimkit.conversion.family import Family, Remap

BLOCK = {
    r"ln_1\.(.*)": r"norm1.\1",
    r"ln_2\.(.*)": r"norm2.\1",
    r"attn\.in_proj_(.*)": r"attn.qkv.\1",
    r"attn\.out_proj\.(.*)": r"attn.proj.\1",
    r"mlp\.c_fc\.(.*)": r"mlp.fc1.\1",
    r"mlp\.c_proj\.(.*)": r"mlp.fc2.\1",
    r"ls_([12])\.gamma": r"ls\1.gamma",
}


def remap(m: Remap) -> None:
    """Rename the image tower, and drop the text tower. The projection becomes the head, whose bias in timm is 0."""
    m.rename(r"visual\.conv1\.weight", "patch_embed.proj.weight")
    m.rename(r"visual\.class_embedding", "cls_token", lambda t: t[None, None])
    m.rename(r"visual\.positional_embedding", "pos_embed", lambda t: t[None])
    m.rename(r"visual\.ln_pre\.(.*)", r"norm_pre.\1")
    m.rename(r"visual\.ln_post\.(.*)", r"norm.\1")
    for pattern, to in BLOCK.items():
        numbered = to.replace(r"\1", r"\2")
        m.rename(rf"visual\.transformer\.resblocks\.(\d+)\.{pattern}", rf"blocks.\1.{numbered}")
    m.rename(r"visual\.proj", "head.weight", lambda t: t.T)
    m.rename(r"visual\.trunk\.(.*)", r"\1")
    m.rename(r"visual\.head\.proj\.weight", "head.weight")
    if "head.weight" in m.found:
        m.make("head.bias", torch.zeros(len(m.found["head.weight"])), "CLIP's projection has no bias")
    m.drop(
        r"transformer\..*|token_embedding\..*|positional_embedding|ln_final\..*|text_projection.*|logit_.*|text\..*"
        r"|input_resolution|context_length|vocab_size|cls_emb|attn_mask",
        "text tower",
    )


def options(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
    """Choose QuickGELU for OpenAI's own files, which are the only ones with an `input_resolution`."""
    return {"act_layer": "quick_gelu"} if "input_resolution" in state else {}


FAMILY = Family(
    title="OpenAI CLIP and OpenCLIP",
    marks=(
        r"visual\.(conv1|trunk\.patch_embed\.proj)\.weight",
        r"visual\.(transformer\.resblocks\.0\.ln_1|trunk\.blocks\.0\.norm1)\.weight",
    ),
    remap=remap,
    options=options,
    data={"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD},
    aliases={
        "clip_b16": "vit_base_patch16_clip_quickgelu_224.openai",
        "clip_b32": "vit_base_patch32_clip_quickgelu_224.openai",
        "clip_l14": "vit_large_patch14_clip_quickgelu_224.openai",
        "openclip_b16": "vit_base_patch16_clip_224.laion2b",
        "openclip_b32": "vit_base_patch32_clip_224.laion2b",
        "openclip_l14": "vit_large_patch14_clip_224.laion2b",
        "openclip_h14": "vit_huge_patch14_clip_224.laion2b",
    },
)
