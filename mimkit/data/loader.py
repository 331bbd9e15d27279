"""Rows of a source -> batches that depend on nothing but (seed, epoch, index of the image).

Every random choice about an image (its crop, its flip, the noise that says what is masked and what is decoded) is drawn
from (seed, epoch, index), never from the state of a worker or a process, and the order of rows is a pure function too:
so a run can be resumed at any step, and any number of workers gives the same batches.
"""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import Thread, Timer
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

WAIT = 100  # seconds after which a worker that gives nothing is stuck


class Rows(Dataset[Sample]):
    """(epoch, index) -> view, of a source with rows by index; with `filled` the next good one in the place of a bad."""

    def __init__(self, source: Source, viewer: SampleLoader, filled: bool = False):
        self.source, self.viewer, self.filled = source, viewer, filled

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        epoch, index = place
        places = ((index + i) % self.source.length for i in range(self.source.length if self.filled else 1))
        return first_good(self.viewer(self.source.rows[i], epoch, i) for i in places)


def ignore_scheduler_signals(_: int) -> None:
    """In a data worker: schedulers signal every process of a job, but the one that trains still needs the others."""
    if hasattr(signal, "sigwaitinfo"):
        Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)


class Loader(DataLoader[Any]):
    """torch's, whose workers heed their parent only, and are killed when stuck; `None` is a sign of life."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **(kwargs | {"worker_init_fn": ignore_scheduler_signals}))

    def __iter__(self) -> Any:
        with _blocked():
            batches = super().__iter__()
        return (batch for batch in (_watched(batches) if self.num_workers else batches) if batch is not None)


def _watched(batches: Any) -> Iterator[Any]:
    """Batches of torch's workers, which are killed where one is waited for too long: torch then tells that they ended.

    Its own limit sees neither a worker that stopped while it hands a batch over, nor one that cannot be told to end.
    """
    while True:
        limit = Timer(WAIT, _kill, [batches])
        limit.daemon = True
        limit.start()
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (ConnectionError, EOFError) as error:
            raise UserError(WORKER.format("it ended while it handed a batch over")) from error
        finally:
            limit.cancel()
        yield batch


def _kill(batches: Any) -> None:
    _remove_worker_pids(id(batches))  # or torch's handler of SIGCHLD would raise in whatever line it meets
    batches._worker_pids_set = False
    for worker in batches._workers:
        worker.kill()


@contextmanager
def _blocked() -> Iterator[None]:
    """Block `STOP_SIGNALS` in the processes that start inside, and in the threads that libraries start in them."""
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def train_loader(
    source: Source, viewer: SampleLoader, plan: Plan, workers: int, collate: Callable[[list[Sample]], Batch] = collate
) -> DataLoader[Any]:
    """All batches of a run, from its first step to its last, on one set of workers."""
    common: dict[str, Any] = {"num_workers": workers, "pin_memory": torch.cuda.is_available()}
    if source.streaming:
        return Loader(Stream(source, viewer, plan), batch_size=None, **common)
    return Loader(Rows(source, viewer, filled=True), batch_sampler=Order(plan), collate_fn=collate, **common)


def restart(loader: DataLoader[Any], step: int) -> None:
    """Let the next pass over `train_loader`'s batches begin at another step."""
    holder: Any = loader.dataset if isinstance(loader.dataset, Stream) else loader.batch_sampler
    holder.plan = replace(holder.plan, start=step)


def single_image_loader(
    source: Source, viewer: SampleLoader, places: Iterable[int], workers: int = 0, collate: Any = collate
) -> DataLoader[Any]:
    """Batches of one image, as large as it is; none in a batch whose image is bad."""
    sampler: Any = [(0, i) for i in places]
    return Loader(Rows(source, viewer), 1, sampler=sampler, collate_fn=collate, num_workers=workers)


def check_samples(source: Source, viewer: SampleLoader) -> list[Any]:
    """Views of 50 images of a set, or of all that it has.

    Raises:
        UserError: one of them cannot be used.
    """
    views = [viewer(source.rows[i], 0, i) for i in evenly_spaced(source.length, 50)]
    for view in views:
        if view.bad:
            raise UserError(f"{view.name} cannot be used ({view.bad[1]}): mend or remove it.")
    return views


def eval_loader(
    source: Source,
    size: Size,
    in_chans: int,
    images: int | None = None,
    batch_size: int = 256,
    workers: int = 0,
    crop_pct: float = 1.0,
    share: tuple[int, int] = (0, 1),
) -> DataLoader[Any]:
    """Images in order, with labels: evenly spread ones where fewer are wanted, of them the share of (rank, world)."""
    viewer = SampleLoader(
        eval_transform(size, crop_pct), in_chans, 0, 0, (source.image, source.label), part=source.part
    )
    rank, world = share
    places: Any = [(0, i) for i in evenly_spaced(source.length, images or source.length)[rank::world]]
    return Loader(Rows(source, viewer), batch_size, sampler=places, collate_fn=collate, num_workers=workers)


def load_preview(source: Source, size: Size, in_chans: int, count: int) -> Batch:
    """A few images, uncropped: evenly spread ones, or the first of a stream."""
    viewer = SampleLoader(eval_transform(size), in_chans, 0, 0, (source.image, source.label))
    rows = (
        source.rows.take(count) if source.streaming else (source.rows[i] for i in evenly_spaced(source.length, count))
    )
    return collate([viewer(row, 0, i) for i, row in enumerate(rows)])


def limit_bad_images(
    batches: Iterable[Batch], limit: float, log: Callable[[str], None], bad: dict[str, str] | None = None
) -> Iterator[Batch]:
    """Pass batches on, name each bad image once, and stop when there are more than `limit` of them.

    Args:
        bad: those that are known, and why; new ones are added.
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
                "remove or mend them, or raise --max-bad."
            )
        yield batch
