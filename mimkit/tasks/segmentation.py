"""Semantic segmentation: a decoder on any backbone, inference by sliding windows, and mean IoU."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mimkit.data.decode import UNIT, ValueRange
from mimkit.data.loader import check_samples, limit_bad_images, single_image_loader
from mimkit.data.order import evenly_spaced
from mimkit.data.sample import Batch, SampleLoader, collate
from mimkit.data.segmentation import IGNORE, Classes, eval_pairs
from mimkit.data.sources import Source, open_all, set_value_range
from mimkit.data.transforms import Normalize, Size, checked_size, resize_short
from mimkit.errors import UserError
from mimkit.figures import any_backend
from mimkit.files import replacing, replacing_file
from mimkit.models.feature_pyramid import Pyramid
from mimkit.tasks.dense_checkpoint import read_dense, write_dense
from mimkit.tasks.plots import palette, plot_segmentations
from mimkit.training.run import Run

BOUNDARY = 3  # boundary mIoU is over the pixels within this many pixels of another class
EXAMPLES = 6  # number of evaluated images to draw


class Segmenter(nn.Module):
    """A feature pyramid, a decoder of segmentation-models-pytorch, and a 1 x 1 convolution to the logits.

    Args:
        backbone: a timm network.
        classes: number of classes.
        decoder: upernet (Xiao et al., ECCV 2018) or fpn (Kirillov et al., CVPR 2019).
        width: number of channels of the decoder.
        neck, window: see `Pyramid`.
        drop_rate: dropout rate of the channels before the logits.

    Raises:
        UserError: segmentation-models-pytorch is not installed, or there is no such decoder.
    """

    def __init__(
        self,
        backbone: Any,
        classes: int,
        decoder: str = "upernet",
        width: int = 512,
        neck: str = "auto",
        drop_rate: float = 0.1,
        window: int = 0,
    ):
        super().__init__()
        try:
            from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
            from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
        except ImportError as error:
            raise UserError(
                "Segmentation needs segmentation-models-pytorch. Run pip install 'mimkit[dense]'."
            ) from error
        self.pyramid = Pyramid(backbone, neck, window)
        channels = [0, 0, *self.pyramid.channels]  # smp also counts maps at 1/1 and 1/2, which no decoder uses
        if decoder == "upernet":
            self.decoder: Any = UPerNetDecoder(channels, decoder_channels=width)
        elif decoder == "fpn" and width % 32 == 0:
            self.decoder = FPNDecoder(channels, pyramid_channels=width, segmentation_channels=width, dropout=0)
        else:
            raise UserError(
                f"--decoder {decoder} with --decoder-dim {width} is not possible. Choose upernet, or fpn with a "
                "multiple of 32."
            )
        self.drop = nn.Dropout2d(drop_rate)
        self.head = nn.Conv2d(width, classes, 1)
        self._model_args = {
            "decoder": decoder,
            "width": width,
            "neck": self.pyramid.neck,
            "drop_rate": drop_rate,
            "window": window,
        }

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits (b classes H W) of images (b c H W)."""
        height, width = x.shape[-2:]
        maps = self.pyramid(x)
        logits = self.head(self.drop(self.decoder([x, x, *maps])))
        padded_size = height + -height % self.pyramid.multiple, width + -width % self.pyramid.multiple
        return F.interpolate(logits, padded_size, mode="bilinear")[..., :height, :width]


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the cross entropy of logits (b classes H W) and masks (b H W), averaged over all pixels.

    Ignored pixels count as 0, so that all micro-batches of a step have equal weight.
    """
    return F.cross_entropy(logits, masks.long(), ignore_index=IGNORE, reduction="sum") / masks.numel()


def window_starts(side: int, crop: int) -> list[int]:
    """Return the positions of windows of size `crop` that cover a side. The stride is two thirds of a window."""
    return [*range(0, max(side - crop, 0), max(1, 2 * crop // 3)), max(side - crop, 0)]


def predict_logits(model: Any, x: Tensor, crop: Size | None = None, flip: bool = False) -> Tensor:
    """Compute the logits (b classes H W) of images (b c H W).

    Args:
        model: function from images to logits.
        crop: slide a window of this size over larger images, and average the logits where windows overlap.
        flip: average the logits with those of the mirrored images.
    """
    if flip:
        return (predict_logits(model, x, crop) + predict_logits(model, x.flip(-1), crop).flip(-1)) / 2
    height, width = x.shape[-2:]
    if crop is None or (height <= crop[0] and width <= crop[1]):
        return model(x)
    total, count = x.new_zeros(()), x.new_zeros(1, 1, height, width)
    for top in window_starts(height, crop[0]):
        for left in window_starts(width, crop[1]):
            window = (..., slice(top, top + crop[0]), slice(left, left + crop[1]))
            logits = model(x[window]).float()
            if not total.ndim:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[window] += logits
            count[window] += 1
    return total / count


def near_boundaries(masks: Tensor, distance: int = BOUNDARY) -> Tensor:
    """Return which pixels of masks (b H W) have another class within `distance` pixels, diagonals included (b H W).

    Ignored pixels are neither near a boundary nor another class.
    """
    known, kernel = masks != IGNORE, 2 * distance + 1
    values = masks.float()
    largest = F.max_pool2d(values.masked_fill(~known, -1)[:, None], kernel, 1, distance)
    smallest = -F.max_pool2d(-values.masked_fill(~known, IGNORE)[:, None], kernel, 1, distance)
    return ((largest > smallest) & known[:, None])[:, 0]


def iou(confusion: Tensor) -> Tensor:
    """Return the intersection over union of each class in %, NaN for classes that are neither present nor predicted.

    Args:
        confusion: number of pixels by true class and predicted class (classes classes).
    """
    intersection = confusion.diagonal().double()
    return 100 * intersection / (confusion.sum(0) + confusion.sum(1) - intersection)


def resized_argmax(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Resize logits (b classes h w) to `size` (H, W), and return the class of the highest one (b H W).

    Eight classes are resized at a time, because the logits of a photograph in full size may not fit into memory.
    """
    highest = logits.new_full((len(logits), *size), -torch.inf)
    classes = torch.zeros_like(highest, dtype=torch.long)
    for first in range(0, logits.shape[1], 8):
        value, index = F.interpolate(logits[:, first : first + 8], list(size), mode="bilinear").max(1)
        classes = torch.where(value > highest, first + index, classes)
        highest = torch.maximum(value, highest)
    return classes


