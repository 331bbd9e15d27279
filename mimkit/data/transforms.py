"""Image transforms for training and evaluation."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from mimkit.errors import UserError

Size = tuple[int, int]
Transform = Callable[..., Any]
STRIP = 20  # times as long as wide


def parse_size(size: int | str) -> Size:
    """224 or '224' or '256x512' (height x width) -> (height, width)"""
    sides = str(size).lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise UserError(f"An image size of {size!r} is neither a number nor HEIGHTxWIDTH: write 224 or 256x512.")
    return int(sides[0]), int(sides[-1])


def train_transform(size: Size, scale: tuple[float, float] = (0.2, 1.0)) -> Transform:
    """MAE's augmentation: a random resized crop, bicubic, and a flip (MAE, appendix A.1): (c h w) -> (c H W)."""
    if not 0 < scale[0] <= scale[1] <= 1:
        raise UserError(
            f"--crop-scale {list(scale)} is no range of shares: give two numbers between 0 and 1, like 0.2,1."
        )
    return partial(crop_and_flip, size=size, scale=scale)


def crop_and_flip(image: Tensor, size: Size, scale: tuple[float, float]) -> Tensor:
    """(c h w) -> (c H W): the draws, and so the crops, of torchvision's two transforms, which take longer
    (benchmarks/loader.md)."""
    top, left, height, width = draw_box(image.shape[-2], image.shape[-1], scale)
    box = image[:, top : top + height, left : left + width]
    box = box.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # pixels lie together, which torch scales much faster
    scaled = v2.functional.resize(box, list(size), InterpolationMode.BICUBIC, antialias=True)
    return scaled.flip(-1) if torch.rand(1) < 0.5 else scaled


def draw_box(height: int, width: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Top, left, height and width of a part of an image: a share of its area drawn between `scale`, and the aspect from
    3/4 to 4/3, evenly by its logarithm (Szegedy et al., CVPR 2015)."""
    narrow, wide = 3 / 4, 4 / 3
    for _ in range(10):
        area = height * width * torch.empty(1).uniform_(*scale).item()
        aspect = torch.exp(torch.empty(1).uniform_(math.log(narrow), math.log(wide))).item()
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(torch.randint(height - h + 1, (1,))), int(torch.randint(width - w + 1, (1,))), h, w
    h, w = min(height, round(width / narrow)), min(width, round(height * wide))  # the middle of a strip
    return (height - h) // 2, (width - w) // 2, h, w


def finetune_transform(
    size: Size, scale: tuple[float, float], augment: str | None, erase: float, normalize: "Normalize"
) -> Transform:
    """The augmentation of supervised training: crop and flip, then timm's RandAugment and random erasing.

    Args:
        augment: as timm spells it, such as rand-m9-mstd0.5-inc1; None for none.
        erase: share of the images of which a part becomes noise.
        normalize: comes before the erasing, whose noise is of deviation 1: what results is a network's input.
    """
    crop = train_transform(size, scale)
    policy: Any = None
    if augment:
        fill = tuple(round(255 * mean) for mean in normalize.values[0])
        about: dict[str, Any] = {"translate_const": int(min(size) * 0.45), "interpolation": Image.Resampling.BICUBIC}
        about["img_mean"] = fill if len(fill) > 1 else fill[0]
        make = rand_augment_transform if augment.startswith("rand") else auto_augment_transform
        try:
            policy = make(augment, about)
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise UserError(
                f"--aa {augment} is no policy that timm knows: write one such as rand-m9-mstd0.5-inc1, or null."
            ) from error
    erasing = RandomErasing(erase, mode="pixel", device="cpu")
    here = Normalize(*normalize.values)  # the other one may be on a GPU, which workers have no part in

    def transform(image: Tensor) -> Tensor:
        pixels = crop(image)
        if policy and pixels.dtype == torch.uint8 and len(pixels) in (1, 3):  # what PIL knows
            pixels = v2.functional.pil_to_tensor(policy(v2.functional.to_pil_image(pixels)))
        return erasing(here(pixels))

    return transform


def eval_transform(size: Size, crop_pct: float = 1.0) -> Transform:
    """Scale until the input is covered, 1 / crop_pct times, and cut out its center."""

    def transform(image: Any) -> Any:
        height, width = v2.functional.get_size(image)
        scale = max(size[0] / height, size[1] / width) / crop_pct
        near = [math.ceil(8 * side / scale) for side in size]
        if height > near[0] or width > near[1]:  # a strip, such as 20,000 px by 3, whose ends would take gigabytes
            height, width = min(height, near[0]), min(width, near[1])
            image = v2.functional.center_crop(image, [height, width])
        scaled = [max(size[0], round(height * scale)), max(size[1], round(width * scale))]
        image = v2.functional.resize(image, scaled, InterpolationMode.BICUBIC, antialias=True)
        return v2.functional.center_crop(image, list(size))

    return transform


def checked_size(image: Any) -> Size:
    """(height, width) of an image that is to be looked at whole.

    Raises:
        ValueError: it is a strip: scaled by its short side it would fill the memory, by its long one nothing were left.
    """
    height, width = v2.functional.get_size(image)
    if max(height, width) > STRIP * min(height, width):
        raise ValueError(f"it is a strip of {height}x{width}, one side more than {STRIP} times the other: cut it up")
    return height, width


class Normalize(nn.Module):
    """(b c H W) uint8, or float32 in 0-1 -> what a network takes, computed where its buffers are."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.values = list(mean), list(std)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """(b c H W) -> (b c H W), float32"""
        if images.dtype == torch.uint8:  # one new tensor only: on a CPU, fetching memory costs more than the sums
            return images.float().div_(255).sub_(self.mean).div_(self.std)
        return (images - self.mean) / self.std


def default_normalization(in_chans: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> Normalize:
    """By the mean and deviation given, one for each channel or one for all; ImageNet's for RGB, else .5 and .25."""
    rgb = in_chans == 3
    values = {
        "mean": list(mean or (IMAGENET_DEFAULT_MEAN if rgb else [0.5])),
        "std": list(std or (IMAGENET_DEFAULT_STD if rgb else [0.25])),
    }
    for name, numbers in values.items():
        if len(numbers) not in (1, in_chans) or (name == "std" and min(numbers) <= 0):
            raise UserError(
                f"--{name} {numbers} does not fit {in_chans} channels: give one or {in_chans}, std above 0."
            )
        values[name] = numbers * (in_chans // len(numbers))
    return Normalize(**values)
