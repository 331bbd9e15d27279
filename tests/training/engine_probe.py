"""A recipe, as accelerate launches it; each process leaves what it found of its engine.

engine_probe.py FOUND RECIPE ARGS...
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


def main(found, recipe, *argv):
    facts = {}

    def held(parameters):
        return sum(getattr(p, "ds_tensor", p).numel() for p in parameters)

    def prepared(run, model, optimizer, **beside):
        total = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        plugin = getattr(run.accelerator.state, "deepspeed_plugin", None)
        if plugin and plugin.zero_stage == 3:  # or tensors as small as these would stay whole all the time
            plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        if spoiled := os.environ.get("SPOILED"):  # the gradient of a step, not its loss
            first = next(p for p in model.parameters() if p.requires_grad)
            first.register_hook(lambda grad: grad + float("inf") if run.step == int(spoiled) else grad)
        out = prepare(run, model, optimizer, **beside)
        own = [p for group in optimizer.param_groups for p in group["params"]]
        own = getattr(out[1].optimizer, "fp32_partitioned_groups_flat", own)  # ZeRO-3 lends them for a step only
        facts.update(
            rank=run.accelerator.process_index,
            engine=run.accelerator.distributed_type.value,
            stage=plugin.zero_stage if plugin else 0,
            weights=held(model.parameters()) / total,
            optimized=held(own) / trained,
        )
        return out

    Run.prepare = prepared
    heartbeat.BEAT = float(os.environ.get("BEAT", heartbeat.BEAT))
    torch.compile = partial(torch.compile, backend="aot_eager")  # inductor would take minutes
    importlib.import_module(f"mimkit.recipes.{recipe}").main(argv)
    facts["compiled"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    Path(f"{found}-{facts['rank']}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
