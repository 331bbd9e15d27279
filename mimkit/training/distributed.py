"""What shares a run among processes: accelerate's plain data-parallel, DeepSpeed's ZeRO, or FSDP2.

`accelerate launch --config_file recipes/accelerate/{cpu,ddp,fsdp2,zero2,zero3}.yaml` asks for one. Under ZeRO-3 and
FSDP each process holds a part of every weight, and only inside `forward` of a module are its own weights whole.
"""

import copy
import ctypes
import os
import signal
import sys
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, parse_flag_from_env
from torch import nn

from mimkit.errors import UserError

DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
NAMES = {
    DistributedType.NO: "one process",
    DistributedType.MULTI_CPU: "data-parallel",
    DistributedType.MULTI_GPU: "data-parallel",
    DistributedType.FSDP: "FSDP",
    DistributedType.DEEPSPEED: "DeepSpeed",
}


def on_cpu() -> bool:
    """Whether accelerate will train on the CPU: there is nothing better, or it was told to."""
    told = parse_flag_from_env("ACCELERATE_USE_CPU")
    return told or not (torch.cuda.is_available() or torch.backends.mps.is_available())


def asked_for() -> DistributedType:
    """The engine that the launcher's variables name."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return DistributedType.DEEPSPEED
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return DistributedType.FSDP
    many = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if many or int(os.environ.get("LOCAL_RANK", -1)) >= 0:  # one that is launched as many are
        return DistributedType.MULTI_CPU if on_cpu() else DistributedType.MULTI_GPU
    return DistributedType.NO


def end_with_launcher() -> None:
    """On Linux, where torch's launcher is killed this process is too, or it would train on beside the resumed run."""
    death_signal = 1  # sys/prctl.h
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(death_signal, signal.SIGKILL)


def start(precision: str, grad_accum_steps: int, track: str | None) -> Accelerator:
    """An Accelerator with the engine that was asked for, never with another one in its place."""
    end_with_launcher()
    engine, cpu = asked_for(), on_cpu()
    deepspeed = engine is DistributedType.DEEPSPEED  # which accelerate leaves out where it is told of a CPU
    gloo = cpu and "RANK" in os.environ
    if deepspeed and precision == "fp16":
        raise UserError(
            "--precision fp16 has no guard under DeepSpeed, which drops steps by itself: choose bf16 or fp32."
        )
    try:
        accelerator = Accelerator(
            cpu=cpu and not deepspeed,  # or several processes on CPUs would be so many runs of one
            mixed_precision="no" if precision == "fp32" or deepspeed else precision,  # DeepSpeed has its own autocast
            gradient_accumulation_steps=grad_accum_steps,
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if gloo else [],
            log_with=[track] if track else None,
            project_config=ProjectConfiguration(logging_dir="."),  # tensorboard's is asked for before it is chosen
        )
    except (ImportError, ValueError) as error:
        raise UserError(f"accelerate cannot start ({error}): check --precision {precision} and the launch.") from error
    found = accelerator.distributed_type
    if found is not engine:
        raise UserError(
            f"accelerate launch was asked for {NAMES[engine]}, and {NAMES.get(found, found.value)} is running: "
            f"{'FSDP needs GPUs' if engine is DistributedType.FSDP else 'check the launch configuration'}; recipes/"
            "accelerate/ has one for each engine."
        )
    return accelerator


def describe(accelerator: Accelerator) -> str:
    """The engine in words."""
    name, many = NAMES[accelerator.distributed_type], accelerator.num_processes
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        name = f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    return name if accelerator.distributed_type is DistributedType.NO else f"{name}, {many} processes"


def sharded_checkpoint(accelerator: Accelerator) -> bool:
    """Whether the engine's state is in parts that only itself can write and read."""
    return accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def sharded_params(accelerator: Accelerator) -> bool:
    """Whether a process holds a part of the weights only."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return accelerator.distributed_type is DistributedType.FSDP or bool(plugin and plugin.zero_stage == 3)


def blocks_of(model: nn.Module) -> set[type[nn.Module]]:
    """The kinds of modules whose weights come and go together where processes share them."""
    return {type(module) for module in model.modules() if type(module).__name__.endswith("Block")}


def compile_network(accelerator: Accelerator, model: nn.Module) -> None:
    """torch.compile in place, before `prepare`: whole, or the blocks one by one where processes share weights.

    There the engine gathers and frees weights in hooks around each block, which code that was compiled may not hold:
    it would be compiled anew for weights that are there and weights that are not. `forward` lies between the hooks.
    Blocks share its code, which is compiled for each size and rate of drop-path among them: for any size at once, a
    window's took minutes.
    """
    if sharded_params(accelerator):
        kinds = blocks_of(model)
        blocks = [module for module in model.modules() if type(module) in kinds]
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, len(blocks))  # beyond it they would run as they are
        for module in blocks:
            module.forward = torch.compile(module.forward, dynamic=False)
    else:
        model.compile()


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    share: int,
    precision: str,
    clip_grad: float | None,
) -> tuple[Any, Any]:
    """accelerate's `prepare`, with what the engine cannot know.

    Args:
        share: images of one forward pass of one process.
        clip_grad: largest norm of the gradient, which ZeRO has a hand of its own for; None for any.
    """
    blocks = blocks_of(model)
    if accelerator.distributed_type is DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        plugin.transformer_cls_names_to_wrap = sorted(kind.__name__ for kind in blocks)
        plugin.set_auto_wrap_policy(model)
        plugin.mixed_precision_policy = None  # it would round the inputs, the noise that chooses units among them
        if precision in DTYPES:
            model.forward = torch.autocast(accelerator.device.type, getattr(torch, DTYPES[precision]))(model.forward)
    if accelerator.distributed_type is not DistributedType.DEEPSPEED:
        return accelerator.prepare(model, optimizer)
    if not isinstance(optimizer, torch.optim.AdamW | torch.optim.SGD):  # LARS takes norms of whole tensors
        raise UserError(
            f"{type(optimizer).__name__} needs whole weights, of which ZeRO gives it parts: launch with ddp.yaml."
        )
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = share
    config["gradient_clipping"] = clip_grad or 0.0  # accelerate would say 1
    if precision in DTYPES:
        config["torch_autocast"] = {"enabled": True, "dtype": DTYPES[precision]}
    if accelerator.state.deepspeed_plugin.zero_stage < 3:
        return accelerator.prepare(model, optimizer)
    from deepspeed.runtime.zero import register_external_parameter
    from deepspeed.utils import set_z3_leaf_modules

    # A block's weights come and go together. Those outside blocks are used by methods that are no `forward`, such as
    # `encode_units`, and so are the whole method's.
    set_z3_leaf_modules(model, list(blocks))
    inside = {id(p) for module in model.modules() if type(module) in blocks for p in module.parameters()}
    outside = [p for p in model.parameters() if id(p) not in inside]
    prepared = accelerator.prepare(model, optimizer)
    for parameter in outside:
        register_external_parameter(model, parameter)
    return prepared


@torch.no_grad()
def gather(model: nn.Module, twin: nn.Module) -> None:
    """Weights that processes share -> the same network whole, in each of them."""
    for ours, whole in zip(model.parameters(), twin.parameters(), strict=True):
        if hasattr(ours, "full_tensor"):
            whole.copy_(ours.full_tensor())
        else:
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([ours]):
                whole.copy_(ours)
    for buffer, copied in zip(model.buffers(), twin.buffers(), strict=True):
        copied.copy_(buffer)


def twin_of(model: nn.Module) -> nn.Module:
    """A network to `gather` into, made before its weights are shared."""
    return copy.deepcopy(model).requires_grad_(False)
