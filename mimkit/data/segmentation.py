"""Data sets for semantic segmentation: images with a mask that gives each pixel's class, and their transforms."""

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import Cityscapes
from torchvision.transforms import InterpolationMode, v2

from mimkit.data.decode import EXTENSIONS, open_image
from mimkit.data.find import count_images, find_parts, folders_in, images_in, unused
from mimkit.data.order import evenly_spaced
from mimkit.data.parts import TEST, TRAIN, choose_parts, describe, no_columns, wanted_parts
from mimkit.data.sample import read_bytes
from mimkit.data.sources import Source, hold_out, join, open_part
from mimkit.data.transforms import Size, Transform, checked_size, resize_short
from mimkit.data.walk import find_files
from mimkit.errors import UserError, some, tell

IGNORE = 255  # value of a mask's pixels without a class: neither the loss nor the metric uses them
UNKNOWN = -1
CHECKED = 200  # training masks whose numbers are compared with the classes
MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # PIL's modes with one number for each pixel
MASK_EXTENSIONS = EXTENSIONS - {".npy"}


@dataclass(frozen=True)
class Classes:
    """The classes of a data set, and the numbers that stand for them in mask files.

    Args:
        names: names of the classes.
        values: the number that stands for each class in mask files.
        ignored: numbers besides `IGNORE` that stand for no class.

    Raises:
        UserError: there are fewer than 2 or more than 254 classes.
    """

    names: list[str]
    values: list[int]
    ignored: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if max(self.values, default=0) > 65535:
            raise UserError(f"Class {max(self.values)}: masks hold numbers up to 65535. Pass others to --mask-values.")
        if not 2 <= len(self.names) < IGNORE:
            raise UserError(
                f"There are {len(self.names)} classes, where segmentation tells 2 to {IGNORE - 1} apart: number them "
                f"from 0 ({IGNORE} is 'ignore')."
            )

    def __call__(self, cell: dict[str, Any]) -> Tensor:
        """Read the mask file of a cell as class indices (H W), uint8, with `IGNORE` for pixels without a class.

        Raises:
            ValueError: the file is not a mask, or holds a number that stands for no class.
        """
        numbers = read_mask(cell)
        table = np.full(2 + max(IGNORE, *self.values, *self.ignored), UNKNOWN)
        table[[IGNORE, *self.ignored]] = IGNORE
        table[self.values] = range(len(self.values))
        mask = table[numbers.clip(max=len(table) - 1)]  # the last entry stands for all larger numbers
        if (mask == UNKNOWN).any():
            unknown = int(numbers[mask == UNKNOWN].max())
            first, last = min(self.values), max(self.values)
            gaps = last - first >= len(self.values)
            known = ", ".join(map(str, self.values[:9])) if gaps else f"{first} to {last}"
            raise ValueError(
                f"its mask has class {unknown}, where {known} and {IGNORE} for 'ignore' are known: pass --mask-values"
            )
        return torch.from_numpy(mask.astype(np.uint8))


def read_mask(cell: dict[str, Any] | None) -> np.ndarray[Any, Any]:
    """Read the numbers (H W) of a mask file with one channel.

    Raises:
        ValueError: the file has colors or negative numbers, or the cell is empty.
    """
    if cell is None:
        raise ValueError("it has no mask")
    picture = ImageOps.exif_transpose(open_image(read_bytes(cell)))
    if picture.mode not in MODES:
        raise ValueError(f"its mask holds colors ({picture.mode}), where one number for each pixel is needed")
    numbers = np.asarray(picture).astype(np.int64)
    if numbers.min() < 0:
        raise ValueError(f"its mask has class {numbers.min()}, below 0")
    return numbers


