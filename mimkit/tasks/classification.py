"""Classification: the classes of a data set, mixup, and top-1 and top-5 accuracy on validation images."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor

from mimkit.data.loader import eval_loader, limit_bad_images
from mimkit.data.sources import Source
from mimkit.data.transforms import Normalize
from mimkit.errors import UserError
from mimkit.evaluation.features import NoImagesError, map_batches
from mimkit.evaluation.knn import standard_error
from mimkit.figures import any_backend
from mimkit.files import replacing_file
from mimkit.io.weights import write_model
from mimkit.models.factory import InputSpec, create_network, has_weights
from mimkit.models.pretrained import network_folder, new_head
from mimkit.tasks.plots import plot_confusion
from mimkit.training.run import Run


class Scores(NamedTuple):
    """Counts of classified images, from which accuracies follow."""

    confusion: Tensor  # (classes classes): number of images by true class (row) and predicted class (column)
    top5_hits: Tensor  # number of images whose class is among the five highest logits

    @property
    def top1(self) -> float:
        """Top-1 accuracy in %."""
        return 100 * float(self.confusion.diagonal().sum() / self.confusion.sum())

    @property
    def top5(self) -> float:
        """Top-5 accuracy in %."""
        return 100 * float(self.top5_hits / self.confusion.sum())


def count_scores(batches: Iterable[tuple[Tensor, Tensor]], classes: int) -> Scores:
    """Count classified images batch by batch, so that the logits of one batch only are in memory.

    Args:
        batches: logits (b classes) and labels (b).
        classes: number of classes.

    Raises:
        UserError: a label is not one of the classes.
    """
    with any_backend():
        from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_stat_scores

    # torchmetrics' classes would sum over processes by themselves, and wait for a process without images forever
    confusion, top5_hits = torch.zeros(classes, classes, dtype=torch.int64), torch.tensor(0)
    for logits, labels in batches:
        if len(unknown := labels[(labels < 0) | (labels >= classes)]):
            raise UserError(
                f"A validation image has the label {unknown[0]}, which is not between 0 and {classes - 1}. Use the "
                "same classes in both splits of --data."
            )
        confusion += multiclass_confusion_matrix(logits, labels, classes, validate_args=False)
        counts = multiclass_stat_scores(
            logits, labels, classes, average="micro", top_k=min(5, classes), validate_args=False
        )
        top5_hits += counts[0]  # true positives
    return Scores(confusion, top5_hits)


def classifier(model: str) -> Any:
    """Load a fine-tuned network from a run, a folder, or a timm name with a tag.

    Raises:
        UserError: the network has no weights or no classifier.
    """
    folder = network_folder(model)
    if not has_weights(folder):
        raise UserError(f"--model {model} has no weights. Pass a run of recipes/finetune.py, or the folder of a model.")
    network = create_network(folder)
    if not network.num_classes:
        raise UserError(f"--model {model} has no classifier. Train one with recipes/finetune.py, and pass that run.")
    return network


def head_fits(network: Any, names: list[str]) -> bool:
    """Return whether a checkpoint's classifier is for these classes, by their names or, without names, their number."""
    known = network.pretrained_cfg.get("label_names")
    return network.num_classes == len(names) and list(known or names) == names


def fit_head(network: Any, names: list[str], std: float | None, random: bool = False) -> str:
    """Give a network a new head for these classes, unless it has one for them. Return a description of its head.

    Args:
        names: names of the classes.
        std: standard deviation of the new head's weights, see `new_head`.
        random: whether the network starts at random. Its head is then new, with the network's own initialization.
    """
    if random or not head_fits(network, names):
        return new_head(network, len(names), None if random else std)
    if network.pretrained_cfg.get("label_names"):
        return "its own head, for the same classes"
    return (
        f"its own head, whose {len(names)} classes have no names and are assumed to be those of --data in their order"
    )


def write_classes(run: Run, names: list[str]) -> None:
    """Write the names of the classes, in the order of the network's outputs, to classes.json of a run."""
    if run.engine.is_main:
        with replacing_file(run.folder / "classes.json") as file:
            file.write_text(json.dumps(names, indent=1))


