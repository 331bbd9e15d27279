"""A folder of which 5 % are damaged or odd, ten kinds of them: the good ones are used, the bad ones named."""

import csv
import io
import json
import resource
import shutil
import struct
import zlib
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
import pytest
import tifffile
import timm
import torch
from conftest import command, encoded, picture
from mimkit.recipes import mae_hivit
from PIL import Image
from test_detection import detector
from test_training import TINY, losses, run

from mimkit.data.decode import decode, decode_pixels
from mimkit.data.detection import fitting
from mimkit.data.loader import eval_loader, limit_bad_images
from mimkit.data.sample import SampleLoader
from mimkit.data.segmentation import check_sizes
from mimkit.data.sources import open_labeled, open_source
from mimkit.data.transforms import Normalize, eval_transform, train_transform
from mimkit.io.weights import write_model
from mimkit.tasks.dense_checkpoint import write_dense
from mimkit.tasks.detection import predict_objects

BAD = {
    "truncated.jpg": "truncated",
    "empty.jpg": "an empty file",
    "text.jpg": "not an image of a known kind",
    "bomb.png": "400000000 pixels",
}


def smooth(size=(64, 48)):
    """A picture that compression leaves as it is, and whose corners differ"""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    return Image.fromarray((255 * np.stack([x, y, 1 - x * y / 2], -1)).astype(np.uint8))


def far(image, other):
    """The mean difference of two pictures, of 255"""
    return float(np.abs(np.asarray(image).astype(int) - np.asarray(other).astype(int)).mean())


def png(width, height, depth, kind, rows):
    """A PNG of these bytes, a filter and the samples for each row"""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(array, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def turned(image, orientation, kind="JPEG", **options):
    """Stored as a camera would that was held so: EXIF says how to turn it upright."""
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
    undo |= {7: "TRANSVERSE", 8: "ROTATE_270"}
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image.transpose(Image.Transpose[undo[orientation]]) if orientation in undo else image
    return encoded(stored, kind, exif=exif, **options)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """200 images in two class folders, of which 11 are of the ten kinds (20,000 px: a strip, and a bomb of 48 kB)."""
    root = tmp_path_factory.mktemp("damaged")
    frames = [Image.new("RGB", (20, 24), color) for color in ("red", "lime", "blue")]
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
        "turned.jpg": turned(smooth(), 6),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
    }
    for i in range(200):
        name, content = kinds.popitem() if i % 18 == 4 and kinds else (f"{i:03d}.png", encoded(picture(i, (20, 24))))
        place = root / f"class{i % 2}"
        place.mkdir(exist_ok=True)
        (place / name).write_bytes(content)
    assert not kinds
    return root


def good_in(source):
    """How many images of a part can be used, by their names"""
    return sum(Path(cell["path"]).name not in BAD for cell in source.rows[source.image])


def named(said):
    """The lines about skipped images: name -> the line; each has one."""
    lines = [line for line in said.splitlines() if line.startswith("skipped ")]
    found = {Path(line.split()[1].rstrip(",")).name: line for line in lines}
    assert len(found) == len(lines), lines
    return found


def assert_bad_ones_are_named(said):
    found = named(said)
    assert found.keys() == BAD.keys()
    assert all(reason in found[name] for name, reason in BAD.items())


