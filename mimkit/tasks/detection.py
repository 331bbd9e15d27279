"""Detection and instance segmentation: torchvision's Faster and Mask R-CNN on any backbone, judged as COCO is."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from mimkit.data.detection import CocoGroundTruth, Objects, fitting, read_objects
from mimkit.data.loader import check_samples, limit_bad_images, single_image_loader
from mimkit.data.order import evenly_spaced
from mimkit.data.sample import SampleLoader, collate_list
from mimkit.data.sources import Source, open_all
from mimkit.data.transforms import Normalize, Size, checked_size, resize_short
from mimkit.errors import UserError
from mimkit.files import replacing_file
from mimkit.models.feature_pyramid import Pyramid
from mimkit.tasks.dense_checkpoint import read_dense, write_dense
from mimkit.tasks.plots import detections
from mimkit.training.run import Run

SURE = 0.5  # score from which a detection is drawn
KINDS = {"box": "bbox", "mask": "segm"}  # what is judged, as COCO names it
FIGURES = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5}  # places in COCO's summary


class FPNBackbone(nn.Module):
    """A feature pyramid network over a `Pyramid`: maps of one width at 1/4, 1/8, 1/16, 1/32 and 1/64 (Lin et al., CVPR
    2017), normalized over channels."""

    def __init__(self, pyramid: Pyramid, width: int):
        super().__init__()
        self.pyramid, self.out_channels = pyramid, width
        self.fpn = FeaturePyramidNetwork(pyramid.channels, width, LastLevelMaxPool(), norm_layer=LayerNorm2d)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(b c H W) -> {"0": (b width H/4 W/4), "1": ..., "pool": ...}"""
        return self.fpn({str(i): m for i, m in enumerate(self.pyramid(x))})


def cast_fp32(module: nn.Module, inputs: Any, output: Any) -> Any:
    """A head's output in float32: bf16 would round boxes of 1,000 px to 4, and let NMS merge those of many classes."""
    return tree_map(Tensor.float, output)


def keep_small_masks(module: nn.Module, inputs: Any, output: Any) -> None:
    """Masks stay as small as they are found, under another name: up to 100 would be pasted into floats of the whole
    image at once, gigabytes for a photograph."""
    for found in output[0]:
        if "masks" in found:
            found["small"] = found.pop("masks")


class Scaling(GeneralizedRCNNTransform):
    """torchvision's, but an image that is judged is scaled with antialiasing, as those of training are."""

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        """(c H W) -> (c H W); in training `train_objects` has done it"""
        if self.training:
            return image, target
        height, width = image.shape[-2:]
        long = self.max_size * min(height, width) / max(height, width)
        return resize_short(image, (height, width), min(self.min_size[0], long)), target


