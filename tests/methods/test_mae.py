import argparse
import re

import pytest
import timm
import torch
from conftest import fill, learns
from timm.layers import resample_abs_pos_embed
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mimkit.errors import UserError
from mimkit.io.weights import write_model
from mimkit.methods.checkpoint import load_initial_weights
from mimkit.methods.decoder import Decoder
from mimkit.methods.mae import MAE, normalize_units, pixels
from mimkit.methods.reconstruction import reconstruct, unnormalize_from_visible
from mimkit.models import UnitViT
from mimkit.models.layers.pos_embed import sincos_positions
from mimkit.units import gather, sample_mask, serialize, unserialize

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "num_classes": 0}


def plain(**options):
    return timm.create_model("vit_tiny_patch16_224", **(SMALL | {"fc_norm": False} | options))


def small_mae(encoder=None, **options):
    encoder = encoder or UnitViT(plain())
    decoder = Decoder(encoder.out_dim, encoder.unit_size, dim=24, depth=2, num_heads=4)
    return fill(MAE(encoder, decoder, **options))


def official(state):
    """Names of transformers -> names of the official MAE files, query, key and value fused."""
    state = dict(state)
    for name in list(state):
        if ".q_proj." in name:
            parts = [state.pop(name.replace(".q_proj.", f".{x}_proj.")) for x in "qkv"]
            state[name.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
    names = [
        (r"^vit\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"^vit\.embeddings\.cls_token", "cls_token"),
        (r"^vit\.embeddings\.position_embeddings", "pos_embed"),
        (r"^vit\.layers\.", "blocks."),
        (r"^decoder\.decoder_layers\.", "decoder_blocks."),
        (r"^vit\.layernorm", "norm"),
        (r"^decoder\.", ""),
        (r"attention\.qkv", "attn.qkv"),
        (r"attention\.o_proj", "attn.proj"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
    ]
    for pattern, name in names:
        state = {re.sub(pattern, name, k): v for k, v in state.items()}
    return state


@pytest.mark.parametrize("normalized", [True, False])
def test_parity_with_transformers_through_an_official_file(normalized, tmp_path):
    config = ViTMAEConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        decoder_hidden_size=24,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=96,
        norm_pix_loss=normalized,
        layer_norm_eps=1e-6,
    )
    theirs = ViTMAEForPreTraining(config).eval()
    theirs.decoder.initialize_weights(16)
    fixed = theirs.decoder.decoder_pos_embed.data.clone()
    assert torch.allclose(fixed[0, 1:], sincos_positions(24, (4, 4)), atol=1e-6)
    fill(theirs).decoder.decoder_pos_embed.data.copy_(fixed)
    file = tmp_path / "mae_visualize.pth"
    torch.save({"model": official(theirs.state_dict()), "args": argparse.Namespace(lr=1)}, file)
    ours = small_mae(norm_targets=normalized).eval()
    assert "encoder and decoder" in load_initial_weights(ours, str(file))

    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    expected = theirs(images, noise=noise)
    output = ours(images, noise=noise)
    assert output.prediction.shape == (2, 12, 192)
    assert torch.allclose(output.loss, expected.loss, atol=1e-5)
    assert torch.allclose(output.prediction, gather(expected.logits, output.units.masked), atol=1e-5)
    with torch.no_grad():  # a negative control: positions transposed
        table = ours.encoder.vit.pos_embed[:, 1:]
        table.copy_(table.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2).clone())
    assert not torch.allclose(ours(images, noise=noise).prediction, output.prediction, atol=1e-2)


FAMILIES = [
    {},
    {"class_token": False, "global_pool": "avg"},
    {"reg_tokens": 3},
    {"reg_tokens": 2, "no_embed_class": True},
    {"pre_norm": True, "init_values": 1e-5},
    {"dynamic_img_size": True},
    {"class_token": False, "global_pool": "map"},
    {"qk_norm": True, "pos_embed": "none"},
]


@pytest.mark.parametrize("options", FAMILIES, ids=str)
def test_a_plain_vit_with_all_units_is_itself(options):
    vit = fill(plain(**options)).eval()
    images = torch.randn(2, 3, 32, 32)
    encoder = UnitViT(vit)
    order = torch.randperm(16)
    k = encoder.num_prefix_tokens
    tokens = encoder.encode_units(serialize(images, 8)[:, order], order.expand(2, 16), (4, 4))
    expected = vit.forward_features(images)
    expected = torch.cat([expected[:, :k], expected[:, k:][:, order]], 1)
    assert torch.allclose(tokens, expected, atol=1e-4)


def test_a_plain_vit_of_another_size():
    encoder = UnitViT(plain())
    with pytest.raises(UserError, match=r"\(2, 6\).*\(4, 4\).*dynamic_img_size=True"):
        small_mae(encoder)(torch.randn(1, 3, 16, 48))
    output = small_mae(UnitViT(plain(dynamic_img_size=True)))(torch.randn(1, 3, 16, 48))
    assert output.prediction.shape == (1, 9, 192)


def test_fixed_positions():
    table = UnitViT(plain(), fixed_positions=True).vit.pos_embed
    assert not table.requires_grad
    assert not table[:, 0].any()
    assert torch.equal(table[0, 1:], sincos_positions(32, (4, 4)))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet18", "vit_base_r50_s16_224"])
def test_networks_that_cannot_skip_units_are_refused(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UserError, match=r"vit_base_patch16_224"):
        UnitViT(model)
    with pytest.raises(UserError, match=r"UnitViT\(vit\)"):
        MAE(model, Decoder(8, 8, dim=24, num_heads=4))


def test_wrong_combinations_say_what_to_change():
    encoder = UnitViT(plain())
    with pytest.raises(UserError, match=r"takes 8 channels and the encoder gives 32: build it as Decoder\(32"):
        MAE(encoder, Decoder(8, 8, dim=24, depth=1, num_heads=4))
    with pytest.raises(UserError, match=r"units of 4 px and the encoder's have 8 px: build it as Decoder\(32, 8"):
        MAE(encoder, Decoder(32, 4, dim=24, depth=1, num_heads=4))
    with pytest.raises(UserError, match="build it with in_chans=3"):
        MAE(encoder, Decoder(32, 8, in_chans=1, dim=24, depth=1, num_heads=4))(torch.zeros(1, 3, 32, 32))
    for dim, heads in ((24, 7), (18, 2)):
        with pytest.raises(UserError, match=f"width {dim} does not divide into {heads} heads"):
            Decoder(32, 8, dim=dim, num_heads=heads)
    decoder = Decoder(32, 8, dim=24, depth=1, num_heads=4)
    for options in ({"mask_ratio": 0}, {"mask_ratio": 1.0}, {"decode_ratio": 0}, {"decode_ratio": 1.5}):
        with pytest.raises(UserError, match=f"{next(iter(options))} is"):
            MAE(encoder, decoder, **options)
    with pytest.raises(UserError, match=r"height of 30 px .* 8 px"):
        MAE(encoder, decoder)(torch.zeros(1, 3, 30, 32))


def test_checkpointing_a_plain_vit(monkeypatch):
    mae, images, noise = small_mae(), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    plainly = mae(images, noise=noise).loss
    calls = []
    forward = type(mae.encoder.vit.blocks[0]).forward
    monkeypatch.setattr(type(mae.encoder.vit.blocks[0]), "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    mae.encoder.vit.set_grad_checkpointing()
    again = mae(images, noise=noise).loss
    before = len(calls)
    again.backward()
    assert torch.equal(again, plainly)
    assert len(calls) > before  # recomputed


@pytest.mark.parametrize("kind", ["vit", "hivit"])
def test_compiles_whole_and_runs_in_low_precision(kind):
    options = {"num_classes": 0, "unit_form": True, "multi_scale": True, "img_size": 32, "patch_size": 2}
    mae = small_mae(timm.create_model("hivit_nano", **options) if kind == "hivit" else None, norm_targets=False)
    n = (32 // mae.encoder.unit_size) ** 2
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, n)
    expected = mae(images, noise=noise)
    compiled = torch.compile(mae, fullgraph=True, backend="aot_eager")(images, noise=noise)
    assert torch.allclose(compiled.prediction, expected.prediction, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low = mae(images, noise=noise)
    assert low.loss.dtype == torch.float32
    difference = (low.prediction.float() - expected.prediction).norm() / expected.prediction.norm()
    assert difference < 0.05
    assert mae.bfloat16()(images.bfloat16(), noise=noise).loss.isfinite()


def test_decoding_a_part_sees_only_that_part():
    whole, part = small_mae(), small_mae(decode_ratio=0.25)
    part.load_state_dict(whole.state_dict())
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    all_of_them, some = whole(images, noise=noise), part(images, noise=noise)
    assert some.prediction.shape == (2, 3, 192)
    assert torch.equal(some.units.masked, all_of_them.units.masked[:, :3])
    assert torch.equal(some.units.visible, all_of_them.units.visible)
    target = normalize_units(pixels(gather(serialize(images, 8), some.units.masked)))
    assert torch.allclose(some.loss, (some.prediction - target).square().mean())
    seen = torch.stack([whole(images, noise=torch.rand(2, 16)).units.masked[:, 0] for _ in range(200)])
    assert len(seen.unique()) == 16  # which part is decoded is random


def test_masked_pixels_reach_neither_encoder_nor_prediction():
    mae = small_mae().eval()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    mask = sample_mask(2, 16, 0.75, noise=noise)
    hidden = serialize(images, 8)
    hidden.scatter_(1, mask.masked[:, :, None, None, None].expand(-1, -1, 3, 8, 8), float("nan"))
    output = mae(unserialize(hidden, (4, 4)), noise=noise)
    assert torch.equal(output.prediction, mae(images, noise=noise).prediction)


@pytest.mark.parametrize("multi_scale", [True, False])
def test_hivit_trains(multi_scale):
    options = {"num_classes": 0, "unit_form": True, "multi_scale": multi_scale, "img_size": 32, "patch_size": 1}
    encoder = timm.create_model("hivit_nano", **options)
    mae = MAE(encoder, Decoder(encoder.out_dim, encoder.unit_size, dim=32, depth=1, num_heads=4))
    assert learns(mae) < 0.6


def test_init_goes_on_from_a_folder_and_refuses_what_does_not_fit(tmp_path):
    options = {"num_classes": 0, "unit_form": True, "img_size": 32, "patch_size": 1}
    first = fill(timm.create_model("hivit_nano", multi_scale=True, **options))
    write_model(first, tmp_path / "encoder", input_size=(3, 32, 32))
    second = timm.create_model("hivit_nano", multi_scale=True, **options)
    mae = MAE(second, Decoder(second.out_dim, 4, dim=32, depth=1, num_heads=4))
    assert "no decoder" in load_initial_weights(mae, str(tmp_path / "encoder"))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )

    wide = fill(timm.create_model("hivit_nano", multi_scale=True, **(options | {"img_size": (32, 64)})))
    write_model(wide, tmp_path / "wide", input_size=(3, 32, 64))
    other = timm.create_model("hivit_nano", multi_scale=True, **(options | {"img_size": (64, 32)}))
    other = MAE(other, Decoder(other.out_dim, 4, dim=32, depth=1, num_heads=4))
    load_initial_weights(other, str(tmp_path / "wide"))
    table = wide.absolute_pos_embed.unflatten(1, (8, 16))
    resized = resample_abs_pos_embed(table.flatten(1, 2), [16, 8], [8, 16], num_prefix_tokens=0)
    assert torch.allclose(other.encoder.absolute_pos_embed, resized)

    torch.save(first.state_dict() | {"mask_token": torch.zeros(1, 1, 8)}, tmp_path / "released.pth")  # a leftover
    assert "no decoder" in load_initial_weights(mae, str(tmp_path / "released.pth"))
    torn = dict(first.state_dict())
    del torn["blocks.6.attn.qkv.weight"]
    torch.save(torn, tmp_path / "torn.pth")
    with pytest.raises(UserError, match=r"missing: blocks\.6\.attn\.qkv\.weight"):
        load_initial_weights(mae, str(tmp_path / "torn.pth"))
    narrow = timm.create_model("hivit_nano", multi_scale=False, **options)
    mae = MAE(narrow, Decoder(narrow.out_dim, 4, dim=32, depth=1, num_heads=4))
    with pytest.raises(UserError, match=r"norm\.weight \(896,\) for \(128,\)"):
        load_initial_weights(mae, str(tmp_path / "encoder"))
    with pytest.raises(UserError, match=r"missing: .*cls_token.*check the model's name"):
        load_initial_weights(small_mae(), str(tmp_path / "encoder"))


def test_reconstruction_uses_visible_pixels_only():
    mae = small_mae().eval()
    images = torch.randn(2, 3, 32, 32)
    _, hidden, made = reconstruct(mae, images, seed=3)
    masked = hidden == 0
    changed = torch.where(masked, torch.randn_like(images) * 7 + 3, images)
    assert masked.float().mean() == pytest.approx(0.75)
    assert torch.equal(reconstruct(mae, changed, seed=3)[2], made)
    assert torch.equal(made[~masked], images[~masked])


def test_unnormalizing_recovers_a_picture_of_even_contrast():
    units = torch.randn(1, 16, 3, 8, 8)
    units = (units - units.mean((2, 3, 4), keepdim=True)) / units.std((2, 3, 4), keepdim=True) * 0.3 + 0.7
    mask = sample_mask(1, 16, 0.5)
    target = pixels(gather(units, mask.masked))
    made = unnormalize_from_visible(normalize_units(target), units, mask, (4, 4))
    assert torch.allclose(made, target, atol=1e-4)
