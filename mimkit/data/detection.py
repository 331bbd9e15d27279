"""Data sets for detection and instance segmentation, in COCO's format, and their transforms."""

import json
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from mimkit.data.find import count_images, unused
from mimkit.data.parts import TEST, TRAIN, VAL, choose_parts, describe, no_columns, wanted_parts
from mimkit.data.sources import Source
from mimkit.data.transforms import Size, Transform, checked_size
from mimkit.data.walk import find_files, is_utf8
from mimkit.errors import UserError, some, tell

MARGIN = 1.0  # pixels that a box may exceed its image by: annotation tools round
Objects = dict[str, Tensor]  # of an image: boxes (n 4) as x1 y1 x2 y2, labels (n) from 1, and perhaps masks (n H W)


@dataclass(frozen=True)
class CocoGroundTruth:
    """The annotations of a split, which predictions are evaluated against.

    Args:
        coco: images, annotations and categories, as in COCO's files.
        ids: ids of the images, in the order of the source's rows.
    """

    coco: dict[str, Any]
    ids: list[Any]

    @property
    def names(self) -> list[str]:
        """Names of the categories."""
        return [str(category["name"]) for category in self.coco["categories"]]

    @property
    def numbers(self) -> list[int]:
        """Ids of the categories, as used in files of annotations and results."""
        return [category["id"] for category in self.coco["categories"]]


