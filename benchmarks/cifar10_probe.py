"""What a short masked pre-training is worth: a linear probe on CIFAR-10, before and after.

python benchmarks/cifar10_probe.py --data DIR      DIR holds train.parquet and test.parquet (images, labels)
python benchmarks/cifar10_probe.py --data DIR --recipe simmim_svit      or mae_svit
python benchmarks/cifar10_probe.py --data DIR --recipe mae_svit --img-size 48 --mask-ratio 0.6

Pre-trains on 120,000 images seen, by a recipe: hivit_nano, 40/80/160 wide (units of 4 px, 8 x 8 of them), or svit_nano
with a stem of stride 1 (units of 8 px, 4 x 4, or 6 x 6 at 48 px). Then probes the encoder and the same network at
random on 10,000 training and 10,000 test images, by the same sweep.
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

FLAGS = {
    "mae_hivit": ["--model-args.embed_dim", "160"],
    "simmim_svit": [],
    "mae_svit": ["--norm-targets", "false", "--mask-ratio", "0.4"],
}


def pooled_maps(model: Any, x: Tensor) -> Tensor:
    """(b c H W) -> the mean of each stage's map, side by side"""
    maps = model.forward_intermediates(x, intermediates_only=True)
    return torch.cat([m.mean(dim=(2, 3)) for m in maps], dim=1)


def measure(
    data: str,
    recipe: str = "mae_hivit",
    out: str | None = None,
    seed: int = 0,
    img_size: PositiveInt = 32,
    mask_ratio: float | None = None,
    images: PositiveInt = 120_000,
) -> None:
    """Pre-train, then probe the encoder and the same network at random.

    Args:
        data: CIFAR-10 as parquet files.
        recipe: mae_hivit, simmim_svit or mae_svit.
        out: directory of the pre-training run, which is not trained again if it is there; a temporary one by default.
        seed: of the pre-training.
        img_size: input in pixels, which the images of 32 px are scaled to.
        mask_ratio: the recipe's, or by default that of the table.
        images: how many are seen.
    """
    if recipe not in FLAGS:
        raise UserError(f"--recipe {recipe} is not measured here: choose among {', '.join(FLAGS)}.")
    with tempfile.TemporaryDirectory() as folder:
        run = out or f"{folder}/run"
        command = ["accelerate", "launch", f"recipes/{recipe}.py", "--config", f"{recipe}_small", *FLAGS[recipe]]
        epochs = images / 50_000
        command += ["--epochs", f"{epochs:g}", "--warmup-epochs", f"{epochs / 10:g}", "--data", data]
        command += ["--seed", str(seed), "--img-size", str(img_size)]
        command += ["--mask-ratio", str(mask_ratio)] if mask_ratio else []
        print(" ".join(command), flush=True)
        begun = time.time()
        done = (Path(run) / "decoder").is_dir()
        if not done and subprocess.run([*command, "--out", run], cwd=Path(__file__).parent.parent).returncode:
            raise UserError("the pre-training failed, as it says above: mend that first.")
        minutes = (time.time() - begun) / 60
        trained = timm.create_model(f"local-dir:{run}/encoder", pretrained=True)
        torch.manual_seed(seed)
        random = timm.create_model(f"local-dir:{run}/encoder")  # timm leaves it at random without pretrained=True
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
