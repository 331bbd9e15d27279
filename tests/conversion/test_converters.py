"""Each family against the library that its files come from: tiny random networks, through files, checks and all."""

import argparse
import copy
import json
import math

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from conftest import fill
from einops import rearrange
from safetensors.torch import load_file, save_file
from svit_reference import Reference, released, shaken

import mimkit
from mimkit.conversion import source
from mimkit.conversion.convert import convert
from mimkit.conversion.family import families
from mimkit.conversion.verify import difference, tokens_after
from mimkit.errors import UserError
from mimkit.models.hpvit import plain_vit

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 64}
HF = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 192, "image_size": 64}
HF["patch_size"] = 16


def tiny(name, **options):
    """A timm network of this name with every tensor at order 1."""
    return fill(plain_vit(name, **{**TINY, **options})).eval()


# Files of transformers -----------------------------------------------------------------------------------------------


def hf_vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(**HF, num_labels=5)), "vit_base_patch16_224"


def hf_deit():
    config = transformers.DeiTConfig(**HF, num_labels=5)
    return transformers.DeiTForImageClassificationWithTeacher(config), "deit_base_distilled_patch16_224"


def hf_mae():
    decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = transformers.ViTMAEConfig(**HF, **decoder, decoder_intermediate_size=64, mask_ratio=0.0)
    return transformers.ViTMAEForPreTraining(config), "vit_base_patch16_224"


def hf_dinov2():
    config = transformers.Dinov2Config(**(HF | {"patch_size": 14, "image_size": 56}))
    return transformers.Dinov2Model(config), "vit_base_patch14_dinov2"


def hf_dinov2_registers():
    config = transformers.Dinov2WithRegistersConfig(**(HF | {"patch_size": 14, "image_size": 56}))
    return transformers.Dinov2WithRegistersModel(config), "vit_base_patch14_reg4_dinov2"


def hf_dinov2_swiglu():
    config = transformers.Dinov2Config(**(HF | {"patch_size": 14, "image_size": 56}), use_swiglu_ffn=True)
    return transformers.Dinov2ForImageClassification(config), "vit_giant_patch14_dinov2"


def hf_dinov3():
    config = transformers.DINOv3ViTConfig(**HF, num_register_tokens=4)
    return transformers.DINOv3ViTModel(config), "vit_small_patch16_dinov3_qkvb"


def hf_dinov3_gated():
    config = transformers.DINOv3ViTConfig(**HF, num_register_tokens=4, use_gated_mlp=True, hidden_act="silu")
    return transformers.DINOv3ViTModel(config), "vit_huge_plus_patch16_dinov3_qkvb"


def hf_beit():
    config = transformers.BeitConfig(**HF, use_relative_position_bias=True, num_labels=5)
    return transformers.BeitForImageClassification(config), "beit_base_patch16_224"


def hf_beit_shared():
    config = transformers.BeitConfig(**HF, use_shared_relative_position_bias=True, use_mask_token=True, vocab_size=8)
    return transformers.BeitForMaskedImageModeling(config), "beit_base_patch16_224"


def hf_clip():
    config = transformers.CLIPVisionConfig(**HF, projection_dim=8)
    return transformers.CLIPVisionModelWithProjection(config), "vit_base_patch16_clip_quickgelu_224"


TRANSFORMERS = [hf_vit, hf_deit, hf_mae, hf_dinov2, hf_dinov2_registers, hf_dinov2_swiglu, hf_dinov3, hf_dinov3_gated]
TRANSFORMERS += [hf_beit, hf_beit_shared, hf_clip]
EXTRA = {  # of timm's network, where its name means another
    "hf_dinov2_swiglu": {"mlp_ratio": 8 / 3 * 2},
    "hf_dinov3_gated": {"mlp_ratio": 4.0, "swiglu_align_to": 0},
}


def transformers_file(build, folder, spelling="old"):
    """A folder of transformers with every tensor at order 1; -> the network, timm's name, timm's arguments"""
    net, name = build()
    fill(net).eval()
    net.save_pretrained(folder)
    if spelling == "new":  # as version 5 has them in memory
        save_file({key: value.contiguous() for key, value in net.state_dict().items()}, folder / "model.safetensors")
    side = net.config.image_size
    return net, name, {**TINY, "img_size": side, **EXTRA.get(build.__name__, {})}


