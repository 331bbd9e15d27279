"""CPU threads of a training process: as many as the user asked for, or else its share of the cores.

`mimkit/__init__.py` says how threads wait for each other.
"""

import os

import psutil
import torch

LAUNCHED = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}  # variables that launchers give to their processes
FLAG = "num_cpu_threads_per_process"  # of accelerate launch


def launcher() -> psutil.Process | None:
    """Return the launcher of this process, or None if there is none or it cannot be looked at.

    It is the first ancestor that was not given the variables of a launcher itself.
    """
    try:
        process: psutil.Process | None = psutil.Process()
        if not LAUNCHED & psutil.Process().environ().keys():
            return None
        while process and LAUNCHED & process.environ().keys():
            process = process.parent()
        return process
    except psutil.Error:
        return None


def limited_by_launcher() -> bool:
    """Return whether a launcher, and not the user, chose one OpenMP thread for this process.

    Launchers set OMP_NUM_THREADS to 1 where it is missing, so the launcher's own environment and flags are what the
    user chose.
    """
    if os.environ.get("OMP_NUM_THREADS") != "1":
        return False
    process = launcher()
    try:
        chosen = process and ("OMP_NUM_THREADS" in process.environ() or _has_flag(process.cmdline()))
    except psutil.Error:
        return False
    return process is not None and not chosen


def _has_flag(words: list[str]) -> bool:
    return any(word.lstrip("-").replace("-", "_").startswith(FLAG) for word in words)


def set_threads(threads: int | None, cores: int) -> None:
    """Set the number of torch's CPU threads.

    Args:
        threads: this number. By default torch's own, which follows OMP_NUM_THREADS; but a process that its launcher
            limits to one gets its share of the cores.
        cores: number of CPU cores for the processes on this machine.
    """
    if threads:
        torch.set_num_threads(threads)
    elif limited_by_launcher():
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
