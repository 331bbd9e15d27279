"""A model of two parameters with the state of its run, for the unit tests of training."""

from types import SimpleNamespace

import torch

from mimkit.data.sample import Batch
from mimkit.training.anomaly import AnomalyGuard
from mimkit.training.checkpoint import TrainState
from mimkit.training.metrics import Meter


def train_state(images=32, max_spike=None, **more):
    """The state of a run that trains a weight and a bias, both 1 at first, with AdamW."""
    model = torch.nn.Linear(1, 1)
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    return TrainState(model, optimizer, Meter(), AnomalyGuard(max_spike), images=images, **more)


def train(state, step, scale=1.0):
    """One step of training. `scale` multiplies the loss."""
    state.guard.step = step
    loss = scale * state.model(torch.full((1, 1), step + 1.0)).square().mean()
    loss.backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.meter.update(loss=loss)
    state.guard.observe(loss)


def weights(state):
    return [parameter.item() for parameter in state.model.parameters()]


def batch(step, count=2):
    """A micro-batch of images that are named and filled with the number of their step."""
    images = torch.full((count, 3, 4, 4), float(step))
    names = [f"{step}-{i}.png" for i in range(count)]
    return Batch(images, torch.rand(count, 4), torch.arange(count), names, [])


class FakeFeed:
    """A feed of one micro-batch per step that notes where it was started."""

    def __init__(self):
        self.starts = []

    def start(self, step):
        self.starts.append(step)
        self.step = step

    def micro_batches(self):
        return iter([batch(self.step)])


class FakeScaler(SimpleNamespace):
    """The gradient scaler of fp16, at a fixed scale."""

    def get_scale(self):
        return self.scale

    def state_dict(self):
        return {"scale": self.scale}

    def load_state_dict(self, state):
        self.scale = state["scale"]
