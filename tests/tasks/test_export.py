"""Export of classifiers, encoders, segmenters and detectors, and the preprocessing that goes with them."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, backbone, command, fill
from PIL import Image

from mimkit.data.transforms import Normalize, eval_transform
from mimkit.errors import UserError
from mimkit.io import onnx
from mimkit.io.onnx import export_model
from mimkit.io.weights import write_model
from mimkit.tasks.dense_checkpoint import write_dense
from mimkit.tasks.detection import Detector
from mimkit.tasks.export import export
from mimkit.tasks.segmentation import Segmenter

SMALL = {"embed_dim": 48, "depth": 1, "num_heads": 2, "img_size": 32}
HIVIT = {"embed_dim": 32, "depths": (1, 1, 1), "num_heads": 2, "img_size": 64}
HPVIT = {"source_args": {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64}, "depths": "0-1-1-0"}
COLORS = Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])


def session(file):
    """Open an ONNX file. Return a function from images to its outputs by name, and its metadata."""
    import onnxruntime

    opened = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [output.name for output in opened.get_outputs()]

    def run(x):
        return dict(zip(names, map(torch.from_numpy, opened.run(None, {"images": x.numpy()})), strict=True))

    return run, json.loads(opened.get_modelmeta().custom_metadata_map["mimkit"])


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


# Classifiers ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", [".onnx", ".pt2"])
@pytest.mark.parametrize("name", ["hivit_nano", "svit_nano", "hpvit", "vit_tiny_patch16_224"])
def test_export_computes_the_same(name, kind, tmp_path):
    pyramid = {"source": "vit_tiny_patch16_224", "source_args": {"depth": 2, "img_size": 64}, "depths": "0-1-1-0"}
    options = {"hpvit": pyramid, "svit_nano": {"depths": (1, 1, 1, 1)}}.get(name, {"img_size": 64})
    net = fill(timm.create_model(name, num_classes=3, **options))
    difference, _ = export_model(net, tmp_path / f"x{kind}", {"label_names": ["a", "b", "c"]}, (3, 64, 64))
    assert difference < 1e-4
    if kind == ".onnx":
        _, about = session(tmp_path / "x.onnx")
        assert about == {"label_names": ["a", "b", "c"], "any_size": False}


def test_export_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    net = fill(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=3))
    write, read = onnx.FORMATS[".pt2"]
    monkeypatch.setitem(onnx.FORMATS, ".pt2", (write, lambda file, x: [[y * 1.01 for y in ys] for ys in read(file, x)]))
    with pytest.raises(UserError, match="something else"):
        export_model(net, tmp_path / "x.pt2", {}, (3, 32, 32))
    assert not list(tmp_path.iterdir())


# Preprocessing --------------------------------------------------------------------------------------------------------


def photographs(folder, mode="RGB"):
    """Write images of several sizes, smooth enough that a network of random weights tells filters apart."""
    folder.mkdir()
    for i, (width, height) in enumerate([(90, 60), (50, 120), (37, 37), (300, 200), (64, 65), (33, 100)]):
        noise = np.random.default_rng(i).integers(0, 255, (height // 3, width // 3, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        picture.convert(mode).save(folder / f"{i}.png")
    return folder


def predicted(capsys, monkeypatch, model, images, out):
    """Run `mimkit predict`. Return the label and its probability for each image."""
    code, _, err = command(capsys, monkeypatch, "predict", "--model", model, "--images", images, "--out", out)
    assert code == 0, err
    with open(out, newline="") as opened:
        return [(row["label"], float(row["probability"])) for row in csv.DictReader(opened)]


CROPS = [
    {"interpolation": "bilinear", "crop_pct": 0.9},
    {"interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"},
    {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash"},
    {"interpolation": "bilinear", "crop_pct": 0.9, "crop_mode": "border"},
]


def classifier(folder, **crop):
    """Write a classifier of 12 classes, whose logits differ enough to name one of them."""
    net = fill(timm.create_model("vit_tiny_patch16_224", num_classes=12, **SMALL)).eval()
    write_model(net, folder, mean=COLORS.values[0], std=COLORS.values[1], label_names=list("abcdefghijkl"), **crop)
    return net


@pytest.mark.parametrize("crop", CROPS)
def test_predict_prepares_images_as_transformers_does(crop, tmp_path, capsys, monkeypatch):
    """transformers applies timm's own transform, by what config.json says."""
    import transformers

    classifier(tmp_path / "model", **crop)
    images = photographs(tmp_path / "images")
    ours = predicted(capsys, monkeypatch, tmp_path / "model", images, tmp_path / "labels.csv")
    classify = transformers.pipeline("image-classification", model=str(tmp_path / "model"), device="cpu")
    for (label, probability), file in zip(ours, sorted(images.iterdir()), strict=True):
        best = classify(Image.open(file))[0]
        assert label == best["label"]
        assert probability == pytest.approx(best["score"], abs=1e-4)


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_evaluation_is_timms_transform(crop, size):
    options = {"interpolation": crop["interpolation"], "crop_pct": crop["crop_pct"], "crop_mode": crop.get("crop_mode")}
    theirs = timm.data.create_transform((3, *size), mean=(0.0,) * 3, std=(1.0,) * 3, **options)
    ours = eval_transform(size, mean=(0.0,) * 3, **{key: value for key, value in options.items() if value})
    for width, height in ((90, 60), (50, 120), (37, 37), (10, 11)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))
        pixels = torch.from_numpy(np.array(ours(image))).permute(2, 0, 1) / 255
        torch.testing.assert_close(pixels, theirs(image))


