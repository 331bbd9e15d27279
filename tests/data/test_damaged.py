"""Runs and commands on a folder of which 5 % are damaged or unusual images: good ones are used, bad ones are named."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
from accelerate.state import AcceleratorState, GradientState
from conftest import command, encoded, losses, picture
from image_files import png, smooth
from mimkit.recipes import mae_hivit
from PIL import Image

from mimkit.data.sources import open_labeled
from mimkit.data.transforms import Normalize
from mimkit.io.weights import write_model
from mimkit.tasks.dense_checkpoint import write_dense
from mimkit.tasks.detection import Detector, predict_objects

BAD = {
    "truncated.jpg": "truncated",
    "empty.jpg": "an empty file",
    "text.jpg": "not an image of a known kind",
    "bomb.png": "400000000 pixels",
}
TINY = ["--batch-size", "40", "--workers", "0", "--decoder-dim", "24", "--model-args.embed_dim", "32"]


def run(*argv):
    """Run the recipe; accelerate's state would otherwise survive until the next run in this process."""
    mae_hivit.main(list(argv))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """200 images in two class folders, 11 of which are damaged or unusual; the bomb is a file of 48 kB."""
    root = tmp_path_factory.mktemp("damaged")
    frames = [Image.new("RGB", (20, 24), color) for color in ("red", "lime", "blue")]
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        "truncated.jpg": encoded(picture(), "JPEG")[:900],
        "empty.jpg": b"",
        "text.jpg": b"<html>404: there is no such image</html>",
        "bomb.png": png(20_000, 20_000, 1, 0, bytes(20_000 * (1 + 20_000 // 8))),
        "wrong.jpg": encoded(picture()),
        "cmyk.jpg": encoded(smooth().convert("CMYK"), "JPEG"),
        "deep.png": encoded(Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21)),
        "pixel.png": encoded(Image.new("RGB", (1, 1), "red")),
        "strip.png": encoded(Image.new("RGB", (20_000, 3), "red")),
        "rotated.jpg": encoded(smooth().transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    }
    for i in range(200):
        name, content = kinds.popitem() if i % 18 == 4 and kinds else (f"{i:03d}.png", encoded(picture(i, (20, 24))))
        place = root / f"class{i % 2}"
        place.mkdir(exist_ok=True)
        (place / name).write_bytes(content)
    assert not kinds
    return root


def count_good(source):
    """How many images of a split can be used, by their names"""
    return sum(Path(cell["path"]).name not in BAD for cell in source.rows[source.image])


def skipped(said):
    """The lines about skipped images by name; each image has one line."""
    lines = [line for line in said.splitlines() if line.startswith("skipped ")]
    found = {Path(line.split()[1].rstrip(",")).name: line for line in lines}
    assert len(found) == len(lines), lines
    return found


def assert_bad_images_are_named(said):
    found = skipped(said)
    assert found.keys() == BAD.keys()
    assert all(reason in found[name] for name, reason in BAD.items())


@pytest.mark.e2e
@pytest.mark.parametrize("streaming", [False, True])
def test_run_uses_good_images_and_names_each_bad_one_once(damaged, streaming, tmp_path, capsys):
    out = tmp_path / "run"
    argv = ["--data", str(damaged), "--out", str(out), *TINY, "--epochs", "2", "--save-every", "0"]
    argv += ["--streaming", str(streaming).lower()]
    run(*argv, "--max-bad", "0.02")
    said = capsys.readouterr().out
    assert_bad_images_are_named(said)
    assert "200 images" in said
    found = losses(out)
    assert max(found) == 10
    assert np.isfinite(list(found.values())).all()
    assert (out / "encoder" / "model.safetensors").is_file()
    if not streaming:
        counts = " + ".join(str(count_good(part)) for part in open_labeled(str(damaged)))
        assert said.count(f"{counts} images") == 2  # kNN before and after training

    with pytest.raises(SystemExit) as stop:
        run(*argv, "--out", str(tmp_path / "other"), "--max-bad", "0.0175")
    complaint = capsys.readouterr().err
    assert stop.value.code == 2
    assert complaint.startswith("mimkit: 4 images cannot be used, more than the 3 allowed, such as ")
    assert complaint.rstrip().endswith("raise --max-bad.")
    assert len(complaint.splitlines()) == 1


@pytest.mark.e2e
def test_resumed_run_remembers_bad_images(damaged, tmp_path, capsys):
    """The one step after it is resumed does not meet all of them."""
    out = tmp_path / "run"
    argv = ["--data", str(damaged), "--out", str(out), *TINY, "--epochs", "1.2", "--save-every", "1"]
    argv += ["--knn-every", "0", "--resume", "auto"]
    run(*argv, "--max-bad", "0.02")
    last, found = out / "checkpoints" / "step-00000006", losses(out)
    bad = json.loads((last / "state.json").read_text())["bad_images"]
    assert len(bad) == 4
    shutil.rmtree(last)
    with pytest.raises(SystemExit):
        run(*argv, "--max-bad", "0.0175")
    assert "mimkit: 4 images cannot be used, more than the 3 allowed, such as " in capsys.readouterr().err
    run(*argv, "--max-bad", "0.02")
    assert json.loads((last / "state.json").read_text())["bad_images"] == bad
    assert losses(out) == found


def test_knn_leaves_out_bad_images(damaged, capsys, monkeypatch):
    argv = ["knn", "--model", "hivit_nano", "--data", damaged, "--img-size", "32"]
    code, said, err = command(capsys, monkeypatch, *argv, "--max-bad", "0.1")
    assert code == 0, err
    assert_bad_images_are_named(said)
    counts = [count_good(part) for part in open_labeled(str(damaged))]
    assert sum(counts) == 196
    assert f"(k = 10, {counts[0]} training and {counts[1]} test images)" in said
    code, said, err = command(capsys, monkeypatch, *argv)
    assert code == 2
    assert "allowed, such as" in err
    assert "raise --max-bad" in err


def test_predict_leaves_out_bad_images(damaged, tmp_path, capsys, monkeypatch):
    network = timm.create_model("hivit_nano", num_classes=2, img_size=32)
    about = {"input_size": (3, 32, 32), "mean": [0.5] * 3, "std": [0.5] * 3, "label_names": ["a", "b"]}
    write_model(network, tmp_path / "model", **about)
    table = tmp_path / "table.csv"
    argv = ["predict", "--model", tmp_path / "model", "--images", damaged, "--out", table]
    code, _, err = command(capsys, monkeypatch, *argv)
    assert code == 2
    assert "4 images cannot be used, more than the 2 allowed" in err
    assert not table.exists()
    code, said, err = command(capsys, monkeypatch, *argv, "--max-bad", "0.02")
    assert code == 0, err
    assert_bad_images_are_named(said)
    assert said.endswith(f"wrote {table}: 196 images\n")
    rows = [row["image"] for row in csv.DictReader(table.open())]
    assert rows == sorted(str(file) for file in damaged.rglob("*.*") if file.name not in BAD)


def test_detection_leaves_out_strips(tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    strip, pixel = Image.new("RGB", (20_000, 3)), Image.new("RGB", (1, 1))
    for name, image in {"strip": strip, "pixel": pixel, "picture": picture()}.items():
        image.save(images / f"{name}.png")
    sizes = {"width": 32, "short": 64, "long": 96, "samples": 32}
    network = Detector(timm.create_model("hivit_nano"), 2, masks=False, **sizes)
    write_dense(network, tmp_path / "net", "detector", ["a", "b"], [1, 2], Normalize([0.5] * 3, [0.5] * 3))
    assert predict_objects(tmp_path / "net", str(images), str(tmp_path / "found.json"), 0.5) == 2
    assert "it is a strip" in skipped(capsys.readouterr().out)["strip.png"]
