"""Detection: the data sets, the network, COCO's metrics, and the recipe."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import command, joined, launched
from hypothesis import given, settings
from hypothesis import strategies as st
from mimkit.recipes import detect
from PIL import Image
from poison import poison
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision import tv_tensors
from torchvision.transforms import v2

from mimkit.config import presets
from mimkit.data.detection import CocoGroundTruth, around, draw_mask, fitting, open_boxes, read_objects, train_objects
from mimkit.data.sample import SampleLoader, collate_list
from mimkit.data.transforms import Normalize
from mimkit.errors import UserError
from mimkit.tasks import detection
from mimkit.tasks.dense_checkpoint import read_dense, write_dense
from mimkit.tasks.detection import Detector, coco_metrics, coco_results, paste_masks
from mimkit.training.optim import groups_with_head, multistep

TINY = {"source_args": {"embed_dim": 32, "depth": 3, "num_heads": 2}, "depths": "1-1-1-0"}
BACKBONES = {
    "hivit_nano": {},
    "hpvit": TINY,
    "svit_nano": {},
    "vit_tiny_patch16_224": {"embed_dim": 32, "depth": 2, "num_heads": 2, "dynamic_img_size": True},
}
COLORS = np.array([[90, 90, 90], [250, 40, 40], [40, 60, 250]], dtype=np.uint8)


def detector(name="hivit_nano", **options):
    options = {"width": 32, "short": 64, "long": 96, "samples": 32} | options
    return Detector(timm.create_model(name, **BACKBONES[name]), 2, **options)


def polygon(left, top, side):
    return [[left, top, left + side, top, left + side, top + side, left, top + side]]


def run_lengths(mask):
    """Return an uncompressed run-length encoding (COCO: by columns, beginning with a run of zeros)."""
    counts, value = [0], 0
    for pixel in mask.flatten(order="F"):
        if pixel == value:
            counts[-1] += 1
        else:
            counts.append(1)
            value = pixel
    return {"size": list(mask.shape), "counts": counts}


def objects(folder, file, count=8, size=(64, 80), seed=0, first=0):
    """Write images of red and blue squares on gray, with masks as polygons and run lengths, and one empty image."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    coco = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "blue"}, {"id": 3, "name": "red"}]}
    for i in range(count):
        picture = np.zeros(size, np.uint8)
        own = []
        for label, category in ((1, 3), (2, 7)) if i else ():
            side = int(rng.integers(24, 40))
            left, top = int(rng.integers(0, size[1] - side)), int(rng.integers(0, size[0] - side))
            picture[top : top + side, left : left + side] = label
            own.append((category, left, top, side))
        for kind, (category, left, top, side) in enumerate(own):
            whole = kind == len(own) - 1  # nothing covers it
            visible = (picture == 1).astype(np.uint8)
            if whole:
                drawn = polygon(left, top, side)
            elif i % 2:
                drawn = run_lengths(visible)
            else:
                drawn = coco_masks.encode(np.asfortranarray(visible))
                drawn["counts"] = drawn["counts"].decode()
            about = {"id": len(coco["annotations"]) + 1, "image_id": first + i, "category_id": category, "iscrowd": 0}
            coco["annotations"].append(
                {**about, "bbox": [left, top, side, side], "area": side * side, "segmentation": drawn}
            )
        noise = rng.integers(-20, 20, (*size, 3))
        Image.fromarray(np.clip(COLORS[picture] + noise, 0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        coco["images"].append({"id": first + i, "file_name": f"{i}.png", "height": size[0], "width": size[1]})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(coco))
    return coco


def coco_set(root, train=16, test=6, year="2017", size=(64, 80)):
    for part, count in (("train", train), ("val", test)):
        file = root / "annotations" / f"instances_{part}{year}.json"
        objects(root / f"{part}{year}", file, count, size, seed=count, first=100 * count)
    return root


@pytest.fixture
def data(tmp_path):
    """16 training and 6 validation images of two classes, one of each split without objects."""
    return coco_set(tmp_path / "set")


# Sets ----------------------------------------------------------------------------------------------------------------


def test_layouts_of_data_sets_and_rows(data, tmp_path):
    train, known, test, truth = open_boxes(str(data), masks=True)
    assert (train.length, test.length) == (16, 6)
    assert (known.names, known.numbers, truth.ids) == (["red", "blue"], [3, 7], [600 + i for i in range(6)])
    first, second = (read_objects(True)(train.rows[i]["objects"]) for i in (0, 1))
    assert (len(first["labels"]), first["boxes"].shape, first["masks"].shape) == (0, (0, 4), (0, 64, 80))
    assert second["labels"].tolist() == [1, 2]
    own = [a for a in known.coco["annotations"] if a["image_id"] == 1601]
    assert second["boxes"][1].tolist() == [*own[1]["bbox"][:2], *np.add(own[1]["bbox"][:2], own[1]["bbox"][2:])]
    assert around(second["masks"][1:])[0].tolist() == second["boxes"][1].tolist()

    other = tmp_path / "roboflow"
    objects(other / "train", other / "train" / "_annotations.coco.json", 10)
    train, _, test, truth = open_boxes(str(other), masks=True)  # no parts: every fifth is held out
    assert (train.length, test.length, truth.ids) == (8, 2, [0, 5])
    assert {a["image_id"] for a in truth.coco["annotations"]} <= set(truth.ids)
    inside = tmp_path / "inside"
    objects(inside / "train" / "images", inside / "annotations" / "instances_train.json", 6)
    assert open_boxes(str(inside), masks=True)[0].length == 4


def test_masks_of_three_kinds_equal_those_of_pycocotools():
    rng = np.random.default_rng(0)
    seen = (rng.random((23, 31)) < 0.4).astype(np.uint8)
    packed = coco_masks.encode(np.asfortranarray(seen))
    packed["counts"] = packed["counts"].decode()
    assert (draw_mask(packed, 23, 31) == seen).all()
    assert (draw_mask(run_lengths(seen), 23, 31) == seen).all()
    shape = [[2.5, 3, 20, 4, 15, 20.5], [22, 1, 30, 1, 30, 9, 25, 9]]
    theirs = coco_masks.decode(coco_masks.merge(coco_masks.frPyObjects(shape, 23, 31)))
    assert (draw_mask(shape, 23, 31) == theirs).all()
    with pytest.raises(ValueError, match="its image of"):
        draw_mask(packed, 31, 23)
    with pytest.raises(ValueError, match="fewer than three corners"):
        draw_mask([[1, 2, 3, 4]], 23, 31)
    for flat in ([5, 5, 25, 5, 25, 25], [["a", 1, 2, 3, 4, 5]]):
        with pytest.raises(ValueError, match="is no list of numbers"):
            draw_mask(flat, 23, 31)
    with pytest.raises(ValueError, match="a mask is of None"):
        draw_mask({"counts": packed["counts"]}, 23, 31)
    for counts in ([-5, 5 + 23 * 31], [0, 7], ["x"], None):
        with pytest.raises(ValueError, match="whole numbers that add up to 713"):
            draw_mask({"size": [23, 31], "counts": counts}, 23, 31)


def changed(root, change):
    """Write a data set, change its file of annotations, and return its name."""
    coco_set(root, 6, 5)
    file = root / "annotations" / "instances_train2017.json"
    coco = json.loads(file.read_text())
    change(coco)
    file.write_text(json.dumps(coco))
    return str(root)


def crowd(segmentation):
    """Return a change that makes the first annotation one of a crowd, which only the evaluation reads."""
    return lambda c: c["annotations"][0].update(iscrowd="1", segmentation=segmentation)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][2].pop("segmentation"), r"annotation 3 of 2.png has no mask .*--masks false"),
        (lambda c: c["annotations"][0].update(category_id=4), "annotation 1 of 1.png has category 4, none of the 2"),
        (lambda c: c["annotations"][0].update(bbox=[60, 0, 30, 9]), r"box \[60, 0, 30, 9\] .* outside the image of 64"),
        (lambda c: c["annotations"][0].update(bbox=[0, 0, -3, 9]), "outside the image"),
        (lambda c: c["annotations"][0].update(bbox=[0, 0, float("nan"), 9]), "outside the image"),
        (lambda c: c["annotations"][0].update(bbox=[0, 0, 3]), r"has the box \[0, 0, 3\]"),
        (lambda c: c["annotations"][0].update(image_id=1), "is of image 1, which is not listed"),
        (lambda c: c["annotations"][0].pop("bbox"), "not in COCO's format .*lacks bbox"),
        (lambda c: c["images"][3].update(file_name="9.png"), "1 images that are not there, such as 9.png"),
        (lambda c: c["categories"][0].update(name="green"), "have other categories"),
        (lambda c: c["images"][0].pop("width"), "0.png has no height and width"),
        (lambda c: c["images"][1].update(id=600), "occurs twice"),
        (lambda c: c["annotations"].append(3), "not in COCO's format"),
        (lambda c: c["annotations"][0].update(category_id=[3]), "not in COCO's format"),
        (lambda c: c["annotations"][0].update(bbox="wide"), "has the box wide, where x, y, width, height"),
        (lambda c: c.update(categories=[]), "lists no categories"),
        (lambda c: c.update(images=[], annotations=[]), "lists no images"),
        (lambda c: c.pop("images"), "not in COCO's format"),
        (lambda c: c["images"][0].update(id="one"), "an id of images or categories is 'one'"),
        (lambda c: c["categories"][0].update(id="3"), "an id of images or categories is '3'"),
        (lambda c: c["images"][2].update(file_name=None), "a file_name is None"),
        (crowd({"counts": [9]}), "annotation 1 of 1.png has a mask that cannot be drawn .a mask is of None"),
        (crowd("a string"), "annotation 1 of 1.png has a mask that cannot be drawn"),
        (crowd([[1, 1, 5, 5]]), "cannot be drawn .a polygon has fewer than three corners"),
        (lambda c: c["annotations"][0].update(iscrowd="no"), "not in COCO's format .*'no'"),
    ],
)
def test_errors_in_annotations_are_named(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        open_boxes(changed(tmp_path, change), masks=True)


def test_boxes_alone_need_no_masks(tmp_path):
    def bare(coco):
        for annotation in coco["annotations"]:
            del annotation["segmentation"], annotation["area"], annotation["id"]
            annotation["iscrowd"] = None

    train, truth, *_ = open_boxes(changed(tmp_path, bare), masks=False)
    assert "masks" not in read_objects(False)(train.rows[1]["objects"])
    assert all(a["area"] == a["bbox"][2] * a["bbox"][3] for a in truth.coco["annotations"])


def test_image_of_another_size_is_bad(data):
    train, *_ = open_boxes(str(data), masks=True)
    Image.new("RGB", (80, 65)).save(data / "train2017" / "3.png")
    for transform in (train_objects(None, 64, 96, (1, 1), [0.5] * 3), fitting):
        view = SampleLoader(transform, 3, 0, 0, ("image", "objects"), read_objects(True))(train.rows[3], 0, 3)
        assert view.bad[1] == "it is 65x80, and 64x80 in the file of annotations"


def test_val_is_evaluated_even_if_there_is_a_test_split(data):
    objects(data / "test2017", data / "annotations" / "instances_test2017.json", 3)
    assert open_boxes(str(data), masks=True)[2].length == 6


def test_split_without_objects_cannot_be_evaluated(data):
    file = data / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "annotations": []}))
    with pytest.raises(UserError, match="no objects in its test split"):
        open_boxes(str(data), masks=True)


