"""Compare each family with the library that its files come from, on tiny random networks."""

import argparse
import json
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import fill
from einops import rearrange
from safetensors.torch import load_file, save_file
from svit_reference import Reference, released, shaken

from mimkit.conversion import source
from mimkit.conversion.computed import is_relative_index
from mimkit.conversion.convert import as_pyramid, convert, read_released
from mimkit.conversion.family import Remap, families
from mimkit.conversion.source import find_source, read_plain
from mimkit.conversion.verify import check_reader, difference, tokens_after
from mimkit.errors import UserError
from mimkit.io.weights import assemble, read_weights, save_model
from mimkit.models.hpvit import plain_vit
from mimkit.models.layers.pos_embed import sincos_positions
from mimkit.models.pretrained import load_network
from mimkit.units import serialize

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 64}
HF = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 192, "image_size": 64}
HF["patch_size"] = 16
HF14 = {**HF, "patch_size": 14, "image_size": 56}


class File(NamedTuple):
    """A file of a family, and the network that was written to it."""

    net: Any
    name: str  # alias, or name in timm
    path: Path
    layout: str
    source_args: dict[str, Any]

    @property
    def options(self):
        """Arguments of `convert`."""
        return {"checkpoint": self.path, "layout": self.layout, "source_args": self.source_args}


def tiny(name, **options):
    """Build a timm network of this name with every tensor at order 1."""
    return fill(plain_vit(name, **{**TINY, **options})).eval()


# Files of transformers -----------------------------------------------------------------------------------------------


class HfNetwork(NamedTuple):
    """A network of transformers, by the names of its classes, and its counterpart in timm."""

    network: str
    config: str
    options: dict[str, Any]
    name: str
    source_args: dict[str, Any] = {}  # noqa: RUF012  of timm's network, where its name implies others


DECODER = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
DECODER |= {"decoder_intermediate_size": 64, "mask_ratio": 0.0}
SHARED = {"use_shared_relative_position_bias": True, "use_mask_token": True, "vocab_size": 8}
REGISTERS = {**HF, "num_register_tokens": 4}
HF_NETWORKS = {
    "hf_vit": HfNetwork("ViTForImageClassification", "ViTConfig", {**HF, "num_labels": 5}, "vit_base_patch16_224"),
    "hf_deit": HfNetwork(
        "DeiTForImageClassificationWithTeacher",
        "DeiTConfig",
        {**HF, "num_labels": 5},
        "deit_base_distilled_patch16_224",
    ),
    "hf_mae": HfNetwork("ViTMAEForPreTraining", "ViTMAEConfig", {**HF, **DECODER}, "vit_base_patch16_224"),
    "hf_dinov2": HfNetwork("Dinov2Model", "Dinov2Config", HF14, "vit_base_patch14_dinov2"),
    "hf_dinov2_registers": HfNetwork(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", HF14, "vit_base_patch14_reg4_dinov2"
    ),
    "hf_dinov2_swiglu": HfNetwork(
        "Dinov2ForImageClassification",
        "Dinov2Config",
        {**HF14, "use_swiglu_ffn": True},
        "vit_giant_patch14_dinov2",
        {"mlp_ratio": 8 / 3 * 2},
    ),
    "hf_dinov3": HfNetwork("DINOv3ViTModel", "DINOv3ViTConfig", REGISTERS, "vit_small_patch16_dinov3_qkvb"),
    "hf_dinov3_gated": HfNetwork(
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**REGISTERS, "use_gated_mlp": True, "hidden_act": "silu"},
        "vit_huge_plus_patch16_dinov3_qkvb",
        {"mlp_ratio": 4.0, "swiglu_align_to": 0},
    ),
    "hf_beit": HfNetwork(
        "BeitForImageClassification",
        "BeitConfig",
        {**HF, "use_relative_position_bias": True, "num_labels": 5},
        "beit_base_patch16_224",
    ),
    "hf_beit_shared": HfNetwork("BeitForMaskedImageModeling", "BeitConfig", {**HF, **SHARED}, "beit_base_patch16_224"),
    "hf_clip": HfNetwork(
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        {**HF, "projection_dim": 8},
        "vit_base_patch16_clip_quickgelu_224",
    ),
}


@pytest.fixture(scope="module")
def transformers():
    """Import transformers with the classes that the tests use, which takes seconds."""
    import transformers

    for network in HF_NETWORKS.values():
        getattr(transformers, network.network)
    return transformers


def transformers_file(key, folder, spelling="old"):
    """Write a tiny network of transformers with every tensor at order 1."""
    import transformers

    network, config, options, name, source_args = HF_NETWORKS[key]
    net = fill(getattr(transformers, network)(getattr(transformers, config)(**options))).eval()
    net.save_pretrained(folder)
    if spelling == "new":  # the names that networks of transformers 5 have in memory
        save_file({key: value.contiguous() for key, value in net.state_dict().items()}, folder / "model.safetensors")
    return File(net, name, folder, "hf", {**TINY, "img_size": net.config.image_size, **source_args})


