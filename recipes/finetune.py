"""Fine-tune a network for classification, or train it from scratch.

accelerate launch recipes/finetune.py
    the preset `finetune_small`: what `recipes/mae_hivit.py` left in runs/mae_hivit, on the sample images, and the same
    network from scratch: 1 min 35 s on 2 CPU cores (AMD EPYC), 70.1 % against 51.7 %
accelerate launch recipes/finetune.py --config finetune_vit_b --data /path/to/imagenet
    the published fine-tuning of MAE's ViT-B; not run

`mimkit/models/pretrained.py` loads checkpoints. `mimkit/tasks/classification.py` has the head, mixup and the accuracy.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

import mimkit  # noqa: F401  before torch, whose threads it tells how to wait

# isort: split
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3

from mimkit.config import (
    FineTuneOptions,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    RunOptions,
    options_of,
    parse_given,
)
from mimkit.conversion.convert import read_released
from mimkit.conversion.family import check_model
from mimkit.data.loader import check_samples, default_workers, train_loader
from mimkit.data.sample import SampleLoader
from mimkit.data.sources import class_labels, open_labeled, set_value_range
from mimkit.data.transforms import default_normalization, finetune_transform, parse_size
from mimkit.doctor.gain import knn_gain, pretraining_run, scratch_gain
from mimkit.errors import StoppedError, cli_entry
from mimkit.files import resume_flags
from mimkit.models.factory import has_weights, input_of
from mimkit.models.pretrained import checkpoint_blocks, network_folder, start_from
from mimkit.tasks.classification import Classification, check_classes, fit_head, mixup_function, write_classes
from mimkit.training.optim import cosine, layer_groups, show_groups
from mimkit.training.preemption import stopped
from mimkit.training.run import Run
from mimkit.training.scaling import LARGE
from mimkit.training.validation import Evaluator


@dataclass
class Options(FineTuneOptions):
    """The defaults are MAE's published fine-tuning of ViT-B (He et al., CVPR 2022, table 9).

    Args:
        compare_scratch: Also train from scratch, without layer decay, and print the difference.
        global_pool: How tokens are pooled, avg or token. Default: the model's own.
        head_std: Standard deviation of the initial weights of the head. null: the network's own, which is the default
            on fewer than 200,000 images.
        aa: Augmentation policy, in timm's notation. null disables it.
        aug_repeats: Number of times that an image occurs in a step, with different augmentations.
        reprob: Fraction of images in which a rectangle is erased.
        mixup: Alpha of mixup. 0 disables it.
        cutmix: Alpha of CutMix. 0 disables it.
        smoothing: Label smoothing.
        blr: Peak learning rate for a batch of 256; --lr is blr x batch_size / 256 if it is not given.
        crop_pct: Ratio of the input size to the size that an evaluated image is resized to before the center crop.
            Default: the model's own.
    """

    compare_scratch: bool = False
    global_pool: str | None = None
    head_std: PositiveFloat | None = 2e-5
    aa: str | None = "rand-m9-mstd0.5-inc1"
    aug_repeats: PositiveInt = 1
    reprob: NonNegativeFloat = 0.25
    mixup: NonNegativeFloat = 0.8
    cutmix: NonNegativeFloat = 1.0
    smoothing: NonNegativeFloat = 0.1
    blr: PositiveFloat = 5e-4
    crop_pct: PositiveFloat | None = None
    batch_size: PositiveInt = 1024
    crop_scale: tuple[float, float] = (0.08, 1.0)


def train(options: Options, given: set[str], replay: Path | None = None) -> tuple[Run, float | None]:
    """Train or evaluate once. Return the run and its top-1 accuracy, which is None after a dry run.

    Args:
        given: names of the options that the user set.
    """
    options.lr = options.lr or options.blr * options.batch_size / 256
    options.workers = default_workers() if options.workers is None else options.workers
    chosen = options.parts, options.image_column, options.label_column
    data, test = set_value_range(options.value_range, *open_labeled(options.data, *chosen))
    names = class_labels(data)
    run = Run("finetune", **options_of(RunOptions, options), measure_every=options.eval_every, replay=replay)
    run.print(data.about)

    network, start, (mean, std) = start_from(
        options.model,
        init=options.init,
        from_scratch=options.from_scratch,
        model_args=options.model_args,
        in_chans=options.in_chans,
        drop_path_rate=options.drop_path,
        img_size=parse_size(options.img_size) if options.img_size else None,
        global_pool=options.global_pool,
        read_released=read_released,
    )
    normalize = default_normalization(options.in_chans, options.mean or mean, options.std or std)
    options.mean, options.std = normalize.values
    spec = input_of(network)
    size = parse_size(options.img_size) if options.img_size else spec.size
    spec = spec._replace(in_chans=options.in_chans, size=size, crop_pct=options.crop_pct or spec.crop_pct)
    task = Classification(run, test, spec, normalize, names, options.workers, options.max_bad)
    evaluator = Evaluator(run, task)
    if options.eval_only:
        check_classes(network, names, options.model, options.data)
        return run, evaluator.evaluate_only(network.to(run.engine.device), draw=bool(options.out))

    random = options.from_scratch or not (options.init or has_weights(network_folder(options.model)))
    if "head_std" not in given and data.length < LARGE:
        options.head_std = None  # a head that starts near zero takes hundreds of steps to grow: see docs/finetuning.md
    start += "; " + fit_head(network, names, options.head_std, random)
    if options.grad_checkpointing:
        checkpoint_blocks(network)
    groups = layer_groups(network, options.weight_decay, options.layer_decay, options.pool_scale)
    transform = finetune_transform(size, options.crop_scale, options.aa, options.reprob, normalize)
    samples = SampleLoader(transform, options.in_chans, 0, options.seed, (data.image, data.label), pixels=True)
    if options.dry_run:
        for source in (data, test):
            check_samples(source, replace(samples, fields=(source.image, source.label)))
        run.print(start)
        show_groups(groups, options.lr, run.display.console)
        return run, None
    plan = run.make_plan(data.length, options.batch_size, options.epochs, options.aug_repeats)
    run.write_config(asdict(options), data)
    write_classes(run, names)
    run.print(f"{start}; {data.length:,} images, lr {options.lr:.3g}")
    if (pretraining := _pretraining(options)) and (gain := knn_gain(pretraining)) and not gain[1]:
        run.print(f"WARNING: {pretraining}: {gain[0]}")

    loader = train_loader(data, samples, plan, options.workers)
    mix = mixup_function(len(names), plan.micro_batch_size, options.mixup, options.cutmix, options.smoothing)
    criterion = SoftTargetCrossEntropy()
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas)
    schedule = cosine(optimizer, plan.steps, round(options.warmup_epochs * plan.steps_per_epoch))
    ema = ModelEmaV3(network, options.model_ema_decay, use_warmup=True) if options.model_ema_decay else None
    model, stepper = run.prepare(network, optimizer, options.clip_grad, **({"ema": ema.module} if ema else {}))

    for step, micro_batches in run.steps(loader):
        schedule.step_update(step)
        for batch in micro_batches:
            with run.accelerator.accumulate(model):
                images, targets = mix(batch.images, batch.labels)
                loss = criterion(model(images), targets)
                run.accelerator.backward(loss)
                if options.clip_grad and run.accelerator.sync_gradients:
                    run.accelerator.clip_grad_norm_(model.parameters(), options.clip_grad)
                stepper.step()
                stepper.zero_grad()
            run.record(loss=loss)
        if ema and not run.step_skipped:
            ema.update(network, step)
        run.end_step(step)
        if run.due(step, options.eval_every):
            evaluator(step + 1, network, ema and ema.module)
        if run.due(step, options.save_every):
            run.save(step)
    return run, evaluator.finish(ema.module if ema else network)


def _pretraining(options: Options) -> Path | None:
    """Return the run of pre-training that the weights come from, if there is one."""
    return None if options.from_scratch or options.init else pretraining_run(options.model)


@cli_entry
def main(argv: list[str] | None = None, replay: Path | None = None) -> None:
    """Parse the options, train, and write the run's directory, runs/finetune by default."""
    options, given, _ = parse_given(Options, __doc__ or "", recipe="finetune", argv=argv)
    check_model(options.model)
    run, tuned = train(options, given, replay)
    if options.compare_scratch and tuned is not None and not options.eval_only:
        run.close()
        hint = f"Stopped before training from scratch was complete. Continue with {resume_flags(run.folder)}."
        if run.preemption.signal_name:
            raise stopped(run.preemption.signal_name, hint)
        folder = run.folder
        changes: dict[str, Any] = {"from_scratch": True, "layer_decay": 1.0, "compare_scratch": False}
        scratch_options = replace(options, out=f"{folder}/scratch", **changes)
        scratch_options.resume = "auto" if options.resume else None
        try:
            run, scratch = train(scratch_options, given)
        except (KeyboardInterrupt, StoppedError) as stop:
            raise type(stop)(hint) from stop
        assert scratch is not None  # it was no dry run
        run.print(f"\ntop-1 {tuned:.2f} % fine-tuned, {scratch:.2f} % from scratch: {tuned - scratch:+.2f} points")
        if (gain := scratch_gain(folder)) and not gain[1]:
            run.print(gain[0])
    elif tuned is not None and not options.eval_only and _pretraining(options):
        config, out, shown = (quote(f"{run.folder}{end}") for end in ("/config.yaml", "/scratch", ""))
        run.print(
            "Did the pre-training help? Compare with training from scratch:\n"
            f"    accelerate launch recipes/finetune.py --config {config} --from-scratch --layer-decay 1 "
            f"--out {out}\n    mimkit doctor --run {shown}"
        )
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
