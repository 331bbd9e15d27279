"""Encoders for pre-training out of a name or a folder."""

import pytest
import timm
import torch
from conftest import fill

from mimkit.errors import UserError
from mimkit.io.weights import write_model
from mimkit.models.factory import map_encoder, timm_model, unit_encoder
from mimkit.models.hivit import HiViT
from mimkit.models.layers.pos_embed import sincos_positions
from mimkit.models.svit import SViT
from mimkit.models.swin import MaskedSwin
from mimkit.models.vit import UnitViT
from mimkit.units import sample_mask, serialize

SIZE = {"img_size": (32, 32)}
VIT = {**SIZE, "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
SVIT = {**SIZE, "patch_size": 1, "depths": (1, 1, 1, 1)}
SWIN = {**SIZE, "embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 4, "patch_size": 1}


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("hivit_nano", {**SIZE, "patch_size": 2}, HiViT),
        ("vit_tiny_patch16_224", VIT, UnitViT),
        ("deit_tiny_patch16_224", VIT, UnitViT),
        ("svit_nano", SVIT, SViT),
    ],
)
def test_unit_encoders_encode_visible_units_alone(name, options, kind):
    encoder = unit_encoder(name, **options)
    assert isinstance(encoder, kind)
    grid = (32 // encoder.unit_size,) * 2
    mask = sample_mask(2, grid[0] * grid[1], 0.5)
    units = serialize(torch.randn(1, 3, 32, 32), encoder.unit_size).expand(2, -1, -1, -1, -1)
    visible = units[torch.arange(2)[:, None], mask.visible]
    latent = encoder.encode_units(visible, mask.visible, grid)
    assert latent.shape == (2, encoder.num_prefix_tokens + mask.visible.shape[1], encoder.out_dim)


@pytest.mark.parametrize(
    ("name", "options", "kind"), [("swin_tiny_patch4_window7_224", SWIN, MaskedSwin), ("svit_nano", SVIT, SViT)]
)
def test_map_encoders_encode_the_whole_map(name, options, kind):
    encoder = map_encoder(name, **options)
    assert isinstance(encoder, kind)
    mask = sample_mask(2, (32 // encoder.unit_size) ** 2, 0.5)
    latent = encoder.encode_masked(torch.zeros(2, 3, 32, 32), mask, torch.ones(encoder.token_dim))
    assert latent.shape == (2, (32 // encoder.unit_size) ** 2, encoder.out_dim)


def test_a_swin_given_to_mae_names_simmim(tmp_path):
    with pytest.raises(UserError, match=r"--model swin_base_patch4_window7_224 is a Swin.*recipes/simmim\.py"):
        unit_encoder("swin_base_patch4_window7_224", img_size=(224, 224))
    write_model(timm_model(map_encoder("swin_tiny_patch4_window7_224", **SWIN)), tmp_path / "swin")
    with pytest.raises(UserError, match=r"is a Swin.*recipes/simmim\.py"):
        unit_encoder(str(tmp_path / "swin"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("hivit_b", "HiViT"), ("vit_base_patch16_224.mae", "VisionTransformer"), ("deit_base_patch16_224", "VisionTr")],
)
def test_a_network_that_skips_units_given_to_simmim_names_mae(name, kind):
    with pytest.raises(UserError, match=rf"--model {name} is a {kind}.*recipes/mae\.py"):
        map_encoder(name, img_size=(224, 224))


def test_other_networks_are_refused_in_one_sentence():
    with pytest.raises(UserError, match="resnet18"):
        unit_encoder("resnet18")
    with pytest.raises(UserError, match="ResNet is not timm's SwinTransformer"):
        map_encoder("resnet18")
    for build in (unit_encoder, map_encoder):
        with pytest.raises(UserError, match="hivit_x is unknown"):
            build("hivit_x")


def test_multi_scale_widens_the_latent_of_a_hivit():
    wide, narrow = (unit_encoder("hivit_nano", multi_scale, **SIZE, patch_size=2) for multi_scale in (True, False))
    assert (wide.multi_scale, narrow.multi_scale) == (True, False)
    assert wide.out_dim > narrow.out_dim


def test_positions_of_a_plain_vit_are_fixed_unless_it_comes_with_weights(tmp_path):
    fixed = unit_encoder("vit_tiny_patch16_224", **VIT).vit.pos_embed
    assert not fixed.requires_grad
    assert torch.equal(fixed[0, 1:], sincos_positions(32, (4, 4)))
    saved = fill(timm.create_model("vit_tiny_patch16_224", num_classes=0, fc_norm=False, **VIT))
    write_model(saved, tmp_path / "vit", input_size=(3, 32, 32))
    learned = unit_encoder(str(tmp_path / "vit")).vit.pos_embed
    assert learned.requires_grad
    assert torch.equal(learned, saved.pos_embed)


@pytest.mark.parametrize("build", [unit_encoder, map_encoder])
def test_the_tail_of_an_svit_is_frozen(build):
    encoder = build("svit_nano", **SVIT)
    frozen = {name.split(".")[0] for name, p in encoder.named_parameters() if not p.requires_grad}
    assert frozen == {"tail", "norm"}


@pytest.mark.parametrize(
    ("build", "name", "options"),
    [
        (unit_encoder, "hivit_nano", {**SIZE, "patch_size": 2}),
        (unit_encoder, "vit_tiny_patch16_224", VIT),
        (unit_encoder, "svit_nano", SVIT),
        (map_encoder, "svit_nano", SVIT),
        (map_encoder, "swin_tiny_patch4_window7_224", SWIN),
    ],
)
def test_gradient_checkpointing_is_passed_on(build, name, options):
    for flag in (True, False):
        model = timm_model(build(name, grad_checkpointing=flag, **options))
        flags = {module.grad_checkpointing for module in model.modules() if hasattr(module, "grad_checkpointing")}
        assert flags == {flag}


def test_a_swin_drops_no_paths():
    swin = map_encoder("swin_tiny_patch4_window7_224", **SWIN).swin
    assert not [m for m in swin.modules() if type(m).__name__ == "DropPath" and m.drop_prob]
