"""Train a classifier on a frozen network, by MAE's protocol.

accelerate launch recipes/linear_probe.py
    the preset `linear_probe_small`: what `recipes/mae_hivit.py` left in runs/mae_hivit, on the sample images:
    1 minute on 2 CPU cores (AMD EPYC), 56.6 % after 156 steps, which are few for LARS
accelerate launch recipes/linear_probe.py --config linear_probe_vit_b --data /path/to/imagenet --grad-accum-steps 8
    the published linear probe of MAE's ViT-B; not run

`--probe attentive` pools the tokens with a learned query. `--probe cached` does what `mimkit probe` does: it extracts
the features once, without augmentation, and chooses the weight decay on a fifth of the training images.
`mimkit/evaluation/probes.py` has the probes.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mimkit  # noqa: F401  before torch, whose threads it tells how to wait

# isort: split
import torch
import torch.nn.functional as F
from timm.optim import Lars

from mimkit.config import (
    DataOptions,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    RunOptions,
    ScheduleOptions,
    options_of,
    parse_recipe,
)
from mimkit.conversion.family import check_model
from mimkit.data.loader import default_workers, train_loader
from mimkit.data.sample import SampleLoader
from mimkit.data.sources import class_labels, open_labeled, set_value_range
from mimkit.data.transforms import Normalize, parse_size, train_transform
from mimkit.errors import UserError, cli_entry
from mimkit.evaluation.features import extract_parts
from mimkit.evaluation.probes import FrozenProbe, linear_probe
from mimkit.models.factory import input_of
from mimkit.models.pretrained import read_network
from mimkit.tasks.classification import Classification, write_classes
from mimkit.training.optim import adamw, cosine
from mimkit.training.run import Run
from mimkit.training.validation import Evaluator


@dataclass
class Options(RunOptions, ScheduleOptions, DataOptions):
    """The defaults are MAE's published linear probe (He et al., CVPR 2022, table 10).

    Args:
        model: A run, a folder that timm can read (an encoder/, a converted checkpoint), or a name in timm.
        probe: linear (LARS), attentive (AdamW) or cached.
        blr: Peak learning rate for a batch of 256; --lr is blr x batch_size / 256 if it is not given. Default: .1, or
            .0005 for an attentive probe.
        eval_every: Epochs between evaluations on the validation images. 0: at the end.
    """

    model: str = "vit_base_patch16_224.mae"
    probe: str = "linear"
    blr: PositiveFloat | None = None
    eval_every: NonNegativeFloat = 10.0
    crop_scale: tuple[float, float] = (0.08, 1.0)
    epochs: PositiveFloat = 90.0
    warmup_epochs: NonNegativeFloat = 10.0
    batch_size: PositiveInt = 16384
    weight_decay: NonNegativeFloat = 0.0


@cli_entry
def main(argv: list[str] | None = None, replay: Path | None = None) -> None:
    """Parse the options, train the probe, and write the run's directory, runs/linear_probe by default."""
    options = parse_recipe(Options, __doc__ or "", recipe="linear_probe", argv=argv)
    check_model(options.model)
    if options.probe not in ("linear", "attentive", "cached"):
        raise UserError(f"--probe {options.probe} is unknown. Choose linear, attentive or cached.")
    attentive = options.probe == "attentive"
    options.blr = options.blr or (5e-4 if attentive else 0.1)
    options.lr = options.lr or options.blr * options.batch_size / 256
    options.workers = default_workers() if options.workers is None else options.workers
    chosen = options.parts, options.image_column, options.label_column
    data, test = set_value_range(options.value_range, *open_labeled(options.data, *chosen))
    names = class_labels(data)
    run = Run("linear_probe", **options_of(RunOptions, options), measure_every=options.eval_every, replay=replay)
    run.print(data.about)

    img_size: dict[str, Any] = {"img_size": parse_size(options.img_size)} if options.img_size else {}
    network, start = read_network(options.model, **img_size)
    network.to(run.engine.device)
    spec = input_of(network)
    size, normalize = img_size.get("img_size", spec.size), Normalize(spec.mean, spec.std)
    normalize.to(run.engine.device)
    run.print(f"{start}; {options.probe} probe of {len(names)} classes, {data.length:,} images")
    if options.probe == "cached":
        workers, log = options.workers, run.display.print_once
        parts = extract_parts(network, (data, test), size, normalize, (None, None), workers, options.max_bad, log)
        result = linear_probe(parts[0], parts[1])
        run.print(f"{result.accuracy:.2f} % on {len(parts[1].y)} test images; weight decay {result.weight_decay:g}")
        return

    plan = run.make_plan(data.length, options.batch_size, options.epochs)
    run.write_config(asdict(options), data)
    write_classes(run, names)
    probe = FrozenProbe(network, len(names), attentive)
    transform = train_transform(size, options.crop_scale)
    samples = SampleLoader(transform, spec.in_chans, 0, options.seed, (data.image, data.label), pixels=True)
    loader = train_loader(data, samples, plan, options.workers)
    optimizer: torch.optim.Optimizer
    if attentive:
        optimizer = adamw(probe, options.lr, options.weight_decay, (0.9, 0.95))
    else:  # LARS adapts the learning rate of the weight, even without weight decay, but not that of the bias
        groups: list[dict[str, Any]] = [
            {"params": [probe.head.weight], "always_adapt": True},
            {"params": [probe.head.bias], "weight_decay": 0.0},
        ]
        optimizer = Lars(groups, options.lr, momentum=0.9, weight_decay=options.weight_decay)
    schedule = cosine(optimizer, plan.steps, round(options.warmup_epochs * plan.steps_per_epoch))
    model, stepper = run.prepare(probe, optimizer)
    spec = spec._replace(size=size)
    task = Classification(run, test, spec, normalize, names, options.workers, options.max_bad)
    evaluator = Evaluator(run, task)

    for step, micro_batches in run.steps(loader):
        schedule.step_update(step)
        for batch in micro_batches:
            with run.accelerator.accumulate(model):
                loss = F.cross_entropy(model(normalize(batch.images)), batch.labels)
                run.accelerator.backward(loss)
                stepper.step()
                stepper.zero_grad()
            run.record(loss=loss)
        run.end_step(step)
        if run.due(step, options.eval_every):
            evaluator.measure(step + 1, probe)
        if run.due(step, options.save_every):
            run.save(step)
    run.print(f"wrote {run.folder}/: {', '.join(evaluator.draw(probe))}, metrics.jsonl, config.yaml, checkpoints/")
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