# One image -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, (48, 48), (64, 96), (24, 80)])
def test_image_and_objects_are_transformed_together(size):
    """The image is bright inside objects: it agrees with the masks, and boxes surround them. Mirrored, it does not."""
    agreed, mirrored, counts, shapes = [], [], set(), set()
    for seed in range(25):
        torch.manual_seed(seed)
        mask = torch.zeros(2, 50, 70, dtype=torch.uint8)
        mask[0, 10:40, 5:30], mask[1, 20:45, 40:65] = 1, 1
        image = Image.fromarray((mask.sum(0) * 200).byte().numpy())
        boxes = tv_tensors.BoundingBoxes([[5.0, 10, 30, 40], [40, 20, 65, 45]], format="XYXY", canvas_size=(50, 70))
        target = {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": tv_tensors.Mask(mask)}
        picture, found = train_objects(size, 50, 80, (0.6, 1.8), [0.0])(image, target)
        assert all(type(value) is torch.Tensor for value in found.values())
        pixels = torch.from_numpy(np.asarray(picture).copy()).float() / 200
        assert found["masks"].shape[1:] == pixels.shape
        if size:
            assert tuple(pixels.shape) == size
        else:
            assert max(pixels.shape) <= 80
        drawn = found["masks"].sum(0)
        agreed.append(float(((pixels > 0.5) != drawn.bool()).float().mean()))
        mirrored.append(float(((pixels > 0.5) != drawn.flip(-1).bool()).float().mean()))
        for box, one in zip(found["boxes"], found["masks"], strict=True):
            assert (box - around(one[None])[0]).abs().max() <= 1
            assert (box[2:] - box[:2] >= 1).all()
        counts.add(len(found["labels"]))
        shapes.add(tuple(pixels.shape))
    assert max(agreed) < 0.05
    assert np.mean(mirrored) > 0.1
    assert (len(shapes) == 1) is (size is not None)
    assert counts == {2} or size  # crops lose objects, whole images do not


@pytest.mark.parametrize("size", [None, (20, 20)])
def test_masks_are_resized_to_the_pixel_in_the_center(size):
    mask = (torch.arange(60) % 3 == 1).byte().expand(1, 60, 60)
    boxes = tv_tensors.BoundingBoxes([[0, 0, 60, 60]], format="XYXY", canvas_size=(60, 60))
    found = {"boxes": boxes, "labels": torch.ones(1, dtype=torch.long), "masks": tv_tensors.Mask(mask)}
    scale = 1.0 if size else 1 / 3
    _, scaled = train_objects(size, 60, 60, (scale, scale), [0.5] * 3)(Image.new("RGB", (60, 60)), found)
    assert scaled["masks"].shape == (1, 20, 20)
    assert scaled["masks"].all()


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_box_is_around_its_mask(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((3, 7, 9)) < 0.15
    mask[:, rng.integers(7), rng.integers(9)] = True
    for box, one in zip(around(torch.from_numpy(mask).byte()).tolist(), mask, strict=True):
        rows, columns = np.nonzero(one)
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


# The network ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_gets_a_gradient_and_boxes_are_in_pixels_of_the_image(name, masks, data):
    train, *_ = open_boxes(str(data), masks=masks)
    model = detector(name, masks=masks)
    joined(model.rcnn.backbone.pyramid)
    transform = train_objects(None, 64, 96, (0.8, 1.0), [0.5] * 3)
    load = SampleLoader(transform, 3, 0, 0, ("image", "objects"), read_objects(masks))
    batch = collate_list([load(train.rows[i], 0, i) for i in range(3)])  # the first is without objects
    losses = model(batch.images, batch.labels)
    assert ("loss_mask" in losses) is masks
    sum(losses.values()).backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert not without
    model.eval()
    found = model([torch.randint(256, (3, 100, 150), dtype=torch.uint8), torch.rand(3, 64, 40)])
    for one, (height, width) in zip(found, ((100, 150), (64, 40)), strict=True):
        assert (one["boxes"] >= 0).all()
        assert (one["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert ("small" in one) is masks
        if masks:
            assert {mask.shape for mask in paste_masks(one, (height, width))} == {(height, width)}
        assert (one["scores"].diff() <= 0).all()


def test_detections_do_not_depend_on_the_first_image():
    """torchvision would infer the scales of its maps from the first image, by its size without padding."""
    model = detector().eval()
    fresh, image = copy.deepcopy(model), torch.rand(3, 64, 64)
    with torch.no_grad():
        model([torch.rand(3, 45, 96)])
        (found,), (expected,) = model([image]), fresh([image])
    assert len(expected["boxes"])
    assert torch.equal(found["boxes"], expected["boxes"])
    assert torch.equal(found["small"], expected["small"])


@torch.no_grad()
def test_masks_pasted_one_at_a_time_equal_torchvisions(monkeypatch):
    ours, pasted = detector().eval(), []
    theirs = copy.deepcopy(ours)
    theirs.rcnn.roi_heads._forward_hooks.clear()
    for network in (ours, theirs):
        predictor = network.rcnn.roi_heads.mask_predictor
        torch.nn.init.normal_(predictor.mask_fcn_logits.weight, generator=torch.Generator().manual_seed(0))
    image = torch.rand(3, 100, 150)
    (found,), (whole,) = ours([image]), theirs([image])
    paste = detection.paste_masks_in_image
    monkeypatch.setattr(detection, "paste_masks_in_image", lambda m, *args: pasted.append(len(m)) or paste(m, *args))
    results = coco_results(found, 1, [3, 7], (100, 150))
    assert pasted == [1] * len(results) != []
    masks = whole["masks"][:, 0] > 0.5
    assert 0.05 < masks.float().mean() < 0.95
    for result, mask in zip(results, masks, strict=True):
        packed = coco_masks.encode(np.asfortranarray(mask.byte().numpy()))
        assert result["segmentation"] == {"size": [100, 150], "counts": packed["counts"].decode()}


def test_image_without_objects_gives_background_losses():
    model = detector()
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 64, 64)}
    losses = model([torch.rand(3, 64, 64)], [{**empty, "masks": empty["masks"].byte()}])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["loss_classifier"] > 0.1
    assert losses["loss_box_reg"] == losses["loss_mask"] == losses["loss_rpn_box_reg"] == 0


def test_boxes_are_float32_in_low_precision():
    model = detector().eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        (found,) = model([torch.rand(3, 64, 64)])
    assert all(found[name].dtype == torch.float32 for name in ("boxes", "scores", "small"))


@pytest.mark.parametrize(("name", "patch", "right"), [("vit_tiny_patch16_224", 14, 16), ("hivit_nano", 1, 4)])
def test_other_patch_sizes_are_refused(name, patch, right):
    backbone = timm.create_model(name, **BACKBONES[name], patch_size=patch)
    with pytest.raises(UserError, match=f"only with patches of {right} px.*Pass --model-args.patch_size {right}"):
        Detector(backbone, 2, neck="pyramid")


@pytest.mark.parametrize("name", ["hivit_nano", "hpvit", "svit_nano"])
def test_every_parameter_has_one_learning_rate(name):
    model = detector(name)
    groups = groups_with_head(model, "rcnn.backbone.pyramid.backbone", 0.05, 0.5, 10.0)
    assert sorted(n for g in groups for n in g["param_names"]) == sorted(n for n, _ in model.named_parameters())
    rates = {name: group["lr_scale"] for group in groups for name in group["param_names"]}
    assert rates["rcnn.rpn.head.cls_logits.weight"] == rates["rcnn.backbone.fpn.inner_blocks.0.0.weight"] == 1
    inside = [r for n, r in rates.items() if ".pyramid.backbone." in n and ".pools." not in n]
    assert max(inside) == 0.5
    assert all(rates[n] == 10 for n in rates if ".pools." in n)


def test_learning_rate_drops_after_the_given_steps():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = multistep(optimizer, 20, 4, [10, 15])
    rates = []
    for step in range(20):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0, 0.5, 1, 1.5, *[2] * 6, *[0.2] * 5, *[0.02] * 5])
    for wrong in ([3, 10], [10, 10], [15, 10], [10, 20]):
        with pytest.raises(UserError, match="increasing --drop-epochs"):
            multistep(optimizer, 20, 4, wrong)


