"""Segmentation: the network, its loss, the data sets, the metric, and the recipe."""

import json
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import backbone, command, encoded, launched, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from mimkit.recipes import segment
from PIL import Image
from torch import nn
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_jaccard_index
from torchvision.datasets import Cityscapes

from mimkit.config import presets
from mimkit.conversion.verify import difference
from mimkit.data.segmentation import IGNORE, Classes, eval_pairs, open_masked, train_pairs
from mimkit.data.transforms import Normalize
from mimkit.errors import UserError
from mimkit.io.weights import write_model
from mimkit.models.pretrained import load_network
from mimkit.tasks.dense_checkpoint import read_dense, write_dense
from mimkit.tasks.segmentation import (
    Segmenter,
    iou,
    near_boundaries,
    predict_logits,
    resized_argmax,
    save_mask,
    segmentation_loss,
    window_starts,
)
from mimkit.training.optim import groups_with_head


def squares(folder, count=8, classes=3, size=(40, 56), seed=0):
    """Write images of colored squares on gray, and their masks. Any network learns them."""
    rng = np.random.default_rng(seed)
    colors = np.array([[90, 90, 90], [250, 40, 40], [40, 60, 250], [40, 240, 40]], dtype=np.uint8)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        mask = np.zeros(size, np.uint8)
        for label in range(1, classes):
            top, left = rng.integers(0, size[0] - 16), rng.integers(0, size[1] - 16)
            mask[top : top + 16, left : left + 16] = label
        noise = rng.integers(-20, 20, (*size, 3))
        Image.fromarray(np.clip(colors[mask] + noise, 0, 255).astype(np.uint8)).save(folder / "images" / f"{i}.jpg")
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    return folder


@pytest.fixture
def data(tmp_path):
    """16 training and 4 validation images of three classes."""
    for part, count in (("train", 16), ("val", 4)):
        squares(tmp_path / "set" / part, count, seed=count)
    return tmp_path / "set"


# The network ---------------------------------------------------------------------------------------------------------


def test_ignored_pixels_count_as_0_and_micro_batches_have_equal_weight():
    scores, masks = torch.randn(4, 3, 5, 6), torch.randint(3, (4, 5, 6))
    masks[0], masks[1, :2] = IGNORE, IGNORE
    assert segmentation_loss(scores[:1], masks[:1]) == 0  # and no NaN
    whole = segmentation_loss(scores, masks)
    assert torch.allclose(
        whole, (segmentation_loss(scores[:2], masks[:2]) + segmentation_loss(scores[2:], masks[2:])) / 2
    )
    mean = F.cross_entropy(scores, masks, ignore_index=IGNORE)
    assert torch.allclose(whole, mean * (masks != IGNORE).float().mean())


@pytest.mark.parametrize("decoder", ["upernet", "fpn"])
@pytest.mark.parametrize("name", ["hivit_nano", "hpvit", "vit_tiny_patch16_224 /14"])
def test_logits_have_the_size_of_the_image(name, decoder):
    model = Segmenter(backbone(name), 5, decoder, 32).eval()
    assert model(torch.randn(1, 3, 70, 45)).shape == (1, 5, 70, 45)


@pytest.mark.parametrize("name", ["hivit_nano", "hpvit", "vit_tiny_patch16_224"])
def test_window_is_saved_with_the_network(name, tmp_path):
    options = {"hivit_nano": {"depths": (1, 1, 8)}, "vit_tiny_patch16_224": {"depth": 8}}
    model = Segmenter(backbone(name, **options.get(name, {})), 3, width=32, window=2).eval()
    write_dense(model, tmp_path / "m", "segmenter", ["a", "b", "c"], [0, 1, 2], Normalize([0.5] * 3, [0.5] * 3))
    again = read_dense(tmp_path / "m", "segmenter", Segmenter)[0].eval()
    x = torch.randn(1, 3, 64, 96)
    assert again.pyramid.window == 2
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("name", ["hivit_nano", "hpvit", "svit_nano"])
def test_every_parameter_has_one_learning_rate(name):
    model = Segmenter(backbone(name), 3, width=32)
    groups = groups_with_head(model, "pyramid.backbone", 0.05, 0.5, 10.0)
    named = dict(model.named_parameters())
    assert sorted(n for g in groups for n in g["param_names"]) == sorted(named)
    for group in groups:
        assert all(named[n] is p for n, p in zip(group["param_names"], group["params"], strict=True))
    rates = {name: group["lr_scale"] for group in groups for name in group["param_names"]}
    assert rates["head.weight"] == rates["decoder.psp.out_conv.0.weight"] == 1
    inside = {n: r for n, r in rates.items() if n.startswith("pyramid.backbone.") and ".pools." not in n}
    assert max(inside.values()) == 0.5
    assert sorted(set(inside.values())) == [0.5**i for i in range(len(set(inside.values())), 0, -1)]
    assert all(rates[n] == 10 for n in rates if ".pools." in n)


