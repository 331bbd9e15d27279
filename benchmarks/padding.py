"""Measure what padding does to an image: compare its map at 1/16 with and without padding.

python benchmarks/padding.py
python benchmarks/padding.py --window 14
python benchmarks/padding.py --models FOLDER      written by mimkit convert

The photograph comes with matplotlib. Names in timm without a tag get random weights.
"""

import sys

import torch
import torch.nn.functional as F
from matplotlib.cbook import get_sample_data
from PIL import Image
from torchvision.transforms import v2

from mimkit.config import NonNegativeInt, call
from mimkit.data.transforms import parse_size
from mimkit.errors import cli_entry
from mimkit.models.factory import ANY_SIZE, input_of
from mimkit.models.feature_pyramid import Pyramid, takes_windows
from mimkit.models.pretrained import load_network


@torch.no_grad()
def measure(
    models: str = "vit_base_patch16_224,hpvit_b,hivit_b,svit_b",
    img_size: str = "448x672",
    padded_size: str = "512x768",
    window: NonNegativeInt = 0,
    seed: int = 0,
) -> None:
    """Print the norm of the difference over the image's own area, relative to the norm of the map without padding.

    Args:
        models: Names in timm, or folders, separated by commas.
        img_size: Size of the image in pixels: HEIGHTxWIDTH.
        padded_size: Size of the padded image in pixels: HEIGHTxWIDTH.
        window: Window side in tokens, as in recipes/segment.py. Networks with windows of their own ignore it.
        seed: Seed of random weights.
    """
    size, padded = parse_size(img_size), parse_size(padded_size)
    photograph = Image.open(get_sample_data("grace_hopper.jpg")).convert("RGB")
    cover = max(side / own for side, own in zip(size, (photograph.height, photograph.width), strict=True))
    image = photograph.resize((round(cover * photograph.width), round(cover * photograph.height)))
    pixels = v2.functional.pil_to_tensor(v2.functional.center_crop(image, list(size)))[None]
    print(f"{img_size} px padded to {padded_size}\n\n| backbone | window | difference |\n|---|---|---|")
    for name in models.split(","):
        torch.manual_seed(seed)
        backbone, description = load_network(name, **ANY_SIZE)
        normalize = input_of(backbone)[2]
        pyramid = Pyramid(backbone, window=window if takes_windows(backbone) else 0).eval()
        x = normalize(pixels)
        alone = pyramid(x)[2]
        height, width = alone.shape[-2:]
        padded_map = pyramid(F.pad(x, (0, padded[1] - size[1], 0, padded[0] - size[0])))[2][..., :height, :width]
        gap = (padded_map - alone).norm() / alone.norm()
        print(f"| {description} | {pyramid.window or ''} | {100 * gap:.2f} % |", flush=True)


if __name__ == "__main__":
    cli_entry(call)(measure, "padding.py", sys.argv[1:])