def hidden(net, x):
    """Return the tokens after the last block, before the final norm."""
    options = {}
    if net.config.model_type == "vit_mae":
        net, options = net.vit, {"noise": torch.arange((x.shape[-1] // 16) ** 2)[None].float()}
    if type(net).__name__ == "BeitForMaskedImageModeling":
        net = net.beit
    return net(pixel_values=x, output_hidden_states=True, **options).hidden_states[-1]


# Files in the original layouts ---------------------------------------------------------------------------------------


def mae_file(folder):
    """An encoder and a decoder, nested under `model`."""
    net = tiny("vit_base_patch16_224", num_classes=0)
    decoder = {"mask_token": torch.randn(1, 1, 32), "decoder_pos_embed": torch.randn(1, 17, 32)}
    decoder |= {"decoder_blocks.0.norm1.weight": torch.randn(32), "decoder_pred.bias": torch.randn(768)}
    torch.save({"model": {**net.state_dict(), **decoder}}, folder / "mae.pth")
    return net, "vit_b_mae", folder / "mae.pth", "mae"


def mae_finetuned_file(folder):
    """A fine-tuned file, with `fc_norm` and `head` but no `norm`."""
    net = tiny("vit_base_patch16_224", num_classes=7, global_pool="avg")
    torch.save({"model": net.state_dict()}, folder / "mae.pth")
    return net, "vit_b_mae", folder / "mae.pth", "mae"


def dino_file(folder):
    """A student and a teacher, each with a projection head."""
    net = tiny("vit_base_patch16_224", num_classes=0)
    head = {"module.head.mlp.0.weight": torch.randn(4, 48), "module.head.last_layer.weight_g": torch.randn(4, 1)}
    teacher = {f"module.backbone.{k}": v for k, v in net.state_dict().items()} | head
    student = {k: torch.randn_like(v) for k, v in teacher.items()}
    torch.save({"student": student, "teacher": teacher, "epoch": 3}, folder / "dino.pth")
    return net, "dino_b16", folder / "dino.pth", "dino"


def deit_file(folder):
    """A distilled DeiT."""
    net = tiny("deit_base_distilled_patch16_224", num_classes=7)
    torch.save({"model": net.state_dict()}, folder / "deit.pth")
    return net, "deit_b_distilled", folder / "deit.pth", "deit"


def deit3_file(folder):
    """A DeiT III, whose LayerScale has other names than timm's."""
    net = tiny("deit3_base_patch16_224", num_classes=7)
    state = {k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for k, v in net.state_dict().items()}
    torch.save({"model": state}, folder / "deit3.pth")
    return net, "deit3_b", folder / "deit3.pth", "deit"


def dinov2_file(folder):
    """A DINOv2 with registers, a mask token and patches of 14 px."""
    net = tiny("vit_base_patch14_reg4_dinov2", img_size=56, num_classes=0)
    state = dict(net.state_dict())
    first = torch.randn(1, 1, 48)
    state["register_tokens"] = state.pop("reg_token")
    state["cls_token"] = state["cls_token"] - first
    state["pos_embed"] = torch.cat([first, state["pos_embed"]], dim=1)
    torch.save({**state, "mask_token": torch.randn(1, 48)}, folder / "dinov2.pth")
    return net, "dinov2_b_reg", folder / "dinov2.pth", "dinov2"


def dinov2_chunked_file(folder):
    """A training checkpoint: a teacher with chunked blocks and SwiGLU."""
    net = tiny("vit_giant_patch14_dinov2", img_size=56, num_classes=0)
    state = {}
    for key, value in net.state_dict().items():
        key = key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        state["backbone." + (key.replace("blocks.", "blocks.0.") if key.startswith("blocks.") else key)] = value
    torch.save({"teacher": {**state, "dino_head.mlp.0.weight": torch.randn(3, 48)}}, folder / "dinov2.pth")
    return net, "dinov2_g", folder / "dinov2.pth", "dinov2"


def dinov3_file(folder):
    """A DINOv3 with RoPE periods, storage tokens and a bias mask."""
    net = tiny("vit_small_patch16_dinov3_qkvb", num_classes=0)
    state = {}
    for key, value in net.state_dict().items():
        if key.endswith("q_bias"):
            v = net.state_dict()[key.replace("q_bias", "v_bias")]
            state[key.replace("q_bias", "qkv.bias")] = torch.cat([value, torch.randn_like(value), v])
            state[key.replace("q_bias", "qkv.bias_mask")] = torch.cat([torch.ones(48), torch.zeros(48), torch.ones(48)])
        elif not key.endswith("v_bias"):
            key = key.replace("reg_token", "storage_tokens")
            state[key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")] = value
    state |= {"mask_token": torch.randn(1, 48), "rope_embed.periods": 100 ** (torch.arange(4) / 4).bfloat16()}
    torch.save(state, folder / "dinov3.pth")
    return net, "vit_small_patch16_dinov3_qkvb", folder / "dinov3.pth", "dinov3"


def beit_file(folder):
    """A fine-tuned BEiT with an index buffer in every block."""
    net = tiny("beit_base_patch16_224", num_classes=7)
    index = {f"blocks.{i}.attn.relative_position_index": net.blocks[i].attn.relative_position_index for i in range(2)}
    state = net.state_dict() | index
    torch.save({"module": state}, folder / "beit.pth")
    return net, "beit_b", folder / "beit.pth", "beit"


def beit_pretrained_file(folder):
    """A pre-trained BEiT with one bias table for all blocks, a norm, and no head."""
    options = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "use_fc_norm": False, "num_classes": 0}
    net = tiny("beit_base_patch16_224", **options)
    state = net.state_dict() | {"mask_token": torch.randn(1, 1, 48), "lm_head.weight": torch.randn(9, 48)}
    torch.save({"model": {**state, "lm_head.bias": torch.randn(9)}}, folder / "beit.pth")
    return net, "beit_b", folder / "beit.pth", "beit"


def ijepa_file(folder):
    """An encoder and a target encoder."""
    net = tiny("vit_huge_patch14_gap_224", img_size=56, num_classes=0, fc_norm=False)
    target = {f"module.{k}": v for k, v in net.state_dict().items()}
    encoder = {k: torch.randn_like(v) for k, v in target.items()}
    torch.save({"encoder": encoder, "target_encoder": target, "epoch": 1}, folder / "ijepa.pth")
    return net, "ijepa_h", folder / "ijepa.pth", "ijepa"


def clip_file(folder):
    """A complete CLIP with its text tower."""
    net = tiny("vit_base_patch16_clip_quickgelu_224", num_classes=8)
    with torch.no_grad():
        net.head.bias.zero_()
    names = {"patch_embed.proj": "conv1", "norm_pre": "ln_pre", "norm1": "ln_1", "norm2": "ln_2", "mlp.fc1": "mlp.c_fc"}
    names |= {"attn.qkv.": "attn.in_proj_", "attn.proj": "attn.out_proj", "mlp.fc2": "mlp.c_proj"}
    state = {}
    for key, value in net.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        key = key.replace("blocks.", "transformer.resblocks.").replace("cls_token", "class_embedding")
        key = "ln_post" + key.removeprefix("norm") if key.startswith("norm.") else key
        if key == "head.weight":
            key, value = "proj", value.T
        if key in ("class_embedding", "pos_embed"):
            key, value = key.replace("pos_embed", "positional_embedding"), value.squeeze()
        if key != "head.bias":
            state[f"visual.{key}"] = value.contiguous()
    state |= {"text_projection": torch.randn(4, 4), "logit_scale": torch.ones(()), "ln_final.weight": torch.randn(4)}
    torch.save(state | {"transformer.resblocks.0.ln_1.weight": torch.randn(4)}, folder / "clip.pt")
    return net, "clip_b16", folder / "clip.pt", "openclip"


def timm_file(folder, name, **options):
    net = tiny(name, **options)
    save_file(net.state_dict(), folder / "model.safetensors")
    return net, name, folder / "model.safetensors", "timm"


def siglip_file(folder):
    return timm_file(folder, "vit_base_patch16_siglip_224", num_classes=0)


def openclip_timm_file(folder):
    """An OpenCLIP whose image tower is a timm network."""
    net = tiny("vit_base_patch16_siglip_224", num_classes=0)
    state = {f"visual.trunk.{key}": value for key, value in net.state_dict().items()}
    torch.save({**state, "logit_bias": torch.zeros(()), "text.cls_emb": torch.randn(3)}, folder / "clip.pt")
    return net, "vit_base_patch16_siglip_224", folder / "clip.pt", "openclip"


def half_file(folder):
    """An MAE in half precision."""
    net = tiny("vit_base_patch16_224", num_classes=0).half().float()
    torch.save({"model": {key: value.half() for key, value in net.state_dict().items()}}, folder / "mae.pth")
    return net, "vit_b_mae", folder / "mae.pth", "mae"


def eva02_file(folder):
    return timm_file(folder, "eva02_base_patch14_224", img_size=56, num_classes=0)


def sam_file(folder):
    return timm_file(folder, "samvit_base_patch16", num_classes=0, window_size=3, global_attn_indexes=[1])


def sam_original_file(folder):
    """An image encoder with prompt encoder and mask decoder."""
    net = tiny("samvit_base_patch16", num_classes=0, window_size=3, global_attn_indexes=[1])
    state = {f"image_encoder.{key.replace('mlp.fc', 'mlp.lin')}": value for key, value in net.state_dict().items()}
    torch.save(
        state | {"mask_decoder.iou_token.weight": torch.randn(1, 8), "pixel_mean": torch.zeros(3)}, folder / "sam.pth"
    )
    return net, "sam_b", folder / "sam.pth", "sam"


BUILDERS = [mae_file, mae_finetuned_file, dino_file, deit_file, deit3_file, dinov2_file, dinov2_chunked_file]
BUILDERS += [dinov3_file, beit_file, beit_pretrained_file, ijepa_file, clip_file, siglip_file, eva02_file, sam_file]
BUILDERS += [sam_original_file, openclip_timm_file, half_file]
ORIGINAL = {build.__name__.removesuffix("_file"): build for build in BUILDERS}
ALL = [*ORIGINAL, *HF_NETWORKS]
NO_READER = ("dinov2_chunked",)  # timm's loader does not read chunked blocks


@pytest.fixture(scope="module")
def write(tmp_path_factory, transformers):
    """Return a function that writes a file by its key, once for the whole module."""

    @cache
    def write(key, spelling="old"):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(key)
        if key in HF_NETWORKS:
            return transformers_file(key, folder, spelling)
        net, name, path, layout = ORIGINAL[key](folder)
        source_args = {**TINY, "img_size": net.patch_embed.img_size[0]}
        if key in ("sam", "sam_original"):
            source_args |= {"window_size": 3, "global_attn_indexes": [1]}
        return File(net, name, path, layout, source_args)

    return write


@pytest.fixture(scope="module")
def read(write):
    """Return a function that reads the plain ViT in such a file, once for the whole module."""

    @cache
    def read(key):
        file = write(key)
        return read_plain(find_source(file.name).name, file.path, file.layout, given=file.source_args)

    return read


@pytest.fixture(scope="module")
def converted(write, tmp_path_factory):
    """Return a function that converts such a file to an HPViT on disk, once for the whole module."""

    @cache
    def converted(key, spelling="old"):
        file, out = write(key, spelling), tmp_path_factory.mktemp("out") / key
        return out, convert(file.name, out=out, **file.options)

    return converted


def load(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


# Parity --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize("key", HF_NETWORKS)
@torch.no_grad()
def test_transformers(key, spelling, write, converted, tmp_path):
    """The checks pass, and the network of transformers, the pyramid, and both plain ViTs compute the same tokens."""
    file, (out, report) = write(key, spelling), converted(key, spelling)
    results = {check["name"]: check["result"] for check in report.checks}
    assert results["the pyramid is the plain ViT"] == "passed"
    assert results["an independent reader"] == "passed", report.checks
    side = file.source_args["img_size"]
    x = torch.randn(1, 3, side, side)
    theirs = hidden(file.net, x)
    if side == 64:  # the kernel has 16 px, so the pyramid itself can be compared
        assert difference(load(out).stages(x, 2)[-1][0], theirs) < 1e-5
    convert(file.name, "timm", out=tmp_path / "timm", **file.options)
    plain = load(tmp_path / "timm")
    assert difference(tokens_after(plain, x, 2)[0], theirs) < 1e-5
    convert(str(out), "timm", out=tmp_path / "back")
    assert difference(tokens_after(load(tmp_path / "back"), x, 2)[0], theirs) < 1e-5
    if isinstance(getattr(file.net, "classifier", None), torch.nn.Linear) and plain.num_classes:
        assert difference(plain(x), file.net(x).logits) < 1e-5


@pytest.mark.parametrize("key", ["hf_vit", "hf_deit", "hf_beit", "hf_clip"])
@torch.no_grad()
def test_pyramids_keep_the_logits_of_transformers(key, write, converted):
    """Logits: of ViT, of DeiT's two heads, of BEiT's mean patch token, and of CLIP's projection."""
    file, (out, _) = write(key), converted(key)
    x = torch.randn(1, 3, 64, 64)
    theirs = file.net(x).image_embeds if key == "hf_clip" else file.net(x).logits
    assert difference(load(out)(x), theirs) < 1e-5


@pytest.mark.parametrize("key", ORIGINAL)
@torch.no_grad()
def test_own_layouts(key, write, converted, tmp_path):
    """The checks pass, timm's own loader among them, and converting there and back returns the file's network."""
    file, (out, report) = write(key), converted(key)
    net = file.net
    results = {check["name"]: check["result"] for check in report.checks}
    assert results["the pyramid is the plain ViT"] == "passed"
    assert results["an independent reader"] == ("no independent reader" if key in NO_READER else "passed")
    side = net.patch_embed.patch_size[0]
    assert results["the kernel's resize"] == ("not applicable" if side == 16 else "passed")
    x = torch.randn(1, 3, *net.patch_embed.img_size)
    if side == 16:
        assert difference(load(out)(x), net(x)) < 1e-5
    convert(str(out), "timm", out=tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == net.state_dict().keys()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(back[name], value, rtol=1e-5, atol=1e-6)
    assert difference(load(tmp_path / "back")(x), net(x)) < 1e-5


@pytest.mark.parametrize("key", ALL)
def test_every_tensor_is_reported_once(key, write, read):
    file, plain = write(key), read(key)
    rows = as_pyramid(plain, "hpvit", {}).rows
    assert sorted(origin for row in rows for origin in row.origins) == sorted(read_weights(file.path))
    targets = [target for row in rows if row.target for target in row.target.split(", ")]
    pyramid = timm.create_model("hpvit", source=plain.name, source_args=file.source_args, num_classes=0)
    assert len(targets) == len(set(targets))
    assert set(targets) >= {name for name in pyramid.state_dict() if "norm." not in name and "relative" not in name}
    assert all(row.why for row in rows if row.action in ("dropped", "fresh", "resized"))


def test_every_family_has_a_parity_test(write):
    assert {write(key).layout for key in ALL} | {"mmpretrain", "hivit", "svit"} == families().keys()
    assert not [layout for layout, family in families().items() if family.parity_test not in globals()]


# Negative controls: wrong families must be caught --------------------------------------------------------------------


def swap_q_and_k(state):
    for key in [key for key in state if key.endswith("attn.qkv.weight")]:
        q, k, v = state[key].chunk(3)
        state[key] = torch.cat([k, q, v])
    for key in [key for key in state if key.endswith("attn.q_proj.weight")]:
        other = key.replace("q_proj", "k_proj")
        state[key], state[other] = state[other], state[key]


def drop_layer_scale(state):
    for key in [key for key in state if key.endswith((".gamma", "gamma_1", "gamma_2"))]:
        state[key] = torch.ones_like(state[key])


def transpose_positions(state):
    if "pos_embed" in state and state["pos_embed"].ndim == 3:
        table = state["pos_embed"]
        cells = math.isqrt(table.shape[1]) ** 2
        prefix, grid = table[:, : table.shape[1] - cells], table[:, table.shape[1] - cells :]
        transposed = rearrange(grid, "b (h w) d -> b (w h) d", h=math.isqrt(cells))
        state["pos_embed"] = torch.cat([prefix, transposed], dim=1)


def flip_final_norm(state):
    for key in [key for key in state if key in ("norm.weight", "fc_norm.weight")]:
        state[key] = state[key].flip(0) * 3


def flip_head(state):
    for key in [key for key in state if key.startswith("head.") and key.endswith("weight")]:
        state[key] = state[key].flip(0)


MUTANTS = [swap_q_and_k, drop_layer_scale, transpose_positions, flip_final_norm, flip_head]


@pytest.mark.parametrize("mutate", MUTANTS)
@pytest.mark.parametrize("key", ALL)
def test_the_reader_catches_a_wrong_family(key, mutate, write, read):
    """If a family's result is wrong, the independent reader's output differs."""
    file, plain = write(key), read(key)
    state = {name: tensor.clone() for name, tensor in plain.state.items()}
    mutate(state)
    changed = [name for name, tensor in plain.state.items() if not torch.equal(tensor, state[name])]
    if key in NO_READER:
        pytest.skip("there is no reader: test_own_layouts compares instead")
    if key == "hf_beit_shared" and mutate is flip_final_norm:
        pytest.skip("in transformers, this norm is part of the pre-training loss, not of BeitModel")
    if not changed:
        assert mutate is not swap_q_and_k
        pytest.skip(f"{file.name} has nothing that {mutate.__name__} could break")
    with pytest.raises(UserError, match=f"{families()[file.layout].reader} reads .* differently"):
        check_reader(replace(plain, state=state), file.path, families()[file.layout])


@pytest.mark.parametrize(
    "key", ["mae", "dino", "deit", "dinov2", "dinov3", "beit", "ijepa", "clip", "siglip", "sam_original", "hf_vit"]
)
def test_a_wrong_family_writes_nothing(key, write, tmp_path, monkeypatch):
    """If a family's result is wrong, the conversion ends in an error and leaves no files."""
    file = write(key)
    family = families()[file.layout]

    def wrong(m):
        family.remap(m)
        swap_q_and_k(m.found)

    monkeypatch.setattr(source, "families", lambda: {**families(), file.layout: replace(family, remap=wrong)})
    with pytest.raises(UserError, match="differently"):
        convert(file.name, out=tmp_path / "out", **file.options)
    assert not (tmp_path / "out").exists()


# Families without a reader -------------------------------------------------------------------------------------------


def mmpretrain_vit(state, x, heads, patch=16):
    """Compute what mmpretrain's VisionTransformer does, written from its layout without timm or mimkit."""
    x = F.conv2d(x, state["patch_embed.projection.weight"], state["patch_embed.projection.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + state["pos_embed"]
    d = x.shape[-1]
    for i in range(1 + max(int(key.split(".")[1]) for key in state if key.startswith("layers."))):
        w = {key.removeprefix(f"layers.{i}."): v for key, v in state.items() if key.startswith(f"layers.{i}.")}
        y = F.layer_norm(x, (d,), w["ln1.weight"], w["ln1.bias"], 1e-6)
        q, k, v = F.linear(y, w["attn.qkv.weight"], w["attn.qkv.bias"]).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
        y = F.linear(y.transpose(1, 2).flatten(2), w["attn.proj.weight"], w["attn.proj.bias"])
        x = x + y * w.get("attn.gamma1.weight", 1.0)
        y = F.layer_norm(x, (d,), w["ln2.weight"], w["ln2.bias"], 1e-6)
        y = F.gelu(F.linear(y, w["ffn.layers.0.0.weight"], w["ffn.layers.0.0.bias"]))
        x = x + F.linear(y, w["ffn.layers.1.weight"], w["ffn.layers.1.bias"]) * w.get("ffn.gamma2.weight", 1.0)
    x = F.layer_norm(x, (d,), state["ln1.weight"], state["ln1.bias"], 1e-6)
    return F.linear(x[:, 0], state["head.layers.head.weight"], state["head.layers.head.bias"])


@pytest.fixture(scope="module")
def mmpretrain_file(tmp_path_factory):
    """Return a function that writes a file of mmpretrain, with or without LayerScale, and returns it and its state."""

    @cache
    def write(scale):
        torch.manual_seed(0)
        d, state = 48, {"cls_token": torch.randn(1, 1, 48), "pos_embed": torch.randn(1, 17, 48)}
        shapes = {"patch_embed.projection": (d, 3, 16, 16), "ln1": (d,), "head.layers.head": (7, d)}
        for i in range(2):
            shapes |= {f"layers.{i}.{n}": (d,) for n in ("ln1", "ln2")}
            shapes |= {f"layers.{i}.attn.qkv": (3 * d, d), f"layers.{i}.attn.proj": (d, d)}
            shapes |= {f"layers.{i}.ffn.layers.0.0": (4 * d, d), f"layers.{i}.ffn.layers.1": (d, 4 * d)}
            if scale:
                state |= {f"layers.{i}.{n}.weight": torch.randn(d) for n in ("attn.gamma1", "ffn.gamma2")}
        for name, shape in shapes.items():
            state[f"{name}.weight"] = torch.randn(shape) * math.prod(shape[1:]) ** -0.5
            state[f"{name}.bias"] = torch.randn(shape[0])
        spelled = {name if name.startswith("head") else f"backbone.{name}": value for name, value in state.items()}
        path = tmp_path_factory.mktemp("mmpretrain") / "mm.pth"
        torch.save({"state_dict": spelled, "meta": {"epoch": 1}}, path)
        arguments = {**TINY, "init_values": 1e-5 if scale else None}
        return File(None, "vit_base_patch16_224", path, "mmpretrain", arguments), state

    return write


@pytest.mark.parametrize("scale", [False, True])
@torch.no_grad()
def test_mmpretrain(scale, mmpretrain_file, tmp_path):
    file, state = mmpretrain_file(scale)
    report = convert(file.name, out=tmp_path / "out", **file.options)
    reader = next(check for check in report.checks if check["name"] == "an independent reader")
    assert reader["result"] == "no independent reader"
    assert "test_converters.py::test_mmpretrain" in reader["text"]
    x = torch.randn(1, 3, 64, 64)
    assert difference(load(tmp_path / "out")(x), mmpretrain_vit(state, x, heads=3)) < 1e-5


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("mutate", [swap_q_and_k, drop_layer_scale, transpose_positions])
@torch.no_grad()
def test_the_reference_of_mmpretrain_catches_a_wrong_family(scale, mutate, mmpretrain_file):
    file, state = mmpretrain_file(scale)
    plain = read_plain(file.name, file.path, file.layout, given=file.source_args)
    mutate(plain.state)
    target = as_pyramid(plain, "hpvit", {})
    x = torch.randn(1, 3, 64, 64)
    gap = difference(assemble(target.net, target.state).eval()(x), mmpretrain_vit(state, x, heads=3))
    harmless = mutate is drop_layer_scale and not scale
    assert gap < 1e-5 if harmless else gap > 1e-3


def offset_rows(side):
    """Return the rows (n n) of a relative position table, from the definition: one row for each offset of two cells."""
    cells = [(y, x) for y in range(side) for x in range(side)]
    rows = [[(y - v + side - 1) * (2 * side - 1) + x - u + side - 1 for v, u in cells] for y, x in cells]
    return torch.tensor(rows)


@pytest.mark.parametrize("form", ["supervised", "masked", "multi_scale"])
@torch.no_grad()
def test_hivit(form, tmp_path):
    options = {
        "supervised": {"num_classes": 7},
        "masked": {"num_classes": 0, "unit_form": True},
        "multi_scale": {"num_classes": 0, "unit_form": True, "multi_scale": True},
    }[form]
    net = fill(timm.create_model("hivit_nano", img_size=64, **options)).eval()
    state = dict(net.state_dict())
    if form != "supervised":
        positions = sincos_positions(8, (4, 4))[None].half()
        state |= {"mask_token": torch.randn(1, 1, 8), "decoder_pos_embed": positions}
    else:
        state |= {"relative_position_index": offset_rows(4)}
    torch.save({"model": state}, tmp_path / "hivit.pth")
    report = convert("hivit_nano", "hivit_nano", tmp_path / "out", tmp_path / "hivit.pth", "hivit")
    back = load(tmp_path / "out")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(back.forward_features(x), net.forward_features(x))
    if form == "supervised":
        assert torch.equal(back(x), net(x))
    elif form == "multi_scale":
        units = torch.randn(1, 4, 3, 16, 16)
        index = torch.tensor([[0, 3, 5, 9]])
        assert torch.equal(back.encode_units(units, index, (4, 4)), net.encode_units(units, index, (4, 4)))
    assert [check["result"] for check in report.checks] == ["no independent reader", "passed"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mimkit"]["checks"]
    arguments, weights = read_released("hivit_nano", tmp_path / "hivit.pth")
    assert arguments["num_classes"] == net.num_classes
    again = timm.create_model("hivit_nano", **arguments).eval()
    again.load_state_dict(weights)
    assert torch.equal(again.forward_features(x), net.forward_features(x))


def mmpretrain_hivit(state, x, heads, eps):
    """Compute the tokens of mmpretrain's HiViT, written from the names of its tensors without timm or mimkit."""

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    kernel = state["patch_embed.proj.weight"]
    x = F.conv2d(x, kernel, state["patch_embed.proj.bias"], stride=kernel.shape[-1])
    x = norm("patch_embed.norm", rearrange(x, "b d (h i) (w j) -> b (h w) i j d", i=4, j=4))
    for i in range(1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))):
        name = f"blocks.{i}"
        if f"{name}.reduction.weight" in state:
            x = rearrange(x, "b n (i y) (j x) d -> b n i j (x y d)", y=2, x=2)
            x = linear(f"{name}.reduction", norm(f"{name}.norm", x))
            continue
        if f"{name}.attn.qkv.weight" in state:
            x = x if x.ndim == 3 else x[:, :, 0, 0] + state["pos_embed"]
            qkv = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", x))
            q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=heads)
            logits = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
            if f"{name}.attn.relative_position_bias_table" in state:
                rows = offset_rows(math.isqrt(x.shape[1]))
                logits = logits + state[f"{name}.attn.relative_position_bias_table"][rows].movedim(-1, 0)
            x = x + linear(f"{name}.attn.proj", rearrange(logits.softmax(-1) @ v, "b h n d -> b n (h d)"))
        x = x + linear(f"{name}.mlp.fc2", F.gelu(linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x))))
    return x


def mmpretrain_hivit_state(form):
    """Return random tensors under the names of mmpretrain 1.2.0: a classifier with or without tables, or an MAE."""
    torch.manual_seed(0)
    d, shapes, state = 32, {"patch_embed.proj": (32, 3, 4, 4), "patch_embed.norm": (32,)}, {}
    for i in range(8):  # a stem block, a merge, a stem block, a merge, four main blocks
        if i in (1, 3):
            state[f"blocks.{i}.reduction.weight"] = torch.randn(2 * d, 4 * d) * (4 * d) ** -0.5
            shapes[f"blocks.{i}.norm"] = (4 * d,)
            d *= 2
            continue
        ratio = 3 if i < 4 else 4
        shapes |= {
            f"blocks.{i}.norm2": (d,),
            f"blocks.{i}.mlp.fc1": (ratio * d, d),
            f"blocks.{i}.mlp.fc2": (d, ratio * d),
        }
        if i > 3:
            shapes |= {f"blocks.{i}.norm1": (d,), f"blocks.{i}.attn.qkv": (3 * d, d), f"blocks.{i}.attn.proj": (d, d)}
            if form == "classifier":
                state[f"blocks.{i}.attn.relative_position_bias_table"] = torch.randn(49, 4)
                state[f"blocks.{i}.attn.relative_position_index"] = offset_rows(4)
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.randn(shape) * math.prod(shape[1:]) ** -0.5
        state[f"{name}.bias"] = torch.randn(shape[0])
    return state | {"pos_embed": torch.randn(1, 16, d)}


@pytest.mark.parametrize("form", ["classifier", "classifier without tables", "mae"])
@torch.no_grad()
def test_mmpretrain_hivit(form, tmp_path):
    """The epsilon and the missing last norm of mmpretrain's networks are kept in the folder and in a fine-tuning."""
    state = mmpretrain_hivit_state(form)
    file = {f"backbone.{name}": tensor for name, tensor in state.items()}
    head = {"head.fc.weight": torch.randn(7, 128), "head.fc.bias": torch.randn(7)}
    rows, columns = sincos_positions(8, (4, 4)).chunk(2, dim=1)[::-1]
    table = F.pad(torch.cat([rows, columns], dim=1), (0, 0, 1, 0))[None]  # the row comes first, and a class token
    decoder = {
        "neck.decoder_pos_embed": table,
        "neck.mask_token": torch.randn(1, 1, 8),
        "neck.ln1.weight": torch.ones(8),
    }
    torch.save({"state_dict": file | (decoder if form == "mae" else head), "meta": {"epoch": 1}}, tmp_path / "mm.pth")
    convert("hivit_nano", "hivit_nano", tmp_path / "out", tmp_path / "mm.pth", "hivit")
    net = load(tmp_path / "out").double()
    x = torch.randn(2, 3, 64, 64).double()
    eps = 1e-6 if form == "mae" else 1e-5
    state = {name: tensor.double() for name, tensor in state.items()}
    expected = mmpretrain_hivit(state, x, heads=4, eps=eps)
    assert difference(net.forward_features(x), expected) < 1e-12
    assert difference(net.forward_features(x), mmpretrain_hivit(state, x, 4, 1.1e-5 - eps)) > 1e-9  # the other epsilon
    if form == "mae":
        units = serialize(x, 16)
        assert difference(net.encode_units(units, torch.arange(16).expand(2, -1), (4, 4)), expected) < 1e-12
    else:
        logits = F.linear(expected.mean(1), head["head.fc.weight"].double(), head["head.fc.bias"].double())
        assert difference(net(x), logits) < 1e-12
    tuned, _ = load_network("hivit_nano", str(tmp_path / "mm.pth"), read_released=read_released)
    assert difference(tuned.double().eval().forward_features(x), expected) < 1e-12


@torch.no_grad()
def test_released_positions_at_another_size(tmp_path):
    """A converted file, and the file itself as the start of a fine-tuning, resample positions as the authors do."""
    net = fill(timm.create_model("hivit_nano", img_size=64, num_classes=0, unit_form=True)).eval()
    torch.save({"model": net.state_dict()}, tmp_path / "hivit.pth")
    convert("hivit_nano", "hivit_nano", tmp_path / "out", tmp_path / "hivit.pth", "hivit")
    maps = rearrange(net.absolute_pos_embed, "1 (y x) d -> 1 d y x", y=4)
    expected = F.interpolate(maps, scale_factor=6 / 4, mode="bicubic").flatten(2).mT
    converted = load(tmp_path / "out")
    assert torch.allclose(converted.positions((6, 6)), expected, atol=1e-6)
    for name, init in ((str(tmp_path / "out"), None), ("hivit_nano", str(tmp_path / "hivit.pth"))):
        tuned, _ = load_network(name, init, read_released=read_released, img_size=96)
        assert not tuned.unit_form
        assert torch.allclose(tuned.absolute_pos_embed, expected, atol=1e-6)
        assert tuned._model_args["pos_antialias"] is False


def test_other_layouts_are_not_taken_for_mmpretrain(tmp_path):
    state = dict(timm.create_model("hivit_nano", img_size=64, num_classes=7).state_dict())
    torch.save({key: tensor for key, tensor in state.items() if "fc_norm" not in key}, tmp_path / "cut.pth")
    with pytest.raises(UserError, match=r"The file has no fc_norm\.weight or norm\.weight"):
        convert("hivit_nano", "hivit_nano", tmp_path / "out", tmp_path / "cut.pth", "hivit")
    state["pos_embed"] = state.pop("absolute_pos_embed")
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"4 tensors that hivit does not explain: fc_norm\.bias"):
        convert("hivit_nano", "hivit_nano", tmp_path / "out", tmp_path / "odd.pth", "hivit")


@pytest.mark.parametrize("name", ["svit_s", "svit_b", "svit_l"])
def test_svit(name, tmp_path):
    """Convert a file as the repository wrote it: two state dicts of a parallel run, and its arguments."""
    net = shaken(timm.create_model(name, depths=(1, 1, 1, 1), num_classes=7)).eval()
    state = released(net)
    parallel = {f"module.{key}": tensor for key, tensor in state.items()}
    other = {key: tensor + 1 for key, tensor in parallel.items()}
    run = {"epoch": 3, "args": argparse.Namespace(model="stvit", input_size=384)}
    torch.save({"model": parallel, "model_ema": other, **run}, tmp_path / "stvit.pth")
    given = {"weights": "model", "source_args": {"img_size": 64}}
    report = convert(name, name, tmp_path / "out", tmp_path / "stvit.pth", "svit", **given)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]
    dropped = [row for row in report.rows if row.action == "dropped"]
    assert len(dropped) == 8
    assert all("weights" in row.origins[0] and row.why for row in dropped)
    back = load(tmp_path / "out")
    x = torch.randn(1, 3, 96, 70)
    assert torch.equal(back(x), net(x))
    heads = [stage[0].attn.num_heads for stage in net.stages]
    double = {key: tensor.double() for key, tensor in state.items()}
    expected = Reference(double, strides=(2, 1, 2, 1), heads=heads)(x.double())
    assert torch.allclose(back.double().forward_features(x.double()), expected.movedim(1, -1), rtol=0, atol=1e-9)
    torch.save(state | {"surprise": torch.zeros(3)}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match="1 tensors that svit does not explain: surprise"):
        convert(name, name, tmp_path / "odd", tmp_path / "odd.pth", "svit")
    with pytest.raises(UserError, match="--source-args has depth, which the file of svit determines"):
        convert(name, name, tmp_path / "odd", tmp_path / "stvit.pth", "svit", source_args={"depth": 3})
    with pytest.raises(UserError, match=r"cannot become svit_nano\. Pass the same name to --from and --to"):
        convert(name, "svit_nano", tmp_path / "odd", tmp_path / "stvit.pth", "svit")
    with pytest.raises(UserError, match="A checkpoint of the family svit cannot become hpvit_s"):
        convert(name, "hpvit_s", tmp_path / "odd", tmp_path / "stvit.pth", "svit")


def test_read_released(tmp_path):
    """Read a released file with an input size, and refuse files of our own layout and other networks."""
    net = shaken(timm.create_model("svit_s", depths=(1, 1, 1, 1), num_classes=7)).eval()
    torch.save({"model": released(net)}, tmp_path / "svit.pth")
    arguments, weights = read_released("svit_s", tmp_path / "svit.pth", img_size=96)
    assert (arguments["num_classes"], arguments["depths"]) == (7, [1, 1, 1, 1])
    again = timm.create_model("svit_s", **arguments).eval()
    again.load_state_dict(weights)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x), net(x))
    save_file(net.state_dict(), tmp_path / "ours.safetensors")
    assert read_released("svit_s", tmp_path / "ours.safetensors") is None
    assert read_released("vit_base_patch16_224", tmp_path / "svit.pth") is None