# Pairs of images and masks -------------------------------------------------------------------------------------------


def ade20k(root, names=True):
    for part, count in (("training", 2), ("validation", 2)):
        squares(root / "made", count)
        for kind, own in (("images", "images"), ("annotations", "masks")):
            (root / kind).mkdir(parents=True, exist_ok=True)
            (root / "made" / own).rename(root / kind / part)
    (root / "made").rmdir()
    lines = [f"{i + 1}\t0.1\t1\t1\tname {i + 1}, other" for i in range(150)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *lines]))
    return root


def cityscapes(root, size=(128, 256)):
    rng = np.random.default_rng(0)
    for part in ("train", "val", "test"):
        for kind, end in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
            (root / kind / part / "aachen").mkdir(parents=True)
            for i in range(2):
                shape = (*size, 3) if kind == "leftImg8bit" else size
                array = rng.integers(0, 34, shape, dtype=np.uint8)
                Image.fromarray(array).save(root / kind / part / "aachen" / f"aachen_{i:06d}_000019_{end}.png")
        for end in ("gtFine_instanceIds.png", "gtFine_color.png", "gtFine_polygons.json"):
            for i in range(2):
                (root / "gtFine" / part / "aachen" / f"aachen_{i:06d}_000019_{end}").write_text("{}")
    return root


def test_ade20k_classes_begin_at_1_and_have_names(tmp_path):
    train, test, classes = open_masked(str(ade20k(tmp_path / "ade")))
    assert (train.length, test.length, len(classes.names)) == (2, 2, 150)
    assert classes.names[:2] == ["name 1", "name 2"]
    mask = classes(train.rows[0]["mask"])
    own = np.asarray(Image.open(train.rows[0]["mask"]["path"]))
    assert (mask.numpy() == np.where(own == 0, IGNORE, own - 1)).all()


def test_cityscapes_has_19_classes(tmp_path):
    train, test, classes = open_masked(str(cityscapes(tmp_path / "city")))
    assert (train.length, test.length, len(classes.names)) == (2, 2, 19)
    assert (classes.names[0], classes.values[0], classes.names[-1], classes.values[-1]) == ("road", 7, "bicycle", 33)
    mask = classes(train.rows[0]["mask"]).numpy()
    own = np.asarray(Image.open(train.rows[0]["mask"]["path"]))
    table = {c.id: c.train_id for c in Cityscapes.classes}
    assert (mask == np.vectorize(lambda v: IGNORE if table[v] in (-1, 255) else table[v])(own)).all()


