"""Protocols of a pre-training method: what it returns, and what recipes, preflight and checkpoints expect of it."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

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

    decoder: Any  # the predictor: a decoder over mask tokens, or a linear layer. Its `config` rebuilds it
    mask_ratio: float
    norm_targets: bool  # whether predictions are normalized per unit

    @property
    def encoder(self) -> Any:
        """A `UnitEncoder` or a `MapEncoder`."""

    @property
    def config(self) -> dict[str, Any]:
        """Keyword arguments that rebuild the method around its encoder and decoder, as JSON."""

    def forward(self, images: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Output:
        """Images (b c H W); mask noise (b n), or a generator of it -> Output"""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `forward` as torch modules do."""
