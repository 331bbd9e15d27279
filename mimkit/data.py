"""Rows of a source -> batches that depend on nothing but (seed, epoch, index of the image).

Every random choice about an image (its crop, its flip, the noise that says what is masked and what is decoded) is drawn
from (seed, epoch, index), never from the state of a worker or a process, and the order of rows is a pure function too:
so a run can be resumed at any step, and any number of workers gives the same batches.
"""

import heapq
import math
import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Thread, Timer
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.random.mtrand import get_bit_generator, set_bit_generator
from PIL import Image
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate, get_worker_info
from torch.utils.data._utils.signal_handling import _remove_worker_pids
from torchvision.transforms import InterpolationMode, v2

from mimkit.errors import STOPS, WORKER, UserError
from mimkit.images import decode, decode_pixels
from mimkit.sources import Source

Size = tuple[int, int]
Index = int | tuple[int, int]  # of an image: its row, or (shard, row) in a stream
Transform = Callable[..., Any]
TRIES = 100  # images that may stand in for one that is bad
WAIT = 100  # seconds after which a worker that gives nothing is stuck
STRIP = 20  # times as long as wide
WINDOW = 2048  # rows among which a stream is shuffled, beside the shuffle of its shards


def parse_size(size: int | str) -> Size:
    """224 or '224' or '256x512' (height x width) -> (height, width)"""
    sides = str(size).lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise UserError(f"An image size of {size!r} is neither a number nor HEIGHTxWIDTH: write 224 or 256x512.")
    return int(sides[0]), int(sides[-1])


# One image -----------------------------------------------------------------------------------------------------------


STAND_IN = np.random.MT19937(0)  # for numpy's own generator: setting that one back would cost .1 ms an image


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Inside, every usual generator is a function of the key alone; afterwards they are as they were.

    But for the second of a pair of normal numbers that `np.random.randn` may hold ready: NumPy lets go of it.
    """
    before = random.getstate(), get_bit_generator(), torch.get_rng_state()
    words = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(words[0]))
    set_bit_generator(STAND_IN)
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))  # torch.manual_seed formats a traceback where CUDA is asleep
    try:
        yield
    finally:
        random.setstate(before[0])
        set_bit_generator(before[1])
        torch.set_rng_state(before[2])


def train_transform(size: Size, scale: tuple[float, float] = (0.2, 1.0)) -> Transform:
    """MAE's augmentation: a random resized crop, bicubic, and a flip (MAE, appendix A.1): (c h w) -> (c H W)."""
    if not 0 < scale[0] <= scale[1] <= 1:
        raise UserError(
            f"--crop-scale {list(scale)} is no range of shares: give two numbers between 0 and 1, like 0.2,1."
        )
    return partial(crop_and_flip, size=size, scale=scale)


def crop_and_flip(image: Tensor, size: Size, scale: tuple[float, float]) -> Tensor:
    """(c h w) -> (c H W): the draws, and so the crops, of torchvision's two transforms, which take longer
    (benchmarks/loader.md)."""
    top, left, height, width = draw_box(image.shape[-2], image.shape[-1], scale)
    box = image[:, top : top + height, left : left + width]
    box = box.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # pixels lie together, which torch scales much faster
    scaled = v2.functional.resize(box, list(size), InterpolationMode.BICUBIC, antialias=True)
    return scaled.flip(-1) if torch.rand(1) < 0.5 else scaled