# Evaluation ----------------------------------------------------------------------------------------------------------


def noisy(coco, seed=0):
    """Return detections near the objects, some of them of the wrong class."""
    rng = np.random.default_rng(seed)
    found = {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        x, y, w, h = annotation["bbox"]
        for _ in range(2):
            dx, dy = rng.normal(0, 4, 2)
            box = np.clip([x + dx, y + dy, x + w + dx, y + h + dy], 0, [80, 64, 80, 64])
            label = 1 + (annotation["category_id"] == 7) if rng.random() < 0.8 else rng.integers(1, 3)
            found[annotation["image_id"]].append((box, int(label), rng.random()))
    results = []
    for image, ones in found.items():
        own = {
            "boxes": torch.tensor(np.array([box for box, _, _ in ones])).reshape(-1, 4),
            "labels": torch.tensor([label for _, label, _ in ones], dtype=torch.int64),
            "scores": torch.tensor([score for _, _, score in ones]),
            "small": torch.full((len(ones), 1, 28, 28), 0.9),
        }
        results += coco_results(own, image, [3, 7], (64, 80))
    return results


@pytest.mark.parametrize("kind", ["box", "mask"])
def test_average_precision_equals_pycocotools(kind, data, capsys):
    _, _, _, truth = open_boxes(str(data), masks=True)
    results = noisy(truth.coco)
    ids = truth.ids[1:]
    ours, by_category = coco_metrics(truth, results, ids, kind)
    known = COCO(str(data / "annotations" / "instances_val2017.json"))
    left = "bbox" if kind == "mask" else "segmentation"
    evaluation = COCOeval(
        known,
        known.loadRes([{k: v for k, v in r.items() if k != left} for r in results]),
        {"box": "bbox"}.get(kind, "segm"),
    )
    evaluation.params.imgIds = ids
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert [ours[f"{kind}_{name}"] for name in ("ap", "ap50", "ap75", "ap_medium")] == pytest.approx(
        list(100 * evaluation.stats[[0, 1, 2, 4]])
    )
    assert 5 < ours[f"{kind}_ap"] < 90
    assert np.mean(by_category) == pytest.approx(ours[f"{kind}_ap"])
    assert np.isnan(ours[f"{kind}_ap_large"])  # there is none


def test_the_objects_themselves_score_100_and_no_detections_score_0(data):
    file = data / "annotations" / "instances_val2017.json"
    coco = json.loads(file.read_text())
    for annotation in coco["annotations"]:  # as some exports write them; an evaluation would ignore such objects
        annotation["id"] = 0
    file.write_text(json.dumps(coco))
    _, _, _, truth = open_boxes(str(data), masks=True)
    assert isinstance(truth, CocoGroundTruth)
    perfect = [
        {"score": 1.0, **{k: a[k] for k in ("image_id", "category_id", "bbox")}} for a in truth.coco["annotations"]
    ]
    assert coco_metrics(truth, perfect, truth.ids, "box")[0]["box_ap"] == pytest.approx(100)
    assert coco_metrics(truth, [], truth.ids, "box")[0]["box_ap"] == 0


# The recipe ----------------------------------------------------------------------------------------------------------

SMALL = ["--config", "detect_small", "--model", "hivit_nano", "--img-size", "64", "--fpn-dim", "32", "--workers", "0"]
SMALL += ["--batch-size", "4", "--short-side", "64", "--long-side", "80", "--lr", "1e-3", "--layer-decay", "1"]
SMALL += ["--roi-samples", "32", "--scales", "[0.9,1.2]"]


def metrics(run):
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        detect.main(list(argv))
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.e2e
def test_it_learns_resumes_is_evaluated_and_predicts(data, tmp_path, capsys, monkeypatch):
    argv = [*SMALL, "--data", str(data), "--epochs", "30", "--warmup-epochs", "1", "--save-every", "15"]
    argv += ["--eval-every", "15", "--out"]
    detect.main([*argv, str(tmp_path / "a")])
    printed = capsys.readouterr().out
    scores = [line for line in metrics(tmp_path / "a") if "box_ap" in line]
    assert [line["step"] for line in scores] == [60, 120]
    assert scores[-1]["box_ap"] > 20
    assert scores[-1]["mask_ap"] > 20
    assert f"last/ ({scores[-1]['box_ap']:.2f} %)" in printed
    for name in ("predictions.png", "classes.csv", "curves.png", "best/detector.json", "last/model.safetensors"):
        assert (tmp_path / "a" / name).is_file()

    (tmp_path / "b" / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl"):  # as if it was killed after the first checkpoint
        (tmp_path / "b" / name).write_text((tmp_path / "a" / name).read_text())
    (tmp_path / "a" / "checkpoints" / "step-00000060").rename(tmp_path / "b" / "checkpoints" / "step-00000060")
    detect.main([*argv, str(tmp_path / "b"), "--resume", "auto"])
    ours, theirs = (read_dense(tmp_path / run / "last", "detector", Detector)[0].state_dict() for run in "ab")
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-5) for key in ours)
    capsys.readouterr()

    evaluate = ["--data", str(data), "--workers", "0", "--precision", "fp32", "--model", str(tmp_path / "a" / "last")]
    detect.main([*evaluate, "--eval-only"])
    assert f"box AP {scores[-1]['box_ap']:.2f} %" in capsys.readouterr().out

    predict = ["predict", "--model", tmp_path / "a", "--images", data / "val2017", "--out", tmp_path / "found.json"]
    assert command(capsys, monkeypatch, *predict)[:2] == (0, f"wrote {tmp_path}/found.json: 6 images\n")
    found = json.loads((tmp_path / "found.json").read_text())
    assert [Path(image["file_name"]).name for image in found["images"]] == [f"{i}.png" for i in range(6)]
    assert {annotation["category_id"] for annotation in found["annotations"]} <= {3, 7}
    assert COCO(str(tmp_path / "found.json")).annToMask(found["annotations"][0]).shape == (64, 80)

    assert "Omit --init, --from-scratch" in refused(capsys, *evaluate, "--from-scratch")
    assert "was trained with --masks true" in refused(capsys, *evaluate, "--masks", "false")
    for file in (data / "annotations").iterdir():
        file.write_text(file.read_text().replace('"red"', '"green"'))
    assert "has 2 classes (red, blue, ...)" in refused(capsys, *evaluate)
    (tmp_path / "a" / "last" / "detector.json").write_text("{")
    assert "detector.json is not JSON" in refused(capsys, *evaluate)


