"""The cost of a network: multiply-accumulates of a forward pass, and bytes kept for the backward pass."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


def count_gmacs(model: nn.Module, *shape: int) -> float:
    """Count the GMACs of a forward pass on one input of this shape, without computing anything.

    Convolutions, matrix products and attention count; norms do not.

    Args:
        model: the network. It is copied, not changed.
        shape: shape of the input, such as 1, 3, 224, 224.
    """
    model = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    with torch.device("meta"):
        return gmacs_of(model, torch.empty(shape))


@torch.no_grad()
def gmacs_of(model: nn.Module, *inputs: Tensor) -> float:
    """Count the GMACs of `model(*inputs)`, on the model's current device and in its current mode.

    Attention runs as two explicit matrix products, because torch 2.14 does not count its fused CPU kernel.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() / 2e9


class _CastRecorder(TorchDispatchMode):
    """Add the copies that autocast makes of known tensors to the set of known storages."""

    def __init__(self, known: set[int]):
        super().__init__()
        self.known = known
        self.alive: list[Tensor] = []  # references to the copies, so that no address is reused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and record its output if it is a cast of a known tensor."""
        out = func(*args, **kwargs or {})
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage().data_ptr() in self.known:
            self.alive.append(out)
            self.known.add(out.untyped_storage().data_ptr())
        return out


def kept_bytes(forward: Callable[[], Tensor], tensors: Iterable[Tensor]) -> int:
    """Measure the bytes that a forward pass keeps for the backward pass.

    Each storage counts once. `tensors` and copies of them in another precision do not count.

    Args:
        forward: runs the forward pass and returns the loss only: further outputs may or may not be counted.
        tensors: parameters, buffers and inputs.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    kept: dict[int, torch.UntypedStorage] = {}  # holds the storages, so that no address is reused

    def pack(tensor: Tensor) -> Any:  # returns nothing: a returned tensor would keep its own graph alive forever
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage)

    unpack: Any = lambda _: None  # noqa: E731  no backward pass follows
    with _CastRecorder(known), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = forward()
    del loss
    return sum(storage.nbytes() for address, storage in kept.items() if address not in known)
