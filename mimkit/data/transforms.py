"""Image transforms for training and evaluation; segmentation.py and detection.py have those of their own."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import transforms_imagenet_eval
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from mimkit.errors import UserError

Size = tuple[int, int]
Transform = Callable[..., Any]
MAX_ASPECT = 20  # ratio of the sides above which an image is rejected where all of it must be shown


def parse_size(size: int | str) -> Size:
    """Parse an image size, such as 224, '224' or '256x512' (height x width), to (height, width)."""
    sides = str(size).lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise UserError(f"The image size {size!r} is neither a number nor HEIGHTxWIDTH: write 224 or 256x512.")
    return int(sides[0]), int(sides[-1])


def train_transform(size: Size, scale: tuple[float, float] = (0.2, 1.0)) -> Transform:
    """Return the augmentation of pre-training: random resized crop (bicubic) and horizontal flip.

    This is the augmentation of MAE (He et al., 2022, appendix A.1).

    Args:
        size: (H, W) of the result.
        scale: range of the fraction of the image's area that a crop covers.

    Returns:
        a function from an image (c h w) to a crop (c H W).

    Raises:
        UserError: `scale` is not a range within 0 and 1.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise UserError(
            f"--crop-scale {list(scale)} is no range of fractions: give two numbers between 0 and 1, like 0.2,1."
        )
    return partial(crop_and_flip, size=size, scale=scale)


def crop_and_flip(image: Tensor, size: Size, scale: tuple[float, float]) -> Tensor:
    """Crop an image (c h w) at random, resize the crop to (c H W), and flip it with probability 1/2.

    For the same state of torch's generator, the crop and the flip are those of torchvision's `RandomResizedCrop` and
    `RandomHorizontalFlip`, but this function is faster (benchmarks/loader.md).
    """
    top, left, height, width = draw_box(image.shape[-2], image.shape[-1], scale)
    box = image[:, top : top + height, left : left + width]
    box = box.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # torch resizes channels-last images much faster
    resized = v2.functional.resize(box, list(size), InterpolationMode.BICUBIC, antialias=True)
    return resized.flip(-1) if torch.rand(1) < 0.5 else resized


