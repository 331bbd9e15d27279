"""Feed a run with micro-batches from any step on."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from mimkit.data.loader import limit_bad_images, restart
from mimkit.data.order import Plan
from mimkit.data.sample import Batch
from mimkit.errors import UserError
from mimkit.training.metrics import Meter


class Feed:
    """The micro-batches of a run, on the device.

    Args:
        loader: what `train_loader` returned.
        plan: which images make which step.
        device: where the batches go.
        max_bad: fraction of images that may be impossible to decode.
        bad_images: those that are known, and why. New ones are added.
        meter: measures the wait for data.
        log: prints a line about a bad image.
    """

    def __init__(
        self,
        loader: Any,
        plan: Plan,
        device: torch.device,
        max_bad: float,
        bad_images: dict[str, str],
        meter: Meter,
        log: Callable[[str], None] = print,
    ):
        self.loader, self.plan, self.device, self.meter, self.log = loader, plan, device, meter, log
        self.limit = max_bad * plan.length  # over the epochs, each process meets all images
        self.bad_images = bad_images

    def start(self, step: int) -> None:
        """Load batches from `step` on."""
        restart(self.loader, step)
        batches = iter(self.loader)  # draws a random number, so it must not happen inside a step
        self.batches = limit_bad_images(batches, self.limit, self.log, self.bad_images)

    def micro_batches(self) -> Iterator[Batch]:
        """Yield the micro-batches of the next step.

        Raises:
            UserError: if the data ended early, or an image and all that could replace it are bad.
        """
        for _ in range(self.plan.grad_accum_steps):
            with self.meter.waiting_for_data():
                batch = next(self.batches, None)
            if batch is None:
                raise UserError(
                    "The data ended before the run did: it has fewer images than it declares. Check its files."
                )
            if len(batch.images) < self.plan.micro_batch_size:
                raise UserError(
                    f"{batch.bad[0][0]} cannot be used ({batch.bad[0][1]}), nor can the images that could replace it. "
                    "Remove or repair them."
                )
            yield batch.to(self.device)
