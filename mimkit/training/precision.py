"""Choose the numerical precision by what the device does well."""

import ctypes
import time

import torch

from mimkit.errors import UserError
from mimkit.training import distributed


def seconds_of(dtype: torch.dtype) -> float:
    """A matrix product of a network's size on this CPU, at its best."""
    x, times = torch.ones(512, 512, dtype=dtype), []
    for _ in range(6):
        begun = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - begun)
    return min(times)


def multiplies_bf16() -> bool:
    """Whether this CPU is faster in bf16 than in fp32, measured: AVX-512 BF16 makes an EPYC 3.6 times as fast, and a
    Xeon whose AMX is hidden half as fast."""
    return seconds_of(torch.bfloat16) < seconds_of(torch.float32)


def resolve_precision(precision: str) -> str:
    """'auto' -> what the device does well: bf16 on GPUs that have it, fp16 on older ones; the faster one on a CPU."""
    if precision not in ("auto", "fp32", "bf16", "fp16"):
        raise UserError(f"--precision {precision} is unknown: choose auto, fp32, bf16 or fp16.")
    if precision != "auto":
        return precision
    if distributed.on_cpu():
        return "bf16" if multiplies_bf16() else "fp32"
    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one.

    It hands large blocks back to the system, and faulting them in again costs a few percent of a training step on a
    CPU, more where it is busy (benchmarks/mim_race.md). Other C libraries are left alone.
    """
    mmap_max, trim_threshold = -4, -1  # malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)
    except (OSError, AttributeError):
        pass
