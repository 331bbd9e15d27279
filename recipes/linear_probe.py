"""Train a classifier on a frozen network, by MAE's protocol.

accelerate launch recipes/linear_probe.py
    on what `recipes/mae_hivit.py` left in runs/mae_hivit, with the sample set, the preset `linear_probe_small`:
    1 minute on 2 CPU cores (AMD EPYC), 56.6 % after 156 steps, which is early for LARS
accelerate launch recipes/linear_probe.py --config linear_probe_vit_b --data /path/to/imagenet --grad-accum-steps 8
    the published linear probe of MAE's ViT-B; not run

`--probe attentive` pools tokens by a learned query. `--probe cached` is `mimkit probe`: features are taken
once, from uncropped images, and the settings of a linear classifier are chosen on a fifth of the training images.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import Lars

from mimkit.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, parse_recipe
from mimkit.data.loader import train_loader
from mimkit.data.order import default_workers
from mimkit.data.sample import SampleLoader
from mimkit.data.sources import open_labeled
from mimkit.data.transforms import parse_size, train_transform
from mimkit.errors import UserError, cli_entry
from mimkit.evaluation.features import extract_parts
from mimkit.evaluation.probes import FrozenProbe, linear_probe
from mimkit.models.factory import input_of
from mimkit.models.pretrained import read_network
from mimkit.tasks.classification import Classification, class_names
from mimkit.training.optim import adamw, cosine
from mimkit.training.run import Run
from mimkit.training.validation import Evaluator


@dataclass
class Options:
    """The defaults are MAE's published linear probe (He et al., CVPR 2022, table 10).

    Args:
        model: a run, a folder that timm can read (an encoder/, a converted checkpoint), or a name known to timm.
        data: 'sample', a folder with class folders, parquet files with labels, or the name of a set on the hub.
        out: directory of the run; runs/linear_probe, or the next free number, by default.
        resume: 'auto' goes on from the last checkpoint, if there is one; or the directory of a run. Trust ZeRO's and
            FSDP's like code: the engine unpickles its files.
        probe: linear (LARS), attentive (AdamW) or cached.
        img_size: input in pixels, 224 or HEIGHTxWIDTH; the model's own by default.
        crop_scale: share of the image's area that a crop has.
        epochs: passes over the data, parts of one too.
        warmup_epochs: of them with a rising learning rate.
        batch_size: images of one step, over all processes and accumulated parts.
        grad_accum_steps: parts that a step is computed in.
        blr: learning rate for a batch of 256; .1, or .0005 of an attentive probe, by default.
        lr: learning rate; blr x batch_size / 256 by default.
        weight_decay: of the probe.
        max_bad: share of images that may be impossible to decode.
        workers: processes that load data; one core is left for training by default.
        seed: of everything that is random.
        precision: auto, fp32, bf16 or fp16.
        save_every: epochs between checkpoints; one is written at the end.
        keep: how many of the last checkpoints stay.
        keep_every: each so-manieth checkpoint stays for good; 0 for none.
        eval_every: epochs between measurements on the test images; 0: at the end.
        track: tensorboard, wandb or trackio.
    """

    model: str = "vit_base_patch16_224.mae"
    data: str = "sample"
    out: str | None = None
    resume: str | None = None
    probe: str = "linear"
    img_size: int | str | None = None
    crop_scale: tuple[float, float] = (0.08, 1.0)
    epochs: PositiveFloat = 90.0
    warmup_epochs: NonNegativeFloat = 10.0
    batch_size: PositiveInt = 16384
    grad_accum_steps: PositiveInt = 1
    blr: PositiveFloat | None = None
    lr: PositiveFloat | None = None
    weight_decay: NonNegativeFloat = 0.0
    max_bad: NonNegativeFloat = 0.01
    workers: NonNegativeInt | None = None
    seed: NonNegativeInt = 0
    precision: str = "auto"
    save_every: NonNegativeFloat = 10.0
    keep: PositiveInt = 2
    keep_every: NonNegativeInt = 0
    eval_every: NonNegativeFloat = 10.0
    track: str | None = None


@cli_entry
def main(argv: list[str] | None = None) -> None:
    """Parse the options, train the probe, leave the run's directory."""
    options = parse_recipe(Options, __doc__ or "", recipe="linear_probe", argv=argv)
    if options.probe not in ("linear", "attentive", "cached"):
        raise UserError(f"--probe {options.probe} is unknown: choose linear, attentive or cached.")
    attentive = options.probe == "attentive"
    options.blr = options.blr or (5e-4 if attentive else 0.1)
    options.lr = options.lr or options.blr * options.batch_size / 256
    options.workers = default_workers() if options.workers is None else options.workers
    data, test = open_labeled(options.data)
    names = class_names(data, test)
    run = Run("linear_probe", options)
    sized: dict[str, Any] = {"img_size": parse_size(options.img_size)} if options.img_size else {}
    network, start = read_network(options.model, **sized)
    network.to(run.accelerator.device)
    in_chans, own_size, normalize, crop_pct = input_of(network)
    size = sized.get("img_size", own_size)
    normalize.to(run.accelerator.device)
    run.print(f"{start}; {options.probe} probe of {len(names)} classes, {data.length:,} images")

    if options.probe == "cached":
        limits: dict[str, Any] = {"workers": options.workers, "max_bad": options.max_bad, "log": run.print_once}
        features = extract_parts(network, (data, test), size, normalize, **limits)
        found = linear_probe(features[0], features[1])
        run.print(f"{found.accuracy:.2f} % of {len(features[1].y)} test images; decay {found.weight_decay:g}")
        return

    plan = run.plan(data.length, options.batch_size, options.epochs)
    run.write_config()
    probe = FrozenProbe(network, len(names), attentive)
    transform = train_transform(size, options.crop_scale)
    viewer = SampleLoader(transform, in_chans, 0, options.seed, (data.image, data.label), pixels=True)
    loader = train_loader(data, viewer, plan, options.workers)
    optimizer: torch.optim.Optimizer
    if attentive:
        optimizer = adamw(probe, options.lr, options.weight_decay, (0.9, 0.95))
    else:  # the bias, of one dimension, is not adapted
        groups: list[dict[str, Any]] = [
            {"params": [probe.head.weight], "always_adapt": True},
            {"params": [probe.head.bias], "weight_decay": 0.0},
        ]
        optimizer = Lars(groups, options.lr, momentum=0.9, weight_decay=options.weight_decay)
    schedule = cosine(optimizer, plan.steps, round(options.warmup_epochs * plan.steps_per_epoch))
    model, stepper = run.prepare(probe, optimizer)
    judge = Evaluator(run, Classification(run, test, (in_chans, *size), normalize, crop_pct, names))

    for step, parts in run.steps(loader):
        schedule.step_update(step)
        for batch in parts:
            with run.accumulate(model):
                loss = F.cross_entropy(model(normalize(batch.images)), batch.labels)
                run.accelerator.backward(loss)
                stepper.step()
                stepper.zero_grad()
            run.record(loss=loss)
        run.end_step(step)
        if run.due(step, options.eval_every):
            judge.measure(step + 1, probe)
        if run.due(step, options.save_every):
            run.save(step)
    run.print(f"wrote {run.folder}/: {', '.join(judge.draw(probe))}, metrics.jsonl, config.yaml, checkpoints/")
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
