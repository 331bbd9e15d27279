"""What `--data` names -> pairs of an image and the mask of its classes, for semantic segmentation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import Cityscapes
from torchvision.transforms import InterpolationMode, v2

from mimkit.data.decode import EXTENSIONS, open_image
from mimkit.data.sample import read_bytes
from mimkit.data.sources import TRAIN, VAL, Source, hold_out, open_all
from mimkit.data.transforms import Size, Transform, checked_size
from mimkit.errors import UserError

IGNORE = 255  # in a mask: nothing is known about the pixel, so nothing is learned from it and nothing judged by it
UNKNOWN = -1
MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # of PIL: one number for a pixel
PICTURES = [ending for ending in EXTENSIONS if ending != ".npy"]  # that masks come in


@dataclass(frozen=True)
class Classes:
    """What the numbers in mask files mean.

    Args:
        names: of the classes.
        values: the number in a file that stands for each.
        ignored: numbers that stand for nothing, beside `IGNORE`.
    """

    names: list[str]
    values: list[int]
    ignored: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 2 <= len(self.names) < IGNORE:
            raise UserError(
                f"There are {len(self.names)} classes, where segmentation tells 2 to {IGNORE - 1} apart: number them "
                f"from 0 ({IGNORE} is 'ignore')."
            )

    def __call__(self, cell: dict[str, Any]) -> Tensor:
        """A cell with the file of a mask -> (H W), uint8: classes by their place, and IGNORE

        Raises:
            ValueError: it is no mask, or holds a number that stands for nothing.
        """
        numbers = read_mask(cell)
        table = np.full(2 + max(IGNORE, *self.values, *self.ignored), UNKNOWN)
        table[[IGNORE, *self.ignored]] = IGNORE
        table[self.values] = range(len(self.values))
        mask = table[numbers.clip(max=len(table) - 1)]  # the last one stands for whatever lies beyond
        if (mask == UNKNOWN).any():
            odd = int(numbers[mask == UNKNOWN].max())
            known = f"{min(self.values)} to {max(self.values)}"
            raise ValueError(f"its mask has class {odd}, where {known} and {IGNORE} for 'ignore' are known")
        return torch.from_numpy(mask.astype(np.uint8))


def read_mask(cell: dict[str, Any] | None) -> np.ndarray[Any, Any]:
    """The numbers in a file of one channel (H W)."""
    if cell is None:
        raise ValueError("it has no mask")
    picture = ImageOps.exif_transpose(open_image(read_bytes(cell)))
    if picture.mode not in MODES:
        raise ValueError(f"its mask holds colors ({picture.mode}), where one number for a pixel is needed")
    numbers = np.asarray(picture).astype(np.int64)
    if numbers.min() < 0:
        raise ValueError(f"its mask has class {numbers.min()}, below 0")
    return numbers


def open_masked(data: str, classes: int | None = None, zero_ignored: bool = False) -> tuple[Source, Source, Classes]:
    """The training and the test part of a set with masks, and its classes.

    Args:
        data: the official folders of Cityscapes (leftImg8bit/, gtFine/) or ADE20K (images/training/,
            annotations/training/, ...; 0 is ignored); a folder with images/ and masks/, or with train/ and val/ that
            hold them; parquet files or a set on the hub with columns of images and of masks.
        classes: how many; by default as many lines as classes.txt beside the folders has, or as the masks say.
        zero_ignored: 0 stands for nothing, and classes begin at 1.
    """
    root = Path(data).expanduser()
    if (root / "leftImg8bit").is_dir():
        return _cityscapes(root)
    parts: list[Source] = []
    if (root / "images" / "training").is_dir() and (root / "annotations").is_dir():
        zero_ignored = True
        parts = [_pair(root / "images" / part, root / "annotations" / part) for part in ("training", "validation")]
    elif root.is_dir():
        for names in (TRAIN, VAL):
            found = [root / name for name in names if (root / name / "images").is_dir()]
            parts += [_pair(folder / "images", folder / "masks") for folder in found[:1]]
        if not parts and (root / "images").is_dir():
            parts = [_pair(root / "images", root / "masks")]
    if not parts:
        parts = open_all(data)
    if len(parts) == 1:
        parts = list(hold_out(parts[0]))
    train, test = parts
    for part in parts:
        if part.mask is None:
            raise UserError(
                f"--data {data} has no masks: pass a folder with images/ and masks/, that of ADE20K or Cityscapes, or "
                "parquet files with a column named mask."
            )
    if not (train.length and test.length):
        raise UserError(f"--data {data} has too few images to hold some back for judging: give it a val part.")
    return train, test, _classes(root, parts, classes, zero_ignored)


def _pair(images: Path, masks: Path) -> Source:
    """Images and the masks of the same name, but for the ending, at the same place below."""
    if not masks.is_dir():
        raise UserError(f"{images} has no masks beside it: {masks} is not there.")
    pictures = (file for file in images.rglob("*") if file.suffix.lower() in EXTENSIONS)
    files = sorted(file for file in pictures if not file.name.startswith("."))
    drawn = sorted(file for file in masks.rglob("*") if file.suffix.lower() in PICTURES)
    found = {file.relative_to(masks).with_suffix(""): file for file in drawn}
    names = [file.relative_to(images).with_suffix("") for file in files]
    missing = [file for file, name in zip(files, names, strict=True) if name not in found]
    if missing:
        raise UserError(
            f"{len(missing)} images have no mask of the same name in {masks}, such as {missing[0]}: add them."
        )
    if not files:
        raise UserError(f"{images} has no images: put some there.")
    return _source(images, files, [found[name] for name in names])


def _source(name: Path, images: list[Any], masks: list[Any]) -> Source:
    picture = datasets.Image(decode=False)
    columns = {"image": list(map(str, images)), "mask": list(map(str, masks))}
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features({"image": picture, "mask": picture}))
    return Source(str(name), rows, "image", None, len(rows), "mask")


def _cityscapes(root: Path) -> tuple[Source, Source, Classes]:
    parts = []
    for split in ("train", "val"):
        try:
            found = Cityscapes(str(root), split, mode="fine", target_type="semantic")
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"--data {root} is not the whole of Cityscapes: it needs leftImg8bit/{split}/ and gtFine/{split}/."
            ) from error
        pairs = sorted(
            zip(found.images, (targets[0] for targets in found.targets), strict=True)
        )  # it lists as disks do
        if missing := [mask for _, mask in pairs if not Path(mask).is_file()]:
            raise UserError(f"--data {root} lacks {missing[0]} and {len(missing) - 1} more: unpack gtFine too.")
        parts.append(_source(root / split, [image for image, _ in pairs], [mask for _, mask in pairs]))
        if not parts[-1].length:
            raise UserError(f"--data {root} has no images in leftImg8bit/{split}/: unpack that archive too.")
    learned = sorted((c for c in Cityscapes.classes if 0 <= c.train_id < IGNORE), key=lambda c: c.train_id)
    ignored = tuple(c.id for c in Cityscapes.classes if c not in learned and c.id >= 0)
    return parts[0], parts[1], Classes([c.name for c in learned], [c.id for c in learned], ignored)


def _classes(root: Path, parts: list[Source], count: int | None, zero_ignored: bool) -> Classes:
    first = int(zero_ignored)
    ignored = (0,) if zero_ignored else ()
    names: list[str] = []
    if (root / "classes.txt").is_file():
        names = [line.strip() for line in (root / "classes.txt").read_text().splitlines() if line.strip()]
    elif (root / "objectInfo150.txt").is_file():  # ADE20K's: Idx, Ratio, Train, Val, (Stuff,) Name between tabs
        lines = (root / "objectInfo150.txt").read_text().splitlines()[1:]
        names = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
    if count and names and count != len(names):
        raise UserError(f"--classes {count}: {root} names {len(names)} classes; leave --classes out, or mend the file.")
    if not (count or names):
        try:
            cells = [cell for part in parts for cell in part.rows[part.mask]]
            found = {i: (cell or {}).get("path") or "a mask" for cell in cells for i in _ids(cell)}
        except ValueError as error:
            raise UserError(
                f"The masks of {parts[0].name} cannot be counted: {error}; mend it, or pass --classes."
            ) from error
        largest = max(found, default=-1)
        missing = next((i for i in range(first, largest) if i not in found), None)
        if missing is not None:
            raise UserError(
                f"{found[largest]} has the class {largest}, and no mask has {missing}: mend it, or say how many "
                "classes there are, by --classes or classes.txt."
            )
        count = largest + 1 - first
    names = names or [str(first + i) for i in range(count or 0)]
    return Classes(names, list(range(first, first + len(names))), ignored)


def _ids(cell: dict[str, Any]) -> list[int]:
    """The classes of a mask; its file is named where it has none."""
    try:
        numbers = read_mask(cell)
    except Exception as error:  # readers raise whatever they like
        raise ValueError(f"{(cell or {}).get('path') or 'a mask'}: {error}") from error
    return np.unique(numbers[numbers != IGNORE]).tolist()


def check_sizes(image: Any, mask: Tensor) -> Size:
    """Height and width of an image whose mask has the same ones."""
    height, width = checked_size(image)
    if (height, width) != tuple(mask.shape):
        raise ValueError(f"it is {height}x{width}, and its mask {mask.shape[0]}x{mask.shape[1]}")
    return height, width


def resize_short(image: Any, size: Size, short: float) -> Any:
    """An image of `size`, scaled so that its short side has so many pixels."""
    scale = short / min(size)
    scaled = [max(1, round(side * scale)) for side in size]
    return v2.functional.resize(image, scaled, InterpolationMode.BILINEAR, antialias=True)


def train_pairs(size: Size, short: int, scales: tuple[float, float], mean: list[float]) -> Transform:
    """Random scale, crop and flip of an image and its mask.

    Args:
        size: of the crop; what lies beyond an image has the color `mean` (0 in arrays), and is ignored in its mask.
        short: pixels of the short side at scale 1.
        scales: a factor is drawn between these.
    """
    fill = [round(255 * value) for value in mean]

    def transform(image: Any, mask: Tensor) -> tuple[Any, Tensor]:
        own = check_sizes(image, mask)
        factor = float(torch.empty(()).uniform_(*scales))
        image = resize_short(image, own, short * factor)
        height, width = v2.functional.get_size(image)
        pixels = mask[None]
        pixels = v2.functional.resize(pixels, [height, width], InterpolationMode.NEAREST_EXACT)
        beyond = [0, 0, max(0, size[1] - width), max(0, size[0] - height)]
        image = v2.functional.pad(image, beyond, fill=fill if isinstance(image, Image.Image) else 0)
        pixels = v2.functional.pad(pixels, beyond, fill=IGNORE)
        top, left = (
            int(torch.randint(max(0, side - crop) + 1, ())) for side, crop in zip((height, width), size, strict=True)
        )
        image, pixels = (v2.functional.crop(x, top, left, *size) for x in (image, pixels))
        if torch.rand(()) < 0.5:
            image, pixels = (v2.functional.horizontal_flip(x) for x in (image, pixels))
        return image, pixels[0]

    return transform


def eval_pairs(short: int) -> Transform:
    """An image scaled to so many pixels of its short side, and its mask as it is."""

    def transform(image: Any, mask: Tensor) -> tuple[Any, Tensor]:
        return resize_short(image, check_sizes(image, mask), short), mask

    return transform
