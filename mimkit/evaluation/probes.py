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

CHUNK = 1 << 16  # rows whose logits are in memory at once


class FrozenProbe(nn.Module):
    """A trainable classifier on the features of a frozen network, which is not part of the probe's parameters.

    A linear probe classifies pooled features, normalized by a BatchNorm without affine parameters (MAE, appendix A.1).
    An attentive probe normalizes each channel of all tokens in the same way and pools the tokens with a learned query
    (timm's AttentionPoolLatent). Masked pre-training stores what separates the classes in the tokens rather than in
    their mean, so linear probes underestimate it.

    Args:
        network: a timm model. It is frozen and kept in evaluation mode.
        classes: number of classes.
        attentive: whether to pool the tokens with a learned query.
    """

    network: Any

    def __init__(self, network: Any, classes: int, attentive: bool = False):
        super().__init__()
        self.__dict__["network"] = network.eval().requires_grad_(False)  # not registered as a submodule
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
        """Classify images (b c H W): logits (b classes)."""
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
    """The result of a linear probe on cached features."""

    accuracy: float  # %, on the test split
    weight_decay: float  # the one that was chosen
    validation: float  # %, on held-out training images, with that weight decay


def fit_linear(head: nn.Linear, train: Features, weight_decay: float) -> None:
    """Fit a softmax regression by L-BFGS, in place and starting from the weights of `head`.

    It minimizes the mean cross entropy + weight_decay / 2 * |weight|^2. SGD would need a learning rate for each set of
    features. If features are ill-conditioned, as those of a trained network are, it would also stop far from the
    optimum.
    """
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight_decay / 2 * head.weight.square().sum()
        loss.backward()
        for x, y in zip(train.x.split(CHUNK), train.y.split(CHUNK), strict=True):
            chunk_loss = F.cross_entropy(head(x), y, reduction="sum") / len(train.y)
            chunk_loss.backward()
            loss = loss + chunk_loss.detach()
        return loss

    optimizer.step(closure)


def fit_path(train: Features, classes: int, weight_decays: Iterable[float]) -> Iterator[tuple[float, nn.Linear]]:
    """Fit one head to each weight decay, from the largest to the smallest, and yield (weight decay, head).

    The head starts at 0, and at each weight decay from the optimum of the previous one. It is the same object each
    time.
    """
    head = nn.Linear(train.x.shape[1], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    for weight_decay in sorted(weight_decays, reverse=True):
        fit_linear(head, train, weight_decay)
        yield weight_decay, head


@torch.no_grad()
def accuracy(head: nn.Module, features: Features) -> float:
    """Return the top-1 accuracy (%) of a classifier of features."""
    return 100 * (head(features.x).argmax(1) == features.y).float().mean().item()


def linear_probe(
    train: Features, test: Features, weight_decays: Iterable[float] = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
) -> Probe:
    """Fit and evaluate a linear probe on cached features, standardized by the training split's mean and deviation.

    The weight decay is chosen on a fifth of the training images, and the probe is then fitted to all of them. Test
    labels have no part in the choice.

    Raises:
        UserError: the training images have fewer than 2 classes.
    """
    mean, std = train.x.mean(0), train.x.std(0) + 1e-6
    train, test = (part._replace(x=(part.x - mean) / std) for part in (train, test))
    classes = int(max(train.y.max(), test.y.max())) + 1
    held_out = torch.randperm(len(train.y), generator=torch.Generator().manual_seed(0)) % 5 == 0
    fit, validation = (Features(train.x[chosen], train.y[chosen]) for chosen in (~held_out, held_out))
    if len(set(fit.y.tolist())) < 2:
        raise UserError(
            "A linear probe needs at least 2 classes among its training images, but there is 1. Pass other data."
        )
    scores = {weight_decay: accuracy(head, validation) for weight_decay, head in fit_path(fit, classes, weight_decays)}
    best = max(scores, key=lambda weight_decay: scores[weight_decay])  # the largest one, if several are equal
    *_, (_, head) = fit_path(train, classes, [weight_decay for weight_decay in scores if weight_decay >= best])
    return Probe(accuracy(head, test), best, scores[best])
