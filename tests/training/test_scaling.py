"""What the user does not set: the published settings, scaled to the network and the number of images."""

from dataclasses import asdict

import pytest
import timm
from mimkit.recipes import mae, simmim

from mimkit.config import parse_given
from mimkit.io.weights import on_meta
from mimkit.models.factory import size_of
from mimkit.training.scaling import scaled


def changes(model, images, *argv, recipe=mae, multiple=1, **options):
    """-> the changes for a command line, by name"""
    name = recipe.__name__.rsplit(".")[-1]
    small = {"mae": "mae_hivit_small", "simmim": "simmim_swin_small"}[name]
    argv = ["--model", model, *argv] if model else list(argv)
    parsed = parse_given(recipe.Options, "Train.", name, argv, small)
    encoder = on_meta(timm.create_model, parsed.options.model, num_classes=0, **options)
    found = scaled(asdict(parsed.options), parsed.given, asdict(parsed.published), *size_of(encoder), images, multiple)
    return {change.name: change for change in found}


def values(*argv, **more):
    return {name: change.value for name, change in changes(*argv, **more).items()}


@pytest.mark.parametrize("model", ["hivit_b", "hivit_b24", "svit_b", "vit_base_patch16_224", "vit_large_patch16_224"])
@pytest.mark.parametrize("images", [200_000, 1_281_167])
def test_published_networks_keep_the_published_settings_on_large_sets(model, images):
    assert values(model, images) == {}
    assert values(model, images, "--epochs", "100", "--batch-size", "1024") == {}


def test_decoders_are_not_wider_than_the_encoder():
    assert values("hivit_t", 1_281_167) == {"decoder_dim": 384, "decoder_heads": 12}
    assert values("vit_small_patch16_224", 1_281_167) == {"decoder_dim": 384, "decoder_heads": 12}
    swin = "swin_base_patch4_window7_224"
    assert values(swin, 1_281_167, recipe=simmim) == {}


def test_a_small_network_on_few_images():
    found = changes("hivit_nano", 2392)
    got = {name: change.value for name, change in found.items()}
    assert got.pop("lr") == pytest.approx(1.6e-3 * (32 / 4096) ** 0.5)
    assert got == {
        "decoder_dim": 128,
        "decoder_heads": 4,
        "decoder_depth": 1,
        "batch_size": 32,
        "epochs": 100,
        "warmup_epochs": 10,
    }
    assert str(found["decoder_dim"]) == "--decoder-dim 128 instead of the published 512: the encoder is 128 wide"
    assert str(found["epochs"]).endswith(
        "100 instead of the published 1600: the square of the encoder's width, 128 of 512"
    )
    assert str(found["batch_size"]).endswith("instead of the published 4096: 2,392 images make 74 steps per epoch")
    assert str(found["lr"]).startswith("--lr 0.0001414 instead of the published 0.0016: AdamW's rate follows ")


@pytest.mark.parametrize(
    ("model", "images", "expected"),
    [
        ("hivit_b", 50_000, {"batch_size": 1024, "lr": 8e-4}),
        ("vit_base_patch16_224", 50_000, {"batch_size": 1024, "lr": 1.2e-3}),  # its own published rate
        ("hivit_b", 20, {"batch_size": 20, "lr": 1.6e-3 * (20 / 4096) ** 0.5}),
    ],
)
def test_the_batch_follows_the_number_of_images(model, images, expected):
    assert values(model, images) == pytest.approx(expected)


def test_a_run_has_enough_steps():
    assert values("hivit_nano", 100)["epochs"] == 1000  # of 3 steps
    assert values("hivit_nano", 100, "--batch-size", "1")["epochs"] == 100
    assert str(changes("hivit_nano", 100)["epochs"]).endswith("3,000 steps")


def test_what_the_user_sets_stays(tmp_path):
    flags = "--decoder-dim 96 --decoder-depth 2 --epochs=7 --batch-size 64 --lr 1e-3 --warmup-epochs 1".split()
    assert values("hivit_nano", 2392, *flags) == {"decoder_heads": 3}
    assert values("hivit_nano", 2392, *flags[:-2])["warmup_epochs"] == pytest.approx(0.7)
    assert "lr" not in values("hivit_nano", 2392, "--blr", "1e-3")  # lr is blr x batch size / 256, as documented
    (tmp_path / "c.yaml").write_text("model: hivit_nano\nepochs: 5\nbatch_size: 64\nlr: 1.0e-3\ndecoder_depth: 6\n")
    found = values(None, 2392, "--config", str(tmp_path / "c.yaml"))
    assert found == {"decoder_dim": 128, "decoder_heads": 4, "warmup_epochs": 0.5}


@pytest.mark.parametrize("argv", [[], ["--config", "mae_hivit_small"], ["--data", "photos"]], ids=" ".join)
def test_presets_stay(argv):
    assert values(None, 10_000, *argv) == {}


def test_simmim_has_no_decoder_to_scale():
    found = values("swin_tiny_patch4_window7_224", 10_000, recipe=simmim)
    assert found == pytest.approx({"batch_size": 128, "lr": 8e-4 * (128 / 2048) ** 0.5})


def test_abbreviated_flags_and_hyphens_in_a_file_count_as_set(tmp_path):
    (tmp_path / "c.yaml").write_text("model: hivit_nano\ndecoder-dim: 256\n")
    for argv in (("hivit_nano", 2392, "--decoder-di", "256"), (None, 2392, "--config", str(tmp_path / "c.yaml"))):
        assert "decoder_dim" not in changes(*argv)
        assert "batch_size" in changes(*argv)


@pytest.mark.parametrize(
    ("images", "multiple", "expected"), [(2392, 64, 64), (2392, 24, 48), (20, 8, 16), (20, 32, 32)]
)
def test_the_batch_is_divided_among_the_processes(images, multiple, expected):
    assert values("hivit_nano", images, multiple=multiple)["batch_size"] == expected
