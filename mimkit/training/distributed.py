"""The engine of a run: one process, data-parallel processes, DeepSpeed's ZeRO, or FSDP2, all through accelerate.

`accelerate launch --config_file recipes/accelerate/{cpu,ddp,fsdp2,zero2,zero3}.yaml` chooses the engine. Under ZeRO-3
and FSDP2, each process holds a shard of every weight, and a module's weights are complete only inside its `forward`.
"""

import copy
import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from mimkit.data.loader import cpu_count
from mimkit.errors import UserError
from mimkit.training.heartbeat import Heartbeat
from mimkit.training.precision import keep_freed_memory, on_cpu
from mimkit.training.threads import set_threads

DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
NAMES = {  # by accelerate's DistributedType
    "NO": "one process",
    "MULTI_CPU": "data-parallel",
    "MULTI_GPU": "data-parallel",
    "FSDP": "FSDP",
    "DEEPSPEED": "DeepSpeed",
}
T = TypeVar("T")


def requested_engine() -> str:
    """Return the accelerate DistributedType that the launcher's environment variables ask for."""
    from accelerate.utils import parse_flag_from_env

    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return "DEEPSPEED"
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return "FSDP"
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several or int(os.environ.get("LOCAL_RANK", -1)) >= 0:  # a single process can be launched as one of several
        return "MULTI_CPU" if on_cpu() else "MULTI_GPU"
    return "NO"


def end_with_launcher() -> None:
    """Kill this process when torch's launcher is killed (Linux only). It would otherwise train on unsupervised."""
    death_signal = 1  # PR_SET_PDEATHSIG in sys/prctl.h
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(death_signal, signal.SIGKILL)


def start_accelerator(precision: str, grad_accum_steps: int, track: str | None) -> Any:
    """Create an Accelerator that runs the requested engine, and refuse any other.

    Raises:
        UserError: if the engine, the precision or the tracker is not available.
    """
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

    if track and track not in map(str, get_available_trackers()):
        raise UserError(f"--track {track} is not installed. Run pip install mimkit[track], or omit the option.")
    engine, cpu = requested_engine(), on_cpu()
    deepspeed = engine == "DEEPSPEED"  # accelerate ignores it if cpu=True
    gloo = cpu and "RANK" in os.environ
    if deepspeed and precision == "fp16":
        raise UserError(
            "--precision fp16 cannot be guarded under DeepSpeed, which skips steps by itself. Use bf16 or fp32."
        )
    try:
        accelerator = Accelerator(
            cpu=cpu and not deepspeed,  # otherwise several CPU processes would be several independent runs
            mixed_precision="no" if precision == "fp32" or deepspeed else precision,  # DeepSpeed has its own autocast
            gradient_accumulation_steps=grad_accum_steps,
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if gloo else [],
            log_with=[track] if track else None,
            project_config=ProjectConfiguration(logging_dir="."),  # replaced once the run has chosen its directory
        )
    except (ImportError, ValueError) as error:
        raise UserError(
            f"accelerate cannot start ({error}). Check --precision {precision} and the launch command."
        ) from error
    running = accelerator.distributed_type.name
    if running != engine:
        raise UserError(
            f"accelerate launch was asked for {NAMES[engine]}, but {NAMES.get(running, running)} is running. "
            f"{'FSDP needs GPUs' if engine == 'FSDP' else 'Check the launch configuration'}; recipes/accelerate/ has "
            "one for each engine."
        )
    return accelerator