def check_classes(network: Any, names: list[str], model: str, data: str) -> None:
    """Check that a network classifies these classes.

    Args:
        names: names of the classes in the data.
        model, data: what the user passed, for the error message.

    Raises:
        UserError: it has another number of classes, or classes of other names.
    """
    if network.num_classes != len(names):
        raise UserError(
            f"--model {model} has {network.num_classes} classes, but --data {data} has {len(names)}. Pass the data "
            "that it was trained on, or fine-tune it on these."
        )
    known = network.pretrained_cfg.get("label_names")
    if known and list(known) != names:
        old, new = next(pair for pair in zip(known, names, strict=True) if pair[0] != pair[1])
        raise UserError(
            f"--model {model} has other classes than --data {data}, such as {old} instead of {new}. Pass data of the "
            "same classes."
        )


def mixup_function(
    classes: int, micro_batch_size: int, mixup: float, cutmix: float, smoothing: float
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return a function from images (b c H W) and labels (b) to mixed images (b c H W) and soft labels (b classes).

    Args:
        classes: number of classes.
        micro_batch_size: number of images in a forward pass, which are mixed in pairs.
        mixup, cutmix: alphas of mixup and CutMix; 0 disables them.
        smoothing: label smoothing.

    Raises:
        UserError: the micro-batch size is odd.
    """
    if not (mixup or cutmix):
        return lambda images, labels: (images, mixup_target(labels, classes, smoothing=smoothing))
    if micro_batch_size % 2:
        raise UserError(
            f"Mixup pairs the images of a micro-batch, which has {micro_batch_size}. Choose another --batch-size or "
            "--grad-accum-steps, or disable it with --mixup 0 --cutmix 0."
        )
    return Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=classes)


class Classification:
    """The task of classifying labeled images, scored by top-1 and top-5 accuracy.

    Args:
        run: the run, which gives the processes and prints lines.
        test: validation images and their labels.
        spec: size of the input, and how an image is brought to it.
        normalize: normalization of the input.
        names: names of the classes.
        workers: number of data workers.
        max_bad: fraction of images that may be impossible to decode.
    """

    figure = "top1"
    hints: tuple[str, ...] = ("predict --model {model} --images {images}", "export --model {model}")

    def __init__(
        self,
        run: Run,
        test: Source,
        spec: InputSpec,
        normalize: Normalize,
        names: Sequence[str],
        workers: int = 0,
        max_bad: float = 0.01,
    ):
        self.run, self.test, self.spec, self.normalize = run, test, spec, normalize
        self.names = list(names)
        self.workers, self.max_bad = workers, max_bad

    def score(self, network: Any) -> dict[str, float]:
        """Return top1 and top5 in %, and top1's standard error, over all validation images and processes.

        Raises:
            NoImagesError: none of the images can be decoded.
        """
        run = self.run
        loader = eval_loader(
            self.test,
            self.spec.size,
            self.spec.in_chans,
            batch_size=128,
            workers=self.workers,
            **self.spec.crop,
            rank=run.engine.rank,
            world_size=run.engine.world_size,
        )
        batches = limit_bad_images(loader, self.max_bad * self.test.length, run.display.print_once)
        with run.accelerator.autocast():
            scores = count_scores(map_batches(network, batches, self.normalize, network), len(self.names))
        self.scores = Scores(*run.engine.sum(*scores))
        if not self.scores.confusion.any():
            raise NoImagesError
        error = standard_error(self.scores.top1, int(self.scores.confusion.sum()))
        return {"top1": self.scores.top1, "top5": self.scores.top5, "top1_se": error}

    def format_scores(self, scores: dict[str, float]) -> str:
        """Format the scores as one line of text."""
        top5 = f", top-5 {scores['top5']:.2f} %" if len(self.names) > 5 else ""
        return f"top-1 {scores['top1']:.2f} %{top5} on {self.scores.confusion.sum()} test images"

    def write(self, network: Any, folder: Path) -> None:
        """Write the network as a timm folder, with the names of its classes."""
        mean, std = self.normalize.values
        about = self.spec.crop | {"input_size": (self.spec.in_chans, *self.spec.size), "mean": mean, "std": std}
        write_model(network, folder, label_names=self.names, **about)

    def draw(self, folder: Path) -> list[str]:
        """Draw the confusion matrix of the last score. Return the names of the files."""
        plot_confusion(self.scores.confusion, self.names, folder / "confusion.png")
        return ["confusion.png"]
