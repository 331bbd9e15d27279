"""Before the first step of a pre-training run: are its data what it takes them for, and what will it cost?

A run prints this in its first seconds; `--dry-run`, which `mimkit doctor` passes, looks at more and stops. All of it is
measured on copies of the network and the optimizer, under a seed of its own: the run that follows is as it would be.
"""

import copy
import dataclasses
import hashlib
import io
import json
import math
import os
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from shutil import disk_usage
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor, nn

from mimkit.data.loader import cpu_count, train_loader
from mimkit.data.order import Plan, evenly_spaced
from mimkit.data.sample import SampleLoader, read_bytes, seeded
from mimkit.data.sources import Source
from mimkit.data.transforms import Size
from mimkit.doctor.loss_bands import expected
from mimkit.flops import kept_bytes
from mimkit.training.run import Run

SHIFT, STRETCH = 1.5, 3.0  # from 0 and 1: the mean and the deviation of what a network gets, beyond which all is wrong
COPIES = 0.05  # share of a sample
NAMED = 5  # images


class Effort(NamedTuple):
    """How closely to look."""

    images: int
    seconds: float  # for each of loader and network


BRIEF, FULL = Effort(256, 1.0), Effort(1024, 8.0)


@dataclass
class Findings:
    """What was found, by its name, and what would spoil the run, as sentences that say what to do."""

    lines: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


class Job(NamedTuple):
    """What a pre-training run is about to do.

    Args:
        mean, std: what images are normalized by.
        size: of the input, (H W) in pixels.
        lr, warmup_epochs: of the schedule.
        workers: number of data loading processes.
        config: all options of the run, by which its reference losses are found.
    """

    run: Run
    source: Source
    sample_loader: SampleLoader
    mean: list[float]
    std: list[float]
    size: Size
    lr: float
    warmup_epochs: float
    workers: int
    config: dict[str, Any]


def preflight(job: Job, method: nn.Module, optimizer: torch.optim.Optimizer, dry_run: bool = False) -> None:
    """Print what a run will do and cost, on the main process while the others wait. A resumed run prints nothing.

    Args:
        dry_run: look closely, and exit with code 1 if something would spoil the run.
    """
    run, problems = job.run, []
    if run.engine.is_main and (dry_run or not run.plan.start):
        with seeded(0):
            findings = examine(job, method, optimizer, FULL if dry_run else BRIEF)
        problems = findings.problems
        run.print("\n".join(f"{name:8s} {text}" for name, text in findings.lines.items()))
        run.print("\n".join(f"WARNING: {problem}" for problem in problems) or "Preflight checks passed.")
    run.engine.wait()
    if dry_run and problems:
        sys.exit(1)


def examine(job: Job, method: nn.Module, optimizer: torch.optim.Optimizer, effort: Effort) -> Findings:
    """Look at the data, then measure what a step costs."""
    run, plan, findings = job.run, job.run.plan, Findings()
    inspect_data(job, effort, findings)
    network = Network(run, *copy.deepcopy((method, optimizer)), job.sample_loader.in_chans, job.size)
    about_steps(network, job, findings)
    most = min(plan.micro_batch_size, job.source.length)
    speed, batch = network.speed(most, effort.seconds)
    loaded = None
    if job.source.streaming and effort is BRIEF:  # each worker fills its window first
        findings.lines["loader"] = "not measured for a stream in a run; mimkit doctor measures it"
    else:
        loaded = loader_speed(job.source, job.sample_loader, plan, job.workers, effort.seconds)
    about_time(speed, batch, loaded, job, findings)
    about_memory(network, plan, run, findings)
    about_disk(network, run, findings)
    findings.lines["loss"] = expected(json.loads(json.dumps(job.config)))
    return findings


