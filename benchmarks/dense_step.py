"""Measure what a backbone costs at the sizes of dense prediction: a forward and a backward pass of its pyramid.

python benchmarks/dense_step.py --img-size 512
python benchmarks/dense_step.py --img-size 1024 --window 16 --rounds 3
python benchmarks/dense_step.py --img-size 128 --decoder-dim 128 --batch-size 8 --models PLAIN,PYRAMID      with UPerNet

The backbones take turns in one process, and the figures are medians. All rows are compared with the first one.
Saved-tensor hooks count the bytes kept for the backward pass, so these are the same on any machine. The peak memory of
a step, above weights and images, depends on the machine.
"""

import sys
from functools import partial
from statistics import median
from typing import Any

import torch
from mim_race import Machine, kept_megabytes, take_turns

from mimkit.config import NonNegativeInt, PositiveInt, call
from mimkit.data.transforms import parse_size
from mimkit.errors import cli_entry
from mimkit.flops import gmacs_of
from mimkit.models.factory import ANY_SIZE
from mimkit.models.feature_pyramid import Pyramid, takes_windows
from mimkit.models.pretrained import load_network
from mimkit.tasks.segmentation import Segmenter


class PyramidLoss(torch.nn.Module):
    """A loss to differentiate: the mean square of each map of a pyramid, summed over the maps."""

    def __init__(self, pyramid: Pyramid):
        super().__init__()
        self.pyramid = pyramid

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images (b c H W) -> loss ()."""
        return torch.stack([m.float().square().mean() for m in self.pyramid(x)]).sum()


def measure(
    models: str = "vit_base_patch16_224,hpvit_b,hivit_b,svit_b",
    img_size: int | str = 512,
    neck: str = "auto",
    window: NonNegativeInt = 0,
    decoder_dim: int = 0,
    batch_size: PositiveInt = 1,
    rounds: PositiveInt = 5,
    threads: int = 0,
    precision: str = "fp32",
) -> None:
    """Measure time and memory of a step.

    Args:
        models: Names in timm, or folders, separated by commas. NAME@16 sets the patch size.
        img_size: Image size in pixels: 512 or HEIGHTxWIDTH.
        neck: Feature maps for the decoder, as in recipes/segment.py.
        window: Window side in tokens, as in recipes/segment.py. Networks with windows of their own ignore it.
        decoder_dim: Width of a UPerNet with 6 classes on top. 0 for none.
        batch_size: Number of images in a step.
        rounds: Number of timings of each network, after one warm-up round.
        threads: Number of CPU threads. Default: all.
        precision: fp32 or bf16.
    """
    if threads:
        torch.set_num_threads(threads)
    size = parse_size(img_size)
    machine = Machine("cuda" if torch.cuda.is_available() else "cpu", precision)
    networks: dict[str, Any] = {}
    for name in models.split(","):
        path, _, patch = name.partition("@")
        options: dict[str, Any] = {"patch_size": int(patch)} if patch else {}
        backbone, _ = load_network(path, img_size=size, **ANY_SIZE, **options)
        form: dict[str, Any] = {"neck": neck, "window": window if takes_windows(backbone) else 0}
        if decoder_dim:
            net: Any = Segmenter(backbone, 6, width=decoder_dim, **form)
        else:
            net = PyramidLoss(Pyramid(backbone, **form))
        networks[name] = net.to(machine.device).train()
    images = torch.randn(batch_size, 3, *size, device=machine.device)
    steps = {name: partial(machine.step, net, images) for name, net in networks.items()}
    times, _ = take_turns(steps, machine, rounds)
    first = median(times[next(iter(times))])
    decoder = f" under UPerNet {decoder_dim} wide" if decoder_dim else ""
    print(f"\n{size[0]}x{size[1]} px, batch {batch_size}, {precision}{decoder}; {machine.describe()}\n")
    heads = ["backbone", "neck", "window", "GMACs", "seconds an image", "of the first row's"]
    heads += ["kept for backward, MB an image", "at the peak, MB an image"]
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    for name, net in networks.items():
        seconds, kept = median(times[name]), kept_megabytes(net, images, machine) / batch_size
        peak = machine.peak(steps[name]) / batch_size
        pyramid, gmacs = net.pyramid, gmacs_of(net.eval(), images[:1])
        cells = [pyramid.neck, f"{pyramid.window or ''}", f"{gmacs:.1f}", f"{seconds / batch_size:.3f}"]
        cells += [f"{seconds / first:.2f}", f"{kept:,.0f}", f"{peak:,.0f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    cli_entry(call)(measure, "dense_step.py", sys.argv[1:])
