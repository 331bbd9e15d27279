"""Folders that mimkit 0.1 wrote still load, and their networks compute the same outputs.

`tests/fixtures/README.md` says how the folders were made.
"""

import json
from pathlib import Path

import pytest
import timm
import torch
from conftest import command

from mimkit.io.model_card import find_pushable
from mimkit.methods.checkpoint import load_run
from mimkit.tasks.classification import classifier
from mimkit.tasks.dense_checkpoint import find_dense, read_dense
from mimkit.tasks.detection import Detector
from mimkit.tasks.segmentation import Segmenter

FOLDER = Path(__file__).parent.parent / "fixtures" / "written_by_0.1"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


def images(channels=3, size=32):
    """Return the two images that the expected outputs were computed on."""
    wave = torch.arange(2 * channels * size**2, dtype=torch.float64) * 0.7
    return wave.sin().float().view(2, channels, size, size)


def noise(units):
    """Return the noise that chose the masked units."""
    return (torch.arange(2 * units, dtype=torch.float64) * 1.3).sin().float().view(2, units)


def agree(tensor, numbers):
    """Assert that the evenly spaced numbers of a tensor are the expected ones."""
    x = tensor.detach().flatten()
    torch.testing.assert_close(x[:: max(1, len(x) // 32)][:32], torch.tensor(numbers), rtol=1e-5, atol=1e-5)


def by_timm(folder, **options):
    return timm.create_model(f"local-dir:{FOLDER / folder}", pretrained=True, **options).eval()


@pytest.mark.parametrize(("name", "channels", "units"), [("mae_hivit", 3, 16), ("simmim_swin", 1, 4)])
def test_a_pre_training_run_loads(name, channels, units):
    expected = EXPECTED[name]
    agree(by_timm(f"{name}/encoder")(images(channels)), expected["features"])
    method, about = load_run(FOLDER / name)
    assert list(about["input_size"]) == expected["input_size"]
    with torch.no_grad():
        out = method(images(channels), noise(units))
    assert out.units.masked.tolist() == expected["masked"]
    assert out.loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    agree(out.prediction, expected["prediction"])


def test_a_converted_network_loads():
    expected = EXPECTED["converted"]
    x = images(3, 64)
    agree(by_timm("converted")(x), expected["logits"])
    agree(by_timm("converted")(x), expected["plain"])
    maps = by_timm("converted", features_only=True)(x)
    assert len(maps) == len(expected["maps"]) == 4
    for ours, numbers in zip(maps, expected["maps"], strict=True):
        agree(ours, numbers)


def test_a_converted_network_converts_back(capsys, monkeypatch, tmp_path):
    argv = ["convert", "--from", FOLDER / "converted", "--to", "timm", "--no-checks", "--out", tmp_path / "plain"]
    code, _, err = command(capsys, monkeypatch, *argv)
    assert code == 0, err
    agree(by_timm(tmp_path / "plain")(images(3, 64)), EXPECTED["converted"]["plain"])


def test_a_classifier_loads():
    expected = EXPECTED["classifier"]
    for network in (by_timm("classifier/best"), classifier(str(FOLDER / "classifier")).eval()):
        assert network.pretrained_cfg["label_names"] == expected["label_names"]
        agree(network(images()), expected["logits"])


def test_a_segmenter_loads():
    folder = find_dense(str(FOLDER / "segmenter"), "segmenter")
    model, about = read_dense(folder, "segmenter", Segmenter)
    assert about == EXPECTED["segmenter"]["about"]
    agree(model.eval()(images(3, 64)), EXPECTED["segmenter"]["scores"])


def test_a_detector_loads():
    expected = EXPECTED["detector"]
    folder = find_dense(str(FOLDER / "detector"), "detector")
    model, about = read_dense(folder, "detector", Detector)
    assert about == expected["about"]
    with torch.no_grad():
        outputs = model.eval()(list(images(3, 64) * 0.5 + 0.5))
    for i, output in enumerate(outputs):
        masks = next(value for key, value in output.items() if key not in ("boxes", "labels", "scores"))
        boxes = torch.tensor(expected["boxes"][i])
        torch.testing.assert_close(output["boxes"][:3] / 64, boxes / 64, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(output["scores"][:3], torch.tensor(expected["scores"][i]), rtol=1e-5, atol=1e-5)
        agree(masks[:3], expected["masks"][i])


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("mae_hivit", "encoder"),
        ("simmim_swin", "encoder"),
        ("converted", "classifier"),
        ("classifier", "classifier"),
        ("segmenter", "segmenter"),
        ("detector", "detector"),
    ],
)
def test_what_a_folder_holds_is_recognized(name, task):
    assert find_pushable(str(FOLDER / name)).task == task
