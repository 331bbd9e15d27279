"""Methods in a run's directory: encoder/ and decoder/, and files of mimkit 0.1."""

import json

import pytest
import torch
from conftest import fill

from mimkit.errors import UserError
from mimkit.methods.checkpoint import METHODS, load_run, read_decoder, save_method, write_decoder
from mimkit.methods.decoder import Decoder
from mimkit.methods.mae import MAE
from mimkit.methods.simmim import PixelHead, SimMIM
from mimkit.models.factory import map_encoder, unit_encoder

INPUT = {"img_size": (32, 32), "patch_size": 1}
SWIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 4}
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
CASES = [  # a method, a network, its options
    ("mae", "hivit_nano", {}),
    ("mae", "hivit_nano", {"multi_scale": False}),
    ("mae", "vit_tiny_patch16_224", VIT),
    ("mae", "svit_nano", {"depths": (1, 1, 1, 1)}),
    ("simmim", "swin_tiny_patch4_window7_224", SWIN),
    ("simmim", "svit_nano", {"depths": (1, 1, 1, 1)}),
]


def build(kind, name, options):
    """Return a method with options that are not its defaults, and parameters of order 1."""
    if kind == "simmim":
        encoder = map_encoder(name, **INPUT | options)
        return fill(SimMIM(encoder, PixelHead(encoder.out_dim, encoder.unit_size, encoder.token_dim), 0.5)).eval()
    encoder = unit_encoder(name, **INPUT | options)
    decoder = Decoder(encoder.out_dim, encoder.unit_size, dim=24, depth=1, num_heads=2)
    return fill(MAE(encoder, decoder, 0.5, norm_targets=False)).eval()


def test_every_method_has_a_case():
    assert {kind for kind, *_ in CASES} == set(METHODS)


@pytest.mark.parametrize(("kind", "name", "options"), CASES, ids=str)
def test_a_method_round_trips_through_a_run(kind, name, options, tmp_path):
    method = build(kind, name, options)
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    save_method(method, tmp_path, (32, 32), mean, std)
    assert json.loads((tmp_path / "decoder/config.json").read_text())["method"] == kind
    loaded, config = load_run(tmp_path)
    assert type(loaded) is type(method) is METHODS[kind].method
    assert loaded.config == method.config
    assert not loaded.training
    assert (list(config["input_size"]), list(config["mean"]), list(config["std"])) == ([3, 32, 32], mean, std)
    assert loaded.state_dict().keys() == method.state_dict().keys()
    images, generator = torch.randn(2, 3, 32, 32), torch.Generator()
    outputs = [model(images, generator=generator.manual_seed(0)) for model in (method, loaded)]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert torch.equal(outputs[0].prediction, outputs[1].prediction)


def test_files_of_0_1_name_no_method(tmp_path):
    """mimkit 0.1 wrote mask_ratio and norm_targets for both methods, and no name."""
    for kind, name, options in (CASES[0], CASES[4]):
        method, folder = build(kind, name, options), tmp_path / kind
        save_method(method, folder, (32, 32), [0.5] * 3, [0.5] * 3)
        write_decoder(method.decoder, folder / "decoder", mask_ratio=0.5, norm_targets=False)
        loaded, _ = load_run(folder)
        assert type(loaded) is type(method)
        assert loaded.config == method.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "jepa"}, "describes no decoder"),
        ({"method": ["mae"]}, "describes no decoder"),
        ({"decoder": 3}, "describes no decoder"),
        ({"decoder": {"width": 3}}, "describes no decoder"),
        ({"mask_ratio": "half"}, "describes no method"),
        ({"window": 7}, "describes no method"),
        ({"mask_ratio": 1.5}, "mask_ratio is 1.5"),
    ],
    ids=str,
)
def test_damaged_configs_are_refused_in_one_sentence(change, message, method_folder):
    file = method_folder / "decoder/config.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | change))
    try:
        with pytest.raises(UserError, match=message):
            load_run(method_folder)
    finally:
        file.write_text(before)


@pytest.fixture(scope="module")
def method_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_method(build(*CASES[2]), folder, (32, 32), [0.5] * 3, [0.5] * 3)
    return folder


def test_folders_without_encoder_or_decoder_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no encoder/"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="holds no decoder"):
        read_decoder(tmp_path)
