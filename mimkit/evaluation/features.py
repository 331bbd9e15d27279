"""What a representation is worth without training it: nearest neighbors and a linear probe."""

from collections.abc import Callable, Iterable
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
    """There is nothing to judge."""

    def __init__(self) -> None:
        super().__init__("Not one of the images can be decoded: pass others.")


@torch.no_grad()
def apply_to_images(
    model: Any, batches: Iterable[Batch], normalize: Normalize, compute: Callable[[Tensor], Tensor]
) -> Features:
    """`compute` of all images, in evaluation mode and on the model's device, and their labels; the mode is kept."""
    training, device = model.training, next(model.parameters()).device
    normalize = normalize.to(device)
    model.eval()
    found = []
    for batch in batches:
        if len(batch.images):  # else all of them are bad
            x = compute(normalize(batch.images.to(device)))
            found.append((x.float().cpu(), batch.labels))
    model.train(training)
    if not found:
        raise NoImagesError
    return Features(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def extract(model: Any, batches: Iterable[Batch], normalize: Normalize) -> Features:
    """Pooled features, before the classifier, of any timm model."""
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
    """Features of the training and the test part, of so many images each."""
    features = []
    for part, n in zip(parts, images, strict=True):
        count = min(n or part.length, part.length)
        batches = limit_bad_images(
            eval_loader(part, size, model.in_chans, count, workers=workers), max_bad * count, log
        )
        features.append(extract(model, batches, normalize))
    return features
