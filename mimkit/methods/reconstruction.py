"""Pictures of what a pre-training method reconstructs."""

from pathlib import Path

import torch
from einops import rearrange
from matplotlib import pyplot as plt
from torch import Tensor
from torchvision.utils import make_grid

from mimkit.data.transforms import Normalize
from mimkit.figures import save_figure, show_image
from mimkit.methods.mae import MAE
from mimkit.methods.simmim import SimMIM
from mimkit.units import Grid, UnitMask, gather, scatter, serialize, unit_grid, unserialize


def unnormalize_from_visible(prediction: Tensor, units: Tensor, mask: UnitMask, grid: Grid) -> Tensor:
    """Normalized predictions (b m p*q*c) -> pixels, by statistics that only visible units have a say in.

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
    """Network inputs (b c H W) -> (as given, masked units gray, masked units predicted), all (b c H W)"""
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
        prediction = unnormalize_from_visible(prediction, units, output.units, grid)
    filled = rearrange(prediction, "b m (p q c) -> b m c p q", p=p, q=p)
    hidden = scatter(torch.zeros_like(units), output.units.visible, gather(units, output.units.visible))
    made = scatter(hidden, output.units.masked, filled)
    return images, unserialize(hidden, grid), unserialize(made, grid)


def reconstructions(mae: MAE | SimMIM, images: Tensor, normalize: Normalize, file: Path) -> None:
    """Write a picture: original, masked, reconstruction, a row for each; channels beyond three are left out."""
    rows = [(x * normalize.std + normalize.mean).clamp(0, 1).cpu() for x in reconstruct(mae, images)]
    how = (
        "predictions are normalized:\nbrightness and contrast come from visible units only"
        if mae.norm_targets
        else "pixels as predicted"
    )
    names = ("original", f"masked ({mae.mask_ratio:.0%})", "reconstruction")
    height = images.shape[-2]
    gap = max(1, height // 28)
    figure, axis = plt.subplots(figsize=(max(5.0, 1.5 * len(images) + 0.6), 5.4))
    show_image(make_grid(torch.cat(rows), len(images), gap, pad_value=1), axis)
    axis.set_yticks([gap + height / 2 + i * (height + gap) for i in range(3)], names, rotation=90, va="center")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.suptitle(f"Reconstruction, {how}", fontsize=9)
    save_figure(figure, file)