def draw_box(height: int, width: int, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """Top, left, height and width of a part of an image: a share of its area drawn between `scale`, and the aspect from
    3/4 to 4/3, evenly by its logarithm (Szegedy et al., CVPR 2015)."""
    narrow, wide = 3 / 4, 4 / 3
    for _ in range(10):
        area = height * width * torch.empty(1).uniform_(*scale).item()
        aspect = torch.exp(torch.empty(1).uniform_(math.log(narrow), math.log(wide))).item()
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(torch.randint(height - h + 1, (1,))), int(torch.randint(width - w + 1, (1,))), h, w
    h, w = min(height, round(width / narrow)), min(width, round(height * wide))  # the middle of a strip
    return (height - h) // 2, (width - w) // 2, h, w


def finetune_transform(
    size: Size, scale: tuple[float, float], augment: str | None, erase: float, normalise: "Normalise"
) -> Transform:
    """The augmentation of supervised training: crop and flip, then timm's RandAugment and random erasing.

    Args:
        augment: as timm spells it, such as rand-m9-mstd0.5-inc1; None for none.
        erase: share of the images of which a part becomes noise.
        normalise: comes before the erasing, whose noise is of deviation 1: what results is a network's input.
    """
    crop = train_transform(size, scale)
    policy: Any = None
    if augment:
        fill = tuple(round(255 * mean) for mean in normalise.values[0])
        about: dict[str, Any] = {"translate_const": int(min(size) * 0.45), "interpolation": Image.Resampling.BICUBIC}
        about["img_mean"] = fill if len(fill) > 1 else fill[0]
        make = rand_augment_transform if augment.startswith("rand") else auto_augment_transform
        try:
            policy = make(augment, about)
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise UserError(
                f"--aa {augment} is no policy that timm knows: write one such as rand-m9-mstd0.5-inc1, or null."
            ) from error
    erasing = RandomErasing(erase, mode="pixel", device="cpu")
    here = Normalise(*normalise.values)  # the other one may be on a GPU, which workers have no part in

    def transform(image: Tensor) -> Tensor:
        pixels = crop(image)
        if policy and pixels.dtype == torch.uint8 and len(pixels) in (1, 3):  # what PIL knows
            pixels = v2.functional.pil_to_tensor(policy(v2.functional.to_pil_image(pixels)))
        return erasing(here(pixels))

    return transform


def eval_transform(size: Size, crop_pct: float = 1.0) -> Transform:
    """Scale until the input is covered, 1 / crop_pct times, and cut out its centre."""

    def transform(image: Any) -> Any:
        height, width = v2.functional.get_size(image)
        scale = max(size[0] / height, size[1] / width) / crop_pct
        near = [math.ceil(8 * side / scale) for side in size]
        if height > near[0] or width > near[1]:  # a strip, such as 20,000 px by 3, whose ends would take gigabytes
            height, width = min(height, near[0]), min(width, near[1])
            image = v2.functional.center_crop(image, [height, width])
        scaled = [max(size[0], round(height * scale)), max(size[1], round(width * scale))]
        image = v2.functional.resize(image, scaled, InterpolationMode.BICUBIC, antialias=True)
        return v2.functional.center_crop(image, list(size))

    return transform


def whole_size(image: Any) -> Size:
    """(height, width) of an image that is to be looked at whole.

    Raises:
        ValueError: it is a strip: scaled by its short side it would fill the memory, by its long one nothing were left.
    """
    height, width = v2.functional.get_size(image)
    if max(height, width) > STRIP * min(height, width):
        raise ValueError(f"it is a strip of {height}x{width}, one side more than {STRIP} times the other: cut it up")
    return height, width


class View(NamedTuple):
    """One image as a network sees it."""

    image: Tensor | None  # (c H W), uint8 or float32; None when it cannot be decoded
    noise: Tensor  # (n) for the mask
    label: Any  # its class, or what `Viewer.target` gave, as the transform left it
    name: str  # its file, or its place
    bad: tuple[str, str] | None = None  # what cannot be decoded, and why: this image, or the one it stands in for


@dataclass
class Viewer:
    """A row -> a view of it, drawn from (seed, epoch, index).

    Args:
        units: mask units in an image, the length of its noise; 0 for none.
        fields: names of the image and the label column.
        target: reads what the label column holds, if that is no class; the transform takes it along with the image,
            and gives back both.
        pixels: whether the transform takes (c H W) of any image, and not pictures as PIL's.
        part: of the data, named where a row has no file to name.
    """

    transform: Transform
    in_chans: int
    units: int
    seed: int
    fields: tuple[str, str | None]
    target: Callable[[Any], Any] | None = None
    part: str = ""
    pixels: bool = False

    def __call__(self, row: dict[str, Any], epoch: int, index: Index) -> View:
        file = row[self.fields[0]] or {"bytes": None, "path": None}
        label = row[self.fields[1]] if self.fields[1] else -1
        key = (index,) if isinstance(index, int) else index
        # names that stand beside bytes need not be unique
        place = f"{self.part} image {':'.join(map(str, key))}".lstrip()
        name = file["path"] if file["bytes"] is None and file["path"] else place
        with seeded(self.seed, epoch, *key):
            noise = torch.rand(self.units)
            try:
                image = (decode_pixels if self.pixels else decode)(read_cell(file), self.in_chans)
                if self.target:
                    image, label = self.transform(image, self.target(label))
                else:
                    image = self.transform(image)
                if isinstance(image, Image.Image):
                    image = v2.functional.pil_to_tensor(image)
            except Exception as error:  # readers raise whatever they like on a broken file
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                return View(None, noise, -1, name, (name, reason))
        return View(image, noise, label if self.target else -1 if label is None else int(label), name)


def first_good(views: Iterator[View]) -> View:
    """The first of them; where it is bad, the next good one of a hundred stands in for it, under its noise."""
    wanted = next(views)
    if not wanted.bad:
        return wanted
    good = next((view for view in islice(views, TRIES) if not view.bad), wanted)
    return good._replace(noise=wanted.noise, bad=wanted.bad)


def read_cell(file: dict[str, Any]) -> bytes:
    """What a cell of images holds, or points at."""
    return file["bytes"] if file["bytes"] is not None else Path(file["path"]).read_bytes()


# Batches -------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Views, stacked, but for those without an image."""

    images: Any  # (b c H W), uint8 or float32; or a list of (c H W)
    noise: Tensor  # (b n)
    labels: Any  # (b), -1 without; or masks (b H W); or a list of what each image has
    names: list[str]
    bad: list[tuple[str, str]]  # images that could not be decoded, also those that others stand in for, and why

    def to(self, device: torch.device) -> "Batch":
        """Move what the network needs."""
        images, noise, labels = send_to_device((self.images, self.noise, self.labels), device, non_blocking=True)
        return self._replace(images=images, noise=noise, labels=labels)


def collate_list(views: list[View]) -> Batch:
    """Views -> a batch whose images and labels are lists"""
    good = [view for view in views if view.image is not None]
    return Batch(
        [view.image for view in good],
        torch.stack([view.noise for view in good]) if good else torch.empty(0),
        [view.label for view in good],
        [view.name for view in good],
        [view.bad for view in views if view.bad],
    )


def collate(views: list[View]) -> Batch:
    """[(c H W), ...] -> (b c H W)"""
    batch = collate_list(views)
    images = batch.images
    if len({image.dtype for image in images}) > 1:  # arrays of several kinds
        images = [image / 255 if image.dtype == torch.uint8 else image for image in images]
    labels = [torch.as_tensor(label) for label in batch.labels]
    stacked = (default_collate(x) if x else torch.empty(0) for x in (images, labels))  # in memory that workers share
    return batch._replace(images=next(stacked), labels=next(stacked))


class Normalise(nn.Module):
    """(b c H W) uint8, or float32 in 0-1 -> what a network takes, computed where its buffers are."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.values = list(mean), list(std)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """(b c H W) -> (b c H W), float32"""
        if images.dtype == torch.uint8:  # one new tensor only: on a CPU, fetching memory costs more than the sums
            return images.float().div_(255).sub_(self.mean).div_(self.std)
        return (images - self.mean) / self.std


class Rows(Dataset[View]):
    """(epoch, index) -> view, of a source with rows by index; with `filled` the next good one in the place of a bad."""

    def __init__(self, source: Source, viewer: Viewer, filled: bool = False):
        self.source, self.viewer, self.filled = source, viewer, filled

    def __getitem__(self, place: tuple[int, int]) -> View:
        epoch, index = place
        places = ((index + i) % self.source.length for i in range(self.source.length if self.filled else 1))
        return first_good(self.viewer(self.source.rows[i], epoch, i) for i in places)


@dataclass(frozen=True)
class Plan:
    """Which images make which step, whoever computes it: step s of an epoch is rows [s B, (s + 1) B) of its order.

    Args:
        length: images in an epoch, the rest of a last partial batch left out.
        batch_size: images in a step, over all processes and accumulated parts.
        steps, start: the run ends before step `steps`, and begins (or goes on) at `start`.
        rank, world: this process of so many.
        parts: parts that a step is accumulated from.
        repeats: times that an image stands in a step, each with an augmentation of its own; an epoch has as many steps
            as ever, and so fewer images (Hoffer et al., "Augment your batch", CVPR 2020).
    """

    length: int
    batch_size: int
    steps: int
    seed: int = 0
    start: int = 0
    rank: int = 0
    world: int = 1
    parts: int = 1
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % (self.world * self.parts):
            raise UserError(
                f"--batch-size {self.batch_size} cannot be shared by {self.world} processes x {self.parts} "
                f"accumulation steps: choose a multiple of {self.world * self.parts}."
            )
        if self.length < self.batch_size:
            raise UserError(
                f"--batch-size {self.batch_size} is more than the {self.length} images there are: choose a smaller one."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return self.length // self.batch_size

    @property
    def share(self) -> int:
        """Images of one forward pass of one process."""
        return self.batch_size // (self.world * self.parts)


class Order(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for one process: each epoch is its own permutation, drawn from (seed, epoch)."""

    def __init__(self, plan: Plan):
        self.plan = plan

    def __len__(self) -> int:
        return (self.plan.steps - self.plan.start) * self.plan.parts

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        plan, drawn = self.plan, -1
        for step in range(plan.start, plan.steps):
            epoch, k = divmod(step, plan.steps_per_epoch)
            if epoch != drawn:
                order, drawn = np.random.default_rng([plan.seed, epoch]).permutation(plan.length), epoch
            places = np.arange(k * plan.batch_size, (k + 1) * plan.batch_size)
            for part in places.reshape(plan.parts, plan.world, plan.share)[:, plan.rank]:
                # what is drawn for an image follows from the first number
                yield [(epoch * plan.repeats + int(i % plan.repeats), int(order[i // plan.repeats])) for i in part]


class Stream(IterableDataset[Batch]):
    """Batches for one process from rows that come in order.

    Shards are permuted by (seed, epoch). Inside, a row moves back by up to `WINDOW` places, a number drawn from (seed,
    epoch, shard, row), so the order is a pure function as well. Every worker reads all rows and decodes only its own;
    in the place of a bad one stands the next good one of its step.
    """

    def __init__(self, source: Source, viewer: Viewer, plan: Plan):
        self.source, self.viewer, self.plan = source, viewer, plan

    def shuffled(self, epoch: int) -> Iterator[tuple[Index, dict[str, Any]]]:
        """((shard, row), row) of an epoch."""
        rows, shards = self.source.rows, self.source.rows.num_shards
        window: list[tuple[float, int, int, dict[str, Any]]] = []
        place = 0
        for shard in map(int, np.random.default_rng([self.plan.seed, epoch]).permutation(shards)):
            delays = np.random.default_rng([self.plan.seed, epoch, shard])
            # iter(): torch's workers would divide a plain loop over a `datasets` stream among them once more
            for row, content in enumerate(rows.shard(shards, shard).iter(1)):
                heapq.heappush(window, (place + WINDOW * delays.random(), shard, row, content))
                place += 1
                while window and window[0][0] < place:  # the first row may have no delay
                    yield _released(heapq.heappop(window))
        while window:
            yield _released(heapq.heappop(window))

    def __iter__(self) -> Iterator[Any]:
        plan, info = self.plan, get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        made = 0
        for epoch in range(plan.start // plan.steps_per_epoch, -(-plan.steps // plan.steps_per_epoch)):
            rows = self.shuffled(epoch)
            begin = epoch * plan.steps_per_epoch
            for step in range(begin, min(plan.steps, begin + plan.steps_per_epoch)):
                together = list(islice(rows, plan.batch_size))
                if step < plan.start:
                    yield None  # reading up to here may take longer than `WAIT`; all workers say it as often
                    continue
                if len(together) < plan.batch_size:
                    return  # shorter than it said: the run tells
                for part in range(plan.parts):
                    first = (part * plan.world + plan.rank) * plan.share
                    if made % workers == worker:
                        yield collate([self.view(together, i, epoch) for i in range(first, first + plan.share)])
                    made += 1

    def view(self, together: list[tuple[Index, dict[str, Any]]], place: int, epoch: int) -> View:
        """Of a row among those of a step."""
        rows = (together[(place + i) % len(together)] for i in range(len(together)))
        return first_good(self.viewer(row, epoch, index) for index, row in rows)


def _released(item: tuple[float, int, int, dict[str, Any]]) -> tuple[Index, dict[str, Any]]:
    _, shard, row, content = item
    return (shard, row), {name: cell[0] for name, cell in content.items()}


def cpu_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Data workers for one process: one core of its share is left for training."""
    return min(16, max(0, cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def heed_parent_only(_: int) -> None:
    """In a data worker: schedulers signal every process of a job, but the one that trains still needs the others."""
    if hasattr(signal, "sigwaitinfo"):
        Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while signal.sigwaitinfo(STOPS).si_pid != os.getppid():
        pass
    os._exit(0)


class Loader(DataLoader[Any]):
    """torch's, whose workers heed their parent only, and are killed when stuck; `None` is a sign of life."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **(kwargs | {"worker_init_fn": heed_parent_only}))

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
    """Processes that begin inside do not get `STOPS`, nor do the threads that libraries start in them at once."""
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def train_loader(
    source: Source, viewer: Viewer, plan: Plan, workers: int, collate: Callable[[list[View]], Batch] = collate
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


def one_by_one(
    source: Source, viewer: Viewer, places: Iterable[int], workers: int = 0, collate: Any = collate
) -> DataLoader[Any]:
    """Batches of one image, as large as it is; none in a batch whose image is bad."""
    sampler: Any = [(0, i) for i in places]
    return Loader(Rows(source, viewer), 1, sampler=sampler, collate_fn=collate, num_workers=workers)


def spread(length: int, count: int) -> list[int]:
    """Places of so many rows, evenly spread."""
    return [int(i) for i in np.linspace(0, length - 1, min(count, length))]


def look_at(source: Source, viewer: Viewer) -> list[Any]:
    """Views of 50 images of a set, or of all that it has.

    Raises:
        UserError: one of them cannot be used.
    """
    views = [viewer(source.rows[i], 0, i) for i in spread(source.length, 50)]
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
    viewer = Viewer(eval_transform(size, crop_pct), in_chans, 0, 0, (source.image, source.label), part=source.part)
    rank, world = share
    places: Any = [(0, i) for i in spread(source.length, images or source.length)[rank::world]]
    return Loader(Rows(source, viewer), batch_size, sampler=places, collate_fn=collate, num_workers=workers)


def look(source: Source, size: Size, in_chans: int, count: int) -> Batch:
    """A few images, uncropped: evenly spread ones, or the first of a stream."""
    viewer = Viewer(eval_transform(size), in_chans, 0, 0, (source.image, source.label))
    rows = source.rows.take(count) if source.streaming else (source.rows[i] for i in spread(source.length, count))
    return collate([viewer(row, 0, i) for i, row in enumerate(rows)])


def guarded(
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
