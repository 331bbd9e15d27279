"""Load one image as a training sample, and collate samples into batches.

Every random choice about an image (its crop, its flip, the noise that decides which units are masked) is drawn from
(seed, epoch, index of the image), never from the state of a worker, a process or a batch.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import v2

from mimkit.data.decode import UNIT, ValueRange, decode, decode_pixels
from mimkit.data.transforms import Transform

Index = int | tuple[int, int]  # of an image: its row, or (shard, row) in a stream
MAX_TRIES = 100  # images to try as a replacement for a bad one
STAND_IN = np.random.MT19937(0)  # takes the place of NumPy's global generator, whose state takes 0.1 ms to restore


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch by `key`; restore their states at the end.

    One thing is not restored: the second number of the pair that `np.random.randn` draws and may hold back.
    """
    before = random.getstate(), get_bit_generator(), torch.get_rng_state()
    words = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(words[0]))
    set_bit_generator(STAND_IN)
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))  # torch.manual_seed is slow: it formats a stack trace for CUDA
    try:
        yield
    finally:
        random.setstate(before[0])
        set_bit_generator(before[1])
        torch.set_rng_state(before[2])


class Sample(NamedTuple):
    """One augmented image, its label, and the noise that its mask is drawn from."""

    image: Tensor | None  # (c H W), uint8 or float32; None if it cannot be used
    noise: Tensor  # (n), one number for each mask unit
    label: Any  # the class index, -1 if there is none; or what the transform made of `SampleLoader.target`'s result
    name: str  # path of the file, or number of the row
    bad: tuple[str, str] | None = None  # (name, reason) of this image, or of the one it replaces, if it is bad


@dataclass
class SampleLoader:
    """Function from a row of a `Source` to a `Sample`: decode the image and transform it.

    All randomness is drawn from (seed, epoch, index of the image). A damaged image does not raise: the sample's `bad`
    gives the reason.

    Args:
        transform: function of the image; with `target`, function of the image and the target, which returns both.
        in_chans: number of channels to decode an image to.
        units: number of mask units in an image, which is the length of its noise; 0 for none.
        seed: first part of the key that randomness is drawn from.
        fields: names of the image column and the label column.
        target: function that reads a cell of the label column, if the label is not a class index.
        part: name of the split, such as "test". It is part of a sample's name if the image has no path.
        pixels: whether to decode images to tensors (c H W) instead of PIL images.
        value_range: floating-point values that become 0 and 1. Data sets replace it by their source's.
    """

    transform: Transform
    in_chans: int
    units: int
    seed: int
    fields: tuple[str, str | None]
    target: Callable[[Any], Any] | None = None
    part: str = ""
    pixels: bool = False
    value_range: ValueRange = UNIT

    def __call__(self, row: dict[str, Any], epoch: int, index: Index) -> Sample:
        file = row[self.fields[0]] or {"bytes": None, "path": None}
        label = row[self.fields[1]] if self.fields[1] else -1
        key = (index,) if isinstance(index, int) else index
        # paths that are stored with an image's bytes need not be unique
        number = f"{self.part} image {':'.join(map(str, key))}".lstrip()
        name = file["path"] if file["bytes"] is None and file["path"] else number
        with seeded(self.seed, epoch, *key):
            noise = torch.rand(self.units)
            try:
                read = decode_pixels if self.pixels else decode
                image = read(read_bytes(file), self.in_chans, self.value_range)
                if self.target:
                    image, label = self.transform(image, self.target(label))
                else:
                    image = self.transform(image)
                if isinstance(image, Image.Image):
                    image = v2.functional.pil_to_tensor(image)
            except Exception as error:  # image libraries raise many kinds of exceptions for damaged files
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                return Sample(None, noise, -1, name, (name, reason))
        return Sample(image, noise, label if self.target else -1 if label is None else int(label), name)


def first_good(samples: Iterator[Sample]) -> Sample:
    """Return the first sample; if it is bad, return the next good one in its place, with the noise of the first.

    At most `MAX_TRIES` replacements are tried. If all of them are bad, return the first sample.
    """
    wanted = next(samples)
    if not wanted.bad:
        return wanted
    good = next((sample for sample in islice(samples, MAX_TRIES) if not sample.bad), wanted)
    return good._replace(noise=wanted.noise, bad=wanted.bad)


def read_bytes(file: dict[str, Any]) -> bytes:
    """Return the bytes of an image cell {"bytes", "path"}, from the cell or from the file it points to."""
    if file["bytes"] is None and file["path"] is None:
        raise ValueError("it has no image")
    return file["bytes"] if file["bytes"] is not None else Path(file["path"]).read_bytes()


class Batch(NamedTuple):
    """Collated samples. Samples without an image appear in `bad` only."""

    images: Any  # (b c H W), uint8 or float32; or a list of (c H W)
    noise: Tensor  # (b n)
    labels: Any  # (b) class indices, -1 for none; or masks (b H W); or a list with the target of each image
    names: list[str]
    bad: list[tuple[str, str]]  # (name, reason) of images that could not be used, including those that were replaced

    def to(self, device: torch.device) -> "Batch":
        """Move images, noise and labels to a device."""
        from accelerate.utils import send_to_device

        images, noise, labels = send_to_device((self.images, self.noise, self.labels), device, non_blocking=True)
        return self._replace(images=images, noise=noise, labels=labels)


def collate_list(samples: list[Sample]) -> Batch:
    """Collate samples into a batch whose images and labels are lists."""
    good = [sample for sample in samples if sample.image is not None]
    return Batch(
        [sample.image for sample in good],
        torch.stack([sample.noise for sample in good]) if good else torch.empty(0),
        [sample.label for sample in good],
        [sample.name for sample in good],
        [sample.bad for sample in samples if sample.bad],
    )


def collate(samples: list[Sample]) -> Batch:
    """Collate samples, whose images are (c H W), into a batch with stacked images (b c H W) and labels."""
    batch = collate_list(samples)
    images = batch.images
    if len({image.dtype for image in images}) > 1:  # uint8 and float32 arrays in one data set
        images = [image / 255 if image.dtype == torch.uint8 else image for image in images]
    labels = [torch.as_tensor(label) for label in batch.labels]
    # default_collate stacks in shared memory when it runs in a worker
    stacked = (default_collate(x) if x else torch.empty(0) for x in (images, labels))
    return batch._replace(images=next(stacked), labels=next(stacked))
