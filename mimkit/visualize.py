"""Pictures: what a masked autoencoder sees and makes of it, and how its training went."""

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torchvision.utils import draw_segmentation_masks, make_grid

mpl.use("Agg")
from matplotlib import pyplot as plt

from mimkit.checkpoint import replacing_file
from mimkit.data import Normalise
from mimkit.mae import MAE
from mimkit.simmim import SimMIM
from mimkit.units import Grid, UnitMask, gather, scatter, serialize, unit_grid, unserialize


def unnormalise_from_visible(prediction: Tensor, units: Tensor, mask: UnitMask, grid: Grid) -> Tensor:
    """Normalised predictions (b m p*q*c) -> pixels, by statistics that only visible units have a say in.

    Mean and deviation of a masked unit are an average over the visible ones (b n c p p is read at `mask.visible` only),
    weighted by the inverse fourth power of their distance in the grid.
    """
    visible = gather(units, mask.visible).flatten(2)
    var, mean = torch.var_mean(visible, dim=-1)
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], -1).to(prediction)[None]
    distance = torch.cdist(gather(places, mask.masked), gather(places, mask.visible))
    weight = distance**-4 / (distance**-4).sum(-1, keepdim=True)  # (b m v)
    mean, deviation = (weight @ x[..., None] for x in (mean, var.sqrt()))
    return prediction * deviation + mean


