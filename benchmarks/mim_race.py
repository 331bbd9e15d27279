"""Compare a masked pre-training step, forward and backward, of networks that skip masked units and of others.

python benchmarks/mim_race.py                               the table in mim_race.md for a CPU
python benchmarks/mim_race.py --precision bf16
python benchmarks/mim_race.py --scaling                     HiViT-B at other mask ratios and sizes
python benchmarks/mim_race.py --against-swin                SViT-S and timm's swin_tiny, supervised
python benchmarks/mim_race.py --profile "MAE HiViT-B"       profile of a row
python benchmarks/mim_race.py --device cuda --precision bf16 --batch-size 128 [--compile]

The networks take turns on the same images in one process. Every figure is a median over the rounds, and ratios are
taken within a round. A step's arithmetic rate is 6 x forward GMACs x images per second; the rate of a large matrix
product in the same rounds is its ceiling. Needs transformers and hiera-transformer (pip install -e ".[bench]").
"""

import ctypes
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

import mimkit  # noqa: F401  registers the networks with timm
from mimkit.config import call
from mimkit.errors import UserError, cli_entry
from mimkit.flops import gmacs_of, kept_bytes
from mimkit.methods.decoder import Decoder
from mimkit.methods.mae import MAE
from mimkit.methods.simmim import PixelHead, SimMIM
from mimkit.models import UnitViT
from mimkit.models.swin import MaskedSwin
from mimkit.training.precision import keep_freed_memory, multiplies_bf16
from mimkit.units import gather, sample_mask, serialize

# Rows ----------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One network and method to time."""

    name: str
    units: str  # side of a unit and number of units
    ratio: float  # fraction of units to mask
    size: int  # image side in px
    build: Callable[[], nn.Module]  # builds the network, whose forward returns a loss in some form


def mae(encoder: Any, depth: int, ratio: float, decode_ratio: float = 1.0) -> MAE:
    """Build an MAE with the decoder of the papers, 512 wide."""
    return MAE(encoder, Decoder(encoder.out_dim, encoder.unit_size, dim=512, depth=depth), ratio, True, decode_ratio)


@cache  # rows that differ only in their masks share a network, to save memory
def hivit_b(size: int) -> Any:
    """Build HiViT-B in the form of pre-training."""
    return timm.create_model("hivit_b", num_classes=0, unit_form=True, multi_scale=True, img_size=size)


@cache
def svit_b() -> Any:
    """Build SViT-B, which all its rows share."""
    return timm.create_model("svit_b", num_classes=0)


def hivit(size: int = 224, ratio: float = 0.75, decode_ratio: float = 1.0) -> MAE:
    """Build HiViT-B's MAE as published."""
    return mae(hivit_b(size), 6, ratio, decode_ratio)


def vit() -> MAE:
    """Build ViT-B's MAE as published."""
    return mae(UnitViT(timm.create_model("vit_base_patch16_224", num_classes=0, fc_norm=False)), 8, 0.75)


def hiera() -> nn.Module:
    """Build Hiera-B's MAE as published."""
    try:
        import hiera as package
    except ImportError as error:
        raise UserError('Hiera is not installed: pip install -e ".[bench]".') from error
    return package.mae_hiera_base_224(pretrained=False)


def simmim(net: Any) -> SimMIM:
    """Build a SimMIM with the published head."""
    return SimMIM(net, PixelHead(net.out_dim, net.unit_size, net.token_dim))


def swin(size: int, window: int) -> SimMIM:
    """Build Swin-B's SimMIM as published."""
    options = {"img_size": size, "window_size": window, "num_classes": 0, "drop_path_rate": 0.0}
    return simmim(MaskedSwin(timm.create_model("swin_base_patch4_window7_224", **options)))


def vit_theirs() -> nn.Module:
    """Build transformers' ViTMAE-B."""
    return ViTMAEForPreTraining(ViTMAEConfig(norm_pix_loss=True, attn_implementation="sdpa"))


SWIN = "SimMIM Swin-B"
RACE = [
    Row("MAE HiViT-B", "16 px, 196", 0.75, 224, hivit),
    Row("MAE HiViT-B, a quarter decoded", "16 px, 196", 0.75, 224, partial(hivit, decode_ratio=0.25)),
    Row("MAE ViT-B", "16 px, 196", 0.75, 224, vit),
    Row("MAE ViT-B of transformers", "16 px, 196", 0.75, 224, vit_theirs),
    Row("MAE Hiera-B of hiera", "32 px, 49", 0.6, 224, hiera),
    Row("SimMIM Swin-B, 192 px", "32 px, 36", 0.6, 192, partial(swin, 192, 6)),
    Row(SWIN, "32 px, 49", 0.6, 224, partial(swin, 224, 7)),
    Row("SimMIM SViT-B", "32 px, 49", 0.6, 224, lambda: simmim(svit_b())),
    Row("MAE SViT-B", "32 px, 49", 0.6, 224, lambda: mae(svit_b(), 6, 0.6)),
    Row("MAE SViT-B, .75", "32 px, 49", 0.75, 224, lambda: mae(svit_b(), 6, 0.75)),
]


