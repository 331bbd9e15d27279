"""Compare images/s of our loader, of torchvision's ImageFolder with its transforms on PIL images, and of timm's loader.

python benchmarks/loader.py --data CIFAR10 --out JPEGS --workers 0,1,2
taskset -c 1 python benchmarks/loader.py --data CIFAR10 --out JPEGS --workers 0,1        on one core of several

The folder JPEGS is made if it does not exist: pictures of 500x375 px, quality 90, 4:2:0, in class folders. Each picture
is a mosaic of 4 x 3 images from CIFAR10, enlarged bicubically, under noise with the spectrum of photographs (amplitude
1 / frequency, mostly gray).

All three loaders draw their boxes from one distribution (area uniform in .2-1 of the picture, aspect log-uniform in
3/4-4/3), scale them to 224 px bicubically with antialiasing, flip one in two, and give normalized float32 batches.
torchvision normalizes in its workers; timm's prefetcher and our loader normalize in the training process. The rows of
uint8 leave out the normalizing, which a GPU does.

The loaders take turns in one process, and the figures are medians. A round starts a loader again, skips a few batches,
and times the rest of an epoch. CPU time is that of the process itself, without workers; it is reliable on a busy
machine too.
"""

import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice, product
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset, create_loader
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from mimkit.config import PositiveInt, call
from mimkit.data.decode import decode, decode_pixels
from mimkit.data.loader import cpu_count, train_loader
from mimkit.data.order import Plan, evenly_spaced
from mimkit.data.sample import SampleLoader, read_bytes, seeded
from mimkit.data.sources import open_source
from mimkit.data.transforms import Normalize, train_transform
from mimkit.errors import cli_entry

WIDE, HIGH, TILE, SIZE = 500, 375, 125, 224
SCALE, BICUBIC = (0.2, 1.0), v2.InterpolationMode.BICUBIC
STATISTICS = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
WARM = 4  # batches of a round that are not timed


