"""Helpers that every figure uses."""

from pathlib import Path

import matplotlib as mpl
import torch
from einops import rearrange

mpl.use("Agg")
from matplotlib import pyplot as plt
from torch import Tensor

from mimkit.files import replacing_file


def show_image(picture: Tensor, axis: plt.Axes) -> None:
    """(c H W), of which three channels are shown, or one"""
    shown = picture[:3] if len(picture) >= 3 else picture[:1]
    axis.imshow(rearrange(shown, "c h w -> h w c"), cmap="gray", vmin=0, vmax=255 if shown.dtype == torch.uint8 else 1)
    axis.set_xticks([])
    axis.set_yticks([])


def save_figure(figure: plt.Figure, file: Path, bottom: float = 0.0) -> None:
    figure.tight_layout(rect=(0, bottom, 1, 1))
    with replacing_file(file) as temporary:
        figure.savefig(temporary, dpi=100)
    plt.close(figure)