# What files hold although networks compute it ------------------------------------------------------------------------


def encoder_state():
    net = timm.create_model("hivit_nano", img_size=64, num_classes=0, unit_form=True, multi_scale=True)
    table = sincos_positions(8, (4, 4))[None]
    return dict(net.state_dict()) | {"mask_token": torch.randn(1, 1, 8), "decoder_pos_embed": table}


def hivit_state():
    net = timm.create_model("hivit_nano", img_size=64, num_classes=7)
    index = {f"blocks.{i}.attn.relative_position_index": offset_rows(4) for i in range(4, 8)}
    return dict(net.state_dict()) | index | {"relative_position_index": offset_rows(4)}


def svit_state():
    return released(shaken(timm.create_model("svit_s", depths=(1, 1, 1, 1), num_classes=7)))


def mmpretrain_state():
    return mmpretrain_hivit_state("mae") | {"neck.decoder_pos_embed": sincos_positions(8, (4, 4))[None]}


def half(tensor):
    return tensor / 2


def moved(tensor):
    return tensor.roll(1, -1)


@pytest.mark.parametrize(
    ("family", "state", "name", "change"),
    [
        ("hivit", hivit_state, "relative_position_index", torch.zeros_like),
        ("hivit", hivit_state, "blocks.6.attn.relative_position_index", torch.Tensor.t),
        ("hivit", encoder_state, "decoder_pos_embed", moved),
        ("hivit", encoder_state, "decoder_pos_embed", half),
        ("hivit", mmpretrain_state, "neck.decoder_pos_embed", torch.clone),  # columns come first in it
        ("svit", svit_state, "layers.0.blocks.0.attn.fold.weights", half),
        ("svit", svit_state, "layers.3.blocks.0.attn.unfold.weights", torch.zeros_like),
        ("svit", svit_state, "patch_embed.proj.5.running_var", torch.neg),
    ],
)
def test_computed_tensors_are_checked(family, state, name, change, tmp_path):
    state = state()
    state[name] = change(state[name])
    torch.save({"model": state}, tmp_path / "file.pth")
    to = {"hivit": "hivit_nano", "svit": "svit_s"}[family]
    ours = "stem.norms.1.running_var" if name.endswith("running_var") else name
    with pytest.raises(UserError, match=rf"\b{re.escape(ours)}\b") as refused:
        convert(to, to, tmp_path / "out", tmp_path / "file.pth", family)
    assert len(str(refused.value)) < 300
    assert not (tmp_path / "out").exists()