def open_masked(
    data: str,
    classes: int | None = None,
    zero_ignored: bool = False,
    mask_values: list[int] | None = None,
    parts: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> tuple[Source, Source, Classes]:
    """Open the part of a data set with masks to train on, the one to evaluate on, and the classes.

    `choose_parts` says which they are. If there is none to evaluate on, every fifth image is held out. Images without
    a mask in a table are left out. `about` of the first source describes all this.

    Args:
        data: one of: the official folders of Cityscapes (leftImg8bit/, gtFine/) or ADE20K (images/training/,
            annotations/training/, ...; 0 is ignored); a folder with images/ and masks/, or with train/ and val/ that
            hold these two; parquet files or a data set on the hub with a column of images and one of masks.
        classes: number of classes; by default the number of lines of classes.txt in the folder, or the largest number
            in the masks plus 1.
        zero_ignored: whether 0 stands for no class, so that the classes begin at 1.
        mask_values: the number that stands for each class in the masks; by default 0, 1, 2, ...
        parts: names of the parts to use, separated by commas.
        image_column, label_column: names of the columns of images and masks in a table.

    Raises:
        UserError: there is no such data set, masks are missing, or the classes cannot be determined.
    """
    if zero_ignored and 0 in (mask_values or []):
        raise UserError("--zero-ignored and 0 in --mask-values contradict each other. Omit one of them.")
    root = Path(data).expanduser()
    if (root / "leftImg8bit").is_dir():
        no_columns(data, image_column, label_column)
        return _cityscapes(root, parts)
    folders: dict[str, tuple[Path, Path]] = {}
    if (root / "images" / "training").is_dir() and (root / "annotations").is_dir():
        zero_ignored = True
        folders = {name: (root / "images" / name, root / "annotations" / name) for name in folders_in(root / "images")}
    elif root.is_dir():
        holding = [name for name in folders_in(root) if (root / name / "images").is_dir()]
        if any(name.lower() in TRAIN for name in holding):
            folders = {name: (root / name / "images", root / name / "masks") for name in holding}
        elif (root / "images").is_dir():
            folders = {TRAIN[0]: (root / "images", root / "masks")}
    if folders:
        no_columns(data, image_column, label_column)
    found = {} if folders else find_parts(data, parts)

    @cache
    def opened(name: str) -> Source:
        if folders:
            return replace(_pair(*folders[name]), parts=(name,))
        return open_part(data, found, name, False, image_column, label_column, labeled=False)

    def masked(name: str) -> bool:
        return folders[name][1].is_dir() if folders else bool(_has_mask(opened(name)).any())

    names = list(folders or found)
    training, judge = choose_parts(names, wanted_parts(data, names, parts), masked)
    if not training:
        raise UserError(f"--data {data} has the splits {some(names, 6)}: none for training. Choose by --parts.")
    for name in (*training, *([judge] if judge else [])):
        if opened(name).mask is None:
            raise UserError(
                f"--data {data} has no masks: pass a folder with images/ and masks/, the folder of ADE20K or "
                "Cityscapes, or a table with a column of them, named mask or by --label-column."
            )
    kept = {name: _keep_masked(opened(name)) for name in (*training, *([judge] if judge else []))}
    rest: dict[str, Any] = {
        name: count_images(folders[name][0]) if folders else images_in(found[name])
        for name in names
        if name not in kept
    }
    rest |= {f"images of {name} without a mask": n for name in kept if (n := opened(name).length - kept[name].length)}
    if folders:
        rest |= unused(root, [place for pair in folders.values() for place in pair])
    train, test = _split(data, kept, training, judge, rest)
    known = _classes(root, [train, test], classes, zero_ignored, mask_values)
    check_masks(train, known)
    return train, test, known


def _split(
    data: str, kept: dict[str, Source], training: list[str], judge: str | None, rest: dict[str, Any]
) -> tuple[Source, Source]:
    """Return the images to train on, described, and those to evaluate on, given those of each part."""
    train = kept[training[0]] if len(training) == 1 else join([kept[name] for name in training], "mask")
    train, test = (train, kept[judge]) if judge else hold_out(train)
    if not (train.length and test.length):
        raise UserError(f"--data {data} has too few images to hold some back for validation: give it a val split.")
    trained = {name: kept[name].length for name in training} if judge else {" and ".join(training): train.length}
    evaluated = {judge or f"every fifth of {' and '.join(training)}": test.length}
    about = describe(("Training images", trained), ("Validation images", evaluated), ("Left out", rest))
    return replace(train, about=about), test


def _has_mask(source: Source) -> np.ndarray[Any, Any]:
    """Return which images of a table have a mask."""
    if source.mask is None:
        return np.zeros(source.length, bool)
    return np.asarray(source.rows.data.column(source.mask).is_valid())


def _keep_masked(source: Source) -> Source:
    """Leave out the images without a mask."""
    masked = _has_mask(source)
    if masked.all():
        return source
    return replace(source, rows=source.rows.select(np.flatnonzero(masked)), length=int(masked.sum()))


def _pair(images: Path, masks: Path) -> Source:
    """Pair each image with the mask that has the same path below its folder, apart from the extension."""
    if not masks.is_dir():
        raise UserError(f"The images in {images} have no masks: the folder {masks} does not exist.")
    files = sorted(map(Path, find_files(str(images), EXTENSIONS)))
    mask_files = sorted(map(Path, find_files(str(masks), MASK_EXTENSIONS)))
    by_name = {file.relative_to(masks).with_suffix(""): file for file in mask_files}
    names = [file.relative_to(images).with_suffix("") for file in files]
    missing = [file for file, name in zip(files, names, strict=True) if name not in by_name]
    if missing:
        raise UserError(
            f"{len(missing)} images have no mask of the same name in {masks}, such as {missing[0]}: add them."
        )
    if not files:
        raise UserError(f"{images} has no images: put some there.")
    return _source(images, files, [by_name[name] for name in names])


def _source(name: Path, images: list[Any], masks: list[Any]) -> Source:
    """Make a source of paths of images and masks."""
    import datasets

    picture = datasets.Image(decode=False)
    columns = {"image": list(map(str, images)), "mask": list(map(str, masks))}
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features({"image": picture, "mask": picture}))
    return Source(str(name), rows, "image", None, len(rows), "mask")