class Segmentation:
    """The task of semantic segmentation, scored by mean IoU, also of the pixels near boundaries between classes.

    Args:
        run: the run, which gives the processes and prints lines.
        test: validation images and their masks.
        classes: the classes of the data set.
        normalize: normalization of the input.
        short: images are resized so that their short side has this many pixels. Logits are resized to the size of the
            mask.
        crop, flip: see `predict_logits`.
        workers: number of data workers.
        max_bad: fraction of images that may be impossible to decode.
    """

    figure = "miou"
    hints: tuple[str, ...] = ("predict --model {model} --images {images}",)

    def __init__(
        self,
        run: Run,
        test: Source,
        classes: Classes,
        normalize: Normalize,
        short: int,
        crop: Size | None = None,
        flip: bool = False,
        workers: int = 0,
        max_bad: float = 0.01,
    ):
        self.workers, self.max_bad = workers, max_bad
        self.run, self.test, self.classes, self.normalize = run, test, classes, normalize
        self.short, self.crop, self.flip = short, crop, flip
        fields = (test.image, test.mask)
        self.samples = SampleLoader(eval_pairs(short), len(normalize.values[0]), 0, 0, fields, classes, test.part)
        self.examples: list[tuple[Tensor, Tensor, Tensor]] = []

    def predict(self, network: Any, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the images (b c H W), masks (b h w) and predicted masks (b h w) of batches of one image each."""
        for batch in batches:
            if len(batch.images):  # a damaged image leaves an empty batch
                images, _, masks, *_ = batch.to(self.run.engine.device)
                with self.run.accelerator.autocast():
                    logits = predict_logits(network, self.normalize(images), self.crop, self.flip)
                yield images, masks.long(), resized_argmax(logits.float(), masks.shape[-2:])

    @torch.no_grad()
    def score(self, network: Any, images: int | None = None) -> dict[str, float]:
        """Return miou, boundary_miou and pixel_accuracy in %, over all processes.

        Args:
            images: number of validation images, evenly spaced; all by default.

        Raises:
            UserError: no image can be used, or all pixels are ignored.
        """
        with any_backend():
            from torchmetrics.functional.classification import multiclass_confusion_matrix

        run, training, classes = self.run, network.training, len(self.classes.names)
        network.eval()
        confusions = torch.zeros(2, classes, classes, dtype=torch.int64, device=run.engine.device)
        self.images = min(images or self.test.length, self.test.length)
        indices = evenly_spaced(self.test.length, self.images)[run.engine.rank :: run.engine.world_size]
        loader = single_image_loader(self.test, self.samples, indices, self.workers)
        batches = limit_bad_images(loader, self.max_bad * self.images, run.display.print_once)
        self.examples = []
        for pictures, masks, predicted in self.predict(network, batches):
            boundary_masks = masks.masked_fill(~near_boundaries(masks), IGNORE)
            for confusion, target in zip(confusions, (masks, boundary_masks), strict=True):
                confusion += multiclass_confusion_matrix(
                    predicted, target, classes, ignore_index=IGNORE, validate_args=False
                )
            if len(self.examples) < EXAMPLES:
                self.examples.append((pictures[0].cpu(), masks[0].cpu(), predicted[0].cpu()))
        network.train(training)
        (confusions,) = run.engine.sum(confusions)
        self.confusion = confusions[0]
        if not self.confusion.any():
            raise UserError(
                f"{self.test.name} has nothing to evaluate: no image can be used, or all pixels are ignored. Check the "
                "images and masks."
            )
        miou, boundary_miou = (float(iou(confusion).nanmean()) for confusion in confusions)
        accuracy = 100 * float(self.confusion.diagonal().sum() / self.confusion.sum())
        return {"miou": miou, "boundary_miou": boundary_miou, "pixel_accuracy": accuracy}

    def dry_run(self, network: Any, samples: SampleLoader, data: Source) -> None:
        """Check a few images of both splits, train and evaluate on two images, and print what they contain.

        Args:
            samples: loads a row of `data` as in training.
            data: training images and their masks.

        Raises:
            UserError: an image or a mask cannot be used.
        """
        for source, sample_loader in ((data, samples), (self.test, self.samples)):
            loaded = check_samples(source, sample_loader)
            masks = [torch.as_tensor(sample.label).flatten() for sample in loaded]
            counts = torch.stack([torch.bincount(mask, minlength=IGNORE + 1) for mask in masks]).sum(0)
            percent = (100 * counts / counts.sum()).tolist()
            content = [f"{name} {percent[i]:.1f} %" for i, name in enumerate(self.classes.names) if percent[i]]
            content.append(f"ignored {percent[IGNORE]:.1f} %")
            self.run.print(
                f"{source.name}: {source.length:,} images; pixels of {len(loaded)} of them: {', '.join(content)}"
            )
        batch = collate([samples(data.rows[i % data.length], 0, i) for i in range(2)]).to(self.run.engine.device)
        network.train()
        with self.run.accelerator.autocast():
            loss = segmentation_loss(network(self.normalize(batch.images)), batch.labels)
        loss.backward()
        network.zero_grad()
        self.run.print(f"loss of 2 images {loss.item():.3f}; {self.format_scores(self.score(network, 2))}")

    def format_scores(self, scores: dict[str, float]) -> str:
        """Format the scores as one line of text."""
        miou, boundary_miou, accuracy = scores.values()
        return (
            f"mIoU {miou:.2f} % ({boundary_miou:.2f} % within {BOUNDARY} px of an edge), pixel accuracy "
            f"{accuracy:.2f} % on {self.images} test images"
        )

    def write(self, network: Any, folder: Path) -> None:
        """Write the network, its classes, and how it was evaluated."""
        about = {"short": self.short, "crop": self.crop, "flip": self.flip}
        write_dense(network, folder, "segmenter", self.classes.names, self.classes.values, self.normalize, **about)

    def draw(self, folder: Path) -> list[str]:
        """Draw a few images with their masks and predictions, and write a table of classes. Return the files' names."""
        names = ["classes.csv"]
        if self.examples:  # this process may have met damaged images only
            plot_segmentations(self.examples, self.classes.names, folder / "predictions.png")
            names.insert(0, "predictions.png")
        with replacing_file(folder / "classes.csv") as file, open(file, "w", newline="") as opened:
            table = csv.writer(opened)
            table.writerow(["class", "iou", "accuracy", "pixels"])
            columns = self.classes.names, iou(self.confusion), self.confusion.diagonal(), self.confusion.sum(1)
            for name, value, hits, pixels in zip(*columns, strict=True):
                table.writerow([name, f"{value:.2f}", f"{100 * hits / pixels:.2f}" if pixels else "", int(pixels)])
        return names


def predict_masks(
    folder: Path,
    images: str,
    out: str,
    max_bad: float,
    parts: str | None = None,
    image_column: str | None = None,
    value_range: ValueRange = UNIT,
) -> int:
    """Write a mask for each image, in the image's size. The numbers stand for classes as in the training masks.

    Args:
        folder: folder of the network.
        images, parts, image_column: the images, see `open_all`.
        value_range: values of floating-point images that become 0 and 1.
        out: folder to write, which must be new or empty.
        max_bad: fraction of images that may be impossible to decode.

    Returns:
        The number of masks.

    Raises:
        UserError: `out` is not empty, too many images are damaged, or two masks would have the same name.
    """
    if Path(out).exists() and (Path(out).is_file() or any(Path(out).iterdir())):
        raise UserError(f"--out {out} exists already. Choose a new folder.")
    model, description = read_dense(folder, "segmenter", Segmenter)
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    device = next(model.parameters()).device
    normalize = Normalize(description["mean"], description["std"]).to(device)

    def transform(image: Any, _: Any) -> tuple[Any, Tensor]:
        size = checked_size(image)
        return resize_short(image, size, description["short"]), torch.tensor(size)

    sources = set_value_range(value_range, *open_all(images, parts, image_column=image_column))
    if sources[0].about:
        print(sources[0].about)
    written: set[Path] = set()
    with replacing(out) as temporary, torch.inference_mode():
        for part, source in enumerate(sources):
            fields = (source.image, None)
            samples = SampleLoader(transform, description["in_chans"], 0, 0, fields, lambda cell: cell, source.part)
            loader = single_image_loader(source, samples, range(source.length))
            for batch in limit_bad_images(loader, max_bad * source.length, print):
                if not len(batch.images):
                    continue
                pixels = normalize(batch.images.to(device))
                logits = predict_logits(model, pixels, description["crop"], description["flip"])
                classes = resized_argmax(logits, batch.labels[0].tolist())[0].cpu()
                name = Path(batch.names[0])
                if name.is_relative_to(images) and name != Path(images):
                    name = name.relative_to(images)
                else:  # a single file, or a row of a table, which is named by its number
                    name = Path(name.name if name.exists() else f"{part}-{name}".replace(" ", "-"))
                file = temporary / name.with_suffix(".png")
                if file in written:
                    raise UserError(f"--images {images} has two images named {name.stem}. Predict them separately.")
                written.add(file)
                file.parent.mkdir(parents=True, exist_ok=True)
                values = description["class_values"]
                save_mask(torch.tensor(values)[classes], values, file)
    return len(written)


def save_mask(mask: Tensor, values: list[int], file: Path) -> None:
    """Write a mask (H W) as a PNG with a palette, so that viewers show it in colors, or with 16 bits for large numbers.

    Args:
        values: the numbers that stand for classes, each of which gets a color.
    """
    if max(values) > 255:
        Image.fromarray(mask.numpy().astype(np.uint16)).save(file)
        return
    picture = Image.fromarray(mask.numpy().astype(np.uint8), mode="P")
    colors = np.zeros((256, 3), np.uint8)
    colors[values] = palette(len(values))
    picture.putpalette(colors.flatten().tolist())
    picture.save(file)
