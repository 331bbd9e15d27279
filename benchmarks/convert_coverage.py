"""Check which of timm's plain ViTs become an HPViT that is exactly the plain ViT, in float64: all of them do.

python benchmarks/convert_coverage.py [--names vit_base_patch16_224,...]

Each network has 3 blocks, split 1-1-1-0, and random weights with every tensor at order 1. (timm initializes LayerScale
to 1e-5 and tables to 0, which would hide a conversion that drops them.) It is converted from timm's layout by the same
functions as `mimkit convert`.

For each architecture the table shows the relative difference of stage 3 and of the final output, whichever is larger.
Then it shows the same difference for three mutants, which must be large: the pools' taps moved by one, q and k swapped,
and LayerScale dropped. Inputs are the source's grid x 16, cut to 64 px, or to 256 px for SAM, whose windows have 14
tokens. timm's BEiT is built for 64 px.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimkit.config import PositiveInt, call
from mimkit.conversion.convert import as_pyramid
from mimkit.conversion.family import Remap, families, plain_vits
from mimkit.conversion.source import Plain, fit_source_args
from mimkit.conversion.verify import difference, tokens_after
from mimkit.errors import UserError, cli_entry
from mimkit.io.weights import assemble, on_meta
from mimkit.models.hpvit import PATCH, plain_vit


def order_one(name: str, shape: torch.Size) -> Tensor:
    """Return a random tensor whose values have order 1 where the network uses them."""
    if len(shape) < 2:
        return torch.randn(shape, dtype=torch.float64) / 2 + 0.5
    table = len(shape) == 3 or any(word in name for word in ("token", "pos_embed", "rel_pos", "freqs"))
    scale = 0.5 if table or "relative" in name else shape[1:].numel() ** -0.5
    return torch.randn(shape, dtype=torch.float64) * scale


def read(name: str) -> Plain:
    """Return a random network of this name, as if it had been read from a file."""
    arguments: dict[str, Any] = {"depth": 3}
    if name.startswith("samvit"):
        arguments["global_attn_indexes"] = [1]
    if name.startswith("beit"):
        arguments["img_size"] = 64
    if name.endswith("sapiens2"):  # grouped keys and values; their number differs between blocks
        heads = [block.attn.num_kv_heads for block in on_meta(plain_vit, name).blocks]
        arguments["num_kv_heads"] = (heads[0], min(heads), heads[-1])
    own = on_meta(plain_vit, name, **arguments).state_dict()
    remap = Remap({key: order_one(key, value.shape) for key, value in own.items()}, set(own))
    families()["timm"].remap(remap)
    return Plain(name, fit_source_args(name, remap.found, arguments, Path("random")), remap.found, remap.rows)


def gap(pyramid: Any, source: Any, x: Tensor) -> float:
    """Return the relative difference of stage 3 or of the final output, whichever is larger."""
    theirs, final = tokens_after(source, x, len(source.blocks))
    tokens, grid = pyramid.stages(x, 2)[-1]
    return max(difference(tokens, theirs), difference(pyramid.leave(tokens, grid), final))


@torch.no_grad()
def row(name: str) -> tuple[str, bool]:
    """Return a row of the table, and whether the conversion is exact and every mutant differs."""
    try:
        plain = read(name)
        target = as_pyramid(plain, "hpvit", {"depths": "1-1-1-0"})
    except UserError as error:
        return f"| {name} | refused: {error} | | | | |", False
    pyramid = assemble(target.net, target.state).double().eval()
    source = plain.build(PATCH, any_grid=True).double()
    in_chans, side, _ = pyramid.pretrained_cfg["input_size"]
    side = min(side, 256 if pyramid.sam else 64)
    x = torch.randn(1, in_chans, side, side, dtype=torch.float64)
    right = gap(pyramid, source, x)
    state = pyramid.state_dict()

    def mutant(change: dict[str, Tensor]) -> float:
        pyramid.load_state_dict(state | change, assign=True)
        return gap(pyramid, source, x)

    tap = mutant({"pools.0.weight": state["pools.0.weight"].flip(-1)})
    swapped, scaled = {}, {}
    for key, value in state.items():
        if key.endswith("attn.qkv.weight"):
            q, k, v = value.chunk(3)
            swapped[key] = torch.cat([k, q, v])
        elif key.endswith("attn.q_proj.weight"):
            other = key.replace("q_proj", "k_proj")
            if state[other].shape == value.shape:  # grouped keys are fewer than queries
                swapped |= {key: state[other], other: value}
        elif key.endswith((".gamma", "gamma_1", "gamma_2")):
            scaled[key] = torch.ones_like(value)
    mutants = [mutant(change) if change else None for change in (swapped, scaled)]
    good = right <= 1e-9 and min(m for m in (tap, *mutants) if m is not None) > 1e-4
    cells = [f"{m:.0e}" if m is not None else "none" for m in mutants]
    return f"| {name} | {side} | {right:.1e} | {tap:.0e} | {cells[0]} | {cells[1]} |", good


def measure(names: str | None = None, threads: PositiveInt | None = None) -> None:
    """Print one row for each architecture.

    Args:
        names: Architectures, separated by commas. Default: all plain ViTs of timm.
        threads: Number of CPU threads.
    """
    if threads:
        torch.set_num_threads(threads)
    print("| architecture | px | difference (float64) | tap moved | q and k swapped | LayerScale dropped |")
    print("|---|---|---|---|---|---|", flush=True)
    count: Counter[bool] = Counter()
    for name in names.split(",") if names else plain_vits():
        text, good = row(name)
        count[good] += 1
        print(text, flush=True)
    print(f"\n{count[True]} of {count[True] + count[False]} passed")
    if count[False]:
        sys.exit(1)


if __name__ == "__main__":
    cli_entry(call)(measure, "convert_coverage.py", sys.argv[1:])
