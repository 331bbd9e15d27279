"""k-nearest-neighbor classification on frozen features."""

import math
from collections.abc import Iterable

import torch.nn.functional as F

from mimkit.errors import UserError
from mimkit.evaluation.features import Features


def standard_error(accuracy: float, images: int) -> float:
    """Return the standard error of an accuracy in %, measured on a number of images, in points."""
    return math.sqrt(accuracy * (100 - accuracy) / images)


def knn(train: Features, test: Features, ks: Iterable[int] = (10, 20), temperature: float = 0.07) -> dict[int, float]:
    """Compute the top-1 accuracy (%) of a kNN classifier for each k.

    The k training images of the highest cosine similarity vote, weighted by exp(similarity / temperature), as in DINO
    (Caron et al., ICCV 2021, section 4.1 and its evaluation code).

    Args:
        train, test: features of the images that vote, and of the images that are classified.
        ks: numbers of neighbors. Those above the number of training images are left out.

    Raises:
        UserError: there are fewer training images than the smallest k.
    """
    classes = int(max(train.y.max(), test.y.max())) + 1
    bank = F.normalize(train.x, dim=1)
    wanted = list(ks)
    ks = [k for k in wanted if k <= len(bank)]
    if not ks:
        raise UserError(f"kNN needs at least {min(wanted)} labeled training images. Pass more than these {len(bank)}.")
    correct = dict.fromkeys(ks, 0)
    for queries, y in zip(F.normalize(test.x, dim=1).split(512), test.y.split(512), strict=True):
        similarity, nearest = (queries @ bank.T).topk(max(ks))
        votes = F.one_hot(train.y[nearest], classes) * (similarity / temperature).exp()[..., None]  # (b k classes)
        for k in ks:
            correct[k] += int((votes[:, :k].sum(1).argmax(1) == y).sum())
    return {k: 100 * count / len(test.y) for k, count in correct.items()}
