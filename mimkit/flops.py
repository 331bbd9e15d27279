"""What a network costs: multiply-accumulates, the one count of them, and bytes kept for the backward pass."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


def count_gmacs(model: nn.Module, *shape: int) -> float:
    """GMACs of a forward pass on one input of this shape (1 c H W), counted without computing anything.

    Convolutions + matrix products + attention, without norms.
    """
    model = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    with torch.device("meta"):
        return gmacs_of(model, torch.empty(shape))


@torch.no_grad()
def gmacs_of(model: nn.Module, *inputs: Tensor) -> float:
    """GMACs of `model(*inputs)`, on the device and in the mode that it is in.

    Attention is computed as the two matrix products that it is: torch 2.14 does not count its fused kernel on CPUs.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() / 2e9


class Casts(TorchDispatchMode):
    """Adds to what is known the storages of its copies in another precision, which autocast makes of weights."""

    def __init__(self, known: set[int]):
        super().__init__()
        self.known = known
        self.alive: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute as ever, and note copies."""
        out = func(*args, **kwargs or {})
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage().data_ptr() in self.known:
            self.alive.append(out)  # so that no address is used twice
            self.known.add(out.untyped_storage().data_ptr())
        return out


def kept_bytes(forward: Callable[[], Tensor], tensors: Iterable[Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once, but `tensors` and casts of them.

    Args:
        forward: gives what is differentiated; what else it returns would be counted or not by chance.
        tensors: parameters, buffers and inputs.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    held: dict[int, torch.UntypedStorage] = {}  # alive, so that no address is used twice

    def pack(tensor: Tensor) -> Any:  # a tensor returned would hold the graph that holds it, for ever
        storage = tensor.untyped_storage()
        held.setdefault(storage.data_ptr(), storage)

    unpack: Any = lambda _: None  # noqa: E731  there is no backward pass
    with Casts(known), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = forward()
    del loss
    return sum(storage.nbytes() for where, storage in held.items() if where not in known)