def inspect_data(job: Job, effort: Effort, report: Findings) -> None:
    """Sizes, kinds, colors, copies, damage of images spread over the set or the first of a stream, in some time."""
    source, sample_loader = job.source, job.sample_loader
    count, until = effort.images, time.perf_counter() + 5 * effort.seconds
    places = (
        np.random.default_rng(0).permutation(evenly_spaced(source.length, count)).tolist()
    )  # a part of them is spread too
    places = list(range(count)) if source.streaming else places
    rows = source.rows.take(count) if source.streaming else (source.rows[i] for i in places)
    whole = dataclasses.replace(sample_loader, transform=lambda image: image, units=0)
    unread, sizes, moments = [], [], []
    seen: dict[bytes, list[tuple[int, str]]] = {}
    kinds, looked = Counter[str](), 0
    for index, content in zip(places, rows, strict=False):
        looked += 1
        view = whole(content, 0, index)
        if view.image is None:
            unread.append((index, " (".join(view.bad or ()) + ")"))
            continue
        data = read_bytes(content[source.image])
        seen.setdefault(hashlib.sha256(data).digest(), []).append((index, view.name))
        kinds[kind_of(data)] += 1
        sizes.append(tuple(view.image.shape[-2:]))
        step = max(1, min(view.image.shape[1:]) // 256)  # colors of a photograph need no more of its pixels
        pixels = view.image[:, ::step, ::step].double() / (255 if view.image.dtype == torch.uint8 else 1)
        moments.append(torch.stack([pixels.mean((1, 2)), pixels.square().mean((1, 2))]))
        if time.perf_counter() > until:
            break
    bad = [named for _, named in sorted(unread)]
    copies = [f"{name} of {same[0][1]}" for same in sorted(map(sorted, seen.values())) for _, name in same[1:]]
    report.lines["data"] = f"{source.length:,} images; of {looked:,} looked at {len(bad)} cannot be read"
    report.lines["data"] += f", {len(copies)} are copies of another of these{_named(copies)}"
    if len(bad) > job.run.max_bad * looked:
        report.problems.append(
            f"{len(bad)} of {looked} images cannot be read, more than --max-bad {job.run.max_bad:g} allows"
            f"{_named(bad)}: remove or mend them, or raise --max-bad."
        )
    elif bad:
        report.lines["damaged"] = _named(bad).removeprefix(", such as ")
    if len(copies) > COPIES * looked:
        report.problems.append(
            f"{len(copies)} of {looked} images are copies of another{_named(copies)}: leave one of each."
        )
    if moments:
        areas = sorted(sizes, key=lambda size: size[0] * size[1])
        small, middle, large = (areas[i] for i in (0, len(areas) // 2, -1))
        words = [f"{height}x{width}" for height, width in dict.fromkeys((small, middle, large))]
        named = ", ".join(f"{kind} ({number / len(sizes):.0%})" for kind, number in kinds.most_common())
        report.lines["images"] = (
            f"{' to '.join(words)} px (height x width), {named}, read as {sample_loader.in_chans} channels"
        )
        about_colors(torch.stack(moments).mean(0), job, report)


def kind_of(data: bytes) -> str:
    """PIL's word for the channels of a file."""
    try:
        return Image.open(io.BytesIO(data)).mode
    except OSError:
        return "array"


def about_colors(moments: Tensor, job: Job, report: Findings) -> None:
    """Mean and square mean of each channel (2 c) beside what is configured."""
    mean, std = moments[0], (moments[1] - moments[0].square()).clamp_min(0).sqrt()
    shift = (mean - torch.tensor(job.mean)) / torch.tensor(job.std)
    stretch = std / torch.tensor(job.std)
    found, set_to = (f"mean {_numbers(a)}, deviation {_numbers(b)}" for a, b in ((mean, std), (job.mean, job.std)))
    report.lines["colors"] = f"{found}; configured {set_to}"
    if shift.abs().max() > SHIFT or stretch.max() > STRETCH or stretch.min() < 1 / STRETCH:
        report.problems.append(
            f"The images have {found}, far from the configured {set_to}: pass --mean [{_numbers(mean, ',')}] "
            f"--std [{_numbers(std, ',')}], or arrays in 0-1."
        )


def _numbers(values: Any, between: str = " ") -> str:
    return between.join(f"{float(value):.3f}" for value in values)


def _named(names: list[str]) -> str:
    return f", such as {', '.join(names[:NAMED])}" if names else ""


class Network:
    """Copies of a network and its optimizer, to compute steps of random images with."""

    def __init__(self, run: Run, method: nn.Module, optimizer: torch.optim.Optimizer, in_chans: int, size: Size):
        self.run, self.device = run, run.engine.device
        self.method, self.optimizer = method.to(self.device).train(), optimizer
        self.shape = in_chans, *size
        self.encoder: Any = method.encoder

    def forward(self, images: Tensor) -> Any:
        """Images (b c H W) -> what the method gives"""
        with self.run.accelerator.autocast():
            return self.method(images)

    def loss(self, images: Tensor) -> Tensor:
        """Images (b c H W) -> ()"""
        return self.forward(images).loss

    def images(self, batch: int) -> Tensor:
        """(b c H W)"""
        return torch.randn(batch, *self.shape, device=self.device)

    def step(self, images: Tensor) -> float:
        """Seconds of forward, backward and update."""
        self._wait()
        begun = time.perf_counter()
        self.loss(images).backward()
        self.optimizer.step()
        self._wait()
        self.gradients = sum(p.grad.nbytes for p in self.method.parameters() if p.grad is not None)
        self.optimizer.zero_grad()
        return time.perf_counter() - begun

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def speed(self, most: int, seconds: float) -> tuple[float, int]:
        """Images a second, and the batch: as large as the time allows, up to `most`; median of what fits into it."""
        batch, until = min(2, most), time.perf_counter() + seconds
        self.step(self.images(batch))  # memory is taken, kernels are chosen
        with suppress(torch.OutOfMemoryError):  # the last one that fitted; what memory it takes is counted elsewhere
            while batch < most and 4 * self.step(self.images(batch)) < seconds:
                self.step(self.images(min(2 * batch, most)))
                batch = min(2 * batch, most)
        images = self.images(batch)
        times: list[float] = []
        while len(times) < 3 or (time.perf_counter() < until and len(times) < 20):
            times.append(self.step(images))
            if time.perf_counter() > until + seconds:
                break
        return batch / median(times), batch

    def kept(self, batch: int) -> int:
        """Bytes that a forward pass of so many images keeps for the backward pass, counted on 4 at most."""
        tensors = [*self.method.parameters(), *self.method.buffers()]
        few, more = (min(count, batch) for count in (2, 4))
        found = {n: kept_bytes(partial(self.loss, x := self.images(n)), [*tensors, x]) for n in {few, more}}
        return max(0, round(found[more] + (batch - more) * (found[more] - found[few]) / 2))

    def states(self) -> dict[str, int]:
        """Bytes of weights with buffers, gradients and the optimizer's state; after a step."""
        states = [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        weights = sum(x.nbytes for x in self.method.state_dict().values())
        return {"weights": weights, "gradients": self.gradients, "optimizer": sum(x.nbytes for x in states)}


def loader_speed(source: Source, sample_loader: SampleLoader, plan: Plan, workers: int, seconds: float) -> float:
    """Images a second of one process's loader alone, over whole rounds of its workers, whose batches come at once."""
    batch = min(32, plan.micro_batch_size, source.length)
    own = Plan(source.length, batch, steps=1_000_000, seed=plan.seed)
    loader, times, turn = iter(train_loader(source, sample_loader, own, workers)), [], max(1, workers)
    begun = time.perf_counter()
    for _ in loader:
        times.append(time.perf_counter())
        if len(times) > 2 * turn and len(times) % turn == 1 % turn and times[-1] - begun > seconds:
            break
    return batch * (len(times) - 1 - turn) / (times[-1] - times[turn])


def about_steps(network: Network, job: Job, report: Findings) -> None:
    """Units, batch and steps, from the masks of one forward pass."""
    plan = job.run.plan
    with torch.no_grad():
        units = network.forward(network.images(2)).units
    p = network.encoder.unit_size
    gh, gw = network.shape[1] // p, network.shape[2] // p
    visible, predicted = units.visible.shape[1], units.masked.shape[1]
    text = f"{gh} x {gw} of {p} px = {gh * gw}: {visible} visible, {gh * gw - visible} masked"
    report.lines["units"] = text + (f", {predicted} of them predicted" if predicted < gh * gw - visible else "")
    warmup = round(job.warmup_epochs * plan.steps_per_epoch)
    report.lines["steps"] = (
        f"batch {plan.batch_size} = {plan.micro_batch_size} images x {plan.world_size} processes x "
        f"{plan.grad_accum_steps} parts; "
        f"{plan.steps_per_epoch:,} steps an epoch, {plan.steps:,} in {plan.steps / plan.steps_per_epoch:g} epochs; "
        f"lr {job.lr:.3g} after {warmup:,} steps of warm-up"
    )


def together(loader: float, network: float, workers: int, cores: int | None) -> float:
    """Images a second of a loader and a network that give so many alone.

    Without workers they take turns; with workers the slower one decides, and where they share `cores` (on a CPU) the
    work of both must fit into these.
    """
    if not workers:
        return 1 / (1 / loader + 1 / network)
    return 1 / max(1 / loader, 1 / network + (workers / cores / loader if cores else 0))


def bottleneck(loader: float, network: float, workers: int) -> str:
    """Which one it is, and what to do."""
    rates = f"{loader:,.0f} images/s by {workers} workers, {network:,.0f} by the network"
    if loader >= network:
        return f"{rates}: the network is the bottleneck, as it should be"
    spare = cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1
    todo = f"raise --workers to {spare}" if workers < spare else "store smaller images, or use more cores"
    return f"{rates}: the loader is the bottleneck; {todo}"


def about_time(network: float, batch: int, loader: float | None, job: Job, report: Findings) -> None:
    """How fast each is alone, and how long all of it takes."""
    run, plan, on_cpu = job.run, job.run.plan, job.run.engine.device.type == "cpu"
    rate = network
    if loader:
        report.lines["speed"] = bottleneck(loader, network, job.workers)
        cores = cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        rate = together(loader, network, job.workers, max(1, cores) if on_cpu else None)
    seconds = (plan.steps - plan.start) * plan.batch_size / (rate * plan.world_size)
    hours, minutes = int(seconds // 3600), int(seconds // 60 % 60)
    spent = f"{hours} h {minutes} min" if hours else f"{minutes} min {int(seconds % 60)} s"
    without = "; without torch.compile" if run.compile else ""
    report.lines["time"] = (
        f"about {spent} and kNN checks, {rate * plan.world_size:,.0f} images/s, from {batch} images a step on "
        f"{machine(run)}{without}"
    )


def machine(run: Run) -> str:
    """What this process computes on."""
    if run.engine.device.type == "cuda":
        return torch.cuda.get_device_name(run.engine.device)
    name = run.engine.device.type.upper()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return f"{name}, {torch.get_num_threads()} threads"


def about_memory(network: Network, plan: Plan, run: Run, report: Findings) -> None:
    """What a process holds at least, beside what there is."""
    parts = network.states() | {"kept for backward": network.kept(plan.micro_batch_size)}
    need = sum(parts.values())
    if network.device.type == "cuda":
        there = torch.cuda.mem_get_info(network.device)[1]
    else:
        there = psutil.virtual_memory().total // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    words = ", ".join(f"{name} {_size(number)}" for name, number in parts.items())
    report.lines["memory"] = f"at least {_size(need)} of {_size(there)}: {words}"
    if need > there:
        ways = [k for k in range(2, plan.micro_batch_size + 1) if not plan.micro_batch_size % k]  # to divide its images
        k = next((k for k in ways if need - parts["kept for backward"] * (1 - 1 / k) < there), None)
        more = f"pass --grad-accum-steps {plan.grad_accum_steps * k}" if k else "choose a smaller --model"
        report.problems.append(
            f"A step of {plan.micro_batch_size} images takes {_size(need)} of memory, and there are "
            f"{_size(there)}: {more}, or "
            "--grad-checkpointing."
        )


def about_disk(network: Network, run: Run, report: Findings) -> None:
    """What the checkpoints take that stay, with the one that is written before an old one goes, and the encoder."""
    plan, folder, states = run.plan, run.folder, network.states()
    one = states["weights"] + states["optimizer"]
    saves = math.ceil(plan.steps / max(1, round(run.save_every * plan.steps_per_epoch) or plan.steps))
    for_good = saves // run.keep_every if run.keep_every else 0
    most = min(saves, run.checkpoints.keep + 1 + for_good)
    need = most * one + states["weights"]
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = disk_usage(place).free
    report.lines["disk"] = f"{most} checkpoints of {_size(one)} and the encoder: {_size(need)} of {_size(free)} free"
    if need > free:
        report.problems.append(
            f"{most} checkpoints take {_size(need)} and {place} has {_size(free)} free: choose a lower --keep, "
            "--keep-every 0 or another --out."
        )


def _size(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