def test_folders_parquet_and_names(data, tmp_path):
    train, test, classes = open_masked(str(data))
    assert (train.length, test.length, classes.names) == (16, 4, ["0", "1", "2"])
    (data / "classes.txt").write_text("ground\nred\nblue\n")
    assert open_masked(str(data))[2].names == ["ground", "red", "blue"]
    with pytest.raises(UserError, match="names 3 classes"):
        open_masked(str(data), classes=4)
    train, test, _ = open_masked(str(data / "train"))  # no parts: every fifth is held out
    assert (train.length, test.length) == (12, 4)
    rows = {
        "mask": [{"bytes": encoded(Image.fromarray(np.full((8, 8), i, np.uint8))), "path": None} for i in range(5)],
        "picture": [{"bytes": encoded(picture(i, (8, 8))), "path": None} for i in range(5)],
    }
    features = datasets.Features({"mask": datasets.Image(), "picture": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "all.parquet")
    train, test, classes = open_masked(str(tmp_path / "all.parquet"), zero_ignored=True)
    assert (train.image, train.mask, train.length, test.length) == ("picture", "mask", 4, 1)
    assert classes.names == ["1", "2", "3", "4"]


def broken(tmp_path, change):
    """Write five images and masks, change the folder, and return its name."""
    folder = squares(tmp_path / "broken", 5)
    change(folder)
    return str(folder)


def test_errors_in_masks_name_the_file(tmp_path, data, capsys):
    def recipe(*argv):
        with pytest.raises(SystemExit) as stop:
            segment.main(
                [*"--config segment_small --model hivit_nano --dry-run --workers 0 --batch-size 2".split(), *argv]
            )
        return str(stop.value.code) + capsys.readouterr().err

    folder = broken(tmp_path / "a", lambda f: (f / "masks" / "3.png").unlink())
    assert "1 images have no mask of the same name" in recipe("--data", folder)
    folder = broken(tmp_path / "b", lambda f: picture(0, (56, 40)).save(f / "masks" / "3.png"))
    assert "3.png: its mask holds colors (RGB)" in recipe("--data", folder)
    assert "3.jpg cannot be used (its mask holds colors" in recipe("--data", folder, "--classes", "3")
    folder = broken(tmp_path / "c", lambda f: None)
    assert "cannot be used (its mask has class 2, where 0 to 1 and 255" in recipe("--data", folder, "--classes", "2")
    folder = broken(tmp_path / "d", lambda f: Image.new("L", (56, 41)).save(f / "masks" / "3.png"))
    assert "3.jpg cannot be used (it is 40x56, and its mask 41x56)" in recipe("--data", folder)
    folder = broken(tmp_path / "e", lambda f: [file.unlink() for file in (f / "images").iterdir()])
    assert "has no images" in recipe("--data", folder)
    assert "has no masks" in recipe("--data", "sample")
    assert "is no run of recipes/segment.py" in recipe("--data", str(data), "--eval-only")
    assert "--schedule x is unknown" in recipe("--data", str(data), "--schedule", "x")
    assert "is not a range" in recipe("--data", str(data), "--scales", "[2,1]")
    for twice in ("in_chans", "img_size"):
        assert "which follows from another option" in recipe("--data", str(data), f"--model-args.{twice}", "3")


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (24, 80)])
def test_image_and_mask_are_transformed_together(size):
    """The image shows the mask's numbers, so both agree away from boundaries, and a mirrored mask does not."""
    mask = torch.zeros(50, 70, dtype=torch.uint8)
    mask[10:40, 5:30], mask[20:45, 40:65] = 1, 2
    image = Image.fromarray((mask * 100).numpy())
    transform = train_pairs(size, 50, (0.5, 2.0), [0.0])
    agreed, mirrored, ignored = [], [], set()
    for seed in range(20):
        torch.manual_seed(seed)
        pixels, found = transform(image, mask)
        assert (pixels.size[::-1], tuple(found.shape)) == (size, size)
        ignored.add(int((found == IGNORE).sum()))
        near = near_boundaries(found[None])[0]
        # a boundary may lie just outside the crop
        sure = F.pad(~near[2:-2, 2:-2] & (found != IGNORE)[2:-2, 2:-2], (2, 2, 2, 2))
        values = torch.from_numpy(np.asarray(pixels).copy()).float() / 100
        agreed.append(bool(((values - found).abs()[sure] < 0.3).all()))
        mirrored.append(bool(((values - found.flip(-1)).abs()[sure & sure.flip(-1)] < 0.3).all()))
    assert all(agreed)
    assert sum(mirrored) < 10
    assert len(ignored) > 1  # scales differ


def test_masks_are_resized_to_the_pixel_in_the_center():
    mask = (torch.arange(60) % 3).byte().expand(60, 60)
    scaled = train_pairs((20, 20), 60, (1 / 3, 1 / 3), [0.5] * 3)(picture(size=(60, 60)), mask)[1]
    assert (scaled == 1).all()


def test_val_is_evaluated_even_if_there_is_a_test_split(data):
    (squares(data / "test", 2) / "masks").rename(data / "unused")
    assert open_masked(str(data))[1].length == 4