# Each kind -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000"])
def test_what_is_cut_off_is_bad(kind):
    whole = encoded(picture(), kind)
    assert decode(whole).size == (40, 30)
    for length in (1, 40, len(whole) // 3, len(whole) * 2 // 3):
        with pytest.raises((ValueError, OSError, SyntaxError)):
            decode(whole[:length])


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_keeps_its_colors(kind):
    decoded = decode(encoded(smooth().convert("CMYK"), kind))
    assert far(decoded, smooth()) < 3
    assert far(decoded, 255 - np.asarray(smooth())) > 60


GRAY = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21  # to 64,491
COLORS = np.stack([GRAY, GRAY[::-1], GRAY.T.reshape(48, 64)], -1)
DEEP = {
    "png": encoded(Image.fromarray(GRAY)),
    "png of colors": png(64, 48, 16, 2, b"".join(b"\0" + row.tobytes() for row in COLORS.astype(">u2"))),
    "pgm, I": b"P5 64 48 65535\n" + GRAY.astype(">u2").tobytes(),
    "jpeg 2000": encoded(Image.fromarray(GRAY), "JPEG2000"),
    "tiff, I;16": encoded(Image.fromarray(GRAY), "TIFF"),
    "tiff, I;16B": tiff(GRAY, byteorder=">"),
    "tiff, I": encoded(Image.fromarray(GRAY.astype(np.int32)), "TIFF"),
    "tiff, 32 bits": tiff(GRAY.astype(np.uint32) << 16),
    "tiff of colors": tiff(COLORS, photometric="rgb"),
    "tiff of planes": tiff(np.moveaxis(COLORS, -1, 0), photometric="rgb", planarconfig="separate"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_eight_bits_are_scaled(kind):
    decoded = decode(DEEP[kind])
    found = 255 * decoded.permute(1, 2, 0).numpy() if torch.is_tensor(decoded) else np.asarray(decoded)
    expected = COLORS if kind.endswith(("colors", "planes")) else GRAY[..., None]
    assert found.shape == (48, 64, 3)
    assert np.abs(found - expected / 257).max() <= 1
    assert found.max() < 255  # nothing is clipped


def test_a_pixel_is_an_image_of_one_color():
    for transform in (eval_transform((16, 16)), train_transform((16, 16))):
        pixels = transform(decode_pixels(encoded(Image.new("RGB", (1, 1), (200, 10, 20)))))
        assert torch.equal(pixels, torch.tensor([200, 10, 20], dtype=torch.uint8)[:, None, None].expand(3, 16, 16))


@contextmanager
def memory(megabytes):
    """Inside, there is so much more than what is in use."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def strips():
    wide = Image.new("RGB", (20_000, 3), "red")
    wide.paste((0, 255, 0), (9_995, 0, 10_005, 3))
    for image in (wide, wide.rotate(90, expand=True)):
        with memory(200):
            middle = eval_transform((224, 224))(image)
        assert middle.size == (224, 224)
        assert far(middle, Image.new("RGB", (224, 224), (0, 255, 0))) < 1
    with memory(200), pytest.raises(MemoryError):  # what scaling all of it would ask for
        wide.resize((20_000 * 75, 224))
    ordinary = smooth((210, 30))  # 7 times as long as wide: as ever
    expected = ordinary.resize((224, 32), Image.Resampling.BICUBIC).crop((96, 0, 128, 32))
    assert far(eval_transform((32, 32))(ordinary), expected) == 0


def bombs():
    pixels = np.broadcast_to(np.zeros((), np.uint8), (5, 14_000, 14_000))
    files = [
        (png(20_000, 20_000, 1, 0, bytes(20_000 * 2_501)), 3, "400000000 pixels"),
        (png(20_000, 20_000, 1, 0, bytes(20_000 * 2_501)), 5, "400000000 pixels"),
        (tiff(pixels[0], compression="zlib", rowsperstrip=500), 3, "196000000 pixels"),
        (tiff(pixels, compression="zlib", rowsperstrip=500, photometric="minisblack"), 5, "is more than 178956970"),
    ]
    for data, in_chans, reason in files:
        assert len(data) < 4e6
        with memory(100), pytest.raises(Exception, match=reason):
            decode(data, in_chans)
    with memory(100), pytest.raises(MemoryError):
        np.zeros(400_000_000, np.uint8)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is measured through /proc")
@pytest.mark.parametrize("check", [strips, bombs])
def test_no_more_is_unpacked_than_what_is_needed(check):
    """In a fresh process: what other tests have given back would serve without asking for more."""
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:
        alone.submit(check).result()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_cameras_are_turned_upright(kind):
    for orientation in range(1, 9):
        decoded = decode(turned(smooth(), orientation, kind))
        assert decoded.size == (64, 48)
        assert far(decoded, smooth()) < 3, orientation
    assert far(decode(encoded(smooth().rotate(180), kind)), smooth()) > 60


def test_of_an_animation_the_first_picture_counts():
    frames = [smooth((20, 24)).quantize(64), *(Image.new("RGB", (20, 24), color) for color in ("lime", "blue"))]
    first = frames[0].convert("RGB")
    for kind, options in (("GIF", {}), ("PNG", {}), ("PNG", {"default_image": True}), ("WEBP", {"lossless": True})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert Image.open(io.BytesIO(data)).is_animated
        assert far(decode(data), first) == 0
        assert far(decode(data), frames[1]) > 60


# All of them ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_uses_the_good_ones_and_names_each_bad_one_once(damaged, streaming, tmp_path, capsys):
    out, small = tmp_path / "run", ["--epochs", "2", "--save-every", "0", "--batch-size", "40", "--decoder-depth", "1"]
    argv = ["--data", str(damaged), "--out", str(out), *TINY, *small, "--streaming", str(streaming).lower()]
    run(mae_hivit, *argv, "--max-bad", "0.02")
    said = capsys.readouterr().out
    assert_bad_ones_are_named(said)
    assert "200 images" in said
    found = losses(out)
    assert max(found) == 10
    assert np.isfinite(list(found.values())).all()
    assert (out / "encoder" / "model.safetensors").is_file()
    if not streaming:
        counts = " + ".join(str(good_in(part)) for part in open_labeled(str(damaged)))
        assert said.count(f"{counts} images") == 2  # kNN, before and after

    with pytest.raises(SystemExit) as stop:
        run(mae_hivit, *argv, "--out", str(tmp_path / "other"), "--max-bad", "0.0175")
    complaint = capsys.readouterr().err
    assert stop.value.code == 2
    assert complaint.startswith("mimkit: 4 images cannot be used, more than the 3 allowed, such as ")
    assert complaint.rstrip().endswith("raise --max-bad.")
    assert len(complaint.splitlines()) == 1


def test_a_run_that_goes_on_knows_those_that_it_met_before(damaged, tmp_path, capsys):
    """In one more step there are not as many."""
    out, small = tmp_path / "run", ["--epochs", "1.2", "--save-every", "1", "--batch-size", "40", "--knn-every", "0"]
    argv = ["--data", str(damaged), "--out", str(out), *TINY, *small, "--decoder-depth", "1", "--resume", "auto"]
    run(mae_hivit, *argv, "--max-bad", "0.02")
    last, found = out / "checkpoints" / "step-00000006", losses(out)
    skipped = json.loads((last / "state.json").read_text())["skipped"]
    assert len(skipped) == 4
    shutil.rmtree(last)
    with pytest.raises(SystemExit):
        run(mae_hivit, *argv, "--max-bad", "0.0175")
    assert "mimkit: 4 images cannot be used, more than the 3 allowed, such as " in capsys.readouterr().err
    run(mae_hivit, *argv, "--max-bad", "0.02")
    assert json.loads((last / "state.json").read_text())["skipped"] == skipped
    assert losses(out) == found


def test_neighbors_are_those_of_the_good_ones(damaged, capsys, monkeypatch):
    argv = ["knn", "--model", "hivit_nano", "--data", damaged, "--img-size", "32"]
    code, said, err = command(capsys, monkeypatch, *argv, "--max-bad", "0.1")
    assert code == 0, err
    assert_bad_ones_are_named(said)
    counts = [good_in(part) for part in open_labeled(str(damaged))]
    assert sum(counts) == 196
    assert f"(k = 10, {counts[0]} training and {counts[1]} test images)" in said
    code, said, err = command(capsys, monkeypatch, *argv)
    assert code == 2
    assert "allowed, such as" in err
    assert "raise --max-bad" in err


def test_labels_are_those_of_the_good_ones(damaged, tmp_path, capsys, monkeypatch):
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
    assert_bad_ones_are_named(said)
    assert said.endswith(f"wrote {table}: 196 images\n")
    rows = [row["image"] for row in csv.DictReader(table.open())]
    assert rows == sorted(str(file) for file in damaged.rglob("*.*") if file.name not in BAD)


def test_a_strip_is_too_long_to_be_looked_at_whole(tmp_path, capsys):
    strip, mask = Image.new("RGB", (20_000, 3)), torch.zeros(3, 20_000)
    for look in (lambda: check_sizes(strip, mask), lambda: fitting(strip, {})):
        with pytest.raises(ValueError, match="it is a strip of 3x20000"):
            look()
    images = tmp_path / "images"
    images.mkdir()
    for name, image in {"strip": strip, "pixel": Image.new("RGB", (1, 1)), "picture": picture()}.items():
        image.save(images / f"{name}.png")
    normalize = Normalize([0.5] * 3, [0.5] * 3)
    write_dense(detector(masks=False), tmp_path / "net", "detector", ["a", "b"], [1, 2], normalize)
    assert predict_objects(tmp_path / "net", str(images), str(tmp_path / "found.json"), 0.5) == 2
    assert "it is a strip" in named(capsys.readouterr().out)["strip.png"]


def test_rows_without_a_file_are_told_apart_by_their_part(tmp_path):
    for part in ("train", "test"):
        data = [encoded(picture()), b"no image"] * 5
        rows = {"image": [{"bytes": cell, "path": None} for cell in data], "label": [0, 1] * 5}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{part}.parquet")
    sources = [open_source(str(tmp_path), train) for train in (True, False)]
    sources += open_labeled(str(tmp_path / "train.parquet"))
    for source, name in zip(sources, ("image 1", "test image 1", "kept image 0", "held-out image 1"), strict=True):
        said = []
        list(limit_bad_images(eval_loader(source, (8, 8), 3), 9, said.append))
        assert said[0] == f"skipped {name}, which cannot be used (not an image of a known kind)"
    assert SampleLoader(eval_transform((8, 8)), 3, 0, 0, ("image", None))(sources[0].rows[0], 0, 0).name == "image 0"
