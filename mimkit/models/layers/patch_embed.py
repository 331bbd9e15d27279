"""Patch-embedding kernels of another size, by the pseudo-inverse (FlexiViT, Beyer et al., CVPR 2023, section 3.4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mimkit.errors import UserError

KERNEL = "patch_embed.proj.weight"  # its name in timm's networks and in ours


def resize_matrix(old: int, new: int) -> Tensor:
    """(new*new old*old), float64: how a patch of one side becomes a patch of another, bicubic with antialias."""
    basis = torch.eye(old * old, dtype=torch.float64).view(-1, 1, old, old)
    return F.interpolate(basis, (new, new), mode="bicubic", antialias=True).flatten(1).T


def resize_kernel(kernel: Tensor, side: int) -> Tensor:
    """(d c p p) -> (d c side side). When enlarging, resized kernel times resized patch is kernel times patch."""
    old = kernel.shape[-1]
    if old == side:
        return kernel
    resized = kernel.double().flatten(2) @ torch.linalg.pinv(resize_matrix(old, side))
    return resized.view(*kernel.shape[:2], side, side).to(kernel.dtype)


def restore_kernel(kernel: Tensor, side: int) -> Tensor:
    """The inverse of an enlarging `resize_kernel`: by the transpose of the resize, not by another resize."""
    new = kernel.shape[-1]
    if new == side:
        return kernel
    if side > new:
        raise UserError(f"A kernel of {side} px was shrunk to {new}, which lost some of it: take the original file.")
    restored = kernel.double().flatten(2) @ resize_matrix(side, new)
    return restored.view(*kernel.shape[:2], side, side).to(kernel.dtype)
