"""Data loaders: rows of a source in, batches out.

A batch depends only on (seed, epoch, indices of its images), because the order of rows is a pure function (order.py,
streaming.py) and so is every random choice about an image (sample.py). A run can therefore resume at any step, and any
number of workers gives the same batches.
"""

import os
import signal
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Event, Thread
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from mimkit.data.order import Order, Plan, evenly_spaced
from mimkit.data.sample import Batch, Sample, SampleLoader, collate, first_good
from mimkit.data.sources import Source
from mimkit.data.streaming import Stream
from mimkit.data.transforms import Size, eval_transform
from mimkit.errors import STOP_SIGNALS, WORKER, UserError

WAIT = 100  # seconds to wait for a batch before the workers count as stuck


class Rows(Dataset[Sample]):
    """Samples of a source by (epoch, index).

    With `replace_bad`, a bad image is replaced by the next good one of the source.
    """

    def __init__(self, source: Source, sample_loader: SampleLoader, replace_bad: bool = False):
        self.source, self.replace_bad = source, replace_bad
        self.sample_loader = replace(sample_loader, value_range=source.value_range)

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        epoch, index = place
        indices = ((index + i) % self.source.length for i in range(self.source.length if self.replace_bad else 1))
        return first_good(self.sample_loader(self.source.rows[i], epoch, i) for i in indices)


class Loader(DataLoader[Any]):
    """torch's DataLoader, with workers that obey signals of their parent only and that are killed if they are stuck.

    A dataset may yield `None` as a sign of life; it is dropped.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **(kwargs | {"worker_init_fn": ignore_scheduler_signals}))

    def __iter__(self) -> Any:
        with _stop_signals_blocked():
            batches = super().__iter__()
        return (batch for batch in (_watched(batches) if self.num_workers else batches) if batch is not None)


def ignore_scheduler_signals(_: int) -> None:
    """Let a data worker ignore the stop signals of a scheduler, but not those of its parent.

    A scheduler signals every process of a job. The training process still needs its workers until it has stopped.
    """
    if hasattr(signal, "sigwaitinfo"):
        Thread(target=_exit_when_parent_signals, daemon=True).start()


def _exit_when_parent_signals() -> None:
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Block `STOP_SIGNALS` in processes that are started inside, and in the threads that libraries start in them.

    So is Ctrl-C, which a terminal sends to all processes: the training process still needs its workers for a step.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    obeyed = STOP_SIGNALS if hasattr(signal, "sigwaitinfo") else []  # by `ignore_scheduler_signals`
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [*obeyed, signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Watchdog:
    """A thread that kills the workers of torch's batch iterator when one wait for a batch exceeds `WAIT` seconds.

    Once the workers are killed, torch raises an error in the process that waits. torch's own timeout does not cover a
    worker that is stopped while it sends a batch, nor a worker that does not react to being terminated.
    """

    def __init__(self, batches: Any):
        self.batches = weakref.ref(batches)  # the iterator must end with its owner, not with this thread
        self.deadline: float | None = None  # end of the current wait; None while no batch is waited for
        self.stopped = Event()
        Thread(target=self._run, name="mimkit-watchdog", daemon=True).start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Limit the time that is spent inside."""
        self.deadline = time.monotonic() + WAIT
        try:
            yield
        finally:
            self.deadline = None

    def stop(self) -> None:
        """End the thread."""
        self.stopped.set()

    def _run(self) -> None:
        pause: float = WAIT
        while not self.stopped.wait(pause):
            # a wait that begins during a pause cannot end before it, so the thread needs no signal when one begins
            deadline = self.deadline
            pause = WAIT if deadline is None else deadline - time.monotonic()
            if pause <= 0:
                self._kill_workers()
                return

    def _kill_workers(self) -> None:
        if batches := self.batches():
            _remove_worker_pids(id(batches))  # otherwise torch's SIGCHLD handler raises an error in an arbitrary line
            batches._worker_pids_set = False
            for worker in batches._workers:
                worker.kill()


def _watched(batches: Any) -> Iterator[Any]:
    """Yield the batches of torch's workers under a `Watchdog`."""
    watchdog = Watchdog(batches)
    try:
        while True:
            try:
                with watchdog.waiting():
                    batch = next(batches)
            except StopIteration:
                return
            except (ConnectionError, EOFError) as error:
                raise UserError(WORKER.format("it ended while it handed a batch over")) from error
            except UserError as error:  # torch puts the traceback of the worker before its text
                raise UserError(str(error).rpartition("UserError: ")[2]) from error
            yield batch
    finally:
        watchdog.stop()


