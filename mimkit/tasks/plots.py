"""Pictures of evaluated networks: confusion matrices, predicted masks, and detected objects."""

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torchvision.utils import draw_segmentation_masks

from mimkit.figures import new_figure, save_figure, show_image


def plot_confusion(confusion: Tensor, names: list[str], file: Path) -> None:
    """Draw a confusion matrix in % of each true class (row). Up to 40 classes are labeled.

    Args:
        confusion: number of images by true class and predicted class (classes classes).
        names: names of the classes.
        file: picture to write.
    """
    percent = 100 * confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    side = min(12.0, 2.5 + 0.45 * len(names))
    figure, ((axis,),) = new_figure((side + 1, side))
    matrix = axis.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(matrix, label="% of the true class", fraction=0.046)
    axis.set(xlabel="predicted class", ylabel="true class", xticks=[], yticks=[])
    if len(names) <= 40:
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.set_yticks(range(len(names)), names)
    if len(names) <= 20:
        for row, column in (percent >= 0.5).nonzero().tolist():
            value = float(percent[row, column])
            color = "white" if value > 50 else "black"
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=8)
    save_figure(figure, file)


def palette(classes: int) -> np.ndarray[Any, Any]:
    """Return a distinct color for each class (classes 3), uint8. Consecutive colors have very different hues."""
    hues = ((i * 0.618034 % 1, 0.85 - 0.3 * (i % 2), 0.95 - 0.25 * (i % 3 == 2)) for i in range(classes))
    return np.array([[round(255 * x) for x in colorsys.hsv_to_rgb(*hue)] for hue in hues], dtype=np.uint8)


def plot_segmentations(examples: Sequence[tuple[Tensor, Tensor, Tensor]], names: list[str], file: Path) -> None:
    """Draw images above their masks and the predicted masks, one column for each image.

    Args:
        examples: images (c H W), masks (h w) and predicted masks (h w).
        names: names of the classes.
        file: picture to write.
    """
    colors = np.concatenate([palette(len(names)), np.full((256 - len(names), 3), 255, np.uint8)])
    rows = [[image for image, _, _ in examples]]
    rows += [[torch.from_numpy(rearrange(colors[item[i]], "h w c -> c h w")) for item in examples] for i in (1, 2)]
    figure, axes = new_figure((max(5.0, 1.8 * len(examples) + 0.6), 6.2), 3, len(examples))
    from matplotlib.patches import Rectangle

    for title, pictures, line in zip(("image", "mask", "prediction"), rows, axes, strict=True):
        for picture, axis in zip(pictures, line, strict=True):
            show_image(picture, axis)
        line[0].set_ylabel(title)
    present = sorted({int(i) for item in examples for mask in item[1:] for i in mask.unique() if i < len(names)})[:24]
    handles = [Rectangle((0, 0), 1, 1, color=colors[i] / 255) for i in present]
    figure.legend(handles, [names[i] for i in present], loc="lower center", ncols=8, fontsize=8)
    save_figure(figure, file, bottom=0.06 + 0.04 * (len(handles) // 8))


def plot_detections(examples: Sequence[tuple[Tensor, Any, Any]], names: list[str], file: Path) -> None:
    """Draw images with their objects above the same images with the detected objects, one column for each image.

    Args:
        examples: images (c H W), their objects and the detected ones. Objects are torchvision's: boxes (n 4), labels
            (n) from 1, perhaps masks (n H W) or (n 1 H W), and perhaps scores (n).
        names: names of the classes.
        file: picture to write.
    """
    colors = [tuple(color) for color in palette(len(names)).tolist()]
    figure, axes = new_figure((max(5.0, 2.6 * len(examples) + 0.6), 5.6), 2, len(examples))
    from matplotlib.patches import Rectangle

    for (image, *both), column in zip(examples, axes.T, strict=True):
        rgb = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
        picture = rgb if rgb.dtype == torch.uint8 else (255 * rgb).clamp(0, 255).byte()
        for objects, axis in zip(both, column, strict=True):
            drawn, shades = picture, [colors[label - 1] for label in objects["labels"].tolist()]
            if "masks" in objects and shades:
                masks = objects["masks"].flatten(0, -3) > 0.5
                for mask, shade in zip(masks, shades, strict=True):  # all at once, their intersections would be black
                    drawn = draw_segmentation_masks(drawn, mask, alpha=0.5, colors=[shade])
            show_image(drawn, axis)
            scores = objects["scores"].tolist() if "scores" in objects else [None] * len(shades)
            boxes = zip(objects["boxes"].tolist(), objects["labels"].tolist(), scores, shades, strict=True)
            for (left, top, right, bottom), label, score, shade in boxes:
                color = [value / 255 for value in shade]
                axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=color))
                text = names[label - 1] + (f" {score:.2f}" if score is not None else "")
                label_box(axis, picture.shape[-2:], (left, top, right), text, color)
    axes[0, 0].set_ylabel("objects")
    axes[1, 0].set_ylabel("detections")
    save_figure(figure, file)


def label_box(axis: Any, size: Sequence[int], box: tuple[float, float, float], text: str, color: list[float]) -> None:
    """Write the label of a box above it, or inside at the top of the image; in its right half, to the left.

    What is too long for the image is cut at its frame.

    Args:
        size: height and width of the image.
        box: left, top and right of the box.
    """
    height, width = size
    left, top, right = (min(max(value, 0), end) for value, end in zip(box, (width, height, width), strict=True))
    on_right, at_top = left + right > width, top < height / 6
    axis.text(
        right if on_right else left,
        top,
        text,
        fontsize=6,
        ha="right" if on_right else "left",
        va="top" if at_top else "bottom",
        bbox={"facecolor": (*color, 0.7), "edgecolor": "none", "pad": 1},
        clip_on=True,
    )
