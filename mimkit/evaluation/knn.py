"""k-nearest-neighbor classification on frozen features."""

from collections.abc import Iterable

import torch.nn.functional as F

from mimkit.errors import UserError
from mimkit.evaluation.features import Features


def knn(train: Features, test: Features, ks: Iterable[int] = (10, 20), temperature: float = 0.07) -> dict[int, float]:
    """Top-1 accuracy (%) of a vote of the k nearest by cosine, weighted by exp(similarity / temperature).

    As in DINO (Caron et al., ICCV 2021, section 4.1 and its evaluation code).
    """
    classes = int(max(train.y.max(), test.y.max())) + 1
    bank = F.normalize(train.x, dim=1)
    ks = [k for k in ks if k <= len(bank)]
    if not ks:
        raise UserError(f"kNN needs at least 10 labeled training images; there are {len(bank)}.")
    right = dict.fromkeys(ks, 0)
    for queries, y in zip(F.normalize(test.x, dim=1).split(512), test.y.split(512), strict=True):
        similarity, nearest = (queries @ bank.T).topk(max(ks))
        votes = F.one_hot(train.y[nearest], classes) * (similarity / temperature).exp()[..., None]  # (b k classes)
        for k in ks:
            right[k] += int((votes[:, :k].sum(1).argmax(1) == y).sum())
    return {k: 100 * count / len(test.y) for k, count in right.items()}
