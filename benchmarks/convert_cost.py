"""Measure what a conversion costs, and what its layouts cost afterwards.

python benchmarks/convert_cost.py

The script writes a ViT-B with random weights as facebookresearch/mae does (343 MB). A process of its own converts it to
hpvit_b, with and without checks. The script prints the seconds after the imports, and the peak memory above that of the
idle imports as a multiple of the file's size. Then it prints the GMACs of each split of the blocks.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch

import mimkit  # noqa: F401  registers the networks with timm
from mimkit.config import PositiveInt, call
from mimkit.errors import UserError, cli_entry
from mimkit.flops import count_gmacs
from mimkit.io.weights import on_meta

CHILD = """
import resource, sys, time
import mimkit.cli
from mimkit.conversion.convert import convert
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
idle, start = peak(), time.time()
convert("vit_b_mae", "hpvit_b", sys.argv[2], sys.argv[1], checks=sys.argv[3] == "checks")
print(time.time() - start, peak() - idle)
"""


def measure(rounds: PositiveInt = 5) -> None:
    """Print the cost of a conversion and the GMACs of each layout.

    Args:
        rounds: Number of conversions of each kind; the table shows the median.
    """
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mae_pretrain_vit_base.pth"
        torch.save({"model": timm.create_model("vit_base_patch16_224", num_classes=0).state_dict()}, file)
        size = file.stat().st_size
        print(f"| file of {size / 1e6:.0f} MB | seconds after imports | peak memory, files |\n|---|---|---|")
        results: dict[str, list[tuple[float, float]]] = {"no checks": [], "checks": []}
        for _ in range(rounds):
            for kind, values in results.items():
                command = [sys.executable, "-c", CHILD, str(file), f"{folder}/out", kind]
                child = subprocess.run(command, capture_output=True, text=True)
                if child.returncode:
                    raise UserError(f"The conversion failed: {child.stderr.strip().splitlines()[-1]}")
                seconds, peak = map(float, child.stdout.split()[-2:])
                values.append((seconds, peak / size))
        for kind, values in results.items():
            seconds, peaks = (sorted(column)[len(column) // 2] for column in zip(*values, strict=True))
            print(f"| {kind} | {seconds:.1f} | {peaks:.2f} |", flush=True)
    plain = count_gmacs(on_meta(timm.create_model, "vit_base_patch16_224"), 1, 3, 224, 224)
    print(f"\n| ViT-B at 224 px | GMACs | times plain |\n|---|---|---|\n| plain | {plain:.2f} | 1 |")
    for depths in ("coarse", "light", "fine", "0-2-8-2", "1-1-8-2", "even", "swin"):
        net = on_meta(timm.create_model, "hpvit_b", depths=depths)
        gmacs = count_gmacs(net, 1, 3, 224, 224)
        print(f"| {depths}: {'-'.join(map(str, net.depths))} | {gmacs:.2f} | {gmacs / plain:.2f} |")
    for window in (0, 16):
        net = on_meta(timm.create_model, "hpvit_b", window=window)
        gmacs = count_gmacs(net, 1, 3, 1024, 1024)
        print(f"| coarse at 1024 px, {f'windows of {window}' if window else 'no windows'} | {gmacs:.0f} | |")


if __name__ == "__main__":
    cli_entry(call)(measure, "convert_cost.py", sys.argv[1:])