def _cityscapes(root: Path, wanted: str | None) -> tuple[Source, Source, Classes]:
    """Open the splits and the 19 evaluated classes of Cityscapes. The masks of its test split are empty."""
    splits = folders_in(root / "leftImg8bit")
    training, judge = choose_parts(splits, wanted_parts(str(root), splits, wanted), lambda name: name not in TEST)
    if wanted is None:
        training, judge = ["train"], "val"
    parts: dict[str, Source] = {}
    for split in (*training, *([judge] if judge else [])):
        images, masks = (root / kind / split for kind in ("leftImg8bit", "gtFine"))
        if not (images.is_dir() and masks.is_dir()):
            raise UserError(
                f"--data {root} is not all of Cityscapes: it needs leftImg8bit/{split}/ and gtFine/{split}/."
            )
        files = [Path(file) for file in find_files(str(images), EXTENSIONS)]
        names = [file.relative_to(images) for file in files]
        of = [masks / n.with_name(n.stem.removesuffix("_leftImg8bit") + "_gtFine_labelIds.png") for n in names]
        if missing := [mask for mask in of if not mask.is_file()]:
            raise UserError(f"--data {root} lacks the masks {some(missing, 1)}: unpack gtFine too.")
        if not files:
            raise UserError(f"--data {root} has no images in leftImg8bit/{split}/: unpack that archive too.")
        parts[split] = _source(root / split, files, of)
    evaluated = sorted((c for c in Cityscapes.classes if 0 <= c.train_id < IGNORE), key=lambda c: c.train_id)
    ignored = tuple(c.id for c in Cityscapes.classes if c not in evaluated and c.id >= 0)
    rest = {name: count_images(root / "leftImg8bit" / name) for name in splits if name not in parts}
    train, test = _split(str(root), parts, training, judge, rest)
    return train, test, Classes([c.name for c in evaluated], [c.id for c in evaluated], ignored)


def _classes(
    root: Path, parts: list[Source], count: int | None, zero_ignored: bool, mask_values: list[int] | None
) -> Classes:
    """Determine the classes by a file with their names, by `count` or `mask_values`, or by the numbers in all masks."""
    first = int(zero_ignored)
    ignored = (0,) if zero_ignored else ()
    names: list[str] = []
    if (root / "classes.txt").is_file():
        names = [line.strip() for line in (root / "classes.txt").read_text().splitlines() if line.strip()]
    elif (root / "objectInfo150.txt").is_file():  # ADE20K: Idx, Ratio, Train, Val, (Stuff,) Name, separated by tabs
        lines = (root / "objectInfo150.txt").read_text().splitlines()[1:]
        names = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
    if count and names and count != len(names):
        raise UserError(f"--classes {count}: {root} names {len(names)} classes; leave --classes out, or fix the file.")
    wanted = len(names) or count or len(mask_values or [])
    if mask_values and not wanted == len(mask_values) == len(set(mask_values)):
        listed = ",".join(map(str, mask_values))
        raise UserError(f"--mask-values {listed} must have one number for each of the {wanted} classes, each another.")
    if not (count or names or mask_values):
        count = _count_classes(parts, first)
    names = names or [str(i) for i in mask_values or range(first, first + (count or 0))]
    return Classes(names, mask_values or list(range(first, first + len(names))), ignored)


def _count_classes(parts: list[Source], first: int) -> int:
    """Return the number of classes by the largest number in all masks, where all smaller ones must occur too."""
    try:
        cells = [cell for part in parts for cell in part.rows[part.mask]]
        files = {i: (cell or {}).get("path") or "a mask" for cell in cells for i in _numbers_in(cell)}
    except ValueError as error:
        raise UserError(
            f"The classes in the masks of {parts[0].name} cannot be counted: {error}; fix it, or pass --classes."
        ) from error
    known = [i for i in sorted(files) if i >= first and i != IGNORE]
    if len(known) == 1 and IGNORE in files:
        raise UserError(
            f"The masks of {parts[0].name} hold {known[0]} and {IGNORE} only, and {IGNORE} means 'ignore'. If it is a "
            f"class, pass --mask-values {known[0]},{IGNORE}."
        )
    largest = max(known, default=-1)
    missing = next((i for i in range(first, largest) if i not in files), None)
    if missing is not None:
        values = f"--mask-values {','.join(map(str, known))}" if len(known) < 9 else "--mask-values"
        raise UserError(
            f"{files[largest]} has the class {largest}, and no mask has {missing}: fix it, or say how many classes "
            f"there are, by {values}, --classes or classes.txt."
        )
    return largest + 1 - first