@pytest.mark.e2e
@pytest.mark.parametrize("crop", [CROPS[0], CROPS[2]])
def test_predict_and_onnx_agree(crop, tmp_path, capsys, monkeypatch):
    """What the file says about itself is enough to prepare an image: timm's transform takes it as it is."""
    classifier(tmp_path / "model", **crop)
    images = photographs(tmp_path / "images")
    ours = predicted(capsys, monkeypatch, tmp_path / "model", images, tmp_path / "labels.csv")
    assert "logits of images of 32x32" in export(str(tmp_path / "model"), str(tmp_path / "model.onnx"))
    run, about = session(tmp_path / "model.onnx")
    assert crop.items() <= about.items()
    names = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    transform = timm.data.create_transform(**{name: about[name] for name in names})
    for (label, probability), file in zip(ours, sorted(images.iterdir()), strict=True):
        shares = run(transform(Image.open(file))[None])["logits"].softmax(1)[0]
        assert label == about["label_names"][int(shares.argmax())]
        assert probability == pytest.approx(float(shares.max()), abs=1e-4)


# Encoders and converted networks --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "strides", "any_size"),
    [
        ("resnet10t", {}, [2, 4, 8, 16, 32], True),
        ("vit_tiny_patch16_224", SMALL, [16], False),  # timm's plain ViT takes one size
    ],
)
def test_an_encoder_is_exported_with_its_maps(name, options, strides, any_size, tmp_path):
    net = fill(timm.create_model(name, num_classes=0, **options)).eval()
    write_model(net, tmp_path / "encoder")
    line = export(str(tmp_path / "encoder"), str(tmp_path / "x.pt2"))
    assert ("of images of any size" in line) == any_size
    assert all(f"map_{stride}" in line for stride in strides)
    files = {"mimkit": ""}
    module = torch.export.load(tmp_path / "x.pt2", extra_files=files).module()
    about = json.loads(files["mimkit"])
    assert about["any_size"] == any_size
    for size in [(96, 64), (160, 224)] if any_size else [about["input_size"][1:]]:
        x = torch.randn(2, 3, *size)
        features, *maps = module(x)
        torch.testing.assert_close(features, net(x), rtol=1e-4, atol=1e-4)
        assert [size[0] // m.shape[2] for m in maps] == strides


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "strides"), [("hivit_nano", HIVIT, [4, 8, 16]), ("hpvit", HPVIT, [4, 8, 16, 32])]
)
def test_an_encoder_of_any_size_in_onnx(name, options, strides, tmp_path):
    net = fill(timm.create_model(name, num_classes=0, **options)).eval()
    net.pretrained_cfg["input_size"] = (3, 64, 64)
    write_model(net, tmp_path / "encoder")
    assert "of images of any size" in export(str(tmp_path / "encoder"), str(tmp_path / "x.onnx"))
    run, about = session(tmp_path / "x.onnx")
    assert (about["any_size"], about["interpolation"]) == (True, "bicubic")
    for size in ((64, 64), (96, 32), (128, 160)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            tokens, maps = net.forward_intermediates(x)
            found = run(x)
            assert list(found) == ["features", *(f"map_{stride}" for stride in strides)]
            assert_equal(found.values(), [net.forward_head(tokens), *maps])


# Segmenters and detectors ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_a_segmenter_is_exported_for_any_size(tmp_path):
    net = fill(Segmenter(backbone("hpvit", num_classes=0), 3, "fpn", width=32)).eval()
    about = {"short": 64, "crop": None, "flip": False}
    write_dense(net, tmp_path / "run" / "best", "segmenter", list("abc"), [1, 2, 7], COLORS, **about)
    assert "logits of images of any size" in export(str(tmp_path / "run"), str(tmp_path / "x.onnx"))
    run, found = session(tmp_path / "x.onnx")
    expected = {"class_names": list("abc"), "class_values": [1, 2, 7], "interpolation": "bilinear", "short": 64}
    assert expected.items() <= found.items()
    for size in ((64, 64), (70, 93)):
        x = torch.randn(2, 3, *size)
        assert_equal(run(x).values(), [net(x)])


@pytest.mark.slow
@torch.no_grad()
def test_a_detector_is_exported_up_to_its_maps(tmp_path):
    mean, std = COLORS.values
    net = fill(
        Detector(backbone("resnet18", num_classes=0), 2, width=16, short=128, long=192, mean=mean, std=std)
    ).eval()
    write_dense(net, tmp_path / "best", "detector", list("ab"), [1, 2], COLORS)
    line = export(str(tmp_path / "best"), str(tmp_path / "x.pt2"))
    assert "map_4, map_8, map_16, map_32, map_64 of images of any size" in line
    module = torch.export.load(tmp_path / "x.pt2").module()
    x = torch.randn(1, 3, 128, 192)
    assert_equal(module(x), net.rcnn.backbone(x).values())


def test_what_cannot_be_exported_is_one_sentence(tmp_path, capsys, monkeypatch):
    code, _, err = command(capsys, monkeypatch, "export", "--model", "hivit_nano", "--out", tmp_path / "x.onnx")
    assert (code, "--model hivit_nano has no weights" in err) == (2, True)
    old = ROOT / "tests" / "fixtures" / "written_by_0.1" / "segmenter"
    code, _, err = command(capsys, monkeypatch, "export", "--model", old, "--out", tmp_path / "x.txt")
    assert (code, "give a name that ends in .onnx or .pt2" in err) == (2, True)