def draw_box(height: int, width: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Draw the (top, left, height, width) of a random crop (Szegedy et al., CVPR 2015).

    The fraction of the area is uniform in `scale`, and the aspect ratio is log-uniform between 3/4 and 4/3. If ten
    draws do not fit into the image, return its center.
    """
    narrow, wide = 3 / 4, 4 / 3
    for _ in range(10):
        area = height * width * torch.empty(1).uniform_(*scale).item()
        aspect = torch.exp(torch.empty(1).uniform_(math.log(narrow), math.log(wide))).item()
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(torch.randint(height - h + 1, (1,))), int(torch.randint(width - w + 1, (1,))), h, w
    h, w = min(height, round(width / narrow)), min(width, round(height * wide))
    return (height - h) // 2, (width - w) // 2, h, w


def finetune_transform(
    size: Size, scale: tuple[float, float], augment: str | None, erase: float, normalize: "Normalize"
) -> Transform:
    """Return the augmentation of fine-tuning: crop and flip, then timm's RandAugment, then random erasing.

    The result is normalized: it is the input of a network.

    Args:
        size: (H, W) of the result.
        scale: range of the fraction of the image's area that a crop covers.
        augment: timm's name of an augmentation policy, such as rand-m9-mstd0.5-inc1, or None.
        erase: probability that a region of an image is replaced by noise.
        normalize: applied before random erasing, whose noise has a standard deviation of 1.

    Raises:
        UserError: timm does not know the policy, or `scale` is not a range within 0 and 1.
    """
    crop = train_transform(size, scale)
    policy: Any = None
    if augment:
        fill = tuple(round(255 * mean) for mean in normalize.values[0])
        params: dict[str, Any] = {"translate_const": int(min(size) * 0.45), "interpolation": Image.Resampling.BICUBIC}
        params["img_mean"] = fill if len(fill) > 1 else fill[0]
        make = rand_augment_transform if augment.startswith("rand") else auto_augment_transform
        try:
            policy = make(augment, params)
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise UserError(
                f"--aa {augment} is no policy that timm knows: write one such as rand-m9-mstd0.5-inc1, or null."
            ) from error
    erasing = RandomErasing(erase, mode="pixel", device="cpu")
    normalize_on_cpu = Normalize(*normalize.values)  # `normalize` may be on a GPU, which data workers must not use

    def transform(image: Tensor) -> Tensor:
        pixels = crop(image)
        if policy and pixels.dtype == torch.uint8 and len(pixels) in (1, 3):  # the policies need a PIL image
            pixels = v2.functional.pil_to_tensor(policy(v2.functional.to_pil_image(pixels)))
        return erasing(normalize_on_cpu(pixels))

    return transform


def eval_transform(
    size: Size,
    crop_pct: float = 1.0,
    crop_mode: str = "center",
    interpolation: str = "bicubic",
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
) -> Transform:
    """Return timm's transform of evaluation, which other programs apply to a network of a timm folder too.

    The transform takes PIL images and tensors (c h w), and returns the same kind.

    Args:
        size: (H, W) of the result.
        crop_pct: ratio of `size` to the size that an image is resized to.
        crop_mode: center (the image covers that size, and its center is cut out), squash (it is resized to that size,
            whatever its aspect ratio), or border (it is resized to fit, and padded with `mean`).
        interpolation: name of the filter: bicubic, bilinear, ...
        mean: color of the border, in 0-1.
    """
    how: Any = {"crop_pct": crop_pct, "crop_mode": crop_mode, "interpolation": interpolation, "mean": tuple(mean)}
    steps = transforms_imagenet_eval(size, **how, normalize=False).transforms
    resize_and_crop = v2.Compose(steps[:-1])  # without the conversion to a tensor

    def transform(image: Any) -> Any:
        height, width = v2.functional.get_size(image)
        scale = max(size[0] / height, size[1] / width) / crop_pct
        longest = [math.ceil(8 * side / scale) for side in size]
        # resizing all of 20,000 x 3 pixels would take gigabytes
        if crop_mode == "center" and (height > longest[0] or width > longest[1]):
            image = v2.functional.center_crop(image, [min(height, longest[0]), min(width, longest[1])])
        return resize_and_crop(image)

    return transform


def resize_short(image: Any, size: Size, short: float) -> Any:
    """Resize an image of `size` (height, width) so that its short side has `short` pixels."""
    scale = short / min(size)
    resized = [max(1, round(side * scale)) for side in size]
    return v2.functional.resize(image, resized, InterpolationMode.BILINEAR, antialias=True)


def checked_size(image: Any) -> Size:
    """Return the (height, width) of an image that segmentation or detection processes without cropping.

    Raises:
        ValueError: one side is more than `MAX_ASPECT` times the other. Resized by its short side, such an image would
            fill the memory; resized by its long side, nothing of it would be left.
    """
    height, width = v2.functional.get_size(image)
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(
            f"it is a strip of {height}x{width}, one side more than {MAX_ASPECT} times the other: cut it up"
        )
    return height, width


class Normalize(nn.Module):
    """Normalize images, uint8 or float32 in 0-1, by mean and standard deviation, on the device of its buffers."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.values = list(mean), list(std)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Return images (b c H W) normalized, as float32 (b c H W)."""
        if images.dtype == torch.uint8:  # in place: on a CPU, allocating memory takes longer than the arithmetic
            return images.float().div_(255).sub_(self.mean).div_(self.std)
        return (images - self.mean) / self.std


def default_normalization(in_chans: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> Normalize:
    """Return the normalization by `mean` and `std`; by default ImageNet's for 3 channels, else 0.5 and 0.25.

    Args:
        in_chans: number of channels.
        mean, std: one value for each channel, or one value for all.

    Raises:
        UserError: there is another number of values, or a standard deviation is not above 0.
    """
    rgb = in_chans == 3
    values = {
        "mean": list(mean or (IMAGENET_DEFAULT_MEAN if rgb else [0.5])),
        "std": list(std or (IMAGENET_DEFAULT_STD if rgb else [0.25])),
    }
    for name, numbers in values.items():
        if len(numbers) not in (1, in_chans) or (name == "std" and min(numbers) <= 0):
            raise UserError(
                f"--{name} {numbers} does not fit {in_chans} channels: give 1 or {in_chans} numbers, for --std above 0."
            )
        values[name] = numbers * (in_chans // len(numbers))
    return Normalize(**values)
