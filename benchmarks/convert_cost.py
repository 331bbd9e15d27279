"""What a conversion costs, and what its layouts cost afterwards.

python benchmarks/convert_cost.py

Writes a ViT-B with random weights as facebookresearch/mae does (343 MB), converts it to hpvit_b in a process of its
own, with and without checks, and prints seconds after the imports and the peak of memory above an idle `import mimkit`,
as a multiple of the file. Then the GMACs of each split of the blocks.
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
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
idle, begun = peak(), time.time()
mimkit.cli.conversion.convert("vit_b_mae", "hpvit_b", sys.argv[2], sys.argv[1], checks=sys.argv[3] == "checks")
print(time.time() - begun, peak() - idle)
"""


def measure(rounds: PositiveInt = 5) -> None:
    """Print both tables.

    Args:
        rounds: conversions of each kind; the median is given.
    """
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "mae_pretrain_vit_base.pth"
        torch.save({"model": timm.create_model("vit_base_patch16_224", num_classes=0).state_dict()}, file)
        size = file.stat().st_size
        print(f"| file of {size / 1e6:.0f} MB | seconds after imports | peak memory, files |\n|---|---|---|")
        found: dict[str, list[tuple[float, float]]] = {"no checks": [], "checks": []}
        for _ in range(rounds):
            for kind, values in found.items():
                command = [sys.executable, "-c", CHILD, str(file), f"{folder}/out", kind]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise UserError(f"the conversion failed: {done.stderr.strip().splitlines()[-1]}")
                seconds, peak = map(float, done.stdout.split()[-2:])
                values.append((seconds, peak / size))
        for kind, values in found.items():
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