class Detector(nn.Module):
    """torchvision's Mask R-CNN (He et al., ICCV 2017), or without masks its Faster R-CNN, on a pyramid.

    Args:
        backbone: of timm, with maps at 4, 8, 16 and 32 px, or a pyramid of them.
        classes: how many, without the background.
        masks: find masks too.
        neck, window: as in `Pyramid`.
        width: channels of the feature pyramid and the heads; torchvision's are the default.
        samples: regions of an image that the heads learn from.
        short, long: an image that is judged is scaled to this short side, unless its long side were longer than that.
        mean, std: of the colors.
    """

    def __init__(
        self,
        backbone: Any,
        classes: int,
        masks: bool = True,
        neck: str = "auto",
        window: int = 0,
        width: int = 256,
        samples: int = 512,
        short: int = 800,
        long: int = 1333,
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ):
        super().__init__()
        pyramid = Pyramid(backbone, neck, window)
        if pyramid.multiple != 32:
            raise UserError(
                f"{backbone.pretrained_cfg['architecture']} has maps at 1/4 to 1/32 of the input only with patches of "
                f"{pyramid.patch} px, which regions are cut from: pass --model-args.patch_size {pyramid.patch}."
            )
        kinds = classes + 1  # torchvision's 0 is the background
        heads: dict[str, Any] = {
            "box_head": TwoMLPHead(width * 7**2, 4 * width),
            "box_predictor": FastRCNNPredictor(4 * width, kinds),
        }
        if masks:
            heads["mask_head"] = MaskRCNNHeads(width, (width,) * 4, dilation=1)
            heads["mask_predictor"] = MaskRCNNPredictor(width, width, kinds)
        network: Any = MaskRCNN if masks else FasterRCNN
        self.rcnn = network(
            FPNBackbone(pyramid, width),
            **heads,
            image_mean=mean,
            image_std=std,
            box_batch_size_per_image=samples,
        )
        colors = self.rcnn.transform.image_mean, self.rcnn.transform.image_std
        self.rcnn.transform = Scaling(short, long, *colors, size_divisible=pyramid.multiple)
        for pool in (self.rcnn.roi_heads.box_roi_pool, self.rcnn.roi_heads.mask_roi_pool):
            if pool is not None:  # it would guess them from the first image's size without its padding, once
                pool.scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
                pool.map_levels = initLevelMapper(2, 5, pool.canonical_scale, pool.canonical_level)
        for head in (self.rcnn.rpn.head, self.rcnn.roi_heads.box_predictor, self.rcnn.roi_heads.mask_predictor):
            if head is not None:
                head.register_forward_hook(cast_fp32)
        self.rcnn.roi_heads.register_forward_hook(keep_small_masks)
        self._model_args: dict[str, Any] = {
            "masks": masks,
            "neck": pyramid.neck,
            "window": window,
            "width": width,
            "samples": samples,
            "short": short,
            "long": long,
            "mean": mean,
            "std": std,
        }

    @property
    def pyramid(self) -> Pyramid:
        """What the heads stand on."""
        return self.rcnn.backbone.pyramid

    def compile(self, **options: Any) -> None:
        """torch.compile, in place, what the heads stand on: how many regions they see differs from image to image."""
        self.rcnn.backbone.compile(**options)

    def scale_to(self, short: int | None, long: int | None) -> tuple[int, int]:
        """Change `short` and `long`, as far as they are given; -> what they are now"""
        own = self._model_args
        short, long = short or own["short"], long or own["long"]
        if short > long:
            raise UserError(f"--short-side {short} is above --long-side {long}: give the shorter one first.")
        own |= {"short": short, "long": long}
        self.rcnn.transform.min_size, self.rcnn.transform.max_size = (short,), long
        return short, long

    def forward(self, images: list[Tensor], objects: list[Objects] | None = None) -> Any:
        """Images (c H W) of any sizes, uint8 or in 0-1 -> losses by name; in evaluation, for each image, boxes (n 4) in
        its own pixels, labels (n) from 1, scores (n), and `small` (n 1 28 28) in 0-1, which `masks_of` lays into it;
        the surest first"""
        scaled = [x / 255 if x.dtype == torch.uint8 else x for x in images]
        return self.rcnn(scaled, objects)


def masks_of(found: dict[str, Tensor], size: Size) -> Iterator[Tensor]:
    """Detections in an image of this size -> their masks (H W), bool, one at a time"""
    for small, box in zip(found["small"], found["boxes"], strict=True):
        yield paste_masks_in_image(small[None], box[None], size)[0, 0] > 0.5


def as_results(found: dict[str, Tensor], image: Any, numbers: list[int], size: Size) -> list[dict[str, Any]]:
    """Detections in an image of this size -> COCO's results, masks run-length encoded."""
    from faster_coco_eval import mask

    x, y, right, bottom = found["boxes"].float().cpu().unbind(1)
    boxes = torch.stack([x, y, right - x, bottom - y], dim=1).tolist()
    about = zip(found["labels"].tolist(), found["scores"].tolist(), boxes, strict=True)
    results = [
        {"image_id": image, "category_id": numbers[label - 1], "bbox": box, "score": score}
        for label, score, box in about
    ]
    if "small" in found:
        for result, one in zip(results, masks_of(found, size), strict=True):
            packed = mask.encode(np.asfortranarray(one.byte().cpu().numpy()))
            counts = packed["counts"]
            counts = counts.decode() if isinstance(counts, bytes) else counts
            result["segmentation"] = {"size": list(packed["size"]), "counts": counts}
    return results