def test_wrong_option_is_one_sentence(data, tmp_path, capsys):
    argv = [*SMALL, "--data", str(data), "--dry-run"]
    assert "--schedule x is unknown" in refused(capsys, *argv, "--schedule", "x")
    assert "is not a range" in refused(capsys, *argv, "--scales", "[2,1]")
    assert "is above --long-side 80" in refused(capsys, *argv, "--short-side", "90")
    assert "increasing --drop-epochs" in refused(capsys, *argv, "--schedule", "steps", "--drop-epochs", "[2,1]")
    assert "which follows from another option" in refused(capsys, *argv, "--model-args.in_chans", "3")
    assert "is no run of recipes/detect.py" in refused(capsys, *argv, "--eval-only")
    assert "is no folder" in refused(capsys, *SMALL, "--data", str(tmp_path / "nowhere"))
    assert "lay it out as COCO is" in refused(capsys, *SMALL, "--data", str(tmp_path))
    (data / "train2017" / "2.png").write_bytes(b"no image")
    assert "2.png cannot be used (not an image of a known kind)" in refused(capsys, *argv)


def test_sizes_are_the_options_then_the_runs_own_then_the_published(data, tmp_path, monkeypatch):
    normalize = Normalize([0.5] * 3, [0.5] * 3)
    write_dense(detector(), tmp_path / "own", "detector", ["red", "blue"], [3, 7], normalize)
    seen = []
    monkeypatch.setattr(detect.Evaluator, "evaluate_only", lambda _, network, draw: seen.append(network))
    monkeypatch.setattr(detect.Detection, "dry_run", lambda _, network, *__: seen.append(network))
    argv = ["--data", str(data), "--workers", "0", "--model"]
    own = [*argv, str(tmp_path / "own"), "--eval-only"]
    fresh = [*argv, "hivit_nano", "--fpn-dim", "32", "--batch-size", "4", "--dry-run"]
    lower = "--short-side", "64"
    for words in (own, [*own, "--short-side", "80"], [*own, "--long-side", "120"], fresh, [*fresh, *lower]):
        detect.main(words)
    assert [net._model_args["short"] for net in seen] == [64, 80, 64, 800, 64]
    assert [net._model_args["long"] for net in seen] == [96, 96, 120, 1333, 1333]
    for net in seen:
        large = torch.zeros(3, 200, 900)
        (side,) = net.eval().rcnn.transform([large])[0].image_sizes
        factor = min(net._model_args["short"] / 200, net._model_args["long"] / 900)
        assert side == (round(200 * factor), round(900 * factor))


