"""Preflight checks of a pre-training run: are the data as configured, and what will the run cost?

A run prints them before its first step. With `--dry-run`, which `mimkit doctor` passes, it checks more images, measures
for longer, and stops. Everything is measured on copies of the network and the optimizer and under a seed of its own, so
the run that follows is the same as without the checks.
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
from collections.abc import Sequence
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
from mimkit.methods.decoder import Decoder
from mimkit.training.run import Run

MAX_LOAD = 0.25  # fraction of the CPU cores that other processes may use unmentioned
MAX_SHIFT, MAX_SCALE = 1.5, 3.0  # of normalized images: distance of the mean from 0, and factor between std and 1
MAX_DUPLICATES = 0.05  # fraction of the checked images
MAX_EXAMPLES = 5  # images that a line names
MIN_STEPS = 300  # of a whole run
SMALL_INPUT = 128  # pixels; a smaller input is compared with the images


class Budget(NamedTuple):
    """How many images to check, and how long to measure."""

    images: int
    image_seconds: float  # stop checking images after this time
    seconds: float  # time to measure the loader, and the same for the network


BRIEF, FULL = Budget(256, 5.0, 1.0), Budget(1024, 40.0, 8.0)


@dataclass
class Findings:
    """The result of the checks.

    Args:
        lines: lines to print, by name.
        problems: sentences that name what would spoil the run and what to do.
        warnings: sentences that name what makes the run worth little and what to do.
    """

    lines: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Job(NamedTuple):
    """What a pre-training run is about to do.

    Args:
        run: the run, after `make_plan`.
        source: the images.
        sample_loader: how a row of the source becomes a sample.
        mean, std: per channel, what images are normalized by.
        size: height and width of the input, in pixels.
        lr: peak learning rate.
        warmup_epochs: epochs in which the learning rate rises.
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
    """Check a run before its first step and print the findings. All processes must call this.

    The main process checks while the others wait. A resumed run is not checked again.

    Args:
        job: what the run is about to do.
        method: the pre-training method, before it is distributed. It is copied.
        optimizer: its optimizer, which is copied too.
        dry_run: check more images and measure for longer, and exit with code 1 if there is a problem.
    """
    run, problems = job.run, []
    if run.engine.is_main and (dry_run or not run.plan.start):
        with seeded(0):
            findings = run_checks(job, method, optimizer, FULL if dry_run else BRIEF)
        problems = findings.problems
        run.print("\n".join(f"{name:8s} {text}" for name, text in findings.lines.items()))
        found = [f"WARNING: {sentence}" for sentence in [*problems, *findings.warnings]]
        run.print("\n".join(found) or "Preflight checks passed.")
    run.engine.wait()
    if dry_run and problems:
        sys.exit(1)


def run_checks(job: Job, method: nn.Module, optimizer: torch.optim.Optimizer, budget: Budget) -> Findings:
    """Check the images, then measure what a step costs."""
    plan, findings = job.run.plan, Findings()
    check_images(job, budget, findings)
    check_load(findings)
    trial = Trial(job.run, *copy.deepcopy((method, optimizer)), job.sample_loader.in_chans, job.size)
    describe_steps(trial, job, findings)
    check_decoder(trial.method, findings)
    network_rate, batch = trial.measure_rate(min(plan.micro_batch_size, job.source.length), budget.seconds)
    loader_rate = None
    if job.source.streaming and budget is BRIEF:  # each worker fills its window first, which takes long
        findings.lines["loader"] = "not measured for a stream in a run; mimkit doctor measures it"
    else:
        loader_rate = measure_loader(job.source, job.sample_loader, plan, job.workers, budget.seconds)
    estimate_time(network_rate, batch, loader_rate, job, findings)
    check_memory(trial, plan, findings)
    check_disk(trial, job.run, findings)
    if loss := expected(json.loads(json.dumps(job.config))):
        findings.lines["loss"] = loss
    return findings


# Images --------------------------------------------------------------------------------------------------------------


