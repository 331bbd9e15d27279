"""A masked pre-training step, forward and backward: HiViT-B MAE of mimkit beside transformers' ViTMAE-B.

python benchmarks/mim_step.py                              what the table in mim_step.md shows for a CPU
python benchmarks/mim_step.py --device cuda --precision bf16 --batch-size 256 [--compile true]

One process; the networks take turns, and every figure is the median over the rounds, ratios within a round. The rate of
a large matrix product in the same rounds is the ceiling: a step's rate is 6 x forward GMACs x images a second.
"""

import sys
import time
from collections.abc import Callable
from statistics import median

import timm
import torch
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

import mimkit  # noqa: F401  registers the networks with timm
from mimkit.decoder import Decoder
from mimkit.errors import one_sentence
from mimkit.macs import gmacs_of
from mimkit.mae import MAE
from mimkit.options import call
from mimkit.training import keep_freed_memory, multiplies_bf16


def hivit_mae(name: str, size: int, decode_ratio: float = 1.0) -> MAE:
    """The published pre-training network, or one that predicts a part of the masked units."""
    encoder = timm.create_model(name, num_classes=0, unit_form=True, multi_scale=True, img_size=size)
    return MAE(encoder, Decoder(encoder.out_dim, encoder.unit_size, dim=512, depth=6), decode_ratio=decode_ratio)


def measure(
    model: str = "hivit_b",
    img_size: int = 224,
    batch_size: int = 8,
    rounds: int = 7,
    threads: int = 2,
    device: str = "cpu",
    precision: str = "fp32",
    compile: bool = False,
    keep_memory: bool = True,
) -> None:
    """Time a step of each network in turns.

    Args:
        model: the HiViT.
        img_size: input in pixels.
        batch_size: images of a step.
        rounds: timings of each network, after one that does not count.
        threads: of a CPU.
        device: cpu or cuda.
        precision: fp32 or bf16.
        compile: use torch.compile for all of them.
        keep_memory: let glibc keep what a step frees, as `Run` does on a CPU; for all of them.
    """
    cuda = device == "cuda"
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if keep_memory:
        keep_freed_memory()
    config = ViTMAEConfig(image_size=img_size, norm_pix_loss=True, attn_implementation="sdpa")
    networks: dict[str, nn.Module] = {
        f"{model} MAE": hivit_mae(model, img_size),
        f"{model} MAE, decode_ratio .25": hivit_mae(model, img_size, 0.25),
        "transformers ViTMAE-B": ViTMAEForPreTraining(config),
    }
    images = torch.randn(batch_size, 3, img_size, img_size, device=device)
    gmacs = {}
    for name, network in networks.items():
        network.to(device).train()
        gmacs[name] = gmacs_of(network, images[:1])
        if compile:
            network.compile()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    a, b = (torch.randn(2048, 2048, device=device, dtype=dtype) for _ in range(2))

    def step(network: nn.Module) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss: Tensor = network(images).loss
        loss.backward()
        network.zero_grad(set_to_none=False)

    def seconds(work: Callable[[], object], repeat: int = 1) -> float:
        if cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(repeat):
            work()
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - begun) / repeat

    memory: dict[str, str] = {}  # peak, of a GPU, with the weights of all the networks
    repeat = 10 if cuda else 1
    times: dict[str, list[float]] = {name: [] for name in (*networks, "matrix product")}
    for i in range(rounds + 1):
        for name, network in networks.items():
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            times[name].append(seconds(lambda network=network: step(network), repeat))
            if cuda:
                memory[name] = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
            # the ceiling beside every step, so that a slow moment of the machine slows both
            product = seconds(lambda: a @ b, 4 * repeat)
            times["matrix product"].append(product)
        if i == 0:
            times = {name: [] for name in times}
    peak = 2 * 2048**3 / median(times["matrix product"]) / 1e9
    what = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{threads} threads, bf16 instructions: {multiplies_bf16()}"
    )
    print(
        f"{what}; torch {torch.__version__}; batch {batch_size}, {img_size} px, {precision}, "
        f"compile {compile}, keep_memory {keep_memory}"
    )
    print(f"2048-cube matrix product: {peak:.0f} GFLOP/s\n")
    head = "| network | forward GMACs | images/s | GFLOP/s | of the product's rate | against ViTMAE-B |"
    print(head + " memory |" * cuda)
    print("|---" * (6 + cuda) + "|")
    reference = times["transformers ViTMAE-B"]
    for name in networks:
        rate = batch_size / median(times[name])
        work = 6 * gmacs[name] * rate
        ratio = median(theirs / ours for theirs, ours in zip(reference, times[name], strict=True))
        cells = f"{gmacs[name]:.2f} | {rate:.2f} | {work:.0f} | {work / peak:.0%} | {ratio:.2f} x"
        print(f"| {name} | {cells} |" + f" {memory.get(name)} |" * cuda)


if __name__ == "__main__":
    one_sentence(call)(measure, "mim_step.py", sys.argv[1:])
