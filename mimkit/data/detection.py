"""What `--data` names -> images and the boxes and masks of the objects in them, in COCO's format."""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from mimkit.data.sources import TRAIN, VAL, Source
from mimkit.data.transforms import Size, Transform, checked_size
from mimkit.errors import UserError

MARGIN = 1.0  # px that a box may stick out of its image: annotators round
Objects = dict[str, Tensor]  # of an image: boxes (n 4) as x y x y, labels (n) from 1, masks (n H W) where there are any


@dataclass(frozen=True)
class CocoGroundTruth:
    """A part of a set, as the judge needs it.

    Args:
        coco: images, annotations and categories, as in COCO's files.
        ids: of the images, in the order of the source's rows.
    """

    coco: dict[str, Any]
    ids: list[Any]

    @property
    def names(self) -> list[str]:
        """Of the categories."""
        return [str(category["name"]) for category in self.coco["categories"]]

    @property
    def numbers(self) -> list[int]:
        """Of the categories: what stands for each in files."""
        return [category["id"] for category in self.coco["categories"]]


def open_boxes(data: str, masks: bool) -> tuple[Source, CocoGroundTruth, Source, CocoGroundTruth]:
    """The training and the test part of a set of objects, and what is true of each; every fifth image is judged where
    there is one part only.

    Args:
        data: folder with annotations/instances_{train,val}*.json, whose images lie in the folder of that name, in its
            images/, in images/NAME/ or in images/; or with train/ and valid/ that hold an _annotations.coco.json.
        masks: objects must have them.
    """
    if not find_spec("faster_coco_eval"):
        raise UserError("Detection needs faster-coco-eval, for masks and for judging: pip install 'mimkit[dense]'.")
    root = Path(data).expanduser()
    if not root.is_dir():
        raise UserError(f"--data {data} is no folder: pass one in COCO's layout (docs/data.md).")
    found = [next(filter(None, (_find(root, name) for name in names)), None) for names in (TRAIN, VAL)]
    if not found[0]:
        raise UserError(
            f"--data {data} has neither annotations/instances_train*.json nor train/_annotations.coco.json: lay it out "
            "as COCO is (docs/data.md)."
        )
    parts = [_read(file, folders, masks) for file, folders in filter(None, found)]
    if len(parts) == 1:
        coco, places = parts[0]
        held = [i % 5 == 0 for i in range(len(places))]
        parts = [_subset(coco, places, [h is part for h in held]) for part in (False, True)]
    categories = [part[0]["categories"] for part in parts]
    if [(c["id"], c["name"]) for c in categories[0]] != [(c["id"], c["name"]) for c in categories[1]]:
        raise UserError(f"--data {data}: its training and its test part have other categories: give both the same.")
    if all(annotation["iscrowd"] for annotation in parts[1][0]["annotations"]):
        raise UserError(f"--data {data} has no objects in its test part, so nothing to judge by: give it some.")
    train, test = (_source(str(root), *part) for part in parts)
    return *train, *test


def _find(root: Path, part: str) -> tuple[Path, list[Path]] | None:
    """The file of a part's annotations, and the folders that its images may lie in."""
    if (own := root / part / "_annotations.coco.json").is_file():
        return own, [own.parent]
    files = sorted((root / "annotations").glob(f"instances_{part}*.json"))
    if not files:
        return None
    name = files[-1].stem.removeprefix("instances_")  # the newest year's
    return files[-1], [root / name, root / name / "images", root / "images" / name, root / "images", root]


