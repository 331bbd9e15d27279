"""What a run continues from: weights, optimizer, moving averages, meters, and the anomaly guard."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimkit.errors import UserError
from mimkit.io.weights import State, load_strictly
from mimkit.training.anomaly import AnomalyGuard
from mimkit.training.metrics import Meter

Snapshot = tuple[dict[str, State], dict[str, Any]]  # tensors by file name, and everything else as JSON


class TrainState:
    """The state of a run, as tensors for safetensors files and values for JSON.

    Args:
        model, optimizer: what is trained.
        meter, guard: what they have accumulated is part of the state.
        extra_modules: other modules that a checkpoint holds by name, such as an average of the weights.
        scaler: the gradient scaler of fp16, or None.
        sharded: whether the engine writes the model and the optimizer itself.
        images: number of images in the data set, whose order depends on it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        meter: Meter,
        guard: AnomalyGuard,
        extra_modules: dict[str, nn.Module] | None = None,
        scaler: Any = None,
        sharded: bool = False,
        images: int = 0,
    ):
        self.model, self.optimizer, self.meter, self.guard = model, optimizer, meter, guard
        self.extra_modules, self.scaler, self.sharded, self.images = extra_modules or {}, scaler, sharded, images
        self.bad_images: dict[str, str] = {}  # images that cannot be used, and why

    def state_dict(self) -> Snapshot:
        """Return copies in memory of all tensors, by file name, and of all other values."""
        states: dict[str, State] = {name: module.state_dict() for name, module in self.extra_modules.items()}
        values: dict[str, Any] = {
            **self.meter.state_dict(),
            **self.guard.state_dict(),
            "bad_images": self.bad_images,
            "images": self.images,
        }
        if not self.sharded:
            adam = self.optimizer.state_dict()
            moments = {f"{i}.{k}": v for i, slots in adam["state"].items() for k, v in slots.items()}
            states |= {"optimizer": moments, "model": self.model.state_dict()}
            values |= {"param_groups": adam["param_groups"], "scaler": self.scaler.state_dict() if self.scaler else {}}
        copies = {name: {k: v.to("cpu", copy=True) for k, v in state.items()} for name, state in states.items()}
        return copies, copy.deepcopy(values)

    def load_state_dict(self, snapshot: Snapshot, origin: str | Path, device: torch.device | None = None) -> None:
        """Load what `state_dict` returned.

        Args:
            origin: where it comes from, named in errors.
            device: where the meters accumulate.

        Raises:
            UserError: if it is from a run on other data, or a tensor or a value is missing, unexpected or malformed.
        """
        states, values = snapshot
        if values.get("images") != self.images:
            raise UserError(
                f"{origin} is from a run on {values.get('images')} images, but --data has {self.images}, in another "
                "order. Pass the same data, or start a new run from its weights with --init."
            )
        try:
            for name, module in self.extra_modules.items():
                load_strictly(module, states.get(name, {}), origin)
            if "optimizer" in states:
                load_strictly(self.model, states["model"], origin)
                slots: dict[int, dict[str, Tensor]] = {}
                for name, tensor in states["optimizer"].items():
                    i, key = name.split(".", 1)
                    slots.setdefault(int(i), {})[key] = tensor
                self.optimizer.load_state_dict({"state": slots, "param_groups": values["param_groups"]})
                if self.scaler and values["scaler"]:
                    self.scaler.load_state_dict(values["scaler"])
            self.meter.load_state_dict(values, device)
            self.guard.load_state_dict(values)
            self.bad_images.update(values["bad_images"])
        except UserError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:  # someone changed the file and its hash
            raise UserError(
                f"{origin} was not written by a run ({error!r}). Start a new one with another --out."
            ) from error