def test_file_types_of_masks(tmp_path):
    folder = squares(tmp_path / "a", 5)
    with pytest.raises(UserError, match="too few images to hold some back"):
        open_masked(str(squares(tmp_path / "b", 1)))
    numbers = np.asarray(Image.open(folder / "masks" / "3.png")).astype(np.int32)
    kinds = {"1.tif": "I;16B", "2.tif": "I;16", "3.tif": "I", "4.png": "L"}
    for name, mode in kinds.items():
        kind = {"I;16B": ">u2", "I;16": "<u2", "I": "<i4", "L": "u1"}[mode]
        Image.frombytes(mode, (56, 40), numbers.astype(kind).tobytes()).save(folder / name)
        cell = {"bytes": None, "path": str(folder / name)}
        assert (Classes(["0", "1", "2"], [0, 1, 2])(cell).numpy() == numbers).all()
    Image.fromarray(np.full((40, 56), 2**31 - 1, np.int32)).save(folder / "3.tif")  # no table is as long as this
    with pytest.raises(ValueError, match="has class 2147483647, where 0 to 2 and 255"):
        Classes(["0", "1", "2"], [0, 1, 2])({"bytes": None, "path": str(folder / "3.tif")})
    np.save(folder / "masks" / "3.npy", numbers)
    (folder / "masks" / "3.png").unlink()
    with pytest.raises(UserError, match="1 images have no mask of the same name"):
        open_masked(str(folder))


def test_evaluated_images_keep_their_mask():
    mask = torch.randint(3, (50, 70), dtype=torch.uint8)
    image, same = eval_pairs(100)(picture(size=(70, 50)), mask)
    assert same is mask
    assert image.size == (140, 100)


def test_stray_number_is_not_a_class(data):
    file = data / "val" / "masks" / sorted(f.name for f in (data / "val" / "masks").iterdir())[1]
    stray = np.array(Image.open(file))
    stray[3, 4] = 200
    Image.fromarray(stray).save(file)
    with pytest.raises(UserError, match=f"{file.name} has the class 200, and no mask has 3: fix it, or say how many"):
        open_masked(str(data))


def black_and_white(root, values=(0, 255)):
    """Write six images with masks of two numbers."""
    table = np.array(values, np.uint16 if max(values) > 255 else np.uint8)
    for file in (squares(root, 6) / "masks").iterdir():
        Image.fromarray(table[(np.asarray(Image.open(file)) > 0).astype(int)]).save(file)
    return root


@pytest.mark.parametrize("named", [True, False], ids=["classes.txt", "--classes"])
def test_masks_of_0_and_255_are_a_warning_that_names_the_remedy(named, tmp_path, capsys):
    folder = black_and_white(tmp_path)
    if named:
        (folder / "classes.txt").write_text("background\nobject\n")
    train, _, classes = open_masked(str(folder), classes=None if named else 2)
    said = capsys.readouterr().err
    assert f": 4 of 4 training masks hold no pixel of class {'object' if named else '1'}. 255 means 'ignore'" in said
    assert "pass --mask-values 0,255." in said
    assert set(classes(train.rows[0]["mask"]).unique().tolist()) == {0, 255}
    train, _, classes = open_masked(str(folder), mask_values=[0, 255])
    assert capsys.readouterr().err == ""
    assert set(classes(train.rows[0]["mask"]).unique().tolist()) == {0, 1}
    assert classes.names == (["background", "object"] if named else ["0", "255"])