def check_masks(train: Source, classes: Classes) -> None:
    """Warn of classes that have no pixel in a sample of the training masks, and of masks of one class and `IGNORE`.

    Masks of 0 and 255, the usual ones of two classes, would train silently on one class.
    """
    sample: list[set[int]] = []
    for i in evenly_spaced(train.length, CHECKED):
        with suppress(ValueError):  # it counts as a bad image in training
            sample.append(_numbers_in(train.rows[i][train.mask]))
    found = set().union(*sample)
    absent = [name for name, value in zip(classes.names, classes.values, strict=True) if value not in found]
    lone = sum(len(values) == 2 and IGNORE in values - {*classes.values} for values in sample)
    looked = f"{len(sample)} of {train.length:,} training masks"
    numbers = ",".join(map(str, sorted(found))) if len(found) == len(classes.names) else f"A,B,...,{IGNORE}"
    remedy = f" {IGNORE} means 'ignore': if it is a class, pass --mask-values {numbers}."
    if absent:
        if not lone and not (len(found) == 2 and IGNORE in found - {*classes.values}):
            remedy = " Remove it from --classes or classes.txt, or map other numbers by --mask-values."
        tell(f"warning: {train.name}: {looked} hold no pixel of class {some(absent)}.{remedy}")
    elif 2 * lone > len(sample):
        tell(f"warning: {train.name}: {lone} of {len(sample)} training masks hold only one class and {IGNORE}.{remedy}")


def _numbers_in(cell: dict[str, Any] | None) -> set[int]:
    """Return the numbers in a mask. Errors name the mask's file."""
    try:
        return set(np.unique(read_mask(cell)).tolist())
    except Exception as error:  # image libraries raise many kinds
        raise ValueError(f"{(cell or {}).get('path') or 'a mask'}: {error}") from error


def check_sizes(image: Any, mask: Tensor) -> Size:
    """Return the (height, width) of an image and its mask (H W).

    Raises:
        ValueError: the sizes of the two differ, or one side is far longer than the other.
    """
    height, width = checked_size(image)
    if (height, width) != tuple(mask.shape):
        raise ValueError(f"it is {height}x{width}, and its mask {mask.shape[0]}x{mask.shape[1]}")
    return height, width


def train_pairs(size: Size, short: int, scales: tuple[float, float], mean: list[float]) -> Transform:
    """Return the augmentation of training: random scale, crop and horizontal flip of an image and its mask.

    Args:
        size: (H, W) of the crop. Where the crop exceeds the image, it is padded: the mask with `IGNORE`, the image with
            `mean`, or with 0 if it is a tensor.
        short: length in pixels of the image's short side at scale 1.
        scales: range of the random scale.
        mean: color of the padding, in 0-1.
    """
    fill = [round(255 * value) for value in mean]

    def transform(image: Any, mask: Tensor) -> tuple[Any, Tensor]:
        original = check_sizes(image, mask)
        scale = float(torch.empty(()).uniform_(*scales))
        image = resize_short(image, original, short * scale)
        height, width = v2.functional.get_size(image)
        pixels = v2.functional.resize(mask[None], [height, width], InterpolationMode.NEAREST_EXACT)
        padding = [0, 0, max(0, size[1] - width), max(0, size[0] - height)]
        image = v2.functional.pad(image, padding, fill=fill if isinstance(image, Image.Image) else 0)
        pixels = v2.functional.pad(pixels, padding, fill=IGNORE)
        top, left = (
            int(torch.randint(max(0, side - crop) + 1, ())) for side, crop in zip((height, width), size, strict=True)
        )
        image, pixels = (v2.functional.crop(x, top, left, *size) for x in (image, pixels))
        if torch.rand(()) < 0.5:
            image, pixels = (v2.functional.horizontal_flip(x) for x in (image, pixels))
        return image, pixels[0]

    return transform


def eval_pairs(short: int) -> Transform:
    """Return the transform of evaluation: resize the image's short side to `short` pixels, and keep the mask."""

    def transform(image: Any, mask: Tensor) -> tuple[Any, Tensor]:
        return resize_short(image, check_sizes(image, mask), short), mask

    return transform