def open_boxes(
    data: str,
    masks: bool,
    parts: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> tuple[Source, CocoGroundTruth, Source, CocoGroundTruth]:
    """Open the part of a data set in COCO's layout to train on, and the one to evaluate on, with their annotations.

    `choose_parts` says which they are. If there is none to evaluate on, every fifth image is held out. All annotations
    are checked. `about` of the first source describes which parts were taken and which were left out.

    Args:
        data: a folder with annotations/instances_{train,val}*.json, whose images lie in the folder of the same name, in
            its images/, in images/NAME/ or in images/; or a folder with train/ and valid/ that hold an
            _annotations.coco.json each.
        masks: whether every object must have a mask.
        parts: names of the parts to use, separated by commas.
        image_column, label_column: refused, since the data set is not a table.

    Raises:
        UserError: there is no such data set, an image is missing, an annotation is invalid, or faster-coco-eval is not
            installed.
    """
    if not find_spec("faster_coco_eval"):
        raise UserError("Detection needs faster-coco-eval, for masks and for evaluation: pip install 'mimkit[dense]'.")
    root = Path(data).expanduser()
    if not root.is_dir():
        raise UserError(f"--data {data} is no folder: pass one in COCO's layout (docs/data.md).")
    no_columns(data, image_column, label_column)
    found, older = _find(root)
    wanted = wanted_parts(data, found, parts)
    read = cache(lambda name: _read(*found[name], masks))
    training, judge = choose_parts(found, wanted, lambda name: _has_objects(read(name)[0]))
    if not training:
        raise UserError(
            f"--data {data} has neither annotations/instances_train*.json nor train/_annotations.coco.json: lay it out "
            "as COCO is (docs/data.md)."
        )
    if len(training) > 1:
        raise UserError(
            f"--parts {parts}: detection trains on one part, and these are {', '.join(training)}. Name one."
        )
    splits = [read(name) for name in (*training, *([judge] if judge else []))]
    if judge is None:
        coco, files = splits[0]
        held_out = [i % 5 == 0 for i in range(len(files))]
        splits = [_subset(coco, files, [h is test for h in held_out]) for test in (False, True)]
    categories = [split[0]["categories"] for split in splits]
    if [(c["id"], c["name"]) for c in categories[0]] != [(c["id"], c["name"]) for c in categories[1]]:
        raise UserError(f"--data {data}: its training and its test split have other categories: give both the same.")
    if not _has_objects(splits[1][0]):
        raise UserError(f"--data {data} has no objects in its test split, so nothing can be evaluated: add some.")
    (train, truth), test = (_source(str(root), *split) for split in splits)
    left_out = {name: folders for name, (_, folders) in found.items() if name not in (*training, judge)} | older
    rest: dict[str, Any] = {name: _count(folders) for name, folders in left_out.items()}
    places = [folder for _, folders in found.values() for folder in folders]
    rest |= unused(root, places) | (unused(root / "images", places) if (root / "images").is_dir() else {})
    evaluated = {judge or f"every fifth of {training[0]}": test[0].length}
    trained = {training[0]: train.length}
    about = describe(("Training images", trained), ("Validation images", evaluated), ("Left out", rest))
    return replace(train, about=about), truth, *test


Found = tuple[Path, list[Path]]  # a file of annotations, and the folders that its images may lie in


def _find(root: Path) -> tuple[dict[str, Found], dict[str, list[Path]]]:
    """Find the parts by name, such as train and val: of several years the latest. Also return the others' folders."""
    found = {file.parent.name: (file, [file.parent]) for file in sorted(root.glob("*/_annotations.coco.json"))}
    older: dict[str, list[Path]] = {}
    years: dict[str, Found] = {}
    for file in sorted((root / "annotations").glob("instances_*.json")):
        name = file.stem.removeprefix("instances_")  # such as train2017
        part = next((part for part in (*TRAIN, *VAL, *TEST) if name.lower().startswith(part)), name)
        if part in years:
            before, folders = years[part]
            older[before.stem.removeprefix("instances_")] = folders
        years[part] = file, [root / name, root / name / "images", root / "images" / name, root / "images", root]
    return years | found, older


def _count(folders: list[Path]) -> int | str:
    """Return the number of images in the first of these folders that exists."""
    return next((count_images(folder) for folder in folders[:3] if folder.is_dir()), "unknown")


def _has_objects(coco: dict[str, Any]) -> bool:
    """Return whether an image has an object besides crowds."""
    return not all(annotation["iscrowd"] for annotation in coco["annotations"])


def _read(file: Path, folders: list[Path], masks: bool) -> tuple[dict[str, Any], list[Path]]:
    """Read a file of annotations, check and complete it, and find the file of each image."""
    try:
        coco = json.loads(file.read_text())
        images, annotations, categories = (list(coco[key]) for key in ("images", "annotations", "categories"))
        names = {image["id"]: image["file_name"] for image in images}
        classes = {category["id"]: category["name"] for category in categories}
        for annotation in annotations:
            if lacking := {"image_id", "category_id", "bbox"} - annotation.keys():
                raise ValueError(f"an annotation lacks {', '.join(sorted(lacking))}")
            hash((annotation["image_id"], annotation["category_id"]))
            annotation["iscrowd"] = int(bool(int(annotation.get("iscrowd") or 0)))
        if wrong := [i for i in (*names, *classes) if not isinstance(i, int)]:
            raise ValueError(f"an id of images or categories is {wrong[0]!r}, which is not an integer")
        if wrong := [name for name in names.values() if not isinstance(name, str)]:
            raise ValueError(f"a file_name is {wrong[0]!r}")
        if len(names) < len(images) or len(classes) < len(categories):
            raise ValueError("an id of images or categories occurs twice")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not in COCO's format ({type(error).__name__}: {error}): fix it.") from error
    if not images:
        raise UserError(f"{file} lists no images: pass another data set.")
    if not categories:
        raise UserError(f"{file} lists no categories: add them.")
    sizes = {image["id"]: (image.get("height"), image.get("width")) for image in images}
    for image, size in sizes.items():
        if not all(isinstance(side, int) and side > 0 for side in size):
            raise UserError(f"{file}: {names[image]} has no height and width in whole pixels: add them.")
    for i, annotation in enumerate(annotations):
        where = f"{file}: annotation {annotation.get('id', i + 1)}"
        annotation["id"] = i + 1  # evaluation needs unique ids, and takes 0 for none
        if annotation["image_id"] not in names:
            raise UserError(f"{where} is of image {annotation['image_id']}, which is not listed: remove or fix it.")
        where += f" of {names[annotation['image_id']]}"
        if annotation["category_id"] not in classes:
            raise UserError(
                f"{where} has category {annotation['category_id']}, none of the {len(classes)} listed: fix it."
            )
        annotation["bbox"] = _checked(annotation["bbox"], sizes[annotation["image_id"]], where)
        if masks and not annotation.get("segmentation"):
            raise UserError(f"{where} has no mask (segmentation): add it, or pass --masks false for boxes alone.")
        if masks and annotation["iscrowd"]:  # training does not read crowds, so their masks are checked here
            try:
                draw_mask(annotation["segmentation"], *sizes[annotation["image_id"]])
            except Exception as error:  # faster-coco-eval raises many kinds
                raise UserError(f"{where} has a mask that cannot be drawn ({error}): fix it.") from error
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    files = _locate(list(names.values()), folders)
    if missing := [name for name, found in zip(names.values(), files, strict=True) if not found and is_utf8(name)]:
        raise UserError(
            f"{file} lists {len(missing)} images that are not there, such as {missing[0]}: put them into {folders[-1]}."
        )
    coco = {"images": images, "annotations": annotations, "categories": sorted(categories, key=lambda c: c["id"])}
    readable = [is_utf8(name) for name in names.values()]
    if not all(readable):
        unreadable = [name for name in names.values() if not is_utf8(name)]
        tell(f"{file}: left out {some(unreadable, 1)}: its name is not UTF-8. Rename it.")
        coco, files = _subset(coco, files, readable)
    return coco, [found for found in files if found]


def _locate(names: list[str], folders: list[Path]) -> list[Any]:
    """Return the path of each image in the first folder that has it, or None. The last folder holds the others."""
    root = f"{os.path.normpath(folders[-1])}/"
    known = {os.path.normpath(file) for file in find_files(str(folders[-1]))}

    def exists(path: str) -> bool:
        return path in known or (not path.startswith(root) and os.path.isfile(path))  # names may lead to other places

    paths = ((os.path.normpath(folder / name) for folder in folders) for name in names)
    return [next((Path(path) for path in candidates if exists(path)), None) for candidates in paths]


def _checked(box: Any, size: tuple[int, int], where: str) -> list[float]:
    """Return a box (x y width height) as floats, if it lies inside its image of `size` (height, width)."""
    try:
        x, y, w, h = map(float, box)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} has the box {box}, where x, y, width, height are needed: fix it.") from error
    inside = min(x, y) >= -MARGIN and x + w <= size[1] + MARGIN and y + h <= size[0] + MARGIN
    if not inside or min(w, h) < 0:  # comparisons with NaN are false
        raise UserError(
            f"{where} has the box {box} (x, y, width, height), outside the image of {size[0]}x{size[1]}: fix it."
        )
    return [x, y, w, h]