def test_periods_and_masks_of_dinov3_are_checked(write):
    """A DINOv3 that was trained with other periods would be converted to those of the release."""
    state = read_weights(write("dinov3").path)
    for name in ("rope_embed.periods", "blocks.1.attn.qkv.bias_mask"):
        for wrong in (state[name] + 0.5, state[name][:-1], state[name].sum()):
            with pytest.raises(UserError, match=name):
                families()["dinov3"].remap(Remap(state | {name: wrong}, set()))


def test_other_indices_are_checked():
    index = timm.create_model("beit_base_patch16_224", depth=1, img_size=64).blocks[0].attn.relative_position_index
    assert is_relative_index(index)
    assert is_relative_index(offset_rows(3).int())
    assert not is_relative_index(index.roll(1))
    assert not is_relative_index(offset_rows(3)[:8, :8])
    assert not is_relative_index(torch.tensor(3))
    state = {"embeddings.position_ids": torch.arange(5)[None], "vit.x.relative_position_index": index}
    for name, tensor in state.items():
        remap = Remap({name: tensor.roll(1)}, set())
        with pytest.raises(UserError, match=name):
            families()["hf"].remap(remap)
        remap = Remap({name: tensor}, set())
        families()["hf"].remap(remap)
        assert [row.action for row in remap.rows] == ["dropped"]


