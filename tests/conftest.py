import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

import mimkit.models  # noqa: F401  registers the networks with timm


@pytest.fixture(autouse=True)
def _anew():
    """Each test has its own seed, and its own accelerate, which keeps its state for a whole process."""
    torch.manual_seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@torch.no_grad()
def fill(model):
    """Every parameter at order 1: tables, biases and scales that start at 0 or 1e-5 would hide what drops them."""
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.normal_(0.5, 0.5)
        elif parameter.ndim == 3 or parameter.shape[-1] < 16:
            parameter.normal_(0, 0.5)
        else:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model
