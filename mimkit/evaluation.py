"""What a representation is worth without training it: nearest neighbours and a linear probe."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimkit.data import Batch, Normalise, Size, eval_loader, guarded
from mimkit.errors import UserError
from mimkit.sources import Source


class Features(NamedTuple):
    """Pooled features of images, and their labels."""

    x: Tensor  # (n d), float32
    y: Tensor  # (n)


@torch.no_grad()
def extract(model: Any, batches: Iterable[Batch], normalise: Normalise) -> Features:
    """Pooled features, before the classifier, of any timm model; its mode is kept."""
    training, device = model.training, next(model.parameters()).device
    normalise = normalise.to(device)
    model.eval()
    found = []
    for batch in batches:
        if not len(batch.images):  # all of them bad
            continue
        x = model.forward_head(model.forward_features(normalise(batch.images.to(device))), pre_logits=True)
        found.append((x.float().flatten(1).cpu(), batch.labels))
    model.train(training)
    return Features(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def extract_parts(
    model: Any,
    parts: Iterable[Source],
    size: Size,
    normalise: Normalise,
    images: Iterable[int | None] = (None, None),
    workers: int = 0,
    max_bad: float = 0.01,
    log: Callable[[str], None] = print,
) -> list[Features]:
    """Features of the training and the test part, of so many images each."""
    features = []
    for part, n in zip(parts, images, strict=True):
        count = min(n or part.length, part.length)
        batches = guarded(eval_loader(part, size, model.in_chans, count, workers=workers), max_bad * count, log)
        features.append(extract(model, batches, normalise))
    return features


def knn(train: Features, test: Features, ks: Iterable[int] = (10, 20), temperature: float = 0.07) -> dict[int, float]:
    """Top-1 accuracy (%) of a vote of the k nearest by cosine, weighted by exp(similarity / temperature).

    As in DINO (Caron et al., ICCV 2021, section 4.1 and its evaluation code).
    """
    classes = int(max(train.y.max(), test.y.max())) + 1
    bank = F.normalize(train.x, dim=1)
    ks = [k for k in ks if k <= len(bank)]
    if not ks:
        raise UserError(f"kNN needs at least 10 labelled training images; there are {len(bank)}.")
    right = dict.fromkeys(ks, 0)
    for queries, y in zip(F.normalize(test.x, dim=1).split(512), test.y.split(512), strict=True):
        similarity, nearest = (queries @ bank.T).topk(max(ks))
        votes = F.one_hot(train.y[nearest], classes) * (similarity / temperature).exp()[..., None]  # (b k classes)
        for k in ks:
            right[k] += int((votes[:, :k].sum(1).argmax(1) == y).sum())
    return {k: 100 * count / len(test.y) for k, count in right.items()}


class Probe(NamedTuple):
    """A linear probe and how it was chosen."""

    accuracy: float  # %, on the test part
    lr: float
    weight_decay: float
    validation: float  # %, on held-out training images, of the chosen setting


def fit_linear(train: Features, classes: int, lr: float, weight_decay: float, epochs: int, seed: int = 0) -> nn.Linear:
    """Softmax regression by SGD with momentum .9, batches of 256, cosine schedule."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(train.x.shape[1], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr, momentum=0.9, weight_decay=weight_decay)
    batch = min(256, len(train.y))
    steps = epochs * (len(train.y) // batch)
    order = torch.cat([torch.randperm(len(train.y), generator=generator) for _ in range(epochs + 1)])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        chosen = order[step * batch : (step + 1) * batch]
        loss = F.cross_entropy(head(train.x[chosen]), train.y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head


@torch.no_grad()
def accuracy(head: nn.Module, features: Features) -> float:
    """Top-1 accuracy (%)"""
    return 100 * (head(features.x).argmax(1) == features.y).float().mean().item()


def linear_probe(
    train: Features,
    test: Features,
    lrs: Iterable[float] = (0.01, 0.03, 0.1, 0.3, 1.0),
    weight_decays: Iterable[float] = (0.0, 1e-4, 1e-3, 1e-2),
    epochs: int = 30,
) -> Probe:
    """Probe cached features, standardised by the training part's mean and deviation.

    The learning rate and the decay are chosen on a fifth of the training images, then the probe is fitted again on all
    of them: test labels never choose.
    """
    mean, std = train.x.mean(0), train.x.std(0) + 1e-6
    train, test = (part._replace(x=(part.x - mean) / std) for part in (train, test))
    classes = int(max(train.y.max(), test.y.max())) + 1
    held = torch.randperm(len(train.y), generator=torch.Generator().manual_seed(0)) % 5 == 0
    fit, validation = (Features(train.x[part], train.y[part]) for part in (~held, held))
    if len(set(fit.y.tolist())) < 2:
        raise UserError("A linear probe needs at least 2 classes among its training images; there is 1.")
    scores = {
        (lr, decay): accuracy(fit_linear(fit, classes, lr, decay, epochs), validation)
        for lr in lrs
        for decay in weight_decays
    }
    lr, decay = max(scores, key=lambda setting: scores[setting])
    head = fit_linear(train, classes, lr, decay, epochs)
    return Probe(accuracy(head, test), lr, decay, scores[lr, decay])