def _subset(coco: dict[str, Any], files: list[Any], chosen: list[bool]) -> tuple[dict[str, Any], list[Any]]:
    """Return the annotations and files of the chosen images."""
    images = [image for image, yes in zip(coco["images"], chosen, strict=True) if yes]
    if not images:
        raise UserError("There are too few images to hold some back for validation: give the data set a val split.")
    ids = {image["id"] for image in images}
    annotations = [annotation for annotation in coco["annotations"] if annotation["image_id"] in ids]
    chosen_files = [file for file, yes in zip(files, chosen, strict=True) if yes]
    return {**coco, "images": images, "annotations": annotations}, chosen_files


def _source(name: str, coco: dict[str, Any], files: list[Path]) -> tuple[Source, CocoGroundTruth]:
    """Make a source with a row for each image: its file, and its objects as JSON.

    Workers share the memory of text in a table, while each would copy lists of objects.
    """
    import datasets

    labels = {category["id"]: 1 + i for i, category in enumerate(coco["categories"])}
    objects: dict[Any, list[Any]] = defaultdict(list)
    for annotation in coco["annotations"]:
        if not annotation["iscrowd"]:
            entry = labels[annotation["category_id"]], annotation["bbox"], annotation.get("segmentation")
            objects[annotation["image_id"]].append(entry)
    rows = {
        "image": [str(file) for file in files],
        "objects": [json.dumps([image["height"], image["width"], objects[image["id"]]]) for image in coco["images"]],
    }
    features = datasets.Features({"image": datasets.Image(decode=False), "objects": datasets.Value("large_string")})
    table = datasets.Dataset.from_dict(rows, features=features)
    truth = CocoGroundTruth(coco, [image["id"] for image in coco["images"]])
    return Source(name, table, "image", "objects", len(table)), truth


def read_objects(masks: bool) -> Callable[[str], dict[str, Any]]:
    """Return a function from a cell of objects to `Objects`, as `tv_tensors`.

    torchvision's transforms change such tensors together with the image.

    Args:
        masks: whether to draw the masks.
    """
    return partial(_objects, masks=masks)


