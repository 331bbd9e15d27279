"""The one count of multiply-accumulates: convolutions + matrix products + attention, without norms."""

import copy

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def count_gmacs(model: nn.Module, *shape: int) -> float:
    """GMACs of a forward pass on one input of this shape (1 c H W), counted without computing anything."""
    model = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    with torch.device("meta"):
        return gmacs_of(model, torch.empty(shape))


@torch.no_grad()
def gmacs_of(model: nn.Module, *inputs: Tensor) -> float:
    """GMACs of `model(*inputs)`, on the device and in the mode that it is in."""
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() / 2e9
