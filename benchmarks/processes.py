"""Compare two processes of one thread each with one process: images/s of HiViT's MAE under each engine.

python benchmarks/processes.py --rounds 5

The engines take turns. Each is launched as a recipe is, with `accelerate launch --config_file
recipes/accelerate/ENGINE.yaml`, and each process runs one thread on one core. All engines compute the same global batch
of random images at 224 px, with a decoder 512 wide and 8 deep.

Three columns show what limits the engines. "Alone" is a forward and a backward pass of a process's micro-batch by the
bare network, while the other process does the same: the time of a step without any exchange. "Optimizer" is AdamW's
part of a step. "All-reduce" is the exchange of as many floats as there are gradients.
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
    """Return the median seconds of `work` after one warm-up call; all processes start each call together."""
    seconds = []
    for _ in range(times + 1):
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def train(out: str, model: str, batch_size: int, steps: int) -> None:
    """Time a step in each process. The main process writes the seconds to the file `out` as JSON."""
    run = Run("processes", out=str(Path(out).with_suffix("")), precision="fp32")
    torch.set_num_threads(1)
    accelerator = run.accelerator
    share = run.make_plan(batch_size, batch_size, 1).micro_batch_size
    encoder: Any = timm.create_model(model, num_classes=0, unit_form=True, multi_scale=True)
    mae: nn.Module = MAE(encoder, Decoder(encoder.out_dim, encoder.unit_size, 3, 512, 8, 16))
    images = torch.randn(share, 3, 224, 224)

    def alone() -> None:
        mae(images).loss.backward()
        mae.zero_grad()

    seconds = {"alone": timed(alone, steps)}
    gradients = torch.zeros(sum(p.numel() for p in mae.parameters() if p.requires_grad))
    seconds["megabytes"] = gradients.numel() * 4 / 1e6
    if accelerator.num_processes > 1:
        seconds["all_reduce"] = timed(lambda: torch.distributed.all_reduce(gradients), steps)
    optimizer, clock = adamw(mae, 1e-4, 0.05, (0.9, 0.95)), [0.0, 0.0]  # start of the current call, and total seconds
    optimizer.register_step_pre_hook(lambda *_: clock.__setitem__(0, time.perf_counter()))
    optimizer.register_step_post_hook(lambda *_: clock.__setitem__(1, clock[1] + time.perf_counter() - clock[0]))
    ready, stepper = run.prepare(mae, optimizer)

    def step() -> None:
        with accelerator.accumulate(ready):
            accelerator.backward(ready(images).loss)
            stepper.step()
            stepper.zero_grad()

    seconds["step"] = timed(step, steps)
    seconds["optimizer"] = clock[1] / (steps + 1)
    if accelerator.is_main_process:
        Path(out).write_text(json.dumps(seconds))


def measure(
    rounds: PositiveInt = 5,
    model: str = "hivit_s",
    batch_size: PositiveInt = 32,
    steps: PositiveInt = 3,
    worker: str = "",
) -> None:
    """Compare the engines.

    Args:
        rounds: Number of launches of each engine, in turns. The table shows medians.
        model: A HiViT known to timm.
        batch_size: Number of images in a step, over all processes.
        steps: Number of timed steps in a launch, after one warm-up step.
        worker: Internal: the file that a launched process writes.
    """
    if worker:
        train(worker, model, batch_size, steps)
        return
    results: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            for engine in ENGINES:
                out = Path(folder) / f"{engine}-{turn}.json"
                options = ["--model", model, "--batch-size", str(batch_size), "--steps", str(steps)]
                launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
                launch += ["--config_file", str(ROOT / f"recipes/accelerate/{engine}.yaml")]
                command, one_thread = [*launch, __file__, *options, "--worker", str(out)], {"OMP_NUM_THREADS": "1"}
                job = subprocess.run(command, capture_output=True, text=True, env=os.environ | one_thread)
                if job.returncode:
                    raise UserError(f"{engine} failed: {job.stderr[-5000:]}")
                results[engine].append(json.loads(out.read_text()))
                print(turn, engine, {key: round(value, 2) for key, value in results[engine][-1].items()}, flush=True)
    print(f"\n{model}, {batch_size} images a step, torch {torch.__version__}\n")
    heads = ["engine", "processes", "seconds a step", "images/s", "of one process's"]
    heads += ["alone", "optimizer", "all-reduce"]
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    first = [seconds["step"] for seconds in results["cpu"]]
    for engine, launches in results.items():
        middle = {key: median(seconds[key] for seconds in launches) for key in launches[0]}
        faster = median(one / seconds["step"] for one, seconds in zip(first, launches, strict=True))  # in each round
        cells = [str(ENGINES[engine]), f"{middle['step']:.2f}", f"{batch_size / middle['step']:.2f}", f"{faster:.2f} x"]
        cells += [f"{middle[key]:.2f}" if key in middle else "" for key in ("alone", "optimizer", "all_reduce")]
        print(f"| {engine} | {' | '.join(cells)} |")
    print(f"\n{results['cpu'][0]['megabytes']:.0f} MB of gradients")


if __name__ == "__main__":
    cli_entry(call)(measure, "processes.py", sys.argv[1:])