def _objects(cell: str, masks: bool) -> dict[str, Any]:
    """Read a cell of objects: boxes x1 y1 x2 y2, clamped to the image, labels, and masks."""
    height, width, objects = json.loads(cell)
    objects = [(label, box, mask) for label, box, mask in objects if min(box[2:]) > 0]  # COCO has some without area
    boxes = torch.tensor([box for _, box, _ in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    size = (height, width)
    target: dict[str, Any] = {
        "boxes": v2.functional.clamp_bounding_boxes(tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)),
        "labels": torch.tensor([label for label, _, _ in objects], dtype=torch.int64),
    }
    if masks:
        drawn = [draw_mask(mask, height, width) for _, _, mask in objects]
        empty = np.zeros((0, height, width), np.uint8)
        target["masks"] = tv_tensors.Mask(torch.from_numpy(np.stack(drawn) if drawn else empty))
    return target


def draw_mask(segmentation: Any, height: int, width: int) -> np.ndarray[Any, Any]:
    """Draw a mask (H W), uint8, from polygons or a run-length encoding, compressed or not.

    Raises:
        ValueError: it is neither of them, or it has another size.
    """
    from faster_coco_eval import mask

    if isinstance(segmentation, list):
        numbers = (x for p in segmentation for x in (p if isinstance(p, list) else [None]))
        if not all(isinstance(x, int | float) for x in numbers):
            raise ValueError("a polygon is no list of numbers x, y, x, y, ...")
        if not all(len(polygon) >= 6 for polygon in segmentation):
            raise ValueError("a polygon has fewer than three corners")
        return mask.decode(mask.merge(mask.frPyObjects(segmentation, height, width)))
    size, counts = (segmentation.get(key) for key in ("size", "counts"))
    if size != [height, width]:
        raise ValueError(f"a mask is of {size}, and its image of {[height, width]}")
    if isinstance(counts, str):
        return mask.decode(segmentation)
    are_counts = isinstance(counts, list) and all(isinstance(n, int) and n >= 0 for n in counts)
    if not (are_counts and sum(counts) == height * width):
        raise ValueError(f"the run lengths of a mask are not whole numbers that add up to {height * width}")
    return mask.decode(mask.frPyObjects(segmentation, height, width))


def fitting(image: Any, objects: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return an image and its objects unchanged, if they can be used.

    Raises:
        ValueError: the file of annotations declares another size, or one side is far longer than the other.
    """
    height, width = checked_size(image)
    if (height, width) != objects["boxes"].canvas_size:
        declared = "x".join(map(str, objects["boxes"].canvas_size))
        raise ValueError(f"it is {height}x{width}, and {declared} in the file of annotations")
    return image, objects


def train_objects(
    size: Size | None, short: int, long: int, scales: tuple[float, float], mean: list[float]
) -> Transform:
    """Return the augmentation of training: random scale and horizontal flip of an image and its objects.

    Objects of which nothing is left are dropped.

    Args:
        size: (H, W) of a random crop, or None for images without cropping. The image is resized to fit into `size`
            times a random scale, then cropped or padded to `size` (large-scale jitter: Ghiasi et al., "Simple
            copy-paste", CVPR 2021).
        short, long: without a crop, length in pixels of the short side at scale 1, and maximum of the long side.
        scales: range of the random scale.
        mean: color of the padding, in 0-1; tensors are padded with 0.
    """
    fill = [round(255 * value) for value in mean]
    flip = v2.RandomHorizontalFlip()

    def transform(image: Any, objects: dict[str, Any]) -> tuple[Any, Objects]:
        height, width = v2.functional.get_size(fitting(image, objects)[0])
        factor = float(torch.empty(()).uniform_(*scales))
        if size:
            factor *= min(size[0] / height, size[1] / width)
        else:
            factor = min(factor * short / min(height, width), long / max(height, width))
        scaled = [max(1, round(side * factor)) for side in (height, width)]
        masks = objects.pop("masks", None)
        image, objects = v2.Resize(scaled, antialias=True)(image, objects)
        if masks is not None:  # v2.Resize would use NEAREST for masks, which is half a pixel off
            exact = v2.functional.resize(masks.as_subclass(Tensor), scaled, InterpolationMode.NEAREST_EXACT)
            objects["masks"] = tv_tensors.Mask(exact)
        if size:
            padding = [0, 0, max(0, size[1] - scaled[1]), max(0, size[0] - scaled[0])]
            color: Any = {Image.Image: fill, tv_tensors.Mask: 0, "others": 0}
            image, objects = v2.RandomCrop(size)(*v2.Pad(padding, fill=color)(image, objects))
        image, objects = flip(image, objects)
        return image, _drop_invisible(objects, cropped=size is not None)

    return transform


def _drop_invisible(objects: dict[str, Any], cropped: bool) -> Objects:
    """Drop objects without a visible part. After a crop, draw boxes anew around what is left of the masks."""
    tensors: Objects = {name: value.as_subclass(Tensor) for name, value in objects.items()}
    visible = (tensors["boxes"][:, 2:] - tensors["boxes"][:, :2]).amin(1) >= 1
    if "masks" in tensors:
        visible &= tensors["masks"].bool().any(2).any(1)
    tensors = {name: value[visible] for name, value in tensors.items()}
    if "masks" in tensors and cropped:
        tensors["boxes"] = around(tensors["masks"])
    return tensors


def around(masks: Tensor) -> Tensor:
    """Return the boxes (n 4), as x1 y1 x2 y2, around the nonzero pixels of non-empty masks (n H W)."""
    columns, rows = (masks.bool().any(dim).int() for dim in (1, 2))
    (left, right), (top, bottom) = ((x.argmax(1), x.shape[1] - x.flip(1).argmax(1)) for x in (columns, rows))
    return torch.stack([left, top, right, bottom], dim=1).float()
