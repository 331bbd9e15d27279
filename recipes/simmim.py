"""Pre-train a Swin or an SViT by SimMIM: the whole map is computed, mask tokens included.

accelerate launch recipes/simmim.py
    a small Swin on 10,000 Fashion-MNIST images, the preset `simmim_swin_small`: 2 min 15 s on 2 CPU cores (AMD EPYC),
    kNN accuracy 57.8 % after it and 59.4 % at random
accelerate launch recipes/simmim.py --config simmim_svit_small
    svit_nano on the same images
accelerate launch recipes/simmim.py --config simmim_swin_b_800ep --data /path/to/imagenet --grad-accum-steps 4
    SimMIM's published pre-training of Swin-B, batch 2048 (by default for 100 epochs); not run

The method is in `mimkit/methods/simmim.py`. What it costs beside networks that skip units: `benchmarks/mim_race.md`.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from mimkit.config import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    PretrainOptions,
    RunOptions,
    options_of,
    parse_given,
)
from mimkit.conversion.family import check_model
from mimkit.data.loader import default_workers, train_loader
from mimkit.data.sample import SampleLoader
from mimkit.data.sources import open_images, set_value_range
from mimkit.data.transforms import default_normalization, parse_size, train_transform
from mimkit.doctor.preflight import Job, preflight
from mimkit.doctor.summary import describe_method, summarize
from mimkit.errors import cli_entry
from mimkit.methods.checkpoint import load_initial_weights
from mimkit.methods.simmim import PixelHead, SimMIM
from mimkit.models.factory import has_weights, map_encoder, size_of
from mimkit.training.export import export_pretrained
from mimkit.training.online_knn import OnlineKNN
from mimkit.training.optim import adamw, cosine
from mimkit.training.run import Run
from mimkit.training.scaling import scaled
from mimkit.units import unit_grid


@dataclass
class Options(PretrainOptions):
    """The defaults are SimMIM's published pre-training of Swin-B for 100 epochs (Xie et al., CVPR 2022, appendix A).

    The presets simmim_swin and simmim_svit have the rest. They apply if --model names such a network.
    """

    model: str = "swin_base_patch4_window7_224"
    img_size: int | str = 192
    mask_ratio: float = 0.6
    epochs: PositiveFloat = 100.0
    warmup_epochs: NonNegativeFloat = 10.0
    batch_size: PositiveInt = 2048
    clip_grad: PositiveFloat | None = 5.0
    crop_scale: tuple[float, float] = (0.67, 1.0)


@cli_entry
def main(argv: list[str] | None = None, replay: Path | None = None, name: str = "simmim") -> None:
    """Parse the options, train, and write the run's directory, runs/NAME by default."""
    options, given, published = parse_given(Options, __doc__ or "", "simmim", argv, small="simmim_swin_small")
    check_model(options.model)
    size = parse_size(options.img_size)
    normalize = default_normalization(options.in_chans, options.mean, options.std)
    options.mean, options.std = normalize.values
    options.workers = default_workers() if options.workers is None else options.workers
    columns = options.image_column, options.label_column
    source = open_images(options.data, options.parts, options.streaming, *columns)
    (source,) = set_value_range(options.value_range, source)
    run = Run(name, **options_of(RunOptions, options), measure_every=options.knn_every, replay=replay)
    options.precision = run.engine.precision
    normalize.to(run.engine.device)
    if source.about:
        run.print(source.about)
    knn = OnlineKNN(run, source, size, normalize, options.workers, options.knn_every > 0, columns)

    encoder = map_encoder(
        options.model,
        options.grad_checkpointing,
        img_size=size,
        patch_size=options.patch_size,
        in_chans=options.in_chans,
        **options.model_args,
    )
    multiple = run.engine.world_size * options.grad_accum_steps
    for change in scaled(asdict(options), given, asdict(published), *size_of(encoder), source.length, multiple):
        setattr(options, change.name, change.value)
        run.print(str(change))
    options.lr = options.lr or options.blr * options.batch_size / 256
    plan = run.make_plan(source.length, options.batch_size, options.epochs)
    head = PixelHead(encoder.out_dim, encoder.unit_size, encoder.token_dim, options.in_chans)
    simmim = SimMIM(encoder, head, options.mask_ratio)
    if options.init:
        run.print(load_initial_weights(simmim, options.init))

    transform, units = train_transform(size, options.crop_scale), math.prod(unit_grid(*size, encoder.unit_size))
    samples = SampleLoader(transform, options.in_chans, units, options.seed, (source.image, None), pixels=True)
    loader = train_loader(source, samples, plan, options.workers)
    optimizer = adamw(simmim, options.lr, options.weight_decay, options.betas)
    schedule = cosine(optimizer, plan.steps, round(options.warmup_epochs * plan.steps_per_epoch))
    run.print(describe_method(simmim, source.length, options.lr))
    about = options.mean, options.std, size, options.lr, options.warmup_epochs, options.workers, asdict(options)
    preflight(Job(run, source, samples, *about), simmim, optimizer, options.dry_run)
    if options.dry_run:
        return
    run.write_config(asdict(options), source)
    model, stepper = run.prepare(simmim, optimizer, options.clip_grad)

    if not plan.start:
        knn(0, encoder, "at the start" if options.init or has_weights(options.model) else "at random")
    for step, micro_batches in run.steps(loader):
        schedule.step_update(step)
        for batch in micro_batches:
            with run.accelerator.accumulate(model):
                loss = model(normalize(batch.images), batch.noise).loss
                run.accelerator.backward(loss)
                if options.clip_grad and run.accelerator.sync_gradients:
                    run.accelerator.clip_grad_norm_(model.parameters(), options.clip_grad)
                stepper.step()
                stepper.zero_grad()
            run.record(loss=loss)
        run.end_step(step)
        if run.due(step, options.knn_every):
            knn(step + 1, encoder, f"after {step + 1} steps")
        if run.due(step, options.save_every):
            export_pretrained(run, simmim, size, normalize)  # first, so that a run with its last checkpoint has it
            run.save(step)
    summarize(run, simmim, source, size, normalize)
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
