"""Detection and instance segmentation: torchvision's Faster and Mask R-CNN on any backbone, and COCO's metrics."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
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

from mimkit.data.decode import UNIT, ValueRange
from mimkit.data.detection import CocoGroundTruth, Objects, fitting, read_objects
from mimkit.data.loader import check_samples, limit_bad_images, single_image_loader
from mimkit.data.order import evenly_spaced
from mimkit.data.sample import SampleLoader, collate_list
from mimkit.data.sources import Source, open_all, set_value_range
from mimkit.data.transforms import Normalize, Size, checked_size, resize_short
from mimkit.errors import UserError
from mimkit.files import replacing_file
from mimkit.models.feature_pyramid import Pyramid
from mimkit.tasks.dense_checkpoint import read_dense, write_dense
from mimkit.tasks.plots import plot_detections
from mimkit.training.run import Run

DRAW_FROM = 0.5  # lowest score of a detection that is drawn
EXAMPLES = 6  # number of evaluated images to draw
COCO_KINDS = {"box": "bbox", "mask": "segm"}  # what is evaluated, and COCO's name for it
METRICS = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5}  # indices in COCO's summary


class FPNBackbone(nn.Module):
    """A feature pyramid network (Lin et al., CVPR 2017) on a `Pyramid`: maps at 1/4, 1/8, 1/16, 1/32 and 1/64.

    The maps have the same number of channels, and are normalized over them.
    """

    def __init__(self, pyramid: Pyramid, width: int):
        super().__init__()
        self.pyramid, self.out_channels = pyramid, width
        self.fpn = FeaturePyramidNetwork(pyramid.channels, width, LastLevelMaxPool(), norm_layer=LayerNorm2d)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute maps {"0": (b width H/4 W/4), "1": ..., "pool": ...} of images (b c H W)."""
        return self.fpn({str(i): m for i, m in enumerate(self.pyramid(x))})


