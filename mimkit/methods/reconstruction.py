"""Reconstructions: pictures of what a pre-training method predicts for masked units."""

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from mimkit.data.transforms import Normalize
from mimkit.figures import new_figure, save_figure, show_image
from mimkit.methods.protocols import Method
from mimkit.units import Grid, UnitMask, gather, scatter, serialize, unit_grid, unserialize


def unnormalize_from_visible(prediction: Tensor, units: Tensor, mask: UnitMask, grid: Grid) -> Tensor:
    """Normalized predictions (b m p*q*c), units (b n c p p), their grid (gh gw) -> pixels (b m p*q*c)

    The mean and the standard deviation of a masked unit are estimated from visible units only: they are averages,
    weighted by the inverse fourth power of the distance in the grid.
    """
    visible = gather(units, mask.visible).flatten(2)
    var, mean = torch.var_mean(visible, dim=-1)
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    positions = torch.stack([rows.flatten(), columns.flatten()], -1).to(prediction)[None]
    distance = torch.cdist(gather(positions, mask.masked), gather(positions, mask.visible))
    weight = distance**-4 / (distance**-4).sum(-1, keepdim=True)  # (b m v)
    mean, std = (weight @ x[..., None] for x in (mean, var.sqrt()))
    return prediction * std + mean


@torch.no_grad()
def reconstruct(method: Method, images: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Normalized images (b c H W) -> images, images with masked units gray, reconstructions, all (b c H W)

    Args:
        method: the method. It runs in evaluation mode; its mode is restored.
        images: the input of the network.
        seed: of the mask.
    """
    training = method.training
    method.train(False)
    output = method(images, generator=torch.Generator().manual_seed(seed))
    method.train(training)
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
    """Draw original images, masked images and reconstructions into a file, one row each.

    Args:
        method: the method.
        images: images (b c H W), as the network receives them. Only the first three channels are drawn.
        normalize: the normalization of the images, which is undone.
        file: where to write the picture.
    """
    from torchvision.utils import make_grid

    rows = [(x * normalize.std + normalize.mean).clamp(0, 1).cpu() for x in reconstruct(method, images)]
    explanation = (
        "predictions are normalized:\nbrightness and contrast come from visible units only"
        if method.norm_targets
        else "pixels as predicted"
    )
    names = ("original", f"masked ({method.mask_ratio:.0%})", "reconstruction")
    height = images.shape[-2]
    gap = max(1, height // 28)
    figure, ((axis,),) = new_figure((max(5.0, 1.5 * len(images) + 0.6), 5.4))
    show_image(make_grid(torch.cat(rows), len(images), gap, pad_value=1), axis)
    axis.set_yticks([gap + height / 2 + i * (height + gap) for i in range(3)], names, rotation=90, va="center")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.suptitle(f"Reconstruction, {explanation}", fontsize=9)
    save_figure(figure, file)
