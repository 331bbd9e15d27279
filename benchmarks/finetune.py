"""Measure what checkpoints are worth once they are fine-tuned, on CIFAR-10 with 2,000 labels.

python benchmarks/finetune.py labels --data CIFAR10 --run RUN
    Compare the network that recipes/mae_hivit.py wrote to RUN with the same network from scratch: for the same steps,
    and for the steps that the time of the pre-training allows in addition.
python benchmarks/finetune.py pyramid --data CIFAR10 --plain FOLDER --side 96
    Compare a plain ViT in timm's layout (`mimkit convert --to timm`, or a run's encoder/) with the pyramids that
    `mimkit convert` makes of it.

CIFAR10 holds train.parquet and test.parquet. Every run is recipes/finetune.py on the same 2,000 training images. The
learning rate of each arm is the best of three after a third of the steps, scored on 1,000 other training images. Each
seed is scored on the 10,000 test images at its end. Rows are printed as soon as they are measured.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from mimkit.recipes.finetune import Options

from mimkit.config import PositiveInt, call, parse_recipe
from mimkit.conversion.convert import convert
from mimkit.data.sources import open_labeled
from mimkit.errors import UserError, cli_entry
from mimkit.flops import count_gmacs
from mimkit.methods.checkpoint import load_run
from mimkit.models.pretrained import load_network
from mimkit.training.precision import keep_freed_memory, resolve_precision

ROOT = Path(__file__).parent.parent
PLAIN = "--aa null --reprob 0 --mixup 0 --cutmix 0 --drop-path 0 --batch-size 32 --eval-every 0 --save-every 0".split()
HIVIT = "--crop-scale [0.35,1] --precision fp32".split()
VIT = "--crop-scale [0.5,1] --layer-decay 0.75 --clip-grad 1".split()


def subsets(data: str, folder: Path) -> tuple[Path, Path]:
    """Write 2,000 training images with the 10,000 test images, and with 1,000 held-out training images."""
    train, test = open_labeled(data)
    order = np.random.default_rng(0).permutation(train.length)
    for name, scored in (("test", test.rows), ("held", train.rows.select(order[2_000:3_000]))):
        (folder / name).mkdir()
        train.rows.select(order[:2_000]).to_parquet(folder / name / "train.parquet")
        scored.to_parquet(folder / name / "test.parquet")
    return folder / "test", folder / "held"


def finetune(out: Path, epochs: float, data: Path, *flags: object) -> tuple[float, float]:
    """Fine-tune, and return the final top-1 accuracy and the seconds spent in training steps."""
    options = ["--data", data, "--out", out, "--epochs", f"{epochs:g}", "--warmup-epochs", f"{epochs / 10:g}"]
    command = ["accelerate", "launch", "--quiet", "recipes/finetune.py", *options, *flags]
    job = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    if job.returncode:
        raise UserError(f"{' '.join(map(str, command))}\nfailed: {job.stderr.strip()[-500:]}")
    lines = [yaml.safe_load(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = [(line["step"], line["images_per_s"]) for line in lines if "images_per_s" in line]
    seconds = sum((b - a) * 32 / rate for (a, _), (b, rate) in zip([(0, 0), *rates], rates, strict=False))
    return lines[-1]["top1"], seconds


def row(name: str, epochs: float, lrs: list[float], seeds: int, data: tuple[Path, Path], *flags: object) -> str:
    """Pick the learning rate on held-out images, train all seeds, and return a row of the table."""
    test, held = data
    with tempfile.TemporaryDirectory() as folder:
        held_out = {lr: finetune(Path(folder) / f"{lr}", epochs / 3, held, "--lr", lr, *flags)[0] for lr in lrs}
        best = max(held_out, key=lambda lr: held_out[lr])
        runs = [
            finetune(Path(folder) / f"seed{seed}", epochs, test, "--lr", best, "--seed", seed, *flags)
            for seed in range(seeds)
        ]
    scores, seconds = zip(*runs, strict=True)
    picked = ", ".join(f"{lr:g}: {score:.1f}" for lr, score in held_out.items())
    spread = f" ± {statistics.stdev(scores):.2f}" if seeds > 1 else ""
    each = " / ".join(f"{score:.2f}" for score in scores)
    accuracy = f"**{statistics.mean(scores):.2f}**{spread} ({each})"
    return f"| {name} | {epochs:.1f} | {picked} | {accuracy} | {statistics.median(seconds):.0f} |"


def interleaved(*steps: Callable[[], Any]) -> list[float]:
    """Return the median seconds of each step. The steps take turns, seven times after one warm-up round."""
    times: list[list[float]] = [[] for _ in steps]
    for i in range(8):
        for step, seconds in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            if i:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def labels(data: str, run: str, epochs: float = 10.0, seeds: PositiveInt = 3, arms: str = "0,1,2") -> None:
    """Compare a HiViT fine-tuned after masked pre-training with the same network trained from scratch.

    Args:
        data: CIFAR-10 as parquet files.
        run: Directory of a run of recipes/mae_hivit.py.
        epochs: Epochs of fine-tuning.
        seeds: Number of runs of each arm.
        arms: Rows to measure, such as 0,2.
    """
    keep_freed_memory()
    config = yaml.safe_load((Path(run) / "config.yaml").read_text())
    seen = config["epochs"] * open_labeled(data)[0].length
    mae = load_run(Path(run))[0].train()
    network = load_network(run)[0].train()
    images = torch.randn(32, 3, *[config["img_size"]] * 2)
    supervised, masked = interleaved(lambda: network(images).sum().backward(), lambda: mae(images).loss.backward())
    more = seen * masked / supervised / 2_000
    print(f"a step of 32 images: pre-training {masked:.3f} s, supervised {supervised:.3f} s")
    print(f"pre-training on {seen:,.0f} images takes as long as {more:.1f} supervised epochs\n")
    with tempfile.TemporaryDirectory() as folder:
        parts = subsets(data, Path(folder))
        rows: list[tuple[str, float, list[object]]] = [
            ("pre-trained", epochs, ["--layer-decay", 0.85]),
            ("from scratch", epochs, ["--layer-decay", 1, "--from-scratch"]),
            ("from scratch, with the pre-training's time", epochs + more, ["--layer-decay", 1, "--from-scratch"]),
        ]
        print("| hivit_nano | epochs | learning rates on held-out images, % | test accuracy, % | seconds |")
        print("|---|---|---|---|---|", flush=True)
        for i in map(int, arms.split(",")):
            name, length, flags = rows[i]
            flags = ["--model", Path(run).resolve(), *PLAIN, *HIVIT, *flags]
            print(row(name, length, [3e-4, 1e-3, 3e-3], seeds, parts, *flags), flush=True)


ARMS: list[tuple[str, str | None, list[object]]] = [  # name, layout, flags
    ("plain, kernel at 16", None, ["--model-args.patch_size", 16]),
    ("hpvit, light", "light", []),
    ("plain, its own patch", None, []),
    ("hpvit, coarse (the default)", "coarse", []),
    ("hpvit, fine", "fine", []),
    ("light, pools at the base rate", "light", ["--pool-scale", 1]),
    ("light, pools fixed", "light", ["--pool-scale", 0]),
]


def pyramid(
    data: str,
    plain: str,
    side: PositiveInt = 96,
    own_side: PositiveInt = 98,
    epochs: float = 3.0,
    seeds: PositiveInt = 3,
    arms: str = "0,1,2,3,4",
    lr: float | None = None,
    times: bool = False,
) -> None:
    """Compare a plain ViT with the pyramids made of it.

    Args:
        data: CIFAR-10 as parquet files.
        plain: Folder of the plain ViT.
        side: Input size in pixels.
        own_side: Input size of the plain ViT at its own patch size, in pixels.
        epochs: Epochs of fine-tuning.
        seeds: Number of runs of each arm.
        arms: Rows to measure, from 0 to 6, such as 0,1.
        lr: Learning rate of all arms. Default: picked for each arm.
        times: Measure a training step of each arm instead.
    """
    with tempfile.TemporaryDirectory() as folder:
        built = {}
        for i in map(int, arms.split(",")):
            name, layout, flags = ARMS[i]
            target = Path(folder) / f"arm{i}" if layout else Path(plain).resolve()
            if layout:
                convert(plain, "hpvit", target, depths=layout, checks=False)
            px = own_side if name.endswith("own patch") else side
            built[name] = ["--model", target, "--img-size", px, *PLAIN, *VIT, *flags]
        if times:
            show_times(built)
            return
        parts = subsets(data, Path(folder))
        print("| network | epochs | learning rates on held-out images, % | test accuracy, % | seconds |")
        print("|---|---|---|---|---|", flush=True)
        for name, options in built.items():
            print(row(name, epochs, [lr] if lr else [1e-4, 3e-4, 1e-3], seeds, parts, *options), flush=True)


def show_times(built: dict[str, list[Any]]) -> None:
    """Print GMACs and seconds of a training step of 32 images, in the precision that `auto` chooses here."""
    keep_freed_memory()
    bf16 = resolve_precision("auto") == "bf16"
    steps, costs = [], []
    for flags in built.values():
        options = parse_recipe(Options, "fine-tune", "finetune", list(map(str, flags)))
        size = int(options.img_size or 0)
        network = load_network(options.model, img_size=size, **options.model_args)[0].train()
        costs.append(count_gmacs(network, 1, 3, size, size))
        images = torch.randn(32, 3, size, size)

        def step(network: Any = network, images: Any = images) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = network(images).float().square().mean()
            loss.backward()

        steps.append(step)
    seconds = interleaved(*steps)
    print(f"| network | GMACs | seconds of a step of 32, {'bf16' if bf16 else 'fp32'} | ratio |\n|---|---|---|---|")
    for name, cost, time_of_step in zip(built, costs, seconds, strict=True):
        print(f"| {name} | {cost:.2f} | {time_of_step:.3f} | {time_of_step / seconds[0]:.2f} |")


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {"labels": labels, "pyramid": pyramid}
    if sys.argv[1:2] == [] or sys.argv[1] not in commands:
        sys.exit(f"usage: benchmarks/finetune.py {'|'.join(commands)} --help")
    cli_entry(call)(commands[sys.argv[1]], f"finetune.py {sys.argv[1]}", sys.argv[2:])
