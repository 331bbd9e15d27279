"""Files of transformers: ViT, DeiT, ViTMAE, Dinov2 (with and without registers), DINOv3, BEiT, and CLIP's image tower.

Files have names such as `encoder.layer.0.attention.attention.query`. Networks of transformers 5 have other names in
memory, such as `layers.0.attention.q_proj`. Both are read.
"""

from typing import Any

import torch
from mimkit.converters.dinov2 import positions
from torch import Tensor

from mimkit.conversion.computed import is_range, is_relative_index
from mimkit.conversion.family import Family, Remap
from mimkit.errors import UserError

EPS = {"vit": 1e-12, "deit": 1e-12, "vit_mae": 1e-12, "beit": 1e-12, "dinov2": 1e-6, "dinov2_with_registers": 1e-6}
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
NET = r"(?:(?:vit|deit|beit|dinov2|dinov2_with_registers|dinov3_vit|vision_model)\.)?"
LAYER = NET + r"(?:model\.)?(?:encoder\.)?layers?\.(\d+)\."
ATTENTION = LAYER + r"(?:attention\.attention|attention|self_attn)\."
PARTS = {
    r"(?:layernorm_before|layer_norm1|norm1)\.(.*)": r"norm1.\2",
    r"(?:layernorm_after|layer_norm2|norm2)\.(.*)": r"norm2.\2",
    r"(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.(.*)": r"attn.proj.\2",
    r"(?:intermediate\.dense|mlp\.fc1)\.(.*)": r"mlp.fc1.\2",
    r"(?:output\.dense|mlp\.fc2|mlp\.weights_out)\.(.*)": r"mlp.fc2.\2",
    r"mlp\.weights_in\.(.*)": r"mlp.fc1.\2",  # SwiGLU of Dinov2: gate and value in one tensor
    r"(?:attention\.attention\.)?relative_position_bias\.(relative_position_bias_table)": r"attn.\2",
    r"lambda_([12])": r"gamma_\2",
}


def attention(m: Remap) -> None:
    """Fuse queries, keys and values.

    Networks without a key bias (BEiT, DINOv3) have separate biases for q and v, or none.

    Raises:
        UserError: a bias is not 0, but the network has none.
    """
    qkv = r"(?P<part>q|k|v)(?:uery|ey|alue|_proj)"
    m.fuse(ATTENTION + qkv + r"\.weight", r"blocks.\1.attn.qkv.weight", ("q", "k", "v"))
    if any(name.endswith(("key.bias", "k_proj.bias")) for name in m.remaining):
        m.fuse(ATTENTION + qkv + r"\.bias", r"blocks.\1.attn.qkv.bias", ("q", "k", "v"))
    for match, bias in m.take(ATTENTION + qkv + r"\.bias"):
        target = f"blocks.{match[1]}.attn.{match['part']}_bias"
        if target in m.wanted:
            m.put("renamed", (match[0],), target, bias)
        elif torch.count_nonzero(bias):
            raise UserError(f"{match[0]} is not 0, but the network has no such bias. Pass --from NAME with _qkvb.")
        else:  # DINOv3 in timm without _qkvb in its name
            m.skip(match[0], "all 0")