class Encoder(nn.Module):
    """The encoder of an MAE, applied to the visible units of a random mask."""

    def __init__(self, encoder: Any, ratio: float):
        super().__init__()
        self.encoder, self.ratio = encoder, ratio

    def forward(self, images: Tensor) -> Tensor:
        """Images (b c H W) -> latent of the visible units (b v out_dim)."""
        p = self.encoder.unit_size
        grid = images.shape[-2] // p, images.shape[-1] // p
        visible = sample_mask(len(images), grid[0] * grid[1], self.ratio).visible.to(images.device)
        return self.encoder.encode_units(gather(serialize(images, p), visible), visible, grid)


SCALING = [(224, 0.0), (224, 0.25), (224, 0.5), (224, 0.75), (224, 0.9)]
SCALING += [(192, 0.75), (256, 0.75), (320, 0.75), (384, 0.75), (448, 0.75), (512, 0.75)]

# Measuring -----------------------------------------------------------------------------------------------------------


def loss_of(output: Any) -> Tensor:
    """Return the loss of a mimkit or transformers output or of Hiera's tuple, or make one out of a tensor."""
    if isinstance(output, Tensor):
        return output.float().square().mean()
    return output.loss if hasattr(output, "loss") else output[0]


class Machine:
    """The device and precision to measure on."""

    def __init__(self, device: str, precision: str):
        self.device, self.precision = device, precision
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision)
        if dtype is None:
            raise UserError(f"--precision {precision} is unknown: choose fp32 or bf16.")
        torch.backends.cudnn.allow_tf32 = False  # so that fp32 is fp32 in convolutions too
        self.side = 8192 if device == "cuda" else 2048
        self.square = [torch.randn(self.side, self.side, device=device, dtype=dtype) for _ in range(2)]

    def step(self, network: nn.Module, images: Tensor) -> None:
        """Compute a forward and a backward pass."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = loss_of(network(images))
        loss.backward()
        network.zero_grad()

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the seconds of one call, including the work on the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def gflops(self) -> float:
        """Return the rate of a large matrix product in GFLOP/s."""
        repeat = 4

        def products() -> None:
            for _ in range(repeat):
                self.square[0] @ self.square[1]

        return repeat * 2 * self.side**3 / self.seconds(products) / 1e9

    def peak(self, work: Callable[[], object]) -> float:
        """Return the peak memory of one call in MB, above that before it: allocated on a GPU, resident on a CPU."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.seconds(work)
            return (torch.cuda.max_memory_allocated() - before) / 1e6
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before = _status("VmRSS")
        work()
        return (_status("VmHWM") - before) / 1e6

    def describe(self) -> str:
        """Return the machine and the version of torch as one line."""
        cpu = f"{torch.get_num_threads()} threads, faster in bf16: {multiplies_bf16()}"
        return f"{torch.cuda.get_device_name() if self.device == 'cuda' else cpu}; torch {torch.__version__}"


