"""Run a recipe as accelerate launches it, and let each process write what it found out about its engine.

engine_probe.py OUT RECIPE ARGS...

Each process writes OUT-RANK.json. In the environment, SPOILED=STEP makes the gradient of this step infinite, and BEAT
is the time between heartbeats in seconds.
"""

import importlib
import json
import os
import sys
from functools import partial
from pathlib import Path

import torch

from mimkit.training import heartbeat
from mimkit.training.run import Run

prepare = Run.prepare


def spoil_gradient(run, model, step):
    """Make the gradient of a step infinite, but not its loss."""
    first = next(p for p in model.parameters() if p.requires_grad)
    first.register_hook(lambda grad: grad + float("inf") if run.step == step else grad)


def main(out, recipe, *argv):
    facts = {}

    def held(parameters):
        return sum(getattr(p, "ds_tensor", p).numel() for p in parameters)

    def prepared(run, model, optimizer, *args, **extra):
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        plugin = getattr(run.accelerator.state, "deepspeed_plugin", None)
        if plugin and plugin.zero_stage == 3:  # otherwise tensors as small as these would always be complete
            plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        if "SPOILED" in os.environ:
            spoil_gradient(run, model, int(os.environ["SPOILED"]))
        done = prepare(run, model, optimizer, *args, **extra)
        own = [p for group in optimizer.param_groups for p in group["params"]]
        own = getattr(done[1].optimizer, "fp32_partitioned_groups_flat", own)  # ZeRO-3 lends them only during a step
        facts.update(
            rank=run.engine.rank,
            engine=run.accelerator.distributed_type.value,
            stage=run.engine.zero_stage,
            weights=held(model.parameters()) / total,
            optimized=held(own) / trained,
        )
        return done

    Run.prepare = prepared
    heartbeat.BEAT = float(os.environ.get("BEAT", heartbeat.BEAT))
    torch.compile = partial(torch.compile, backend="aot_eager")  # inductor would take minutes
    importlib.import_module(f"mimkit.recipes.{recipe}").main(list(argv))
    facts["compiled"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    Path(f"{out}-{facts['rank']}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