def test_evaluated_images_are_resized_with_antialiasing_like_training_images():
    image, transform = torch.rand(3, 128, 160), detector(mean=[0.4] * 3, std=[0.3] * 3).eval().rcnn.transform
    (found,) = transform([image])[0].tensors
    by_v2 = v2.Resize([64, 80], antialias=True)(image)
    torch.testing.assert_close(found[:, :64, :80], (by_v2 - 0.4) / 0.3)
    assert (by_v2 - v2.Resize([64, 80], antialias=False)(image)).abs().mean() > 0.05


def test_existing_file_is_not_overwritten_by_predictions(data, tmp_path, capsys, monkeypatch):
    normalize = Normalize([0.5] * 3, [0.5] * 3)
    write_dense(detector(), tmp_path / "own", "detector", ["red", "blue"], [3, 7], normalize)
    argv = ["predict", "--model", tmp_path / "own", "--images", data / "val2017", "--out", tmp_path / "found.json"]
    assert command(capsys, monkeypatch, *argv)[0] == 0
    before = (tmp_path / "found.json").read_bytes()
    code, _, error = command(capsys, monkeypatch, *argv)
    assert code
    assert "found.json exists already. Choose a new file" in error
    assert (tmp_path / "found.json").read_bytes() == before


@pytest.mark.e2e
def test_bad_step_is_replayed(data, tmp_path, capsys, monkeypatch):
    """Its images have several sizes, and their objects are lists."""
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        poison(patched, step=2)
        detect.main([*SMALL, "--data", str(data), "--epochs", "1", "--warmup-epochs", "0.5", "--out", str(out)])
    assert "step 2 is bad (its loss is not finite). Continuing without it" in capsys.readouterr().out
    code, said, _ = command(capsys, monkeypatch, "replay", out / "replay" / "step-00000002")
    assert code == 0
    assert "of 4 images:" in said
    assert ".png: nan to nan" in said
    assert "first output that is not finite: the images themselves" in said