def _read(file: Path, folders: list[Path], masks: bool) -> tuple[dict[str, Any], list[Path]]:
    """A file of annotations, checked and completed, and where each of its images is."""
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
        if odd := [i for i in (*names, *classes) if not isinstance(i, int)]:
            raise ValueError(f"an id of images or categories is {odd[0]!r}, which is no whole number")
        if odd := [name for name in names.values() if not isinstance(name, str)]:
            raise ValueError(f"a file_name is {odd[0]!r}")
        if len(names) < len(images) or len(classes) < len(categories):
            raise ValueError("an id of images or categories occurs twice")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not in COCO's format ({type(error).__name__}: {error}): mend it.") from error
    if not images:
        raise UserError(f"{file} lists no images: pass another set.")
    if not categories:
        raise UserError(f"{file} lists no categories: add them.")
    sizes = {image["id"]: (image.get("height"), image.get("width")) for image in images}
    for image, size in sizes.items():
        if not all(isinstance(side, int) and side > 0 for side in size):
            raise UserError(f"{file}: {names[image]} has no height and width of a whole number of px: add them.")
    for i, annotation in enumerate(annotations):
        where = f"{file}: annotation {annotation.get('id', i + 1)}"
        annotation["id"] = i + 1  # the judge takes 0 for none, and needs each once
        if annotation["image_id"] not in names:
            raise UserError(f"{where} is of image {annotation['image_id']}, which is not listed: remove or mend it.")
        where += f" of {names[annotation['image_id']]}"
        if annotation["category_id"] not in classes:
            raise UserError(
                f"{where} has category {annotation['category_id']}, none of the {len(classes)} listed: mend it."
            )
        annotation["bbox"] = _checked(annotation["bbox"], sizes[annotation["image_id"]], where)
        if masks and not annotation.get("segmentation"):
            raise UserError(f"{where} has no mask (segmentation): add it, or pass --masks false for boxes alone.")
        if masks and annotation["iscrowd"]:  # which only the judge reads
            try:
                draw_mask(annotation["segmentation"], *sizes[annotation["image_id"]])
            except Exception as error:  # readers raise whatever they like
                raise UserError(f"{where} has a mask that cannot be drawn ({error}): mend it.") from error
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    places = [next((f / name for f in folders if (f / name).is_file()), None) for name in names.values()]
    if missing := [name for name, place in zip(names.values(), places, strict=True) if place is None]:
        looked = ", ".join(map(str, folders))
        raise UserError(f"{file} lists {len(missing)} images that are not there, such as {missing[0]}: see {looked}.")
    coco = {"images": images, "annotations": annotations, "categories": sorted(categories, key=lambda c: c["id"])}
    return coco, [place for place in places if place]


def _checked(box: Any, size: tuple[int, int], where: str) -> list[float]:
    """A box x y width height, inside its image (height width)."""
    try:
        x, y, w, h = map(float, box)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} has the box {box}, where x, y, width, height are needed: mend it.") from error
    inside = min(x, y) >= -MARGIN and x + w <= size[1] + MARGIN and y + h <= size[0] + MARGIN
    if not inside or min(w, h) < 0:  # not a number compares as false
        raise UserError(
            f"{where} has the box {box} (x, y, width, height), outside the image of {size[0]}x{size[1]}: mend it."
        )
    return [x, y, w, h]


def _subset(coco: dict[str, Any], places: list[Path], chosen: list[bool]) -> tuple[dict[str, Any], list[Path]]:
    images = [image for image, yes in zip(coco["images"], chosen, strict=True) if yes]
    if not images:
        raise UserError("There are too few images to hold some back for judging: give the set a val part.")
    ids = {image["id"] for image in images}
    annotations = [annotation for annotation in coco["annotations"] if annotation["image_id"] in ids]
    return {**coco, "images": images, "annotations": annotations}, [
        p for p, yes in zip(places, chosen, strict=True) if yes
    ]


def _source(name: str, coco: dict[str, Any], places: list[Path]) -> tuple[Source, CocoGroundTruth]:
    """Rows of an image's file and its objects as JSON: text in a table is shared by workers, lists are copied."""
    numbers = {category["id"]: 1 + i for i, category in enumerate(coco["categories"])}
    objects: dict[Any, list[Any]] = defaultdict(list)
    for annotation in coco["annotations"]:
        if not annotation["iscrowd"]:
            own = numbers[annotation["category_id"]], annotation["bbox"], annotation.get("segmentation")
            objects[annotation["image_id"]].append(own)
    rows = {
        "image": [str(place) for place in places],
        "objects": [json.dumps([image["height"], image["width"], objects[image["id"]]]) for image in coco["images"]],
    }
    features = datasets.Features({"image": datasets.Image(decode=False), "objects": datasets.Value("large_string")})
    table = datasets.Dataset.from_dict(rows, features=features)
    return Source(name, table, "image", "objects", len(table)), CocoGroundTruth(
        coco, [image["id"] for image in coco["images"]]
    )


