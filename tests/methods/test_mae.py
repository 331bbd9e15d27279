"""MAE: parity with transformers, what a masked pixel may reach, learning, and reconstructions."""

import argparse
import re

import pytest
import timm
import torch
from conftest import fill, learns
from timm.layers import resample_abs_pos_embed
from torch import nn

from mimkit.errors import UserError
from mimkit.io.weights import write_model
from mimkit.methods.checkpoint import load_initial_weights
from mimkit.methods.decoder import Decoder
from mimkit.methods.mae import MAE
from mimkit.methods.reconstruction import reconstruct, unnormalize_from_visible
from mimkit.methods.targets import Pixels, normalize_units, unit_pixels
from mimkit.models import UnitViT
from mimkit.models.layers.pos_embed import sincos_positions
from mimkit.units import gather, sample_mask, serialize, unserialize

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "num_classes": 0}


def plain(**options):
    """Return a plain ViT with 4 x 4 patches of 8 px."""
    return timm.create_model("vit_tiny_patch16_224", **(SMALL | {"fc_norm": False} | options))


def small_mae(encoder=None, **options):
    """Return an MAE whose parameters are all of order 1."""
    encoder = encoder or UnitViT(plain())
    decoder = Decoder(encoder.out_dim, encoder.unit_size, dim=24, depth=2, num_heads=4)
    return fill(MAE(encoder, decoder, **options))