def coco_metrics(
    truth: CocoGroundTruth, results: list[dict[str, Any]], ids: list[Any], kind: str
) -> tuple[dict[str, float], list[float]]:
    """COCO's average precision, in %, over these images.

    Args:
        kind: box or mask.

    Returns:
        `FIGURES` as KIND_ap, ..., and the average precision of each category; NaN where there is nothing to find.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    known = COCO(truth.coco)
    other = {"box": "segmentation", "mask": "bbox"}[kind]  # it would say how large a detection is
    results = [{key: value for key, value in result.items() if key != other} for result in results]
    judge = COCOeval_faster(known, known.loadRes(results), KINDS[kind], print_function=lambda *_: None)
    judge.params.imgIds = ids
    judge.run()
    figures = {f"{kind}_{name}": 100 * float(judge.stats[place]) for name, place in FIGURES.items()}
    precision = np.asarray(judge.eval["precision"])[:, :, :, 0, -1]  # thresholds, recalls, categories
    own = np.where(precision > -1, precision, np.nan)
    each = [
        100 * float(np.nanmean(own[:, :, i])) if (own[:, :, i] >= 0).any() else float("nan")
        for i in range(own.shape[2])
    ]
    return {name: value if value >= 0 else float("nan") for name, value in figures.items()}, each


class Detection:
    """COCO's average precision of boxes, and of masks where the network finds them."""

    figure = "box_ap"
    hints: tuple[str, ...] = ("predict --model {} --images FOLDER --out found.json",)

    def __init__(
        self,
        run: Run,
        test: Source,
        truth: CocoGroundTruth,
        normalize: Normalize,
        masks: bool,
        workers: int = 0,
        max_bad: float = 0.01,
    ):
        self.workers, self.max_bad = workers, max_bad
        self.run, self.test, self.truth, self.normalize = run, test, truth, normalize
        self.kinds = ("box", "mask") if masks else ("box",)
        fields = (test.image, test.label)
        in_chans = len(normalize.values[0])
        self.samples = SampleLoader(fitting, in_chans, 0, 0, fields, read_objects(masks))
        self.shown: list[tuple[Tensor, Any, Any]] = []

    @torch.no_grad()
    def score(self, network: Any, images: int | None = None) -> dict[str, float]:
        """box_ap, box_ap50, ..., mask_ap, ..., in %, of so many evenly spread images, or of all"""
        run, training = self.run, network.training
        network.eval()
        self.images = min(images or self.test.length, self.test.length)
        places = evenly_spaced(self.test.length, self.images)
        share = places[run.accelerator.process_index :: run.accelerator.num_processes]
        loader = single_image_loader(self.test, self.samples, share, self.workers, collate_list)
        batches = limit_bad_images(loader, self.max_bad * self.images, run.display.print_once)
        results: list[dict[str, Any]] = []
        judged: list[Any] = []  # of images that can be used: nothing could be found in the others
        self.shown = []
        for place, batch in zip(share, batches, strict=True):
            if not batch.images:
                continue
            with run.accelerator.autocast():
                (found,) = network(batch.to(run.engine.device).images)
            height, width = batch.images[0].shape[-2:]
            size = (height, width)
            results += as_results(found, self.truth.ids[place], self.truth.numbers, size)
            judged.append(self.truth.ids[place])
            if len(self.shown) < 6:
                sure = {name: value[found["scores"] >= SURE].cpu() for name, value in found.items()}
                if len(sure.get("small", ())):
                    sure["masks"] = torch.stack([*masks_of(sure, size)])
                self.shown.append((batch.images[0], batch.labels[0], sure))
        network.train(training)
        results, judged = gather_object(results), gather_object(judged)
        if not judged:
            raise UserError(f"Nothing of {self.test.name} can be judged: not one of its images can be used.")
        figures: list[Any] = [None, None]
        if run.engine.is_main:
            both = [coco_metrics(self.truth, results, judged, kind) for kind in self.kinds]
            figures = [{name: value for own, _ in both for name, value in own.items()}, [each for _, each in both]]
        broadcast_object_list(figures)
        self.each: list[list[float]] = figures[1]
        return figures[0]

    def rehearse(self, network: Any, samples: SampleLoader, data: Source) -> None:
        """Two images through everything that training and judging do; tell what there is.

        Raises:
            UserError: an image or its objects cannot be used.
        """
        for part, look in ((data, samples), (self.test, self.samples)):
            views = check_samples(part, look)
            labels = torch.cat([view.label["labels"] for view in views]).bincount(minlength=1 + len(self.truth.names))
            seen = [f"{name} {n}" for name, n in zip(self.truth.names, labels[1:].tolist(), strict=True) if n]
            empty = [view.name for view in views if not len(view.label["labels"])]
            self.run.print(
                f"{part.name}: {part.length:,} images; objects in {len(views)} of them: {', '.join(seen) or 'none'}; "
                f"{len(empty)} without any{f', such as {empty[0]}' if empty else ''}"
            )
        batch = collate_list([samples(data.rows[i % data.length], 0, i) for i in range(2)])
        batch = batch.to(self.run.engine.device)
        network.train()
        with self.run.accelerator.autocast():
            losses = network(batch.images, batch.labels)
        sum(losses.values()).backward()
        network.zero_grad()
        told = ", ".join(f"{name.removeprefix('loss_')} {value.item():.3f}" for name, value in losses.items())
        self.run.print(f"losses of 2 images: {told}; {self.format_scores(self.score(network, 2))}")

    def format_scores(self, figures: dict[str, float]) -> str:
        """In a line."""
        told = []
        for kind in self.kinds:
            ap, ap50, ap75 = (figures[f"{kind}_{name}"] for name in ("ap", "ap50", "ap75"))
            told.append(f"{kind} AP {ap:.2f} % (at 50: {ap50:.2f}, at 75: {ap75:.2f})")
        return f"{', '.join(told)} of {self.images} test images"

    def write(self, network: Any, folder: Path) -> None:
        """The network and its classes."""
        write_dense(network, folder, "detector", self.truth.names, self.truth.numbers, self.normalize)

    def draw(self, folder: Path) -> list[str]:
        """Images with their objects and what was found, and a table of classes."""
        names = ["classes.csv"]
        if self.shown:  # else all images of this process are bad
            detections(self.shown, self.truth.names, folder / "predictions.png")
            names.insert(0, "predictions.png")
        with replacing_file(folder / "classes.csv") as file, open(file, "w", newline="") as opened:
            table = csv.writer(opened)
            table.writerow(["class", *(f"{kind}_ap" for kind in self.kinds)])
            for name, *values in zip(self.truth.names, *self.each, strict=True):
                table.writerow([name, *(f"{value:.2f}" for value in values)])
        return names