def cast_fp32(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Forward hook that casts the outputs of a head to float32.

    bf16 would round coordinates near 1,000 px to multiples of 4, and NMS would then merge boxes of different classes.
    """
    return tree_map(Tensor.float, output)


def keep_small_masks(module: nn.Module, inputs: Any, output: Any) -> None:
    """Forward hook that renames predicted masks (n 1 28 28) from `masks` to `small`, so that torchvision skips them.

    It would paste up to 100 of them into float masks of the whole image at once: gigabytes for a photograph.
    """
    for detections in output[0]:
        if "masks" in detections:
            detections["small"] = detections.pop("masks")


class EvalResize(GeneralizedRCNNTransform):
    """torchvision's input transform, but with antialiasing in evaluation, as in the training augmentation."""

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        """Resize an image (c H W) in evaluation. In training, `train_objects` has already resized it."""
        if self.training:
            return image, target
        height, width = image.shape[-2:]
        longest_short_side = self.max_size * min(height, width) / max(height, width)
        return resize_short(image, (height, width), min(self.min_size[0], longest_short_side)), target


class Detector(nn.Module):
    """torchvision's Mask R-CNN (He et al., ICCV 2017) on a pyramid; without masks, its Faster R-CNN.

    Args:
        backbone: a timm network with maps at 4, 8, 16 and 32 px, or one from which a pyramid at these strides is built.
        classes: number of classes, without the background.
        masks: whether to predict masks.
        neck, window: see `Pyramid`.
        width: number of channels of the feature pyramid and the heads; the default is torchvision's.
        samples: number of regions per image that the heads are trained on.
        short, long: in evaluation, images are resized to this short side, or less if the long side would exceed `long`.
        mean, std: normalization of the input.

    Raises:
        UserError: the backbone's patch size does not give maps at 1/4 to 1/32.
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
                f"{backbone.pretrained_cfg['architecture']} has maps at 1/4 to 1/32 of the input, which regions are "
                f"cut from, only with patches of {pyramid.patch} px. Pass --model-args.patch_size {pyramid.patch}."
            )
        outputs = classes + 1  # torchvision's class 0 is the background
        heads: dict[str, Any] = {
            "box_head": TwoMLPHead(width * 7**2, 4 * width),
            "box_predictor": FastRCNNPredictor(4 * width, outputs),
        }
        if masks:
            heads["mask_head"] = MaskRCNNHeads(width, (width,) * 4, dilation=1)
            heads["mask_predictor"] = MaskRCNNPredictor(width, width, outputs)
        network: Any = MaskRCNN if masks else FasterRCNN
        self.rcnn = network(
            FPNBackbone(pyramid, width),
            **heads,
            image_mean=mean,
            image_std=std,
            box_batch_size_per_image=samples,
        )
        normalization = self.rcnn.transform.image_mean, self.rcnn.transform.image_std
        self.rcnn.transform = EvalResize(short, long, *normalization, size_divisible=pyramid.multiple)
        for pool in (self.rcnn.roi_heads.box_roi_pool, self.rcnn.roi_heads.mask_roi_pool):
            if pool is not None:  # torchvision would infer the scales once, from the first image without its padding
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
        """The maps that the heads receive."""
        return self.rcnn.backbone.pyramid

    def compile(self, **options: Any) -> None:
        """Compile the backbone in place. The heads are not compiled: their number of regions differs between images."""
        self.rcnn.backbone.compile(**options)

    def set_size(self, short: int | None, long: int | None) -> tuple[int, int]:
        """Change the size of evaluated images, and return (short, long). None leaves a side as it is.

        Raises:
            UserError: the short side is longer than the long side.
        """
        short, long = short or self._model_args["short"], long or self._model_args["long"]
        if short > long:
            raise UserError(f"--short-side {short} is above --long-side {long}. Pass a smaller --short-side.")
        self._model_args |= {"short": short, "long": long}
        self.rcnn.transform.min_size, self.rcnn.transform.max_size = (short,), long
        return short, long

    def forward(self, images: list[Tensor], objects: list[Objects] | None = None) -> Any:
        """Compute losses by name from images (c H W), uint8 or in 0-1, and objects; in evaluation, detect objects.

        Detections are a dictionary for each image, ordered by score: boxes (n 4) in pixels of the image, labels (n)
        from 1, scores (n), and with masks `small` (n 1 28 28) in 0-1, which `paste_masks` resizes to the image.
        """
        scaled = [x / 255 if x.dtype == torch.uint8 else x for x in images]
        return self.rcnn(scaled, objects)


def paste_masks(detections: dict[str, Tensor], size: Size) -> Iterator[Tensor]:
    """Yield the masks (H W), bool, of the detections in an image of this size, one at a time."""
    for small, box in zip(detections["small"], detections["boxes"], strict=True):
        yield paste_masks_in_image(small[None], box[None], size)[0, 0] > 0.5


def coco_results(detections: dict[str, Tensor], image: Any, numbers: list[int], size: Size) -> list[dict[str, Any]]:
    """Return detections in the format of COCO's results, with run-length encoded masks.

    Args:
        detections: what a `Detector` returned for the image.
        image: id of the image.
        numbers: category ids of the classes.
        size: (H, W) of the image.
    """
    from faster_coco_eval import mask

    left, top, right, bottom = detections["boxes"].float().cpu().unbind(1)
    boxes = torch.stack([left, top, right - left, bottom - top], dim=1).tolist()
    values = zip(detections["labels"].tolist(), detections["scores"].tolist(), boxes, strict=True)
    results = [
        {"image_id": image, "category_id": numbers[label - 1], "bbox": box, "score": score}
        for label, score, box in values
    ]
    if "small" in detections:
        for result, pixels in zip(results, paste_masks(detections, size), strict=True):
            encoded = mask.encode(np.asfortranarray(pixels.byte().cpu().numpy()))
            counts = encoded["counts"]
            counts = counts.decode() if isinstance(counts, bytes) else counts
            result["segmentation"] = {"size": list(encoded["size"]), "counts": counts}
    return results


def coco_metrics(
    truth: CocoGroundTruth, results: list[dict[str, Any]], ids: list[Any], kind: str
) -> tuple[dict[str, float], list[float]]:
    """Compute COCO's average precision (AP) in %.

    Args:
        truth: annotations of the images.
        results: detections, from `coco_results`.
        ids: ids of the images to evaluate.
        kind: box or mask.

    Returns:
        The `METRICS` by name, such as box_ap, and the AP of each category. They are NaN where there are no objects.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    annotations = COCO(truth.coco)
    other = {"box": "segmentation", "mask": "bbox"}[kind]  # it would determine the area of a detection
    results = [{key: value for key, value in result.items() if key != other} for result in results]
    silent = {"print_function": lambda *_: None}
    evaluation = COCOeval_faster(annotations, annotations.loadRes(results), COCO_KINDS[kind], **silent)
    evaluation.params.imgIds = ids
    evaluation.run()
    scores = {f"{kind}_{name}": 100 * float(evaluation.stats[index]) for name, index in METRICS.items()}
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]  # IoU thresholds, recalls, categories
    precision = np.where(precision > -1, precision, np.nan)
    by_category = [
        100 * float(np.nanmean(precision[:, :, i])) if (precision[:, :, i] >= 0).any() else float("nan")
        for i in range(precision.shape[2])
    ]
    return {name: score if score >= 0 else float("nan") for name, score in scores.items()}, by_category