def test_numbers_with_gaps_are_refused_or_mapped(tmp_path):
    with pytest.raises(UserError, match=r"hold 0 and 255 only, and 255 means 'ignore'.*--mask-values 0,255\."):
        open_masked(str(black_and_white(tmp_path / "255")))
    folder = str(black_and_white(tmp_path / "1000", (7, 1000)))
    with pytest.raises(UserError, match=r"no mask has 0: .*--mask-values 7,1000"):
        open_masked(folder)
    with pytest.raises(UserError, match=r"--mask-values 7,8,9 must have one number for each of the 2 classes"):
        open_masked(folder, classes=2, mask_values=[7, 8, 9])
    with pytest.raises(UserError, match=r"--mask-values 7,7,1000 must have one number for each of the 3 classes"):
        open_masked(folder, mask_values=[7, 7, 1000])
    with pytest.raises(UserError, match="--zero-ignored and 0 in --mask-values contradict each other"):
        open_masked(folder, zero_ignored=True, mask_values=[0, 7])
    with pytest.raises(UserError, match="Class 70000: masks hold numbers up to 65535"):
        open_masked(folder, mask_values=[7, 70000])
    train, _, classes = open_masked(folder, mask_values=[7, 1000])
    mask = classes(train.rows[0]["mask"])
    save_mask(torch.tensor(classes.values)[mask.long()], classes.values, tmp_path / "saved.png")
    assert torch.equal(classes({"bytes": None, "path": str(tmp_path / "saved.png")}), mask)
    with pytest.raises(
        ValueError, match="has class 1000, where 7 to 8 and 255 for 'ignore' are known: pass --mask-values"
    ):
        Classes(["a", "b"], [7, 8])(train.rows[0]["mask"])


def test_masks_are_compared_with_the_classes(data, capsys):
    open_masked(str(data))
    assert capsys.readouterr().err == ""
    (data / "classes.txt").write_text("".join(f"name {i}\n" for i in range(8)))
    open_masked(str(data))
    assert "16 of 16 training masks" in (said := capsys.readouterr().err)
    assert "hold no pixel of class name 3, name 4, name 5 and 2 more. Remove it from --classes or classes.txt" in said
    for file in sorted((data / "train" / "masks").iterdir())[:9]:  # most masks, but not all
        Image.fromarray(np.where(np.array(Image.open(file)) > 0, 255, 0).astype(np.uint8)).save(file)
    (data / "classes.txt").unlink()
    open_masked(str(data))
    said = capsys.readouterr().err
    assert "9 of 16 training masks hold only one class and 255. 255 means 'ignore'" in said
    assert said.endswith("if it is a class, pass --mask-values A,B,...,255.\n")


@pytest.mark.parametrize("names", [["one"], [str(i) for i in range(256)]])
def test_too_few_or_too_many_classes(names):
    with pytest.raises(UserError, match="tells 2 to 254 apart"):
        Classes(names, list(range(len(names))))


def test_argmax_of_a_few_classes_at_a_time_is_that_of_all():
    scores = torch.randn(2, 19, 5, 7).round()  # many are equal
    whole = F.interpolate(scores, (11, 13), mode="bilinear").argmax(1)
    assert torch.equal(resized_argmax(scores, (11, 13)), whole)


# Evaluation ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 90), st.integers(1, 40))
def test_windows_cover_a_side(side, crop):
    places = window_starts(side, crop)
    covered = {i for place in places for i in range(place, place + crop)}
    assert covered >= set(range(side))
    assert places == sorted(set(places))
    assert max(places) + crop == max(side, crop)


