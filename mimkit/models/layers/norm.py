"""Norms."""

from typing import Any


def set_eps(net: Any, eps: float | None) -> None:
    """Set the epsilon of all norms of a network that has no argument for it. None changes nothing."""
    for module in net.modules() if eps is not None else ():
        if hasattr(module, "eps"):
            module.eps = eps
