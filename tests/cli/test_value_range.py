"""Floating-point images of any range: every command that reads images warns, and --value-range scales them."""

import json

import numpy as np
import pytest
import tifffile
from conftest import RECIPES
from PIL import Image

from mimkit import cli
from mimkit.data.loader import Rows, check_samples, eval_loader, load_preview
from mimkit.data.order import Plan
from mimkit.data.sample import SampleLoader
from mimkit.data.sources import open_labeled, open_source, set_value_range
from mimkit.data.streaming import Stream
from mimkit.data.transforms import eval_transform
from mimkit.errors import UserError, tell

EMPTY = (5.0, 5.0)  # is refused wherever a range is used


@pytest.fixture
def elevation(tmp_path):
    """Write ten gray float TIFFs of values from 100 to 3987 in two class folders, with masks and boxes beside them."""
    tell.cache_clear()
    root = tmp_path / "set"
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    for kind in ("labeled/a", "labeled/b", "dense/images", "dense/masks", "boxes/train", "boxes/annotations"):
        (root / kind).mkdir(parents=True)
    for i in range(10):
        array = np.linspace(100, 3987, 32 * 40, dtype=np.float32).reshape(32, 40)
        for folder in (f"labeled/{'ab'[i % 2]}", "dense/images", "boxes/train"):
            tifffile.imwrite(root / folder / f"{i}.tif", array)
        Image.fromarray(np.eye(32, 40, dtype=np.uint8)).save(root / "dense" / "masks" / f"{i}.png")
        coco["images"].append({"id": i, "file_name": f"{i}.tif", "height": 32, "width": 40})
        coco["annotations"].append({"image_id": i, "category_id": 1, "bbox": [1, 1, 5, 5]})
    (root / "boxes" / "annotations" / "instances_train.json").write_text(json.dumps(coco))
    return root


def test_values_outside_the_range_are_a_warning_with_the_right_range(elevation, capsys):
    (source,) = set_value_range((0, 1), open_source(str(elevation / "labeled")))
    said = capsys.readouterr().err
    assert "values from 100 to 3987, and 0 to 1 becomes 0 to 1: pass --value-range=0,4000." in said
    set_value_range((0, 4000), source)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="--value-range 5,5 must be two numbers, of which the second one is larger"):
        set_value_range(EMPTY, source)


def test_ranges_below_zero_and_streams(tmp_path, capsys):
    tell.cache_clear()
    np.save(tmp_path / "a.npy", np.full((4, 4, 5), -0.123, np.float32))
    np.save(tmp_path / "b.npy", np.full((4, 4, 5), 1e-3, np.float32))
    set_value_range((0, 1), open_source(str(tmp_path), streaming=True))
    assert "pass --value-range=-0.13,0.001." in capsys.readouterr().err


def test_other_files_with_floats_and_wrong_ranges(tmp_path, capsys):
    tell.cache_clear()
    (tmp_path / "a.pfm").write_bytes(b"Pf\n4 4\n-1.0\n" + np.full((4, 4), 3000, np.float32).tobytes())
    source = open_source(str(tmp_path))
    set_value_range((0, 1), source)
    assert "pass --value-range=0,3000." in capsys.readouterr().err
    for wrong in ((0, float("inf")), (1, 0)):
        with pytest.raises(UserError, match=r"--value-range .* must be two numbers"):
            set_value_range(wrong, source)


def test_every_way_to_load_images_scales_them(elevation):
    source = open_source(str(elevation / "labeled"))
    (scaled,) = set_value_range((0, 4000), source)
    view = SampleLoader(eval_transform((32, 32)), 1, 0, 0, (source.image, source.label), pixels=True)
    images = {
        "white": (Rows(source, view)[0, 0].image, 255),
        "rows": (Rows(scaled, view)[0, 0].image, 253),
        "checked": (check_samples(scaled, view)[0].image, 253),
        "evaluated": (next(iter(eval_loader(scaled, (32, 32), 1))).images[0], 253),
        "preview": (load_preview(scaled, (32, 32), 1, 2).images[0], 253),
    }
    (stream,) = set_value_range((0, 4000), open_source(str(elevation / "labeled"), streaming=True))
    plan = Plan(10, batch_size=2, steps=1)
    images["stream"] = (next(iter(Stream(stream, view, plan))).images[0], 253)
    for name, (image, brightest) in images.items():
        assert abs(int(image.max()) - brightest) <= 1, name
        assert (image.unique().numel() == 1) == (name == "white"), name


def test_every_command_takes_the_range(elevation, monkeypatch):
    data = str(elevation / "labeled")
    monkeypatch.setattr("mimkit.methods.checkpoint.load_run", lambda run: (None, {"input_size": (1, 32, 32)}))
    for command in (
        lambda: cli.knn("hivit_nano", data, value_range=EMPTY),
        lambda: cli.probe("hivit_nano", data, value_range=EMPTY),
        lambda: cli.reconstruct("run", data, value_range=EMPTY),
    ):
        with pytest.raises(UserError, match="--value-range 5,5"):
            command()
    for predict in ("mimkit.cli._predict_labels", "mimkit.tasks.segmentation.predict_masks"):
        monkeypatch.setattr(predict, lambda *given: given[-1])
    said = []
    monkeypatch.setattr("builtins.print", said.append)
    cli.predict("hivit_nano", data, value_range=EMPTY)
    monkeypatch.setattr("mimkit.tasks.dense_checkpoint.find_dense", lambda *_: "folder")
    cli.predict("hivit_nano", data, value_range=EMPTY)
    assert all("(5.0, 5.0)" in each for each in said)
    assert len(said) == 2


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__.rsplit(".", 1)[-1])
def test_every_recipe_takes_the_range(recipe, elevation, capsys):
    name = recipe.__name__.rsplit(".", 1)[-1]
    data = elevation / {"segment": "dense", "detect": "boxes"}.get(name, "labeled")
    model = "swin_tiny_patch4_window7_224" if name == "simmim" else "hivit_nano"
    argv = ["--model", model, "--data", str(data), "--value-range", "5,5"]
    with pytest.raises(SystemExit) as stop:
        recipe.main([*argv, *(["--masks", "false"] if name == "detect" else [])])
    assert stop.value.code == 2
    assert "--value-range 5,5 must be two numbers" in capsys.readouterr().err


def test_knn_of_pre_training_reads_as_training_does(elevation, monkeypatch):
    from mimkit.training import online_knn

    opened = []
    monkeypatch.setattr(online_knn, "open_labeled", lambda *_: open_labeled(str(elevation / "labeled")))
    monkeypatch.setattr(online_knn, "set_value_range", lambda *given: opened.append(given[0]) or list(given[1:]))
    (source,) = set_value_range((0, 4000), open_source(str(elevation / "labeled")))
    knn = object.__new__(online_knn.OnlineKNN)
    knn.run = type("Run", (), {"print": lambda *_: None})()
    with pytest.raises(UserError, match="at least 10"):
        knn._open(source, (None, None))
    assert opened == [(0, 4000)]