def _status(field: str) -> float:
    """Read a memory field of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * float(line.split()[1])


def kept_megabytes(network: nn.Module, images: Tensor, machine: Machine) -> float:
    """Return the MB kept for the backward pass, without images, parameters and casts of them."""
    with torch.autocast(machine.device, torch.bfloat16, enabled=machine.precision == "bf16"):
        tensors = (*network.parameters(), *network.buffers(), images)
        return kept_bytes(lambda: loss_of(network(images)), tensors) / 1e6


def take_turns(
    steps: dict[str, Callable[[], object]], machine: Machine, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the seconds of each step in each round after a warm-up, and the matrix rate next to each of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for turn in range(rounds):
        for name, step in steps.items():
            rates[name].append(machine.gflops())
            times[name].append(machine.seconds(step))
        print(f"round {turn + 1}/{rounds}", file=sys.stderr, flush=True)
    return times, rates


def overall_median(rates: dict[str, list[float]]) -> float:
    """Return the median of all rates."""
    return median(rate for values in rates.values() for rate in values)


# The three tables ----------------------------------------------------------------------------------------------------


def race(machine: Machine, rows: list[Row], batch: int, rounds: int, compile: bool, out: str) -> None:
    """Time all rows, and write the table and the picture that compare them with Swin-B."""
    images = {size: torch.randn(batch, 3, size, size, device=machine.device) for size in {row.size for row in rows}}
    steps: dict[str, Callable[[], object]] = {}
    gmacs, bytes_kept, peaks = {}, {}, {}
    for row in rows:
        network = row.build().to(machine.device).train()
        gmacs[row.name] = gmacs_of(network, images[row.size][:1])
        bytes_kept[row.name] = kept_megabytes(network, images[row.size], machine) / batch
        if compile:
            network.compile()
        steps[row.name] = partial(machine.step, network, images[row.size])
        steps[row.name]()  # warm up
        peaks[row.name] = machine.peak(steps[row.name]) / batch
        print(f"{row.name}: {bytes_kept[row.name]:.0f} MB kept an image", file=sys.stderr, flush=True)
    times, rates = take_turns(steps, machine, rounds)
    speeds = {name: batch / median(seconds) for name, seconds in times.items()}
    lines = [
        "| network | units | masked | forward GMACs | images/s | against Swin-B | the same / ratio of GMACs "
        "| of the matrix rate | MB kept for backward, an image | MB at the peak, an image |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        name = row.name
        ratio = median(theirs / ours for theirs, ours in zip(times[SWIN], times[name], strict=True))
        work = gmacs[SWIN] / gmacs[name]
        share = median(6 * gmacs[name] * batch / t / rate for t, rate in zip(times[name], rates[name], strict=True))
        lines.append(
            f"| {name} | {row.units} | {row.ratio:.0%} | {gmacs[name]:.2f} | {speeds[name]:.2f} | {ratio:.2f} x | "
            f"{ratio / work:.2f} | {share:.0%} | {bytes_kept[name]:.0f} | {peaks[name]:.0f} |"
        )
    table = "\n".join(lines)
    print(f"{machine.side}-cube matrix product: {overall_median(rates):.0f} GFLOP/s\n\n{table}")
    Path(f"{out}.md").write_text(f"{table}\n")
    draw(speeds, bytes_kept, f"{machine.describe()}, {machine.precision}, batch {batch}", Path(f"{out}.png"))


def draw(speeds: dict[str, float], bytes_kept: dict[str, float], title: str, file: Path) -> None:
    """Draw images/s and the memory kept for the backward pass as bars."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 0.38 * len(speeds) + 1.4), sharey=True)
    names = list(speeds)[::-1]
    colors = ["tab:blue" if name.startswith("MAE") else "tab:orange" for name in names]
    for axis, values, label in (
        (axes[0], speeds, "images/s, forward and backward"),
        (axes[1], bytes_kept, "MB kept for the backward pass, an image"),
    ):
        bars = axis.barh(names, [values[name] for name in names], color=colors)
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        axis.set_xlabel(label)
        axis.margins(x=0.12)
    figure.suptitle(f"blue: masked units are skipped; orange: they are computed. {title}", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=100)


