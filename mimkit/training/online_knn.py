"""kNN accuracy of the encoder during pre-training."""

from typing import Any

from mimkit.data.sources import Source, open_labeled
from mimkit.data.transforms import Normalize, Size
from mimkit.errors import UserError
from mimkit.evaluation import features, knn
from mimkit.models.factory import timm_model
from mimkit.training.run import Run


class OnlineKNN:
    """kNN accuracy of an encoder on at most 5,000 + 2,000 labeled images, on the main process."""

    def __init__(self, run: Run, source: Source, size: Size, normalize: Normalize, required: bool):
        self.run, self.size, self.normalize = run, size, normalize
        self.parts: tuple[Source, Source] | None = None
        try:
            if source.streaming:
                raise UserError("a stream has no rows to choose from, which kNN needs: pass --streaming false.")
            if run.accelerator.is_main_process:
                parts = open_labeled(source.name)
                if parts[0].length < 10:
                    raise UserError(f"{parts[0].length} training images are fewer than its 10 neighbors.")
                self.parts = parts
        except UserError as error:
            if required:
                raise
            run.print(f"no kNN: {error}")

    def __call__(self, step: int, encoder: Any, when: str) -> None:
        """Measure, print and log."""
        encoder = self.run.whole(encoder)
        if self.parts:
            train, test = features.extract_parts(
                timm_model(encoder),
                self.parts,
                self.size,
                self.normalize,
                images=(5_000, 2_000),
                workers=self.run.options.workers,
                max_bad=1.0,  # it is the images of training that are counted
                log=self.run.print_once,
            )
            found = knn.knn(train, test)
            words = ", ".join(f"{accuracy:.1f} % (k = {k})" for k, accuracy in found.items())
            self.run.print(f"kNN {when}: {words}, {len(train.y)} + {len(test.y)} images")
            self.run.log(step, **{f"knn_{k}": accuracy for k, accuracy in found.items()})
        self.run.accelerator.wait_for_everyone()
