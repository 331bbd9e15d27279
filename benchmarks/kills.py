"""Kill a run again and again at random moments, also while it saves, and compare its final weights.

python benchmarks/kills.py --kills 50
python benchmarks/kills.py --kills 20 --engine ddp --streaming
python benchmarks/kills.py --kills 20 --engine zero2

The run is a short pre-training of hivit_nano on 640 images of `sample` that saves every five steps. All of its
processes are killed at once with SIGKILL, and the run is resumed. The moment alternates: it is drawn evenly over the
time that a whole run takes, or it lies within 30 ms of the beginning of a save. At the end the weights must equal those
of the same run without kills: to the bit, or within 1e-6 under ZeRO-2. A run that ends before its moment is compared
too, and then started again.
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


def start_run(engine: str, streaming: bool, out: Path, seed: int, epochs: float) -> subprocess.Popen[bytes]:
    """Start or resume the run in `out`, in a process group of its own."""
    recipe = [str(ROOT / "recipes" / "mae_hivit.py"), "--config", "mae_hivit_small", *SHORT]
    recipe += ["--data", str(out.parent / ("shards" if streaming else "images")), "--streaming", str(streaming).lower()]
    recipe += ["--out", str(out), "--seed", str(seed), "--epochs", str(epochs)]
    recipe += ["--warmup-epochs", str(epochs / 10), "--resume", "auto"]
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / f"recipes/accelerate/{engine}.yaml")]
    command = [sys.executable, *([] if engine == "cpu" else [*launch, "--main_process_port", "0"]), *recipe]
    with open(out.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def saved_steps(out: Path) -> int:
    """Return the number of steps in the last checkpoint."""
    return max(map(step_of, checkpoints(out)), default=0)


def unfinished_saves(out: Path) -> set[str]:
    """Return the checkpoints that are being written, or were when the run was killed."""
    return {folder.name for folder in (out / "checkpoints").glob(".step-*")}


def wait_for_kill(
    job: subprocess.Popen[bytes], out: Path, leftovers: set[str], latest: float | None, moments: random.Random
) -> bool:
    """Wait for the moment to kill `job`, and return whether the run is still alive then.

    Args:
        leftovers: Unfinished saves of the kill before. Those that the run removes are taken out.
        latest: Latest moment, in seconds from now. None: within 30 ms of the beginning of the next save.
    """
    end = time.time() + (moments.uniform(0, latest) if latest else 600)
    while job.poll() is None and time.time() < end:
        now = unfinished_saves(out)
        if latest is None and now - leftovers:
            time.sleep(moments.uniform(0, 0.03))
            break
        leftovers &= now
        time.sleep(0.001)
    return job.poll() is None


def write_images(folder: Path) -> None:
    """Write 640 images to images/, and to shards/ as four tar files. Without labels the run measures no kNN."""
    source = open_source("sample")
    (folder / "images").mkdir()
    (folder / "shards").mkdir()
    for shard in range(4):
        with tarfile.open(folder / "shards" / f"{shard}.tar", "w") as tar:
            for i in range(160 * shard, 160 * (shard + 1)):
                file = folder / "images" / f"{i:03d}.png"
                file.write_bytes(source.rows[i][source.image]["bytes"])
                tar.add(file, file.name)


def describe_run(run: Path) -> str:
    """Describe the engine of the last checkpoint, and the files that hold the optimizer's state."""
    last = checkpoints(run)[-1]
    parts = [file.stat().st_size for file in sorted(last.rglob("*optim*")) if file.is_file()]
    engine = json.loads((last / "state.json").read_text())["engine"]
    return f"{engine}, optimizer state in files of {' and '.join(f'{size / 1e6:.2f} MB' for size in parts)}"


def measure(
    kills: PositiveInt = 50, engine: str = "cpu", streaming: bool = False, seed: int = 0, epochs: float = 2.0
) -> None:
    """Kill and resume a run, and compare its weights with those of a run that was never killed.

    Args:
        kills: Number of kills.
        engine: cpu (one process), or ddp or zero2 (two processes).
        streaming: Stream the images from tar files.
        seed: Seed of the run and of the moments.
        epochs: Length of the run. There are four checkpoints in an epoch.
    """
    if engine not in ("cpu", "ddp", "zero2"):
        raise UserError(f"--engine {engine} is not measured here: choose cpu, ddp or zero2.")
    moments, different, during_save = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        write_images(Path(folder))
        start = time.time()
        if start_run(engine, streaming, whole, seed, epochs).wait():
            raise UserError(f"The run without kills failed: {whole.with_suffix('.log').read_text()[-500:]}")
        duration = time.time() - start
        print(f"without kills: {saved_steps(whole)} steps in {duration:.0f} s; {describe_run(whole)}", flush=True)
        kill = 0
        while kill < kills:
            leftovers, fresh, start = unfinished_saves(killed), not saved_steps(killed), time.time()
            job = start_run(engine, streaming, killed, seed, epochs)
            if not wait_for_kill(job, killed, leftovers, duration if kill % 2 else None, moments):
                if job.wait():
                    raise UserError(f"The run failed without a kill: {killed.with_suffix('.log').read_text()[-500:]}")
                if fresh:  # the first run may have compiled something
                    duration = min(duration, time.time() - start)
                different += compare(whole, killed, engine)
                shutil.rmtree(killed)
                continue
            for process in [job, *psutil.Process(job.pid).children(recursive=True)]:  # they have sessions of their own
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            job.wait()
            kill += 1
            hit = bool(unfinished_saves(killed) - leftovers)
            during_save += hit
            print(f"kill {kill}: {saved_steps(killed)} steps saved{', in a save' if hit else ''}", flush=True)
        if start_run(engine, streaming, killed, seed, epochs).wait():
            raise UserError(f"The run failed without a kill: {killed.with_suffix('.log').read_text()[-500:]}")
        different += compare(whole, killed, engine)
    verdict = f"{different} ends differ" if different else "all ends equal"
    print(f"{kills} kills, {during_save} of them in a save: {verdict}")
    if different:
        sys.exit(1)


def compare(whole: Path, killed: Path, engine: str) -> int:
    """Return 0 if both runs ended with the same weights, else 1."""
    a, b = (load_file(run / "encoder" / "model.safetensors") for run in (whole, killed))
    difference = max(float((a[name] - b[name]).abs().max()) for name in a)
    same = all(torch.equal(a[name], b[name]) for name in a) if engine != "zero2" else difference < 1e-6
    print(f"end of a run: weights differ by {difference:.2g}: {'equal' if same else 'NOT EQUAL'}", flush=True)
    return int(not same)


if __name__ == "__main__":
    cli_entry(call)(measure, "kills.py", sys.argv[1:])