def hidden(net, x):
    """Tokens after the last block, before the final norm."""
    more = {}
    if net.config.model_type == "vit_mae":
        net, more = net.vit, {"noise": torch.arange((x.shape[-1] // 16) ** 2)[None].float()}
    if isinstance(net, transformers.BeitForMaskedImageModeling):
        net = net.beit
    return net(pixel_values=x, output_hidden_states=True, **more).hidden_states[-1]


@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize("build", TRANSFORMERS)
def test_transformers(build, spelling, tmp_path):
    net, name, arguments = transformers_file(build, tmp_path / "hf", spelling)
    options = {"source_args": arguments, "checkpoint": tmp_path / "hf", "layout": "hf"}
    report = convert(name, out=tmp_path / "out", **options)
    results = {check["name"]: check["result"] for check in report.checks}
    assert results["the pyramid is the plain ViT"] == "passed"
    assert results["an independent reader"] == "passed", report.checks
    pyramid = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).eval()
    with torch.no_grad():
        x = torch.randn(1, 3, arguments["img_size"], arguments["img_size"])
        theirs = hidden(net, x)
        if arguments["img_size"] == 64:  # a kernel of 16: the pyramid itself can be compared
            assert difference(pyramid.stages(x, 2)[-1][0], theirs) < 1e-5
        convert(name, "timm", out=tmp_path / "timm", **options)
        back = timm.create_model(f"local-dir:{tmp_path}/timm", pretrained=True).eval()
        assert difference(tokens_after(back, x, 2)[0], theirs) < 1e-5
        convert(str(tmp_path / "out"), "timm", out=tmp_path / "back")
        again = timm.create_model(f"local-dir:{tmp_path}/back", pretrained=True).eval()
        assert difference(tokens_after(again, x, 2)[0], theirs) < 1e-5
        if hasattr(net, "classifier") and isinstance(net.classifier, torch.nn.Linear) and back.num_classes:
            assert difference(back(x), net(x).logits) < 1e-5


@torch.no_grad()
def test_transformers_heads(tmp_path):
    """Logits: of ViT, of DeiT with two heads, of BEiT by the mean of its patches, of CLIP's projection."""
    for build in (hf_vit, hf_deit, hf_beit, hf_clip):
        net, name, arguments = transformers_file(build, tmp_path / "hf")
        convert(name, out=tmp_path / "out", checkpoint=tmp_path / "hf", layout="hf", source_args=arguments)
        pyramid = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).eval()
        x = torch.randn(1, 3, 64, 64)
        theirs = net(x).image_embeds if build is hf_clip else net(x).logits
        assert difference(pyramid(x), theirs) < 1e-5, build.__name__


# Files in the layouts of the papers' own code ------------------------------------------------------------------------


def mae_file(folder):
    """Encoder and decoder, in a wrapper."""
    net = tiny("vit_base_patch16_224", num_classes=0)
    decoder = {"mask_token": torch.randn(1, 1, 32), "decoder_pos_embed": torch.randn(1, 17, 32)}
    decoder |= {"decoder_blocks.0.norm1.weight": torch.randn(32), "decoder_pred.bias": torch.randn(768)}
    torch.save({"model": {**net.state_dict(), **decoder}}, folder / "mae.pth")
    return net, "vit_b_mae", folder / "mae.pth", "mae"


def mae_finetuned_file(folder):
    """fc_norm and head, no norm."""
    net = tiny("vit_base_patch16_224", num_classes=7, global_pool="avg")
    torch.save({"model": net.state_dict()}, folder / "mae.pth")
    return net, "vit_b_mae", folder / "mae.pth", "mae"


def dino_file(folder):
    """Student and teacher, each with a projection head."""
    net = tiny("vit_base_patch16_224", num_classes=0)
    head = {"module.head.mlp.0.weight": torch.randn(4, 48), "module.head.last_layer.weight_g": torch.randn(4, 1)}
    teacher = {f"module.backbone.{k}": v for k, v in net.state_dict().items()} | head
    student = {k: torch.randn_like(v) for k, v in teacher.items()}
    torch.save({"student": student, "teacher": teacher, "epoch": 3}, folder / "dino.pth")
    return net, "dino_b16", folder / "dino.pth", "dino"


def deit_file(folder):
    """Distilled."""
    net = tiny("deit_base_distilled_patch16_224", num_classes=7)
    torch.save({"model": net.state_dict()}, folder / "deit.pth")
    return net, "deit_b_distilled", folder / "deit.pth", "deit"


def deit3_file(folder):
    """LayerScale under names of its own."""
    net = tiny("deit3_base_patch16_224", num_classes=7)
    state = {k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for k, v in net.state_dict().items()}
    torch.save({"model": state}, folder / "deit3.pth")
    return net, "deit3_b", folder / "deit3.pth", "deit"


def dinov2_file(folder):
    """Registers, a mask token, a patch of 14."""
    net = tiny("vit_base_patch14_reg4_dinov2", img_size=56, num_classes=0)
    state = dict(net.state_dict())
    first = torch.randn(1, 1, 48)
    state["register_tokens"] = state.pop("reg_token")
    state["cls_token"] = state["cls_token"] - first
    state["pos_embed"] = torch.cat([first, state["pos_embed"]], dim=1)
    torch.save({**state, "mask_token": torch.randn(1, 48)}, folder / "dinov2.pth")
    return net, "dinov2_b_reg", folder / "dinov2.pth", "dinov2"


def dinov2_chunked_file(folder):
    """A training checkpoint: a teacher whose blocks are counted in chunks, with SwiGLU."""
    net = tiny("vit_giant_patch14_dinov2", img_size=56, num_classes=0)
    state = {}
    for key, value in net.state_dict().items():
        key = key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        state["backbone." + (key.replace("blocks.", "blocks.0.") if key.startswith("blocks.") else key)] = value
    torch.save({"teacher": {**state, "dino_head.mlp.0.weight": torch.randn(3, 48)}}, folder / "dinov2.pth")
    return net, "dinov2_g", folder / "dinov2.pth", "dinov2"


def dinov3_file(folder):
    """RoPE periods, storage tokens, a bias mask."""
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
    state |= {"mask_token": torch.randn(1, 48), "rope_embed.periods": torch.randn(4)}
    torch.save(state, folder / "dinov3.pth")
    return net, "vit_small_patch16_dinov3_qkvb", folder / "dinov3.pth", "dinov3"


def beit_file(folder):
    """Fine-tuned, with an index in every block."""
    net = tiny("beit_base_patch16_224", num_classes=7)
    state = net.state_dict() | {f"blocks.{i}.attn.relative_position_index": torch.zeros(17, 17) for i in range(2)}
    torch.save({"module": state}, folder / "beit.pth")
    return net, "beit_b", folder / "beit.pth", "beit"


def beit_pretrained_file(folder):
    """One table for all blocks, a norm, no head."""
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
    """The whole of a CLIP, its text tower with it."""
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
    """OpenCLIP around a network of timm."""
    net = tiny("vit_base_patch16_siglip_224", num_classes=0)
    state = {f"visual.trunk.{key}": value for key, value in net.state_dict().items()}
    torch.save({**state, "logit_bias": torch.zeros(()), "text.cls_emb": torch.randn(3)}, folder / "clip.pt")
    return net, "vit_base_patch16_siglip_224", folder / "clip.pt", "openclip"


def half_file(folder):
    """In half precision."""
    net = tiny("vit_base_patch16_224", num_classes=0).half().float()
    torch.save({"model": {key: value.half() for key, value in net.state_dict().items()}}, folder / "mae.pth")
    return net, "vit_b_mae", folder / "mae.pth", "mae"


def eva02_file(folder):
    return timm_file(folder, "eva02_base_patch14_224", img_size=56, num_classes=0)


def sam_file(folder):
    return timm_file(folder, "samvit_base_patch16", num_classes=0, window_size=3, global_attn_indexes=[1])


def sam_original_file(folder):
    """Image encoder, prompt encoder and mask decoder."""
    net = tiny("samvit_base_patch16", num_classes=0, window_size=3, global_attn_indexes=[1])
    state = {f"image_encoder.{key.replace('mlp.fc', 'mlp.lin')}": value for key, value in net.state_dict().items()}
    torch.save(
        state | {"mask_decoder.iou_token.weight": torch.randn(1, 8), "pixel_mean": torch.zeros(3)}, folder / "sam.pth"
    )
    return net, "sam_b", folder / "sam.pth", "sam"


OWN = [mae_file, mae_finetuned_file, dino_file, deit_file, deit3_file, dinov2_file, dinov2_chunked_file, dinov3_file]
OWN += [beit_file, beit_pretrained_file, ijepa_file, clip_file, siglip_file, eva02_file, sam_file]
OWN += [sam_original_file, openclip_timm_file, half_file]


NO_READER = (dinov2_chunked_file,)  # timm's loader does not know chunks


def arguments_of(net, build):
    """timm's arguments for the tiny network of a file."""
    arguments = {**TINY, "img_size": net.patch_embed.img_size[0]}
    if build in (sam_file, sam_original_file):
        arguments |= {"window_size": 3, "global_attn_indexes": [1]}
    return arguments


@pytest.mark.parametrize("build", OWN)
@torch.no_grad()
def test_own_layouts(build, tmp_path):
    """Checks pass, timm's own loader among them, and there and back is the file's network."""
    net, name, file, layout = build(tmp_path)
    options = {"checkpoint": file, "layout": layout, "source_args": arguments_of(net, build)}
    report = convert(name, out=tmp_path / "out", **options)
    results = {check["name"]: check["result"] for check in report.checks}
    assert results["the pyramid is the plain ViT"] == "passed"
    assert results["an independent reader"] == ("no independent reader" if build in NO_READER else "passed")
    side = net.patch_embed.patch_size[0]
    assert results["the kernel's resize"] == ("not applicable" if side == 16 else "passed")
    x = torch.randn(1, 3, *net.patch_embed.img_size)
    if side == 16:
        pyramid = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).eval()
        assert difference(pyramid(x), net(x)) < 1e-5
    convert(str(tmp_path / "out"), "timm", out=tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == net.state_dict().keys()
    for key, value in net.state_dict().items():
        torch.testing.assert_close(back[key], value, rtol=1e-5, atol=1e-6)
    assert difference(timm.create_model(f"local-dir:{tmp_path}/back", pretrained=True).eval()(x), net(x)) < 1e-5


def test_every_tensor_is_counted_once(tmp_path):
    for build in (*OWN, *TRANSFORMERS):
        if build in OWN:
            net, name, file, layout = build(tmp_path)
            arguments = arguments_of(net, build)
        else:
            file, layout = tmp_path / build.__name__, "hf"
            net, name, arguments = transformers_file(build, file)
        report = convert(name, dry_run=True, checks=False, checkpoint=file, layout=layout, source_args=arguments)
        origins = [origin for row in report.rows for origin in row.origins]
        assert sorted(origins) == sorted(mimkit.checkpoint.read_weights(file)), build.__name__
        targets = [target for row in report.rows if row.target for target in row.target.split(", ")]
        pyramid = timm.create_model("hpvit", source=source.find_source(name).name, source_args=arguments, num_classes=0)
        assert len(targets) == len(set(targets))
        assert set(targets) >= {key for key in pyramid.state_dict() if "norm." not in key and "relative" not in key}
        assert all(row.why for row in report.rows if row.action in ("dropped", "fresh", "resized"))


# Negative controls ---------------------------------------------------------------------------------------------------


def swap_q_and_k(found):
    for key in [key for key in found if key.endswith("attn.qkv.weight")]:
        q, k, v = found[key].chunk(3)
        found[key] = torch.cat([k, q, v])
    for key in [key for key in found if key.endswith("attn.q_proj.weight")]:
        other = key.replace("q_proj", "k_proj")
        found[key], found[other] = found[other], found[key]


def drop_layer_scale(found):
    for key in [key for key in found if key.endswith((".gamma", "gamma_1", "gamma_2"))]:
        found[key] = torch.ones_like(found[key])


def transpose_positions(found):
    if "pos_embed" in found and found["pos_embed"].ndim == 3:
        table = found["pos_embed"]
        cells = math.isqrt(table.shape[1]) ** 2
        prefix, grid = table[:, : table.shape[1] - cells], table[:, table.shape[1] - cells :]
        turned = rearrange(grid, "b (h w) d -> b (w h) d", h=math.isqrt(cells))
        found["pos_embed"] = torch.cat([prefix, turned], dim=1)


def turn_the_final_norm(found):
    for key in [key for key in found if key in ("norm.weight", "fc_norm.weight")]:
        found[key] = found[key].flip(0) * 3


def turn_the_head(found):
    for key in [key for key in found if key.startswith("head.") and key.endswith("weight")]:
        found[key] = found[key].flip(0)


MUTANTS = [swap_q_and_k, drop_layer_scale, transpose_positions, turn_the_final_norm, turn_the_head]


@pytest.mark.parametrize("mutate", MUTANTS)
@pytest.mark.parametrize("build", [*OWN, *TRANSFORMERS])
def test_a_wrong_table_is_caught(build, mutate, tmp_path, monkeypatch):
    """A family whose result is wrong ends in an error, with nothing written."""
    if build in OWN:
        net, name, file, layout = build(tmp_path)
        arguments = arguments_of(net, build)
    else:
        file, layout = tmp_path / "hf", "hf"
        net, name, arguments = transformers_file(build, file)
    family = families()[layout]
    changed = []

    def wrong(m):
        family.remap(m)
        before = {key: value.clone() for key, value in m.found.items()}
        mutate(m.found)
        changed.extend(key for key in before if not torch.equal(before[key], m.found[key]))

    mutant = copy.copy(family)
    object.__setattr__(mutant, "remap", wrong)
    monkeypatch.setattr(family, "families", lambda: {**families(), layout: mutant})
    options = {"checkpoint": file, "layout": layout, "source_args": arguments}
    report = convert(name, dry_run=True, checks=False, **options)
    if build in NO_READER:
        pytest.skip("no reader: test_own_layouts compares instead")
    if build is hf_beit_shared and mutate is turn_the_final_norm:
        pytest.skip("transformers has this norm with the loss of pre-training, outside of its BeitModel")
    if not changed:
        assert mutate is not swap_q_and_k
        pytest.skip(f"{report.source} has nothing that {mutate.__name__} could break")
    with pytest.raises(UserError, match="otherwise"):
        convert(name, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def mmpretrain_vit(state, x, heads, patch=16):
    """What mmpretrain's VisionTransformer computes, by its names: written from its layout, without timm or mimkit."""
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


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("mutate", [None, swap_q_and_k, drop_layer_scale, transpose_positions])
@torch.no_grad()
def test_mmpretrain(scale, mutate, tmp_path, monkeypatch):
    d, state = 48, {"cls_token": torch.randn(1, 1, 48), "pos_embed": torch.randn(1, 17, 48)}
    shapes = {"patch_embed.projection": (d, 3, 16, 16), "ln1": (d,), "head.layers.head": (7, d)}
    for i in range(2):
        shapes |= {f"layers.{i}.{n}": (d,) for n in ("ln1", "ln2")}
        shapes |= {f"layers.{i}.attn.qkv": (3 * d, d), f"layers.{i}.attn.proj": (d, d)}
        shapes |= {f"layers.{i}.ffn.layers.0.0": (4 * d, d), f"layers.{i}.ffn.layers.1": (d, 4 * d)}
        if scale:
            state |= {f"layers.{i}.{n}.weight": torch.randn(d) for n in ("attn.gamma1", "ffn.gamma2")}
    for name, shape in shapes.items():
        state |= {
            f"{name}.weight": torch.randn(shape) * math.prod(shape[1:]) ** -0.5,
            f"{name}.bias": torch.randn(shape[0]),
        }
    spelled = {key if key.startswith("head") else f"backbone.{key}": value for key, value in state.items()}
    torch.save({"state_dict": spelled, "meta": {"epoch": 1}}, tmp_path / "mm.pth")
    family = families()["mmpretrain"]
    if mutate:
        mutant = copy.copy(family)
        object.__setattr__(mutant, "remap", lambda m: (family.remap(m), mutate(m.found)))
        monkeypatch.setattr(family, "families", lambda: {**families(), "mmpretrain": mutant})
    arguments = {**TINY, "init_values": 1e-5 if scale else None}
    options = {"checkpoint": tmp_path / "mm.pth", "layout": "mmpretrain", "source_args": arguments}
    report = convert("vit_base_patch16_224", out=tmp_path / "out", **options)
    reader = next(check for check in report.checks if check["name"] == "an independent reader")
    assert (reader["result"], "test_converters" in reader["text"]) == ("no independent reader", True)
    pyramid = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    gap = difference(pyramid(x), mmpretrain_vit(state, x, heads=3))
    right = mutate is None or (mutate is drop_layer_scale and not scale)
    assert gap < 1e-5 if right else gap > 1e-3


@pytest.mark.parametrize("spelling", ["official", "mmpretrain"])
@pytest.mark.parametrize("form", ["supervised", "masked", "multi_scale"])
@torch.no_grad()
def test_hivit(spelling, form, tmp_path):
    options = {
        "supervised": {"num_classes": 7},
        "masked": {"num_classes": 0, "unit_form": True},
        "multi_scale": {"num_classes": 0, "unit_form": True, "multi_scale": True},
    }[form]
    net = fill(timm.create_model("hivit_nano", img_size=64, **options)).eval()
    state = dict(net.state_dict())
    if form != "supervised":
        state |= {"mask_token": torch.randn(1, 1, 8)}
    else:
        state |= {"relative_position_index": torch.zeros(16, 16)}
    if spelling == "mmpretrain":
        for ours, theirs in {"relative_position_bias_table": "pos_embed", "absolute_": "", "head.": "head.fc."}.items():
            state = {key.replace(ours, theirs): value for key, value in state.items()}
        state = {key if key.startswith("head") else f"backbone.{key}": value for key, value in state.items()}
    torch.save({"model": state}, tmp_path / "hivit.pth")
    report = convert("hivit_nano", "hivit_nano", tmp_path / "out", tmp_path / "hivit.pth", "hivit")
    back = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(back.forward_features(x), net.forward_features(x))
    if form == "supervised":
        assert torch.equal(back(x), net(x))
    elif form == "multi_scale":
        units = torch.randn(1, 4, 3, 16, 16)
        index = torch.tensor([[0, 3, 5, 9]])
        assert torch.equal(back.encode_units(units, index, (4, 4)), net.encode_units(units, index, (4, 4)))
    assert report.checks[0]["result"] == "no independent reader"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mimkit"]["checks"]


@pytest.mark.parametrize("name", ["svit_s", "svit_b", "svit_l"])
def test_svit(name, tmp_path):
    """A file as the repository wrote it: both states, of a parallel run, and its arguments."""
    net = shaken(timm.create_model(name, depths=(1, 1, 1, 1), num_classes=7)).eval()
    state = released(net)
    parallel = {f"module.{key}": tensor for key, tensor in state.items()}
    other = {key: tensor + 1 for key, tensor in parallel.items()}
    beside = {"epoch": 3, "args": argparse.Namespace(model="stvit", input_size=384)}
    torch.save({"model": parallel, "model_ema": other, **beside}, tmp_path / "stvit.pth")
    given = {"weights": "model", "source_args": {"img_size": 384}}
    report = convert(name, name, tmp_path / "out", tmp_path / "stvit.pth", "svit", **given)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 384, 384]
    dropped = [row for row in report.rows if row.action == "dropped"]
    assert len(dropped) == 8
    assert all("weights" in row.origins[0] and row.why for row in dropped)
    back = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).eval()
    x = torch.randn(1, 3, 96, 70)
    assert torch.equal(back(x), net(x))
    heads = [stage[0].attn.num_heads for stage in net.stages]
    double = {key: tensor.double() for key, tensor in state.items()}
    expected = Reference(double, strides=(2, 1, 2, 1), heads=heads)(x.double())
    assert torch.allclose(back.double().forward_features(x.double()), expected.movedim(1, -1), rtol=0, atol=1e-9)
    torch.save(state | {"surprise": torch.zeros(3)}, tmp_path / "odd.pth")
    with pytest.raises(UserError, match="1 tensors that svit does not explain: surprise"):
        convert(name, name, tmp_path / "odd", tmp_path / "odd.pth", "svit")
    with pytest.raises(UserError, match=r"--source-args has depth: a file of svit says that itself"):
        convert(name, name, tmp_path / "odd", tmp_path / "stvit.pth", "svit", source_args={"depth": 3})
    with pytest.raises(UserError, match=r"does not become svit_nano: give both the same name"):
        convert(name, "svit_nano", tmp_path / "odd", tmp_path / "stvit.pth", "svit")
    with pytest.raises(UserError, match=r"A checkpoint of svit does not become hpvit_s"):
        convert(name, "hpvit_s", tmp_path / "odd", tmp_path / "stvit.pth", "svit")