def cpu_count() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Return the default number of data workers of one process: its share of the CPU cores, less one for training."""
    return min(16, max(0, cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def train_loader(
    source: Source,
    sample_loader: SampleLoader,
    plan: Plan,
    workers: int,
    collate: Callable[[list[Sample]], Batch] = collate,
) -> DataLoader[Any]:
    """Return a loader of all micro-batches of a run, from its first step to its last, with one set of workers.

    Bad images are replaced by good ones.
    """
    common: dict[str, Any] = {"num_workers": workers, "pin_memory": torch.cuda.is_available()}
    if source.streaming:
        return Loader(Stream(source, sample_loader, plan), batch_size=None, **common)
    rows = Rows(source, sample_loader, replace_bad=True)
    return Loader(rows, batch_sampler=Order(plan), collate_fn=collate, **common)


def restart(loader: DataLoader[Any], step: int) -> None:
    """Let the next iteration over a `train_loader` begin at `step`."""
    holder: Any = loader.dataset if isinstance(loader.dataset, Stream) else loader.batch_sampler
    holder.plan = replace(holder.plan, start=step)


def eval_loader(
    source: Source,
    size: Size,
    in_chans: int,
    images: int | None = None,
    batch_size: int = 256,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    **crop: Any,
) -> DataLoader[Any]:
    """Return a loader of center-cropped images and their labels, in order. Bad images are left out.

    Args:
        source: where images and labels come from.
        size: (H, W) of a crop.
        in_chans: number of channels.
        images: number of images, evenly spaced in the source; by default all of them.
        batch_size: number of images in a batch.
        workers: number of data workers.
        rank, world_size: this process gets every `world_size`-th image, from the `rank`-th on.
        crop: further arguments of `eval_transform`.
    """
    fields = (source.image, source.label)
    sample_loader = SampleLoader(eval_transform(size, **crop), in_chans, 0, 0, fields, part=source.part)
    indices = evenly_spaced(source.length, images or source.length)[rank::world_size]
    sampler: Any = [(0, i) for i in indices]
    return Loader(Rows(source, sample_loader), batch_size, sampler=sampler, collate_fn=collate, num_workers=workers)


def single_image_loader(
    source: Source, sample_loader: SampleLoader, indices: Iterable[int], workers: int = 0, collate: Any = collate
) -> DataLoader[Any]:
    """Return a loader of batches of one image each, in its own size. The batch of a bad image has no images."""
    sampler: Any = [(0, i) for i in indices]
    return Loader(Rows(source, sample_loader), 1, sampler=sampler, collate_fn=collate, num_workers=workers)


def load_preview(source: Source, size: Size, in_chans: int, count: int) -> Batch:
    """Return one batch of `count` center-cropped images: evenly spaced ones, or the first ones of a stream."""
    sample_loader = SampleLoader(eval_transform(size), in_chans, 0, 0, (source.image, source.label))
    sample_loader = replace(sample_loader, value_range=source.value_range)
    rows = (
        source.rows.take(count) if source.streaming else (source.rows[i] for i in evenly_spaced(source.length, count))
    )
    return collate([sample_loader(row, 0, i) for i, row in enumerate(rows)])


def check_samples(source: Source, sample_loader: SampleLoader) -> list[Any]:
    """Load 50 evenly spaced samples of a source, or all if it has fewer, and return them.

    Raises:
        UserError: one of them cannot be used.
    """
    sample_loader = replace(sample_loader, value_range=source.value_range)
    samples = [sample_loader(source.rows[i], 0, i) for i in evenly_spaced(source.length, 50)]
    for sample in samples:
        if sample.bad:
            raise UserError(f"{sample.name} cannot be used ({sample.bad[1]}): fix or remove it.")
    return samples


def limit_bad_images(
    batches: Iterable[Batch], limit: float, log: Callable[[str], None], bad: dict[str, str] | None = None
) -> Iterator[Batch]:
    """Yield the batches, log each bad image once, and stop the run when more than `limit` images are bad.

    Args:
        batches: any number of epochs of batches.
        limit: number of bad images to tolerate.
        log: called with one line for each bad image.
        bad: names of the bad images known from before, with the reasons. New ones are added.

    Raises:
        UserError: there are more than `limit` bad images.
    """
    bad = {} if bad is None else bad
    for batch in batches:
        for image, reason in batch.bad:
            if image not in bad:
                bad[image] = reason
                log(f"skipped {image}, which cannot be used ({reason})")
        if len(bad) > limit:
            image, reason = next(iter(bad.items()))
            raise UserError(
                f"{len(bad)} images cannot be used, more than the {int(limit)} allowed, such as {image} ({reason}): "
                "fix or remove them, or raise --max-bad."
            )
        yield batch
