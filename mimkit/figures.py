"""Figures: matplotlib without a display, images in axes, and atomic writes."""

from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from mimkit.files import replacing_file


def pyplot() -> Any:
    """Import matplotlib.pyplot, set up to draw without a display."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def show_image(image: Tensor, axis: Any) -> None:
    """Show an image (c H W) in an axis: its first three channels, or its first one."""
    shown = image[:3] if len(image) >= 3 else image[:1]
    axis.imshow(rearrange(shown, "c h w -> h w c"), cmap="gray", vmin=0, vmax=255 if shown.dtype == torch.uint8 else 1)
    axis.set_xticks([])
    axis.set_yticks([])


def save_figure(figure: Any, file: Path, bottom: float = 0.0) -> None:
    """Write a figure atomically and close it.

    Args:
        bottom: fraction of the height to leave free at the bottom.
    """
    figure.tight_layout(rect=(0, bottom, 1, 1))
    with replacing_file(file) as temporary:
        figure.savefig(temporary, dpi=100)
    pyplot().close(figure)
