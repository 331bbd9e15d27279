"""Choose the numerical precision that the device computes fast, and keep freed memory in the process."""

import ctypes
import time

import torch

from mimkit.errors import UserError


def on_cpu() -> bool:
    """Return whether accelerate will train on the CPU: no accelerator was found, or the launcher chose the CPU."""
    from accelerate.utils import parse_flag_from_env

    forced = parse_flag_from_env("ACCELERATE_USE_CPU")
    return forced or not (torch.cuda.is_available() or torch.backends.mps.is_available())


def seconds_of(dtype: torch.dtype) -> float:
    """Return the shortest of six times that a matrix product of a network's size takes on this CPU."""
    x, times = torch.ones(512, 512, dtype=dtype), []
    for _ in range(6):
        start = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - start)
    return min(times)


def multiplies_bf16() -> bool:
    """Measure whether this CPU is faster in bf16 than in fp32.

    AVX-512 BF16 makes an EPYC 3.6 times as fast. A Xeon whose AMX is hidden is half as fast in bf16.
    """
    return seconds_of(torch.bfloat16) < seconds_of(torch.float32)


def resolve_precision(precision: str) -> str:
    """Resolve 'auto': bf16 on GPUs that support it and fp16 on older ones; on a CPU, the faster of bf16 and fp32."""
    if precision not in ("auto", "fp32", "bf16", "fp16"):
        raise UserError(f"--precision {precision} is unknown. Choose auto, fp32, bf16 or fp16.")
    if precision != "auto":
        return precision
    if on_cpu():
        return "bf16" if multiplies_bf16() else "fp32"
    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a step frees for the next step.

    By default it returns large blocks to the system. Faulting them in again costs a few percent of a training step on
    a CPU, and more on a busy machine (benchmarks/mim_race.md). Other C libraries are left alone.
    """
    mmap_max, trim_threshold = -4, -1  # malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)
    except (OSError, AttributeError):
        pass