def read_objects(masks: bool) -> Callable[[str], dict[str, Any]]:
    """-> a function from a cell of objects to `Objects`, as tensors that torchvision's transforms take along."""
    return partial(_objects, masks=masks)


def _objects(cell: str, masks: bool) -> dict[str, Any]:
    height, width, objects = json.loads(cell)
    objects = [one for one in objects if min(one[1][2:]) > 0]  # COCO has a few of no width
    boxes = torch.tensor([one[1] for one in objects], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    size = (height, width)
    found: dict[str, Any] = {
        "boxes": v2.functional.clamp_bounding_boxes(tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)),
        "labels": torch.tensor([one[0] for one in objects], dtype=torch.int64),
    }
    if masks:
        drawn = [draw_mask(one[2], height, width) for one in objects]
        empty = np.zeros((0, height, width), np.uint8)
        found["masks"] = tv_tensors.Mask(torch.from_numpy(np.stack(drawn) if drawn else empty))
    return found


def draw_mask(segmentation: Any, height: int, width: int) -> np.ndarray[Any, Any]:
    """Polygons, or a run-length encoding, compressed or not -> (H W), uint8

    Raises:
        ValueError: it is none of them, or of another size.
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
    whole = isinstance(counts, list) and all(isinstance(n, int) and n >= 0 for n in counts)
    if not (whole and sum(counts) == height * width):
        raise ValueError(f"the run lengths of a mask are not whole numbers that add up to {height * width}")
    return mask.decode(mask.frPyObjects(segmentation, height, width))


def fitting(image: Any, objects: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Both as they are.

    Raises:
        ValueError: the image is a strip, or the file of annotations has another size for it.
    """
    height, width = checked_size(image)
    if (height, width) != objects["boxes"].canvas_size:
        declared = "x".join(map(str, objects["boxes"].canvas_size))
        raise ValueError(f"it is {height}x{width}, and {declared} in the file of annotations")
    return image, objects


def train_objects(
    size: Size | None, short: int, long: int, scales: tuple[float, float], mean: list[float]
) -> Transform:
    """Random scale and flip of an image and its objects; those that nothing is left of are left out.

    Args:
        size: of a crop: the image is scaled to fit into it, times a factor, and then cut out or padded to it
            (large-scale jitter: Ghiasi et al., "Simple copy-paste", CVPR 2021); None for whole images.
        short, long: of a whole image: its short side at scale 1, and what its long side is never above.
        scales: a factor is drawn between these.
        mean: color of what lies beyond an image (0 in arrays).
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
        if masks is not None:  # which v2 would scale by the nearest pixel before, half a pixel off
            exact = v2.functional.resize(masks.as_subclass(Tensor), scaled, InterpolationMode.NEAREST_EXACT)
            objects["masks"] = tv_tensors.Mask(exact)
        if size:
            beyond = [0, 0, max(0, size[1] - scaled[1]), max(0, size[0] - scaled[0])]
            color: Any = {Image.Image: fill, tv_tensors.Mask: 0, "others": 0}
            image, objects = v2.RandomCrop(size)(*v2.Pad(beyond, fill=color)(image, objects))
        image, objects = flip(image, objects)
        return image, left_of(objects, cut=size is not None)

    return transform


def left_of(objects: dict[str, Any], cut: bool) -> Objects:
    """Objects of which something is left; a box that may have been cut is drawn anew, around the rest of its mask."""
    found: Objects = {name: value.as_subclass(Tensor) for name, value in objects.items()}
    seen = (found["boxes"][:, 2:] - found["boxes"][:, :2]).amin(1) >= 1
    if "masks" in found:
        seen &= found["masks"].bool().any(2).any(1)
    found = {name: value[seen] for name, value in found.items()}
    if "masks" in found and cut:
        found["boxes"] = around(found["masks"])
    return found


def around(masks: Tensor) -> Tensor:
    """(n H W), none of them empty -> (n 4), the boxes x y x y of what is not 0"""
    columns, rows = (masks.bool().any(dim).int() for dim in (1, 2))
    (left, right), (top, bottom) = ((x.argmax(1), x.shape[1] - x.flip(1).argmax(1)) for x in (columns, rows))
    return torch.stack([left, top, right, bottom], dim=1).float()