def test_windows_and_flips_do_not_change_a_pixelwise_network():
    model = nn.Conv2d(3, 4, 1)
    x = torch.randn(1, 3, 37, 50)
    for crop, flip in (((16, 16), False), ((16, 60), False), (None, True), ((20, 24), True)):
        assert torch.allclose(predict_logits(model, x, crop, flip), model(x), atol=1e-5)
    wide = nn.Conv2d(3, 4, 5, padding=2)
    assert predict_logits(wide, x, (40, 64)).equal(wide(x))
    assert not torch.allclose(predict_logits(wide, x, (16, 16)), wide(x), atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_boundaries_are_their_definition(seed, reach):
    generator = torch.Generator().manual_seed(seed)
    mask = F.interpolate(torch.randint(3, (1, 1, 3, 4), generator=generator).float(), size=(11, 13))[0, 0].long()
    mask[torch.rand(mask.shape, generator=generator) < 0.1] = IGNORE
    found = near_boundaries(mask[None], reach)[0]
    for i in range(11):
        for j in range(13):
            around = mask[max(0, i - reach) : i + reach + 1, max(0, j - reach) : j + reach + 1]
            others = set(around.flatten().tolist()) - {IGNORE}
            assert found[i, j] == (mask[i, j] != IGNORE and len(others) > 1)


def test_iou_is_torchmetrics():
    found, true = torch.randint(5, (2, 4000))
    confusion = multiclass_confusion_matrix(found, true, 6)
    ours = iou(confusion)
    theirs = 100 * multiclass_jaccard_index(found, true, 6, average="none")
    assert torch.allclose(ours[:5].float(), theirs[:5])
    assert ours[5].isnan()  # neither present nor predicted, so it does not count


# The recipe ----------------------------------------------------------------------------------------------------------

SMALL = "--config segment_small --model hivit_nano --img-size 32 --decoder-dim 32 --workers 0 --batch-size 8".split()
SMALL += ["--short-side", "40", "--lr", "2e-3", "--layer-decay", "1", "--scales", "[0.9,1.2]"]


def metrics(run):
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.e2e
def test_it_learns_resumes_is_evaluated_and_predicts(data, tmp_path, capsys, monkeypatch):
    epochs = "--epochs 12 --warmup-epochs 1 --eval-every 6 --save-every 6".split()
    argv = [*SMALL, "--data", str(data), *epochs]
    segment.main([*argv, "--out", str(tmp_path / "a"), "--model-ema-decay", "0.5"])
    printed = capsys.readouterr().out
    lines = metrics(tmp_path / "a")
    scores = [line for line in lines if "miou" in line]
    assert [line["step"] for line in scores] == [12, 24]
    assert scores[-1]["miou"] > 60 > 40 > scores[-1]["miou"] - scores[-1]["boundary_miou"]
    assert f"last/ ({scores[-1]['miou']:.2f} %)" in printed
    for name in ("predictions.png", "classes.csv", "curves.png", "best/segmenter.json", "last/model.safetensors"):
        assert (tmp_path / "a" / name).is_file()

    (tmp_path / "b").mkdir()
    for name in ("config.yaml", "metrics.jsonl"):  # as if it was killed after the first checkpoint
        (tmp_path / "b" / name).write_text((tmp_path / "a" / name).read_text())
    (tmp_path / "b" / "checkpoints").mkdir()
    (tmp_path / "a" / "checkpoints" / "step-00000012").rename(tmp_path / "b" / "checkpoints" / "step-00000012")
    segment.main([*argv, "--out", str(tmp_path / "b"), "--model-ema-decay", "0.5", "--resume", "auto"])
    assert metrics(tmp_path / "b")[-1]["miou"] == pytest.approx(scores[-1]["miou"])
    ours, theirs = (read_dense(tmp_path / run / "last", "segmenter", Segmenter)[0].state_dict() for run in "ab")
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-6) for key in ours)
    capsys.readouterr()

    evaluate = ["--config", "segment_small", "--data", str(data), "--workers", "0", "--eval-only"]  # at the run's size
    segment.main([*evaluate, "--model", str(tmp_path / "a" / "last")])
    assert f"mIoU {scores[-1]['miou']:.2f} %" in capsys.readouterr().out
    segment.main([*evaluate, "--model", str(tmp_path / "a" / "last"), "--slide", "--img-size", "32", "--flip-test"])
    sliding_scores = re.search("mIoU .*", capsys.readouterr().out).group()
    again = shutil.copytree(tmp_path / "a" / "last", tmp_path / "sliding")
    about = json.loads((again / "segmenter.json").read_text())
    (again / "segmenter.json").write_text(json.dumps(about | {"crop": [32, 32], "flip": True}))
    for argument, expected in (("--workers=0", True), ("--slide=false", False)):  # by default, as the run was evaluated
        segment.main([*evaluate, "--model", str(again), argument])
        assert (re.search("mIoU .*", capsys.readouterr().out).group() == sliding_scores) == expected

    predict = ["predict", "--model", tmp_path / "a", "--images", data / "val" / "images", "--out"]
    assert command(capsys, monkeypatch, *predict, tmp_path / "masks")[:2] == (0, f"wrote {tmp_path}/masks/: 4 masks\n")
    right = []
    for file in sorted((data / "val" / "masks").iterdir()):
        found, true = (np.asarray(Image.open(f)) for f in (tmp_path / "masks" / file.name, file))
        assert found.shape == true.shape
        right.append((found == true).mean())
    assert np.mean(right) > 0.85
    code, _, error = command(capsys, monkeypatch, *predict, tmp_path / "masks")
    assert code
    assert "exists already. Choose a new folder" in error

    with pytest.raises(SystemExit):
        segment.main([*evaluate[:-1], "--model", str(tmp_path / "a"), "--from-scratch"])
    assert "Omit --init, --from-scratch" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        segment.main([*argv, "--batch-size", "1", "--out", str(tmp_path / "c")])
    assert "UPerNet needs at least 2 images in a micro-batch" in capsys.readouterr().err

    (data / "classes.txt").write_text("a\nb\nc\n")
    with pytest.raises(SystemExit):
        segment.main([*evaluate, "--model", str(tmp_path / "a" / "last")])
    assert "has 3 classes (0, 1, 2, ...), but --data" in capsys.readouterr().err
    (tmp_path / "a" / "last" / "segmenter.json").write_text("{")
    with pytest.raises(SystemExit):
        segment.main([*evaluate, "--model", str(tmp_path / "a" / "last")])
    assert "segmenter.json is not JSON" in capsys.readouterr().err