def predict_objects(folder: Path, images: str, out: str, max_bad: float) -> int:
    """Write what is found in each image as a file of COCO's format, each annotation with its score.

    Args:
        folder: of the network.
        images: as `open_all` takes them.
        out: file to write, which must not be there yet.

    Returns:
        How many images.
    """
    if Path(out).exists():
        raise UserError(f"--out {out} is there already: choose a new file.")
    model, own = read_dense(folder, "detector", Detector)
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    device = next(model.parameters()).device

    def transform(image: Any) -> Any:
        checked_size(image)
        return image

    pictures: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for source in open_all(images):
            samples = SampleLoader(transform, own["in_chans"], 0, 0, (source.image, None), part=source.part)
            loader = single_image_loader(source, samples, range(source.length), collate=collate_list)
            for batch in limit_bad_images(loader, max_bad * source.length, print):
                if batch.images:
                    height, width = batch.images[0].shape[-2:]
                    about = {"id": len(pictures) + 1, "file_name": batch.names[0], "height": height, "width": width}
                    pictures.append(about)
                    (found,) = model(batch.to(device).images)
                    results += as_results(found, about["id"], own["class_values"], (height, width))
    for i, result in enumerate(results):
        *_, width, height = result["bbox"]
        result |= {"id": i + 1, "iscrowd": 0, "area": width * height}
    named = zip(own["class_values"], own["class_names"], strict=True)
    categories = [{"id": number, "name": name} for number, name in named]
    with replacing_file(out) as file:
        file.write_text(json.dumps({"images": pictures, "annotations": results, "categories": categories}))
    return len(pictures)