def natural_noise(rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return noise (HIGH WIDE) of standard deviation 1 whose amplitude falls with the frequency."""
    frequency = np.hypot(np.fft.fftfreq(HIGH, 1 / HIGH)[:, None], np.fft.rfftfreq(WIDE, 1 / WIDE))
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((HIGH, WIDE))) / frequency, (HIGH, WIDE))
    return noise / noise.std()


def make_pictures(data: str, out: Path, count: int) -> None:
    """Write `count` JPEGs into ten class folders."""
    source = open_source(data)
    tiles = [decode(read_bytes(source.rows[i][source.image])) for i in evenly_spaced(source.length, 4000)]
    for i in range(count):
        rng = np.random.default_rng(i)
        mosaic = Image.new("RGB", (WIDE, HIGH))
        for y in range(0, HIGH, TILE):
            for x in range(0, WIDE, TILE):
                tile: Any = tiles[rng.integers(len(tiles))]
                mosaic.paste(tile.resize((TILE, TILE), Image.Resampling.BICUBIC), (x, y))
        noise = 24 * natural_noise(rng)[..., None] + 6 * np.stack([natural_noise(rng) for _ in "rgb"], axis=-1)
        pixels = (np.asarray(mosaic) + noise).clip(0, 255).astype(np.uint8)
        folder = out / f"class{i % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i:05}.jpg", quality=90, subsampling="4:2:0")


def ours(data: str, batch_size: int, workers: int, turn: int, normalize: bool) -> Iterator[Any]:
    """Return the batches of one epoch, as a recipe reads them."""
    source = open_source(data)
    columns = source.image, source.label
    sample_loader = SampleLoader(train_transform((SIZE, SIZE), SCALE), 3, 49, 0, columns, pixels=True)
    epoch = source.length // batch_size
    plan = Plan(source.length, batch_size, (turn + 1) * epoch, start=turn * epoch)
    scale = Normalize(*STATISTICS)
    batches = train_loader(source, sample_loader, plan, workers)
    return ((scale(batch.images) if normalize else batch.images) for batch in batches)


def torchvisions(data: str, batch_size: int, workers: int, turn: int) -> Iterable[Any]:
    """Return torchvision's loader: ImageFolder, PIL's scaling, ToTensor and Normalize."""
    torch.manual_seed(turn)
    crop = transforms.RandomResizedCrop(SIZE, scale=SCALE, interpolation=BICUBIC)
    rest = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(*STATISTICS)]
    files = ImageFolder(data, transforms.Compose([crop, *rest]))
    return DataLoader(files, batch_size, shuffle=True, drop_last=True, num_workers=workers)


def timms(data: str, batch_size: int, workers: int, turn: int, normalize: bool) -> Iterable[Any]:
    """Return timm's loader with its prefetcher, or without normalizing the inner loader, which gives uint8."""
    torch.manual_seed(turn)
    files = create_dataset("", root=data, is_training=True)
    loader: Any = create_loader(
        files,
        (3, SIZE, SIZE),
        batch_size,
        is_training=True,
        scale=SCALE,
        color_jitter=None,
        interpolation="bicubic",
        num_workers=workers,
        device=torch.device("cpu"),
        persistent_workers=False,
    )
    return loader if normalize else loader.loader


PIPELINES: dict[str, Callable[..., Iterable[Any]]] = {
    "ours": partial(ours, normalize=True),
    "torchvision": torchvisions,
    "timm": partial(timms, normalize=True),
    "ours, uint8": partial(ours, normalize=False),
    "timm, uint8": partial(timms, normalize=False),
}


def speed(batches: Iterable[Any], batch_size: int) -> tuple[float, float]:
    """Return images per second, and images per second of this process's CPU time, after the first batches."""
    iterator = iter(batches)
    first = next(islice(iterator, WARM - 1, None))
    shape = (first if torch.is_tensor(first) else first[0]).shape
    assert shape == (batch_size, 3, SIZE, SIZE), shape
    start, start_cpu = time.perf_counter(), time.process_time()
    count = batch_size * sum(1 for _ in iterator)
    return count / (time.perf_counter() - start), count / (time.process_time() - start_cpu)


def stages(files: list[Path]) -> dict[str, float]:
    """Return CPU milliseconds per image of each part of the work, and print how close our crops are to PIL's."""
    crop = v2.RandomResizedCrop(SIZE, scale=SCALE, interpolation=BICUBIC)
    theirs, own = v2.Compose([crop, v2.RandomHorizontalFlip()]), train_transform((SIZE, SIZE), SCALE)
    source = open_source(str(files[0].parent.parent))
    contents = [file.read_bytes() for file in files]
    pictures: list[Any] = [decode(data) for data in contents]
    arrays = [decode_pixels(data) for data in contents]
    floats, normalize = torch.rand(8, 3, SIZE, SIZE), Normalize(*STATISTICS)

    def draw(i: int) -> None:
        with seeded(0, 1, i):
            pass

    def both(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        with seeded(0, 1, i):
            ours = own(arrays[i])
        with seeded(0, 1, i):
            return ours, v2.functional.pil_to_tensor(theirs(pictures[i]))

    scaled, expected = zip(*map(both, range(len(files))), strict=True)
    parts: dict[str, Callable[[int], Any]] = {
        "the file read": lambda i: files[i].read_bytes(),
        "a row of the table": lambda i: source.rows[i],
        "decoding by PIL (torchvision, timm)": lambda i: Image.open(io.BytesIO(contents[i])).convert("RGB"),
        "decoding by torchvision (ours)": lambda i: decode_pixels(contents[i]),
        "the three generators set and set back": draw,
        "box, crop, scaling and flip by torchvision of PIL images (torchvision, timm)": lambda i: theirs(pictures[i]),
        "the same of arrays": lambda i: theirs(arrays[i]),
        "the same by `mimkit.data.transforms.crop_and_flip` (ours)": lambda i: own(arrays[i]),
        "stacking bytes": lambda i: torch.stack(scaled[i : i + 1]),
        "stacking floats (torchvision)": lambda i: torch.stack([floats[i % 8]]),
        "normalizing from bytes (ours, timm)": lambda i: normalize(scaled[i].contiguous()[None]),
    }
    spent: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(5):
        for name, part in parts.items():
            start = time.process_time()
            for i in range(len(files)):
                part(i)
            spent[name].append((time.process_time() - start) / len(files) * 1000)
    difference = torch.stack(scaled).float() - torch.stack(expected).float()
    psnr = 10 * torch.log10(255**2 / difference.square().mean((1, 2, 3)).clamp(min=1e-9))
    share = (difference.abs() > 1).float().mean()
    text = f"Crops against PIL's: PSNR at least {psnr.min():.1f} dB over {len(files)}, median {psnr.median():.1f} dB; "
    text += f"{share:.2%} of the values differ by more than 1 of 255, none by more than {difference.abs().max():.0f}"
    print(f"\n{text}\n")
    return {name: median(times) for name, times in spent.items()}


def measure(
    data: str,
    out: str,
    images: PositiveInt = 1000,
    batch_size: PositiveInt = 32,
    workers: str = "0,1,2",
    rounds: int = 5,
) -> None:
    """Compare the loaders.

    Args:
        data: Small images to make the pictures of: CIFAR-10 as parquet files.
        out: Folder of the pictures. It is made if it does not exist.
        images: Number of pictures to make.
        batch_size: Number of images in a batch.
        workers: Numbers of data workers, separated by commas.
        rounds: Number of rounds. The table shows medians.
    """
    torch.set_num_threads(1)
    if not Path(out).exists():
        make_pictures(data, Path(out), images)
    files = sorted(Path(out).glob("*/*.jpg"))
    size = mean(file.stat().st_size for file in files) / 1000
    counts = [int(count) for count in workers.split(",")]
    print(f"{len(files)} JPEGs of {WIDE}x{HIGH} px, {size:.1f} kB on average; {cpu_count()} cores, batch {batch_size}")
    print(f"load of the machine at the start: {os.getloadavg()[0]:.1f}", flush=True)
    columns = [f"{count} workers" for count in counts] + ["CPU second, 0 workers"] * (0 in counts)
    speeds: dict[str, dict[str, list[float]]] = {name: {column: [] for column in columns} for name in PIPELINES}
    for turn in range(rounds):
        for count, (name, pipeline) in product(counts, PIPELINES.items()):
            by_clock, by_cpu = speed(pipeline(out, batch_size, count, turn), batch_size)
            speeds[name][f"{count} workers"].append(by_clock)
            if not count:
                speeds[name][columns[-1]].append(by_cpu)
        print(f"round {turn + 1} of {rounds}: load {os.getloadavg()[0]:.1f}", flush=True)
    print(f"\n| images a second | {' | '.join(columns)} |\n" + "|---" * (len(columns) + 1) + "|")
    for name, measured in speeds.items():
        print(f"| {name} | {' | '.join(f'{median(measured[column]):,.0f}' for column in columns)} |")
    for us, others in (("ours", ("torchvision", "timm")), ("ours, uint8", ("timm, uint8",))):
        cells = []
        for column in columns:  # in each round, because the load of the machine changes between rounds
            theirs = [max(pair) for pair in zip(*(speeds[other][column] for other in others), strict=True)]
            ratios = [mine / best for mine, best in zip(speeds[us][column], theirs, strict=True)]
            cells.append(f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
        print(f"| {us} / the better other, a round | {' | '.join(cells)} |")
    parts = stages(files[:: max(1, len(files) // 200)])
    print("| part | CPU ms an image |\n|---|---|")
    for name, spent in parts.items():
        print(f"| {name} | {spent:.3f} |")


if __name__ == "__main__":
    cli_entry(call)(measure, "loader.py", sys.argv[1:])