# Parity --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def vitmae():
    """Return transformers' ViTMAE for pre-training, and its configuration. Their import takes seconds."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    return ViTMAEForPreTraining, ViTMAEConfig


def official(state):
    """Rename a state dict of transformers to the official MAE files, and fuse query, key and value."""
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
def test_parity_with_transformers_through_an_official_file(normalized, tmp_path, vitmae):
    network, configuration = vitmae
    config = configuration(
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
    theirs = network(config).eval()
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
    with torch.no_grad():  # negative control: transposed positions
        table = ours.encoder.vit.pos_embed[:, 1:]
        table.copy_(table.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2).clone())
    assert not torch.allclose(ours(images, noise=noise).prediction, output.prediction, atol=1e-2)


# Plain ViTs as encoders ----------------------------------------------------------------------------------------------

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
def test_encoding_all_units_equals_the_plain_vit(options):
    vit = fill(plain(**options)).eval()
    images = torch.randn(2, 3, 32, 32)
    encoder = UnitViT(vit)
    order = torch.randperm(16)
    k = encoder.num_prefix_tokens
    tokens = encoder.encode_units(serialize(images, 8)[:, order], order.expand(2, 16), (4, 4))
    expected = vit.forward_features(images)
    expected = torch.cat([expected[:, :k], expected[:, k:][:, order]], 1)
    assert torch.allclose(tokens, expected, atol=1e-4)


def test_another_input_size_needs_dynamic_img_size():
    encoder = UnitViT(plain())
    with pytest.raises(UserError, match=r"\(2, 6\).*\(4, 4\).*dynamic_img_size=True"):
        small_mae(encoder)(torch.randn(1, 3, 16, 48))
    output = small_mae(UnitViT(plain(dynamic_img_size=True)))(torch.randn(1, 3, 16, 48))
    assert output.prediction.shape == (1, 9, 192)


def test_fixed_positions_are_the_sine_cosine_table():
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


def test_gradient_checkpointing_recomputes_the_blocks(monkeypatch):
    mae, images, noise = small_mae(), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    expected = mae(images, noise=noise).loss
    calls = []
    forward = type(mae.encoder.vit.blocks[0]).forward
    monkeypatch.setattr(type(mae.encoder.vit.blocks[0]), "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    mae.encoder.vit.set_grad_checkpointing()
    loss = mae(images, noise=noise).loss
    before = len(calls)
    loss.backward()
    assert torch.equal(loss, expected)
    assert len(calls) > before


# The method ----------------------------------------------------------------------------------------------------------


def test_wrong_combinations_say_what_to_change():
    encoder = UnitViT(plain())
    with pytest.raises(UserError, match=r"takes 8 channels, but the encoder returns 32. Build it as Decoder\(32"):
        MAE(encoder, Decoder(8, 8, dim=24, depth=1, num_heads=4))
    with pytest.raises(UserError, match=r"units of 4 px, but the encoder's have 8 px. Build it as Decoder\(32, 8"):
        MAE(encoder, Decoder(32, 4, dim=24, depth=1, num_heads=4))
    with pytest.raises(
        UserError, match=r"predicts 64 values per unit, but the target has 192.* build it with in_chans=3"
    ):
        MAE(encoder, Decoder(32, 8, in_chans=1, dim=24, depth=1, num_heads=4))(torch.zeros(1, 3, 32, 32))
    for dim, heads in ((24, 7), (18, 2)):
        with pytest.raises(UserError, match=f"width of {dim} is not divisible by {heads} heads"):
            Decoder(32, 8, dim=dim, num_heads=heads)
    decoder = Decoder(32, 8, dim=24, depth=1, num_heads=4)
    for options in ({"mask_ratio": 0}, {"mask_ratio": 1.0}, {"decode_ratio": 0}, {"decode_ratio": 1.5}):
        with pytest.raises(UserError, match=f"{next(iter(options))} is"):
            MAE(encoder, decoder, **options)
    with pytest.raises(UserError, match=r"height of 30 px .* 8 px"):
        MAE(encoder, decoder)(torch.zeros(1, 3, 30, 32))


def hivit(**options):
    """Return hivit_nano in its unit form, for 32 px."""
    return timm.create_model("hivit_nano", num_classes=0, unit_form=True, img_size=32, **options)


def mae_of(kind):
    return small_mae(hivit(multi_scale=True, patch_size=2) if kind == "hivit" else None, norm_targets=False)


@pytest.mark.parametrize("kind", ["vit", "hivit"])
def test_low_precision_is_close_to_fp32(kind):
    mae = mae_of(kind)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, (32 // mae.encoder.unit_size) ** 2)
    expected = mae(images, noise=noise)
    with torch.autocast("cpu", torch.bfloat16):
        low = mae(images, noise=noise)
    assert low.loss.dtype == torch.float32
    difference = (low.prediction.float() - expected.prediction).norm() / expected.prediction.norm()
    assert difference < 0.05
    assert mae.bfloat16()(images.bfloat16(), noise=noise).loss.isfinite()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "hivit"])
def test_compiles_as_one_graph(kind):
    mae = mae_of(kind)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, (32 // mae.encoder.unit_size) ** 2)
    expected = mae(images, noise=noise)
    compiled = torch.compile(mae, fullgraph=True, backend="aot_eager")(images, noise=noise)
    assert torch.allclose(compiled.prediction, expected.prediction, atol=1e-4)


def test_decode_ratio_predicts_a_random_part_and_leaves_the_rest_out():
    complete, part = small_mae(), small_mae(decode_ratio=0.25)
    part.load_state_dict(complete.state_dict())
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    expected, output = complete(images, noise=noise), part(images, noise=noise)
    assert output.prediction.shape == (2, 3, 192)
    assert torch.equal(output.units.masked, expected.units.masked[:, :3])
    assert torch.equal(output.units.visible, expected.units.visible)
    target = normalize_units(unit_pixels(gather(serialize(images, 8), output.units.masked)))
    assert torch.allclose(output.loss, (output.prediction - target).square().mean())
    first = torch.stack([complete(images, noise=torch.rand(2, 16)).units.masked[:, 0] for _ in range(200)])
    assert len(first.unique()) == 16


def test_masked_pixels_reach_neither_encoder_nor_prediction():
    mae = small_mae().eval()
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    mask = sample_mask(2, 16, 0.75, noise=noise)
    units = serialize(images, 8)
    units.scatter_(1, mask.masked[:, :, None, None, None].expand(-1, -1, 3, 8, 8), float("nan"))
    output = mae(unserialize(units, (4, 4)), noise=noise)
    assert torch.equal(output.prediction, mae(images, noise=noise).prediction)


@pytest.mark.parametrize("multi_scale", [True, False])
def test_a_hivit_learns_four_images(multi_scale):
    encoder = hivit(multi_scale=multi_scale, patch_size=1)
    mae = MAE(encoder, Decoder(encoder.out_dim, encoder.unit_size, dim=32, depth=1, num_heads=4))
    assert learns(mae) < 0.6


# Targets -------------------------------------------------------------------------------------------------------------


class Edges(nn.Module):
    """A target of someone else: the horizontal differences of each unit, by a frozen layer. It records its arguments.

    It satisfies `Target` without inheriting from it.
    """

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, (1, 2), padding=(0, 1), bias=False).requires_grad_(False)
        self.calls = []

    def forward(self, images, units, index):
        self.calls.append((images, units, index))
        return unit_pixels(gather(serialize(self.layer(images)[..., 1:], 8), index))


def test_a_target_object_is_what_is_predicted():
    encoder, target = UnitViT(plain()), Edges()
    mae = MAE(encoder, Decoder(encoder.out_dim, 8, dim=24, depth=2, num_heads=4), target=target)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    output = mae(images, noise=noise)
    seen_images, units, index = target.calls[0]
    assert torch.equal(seen_images, images)
    assert torch.equal(units, serialize(images, 8))
    assert torch.equal(index, output.units.masked)
    expected = target(images, units, index)
    assert torch.equal(output.loss, (output.prediction - expected).square().mean())
    assert not torch.allclose(output.loss, MAE(encoder, mae.decoder)(images, noise=noise).loss)
    frozen = target.layer.weight.clone()
    assert learns(mae) < 0.6
    assert torch.equal(target.layer.weight, frozen)


def test_a_target_of_another_size_is_refused():
    encoder = UnitViT(plain())
    decoder = Decoder(encoder.out_dim, 8, dim=24, depth=1, num_heads=4)
    mae = MAE(encoder, decoder, target=lambda images, units, index: gather(units, index).mean((3, 4)))
    with pytest.raises(UserError, match="predicts 192 values per unit, but the target has 3"):
        mae(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("norm", [True, False])
def test_pixels_are_the_default_target(norm):
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    mae = small_mae(norm_targets=norm)
    assert mae.target == Pixels(norm)
    target = mae.target(images, serialize(images, 8), mae(images, noise=noise).units.masked)
    assert torch.allclose(target.mean(-1), torch.zeros(()), atol=1e-5) is norm
    assert torch.allclose(target.var(-1), torch.ones(()), atol=1e-3) is norm


# Weights to start from -----------------------------------------------------------------------------------------------


def hivit_mae(encoder):
    return MAE(encoder, Decoder(encoder.out_dim, 4, dim=32, depth=1, num_heads=4))


@pytest.fixture
def saved(tmp_path):
    """Return a HiViT that is saved in the folder encoder/."""
    encoder = fill(hivit(multi_scale=True, patch_size=1))
    write_model(encoder, tmp_path / "encoder", input_size=(3, 32, 32))
    return encoder


def test_init_loads_an_encoder_from_a_folder(saved, tmp_path):
    encoder = hivit(multi_scale=True, patch_size=1)
    assert "no decoder" in load_initial_weights(hivit_mae(encoder), str(tmp_path / "encoder"))
    pairs = zip(saved.state_dict().values(), encoder.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_init_resizes_position_tables(tmp_path):
    options = {"num_classes": 0, "unit_form": True, "patch_size": 1, "multi_scale": True}
    wide = fill(timm.create_model("hivit_nano", img_size=(32, 64), **options))
    write_model(wide, tmp_path / "wide", input_size=(3, 32, 64))
    high = hivit_mae(timm.create_model("hivit_nano", img_size=(64, 32), **options))
    load_initial_weights(high, str(tmp_path / "wide"))
    table = wide.absolute_pos_embed.unflatten(1, (8, 16))
    resized = resample_abs_pos_embed(table.flatten(1, 2), [16, 8], [8, 16], num_prefix_tokens=0)
    assert torch.allclose(high.encoder.absolute_pos_embed, resized)
    assert high.encoder.pos_antialias


def test_init_from_a_released_file_resizes_positions_as_its_authors_do(tmp_path):
    options = {"num_classes": 0, "unit_form": True, "patch_size": 1}
    small, large = (fill(timm.create_model("hivit_nano", img_size=side, **options)) for side in (16, 32))
    torch.save(small.state_dict(), tmp_path / "released.pth")
    load_initial_weights(hivit_mae(large), str(tmp_path / "released.pth"))
    table = small.absolute_pos_embed.unflatten(1, (4, 4)).movedim(-1, 1)
    resized = nn.functional.interpolate(table, scale_factor=2, mode="bicubic").flatten(2).mT
    assert torch.allclose(large.absolute_pos_embed, resized, atol=1e-6)
    assert large._model_args["pos_antialias"] is False
    write_model(large, tmp_path / "large", input_size=(3, 32, 32))
    again = timm.create_model("hivit_nano", img_size=16, **options)
    load_initial_weights(hivit_mae(again), str(tmp_path / "large"))
    assert not again.pos_antialias


@pytest.mark.parametrize("prefix", [0, 1])
def test_init_checks_the_positions_of_a_decoder(prefix, tmp_path):
    mae = small_mae()
    parts = ("embed.", "blocks.", "norm.", "pred.")
    state = {"decoder_pos_embed": nn.functional.pad(sincos_positions(24, (2, 8)), (0, 0, prefix, 0))[None]}
    for name, tensor in mae.decoder.state_dict().items():
        state[f"decoder_{name}" if name.startswith(parts) else name] = tensor
    state |= mae.encoder.vit.state_dict()
    torch.save(state, tmp_path / "full.pth")
    assert "encoder and decoder" in load_initial_weights(mae, str(tmp_path / "full.pth"))
    state["decoder_pos_embed"] = state["decoder_pos_embed"] + 0.1
    torch.save(state, tmp_path / "full.pth")
    with pytest.raises(UserError, match=r"decoder_pos_embed that is not the sine-cosine table"):
        load_initial_weights(mae, str(tmp_path / "full.pth"))


def test_init_refuses_weights_that_do_not_fit(saved, tmp_path):
    mae = hivit_mae(hivit(multi_scale=True, patch_size=1))
    released = saved.state_dict() | {"mask_token": torch.zeros(1, 1, 8)}  # released encoders still have it
    torch.save(released, tmp_path / "released.pth")
    assert "no decoder" in load_initial_weights(mae, str(tmp_path / "released.pth"))
    incomplete = dict(saved.state_dict())
    del incomplete["blocks.6.attn.qkv.weight"]
    torch.save(incomplete, tmp_path / "incomplete.pth")
    with pytest.raises(UserError, match=r"missing: blocks\.6\.attn\.qkv\.weight"):
        load_initial_weights(mae, str(tmp_path / "incomplete.pth"))
    with pytest.raises(UserError, match=r"norm\.weight \(896,\) for \(128,\)"):
        load_initial_weights(hivit_mae(hivit(multi_scale=False, patch_size=1)), str(tmp_path / "encoder"))
    with pytest.raises(UserError, match=r"width 128 instead of 32, depth of blocks 8 .*check the model's name"):
        load_initial_weights(small_mae(), str(tmp_path / "encoder"))


# Reconstructions -----------------------------------------------------------------------------------------------------


def test_reconstruction_uses_visible_pixels_only():
    mae = small_mae().eval()
    images = torch.randn(2, 3, 32, 32)
    _, gray, filled = reconstruct(mae, images, seed=3)
    masked = gray == 0
    changed = torch.where(masked, torch.randn_like(images) * 7 + 3, images)
    assert masked.float().mean() == pytest.approx(0.75)
    assert torch.equal(reconstruct(mae, changed, seed=3)[2], filled)
    assert torch.equal(filled[~masked], images[~masked])


def test_reconstruction_restores_the_mode():
    images = torch.randn(1, 3, 32, 32)
    for training in (True, False):
        mae = small_mae().train(training)
        reconstruct(mae, images)
        assert mae.training is training


def test_unnormalizing_recovers_an_image_of_uniform_contrast():
    units = torch.randn(1, 16, 3, 8, 8)
    units = (units - units.mean((2, 3, 4), keepdim=True)) / units.std((2, 3, 4), keepdim=True) * 0.3 + 0.7
    mask = sample_mask(1, 16, 0.5)
    target = unit_pixels(gather(units, mask.masked))
    pixels = unnormalize_from_visible(normalize_units(target), units, mask, (4, 4))
    assert torch.allclose(pixels, target, atol=1e-4)
