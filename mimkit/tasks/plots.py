"""Pictures: what a masked autoencoder sees and makes of it, and how its training went."""

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from matplotlib import pyplot as plt
from torch import Tensor
from torchvision.utils import draw_segmentation_masks

from mimkit.figures import save_figure, show_image


def confusions(confusion: Tensor, names: list[str], file: Path) -> None:
    """Write a picture of how many images of a class (row) were taken for which, in %, labeled up to 40 classes."""
    share = 100 * confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    side = min(12.0, 2.5 + 0.45 * len(names))
    figure, axis = plt.subplots(figsize=(side + 1, side))
    shown = axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(shown, label="% of the class", fraction=0.046)
    axis.set(xlabel="taken for", ylabel="class", xticks=[], yticks=[])
    if len(names) <= 40:
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.set_yticks(range(len(names)), names)
    if len(names) <= 20:
        for row, column in (share >= 0.5).nonzero().tolist():
            value = float(share[row, column])
            color = "white" if value > 50 else "black"
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=8)
    save_figure(figure, file)


def palette(classes: int) -> np.ndarray[Any, Any]:
    """Colors that are told apart (classes 3), uint8; neighboring numbers lie far apart on the color circle."""
    turns = ((i * 0.618034 % 1, 0.85 - 0.3 * (i % 2), 0.95 - 0.25 * (i % 3 == 2)) for i in range(classes))
    return np.array([[round(255 * x) for x in colorsys.hsv_to_rgb(*turn)] for turn in turns], dtype=np.uint8)


def segmentations(shown: Sequence[tuple[Tensor, Tensor, Tensor]], names: list[str], file: Path) -> None:
    """Write a picture: images (c H W), what their masks say and what was predicted (h w), a row for each."""
    colors = np.concatenate([palette(len(names)), np.full((256 - len(names), 3), 255, np.uint8)])
    rows = [[image for image, _, _ in shown]]
    rows += [[torch.from_numpy(rearrange(colors[triple[i]], "h w c -> c h w")) for triple in shown] for i in (1, 2)]
    figure, axes = plt.subplots(3, len(shown), figsize=(max(5.0, 1.8 * len(shown) + 0.6), 6.2), squeeze=False)
    for name, pictures, line in zip(("image", "its mask", "predicted"), rows, axes, strict=True):
        for picture, axis in zip(pictures, line, strict=True):
            show_image(picture, axis)
        line[0].set_ylabel(name)
    known = sorted({int(i) for triple in shown for mask in triple[1:] for i in mask.unique() if i < len(names)})
    handles = [plt.Rectangle((0, 0), 1, 1, color=colors[i] / 255) for i in known[:24]]
    figure.legend(handles, [names[i] for i in known[:24]], loc="lower center", ncols=8, fontsize=8)
    save_figure(figure, file, bottom=0.06 + 0.04 * (len(handles) // 8))


def detections(shown: Sequence[tuple[Tensor, Any, Any]], names: list[str], file: Path) -> None:
    """Write a picture: images (c H W) with the objects in them, above the same with what was found.

    Both are torchvision's: boxes (n 4), labels (n) from 1, masks (n H W) or (n 1 H W), if any, and scores (n), if any.
    """
    colors = [tuple(color) for color in palette(len(names)).tolist()]
    figure, axes = plt.subplots(2, len(shown), figsize=(max(5.0, 2.6 * len(shown) + 0.6), 5.6), squeeze=False)
    for (image, *both), column in zip(shown, axes.T, strict=True):
        gray = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
        picture = gray if gray.dtype == torch.uint8 else (255 * gray).clamp(0, 255).byte()
        for objects, axis in zip(both, column, strict=True):
            drawn, chosen = picture, [colors[label - 1] for label in objects["labels"].tolist()]
            if "masks" in objects and chosen:
                masks = objects["masks"].flatten(0, -3) > 0.5
                for mask, color in zip(masks, chosen, strict=True):  # at once, what two of them share would be black
                    drawn = draw_segmentation_masks(drawn, mask, alpha=0.5, colors=[color])
            show_image(drawn, axis)
            scores = objects["scores"].tolist() if "scores" in objects else [None] * len(chosen)
            known = zip(objects["boxes"].tolist(), objects["labels"].tolist(), scores, chosen, strict=True)
            for (left, top, right, bottom), label, score, color in known:
                shade = [value / 255 for value in color]
                axis.add_patch(plt.Rectangle((left, top), right - left, bottom - top, fill=False, color=shade))
                text = names[label - 1] + (f" {score:.2f}" if score is not None else "")
                axis.text(left, top, text, fontsize=6, va="bottom", color="black", backgroundcolor=(*shade, 0.7))
    axes[0, 0].set_ylabel("its objects")
    axes[1, 0].set_ylabel("found")
    save_figure(figure, file)
