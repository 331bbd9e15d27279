"""Two processes of one thread each against one: images a second of HiViT's MAE under each engine, and what limits them.

python benchmarks/processes.py --rounds 5

Each engine is launched as a recipe is, `accelerate launch --config_file recipes/accelerate/ENGINE.yaml`, in turns; one
process stands for one thread of one core. All make the same global batch of random images at 224 px, with a decoder 512
wide and 8 deep. "Alone" is forward and backward of a process's share by the bare network, while the other process does
the same: what a step would take if nothing were exchanged. "Optimizer" is AdamW's own part of a step, and "all-reduce"
that of as many floats as there are gradients.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from mimkit.recipes.mae_hivit import Options
from torch import nn

from mimkit.config import PositiveInt, call
from mimkit.errors import UserError, cli_entry
from mimkit.methods.decoder import Decoder
from mimkit.methods.mae import MAE
from mimkit.training.optim import adamw
from mimkit.training.run import Run

ROOT = Path(__file__).parent.parent
ENGINES = {"cpu": 1, "ddp": 2, "zero2": 2, "zero3": 2}


def timed(work: Callable[[], Any], times: int) -> float:
    """Median seconds, after one that does not count; all processes begin together."""
    found = []
    for _ in range(times + 1):
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return median(found[1:])


def train(out: str, model: str, batch_size: int, steps: int) -> None:
    """What each process does; the main one writes what it took into the file `out`."""
    run = Run("processes", Options(out=str(Path(out).with_suffix("")), precision="fp32"))
    torch.set_num_threads(1)
    accelerator = run.accelerator
    share = run.plan(batch_size, batch_size, 1).share
    encoder: Any = timm.create_model(model, num_classes=0, unit_form=True, multi_scale=True)
    mae: nn.Module = MAE(encoder, Decoder(encoder.out_dim, encoder.unit_size, 3, 512, 8, 16))
    images = torch.randn(share, 3, 224, 224)

    def alone() -> None:
        mae(images).loss.backward()
        mae.zero_grad()

    found = {"alone": timed(alone, steps)}
    gradients = torch.zeros(sum(p.numel() for p in mae.parameters() if p.requires_grad))
    found["megabytes"] = gradients.numel() * 4 / 1e6
    if accelerator.num_processes > 1:
        found["all_reduce"] = timed(lambda: torch.distributed.all_reduce(gradients), steps)
    optimizer, clock = adamw(mae, 1e-4, 0.05, (0.9, 0.95)), [0.0, 0.0]  # when it began, and all it took
    optimizer.register_step_pre_hook(lambda *_: clock.__setitem__(0, time.perf_counter()))
    optimizer.register_step_post_hook(lambda *_: clock.__setitem__(1, clock[1] + time.perf_counter() - clock[0]))
    ready, stepper = run.prepare(mae, optimizer)

    def step() -> None:
        with run.accumulate(ready):
            accelerator.backward(ready(images).loss)
            stepper.step()
            stepper.zero_grad()

    found["step"] = timed(step, steps)
    found["optimizer"] = clock[1] / (steps + 1)
    if accelerator.is_main_process:
        Path(out).write_text(json.dumps(found))


def measure(
    rounds: PositiveInt = 5,
    model: str = "hivit_s",
    batch_size: PositiveInt = 32,
    steps: PositiveInt = 3,
    worker: str = "",
) -> None:
    """Compare the engines.

    Args:
        rounds: launches of each engine, in turns, of which the median is taken.
        model: a HiViT.
        batch_size: of all processes together.
        steps: timed in a launch, after one that does not count.
        worker: for its own processes: the file that the main one writes.
    """
    if worker:
        train(worker, model, batch_size, steps)
        return
    taken: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            for engine in ENGINES:
                out = Path(folder) / f"{engine}-{turn}.json"
                options = [
                    "--model",
                    model,
                    "--batch-size",
                    str(batch_size),
                    "--steps",
                    str(steps),
                    "--worker",
                    str(out),
                ]
                launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
                launch += ["--config_file", str(ROOT / f"recipes/accelerate/{engine}.yaml")]
                done = subprocess.run(
                    [*launch, __file__, *options],
                    capture_output=True,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
                if done.returncode:
                    raise UserError(f"{engine} failed: {done.stderr[-5000:]}")
                taken[engine].append(json.loads(out.read_text()))
                print(turn, engine, {key: round(value, 2) for key, value in taken[engine][-1].items()}, flush=True)
    print(f"\n{model}, {batch_size} images a step, torch {torch.__version__}\n")
    heads = [
        "engine",
        "processes",
        "seconds a step",
        "images/s",
        "of one process's",
        "alone",
        "optimizer",
        "all-reduce",
    ]
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    first = [found["step"] for found in taken["cpu"]]
    for engine, all_found in taken.items():
        middle = {key: median(found[key] for found in all_found) for key in all_found[0]}
        faster = median(one / found["step"] for one, found in zip(first, all_found, strict=True))  # by round
        cells = [str(ENGINES[engine]), f"{middle['step']:.2f}", f"{batch_size / middle['step']:.2f}", f"{faster:.2f} x"]
        cells += [f"{middle[key]:.2f}" if key in middle else "" for key in ("alone", "optimizer", "all_reduce")]
        print(f"| {engine} | {' | '.join(cells)} |")
    print(f"\n{taken['cpu'][0]['megabytes']:.0f} MB of gradients")


if __name__ == "__main__":
    cli_entry(call)(measure, "processes.py", sys.argv[1:])