def test_patches_of_1_px_are_resampled_to_4(data, tmp_path, capsys):
    """The README's first command trains patches of 1 px. Resampled to 4 px, they map enlarged images to the same."""
    net = timm.create_model("hivit_nano", img_size=32, patch_size=1, unit_form=True, num_classes=0)
    write_model(net, tmp_path / "encoder", input_size=(3, 32, 32), mean=[0.5] * 3, std=[0.25] * 3)
    argv = [*SMALL, "--data", str(data), "--model", str(tmp_path / "encoder"), "--dry-run"]
    with pytest.raises(SystemExit):
        segment.main(argv)
    assert "at 1, 2, 4: pass --model-args.patch_size 4." in capsys.readouterr().err
    segment.main([*argv, "--model-args.patch_size", "4"])
    assert "loss of 2 images" in capsys.readouterr().out
    own, other = (
        load_network(str(tmp_path / "encoder"), **options)[0] for options in ({}, {"patch_size": 4, "img_size": 128})
    )
    x = torch.randn(2, 3, 32, 32)
    large = F.interpolate(x, scale_factor=4)
    maps = (net.forward_intermediates(image, intermediates_only=True) for net, image in ((own, x), (other, large)))
    for ours, theirs in zip(*maps, strict=True):
        assert difference(ours, theirs) < 1e-4


@pytest.mark.distributed
def test_two_processes_evaluate_as_one_does(data, tmp_path, capsys):
    argv = [*SMALL, "--data", str(data), "--epochs", "1", "--warmup-epochs", "0.5", "--decoder", "fpn"]
    segment.main([*argv, "--out", str(tmp_path / "1")])
    launched(2, "segment", *argv, "--out", tmp_path / "2")
    found = [[line["loss"] for line in metrics(tmp_path / n) if "loss" in line] for n in "12"]
    assert found[0] == pytest.approx(found[1], rel=0.1)  # each process draws its own dropout
    words = [*argv, "--model", str(tmp_path / "2"), "--eval-only"]
    capsys.readouterr()
    segment.main(words)
    said = capsys.readouterr().out, launched(2, "segment", *words)
    one, two = (re.search("mIoU .*", text).group() for text in said)
    assert one == two


@pytest.mark.e2e
@pytest.mark.parametrize("name", [n for n in presets("segment") if n != "segment_small"])
def test_published_presets_run(name, tmp_path, capsys, monkeypatch):
    """They run on generated images in the right layout, from scratch, because weights are on the hub or in a run."""
    root = (cityscapes if "cityscapes" in name else ade20k)(tmp_path / "data")
    net = {"hpvit_b": "hpvit_b", "hivit_b": "hivit_b", "svit_s": "svit_s", "vit_b": "vit_base_patch16_224"}
    model = next(net[key] for key in net if name.startswith(f"segment_{key}"))
    monkeypatch.chdir(tmp_path)
    argv = ["--config", name, "--data", str(root), "--model", model, "--from-scratch", "--dry-run", "--workers", "0"]
    size = "64x128" if "cityscapes" in name else "96"
    segment.main([*argv, "--img-size", size, "--short-side", "96", "--decoder-dim", "64"])
    printed = capsys.readouterr().out
    assert "loss of 2 images" in printed
    assert "on 2 test images" in printed
    assert not (tmp_path / "runs").exists()