@torch.no_grad()
def reconstruct(mae: MAE | SimMIM, images: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Network inputs (b c H W) -> (as given, masked units grey, masked units predicted), all (b c H W)"""
    training = mae.training
    mae.eval()
    generator = torch.Generator().manual_seed(seed)
    output = mae(images, generator=generator)
    mae.train(training)
    p = mae.encoder.unit_size
    grid = unit_grid(images.shape[-2], images.shape[-1], p)
    units = serialize(images, p)
    prediction = output.prediction.float()
    if mae.norm_targets:
        prediction = unnormalise_from_visible(prediction, units, output.units, grid)
    filled = rearrange(prediction, "b m (p q c) -> b m c p q", p=p, q=p)
    hidden = scatter(torch.zeros_like(units), output.units.visible, gather(units, output.units.visible))
    made = scatter(hidden, output.units.masked, filled)
    return images, unserialize(hidden, grid), unserialize(made, grid)


def reconstructions(mae: MAE | SimMIM, images: Tensor, normalise: Normalise, file: Path) -> None:
    """Write a picture: original, masked, reconstruction, a row for each; channels beyond three are left out."""
    rows = [(x * normalise.std + normalise.mean).clamp(0, 1).cpu() for x in reconstruct(mae, images)]
    how = (
        "predictions are normalised:\nbrightness and contrast come from visible units only"
        if mae.norm_targets
        else "pixels as predicted"
    )
    names = ("original", f"masked ({mae.mask_ratio:.0%})", "reconstruction")
    height = images.shape[-2]
    gap = max(1, height // 28)
    figure, axis = plt.subplots(figsize=(max(5.0, 1.5 * len(images) + 0.6), 5.4))
    _show(make_grid(torch.cat(rows), len(images), gap, pad_value=1), axis)
    axis.set_yticks([gap + height / 2 + i * (height + gap) for i in range(3)], names, rotation=90, va="center")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.suptitle(f"Reconstruction, {how}", fontsize=9)
    _write(figure, file)


def curves(metrics: list[dict[str, float]], file: Path) -> None:
    """Write a picture of the loss, the learning rate and what accuracy was measured."""
    titles = {
        "knn_10": "kNN accuracy, % (k = 10)",
        "top1": "top-1 accuracy, %",
        "miou": "mIoU, %",
        "box_ap": "box AP, %",
    }
    names = [n for n in ("loss", "lr", *titles) if any(n in line for line in metrics)]
    figure, axes = plt.subplots(1, max(1, len(names)), figsize=(4 * max(1, len(names)), 3), squeeze=False)
    for name, axis in zip(names, axes[0], strict=False):
        points = [(line["step"], line[name]) for line in metrics if name in line]
        axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 10 else None)
        axis.set_title(titles.get(name, name))
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    _write(figure, file)


def confusions(confusion: Tensor, names: list[str], file: Path) -> None:
    """Write a picture of how many images of a class (row) were taken for which, in %, labelled up to 40 classes."""
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
            colour = "white" if value > 50 else "black"
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    _write(figure, file)


def palette(classes: int) -> np.ndarray[Any, Any]:
    """Colours that are told apart (classes 3), uint8; neighbouring numbers lie far apart on the colour circle."""
    turns = ((i * 0.618034 % 1, 0.85 - 0.3 * (i % 2), 0.95 - 0.25 * (i % 3 == 2)) for i in range(classes))
    return np.array([[round(255 * x) for x in colorsys.hsv_to_rgb(*turn)] for turn in turns], dtype=np.uint8)


def segmentations(shown: Sequence[tuple[Tensor, Tensor, Tensor]], names: list[str], file: Path) -> None:
    """Write a picture: images (c H W), what their masks say and what was predicted (h w), a row for each."""
    colours = np.concatenate([palette(len(names)), np.full((256 - len(names), 3), 255, np.uint8)])
    rows = [[image for image, _, _ in shown]]
    rows += [[torch.from_numpy(rearrange(colours[triple[i]], "h w c -> c h w")) for triple in shown] for i in (1, 2)]
    figure, axes = plt.subplots(3, len(shown), figsize=(max(5.0, 1.8 * len(shown) + 0.6), 6.2), squeeze=False)
    for name, pictures, line in zip(("image", "its mask", "predicted"), rows, axes, strict=True):
        for picture, axis in zip(pictures, line, strict=True):
            _show(picture, axis)
        line[0].set_ylabel(name)
    known = sorted({int(i) for triple in shown for mask in triple[1:] for i in mask.unique() if i < len(names)})
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[i] / 255) for i in known[:24]]
    figure.legend(handles, [names[i] for i in known[:24]], loc="lower center", ncols=8, fontsize=8)
    _write(figure, file, bottom=0.06 + 0.04 * (len(handles) // 8))


def detections(shown: Sequence[tuple[Tensor, Any, Any]], names: list[str], file: Path) -> None:
    """Write a picture: images (c H W) with the objects in them, above the same with what was found.

    Both are torchvision's: boxes (n 4), labels (n) from 1, masks (n H W) or (n 1 H W), if any, and scores (n), if any.
    """
    colours = [tuple(colour) for colour in palette(len(names)).tolist()]
    figure, axes = plt.subplots(2, len(shown), figsize=(max(5.0, 2.6 * len(shown) + 0.6), 5.6), squeeze=False)
    for (image, *both), column in zip(shown, axes.T, strict=True):
        grey = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
        picture = grey if grey.dtype == torch.uint8 else (255 * grey).clamp(0, 255).byte()
        for objects, axis in zip(both, column, strict=True):
            drawn, chosen = picture, [colours[label - 1] for label in objects["labels"].tolist()]
            if "masks" in objects and chosen:
                masks = objects["masks"].flatten(0, -3) > 0.5
                for mask, colour in zip(masks, chosen, strict=True):  # at once, what two of them share would be black
                    drawn = draw_segmentation_masks(drawn, mask, alpha=0.5, colors=[colour])
            _show(drawn, axis)
            scores = objects["scores"].tolist() if "scores" in objects else [None] * len(chosen)
            known = zip(objects["boxes"].tolist(), objects["labels"].tolist(), scores, chosen, strict=True)
            for (left, top, right, bottom), label, score, colour in known:
                shade = [value / 255 for value in colour]
                axis.add_patch(plt.Rectangle((left, top), right - left, bottom - top, fill=False, color=shade))
                text = names[label - 1] + (f" {score:.2f}" if score is not None else "")
                axis.text(left, top, text, fontsize=6, va="bottom", color="black", backgroundcolor=(*shade, 0.7))
    axes[0, 0].set_ylabel("its objects")
    axes[1, 0].set_ylabel("found")
    _write(figure, file)


def _show(picture: Tensor, axis: plt.Axes) -> None:
    """(c H W), of which three channels are shown, or one"""
    shown = picture[:3] if len(picture) >= 3 else picture[:1]
    axis.imshow(rearrange(shown, "c h w -> h w c"), cmap="gray", vmin=0, vmax=255 if shown.dtype == torch.uint8 else 1)
    axis.set_xticks([])
    axis.set_yticks([])


def _write(figure: plt.Figure, file: Path, bottom: float = 0.0) -> None:
    figure.tight_layout(rect=(0, bottom, 1, 1))
    with replacing_file(file) as temporary:
        figure.savefig(temporary, dpi=100)
    plt.close(figure)
