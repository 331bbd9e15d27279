"""Compute features or outputs of a network for all images of a data set, without training it."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mimkit.data.loader import eval_loader, limit_bad_images
from mimkit.data.sample import Batch
from mimkit.data.sources import Source
from mimkit.data.transforms import Normalize, Size
from mimkit.errors import UserError


class Features(NamedTuple):
    """Pooled features of images, and their labels."""

    x: Tensor  # (n d), float32
    y: Tensor  # (n)


class NoImagesError(UserError):
    """None of the images can be decoded, so there is nothing to evaluate."""

    def __init__(self) -> None:
        super().__init__("None of the images can be decoded. Pass other images.")


@torch.no_grad()
def map_batches(
    model: Any, batches: Iterable[Batch], normalize: Normalize, compute: Callable[[Tensor], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what `compute` returns for each batch, as float32 on the CPU, and the labels of the batch.

    The model is in evaluation mode meanwhile. Batches without usable images are left out.

    Args:
        model: the model that `compute` calls; its device is where the images go.
        compute: function of normalized images (b c H W).
    """
    training, device = model.training, next(model.parameters()).device
    normalize = normalize.to(device)
    model.eval()
    try:
        for batch in batches:
            if len(batch.images):  # all images of a batch may be damaged
                yield compute(normalize(batch.images.to(device))).float().cpu(), batch.labels
    finally:
        model.train(training)


def apply_to_images(
    model: Any, batches: Iterable[Batch], normalize: Normalize, compute: Callable[[Tensor], Tensor]
) -> Features:
    """Collect what `compute` returns for all images, and their labels. See `map_batches` for the arguments.

    Raises:
        NoImagesError: none of the images can be decoded.
    """
    results = list(map_batches(model, batches, normalize, compute))
    if not results:
        raise NoImagesError
    return Features(*(torch.cat(parts) for parts in zip(*results, strict=True)))


def extract(model: Any, batches: Iterable[Batch], normalize: Normalize) -> Features:
    """Extract pooled features, the input of the classifier, with any timm model."""
    head = model.forward_head
    return apply_to_images(
        model, batches, normalize, lambda x: head(model.forward_features(x), pre_logits=True).flatten(1)
    )


def extract_parts(
    model: Any,
    parts: Iterable[Source],
    size: Size,
    normalize: Normalize,
    images: Iterable[int | None] = (None, None),
    workers: int = 0,
    max_bad: float = 0.01,
    log: Callable[[str], None] = print,
) -> list[Features]:
    """Extract the features of the training split and of the test split.

    Args:
        model: any timm model.
        parts: the splits.
        size: (H, W) of the center crop.
        images: number of images of each split, evenly spaced; None for all.
        workers: number of data workers.
        max_bad: fraction of images that may be impossible to decode.
        log: called with a line for each bad image.
    """
    features = []
    for part, limit in zip(parts, images, strict=True):
        count = min(limit or part.length, part.length)
        loader = eval_loader(part, size, model.in_chans, count, workers=workers)
        features.append(extract(model, limit_bad_images(loader, max_bad * count, log), normalize))
    return features
