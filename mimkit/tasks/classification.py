"""Around a fine-tuning: a network out of any checkpoint, what its layers learn at, how it is judged, what it leaves."""

from collections.abc import Callable, Sequence
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
from mimkit.evaluation.features import NoImagesError, apply_to_images
from mimkit.io.weights import write_model
from mimkit.models.factory import create_network, has_weights
from mimkit.models.pretrained import network_folder
from mimkit.tasks.plots import confusions
from mimkit.training.run import Run


class Scores(NamedTuple):
    """How well images are classified."""

    confusion: Tensor  # (classes classes): images of each true class (row) taken for each class
    hits: Tensor  # images whose class is among the five most likely

    @property
    def top1(self) -> float:
        """%"""
        return 100 * float(self.confusion.diagonal().sum() / self.confusion.sum())

    @property
    def top5(self) -> float:
        """%"""
        return 100 * float(self.hits / self.confusion.sum())


def score(logits: Tensor, labels: Tensor) -> Scores:
    """(n classes), (n) -> how well they agree"""
    classes = logits.shape[1]
    confusion = torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2)
    likely = logits.topk(min(5, classes)).indices
    return Scores(confusion.view(classes, classes), (likely == labels[:, None]).sum())


def classifier(model: str) -> Any:
    """A network that has been fine-tuned, from a run, a folder or a name of timm with a tag."""
    folder = network_folder(model)
    if not has_weights(folder):
        raise UserError(f"--model {model} has no weights: pass a run of recipes/finetune.py, or a folder of a model.")
    network = create_network(folder)
    if not network.num_classes:
        raise UserError(f"--model {model} has no classifier, which recipes/finetune.py gives it: pass what that left.")
    return network


def head_fits(network: Any, names: list[str]) -> bool:
    """Whether a checkpoint's classifier is for these classes: by their names, or by their number where it has none."""
    known = network.pretrained_cfg.get("label_names")
    return network.num_classes == len(names) and list(known or names) == names


def class_names(train: Source, test: Source) -> list[str]:
    """Of the labels; their numbers where they have no names."""
    column = train.label or ""
    names = getattr(train.rows.features[column], "names", None)
    return list(names or map(str, range(1 + max(*train.rows[column], *test.rows[test.label]))))


def check_classes(network: Any, names: list[str], model: str, data: str) -> None:
    """Refuse to judge a network by other classes than its own."""
    if network.num_classes != len(names):
        raise UserError(
            f"--model {model} knows {network.num_classes} classes, and --data {data} has {len(names)}: pass the data "
            "that it was trained for, or train it on these."
        )
    known = network.pretrained_cfg.get("label_names")
    if known and list(known) != names:
        odd = next(pair for pair in zip(known, names, strict=True) if pair[0] != pair[1])
        raise UserError(f"--model {model} has other classes than --data {data}: {odd[0]} there is {odd[1]} here.")


def mixing(
    classes: int, share: int, mixup: float, cutmix: float, smoothing: float
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images (b c H W), labels (b)) -> (images mixed by timm, soft labels (b classes)).

    Args:
        share: images that are mixed with each other, those of one forward pass.
        mixup, cutmix: their alphas; 0 for none.
    """
    if not (mixup or cutmix):
        return lambda images, labels: (images, mixup_target(labels, classes, smoothing=smoothing))
    if share % 2:
        raise UserError(
            f"Mixup pairs images, and one part of a step on one process has {share}: choose another --batch-size or "
            "--grad-accum-steps, or --mixup 0 --cutmix 0."
        )
    return Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=classes)


class Classification:
    """Accuracy on labeled images.

    Args:
        shape: of the input, (c H W).
        crop_pct: the input is the middle of an image that is 1 / crop_pct times as large.
        names: of the classes.
    """

    figure = "top1"
    hints: tuple[str, ...] = ("predict --model {} --images FOLDER", "export --model {} --out model.onnx")

    def __init__(
        self,
        run: Run,
        test: Source,
        shape: tuple[int, int, int],
        normalize: Normalize,
        crop_pct: float,
        names: Sequence[str],
        workers: int = 0,
        max_bad: float = 0.01,
    ):
        self.run, self.test, self.shape, self.normalize = run, test, shape, normalize
        self.crop_pct, self.names = crop_pct, list(names)
        self.workers, self.max_bad = workers, max_bad

    def score(self, network: Any) -> dict[str, float]:
        """top1 and top5, in %"""
        run, accelerator = self.run, self.run.accelerator
        loader = eval_loader(
            self.test,
            self.shape[1:],
            self.shape[0],
            batch_size=128,
            workers=self.workers,
            crop_pct=self.crop_pct,
            rank=run.engine.rank,
            world_size=run.engine.world_size,
        )
        batches = limit_bad_images(loader, self.max_bad * self.test.length, run.display.print_once)
        try:
            with accelerator.autocast():
                found = apply_to_images(network, batches, self.normalize, network)
            counts = score(found.x, found.y)
        except NoImagesError:  # for this process: the others wait for it
            counts = Scores(torch.zeros(len(self.names), len(self.names), dtype=torch.int64), torch.tensor(0))
        self.latest = Scores(*run.engine.sum(*counts))
        if not self.latest.confusion.any():
            raise NoImagesError
        return {"top1": self.latest.top1, "top5": self.latest.top5}

    def format_scores(self, figures: dict[str, float]) -> str:
        """In a line."""
        top5 = f", top-5 {figures['top5']:.2f} %" if len(self.names) > 5 else ""
        return f"top-1 {figures['top1']:.2f} %{top5} of {self.latest.confusion.sum()} test images"

    def write(self, network: Any, folder: Path) -> None:
        """In timm's layout, with the names of its classes."""
        mean, std = self.normalize.values
        about = {"input_size": self.shape, "crop_pct": self.crop_pct, "interpolation": "bicubic"}
        write_model(network, folder, mean=mean, std=std, label_names=self.names, **about)

    def draw(self, folder: Path) -> list[str]:
        """The confusion of classes."""
        confusions(self.latest.confusion, self.names, folder / "confusion.png")
        return ["confusion.png"]
