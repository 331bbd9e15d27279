"""Kill a run again and again, at random moments, saving included, and see whether it ends as one that never was.

python benchmarks/kills.py --kills 50
python benchmarks/kills.py --kills 20 --engine ddp --streaming
python benchmarks/kills.py --kills 20 --engine zero2

A short pre-training of hivit_nano on 640 images of `sample` that saves every five steps is killed with SIGKILL, all of
its processes at once, and resumed: in turn at a moment drawn evenly over what a whole run takes and within 30 ms of the
beginning of a save. Its weights are then held against those of the same run without kills: equal to the bit, or within
1e-6 under ZeRO-2. A run that ends before its moment is compared too, and begun anew.
"""

import contextlib
import json
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from mimkit.config import PositiveInt, call
from mimkit.data.sources import open_source
from mimkit.errors import UserError, cli_entry
from mimkit.training.checkpoint import checkpoints, step_of

ROOT = Path(__file__).parent.parent
SHORT = "--save-every 0.25 --batch-size 32 --workers 1 --precision fp32".split()


def started(engine: str, streaming: bool, out: Path, seed: int, epochs: float) -> subprocess.Popen[bytes]:
    """The run, from where it is; in a group of its own."""
    recipe = [str(ROOT / "recipes" / "mae_hivit.py"), "--config", "mae_hivit_small", *SHORT]
    recipe += ["--data", str(out.parent / ("shards" if streaming else "images")), "--streaming", str(streaming).lower()]
    recipe += ["--out", str(out), "--seed", str(seed), "--epochs", str(epochs)]
    recipe += ["--warmup-epochs", str(epochs / 10), "--resume", "auto"]
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / f"recipes/accelerate/{engine}.yaml")]
    command = [sys.executable, *([] if engine == "cpu" else [*launch, "--main_process_port", "0"]), *recipe]
    with open(out.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def done(out: Path) -> int:
    """Steps in the last checkpoint."""
    return max(map(step_of, checkpoints(out)), default=0)


def saving(out: Path) -> set[str]:
    """Checkpoints that are being written, or were when the run was killed."""
    return {folder.name for folder in (out / "checkpoints").glob(".step-*")}


def outlives(
    job: subprocess.Popen[bytes], out: Path, left: set[str], last: float | None, moments: random.Random
) -> bool:
    """Wait for the moment to kill `job`; whether it came before the run's end.

    Args:
        left: by the kill before, of `saving`; what the run removes is taken out.
        last: seconds from now until the last such moment, or None: that of the next save.
    """
    end = time.time() + (moments.uniform(0, last) if last else 600)
    while job.poll() is None and time.time() < end:
        now = saving(out)
        if last is None and now - left:
            time.sleep(moments.uniform(0, 0.03))
            break
        left &= now
        time.sleep(0.001)
    return job.poll() is None


def lay_out(folder: Path) -> None:
    """640 images in images/, and the same in shards/, four files to stream; without labels there is no kNN."""
    source = open_source("sample")
    (folder / "images").mkdir()
    (folder / "shards").mkdir()
    for shard in range(4):
        with tarfile.open(folder / "shards" / f"{shard}.tar", "w") as tar:
            for i in range(160 * shard, 160 * (shard + 1)):
                file = folder / "images" / f"{i:03d}.png"
                file.write_bytes(source.rows[i][source.image]["bytes"])
                tar.add(file, file.name)


def shared(run: Path) -> str:
    """What ran, by its last checkpoint, and the parts that its optimizer's state lies in."""
    last = checkpoints(run)[-1]
    parts = [file.stat().st_size for file in sorted(last.rglob("*optim*")) if file.is_file()]
    about = json.loads((last / "state.json").read_text())["engine"]
    return f"{about}, optimizer's state in files of {' and '.join(f'{size / 1e6:.2f} MB' for size in parts)}"


def measure(
    kills: PositiveInt = 50, engine: str = "cpu", streaming: bool = False, seed: int = 0, epochs: float = 2.0
) -> None:
    """Kill, resume, compare.

    Args:
        kills: how many.
        engine: cpu, or ddp or zero2 with two processes.
        streaming: the images are read from tar files in order.
        seed: of the run and of the moments.
        epochs: of the run, a quarter between checkpoints.
    """
    if engine not in ("cpu", "ddp", "zero2"):
        raise UserError(f"--engine {engine} is not measured here: choose cpu, ddp or zero2.")
    moments, wrong, during = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        lay_out(Path(folder))
        begun = time.time()
        if started(engine, streaming, whole, seed, epochs).wait():
            raise UserError(f"the run without kills failed: {whole.with_suffix('.log').read_text()[-500:]}")
        took = time.time() - begun
        print(f"without kills: {done(whole)} steps in {took:.0f} s; {shared(whole)}", flush=True)
        kill = 0
        while kill < kills:
            left, fresh, begun = saving(killed), not done(killed), time.time()
            job = started(engine, streaming, killed, seed, epochs)
            if not outlives(job, killed, left, took if kill % 2 else None, moments):
                if job.wait():
                    raise UserError(f"it failed by itself: {killed.with_suffix('.log').read_text()[-500:]}")
                took = min(took, time.time() - begun) if fresh else took  # the first one may have compiled something
                wrong += compare(whole, killed, engine)
                shutil.rmtree(killed)
                continue
            for process in [job, *psutil.Process(job.pid).children(recursive=True)]:  # in sessions of their own
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            job.wait()
            kill += 1
            hit = bool(saving(killed) - left)
            during += hit
            print(f"kill {kill}: {done(killed)} steps saved{', in a save' if hit else ''}", flush=True)
        if started(engine, streaming, killed, seed, epochs).wait():
            raise UserError(f"it failed by itself: {killed.with_suffix('.log').read_text()[-500:]}")
        wrong += compare(whole, killed, engine)
    print(f"{kills} kills, {during} of them in a save: {'all ends equal' if not wrong else f'{wrong} ends differ'}")
    if wrong:
        sys.exit(1)


def compare(whole: Path, killed: Path, engine: str) -> int:
    """0 where both ended with the same weights"""
    a, b = (load_file(run / "encoder" / "model.safetensors") for run in (whole, killed))
    difference = max(float((a[name] - b[name]).abs().max()) for name in a)
    same = all(torch.equal(a[name], b[name]) for name in a) if engine != "zero2" else difference < 1e-6
    print(f"an end: weights differ by {difference:.2g}: {'equal' if same else 'NOT EQUAL'}", flush=True)
    return int(not same)


if __name__ == "__main__":
    cli_entry(call)(measure, "kills.py", sys.argv[1:])
