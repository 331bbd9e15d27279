"""Reconstructions: what a pre-training method predicts for masked units, as pictures."""

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from mimkit.data.transforms import Normalize
from mimkit.figures import pyplot, save_figure, show_image
from mimkit.methods.protocols import Method
from mimkit.units import Grid, UnitMask, gather, scatter, serialize, unit_grid, unserialize


def unnormalize_from_visible(prediction: Tensor, units: Tensor, mask: UnitMask, grid: Grid) -> Tensor:
    """Normalized predictions (b m p*q*c), units (b n c p p) -> pixels (b m p*q*c), from visible units alone.

    Mean and deviation of a masked unit are averages over the visible units (`units` is read at `mask.visible` only),
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
def reconstruct(method: Method, images: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Network inputs (b c H W) -> (the same, with masked units gray, with masked units predicted), all (b c H W)"""
    module: torch.nn.Module = method  # type: ignore[assignment]
    training = module.training
    module.eval()
    output = method(images, generator=torch.Generator().manual_seed(seed))
    module.train(training)
    p = method.encoder.unit_size
    grid = unit_grid(images.shape[-2], images.shape[-1], p)
    units = serialize(images, p)
    prediction = output.prediction.float()
    if method.norm_targets:
        prediction = unnormalize_from_visible(prediction, units, output.units, grid)
    pixels = rearrange(prediction, "b m (p q c) -> b m c p q", p=p, q=p)
    visible = scatter(torch.zeros_like(units), output.units.visible, gather(units, output.units.visible))
    filled = scatter(visible, output.units.masked, pixels)
    return images, unserialize(visible, grid), unserialize(filled, grid)


def reconstructions(method: Method, images: Tensor, normalize: Normalize, file: Path) -> None:
    """Draw original, masked and reconstructed images (b c H W), one row each. Channels beyond three are not shown."""
    from torchvision.utils import make_grid

    rows = [(x * normalize.std + normalize.mean).clamp(0, 1).cpu() for x in reconstruct(method, images)]
    how = (
        "predictions are normalized:\nbrightness and contrast come from visible units only"
        if method.norm_targets
        else "pixels as predicted"
    )
    names = ("original", f"masked ({method.mask_ratio:.0%})", "reconstruction")
    height = images.shape[-2]
    gap = max(1, height // 28)
    figure, axis = pyplot().subplots(figsize=(max(5.0, 1.5 * len(images) + 0.6), 5.4))
    show_image(make_grid(torch.cat(rows), len(images), gap, pad_value=1), axis)
    axis.set_yticks([gap + height / 2 + i * (height + gap) for i in range(3)], names, rotation=90, va="center")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.suptitle(f"Reconstruction, {how}", fontsize=9)
    save_figure(figure, file)
