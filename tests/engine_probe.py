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

from mimkit import peers
from mimkit.training import Run

found, recipe, *argv = sys.argv[1:]
prepare = Run.prepare


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
    optimised = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    facts = {
        "engine": run.accelerator.distributed_type.value,
        "stage": plugin.zero_stage if plugin else 0,
        "weights": sum(getattr(p, "ds_tensor", p).numel() for p in model.parameters()) / total,
        "optimised": optimised / trained,
    }
    Path(f"{found}-{run.accelerator.process_index}.json").write_text(json.dumps(facts))
    return out


Run.prepare = prepared
peers.BEAT = float(os.environ.get("BEAT", peers.BEAT))
torch.compile = partial(torch.compile, backend="aot_eager")  # inductor would take minutes
importlib.import_module(f"mimkit.recipes.{recipe}").main(argv)
