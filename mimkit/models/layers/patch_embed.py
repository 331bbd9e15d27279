"""Resize patch-embedding kernels by the pseudo-inverse (FlexiViT, Beyer et al., CVPR 2023, section 3.4).

A kernel is resized such that a resized patch times the resized kernel equals the patch times the kernel. This is
exact for enlarging and a least-squares fit for shrinking. It is computed in float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mimkit.errors import UserError

KERNEL = "patch_embed.proj.weight"  # its name in timm's networks and in ours


def resize_matrix(old: int, new: int) -> Tensor:
    """Return the matrix (new*new old*old), float64, that resizes a flattened patch (bicubic with antialias)."""
    basis = torch.eye(old * old, dtype=torch.float64).view(-1, 1, old, old)
    return F.interpolate(basis, (new, new), mode="bicubic", antialias=True).flatten(1).T


def resize_kernel(kernel: Tensor, side: int) -> Tensor:
    """Resize a kernel to another patch side: (d c p p) -> (d c side side)."""
    old = kernel.shape[-1]
    if old == side:
        return kernel
    resized = kernel.double().flatten(2) @ torch.linalg.pinv(resize_matrix(old, side))
    return resized.view(*kernel.shape[:2], side, side).to(kernel.dtype)


def restore_kernel(kernel: Tensor, side: int) -> Tensor:
    """Invert an enlarging `resize_kernel`: (d c p p) -> (d c side side).

    The inverse is the product with the resize matrix itself. Resizing the kernel a second time would not undo it.

    Raises:
        UserError: the kernel was shrunk from `side`, so its original is lost.
    """
    new = kernel.shape[-1]
    if new == side:
        return kernel
    if side > new:
        raise UserError(
            f"A kernel of {side} px was shrunk to {new} px and cannot be restored: use the original checkpoint."
        )
    restored = kernel.double().flatten(2) @ resize_matrix(side, new)
    return restored.view(*kernel.shape[:2], side, side).to(kernel.dtype)
