"""Measure what a short masked pre-training is worth: a linear probe on CIFAR-10, before and after.

python benchmarks/cifar10_probe.py --data DIR      DIR holds train.parquet and test.parquet (images, labels)
python benchmarks/cifar10_probe.py --data DIR --preset simmim_svit_small      or mae_svit_small
python benchmarks/cifar10_probe.py --data DIR --preset mae_svit_small --img-size 48 --mask-ratio 0.6

The script pre-trains on 120,000 images seen: hivit_nano, 40/80/160 wide (8 x 8 units of 4 px), or svit_nano with a stem
of stride 1 (4 x 4 units of 8 px, or 6 x 6 at 48 px). Then it probes the encoder, and the same network with random
weights, on 10,000 training and 10,000 test images.
"""

import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import mimkit  # noqa: F401  registers the networks with timm
from mimkit.config import PositiveInt, call
from mimkit.data.loader import eval_loader
from mimkit.data.sources import open_labeled
from mimkit.data.transforms import Normalize
from mimkit.errors import UserError, cli_entry
from mimkit.evaluation.features import apply_to_images, extract_parts
from mimkit.evaluation.knn import knn
from mimkit.evaluation.probes import linear_probe

FLAGS = {  # for each preset of a recipe
    "mae_hivit_small": ["--model-args.embed_dim", "160"],
    "simmim_svit_small": [],
    "mae_svit_small": ["--norm-targets", "false", "--mask-ratio", "0.4"],
}


def pooled_maps(model: Any, x: Tensor) -> Tensor:
    """Images (b c H W) -> the mean of each stage's map, concatenated (b d)."""
    maps = model.forward_intermediates(x, intermediates_only=True)
    return torch.cat([m.mean(dim=(2, 3)) for m in maps], dim=1)


def measure(
    data: str,
    preset: str = "mae_hivit_small",
    out: str | None = None,
    seed: int = 0,
    img_size: PositiveInt = 32,
    mask_ratio: float | None = None,
    images: PositiveInt = 120_000,
) -> None:
    """Pre-train a network, then probe it and the same network with random weights.

    Args:
        data: CIFAR-10 as parquet files.
        preset: Preset of the pre-training: mae_hivit_small, simmim_svit_small or mae_svit_small.
        out: Directory of the pre-training run. A finished run in it is probed without training. Default: temporary.
        seed: Seed of the pre-training.
        img_size: Input size in pixels. The images of 32 px are scaled to it.
        mask_ratio: Fraction of units to mask. Default: that of the published table.
        images: Number of images seen in the pre-training.
    """
    if preset not in FLAGS:
        raise UserError(f"--preset {preset} is not measured here: choose one of {', '.join(FLAGS)}.")
    with tempfile.TemporaryDirectory() as folder:
        run = out or f"{folder}/run"
        command = ["accelerate", "launch", f"recipes/{preset.split('_')[0]}.py", "--config", preset, *FLAGS[preset]]
        epochs = images / 50_000
        command += ["--epochs", f"{epochs:g}", "--warmup-epochs", f"{epochs / 10:g}", "--data", data]
        command += ["--seed", str(seed), "--img-size", str(img_size)]
        command += ["--mask-ratio", str(mask_ratio)] if mask_ratio else []
        print(" ".join(command), flush=True)
        start = time.time()
        finished = (Path(run) / "decoder").is_dir()
        if not finished and subprocess.run([*command, "--out", run], cwd=Path(__file__).parent.parent).returncode:
            raise UserError("The pre-training failed: fix the error that it printed above.")
        minutes = (time.time() - start) / 60
        trained = timm.create_model(f"local-dir:{run}/encoder", pretrained=True)
        torch.manual_seed(seed)
        random = timm.create_model(f"local-dir:{run}/encoder")  # without pretrained=True: random weights
    parts = open_labeled(data)
    cfg, size = trained.pretrained_cfg, (img_size, img_size)
    millions = sum(p.numel() for p in trained.parameters()) / 1e6
    print(f"\n{minutes:.1f} minutes in all with kNN and pictures; encoder {millions:.2f} M parameters; seed {seed}\n")
    head = f"| {cfg['architecture']} | linear probe | chosen on held-out training images | kNN, k = 10 |"
    print(f"{head} linear probe of the pooled maps of all stages |\n|---|---|---|---|---|")
    for name, model in (("at random", random), ("pre-trained", trained)):
        normalize = Normalize(cfg["mean"], cfg["std"])
        train, test = extract_parts(model, parts, size, normalize, images=(10_000, 10_000))
        probe = linear_probe(train, test)
        chosen = f"decay {probe.weight_decay:g} ({probe.validation:.1f} %)"
        loaders = (eval_loader(part, size, 3, 10_000) for part in parts)
        maps = linear_probe(
            *(apply_to_images(model, loader, normalize, partial(pooled_maps, model)) for loader in loaders)
        )
        knn10 = knn(train, test)[10]
        print(f"| {name} | {probe.accuracy:.1f} % | {chosen} | {knn10:.1f} % | {maps.accuracy:.1f} % |", flush=True)


if __name__ == "__main__":
    cli_entry(call)(measure, "cifar10_probe.py", sys.argv[1:])