def scaling(machine: Machine, batch: int, rounds: int) -> None:
    """Print how the cost of HiViT-B grows with the number of visible units."""
    steps: dict[str, Callable[[], object]] = {}
    gmacs = {}
    for size, ratio in SCALING:
        images = torch.randn(batch, 3, size, size, device=machine.device)
        whole, name = hivit(size, ratio or 0.75).to(machine.device).train(), f"{size} px, {ratio:g}"
        alone = Encoder(whole.encoder, ratio)
        gmacs[name] = gmacs_of(alone, images[:1])
        steps[name] = partial(machine.step, alone, images)
        if ratio:
            steps[f"{name} MAE"] = partial(machine.step, whole, images)
    times, rates = take_turns(steps, machine, rounds)
    print(f"{machine.side}-cube matrix product: {overall_median(rates):.0f} GFLOP/s\n")
    reference = f"{SCALING[3][0]} px, {SCALING[3][1]:g}"
    heads = ["image", "masked", "visible units", "encoder GMACs", "encoder images/s"]
    heads += ["its time a GMAC, against 224 px, .75", "MAE images/s"]
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    for size, ratio in SCALING:
        name = f"{size} px, {ratio:g}"
        units = int((size // 16) ** 2 * (1 - ratio) + 1e-6)
        pairs = zip(times[name], times[reference], strict=True)
        cost = median(ours / theirs for ours, theirs in pairs) * gmacs[reference] / gmacs[name]
        speed = f"{batch / median(times[f'{name} MAE']):.2f}" if ratio else ""
        cells = f"{units} | {gmacs[name]:.2f} | {batch / median(times[name]):.2f} | {cost:.2f} | {speed}"
        print(f"| {size} px | {ratio:.0%} | {cells} |")


def against_swin(machine: Machine, batch: int, rounds: int, compile: bool) -> None:
    """Compare SViT-S with timm's swin_tiny, in the form that is trained with labels."""
    images = torch.randn(batch, 3, 224, 224, device=machine.device)
    names = {"svit_s": "svit_s", "timm's swin_tiny": "swin_tiny_patch4_window7_224"}
    networks = {t: timm.create_model(n, drop_path_rate=0.0).to(machine.device).train() for t, n in names.items()}
    gmacs = {title: gmacs_of(network, images[:1]) for title, network in networks.items()}
    sizes = {title: kept_megabytes(network, images, machine) / batch for title, network in networks.items()}
    for network in networks.values():
        if compile:
            network.compile()
    steps = {title: partial(machine.step, network, images) for title, network in networks.items()}
    times, rates = take_turns(steps, machine, rounds)
    print(f"{machine.side}-cube matrix product: {overall_median(rates):.0f} GFLOP/s\n")
    print("| network | forward GMACs | images/s | against swin_tiny | of the matrix rate | MB kept, an image |")
    print("|---" * 6 + "|")
    for title in networks:
        ratio = median(b / a for a, b in zip(times[title], times["timm's swin_tiny"], strict=True))
        share = median(6 * gmacs[title] * batch / t / rate for t, rate in zip(times[title], rates[title], strict=True))
        speed = batch / median(times[title])
        print(f"| {title} | {gmacs[title]:.2f} | {speed:.2f} | {ratio:.2f} x | {share:.0%} | {sizes[title]:.0f} |")


def measure(
    batch_size: int = 8,
    rounds: int = 7,
    threads: int = 2,
    device: str = "cpu",
    precision: str = "fp32",
    compile: bool = False,
    keep_memory: bool = True,
    scaling_: bool = False,
    against_swin_: bool = False,
    profile: str | None = None,
    rows: str = "",
    out: str = "mim_race",
) -> None:
    """Time a step of each network in turns.

    Args:
        batch_size: Number of images in a step.
        rounds: Number of timings of each network, after one warm-up round.
        threads: Number of CPU threads.
        device: cpu or cuda.
        precision: fp32 or bf16.
        compile: Compile all networks with torch.compile.
        keep_memory: Let glibc keep the memory that a step frees, as a run on a CPU does.
        scaling_: Measure HiViT-B at other mask ratios and sizes instead.
        against_swin_: Measure SViT-S and swin_tiny instead.
        profile: Name of a row, or svit_s or swin_tiny. Print the most expensive operations of one step instead.
        rows: Measure only Swin-B and the rows with this in their name. All rows need 16 GB at a batch size of 4.
        out: Write the table to OUT.md and the picture to OUT.png.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if keep_memory:
        keep_freed_memory()
    machine = Machine(device, precision)
    print(f"{machine.describe()}; batch {batch_size}, {precision}, compile {compile}, keep_memory {keep_memory}")
    if profile:
        show_profile(machine, profile, batch_size)
    elif scaling_:
        scaling(machine, batch_size, rounds)
    elif against_swin_:
        against_swin(machine, batch_size, rounds, compile)
    else:
        chosen = [row for row in RACE if rows in row.name or row.name == SWIN]
        race(machine, chosen, batch_size, rounds, compile, out)


def show_profile(machine: Machine, name: str, batch: int) -> None:
    """Print the most expensive operations of one step."""
    row = next((row for row in RACE if row.name == name), None)
    networks = {"svit_s": "svit_s", "swin_tiny": "swin_tiny_patch4_window7_224"}
    if row is None and name not in networks:
        choices = [*(row.name for row in RACE), *networks]
        raise UserError(f"--profile {name} is not a row: choose one of {', '.join(choices)}.")
    network = (row.build() if row else timm.create_model(networks[name], drop_path_rate=0.0)).to(machine.device).train()
    images = torch.randn(batch, 3, *[row.size if row else 224] * 2, device=machine.device)
    for _ in range(2):
        machine.step(network, images)
    with torch.profiler.profile() as profiler:
        machine.step(network, images)
    by = "self_device_time_total" if machine.device == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, by))
    total = sum(getattr(event, by) for event in events)
    for event in events[:20]:
        value = getattr(event, by)
        print(f"{event.key[:60]:60s} {value / 1e3:8.1f} ms {value / total:6.1%} {event.count:5d} calls")


if __name__ == "__main__":
    cli_entry(call)(measure, "mim_race.py", sys.argv[1:])
