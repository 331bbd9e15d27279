"""Protocols of a pre-training method: what it returns, and what recipes, preflight and checkpoints expect of it."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mimkit.units import UnitMask


class Output(NamedTuple):
    """The result of a pre-training step."""

    loss: Tensor  # ()
    prediction: Tensor  # (b m x), for the units in `units.masked`, in the form of the target
    units: UnitMask  # which units were visible, and which were predicted


class Method(Protocol):
    """A pre-training method: a torch module with an encoder and a decoder, which returns a loss.

    To add one, write a file in mimkit/methods/, a recipe, and an entry in `METHODS` of mimkit/methods/checkpoint.py.
    Today `forward` receives images (b c H W); a method may also accept units (b n c p p) that were cut before. A method
    may have `after_step(step)`, which its recipe calls after each optimizer step.
    """

    decoder: Any  # the predictor: a decoder over mask tokens, or a linear layer. Its `config` rebuilds it
    mask_ratio: float  # fraction of units that are masked
    norm_targets: bool  # whether predicted pixels are normalized per unit
    training: bool

    @property
    def encoder(self) -> Any:
        """The `UnitEncoder` or `MapEncoder` that is trained."""

    @property
    def config(self) -> dict[str, Any]:
        """Keyword arguments, as JSON, that rebuild the method around its encoder and decoder."""

    def forward(self, images: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Output:
        """Images (b c H W); mask noise (b n), or its generator -> loss (), prediction (b m x), units"""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `forward`, as torch modules do."""

    def train(self, mode: bool = True) -> Any:
        """Switch to training mode, or to evaluation mode, as torch modules do."""