@pytest.mark.parametrize("lost", ["norm_eps", "pos_antialias", "weight"])
def test_what_is_written_is_checked(lost, tmp_path, monkeypatch):
    """A HiViT that computes something else after writing is an error, even if only the config lacks an argument."""
    state = {f"backbone.{name}": tensor for name, tensor in mmpretrain_hivit_state("classifier").items()}
    head = {"head.fc.weight": torch.randn(7, 128), "head.fc.bias": torch.randn(7)}
    torch.save({"state_dict": state | head}, tmp_path / "mm.pth")

    def save(net, folder, **data):
        save_model(net, folder, **data)
        config = json.loads((folder / "config.json").read_text())
        config["model_args"].pop(lost, None)
        (folder / "config.json").write_text(json.dumps(config))
        if lost == "weight":
            weights = load_file(folder / "model.safetensors")
            weights["blocks.5.attn.proj.bias"][3] += 1e-4
            save_file(weights, folder / "model.safetensors")

    monkeypatch.setattr("mimkit.conversion.convert.save_model", save)
    with pytest.raises(UserError, match=r"The written network differs .* Nothing was written"):
        convert("hivit_nano", "hivit_nano", tmp_path / "out", tmp_path / "mm.pth", "hivit")
    assert not (tmp_path / "out").exists()