class Detection:
    """The task of detecting objects, scored by COCO's average precision of boxes and, if predicted, of masks.

    Args:
        run: the run, which gives the processes and prints lines.
        test: validation images and their objects.
        truth: annotations of the validation images.
        normalize: normalization of the input, which is written with the network.
        masks: whether masks are predicted and evaluated.
        workers: number of data workers.
        max_bad: fraction of images that may be impossible to decode.
    """

    figure = "box_ap"
    hints: tuple[str, ...] = ("predict --model {model} --images {images}",)

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
        self.examples: list[tuple[Tensor, Any, Any]] = []

    @torch.no_grad()
    def score(self, network: Any, images: int | None = None) -> dict[str, float]:
        """Return box_ap, box_ap50, ..., and with masks mask_ap, ..., in %, over all processes.

        Args:
            images: number of validation images, evenly spaced; all by default.

        Raises:
            UserError: no image can be used.
        """
        from accelerate.utils import broadcast_object_list, gather_object

        run, training = self.run, network.training
        network.eval()
        self.images = min(images or self.test.length, self.test.length)
        indices = evenly_spaced(self.test.length, self.images)[run.engine.rank :: run.engine.world_size]
        loader = single_image_loader(self.test, self.samples, indices, self.workers, collate_list)
        batches = limit_bad_images(loader, self.max_bad * self.images, run.display.print_once)
        results: list[dict[str, Any]] = []
        evaluated: list[Any] = []  # ids of the images that can be used: nothing can be detected in damaged ones
        self.examples = []
        for index, batch in zip(indices, batches, strict=True):
            if not batch.images:
                continue
            with run.accelerator.autocast():
                (detections,) = network(batch.to(run.engine.device).images)
            height, width = batch.images[0].shape[-2:]
            size = (height, width)
            results += coco_results(detections, self.truth.ids[index], self.truth.numbers, size)
            evaluated.append(self.truth.ids[index])
            if len(self.examples) < EXAMPLES:
                shown = {name: value[detections["scores"] >= DRAW_FROM].cpu() for name, value in detections.items()}
                if len(shown.get("small", ())):
                    shown["masks"] = torch.stack([*paste_masks(shown, size)])
                self.examples.append((batch.images[0], batch.labels[0], shown))
        network.train(training)
        results, evaluated = gather_object(results), gather_object(evaluated)
        if not evaluated:
            raise UserError(f"{self.test.name} has nothing to evaluate: no image can be used. Check the images.")
        outcome: list[Any] = [None, None]
        if run.engine.is_main:
            by_kind = [coco_metrics(self.truth, results, evaluated, kind) for kind in self.kinds]
            scores = {name: score for kind_scores, _ in by_kind for name, score in kind_scores.items()}
            outcome = [scores, [by_category for _, by_category in by_kind]]
        broadcast_object_list(outcome)
        self.by_category: list[list[float]] = outcome[1]
        return outcome[0]

    def dry_run(self, network: Any, samples: SampleLoader, data: Source) -> None:
        """Check a few images of both splits, train and evaluate on two images, and print what they contain.

        Args:
            samples: loads a row of `data` as in training.
            data: training images and their objects.

        Raises:
            UserError: an image or its objects cannot be used.
        """
        for source, sample_loader in ((data, samples), (self.test, self.samples)):
            loaded = check_samples(source, sample_loader)
            labels = torch.cat([item.label["labels"] for item in loaded]).bincount(minlength=1 + len(self.truth.names))
            content = [f"{name} {n}" for name, n in zip(self.truth.names, labels[1:].tolist(), strict=True) if n]
            empty = [item.name for item in loaded if not len(item.label["labels"])]
            self.run.print(
                f"{source.name}: {source.length:,} images; objects in {len(loaded)} of them: "
                f"{', '.join(content) or 'none'}; {len(empty)} without objects"
                f"{f', such as {empty[0]}' if empty else ''}"
            )
        batch = collate_list([samples(data.rows[i % data.length], 0, i) for i in range(2)])
        batch = batch.to(self.run.engine.device)
        network.train()
        with self.run.accelerator.autocast():
            losses = network(batch.images, batch.labels)
        sum(losses.values()).backward()
        network.zero_grad()
        values = ", ".join(f"{name.removeprefix('loss_')} {value.item():.3f}" for name, value in losses.items())
        self.run.print(f"losses of 2 images: {values}; {self.format_scores(self.score(network, 2))}")

    def format_scores(self, scores: dict[str, float]) -> str:
        """Format the scores as one line of text."""
        parts = []
        for kind in self.kinds:
            ap, ap50, ap75 = (scores[f"{kind}_{name}"] for name in ("ap", "ap50", "ap75"))
            parts.append(f"{kind} AP {ap:.2f} % (AP50 {ap50:.2f} %, AP75 {ap75:.2f} %)")
        return f"{', '.join(parts)} on {self.images} test images"

    def write(self, network: Any, folder: Path) -> None:
        """Write the network and its classes."""
        write_dense(network, folder, "detector", self.truth.names, self.truth.numbers, self.normalize)

    def draw(self, folder: Path) -> list[str]:
        """Draw a few images with objects and detections, and write a table of classes. Return the files' names."""
        names = ["classes.csv"]
        if self.examples:  # this process may have met damaged images only
            plot_detections(self.examples, self.truth.names, folder / "predictions.png")
            names.insert(0, "predictions.png")
        with replacing_file(folder / "classes.csv") as file, open(file, "w", newline="") as opened:
            table = csv.writer(opened)
            table.writerow(["class", *(f"{kind}_ap" for kind in self.kinds)])
            for name, *values in zip(self.truth.names, *self.by_category, strict=True):
                table.writerow([name, *(f"{value:.2f}" for value in values)])
        return names


