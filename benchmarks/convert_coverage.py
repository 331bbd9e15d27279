"""Which of timm's plain ViTs become an HPViT that is exactly the plain ViT: all of them, in float64.

python benchmarks/convert_coverage.py [--names vit_base_patch16_224,...]

Random weights with every tensor at order 1 (timm starts LayerScale at 1e-5 and tables at 0, which would hide what drops
them), depth cut to 3 blocks, split 1-1-1-0, in timm's layout, through the same functions as `mimkit convert`. For each
architecture: the relative difference of stage 3 and of the final output, in float64, then the same with the pools' taps
moved by one, and with q and k swapped or LayerScale dropped in what was converted; these must be large. Inputs are the
source's grid x 16, cut to 128 px but for BEiT, which has one size in timm.
"""

import copy
import sys
from collections import Counter
from typing import Any

import torch

from mimkit.checkpoint import assemble
from mimkit.checks import difference, tokens_after
from mimkit.conversion import Plain, Remap, as_pyramid, families, fit, plain_vits
from mimkit.errors import UserError, one_sentence
from mimkit.models.hpvit import PATCH, plain_vit
from mimkit.options import PositiveInt, call

DEPTH = {"depth": 3}
CUT = 128  # px


@torch.no_grad()
def fill(net: torch.nn.Module) -> None:
    """Every tensor at order 1."""
    for parameter in net.parameters():
        if parameter.ndim < 2:
            parameter.normal_(0.5, 0.5)
        elif parameter.ndim == 3 or parameter.shape[-1] < 33:  # tokens, tables
            parameter.normal_(0, 0.5)
        else:
            parameter.normal_(0, parameter[0].numel() ** -0.5)


def read(name: str, seed: int) -> Plain:
    """A random network of this name, as its file would be read."""
    torch.manual_seed(seed)
    given: dict[str, Any] = dict(DEPTH)
    if name.startswith("samvit"):
        given["global_attn_indexes"] = [1]
    net = plain_vit(name, **given)
    fill(net)
    state = {key: value.double() for key, value in net.state_dict().items()}
    remap = Remap(state, set(state))
    families()["timm"].remap(remap)
    given["num_classes"] = net.num_classes
    return Plain(name, fit(name, remap.found, given, "a random state"), remap.found, remap.rows)


def gap(pyramid: Any, source: Any, x: torch.Tensor) -> float:
    """Relative difference, of stage 3 and of the final output."""
    tokens, final = tokens_after(source, x, len(source.blocks))
    return max(difference(pyramid.stages(x, 2)[-1][0], tokens), difference(pyramid.forward_features(x), final))


@torch.no_grad()
def row(name: str) -> tuple[str, bool]:
    """A line of the table, and whether it is as it should be."""
    try:
        plain = read(name, 0)
        target = as_pyramid(plain, "hpvit", {"depths": "1-1-1-0"})
    except UserError as error:
        return f"| {name} | refused: {error} | | | |", False
    pyramid = assemble(target.net, target.state).double().eval()
    source = copy.deepcopy(plain.build(PATCH, any_grid=True)).double()  # they share their tensors otherwise
    in_chans, side, _ = pyramid.pretrained_cfg["input_size"]
    side = side if pyramid.beit else min(side, CUT)  # timm's Beit takes its own size only
    x = torch.randn(1, in_chans, side, side, dtype=torch.float64)
    right = gap(pyramid, source, x)
    state = {key: value.clone() for key, value in pyramid.state_dict().items()}

    def mutant(change: dict[str, torch.Tensor]) -> float:
        pyramid.load_state_dict(state | change)
        found = gap(pyramid, source, x)
        pyramid.load_state_dict(state)
        return found

    tap = mutant({"pools.0.weight": state["pools.0.weight"].flip(-1)})
    swapped, scaled = {}, {}
    for key, value in state.items():
        if key.endswith("attn.qkv.weight"):
            q, k, v = value.chunk(3)
            swapped[key] = torch.cat([k, q, v])
        elif key.endswith("attn.q_proj.weight"):
            swapped |= {key: state[key.replace("q_proj", "k_proj")], key.replace("q_proj", "k_proj"): value}
        elif key.endswith((".gamma", "gamma_1", "gamma_2")):
            scaled[key] = torch.ones_like(value)
    mutants = [mutant(change) if change else None for change in (swapped, scaled)]
    good = right <= 1e-9 and min(m for m in (tap, *mutants) if m is not None) > 1e-6
    cells = [f"{m:.0e}" if m is not None else "none" for m in mutants]
    return f"| {name} | {side} | {right:.1e} | {tap:.0e} | {cells[0]} | {cells[1]} |", good


def measure(names: str | None = None, threads: PositiveInt | None = None) -> None:
    """Print the table.

    Args:
        names: architectures, with commas; all by default.
        threads: of the processor.
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
    print(f"\n{count[True]} of {count[True] + count[False]} as they should be")
    if count[False]:
        sys.exit(1)


if __name__ == "__main__":
    one_sentence(call)(measure, "convert_coverage.py", sys.argv[1:])
