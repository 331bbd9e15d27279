"""Read one image as a training sample, and collate samples into batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import v2

from mimkit.data.decode import decode, decode_pixels
from mimkit.data.order import seeded
from mimkit.data.transforms import Transform

Index = int | tuple[int, int]  # of an image: its row, or (shard, row) in a stream
TRIES = 100  # images that may stand in for one that is bad


class Sample(NamedTuple):
    """One image as a network sees it."""

    image: Tensor | None  # (c H W), uint8 or float32; None when it cannot be decoded
    noise: Tensor  # (n) for the mask
    label: Any  # its class, or what `SampleLoader.target` gave, as the transform left it
    name: str  # its file, or its place
    bad: tuple[str, str] | None = None  # what cannot be decoded, and why: this image, or the one it stands in for


@dataclass
class SampleLoader:
    """A row -> a view of it, drawn from (seed, epoch, index).

    Args:
        units: mask units in an image, the length of its noise; 0 for none.
        fields: names of the image and the label column.
        target: reads what the label column holds, if that is no class; the transform takes it along with the image,
            and gives back both.
        pixels: whether the transform takes (c H W) of any image, and not pictures as PIL's.
        part: of the data, named where a row has no file to name.
    """

    transform: Transform
    in_chans: int
    units: int
    seed: int
    fields: tuple[str, str | None]
    target: Callable[[Any], Any] | None = None
    part: str = ""
    pixels: bool = False

    def __call__(self, row: dict[str, Any], epoch: int, index: Index) -> Sample:
        file = row[self.fields[0]] or {"bytes": None, "path": None}
        label = row[self.fields[1]] if self.fields[1] else -1
        key = (index,) if isinstance(index, int) else index
        # names that stand beside bytes need not be unique
        place = f"{self.part} image {':'.join(map(str, key))}".lstrip()
        name = file["path"] if file["bytes"] is None and file["path"] else place
        with seeded(self.seed, epoch, *key):
            noise = torch.rand(self.units)
            try:
                image = (decode_pixels if self.pixels else decode)(read_bytes(file), self.in_chans)
                if self.target:
                    image, label = self.transform(image, self.target(label))
                else:
                    image = self.transform(image)
                if isinstance(image, Image.Image):
                    image = v2.functional.pil_to_tensor(image)
            except Exception as error:  # readers raise whatever they like on a broken file
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                return Sample(None, noise, -1, name, (name, reason))
        return Sample(image, noise, label if self.target else -1 if label is None else int(label), name)


def first_good(views: Iterator[Sample]) -> Sample:
    """The first of them; where it is bad, the next good one of a hundred stands in for it, under its noise."""
    wanted = next(views)
    if not wanted.bad:
        return wanted
    good = next((view for view in islice(views, TRIES) if not view.bad), wanted)
    return good._replace(noise=wanted.noise, bad=wanted.bad)


def read_bytes(file: dict[str, Any]) -> bytes:
    """What a cell of images holds, or points at."""
    return file["bytes"] if file["bytes"] is not None else Path(file["path"]).read_bytes()


class Batch(NamedTuple):
    """Views, stacked, but for those without an image."""

    images: Any  # (b c H W), uint8 or float32; or a list of (c H W)
    noise: Tensor  # (b n)
    labels: Any  # (b), -1 without; or masks (b H W); or a list of what each image has
    names: list[str]
    bad: list[tuple[str, str]]  # images that could not be decoded, also those that others stand in for, and why

    def to(self, device: torch.device) -> "Batch":
        """Move what the network needs."""
        images, noise, labels = send_to_device((self.images, self.noise, self.labels), device, non_blocking=True)
        return self._replace(images=images, noise=noise, labels=labels)


def collate_list(views: list[Sample]) -> Batch:
    """Views -> a batch whose images and labels are lists"""
    good = [view for view in views if view.image is not None]
    return Batch(
        [view.image for view in good],
        torch.stack([view.noise for view in good]) if good else torch.empty(0),
        [view.label for view in good],
        [view.name for view in good],
        [view.bad for view in views if view.bad],
    )


def collate(views: list[Sample]) -> Batch:
    """[(c H W), ...] -> (b c H W)"""
    batch = collate_list(views)
    images = batch.images
    if len({image.dtype for image in images}) > 1:  # arrays of several kinds
        images = [image / 255 if image.dtype == torch.uint8 else image for image in images]
    labels = [torch.as_tensor(label) for label in batch.labels]
    stacked = (default_collate(x) if x else torch.empty(0) for x in (images, labels))  # in memory that workers share
    return batch._replace(images=next(stacked), labels=next(stacked))
