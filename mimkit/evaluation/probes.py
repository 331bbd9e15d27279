"""Linear and attentive probes: classifiers on the features of a frozen network."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from mimkit.errors import UserError
from mimkit.evaluation.features import Features

CHUNK = 1 << 16  # rows whose scores are held at once


class FrozenProbe(nn.Module):
    """A classifier on the features of a network that stays as it is, which is no part of its parameters.

    linear: on pooled features, behind a BatchNorm without affine (MAE, appendix A.1).
    attentive: on all tokens, each channel normalized likewise, pooled by a learned query (timm's AttentionPoolLatent).
    Masked pre-training leaves what tells classes apart in the tokens, not in their mean, so linear probes
    under-report it.
    """

    network: Any

    def __init__(self, network: Any, classes: int, attentive: bool = False):
        super().__init__()
        self.__dict__["network"] = network.eval().requires_grad_(False)
        width = network.head_hidden_size
        self.attentive = attentive
        if attentive:
            width = network.num_features
            heads = next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)
            self.pool = AttentionPoolLatent(width, num_heads=heads)
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(b c H W) -> (b classes)"""
        with torch.no_grad():
            x = self.network.forward_features(images)
            if not self.attentive:
                x = self.network.forward_head(x, pre_logits=True).flatten(1)
            elif x.ndim == 4:
                order = "b d h w -> b (h w) d" if x.shape[1] == self.network.num_features else "b h w d -> b (h w) d"
                x = rearrange(x, order)
        if self.attentive:
            return self.head(self.pool(rearrange(self.norm(rearrange(x, "b n d -> b d n")), "b d n -> b n d")))
        return self.head(self.norm(x))


class Probe(NamedTuple):
    """A linear probe and how it was chosen."""

    accuracy: float  # %, on the test part
    weight_decay: float
    validation: float  # %, on held-out training images, with that decay


def fit_linear(head: nn.Linear, train: Features, weight_decay: float) -> None:
    """Softmax regression by L-BFGS, on from where `head` is: mean cross entropy + decay / 2 x |weight|^2.

    SGD would need a rate for each set of features, and stop far from the optimum where they are ill-conditioned, as
    those of a trained network are.
    """
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight_decay / 2 * head.weight.square().sum()
        loss.backward()
        for x, y in zip(train.x.split(CHUNK), train.y.split(CHUNK), strict=True):
            part = F.cross_entropy(head(x), y, reduction="sum") / len(train.y)
            part.backward()
            loss = loss + part.detach()
        return loss

    optimizer.step(closure)


def fit_path(train: Features, classes: int, weight_decays: Iterable[float]) -> Iterator[tuple[float, nn.Linear]]:
    """One head, from 0 through the optima of ever weaker decays: (decay, head) at each."""
    head = nn.Linear(train.x.shape[1], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    for decay in sorted(weight_decays, reverse=True):
        fit_linear(head, train, decay)
        yield decay, head


@torch.no_grad()
def accuracy(head: nn.Module, features: Features) -> float:
    """Top-1 accuracy (%)"""
    return 100 * (head(features.x).argmax(1) == features.y).float().mean().item()


def linear_probe(
    train: Features, test: Features, weight_decays: Iterable[float] = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
) -> Probe:
    """Probe cached features, standardized by the training part's mean and deviation.

    The decay is chosen on a fifth of the training images, then the probe is fitted again on all of them: test labels
    never choose.
    """
    mean, std = train.x.mean(0), train.x.std(0) + 1e-6
    train, test = (part._replace(x=(part.x - mean) / std) for part in (train, test))
    classes = int(max(train.y.max(), test.y.max())) + 1
    held = torch.randperm(len(train.y), generator=torch.Generator().manual_seed(0)) % 5 == 0
    fit, validation = (Features(train.x[part], train.y[part]) for part in (~held, held))
    if len(set(fit.y.tolist())) < 2:
        raise UserError("A linear probe needs at least 2 classes among its training images; there is 1.")
    scores = {decay: accuracy(head, validation) for decay, head in fit_path(fit, classes, weight_decays)}
    best = max(scores, key=lambda decay: scores[decay])  # the strongest of equal ones
    *_, (_, head) = fit_path(train, classes, [decay for decay in scores if decay >= best])
    return Probe(accuracy(head, test), best, scores[best])
