"""Protocols of a pre-training method: what it returns, and what recipes, preflight and checkpoints expect of it."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mimkit.models.protocols import MapEncoder, UnitEncoder
from mimkit.units import UnitMask


class Output(NamedTuple):
    """The result of a pre-training step."""

    loss: Tensor  # ()
    prediction: Tensor  # (b m x) for the units in `units.masked`, in the form of the target
    units: UnitMask  # which units were visible, and which were predicted


class Method(Protocol):
    """A pre-training method.

    It may also have `after_step(step)`, which the recipe calls after each optimizer step. Images are (b c H W) today; a
    method may also accept units (b n c p p) that were cut before.
    """

    encoder: UnitEncoder | MapEncoder
    decoder: Any  # the predictor: a decoder over mask tokens, or a linear layer. Its `config` rebuilds it
    mask_ratio: float
    norm_targets: bool  # whether predictions are normalized per unit

    @property
    def config(self) -> dict[str, Any]:
        """Keyword arguments that rebuild the method around its encoder and decoder, as JSON."""

    def __call__(self, images: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Output:
        """Images (b c H W); mask noise (b n), or a generator of it -> Output"""
