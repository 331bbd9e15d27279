"""kNN accuracy of the encoder during pre-training."""

from typing import Any

from mimkit.data.sources import Source, open_labeled, set_value_range
from mimkit.data.transforms import Normalize
from mimkit.errors import UserError
from mimkit.evaluation.features import extract_parts
from mimkit.evaluation.knn import knn, standard_error
from mimkit.models.factory import timm_model
from mimkit.training.run import Run

TRAIN, TEST, PER_CLASS = 5_000, 2_000, 50  # images; fewer than 50 neighbors to choose from per class would be noise


class OnlineKNN:
    """Measures the kNN accuracy of an encoder on the main process.

    It uses 5,000 training images, or 50 per class where that is more, and 2,000 validation images.

    Args:
        run: the run, which prints and logs the accuracy.
        source: the images of pre-training. If the data set has labels, its training part and the part to evaluate on
            are used, whichever parts are pre-trained on.
        size, normalize: the encoder's input.
        workers: number of data loading processes.
        required: whether to raise a UserError if kNN is impossible, instead of printing why.
        columns: names of the image column and the label column, see `open_source`.
    """

    def __init__(
        self,
        run: Run,
        source: Source,
        size: tuple[int, int],
        normalize: Normalize,
        workers: int,
        required: bool,
        columns: tuple[str | None, str | None] = (None, None),
    ):
        self.run, self.size, self.normalize, self.workers = run, size, normalize, workers
        self.parts: tuple[Source, Source] | None = None
        try:
            if source.streaming:
                raise UserError("kNN needs random access to images, which a stream lacks. Pass --streaming false.")
            run.engine.on_main(self._open, source, columns)
        except UserError as error:
            if required:
                raise
            run.print(f"no kNN: {error}")

    def _open(self, source: Source, columns: tuple[str | None, str | None]) -> None:
        train, test = set_value_range(source.value_range, *open_labeled(source.name, None, *columns))
        if train.length < 10:
            raise UserError(f"kNN needs at least 10 training images; there are {train.length}.")
        classes = len(set(train.rows[train.label]))
        self.images = max(TRAIN, PER_CLASS * classes)
        per_class = min(self.images, train.length) / classes
        if per_class < PER_CLASS and train.length > TRAIN:
            self.run.print(f"kNN has {per_class:.0f} images per class, fewer than {PER_CLASS}: its accuracy is noisy.")
        self.run.print(f"kNN: {train.about}")
        seen = test.part != "held-out" and bool({*test.parts} & {*source.parts})
        if seen and (others := ",".join(part for part in source.parts if part not in test.parts)):
            self.run.print(f"The validation images of kNN are pre-trained on too; --parts {others} keeps them apart.")
        self.parts = train, test

    def __call__(self, step: int, encoder: Any, when: str) -> None:
        """Measure, print and log. All processes must call this.

        Args:
            when: printed with the accuracy, such as "after 100 steps".
        """
        encoder = self.run.engine.full_state(encoder)
        if self.parts:
            train, test = extract_parts(
                timm_model(encoder),
                self.parts,
                self.size,
                self.normalize,
                images=(self.images, TEST),
                workers=self.workers,
                max_bad=1.0,  # only bad images of training count
                log=self.run.display.print_once,
            )
            accuracies = knn(train, test)
            text = ", ".join(f"{accuracy:.1f} % (k = {k})" for k, accuracy in accuracies.items())
            self.run.print(f"kNN {when}: {text}, {len(train.y)} + {len(test.y)} images")
            errors = {f"knn_{k}_se": standard_error(accuracy, len(test.y)) for k, accuracy in accuracies.items()}
            self.run.log(step, **{f"knn_{k}": accuracy for k, accuracy in accuracies.items()}, **errors)
        self.run.engine.wait()