def predict_objects(
    folder: Path,
    images: str,
    out: str,
    max_bad: float,
    parts: str | None = None,
    image_column: str | None = None,
    value_range: ValueRange = UNIT,
) -> int:
    """Write the detections in all images as a file in COCO's format, whose annotations have scores.

    Args:
        folder: folder of the network.
        images, parts, image_column: the images, see `open_all`.
        value_range: values of floating-point images that become 0 and 1.
        out: file to write, which must not exist.
        max_bad: fraction of images that may be impossible to decode.

    Returns:
        The number of images.

    Raises:
        UserError: `out` exists, or too many images are damaged.
    """
    if Path(out).exists():
        raise UserError(f"--out {out} exists already. Choose a new file.")
    model, description = read_dense(folder, "detector", Detector)
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    device = next(model.parameters()).device

    def transform(image: Any) -> Any:
        checked_size(image)
        return image

    sources = set_value_range(value_range, *open_all(images, parts, image_column=image_column))
    if sources[0].about:
        print(sources[0].about)
    pictures: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for source in sources:
            fields = (source.image, None)
            samples = SampleLoader(transform, description["in_chans"], 0, 0, fields, part=source.part)
            loader = single_image_loader(source, samples, range(source.length), collate=collate_list)
            for batch in limit_bad_images(loader, max_bad * source.length, print):
                if batch.images:
                    height, width = batch.images[0].shape[-2:]
                    about = {"id": len(pictures) + 1, "file_name": batch.names[0], "height": height, "width": width}
                    pictures.append(about)
                    (detections,) = model(batch.to(device).images)
                    results += coco_results(detections, about["id"], description["class_values"], (height, width))
    for i, result in enumerate(results):
        *_, width, height = result["bbox"]
        result |= {"id": i + 1, "iscrowd": 0, "area": width * height}
    classes = zip(description["class_values"], description["class_names"], strict=True)
    categories = [{"id": number, "name": name} for number, name in classes]
    with replacing_file(out) as file:
        file.write_text(json.dumps({"images": pictures, "annotations": results, "categories": categories}))
    return len(pictures)