@pytest.mark.distributed
def test_two_processes_evaluate_as_one_does(data, tmp_path, capsys):
    argv = [*SMALL, "--data", str(data), "--epochs", "2", "--warmup-epochs", "0.5", "--masks", "false"]
    detect.main([*argv, "--out", str(tmp_path / "1")])
    launched(2, "detect", *argv, "--out", tmp_path / "2")
    lines = [metrics(tmp_path / n) for n in "12"]
    found = [[line["loss"] for line in own if "loss" in line] for own in lines]
    assert found[0] == pytest.approx(found[1], rel=0.2)  # each process draws its own regions
    assert all(any("box_ap" in line for line in own) for own in lines)
    words = [*argv, "--model", str(tmp_path / "1"), "--eval-only"]
    capsys.readouterr()
    detect.main(words)
    said = capsys.readouterr().out, launched(2, "detect", *words)
    one, two = (re.search("box AP .*", text).group() for text in said)
    assert one == two


@pytest.mark.e2e
@pytest.mark.parametrize("name", [n for n in presets("detect") if n != "detect_small"])
def test_published_presets_run(name, tmp_path, capsys, monkeypatch):
    """They run on two generated images in COCO's layout, from scratch, because weights are on the hub or in a run."""
    root = coco_set(tmp_path / "coco", 2, 2)
    net = {"hpvit_b": "hpvit_b", "hivit_b": "hivit_b", "svit_s": "svit_s", "vit_b": "vit_base_patch16_224"}
    model = next(net[key] for key in net if name.startswith(f"detect_{key}"))
    monkeypatch.chdir(tmp_path)
    argv = ["--config", name, "--data", str(root), "--model", model, "--from-scratch", "--dry-run", "--workers", "0"]
    argv += ["--img-size", "96"] if "100ep" in name else []
    if "window" in presets("detect")[name].read_text():  # 14 would not cut a grid of 6 x 8
        argv += ["--window", "4"]
    detect.main([*argv, "--short-side", "96", "--long-side", "128", "--fpn-dim", "64"])
    printed = capsys.readouterr().out
    assert "losses of 2 images" in printed
    assert "on 2 test images" in printed
    assert not (tmp_path / "runs").exists()
