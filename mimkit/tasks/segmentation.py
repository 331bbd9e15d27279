"""Semantic segmentation: a decoder on any backbone, whole images and windows of them, mIoU."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mimkit.data.loader import check_samples, limit_bad_images, single_image_loader
from mimkit.data.order import evenly_spaced
from mimkit.data.sample import Batch, SampleLoader, collate
from mimkit.data.segmentation import IGNORE, Classes, eval_pairs
from mimkit.data.sources import Source, open_all
from mimkit.data.transforms import Normalize, Size, checked_size, resize_short
from mimkit.errors import UserError
from mimkit.files import replacing, replacing_file
from mimkit.models.feature_pyramid import Pyramid
from mimkit.tasks.dense_checkpoint import read_dense, write_dense
from mimkit.tasks.plots import palette, segmentations
from mimkit.training.run import Run

EDGE = 3  # px: how far from an edge between classes its boundary reaches


class Segmenter(nn.Module):
    """A pyramid, a decoder of segmentation-models-pytorch, and scores of classes.

    Args:
        backbone: of timm.
        classes: how many.
        decoder: upernet (Xiao et al., ECCV 2018) or fpn (Kirillov et al., CVPR 2019).
        width: channels of the decoder.
        neck, window: as in `Pyramid`.
        drop_rate: of channels before the scores.
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
            from torchmetrics.functional.classification import multiclass_confusion_matrix  # noqa: F401  for judging
        except ImportError as error:
            raise UserError(
                "Segmentation needs segmentation-models-pytorch and torchmetrics: pip install 'mimkit[dense]'."
            ) from error
        self.pyramid = Pyramid(backbone, neck, window)
        channels = [0, 0, *self.pyramid.channels]  # smp counts from 1/1 and 1/2, which neither decoder looks at
        if decoder == "upernet":
            self.decoder: Any = UPerNetDecoder(channels, decoder_channels=width)
        elif decoder == "fpn" and width % 32 == 0:
            self.decoder = FPNDecoder(channels, pyramid_channels=width, segmentation_channels=width, dropout=0)
        else:
            raise UserError(
                f"--decoder {decoder} with --decoder-dim {width}: choose upernet, or fpn and a multiple of 32."
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
        """(b c H W) -> scores (b classes H W)"""
        height, width = x.shape[-2:]
        maps = self.pyramid(x)
        scores = self.head(self.drop(self.decoder([x, x, *maps])))
        scale = height + -height % self.pyramid.multiple, width + -width % self.pyramid.multiple
        return F.interpolate(scores, scale, mode="bilinear")[..., :height, :width]


def loss_of(scores: Tensor, masks: Tensor) -> Tensor:
    """Mean cross entropy over all pixels; ignored ones count as 0, so that all parts of a step weigh the same.

    scores: (b classes H W); masks: (b H W)
    """
    return F.cross_entropy(scores, masks.long(), ignore_index=IGNORE, reduction="sum") / masks.numel()


def windows(side: int, crop: int) -> list[int]:
    """Where windows begin that cover a side, each two thirds of a window after the one before."""
    return [*range(0, max(side - crop, 0), max(1, 2 * crop // 3)), max(side - crop, 0)]


def scores_of(model: Any, x: Tensor, crop: Size | None = None, flip: bool = False) -> Tensor:
    """(b c H W) -> scores (b classes H W)

    Args:
        crop: slide a window of this size over larger images, and average the scores where windows overlap.
        flip: average the scores with those of the mirrored image.
    """
    if flip:
        return (scores_of(model, x, crop) + scores_of(model, x.flip(-1), crop).flip(-1)) / 2
    height, width = x.shape[-2:]
    if crop is None or (height <= crop[0] and width <= crop[1]):
        return model(x)
    total, count = x.new_zeros(()), x.new_zeros(1, 1, height, width)
    for top in windows(height, crop[0]):
        for left in windows(width, crop[1]):
            place = (..., slice(top, top + crop[0]), slice(left, left + crop[1]))
            part = model(x[place]).float()
            if not total.ndim:
                total = part.new_zeros(*part.shape[:2], height, width)
            total[place] += part
            count[place] += 1
    return total / count


def near_edges(masks: Tensor, reach: int = EDGE) -> Tensor:
    """(b H W) -> whether another class lies within `reach` px, along the axes or between them (b H W)"""
    known, wide = masks != IGNORE, 2 * reach + 1
    values = masks.float()
    largest = F.max_pool2d(values.masked_fill(~known, -1)[:, None], wide, 1, reach)
    smallest = -F.max_pool2d(-values.masked_fill(~known, IGNORE)[:, None], wide, 1, reach)
    return ((largest > smallest) & known[:, None])[:, 0]


def iou(confusion: Tensor) -> Tensor:
    """(classes classes), true by predicted -> intersection over union of each in %, NaN for what is nowhere"""
    both = confusion.diagonal().double()
    return 100 * both / (confusion.sum(0) + confusion.sum(1) - both)


def best_of(scores: Tensor, size: Sequence[int]) -> Tensor:
    """Scores (b classes h w) scaled to H W -> the best class (b H W), for a few at a time: photographs are large"""
    best = scores.new_full((len(scores), *size), -torch.inf)
    found = torch.zeros_like(best, dtype=torch.long)
    for first in range(0, scores.shape[1], 8):
        value, place = F.interpolate(scores[:, first : first + 8], list(size), mode="bilinear").max(1)
        found = torch.where(value > best, first + place, found)
        best = torch.maximum(value, best)
    return found


class Segmentation:
    """Mean intersection over union, and the same of the pixels near an edge between classes.

    Images are scaled to `short` px of their short side; scores are scaled back to the mask's own size.

    Args:
        crop, flip: as in `scores_of`.
    """

    figure = "miou"
    hints: tuple[str, ...] = ("predict --model {} --images FOLDER --out masks",)

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
        self.shown: list[tuple[Tensor, Tensor, Tensor]] = []

    def predicted(self, network: Any, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of one -> image (b c H W), mask (b h w) and predicted classes (b h w)"""
        for batch in batches:
            if len(batch.images):  # else it is bad
                images, _, masks, *_ = batch.to(self.run.engine.device)
                with self.run.accelerator.autocast():
                    scores = scores_of(network, self.normalize(images), self.crop, self.flip)
                yield images, masks.long(), best_of(scores.float(), masks.shape[-2:])

    @torch.no_grad()
    def score(self, network: Any, images: int | None = None) -> dict[str, float]:
        """miou, boundary_miou and pixel_accuracy, in %, of so many evenly spread images, or of all"""
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        training, n = network.training, len(self.classes.names)
        network.eval()
        counts = torch.zeros(2, n, n, dtype=torch.int64, device=self.run.engine.device)
        run, self.images = self.run, min(images or self.test.length, self.test.length)
        share = evenly_spaced(self.test.length, self.images)[
            run.accelerator.process_index :: run.accelerator.num_processes
        ]
        loader = single_image_loader(self.test, self.samples, share, self.workers)
        batches = limit_bad_images(loader, self.max_bad * self.images, run.display.print_once)
        self.shown = []
        for pictures, masks, found in self.predicted(network, batches):
            near = masks.masked_fill(~near_edges(masks), IGNORE)
            for count, target in zip(counts, (masks, near), strict=True):
                count += multiclass_confusion_matrix(found, target, n, ignore_index=IGNORE, validate_args=False)
            if len(self.shown) < 6:
                self.shown.append((pictures[0].cpu(), masks[0].cpu(), found[0].cpu()))
        network.train(training)
        (counts,) = self.run.engine.sum(counts)
        self.confusion = counts[0]
        if not self.confusion.any():
            raise UserError(
                f"Nothing of {self.test.name} can be judged: no image can be used, or all pixels are ignored."
            )
        miou, boundary = (float(iou(confusion).nanmean()) for confusion in counts)
        accuracy = 100 * float(self.confusion.diagonal().sum() / self.confusion.sum())
        return {"miou": miou, "boundary_miou": boundary, "pixel_accuracy": accuracy}

    def rehearse(self, network: Any, samples: SampleLoader, data: Source) -> None:
        """Two images through everything that training and judging do; tell what there is.

        Raises:
            UserError: an image or a mask cannot be used.
        """
        for part, look in ((data, samples), (self.test, self.samples)):
            views = check_samples(part, look)
            counts = torch.stack(
                [torch.bincount(torch.as_tensor(view.label).flatten(), minlength=IGNORE + 1) for view in views]
            ).sum(0)
            shares = (100 * counts / counts.sum()).tolist()
            seen = [f"{name} {shares[i]:.1f} %" for i, name in enumerate(self.classes.names) if shares[i]]
            seen.append(f"ignored {shares[IGNORE]:.1f} %")
            self.run.print(f"{part.name}: {part.length:,} images; pixels of {len(views)} of them: {', '.join(seen)}")
        batch = collate([samples(data.rows[i % data.length], 0, i) for i in range(2)]).to(self.run.engine.device)
        network.train()
        with self.run.accelerator.autocast():
            loss = loss_of(network(self.normalize(batch.images)), batch.labels)
        loss.backward()
        network.zero_grad()
        self.run.print(f"loss of 2 images {loss.item():.3f}; {self.format_scores(self.score(network, 2))}")

    def format_scores(self, figures: dict[str, float]) -> str:
        """In a line."""
        miou, boundary, accuracy = figures.values()
        return (
            f"mIoU {miou:.2f} %, {boundary:.2f} % within {EDGE} px of an edge, {accuracy:.2f} % of the pixels of "
            f"{self.images} test images"
        )

    def write(self, network: Any, folder: Path) -> None:
        """The network, its classes and how images come to it."""
        about = {"short": self.short, "crop": self.crop, "flip": self.flip}
        write_dense(network, folder, "segmenter", self.classes.names, self.classes.values, self.normalize, **about)

    def draw(self, folder: Path) -> list[str]:
        """Images with their masks and what was predicted, and a table of classes."""
        names = ["classes.csv"]
        if self.shown:  # else all images of this process are bad
            segmentations(self.shown, self.classes.names, folder / "predictions.png")
            names.insert(0, "predictions.png")
        with replacing_file(folder / "classes.csv") as file, open(file, "w", newline="") as opened:
            table = csv.writer(opened)
            table.writerow(["class", "iou", "accuracy", "pixels"])
            pixels, found = self.confusion.sum(1), self.confusion.diagonal()
            for name, value, hits, all_ in zip(self.classes.names, iou(self.confusion), found, pixels, strict=True):
                table.writerow([name, f"{value:.2f}", f"{100 * hits / all_:.2f}" if all_ else "", int(all_)])
        return names


def predict_masks(folder: Path, images: str, out: str, max_bad: float) -> int:
    """Write a mask for each image, of its size, in the numbers of the classes that the network was trained with.

    Args:
        folder: of the network.
        images: as `open_all` takes them.
        out: folder to write, which must not be there yet.

    Returns:
        How many masks.
    """
    if Path(out).exists() and (Path(out).is_file() or any(Path(out).iterdir())):
        raise UserError(f"--out {out} is there already: choose a new folder.")
    model, own = read_dense(folder, "segmenter", Segmenter)
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    device = next(model.parameters()).device
    normalize = Normalize(own["mean"], own["std"]).to(device)

    def transform(image: Any, _: Any) -> tuple[Any, Tensor]:
        size = checked_size(image)
        return resize_short(image, size, own["short"]), torch.tensor(size)

    sources = open_all(images)
    written: set[Path] = set()
    with replacing(out) as temporary, torch.inference_mode():
        for part, source in enumerate(sources):
            samples = SampleLoader(
                transform, own["in_chans"], 0, 0, (source.image, None), lambda cell: cell, source.part
            )
            loader = single_image_loader(source, samples, range(source.length))
            for batch in limit_bad_images(loader, max_bad * source.length, print):
                if not len(batch.images):
                    continue
                scores = scores_of(model, normalize(batch.images.to(device)), own["crop"], own["flip"])
                found = best_of(scores, batch.labels[0].tolist())[0].cpu()
                place = Path(batch.names[0])
                if place.is_relative_to(images) and place != Path(images):
                    place = place.relative_to(images)
                else:  # a file alone, or a row, whose name is its number
                    place = Path(place.name if place.exists() else f"{part}-{place}".replace(" ", "-"))
                file = temporary / place.with_suffix(".png")
                if file in written:
                    raise UserError(f"--images {images} has two images named {place.stem}: predict them apart.")
                written.add(file)
                file.parent.mkdir(parents=True, exist_ok=True)
                paint(torch.tensor(own["class_values"])[found], own["class_values"], file)
    return len(written)


def paint(mask: Tensor, values: list[int], file: Path) -> None:
    """(H W) -> a PNG of these numbers, which viewers show in colors."""
    picture = Image.fromarray(mask.numpy().astype(np.uint8), mode="P")
    colors = np.zeros((256, 3), np.uint8)
    colors[values] = palette(len(values))
    picture.putpalette(colors.flatten().tolist())
    picture.save(file)