def check_images(job: Job, budget: Budget, findings: Findings) -> None:
    """Check sizes, modes, colors, duplicates and damage of images.

    The images are spread over the data set; of a stream they are the first ones.
    """
    source, until = job.source, time.perf_counter() + budget.image_seconds
    if source.streaming:
        indices, rows = list(range(budget.images)), source.rows.take(budget.images)
    else:  # in random order, so that they are spread over the data set even if the time ends early
        indices = np.random.default_rng(0).permutation(evenly_spaced(source.length, budget.images)).tolist()
        rows = (source.rows[i] for i in indices)
    load_whole = dataclasses.replace(
        job.sample_loader, transform=lambda image: image, units=0, value_range=job.source.value_range
    )
    damaged: list[tuple[int, str]] = []
    names_by_hash: dict[bytes, list[tuple[int, str]]] = {}
    modes, sizes, moments, checked = Counter[str](), [], [], 0
    for index, row in zip(indices, rows, strict=False):
        checked += 1
        sample = load_whole(row, 0, index)
        if sample.image is None:
            damaged.append((index, " (".join(sample.bad or ()) + ")"))
            continue
        data = read_bytes(row[source.image])
        names_by_hash.setdefault(hashlib.sha256(data).digest(), []).append((index, sample.name))
        modes[image_mode(data)] += 1
        sizes.append((sample.image.shape[-2], sample.image.shape[-1]))
        step = max(1, min(sample.image.shape[1:]) // 256)  # a part of the pixels of a photograph is enough for colors
        pixels = sample.image[:, ::step, ::step].double() / (255 if sample.image.dtype == torch.uint8 else 1)
        moments.append(torch.stack([pixels.mean((1, 2)), pixels.square().mean((1, 2))]))
        if time.perf_counter() > until:
            break
    bad = [name for _, name in sorted(damaged)]
    groups = sorted(map(sorted, names_by_hash.values()))
    duplicates = [f"{name} of {group[0][1]}" for group in groups for _, name in group[1:]]
    check_damage(source, checked, bad, duplicates, job.run.max_bad, findings)
    if moments:
        findings.lines["images"] = describe_images(sizes, modes, job.sample_loader.in_chans)
        check_input_size(sizes, job, findings)
        check_colors(torch.stack(moments).mean(0), job, findings)


def check_input_size(sizes: list[tuple[int, int]], job: Job, findings: Findings) -> None:
    """Warn of an input that is small and at most half as large as the images, whose sizes are (height, width)."""
    side, short = min(job.size), round(median(min(size) for size in sizes))
    if side >= SMALL_INPUT or short < 2 * side:
        return
    factor = 2 ** max(1, int(math.log2(min(short, 224) / side)))
    size, patch = "x".join(str(factor * length) for length in dict.fromkeys(job.size)), job.config.get("patch_size")
    advice = f"--img-size {size}" + (f" --patch-size {factor * patch}" if patch else "")
    findings.warnings.append(
        f"The input of {side} px is far below the size of the images, whose short side is {short} px. Pass {advice}."
    )


def check_damage(
    source: Source, checked: int, bad: list[str], duplicates: list[str], max_bad: float, findings: Findings
) -> None:
    """Report images that cannot be decoded, and duplicates, out of `checked` images."""
    findings.lines["data"] = (
        f"{source.length:,} images; {checked:,} checked: "
        f"{f'{len(bad)} cannot be decoded' if bad else 'all can be decoded'}, "
        f"{f'{len(duplicates)} duplicates{_examples(duplicates)}' if duplicates else 'no duplicates'}"
    )
    if len(bad) > max_bad * checked:
        findings.problems.append(
            f"{len(bad)} of {checked} images cannot be decoded, more than --max-bad {max_bad:g} allows"
            f"{_examples(bad)}. Remove or repair them, or raise --max-bad."
        )
    elif bad:
        findings.lines["damaged"] = ", ".join(bad[:MAX_EXAMPLES])
    if len(duplicates) > MAX_DUPLICATES * checked:
        findings.problems.append(
            f"{len(duplicates)} of {checked} images are duplicates{_examples(duplicates)}. Keep one of each."
        )


def describe_images(sizes: list[tuple[int, int]], modes: Counter[str], in_chans: int) -> str:
    """Describe the sizes (height, width) of images, their modes, and the channels that they are decoded to."""
    by_area = sorted(sizes, key=lambda size: size[0] * size[1])
    shown = dict.fromkeys((by_area[0], by_area[len(by_area) // 2], by_area[-1]))
    ranges = " to ".join(f"{height}x{width}" for height, width in shown)
    listed = ", ".join(f"{mode} ({count / len(sizes):.0%})" for mode, count in modes.most_common())
    return f"{ranges} px (height x width), {listed}, decoded to {in_chans} channels"


def image_mode(data: bytes) -> str:
    """Return PIL's mode of an image file, such as RGB or L; "array" for files that PIL cannot read."""
    try:
        return Image.open(io.BytesIO(data)).mode
    except OSError:
        return "array"


def check_colors(moments: Tensor, job: Job, findings: Findings) -> None:
    """Compare the mean and the mean square of each channel (2 c) with the configured mean and std."""
    mean, std = moments[0], (moments[1] - moments[0].square()).clamp_min(0).sqrt()
    shift = (mean - torch.tensor(job.mean)) / torch.tensor(job.std)
    scale = std / torch.tensor(job.std)
    measured, configured = (f"mean {_numbers(a)}, std {_numbers(b)}" for a, b in ((mean, std), (job.mean, job.std)))
    findings.lines["colors"] = f"{measured}; configured {configured}"
    if shift.abs().max() > MAX_SHIFT or scale.max() > MAX_SCALE or scale.min() < 1 / MAX_SCALE:
        findings.problems.append(
            f"The images have {measured}, far from the configured {configured}. Pass --mean [{_numbers(mean, ',')}] "
            f"--std [{_numbers(std, ',')}], or the --value-range of floating-point images."
        )


def _numbers(values: Tensor | Sequence[float], separator: str = " ") -> str:
    return separator.join(f"{float(value):.3f}" for value in values)


def _examples(names: list[str]) -> str:
    return f", such as {', '.join(names[:MAX_EXAMPLES])}" if names else ""


def check_load(findings: Findings) -> None:
    """Report whether other processes use the CPU cores, while this one sleeps for a moment."""
    busy = psutil.cpu_percent(0.3, percpu=True)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(busy))
    used = sum(busy[core] for core in allowed if core < len(busy)) / 100
    if used > MAX_LOAD * cpu_count():
        findings.lines["machine"] = (
            f"other processes use {used:.1f} of {cpu_count()} CPU cores, so training is slow; fewer --threads may be "
            "faster"
        )


# Cost ----------------------------------------------------------------------------------------------------------------


class Trial:
    """Copies of a method and its optimizer that train on random images, to measure what a step costs.

    Args:
        run: the run, for its device and precision.
        method: a copy of the method.
        optimizer: a copy of the optimizer, over the parameters of that copy.
        in_chans: number of channels of the images.
        size: height and width of the images, in pixels.
    """

    def __init__(self, run: Run, method: nn.Module, optimizer: torch.optim.Optimizer, in_chans: int, size: Size):
        self.run, self.device = run, run.engine.device
        self.method, self.optimizer = method.to(self.device).train(), optimizer
        self.shape = in_chans, *size
        self.encoder: Any = method.encoder

    def forward(self, images: Tensor) -> Any:
        """Images (b c H W) -> the method's output, in the run's precision"""
        with self.run.accelerator.autocast():
            return self.method(images)

    def loss(self, images: Tensor) -> Tensor:
        """Images (b c H W) -> loss ()"""
        return self.forward(images).loss

    def images(self, batch: int) -> Tensor:
        """Draw random images (b c H W)."""
        return torch.randn(batch, *self.shape, device=self.device)

    def step(self, images: Tensor) -> float:
        """Train for one step, and return the seconds of its forward pass, backward pass and update."""
        self._synchronize()
        start = time.perf_counter()
        self.loss(images).backward()
        self.optimizer.step()
        self._synchronize()
        self.gradient_bytes = sum(p.grad.nbytes for p in self.method.parameters() if p.grad is not None)
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure_rate(self, max_batch: int, seconds: float) -> tuple[float, int]:
        """Measure the images per second of training steps, as the median over steps.

        The batch is doubled up to `max_batch`, as long as four steps fit into the time.

        Returns:
            Images per second, and the batch that they were measured with.
        """
        batch, until = min(2, max_batch), time.perf_counter() + seconds
        self.step(self.images(batch))  # the first step allocates memory and chooses kernels
        with suppress(torch.OutOfMemoryError):  # stay at the last batch that fit; check_memory reports the problem
            while batch < max_batch and 4 * self.step(self.images(batch)) < seconds:
                self.step(self.images(min(2 * batch, max_batch)))
                batch = min(2 * batch, max_batch)
        images = self.images(batch)
        times: list[float] = []
        while len(times) < 3 or (time.perf_counter() < until and len(times) < 20):
            times.append(self.step(images))
            if time.perf_counter() > until + seconds:
                break
        return batch / median(times), batch

    def activation_bytes(self, batch: int) -> int:
        """Return the bytes that the forward pass of a batch keeps for the backward pass.

        They are measured on up to 4 images, and extrapolated to larger batches.
        """
        tensors = [*self.method.parameters(), *self.method.buffers()]
        small, large = (min(count, batch) for count in (2, 4))
        kept = {n: kept_bytes(partial(self.loss, x := self.images(n)), [*tensors, x]) for n in {small, large}}
        return max(0, round(kept[large] + (batch - large) * (kept[large] - kept[small]) / 2))

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of the weights (with buffers), the gradients and the optimizer's state, after a step."""
        states = [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        weights = sum(x.nbytes for x in self.method.state_dict().values())
        return {"weights": weights, "gradients": self.gradient_bytes, "optimizer": sum(x.nbytes for x in states)}


def describe_steps(trial: Trial, job: Job, findings: Findings) -> None:
    """Describe units, batch size and schedule. The numbers of units come from the masks of one forward pass."""
    plan = job.run.plan
    with torch.no_grad():
        units = trial.forward(trial.images(2)).units
    p = trial.encoder.unit_size
    gh, gw = trial.shape[1] // p, trial.shape[2] // p
    visible, predicted = units.visible.shape[1], units.masked.shape[1]
    masked = gh * gw - visible
    findings.lines["units"] = f"{gh} x {gw} units of {p} px = {gh * gw}: {visible} visible, {masked} masked"
    findings.lines["units"] += f", {predicted} of them predicted" if predicted < masked else ""
    warmup = round(job.warmup_epochs * plan.steps_per_epoch)
    findings.lines["steps"] = (
        f"batch size {plan.batch_size} = {plan.micro_batch_size} images x {plan.world_size} processes x "
        f"{plan.grad_accum_steps} gradient accumulation steps; {plan.steps_per_epoch:,} steps per epoch, "
        f"{plan.steps:,} in {plan.steps / plan.steps_per_epoch:g} epochs; "
        f"lr {job.lr:.3g} after {warmup:,} warmup steps"
    )

    if plan.steps < MIN_STEPS:
        epochs = math.ceil(MIN_STEPS / plan.steps_per_epoch)
        findings.warnings.append(
            f"The run has {plan.steps} steps, too few to learn from the images. Pass --epochs {epochs} or more, or a "
            "smaller --batch-size."
        )


def check_decoder(method: Any, findings: Findings) -> None:
    """Warn of a decoder that is larger than the encoder."""
    encoder, decoder = (sum(p.numel() for p in part.parameters()) for part in (method.encoder, method.decoder))
    if decoder > encoder and isinstance(method.decoder, Decoder):
        findings.warnings.append(
            f"The decoder has {decoder / 1e6:.1f} M parameters, more than the encoder's {encoder / 1e6:.1f} M. Omit "
            "--decoder-dim and --decoder-depth, or lower them."
        )


def measure_loader(source: Source, sample_loader: SampleLoader, plan: Plan, workers: int, seconds: float) -> float:
    """Measure the images per second of the loader of one process, without a network.

    Workers finish their batches at about the same time, so only whole rounds over the workers count. The first round,
    in which they start, is left out.
    """
    batch = min(32, plan.micro_batch_size, source.length)
    endless = Plan(source.length, batch, steps=1_000_000, seed=plan.seed)
    loader, times, per_round = iter(train_loader(source, sample_loader, endless, workers)), [], max(1, workers)
    start = time.perf_counter()
    for _ in loader:
        times.append(time.perf_counter())
        round_complete = len(times) % per_round == 1 % per_round
        if len(times) > 2 * per_round and round_complete and times[-1] - start > seconds:
            break
    return batch * (len(times) - 1 - per_round) / (times[-1] - times[per_round])


def combined_rate(loader: float, network: float, workers: int, cores: int | None) -> float:
    """Return the images per second of a run, given those of the loader and of the network alone.

    Without workers, loader and network take turns. With workers, the slower of them decides.

    Args:
        cores: number of CPU cores that the workers and the network share; None if the network runs on a GPU.
    """
    if not workers:
        return 1 / (1 / loader + 1 / network)
    return 1 / max(1 / loader, 1 / network + (workers / cores / loader if cores else 0))


def describe_bottleneck(loader: float, network: float, workers: int, device: str) -> str:
    """Compare the images per second of loader and network, and say what to do if data loading is slower."""
    rates = f"data loading {loader:,.0f} images/s with {workers} workers, network {network:,.0f} images/s"
    if loader >= network:
        return f"{rates}. The {device} is the bottleneck, not data loading."
    most = _local_share(cpu_count()) - 1
    advice = f"Raise --workers to {most}" if workers < most else "Store smaller images, or use more CPU cores"
    return f"{rates}. Data loading is the bottleneck. {advice}."


def estimate_time(network: float, batch: int, loader: float | None, job: Job, findings: Findings) -> None:
    """Report the images per second of the loader and the network, and estimate the duration of the run.

    Args:
        network: images per second of the network alone.
        batch: number of images in a step that it was measured with.
        loader: images per second of the loader alone, if they were measured.
    """
    run, plan, device = job.run, job.run.plan, job.run.engine.device
    rate = network
    if loader:
        kind = "GPU" if device.type == "cuda" else device.type.upper()
        findings.lines["speed"] = describe_bottleneck(loader, network, job.workers, kind)
        cores = max(1, _local_share(cpu_count())) if device.type == "cpu" else None
        rate = combined_rate(loader, network, job.workers, cores)
    rate *= plan.world_size
    seconds = (plan.steps - plan.start) * plan.batch_size / rate
    hours, minutes = int(seconds // 3600), int(seconds // 60 % 60)
    duration = f"{hours} h {minutes} min" if hours else f"{minutes} min {int(seconds % 60)} s"
    how = "without torch.compile, " if run.compile else ""
    findings.lines["time"] = (
        f"about {duration}, plus kNN evaluation, at {rate:,.0f} images/s; measured {how}with {batch} images per step "
        f"on {device_name(device)}"
    )


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = device.type.upper()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return f"{name}, {torch.get_num_threads()} threads"


def check_memory(trial: Trial, plan: Plan, findings: Findings) -> None:
    """Compare the memory that a process needs at least with what there is. Temporary buffers are not counted."""
    parts = trial.state_bytes() | {"activations": trial.activation_bytes(plan.micro_batch_size)}
    need = sum(parts.values())
    if trial.device.type == "cuda":
        available = torch.cuda.mem_get_info(trial.device)[1]
    else:
        available = _local_share(psutil.virtual_memory().total)
    listed = ", ".join(f"{name} {_format_bytes(number)}" for name, number in parts.items())
    findings.lines["memory"] = f"at least {_format_bytes(need)} of {_format_bytes(available)}: {listed}"
    if need > available:
        # a number of gradient accumulation steps has to divide the micro-batch
        divisors = [k for k in range(2, plan.micro_batch_size + 1) if not plan.micro_batch_size % k]
        k = next((k for k in divisors if need - parts["activations"] * (1 - 1 / k) < available), None)
        advice = f"Pass --grad-accum-steps {plan.grad_accum_steps * k}" if k else "Choose a smaller --model"
        findings.problems.append(
            f"A step of {plan.micro_batch_size} images needs {_format_bytes(need)} of memory, but a process has "
            f"{_format_bytes(available)}. {advice}, or --grad-checkpointing."
        )


def check_disk(trial: Trial, run: Run, findings: Findings) -> None:
    """Compare the disk space of checkpoints and encoder with what is free.

    A checkpoint is written before an old one is deleted, so there is one more than the run keeps.
    """
    plan, states = run.plan, trial.state_bytes()
    one = states["weights"] + states["optimizer"]
    saves = math.ceil(plan.steps / max(1, round(run.save_every * plan.steps_per_epoch) or plan.steps))
    permanent = saves // run.keep_every if run.keep_every else 0
    count = min(saves, run.checkpoints.keep + 1 + permanent)
    need = count * one + states["weights"]
    place = next(place for place in (run.folder.absolute(), *run.folder.absolute().parents) if place.exists())
    free = disk_usage(place).free
    findings.lines["disk"] = (
        f"{count} checkpoints of {_format_bytes(one)} and the encoder: {_format_bytes(need)} of "
        f"{_format_bytes(free)} free"
    )
    if need > free:
        findings.problems.append(
            f"{count} checkpoints need {_format_bytes(need)}, but {place} has {_format_bytes(free)} free. Choose a "
            "lower --keep, --keep-every 0 or another --out."
        )


def _local_share(amount: int) -> int:
    """Return the share of a process in what the processes on this machine divide among them."""
    return amount // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _format_bytes(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