def remap(m: Remap) -> None:
    """Rename the tensors of all these networks: their names do not collide."""
    m.drop(r"(?:decoder\..*|.*mask_token|lm_head\..*)", "used in masked pre-training only")
    m.drop(r".*relative_position_index", "index buffer, recomputed", is_relative_index)
    m.drop(r".*position_ids", "index buffer, recomputed", is_range)
    m.drop(NET + r"pooler\.dense\..*", "pooler, not part of the backbone")
    m.drop(r"(text_model|text_projection|logit_scale)\b.*", "text tower")
    clip = r"vision_model\.embeddings\."
    m.rename(clip + r"class_embedding", "cls_token", lambda t: t[None, None])
    m.rename(clip + r"position_embedding\.weight", "pos_embed", lambda t: t[None])
    m.rename(clip + r"patch_embedding\.(.*)", r"patch_embed.proj.\1")
    m.rename(r"vision_model\.pre_layrnorm\.(.*)", r"norm_pre.\1")
    m.rename(r"vision_model\.post_layernorm\.(.*)", r"norm.\1")
    m.rename(r"visual_projection\.weight", "head.weight")
    if "head.weight" in m.found:
        m.make("head.bias", torch.zeros(len(m.found["head.weight"])), "CLIP's projection has no bias")

    embeddings = NET + r"embeddings\."
    if any(name.endswith("register_tokens") and not tensor.shape[1] for name, tensor in m.remaining.items()):
        m.drop(embeddings + r"register_tokens", "empty")
    m.rename(embeddings + r"register_tokens", "reg_token")
    positions(m, embeddings + "cls_token", embeddings + "position_embeddings")
    m.rename(embeddings + r"distillation_token", "dist_token")
    m.rename(embeddings + r"patch_embeddings\.(?:projection\.)?(.*)", r"patch_embed.proj.\1")
    attention(m)
    scale = r"blocks.\1.gamma_\2" if "blocks.0.gamma_1" in m.wanted else r"blocks.\1.ls\2.gamma"
    m.rename(LAYER + r"layer_scale([12])\.lambda1", scale)
    swiglu(m)
    for pattern, to in PARTS.items():
        m.rename(LAYER + pattern, r"blocks.\1." + to)
    m.rename(
        NET + r"(?:encoder\.relative_position_bias|shared_position_bias)\.(relative_position_bias_table)",
        r"rel_pos_bias.\1",
    )
    m.rename(r"(?:beit\.)?pooler\.layernorm\.(.*)", r"fc_norm.\1")
    m.rename(NET + r"(?:layernorm|norm)\.(.*)", r"norm.\1")
    classifier(m)


def swiglu(m: Remap) -> None:
    """Rename gate and value of a SwiGLU MLP: fused in timm's DINOv2, separate in its DINOv3."""
    if "blocks.0.mlp.fc1_g.weight" in m.wanted:
        m.rename(LAYER + r"mlp\.gate_proj\.(.*)", r"blocks.\1.mlp.fc1_g.\2")
        m.rename(LAYER + r"mlp\.up_proj\.(.*)", r"blocks.\1.mlp.fc1_x.\2")
    if any(name.endswith("gate_proj.weight") for name in m.remaining):
        m.fuse(LAYER + r"mlp\.(?P<part>gate|up)_proj\.(weight|bias)", r"blocks.\1.mlp.fc1.\3", ("gate", "up"))
    m.rename(LAYER + r"mlp\.up_proj\.(.*)", r"blocks.\1.mlp.fc1.\2")
    m.rename(LAYER + r"mlp\.down_proj\.(.*)", r"blocks.\1.mlp.fc2.\2")


def classifier(m: Remap) -> None:
    """Rename the classifier, and drop Dinov2's: it takes the class token and the mean patch token together."""
    m.rename(r"distillation_classifier\.(.*)", r"head_dist.\1")
    width = m.found["patch_embed.proj.weight"].shape[0] if "patch_embed.proj.weight" in m.found else 0
    if any(n.endswith("classifier.weight") and tensor.shape[1] != width for n, tensor in m.remaining.items()):
        m.drop(r"classifier\..*", "classifier of class token and mean patch token together")
    m.rename(r"(?:cls_)?classifier\.(.*)", r"head.\1")


def options(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Any]:
    """Return the norm epsilon and the activation, which no tensor shows."""
    vision = {**config, **config.get("vision_config", {})}
    found: dict[str, Any] = {}
    kind = config.get("model_type") or next((k for k in EPS if any(n.startswith(f"{k}.") for n in state)), None)
    eps = vision.get("layer_norm_eps", EPS.get(kind or ""))
    if eps is not None:
        found["norm_eps"] = eps
    clip = any(name.startswith("vision_model.") for name in state)
    activation = ACTIVATIONS.get(vision.get("hidden_act", "quick_gelu" if clip else "gelu"), "gelu")
    if activation != "gelu":
        found["act_layer"] = activation
    return found


FAMILY = Family(
    title="transformers",
    marks=(
        r".*embeddings\.(patch_embeddings\.projection|patch_embeddings|patch_embedding)\.weight",
        r".*layers?\.0\..*(query|q_proj)\.weight",
    ),
    remap=remap,
    options=options,
    reader="transformers",
    parity_test="test_transformers",
)
