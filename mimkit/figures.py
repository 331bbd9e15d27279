"""Figures: matplotlib without a display, images in axes, and atomic writes."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from mimkit.files import replacing_file


@contextmanager
def any_backend() -> Iterator[None]:
    """Import matplotlib inside, or what imports it, whatever MPLBACKEND says.

    A notebook exports a backend of its own to all commands, and matplotlib cannot be imported where that is missing.
    """
    imported, backend = "matplotlib" in sys.modules, os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
            if not imported and "matplotlib" in sys.modules:  # what it would have read, for the user's own figures
                with suppress(ValueError):  # the backend is missing
                    sys.modules["matplotlib"].rcParams["backend"] = backend


def new_figure(size: tuple[float, float], rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """Return a figure that is drawn to a file, and its axes (rows columns).

    It leaves pyplot alone, which belongs to the user.

    Args:
        size: width and height, in inches.
    """
    with any_backend():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def show_image(image: Tensor, axis: Any) -> None:
    """Show an image (c H W) in an axis: its first three channels, or its first one."""
    shown = image[:3] if len(image) >= 3 else image[:1]
    axis.imshow(rearrange(shown, "c h w -> h w c"), cmap="gray", vmin=0, vmax=255 if shown.dtype == torch.uint8 else 1)
    axis.set_xticks([])
    axis.set_yticks([])


def save_figure(figure: Any, file: Path, bottom: float = 0.0) -> None:
    """Write a figure atomically.

    Args:
        bottom: fraction of the height to leave free at the bottom.
    """
    figure.tight_layout(rect=(0, bottom, 1, 1))
    with replacing_file(file) as temporary:
        figure.savefig(temporary, dpi=100)