class Engine:
    """The processes that compute a run, and how they share it.

    Args:
        precision: fp32, bf16 or fp16.
        grad_accum_steps: number of gradient accumulation steps.
        track: name of an accelerate tracker, or None.
        threads: number of CPU threads of each process; see `set_threads`.
    """

    def __init__(
        self,
        precision: str = "fp32",
        grad_accum_steps: int = 1,
        track: str | None = None,
        threads: int | None = None,
    ):
        end_with_launcher()
        cpu = on_cpu()
        self.precision = precision
        self.accelerator = start_accelerator(precision, grad_accum_steps, track)
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main, self.device = self.accelerator.is_main_process, self.accelerator.device
        if cpu or threads:
            set_threads(threads, cpu_count())
        if cpu:
            keep_freed_memory()
        self.cpu_group: Any = None
        if self.world_size > 1:
            self.cpu_group = torch.distributed.new_group(backend="gloo")
            Heartbeat(self.rank, self.world_size, self.cpu_group)
        self.model: nn.Module | None = None
        self.full_model: nn.Module | None = None  # a complete copy, if the processes share the parameters

    # What is running -------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        kind = self.accelerator.distributed_type.name
        name = f"ZeRO-{self.zero_stage}" if self.is_deepspeed else NAMES[kind]
        return name if kind == "NO" else f"{name}, {self.world_size} processes"

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage, or 0."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return plugin.zero_stage if plugin else 0

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed trains the model."""
        return self.accelerator.distributed_type.name == "DEEPSPEED"

    @property
    def is_fsdp(self) -> bool:
        """Whether FSDP2 shards the model."""
        return self.accelerator.distributed_type.name == "FSDP"

    @property
    def sharded_checkpoint(self) -> bool:
        """Whether only the engine itself can write and read the optimizer's state."""
        return self.is_deepspeed or self.is_fsdp

    @property
    def sharded_params(self) -> bool:
        """Whether each process holds a shard of the parameters."""
        return self.zero_stage == 3 or self.is_fsdp

    # Communication ---------------------------------------------------------------------------------------------------

    def on_main(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function` on the main process. Return its result, or raise its UserError, in every process."""
        from accelerate.utils import broadcast_object_list

        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function(*args)
            except UserError as error:
                outcome[1] = str(error)
        broadcast_object_list(outcome)
        if outcome[1]:
            raise UserError(outcome[1])
        return outcome[0]

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true in any process. The processes agree through their CPUs alone."""
        found = torch.tensor(flag, dtype=torch.int32)
        if self.world_size > 1:
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, self.cpu_group)
        return bool(found)

    def reduce(self, value: Tensor, how: str = "mean") -> Tensor:
        """Return the mean or the sum of a tensor over all processes, on the device."""
        return self.accelerator.reduce(value, how)

    def sum(self, *counts: Tensor) -> list[Tensor]:
        """Return the sum of each tensor over all processes, on the CPU."""
        return [self.accelerator.reduce(x.to(self.device), "sum").cpu() for x in counts]

    def wait(self) -> None:
        """Wait until all processes have come to this line."""
        self.accelerator.wait_for_everyone()

    def seed(self, seed: int, step: int, rank: int | None = None) -> None:
        """Seed all generators by (seed, step, rank); the rank is this process's own by default."""
        key = [seed, step, self.rank if rank is None else rank]
        number = int(np.random.SeedSequence(key).generate_state(1)[0])
        torch.default_generator.manual_seed(number)
        np.random.seed(number)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(number)

    # The model -------------------------------------------------------------------------------------------------------

    def prepare(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        micro_batch_size: int,
        clip_grad: float | None = None,
        compile: bool = False,
    ) -> tuple[Any, Any]:
        """Place the model and the optimizer on the device, and distribute them.

        Calls accelerate's `prepare`, adding the settings that the engine cannot infer (micro-batch size, gradient
        clipping, which modules are blocks).

        Args:
            clip_grad: maximum norm of the gradient, which ZeRO clips by itself. None disables clipping.
            compile: use torch.compile.
        """
        self.model = model
        if self.sharded_params:
            self.full_model = copy.deepcopy(model).requires_grad_(False).to(self.device)
        if compile:
            compile_network(model, block_by_block=self.sharded_params)
        if self.is_fsdp:
            self._configure_fsdp(model)
        if not self.is_deepspeed:
            return self.accelerator.prepare(model, optimizer)
        if not isinstance(optimizer, torch.optim.AdamW | torch.optim.SGD):  # LARS needs the norms of complete tensors
            raise UserError(
                f"{type(optimizer).__name__} needs complete weights, but ZeRO gives it shards. Launch with ddp.yaml."
            )
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = micro_batch_size
        config["gradient_clipping"] = clip_grad or 0.0  # accelerate's default would be 1
        if self.precision in DTYPES:
            config["torch_autocast"] = {"enabled": True, "dtype": DTYPES[self.precision]}
        return (
            self._prepare_zero3(model, optimizer) if self.sharded_params else self.accelerator.prepare(model, optimizer)
        )

    def _configure_fsdp(self, model: nn.Module) -> None:
        plugin = self.accelerator.state.fsdp_plugin
        plugin.transformer_cls_names_to_wrap = sorted(kind.__name__ for kind in block_types(model))
        plugin.set_auto_wrap_policy(model)
        plugin.mixed_precision_policy = None  # it would round the inputs, including the noise that chooses the units
        if self.precision in DTYPES:
            model.forward = torch.autocast(self.device.type, getattr(torch, DTYPES[self.precision]))(model.forward)

    def _prepare_zero3(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """Gather the weights of a block together.

        Parameters outside the blocks are used by methods other than `forward`, such as `encode_units`, so they belong
        to the whole model.
        """
        from deepspeed.runtime.zero import register_external_parameter
        from deepspeed.utils import set_z3_leaf_modules

        blocks = block_types(model)
        set_z3_leaf_modules(model, list(blocks))
        inside = {id(p) for module in model.modules() if type(module) in blocks for p in module.parameters()}
        outside = [p for p in model.parameters() if id(p) not in inside]
        prepared = self.accelerator.prepare(model, optimizer)
        for parameter in outside:
            register_external_parameter(model, parameter)
        return prepared

    def full_state(self, module: Any) -> Any:
        """Return a module with all of its weights: itself, or a complete copy if the processes share the parameters.

        All processes must call this. A module that is no part of the prepared model is returned as it is.
        """
        if self.full_model is None or self.model is None:
            return module
        names = [name for name, part in self.model.named_modules() if part is module]
        if not names:
            return module
        gather_weights(self.model, self.full_model)
        return self.full_model.get_submodule(names[0])

    def gradient_norm(self) -> float | None:
        """Return the norm of the gradients of the step, if the engine is DeepSpeed and the step is complete."""
        wrapped = getattr(self.accelerator, "deepspeed_engine_wrapped", None)
        return wrapped.engine.get_global_grad_norm() if wrapped and self.accelerator.sync_gradients else None

    def save_shards(self, folder: Path) -> None:
        """Write the engine's own files into a folder. All processes must call this."""
        self.accelerator.save_state(str(folder))

    def load_shards(self, folder: Path) -> None:
        """Read what `save_shards` wrote. All processes must call this."""
        self.accelerator.load_state(str(folder))


def block_types(model: nn.Module) -> set[type[nn.Module]]:
    """Return the types of the transformer blocks, whose weights are gathered and freed together."""
    return {type(module) for module in model.modules() if type(module).__name__.endswith("Block")}


def compile_network(model: nn.Module, block_by_block: bool) -> None:
    """Compile a model in place, before it is prepared: as a whole, or block by block if parameters are sharded.

    The engine gathers and frees weights in hooks around each block. Code compiled over these hooks would be compiled
    anew for weights that are present and weights that are not, so only `forward`, between the hooks, is compiled.
    The blocks share its code, which is compiled for each size and drop-path rate among them. Compiling for dynamic
    sizes took minutes for windows.
    """
    if not block_by_block:
        model.compile()
        return
    kinds = block_types(model)
    blocks = [module for module in model.modules() if type(module) in kinds]
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, len(blocks))  # beyond it, blocks would run uncompiled
    for module in blocks:
        module.forward = torch.compile(module.forward, dynamic=False)


@torch.no_grad()
def gather_weights(model: nn.Module, full_model: nn.Module) -> None:
    """Copy the sharded weights of a model into a complete copy of it, in every process."""
    for shard, full in zip(model.parameters(), full_model.parameters(), strict=True):
        if hasattr(shard, "full_tensor"):
            full.copy_(shard.full_tensor())
        else:
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([shard]):
                full.copy_(shard)
    for buffer, copied in zip(model.buffers(), full_model.buffers(), strict=True):
        copied.copy_(buffer)
