"""Targets: what a pre-training method predicts for a unit."""

from dataclasses import dataclass
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from mimkit.units import gather


class Target(Protocol):
    """What a method predicts. It receives whole images, so it may compute the features of another network."""

    def __call__(self, images: Tensor, units: Tensor, index: Tensor) -> Tensor:
        """Images (b c H W), their units (b n c p p), indices of units to predict (b m) -> target (b m x)"""


@dataclass(frozen=True)
class Pixels:
    """The pixels of a unit.

    Args:
        norm: normalize each unit to mean 0 and variance 1 (MAE, section 3).
    """

    norm: bool = True

    def __call__(self, images: Tensor, units: Tensor, index: Tensor) -> Tensor:
        """Images (b c H W), their units (b n c p p), indices of units to predict (b m) -> pixels (b m p*q*c)"""
        target = unit_pixels(gather(units, index))
        return normalize_units(target) if self.norm else target


def unit_pixels(units: Tensor) -> Tensor:
    """Units (b m c p q) -> pixels (b m p*q*c), in the layout of predictions"""
    return rearrange(units, "b m c p q -> b m (p q c)")


def normalize_units(target: Tensor) -> Tensor:
    """Pixels (b m x) -> pixels (b m x), each unit with mean 0 and variance 1 (MAE, section 3)"""
    var, mean = torch.var_mean(target, dim=-1, keepdim=True)
    return (target - mean) / (var + 1e-6).sqrt()
