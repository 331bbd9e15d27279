"""Pre-train a HiViT, a plain ViT or an SViT by masked autoencoding.

accelerate launch recipes/mae.py
    hivit_nano on 10,000 Fashion-MNIST images, the preset `mae_hivit_small`: under 2 minutes on 2 CPU cores (AMD EPYC),
    kNN accuracy from 53 % to 72 %
accelerate launch recipes/mae.py --config mae_vit_small
    a small ViT on the same images: under 2 minutes, kNN accuracy from 53 % to 69 %
accelerate launch recipes/mae.py --config mae_svit_small
    svit_nano on the same images for one epoch: 2 min 29 s, kNN accuracy 71.9 %
accelerate launch recipes/mae.py --model hivit_b --data /path/to/imagenet --parts train --grad-accum-steps 8
    the published pre-training of HiViT-B: 1600 epochs, batch 4096; not run
accelerate launch recipes/mae.py --model vit_base_patch16_224 --data /data/imagenet --parts train --grad-accum-steps 8
    the published pre-training of MAE's ViT-B: 800 epochs, batch 4096; not run

The method is in `mimkit/methods/mae.py`. How an SViT skips units: `Places` in `mimkit/models/svit.py`.
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
from mimkit.methods.decoder import Decoder
from mimkit.methods.mae import MAE
from mimkit.models.factory import has_weights, size_of, unit_encoder
from mimkit.training.export import export_pretrained
from mimkit.training.online_knn import OnlineKNN
from mimkit.training.optim import adamw, cosine
from mimkit.training.run import Run
from mimkit.training.scaling import scaled
from mimkit.units import unit_grid


@dataclass
class Options(PretrainOptions):
    """The defaults are HiViT's published pre-training (facebookresearch/mae's, with the HiViT paper's changes).

    The presets mae_vit and mae_svit have what differs for the other networks. They apply if --model names one.

    Args:
        norm_targets: Predict pixels that are normalized per unit.
        decode_ratio: Fraction of the masked units to predict.
        multi_scale: Give the decoder the features before each merge as well (HiViT only).
        decoder_dim: Width of the decoder.
        decoder_depth: Number of blocks of the decoder.
        decoder_heads: Number of attention heads of the decoder.
    """

    model: str = "hivit_b"
    norm_targets: bool = True
    decode_ratio: float = 1.0
    multi_scale: bool = True
    decoder_dim: PositiveInt = 512
    decoder_depth: PositiveInt = 6
    decoder_heads: PositiveInt = 16
    epochs: PositiveFloat = 1600.0
    warmup_epochs: NonNegativeFloat = 40.0
    batch_size: PositiveInt = 4096
    betas: tuple[float, float] = (0.9, 0.95)


@cli_entry
def main(argv: list[str] | None = None, replay: Path | None = None, name: str = "mae") -> None:
    """Parse the options, train, and write the run's directory, runs/NAME by default."""
    options, given, published = parse_given(Options, __doc__ or "", "mae", argv, small="mae_hivit_small")
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

    encoder = unit_encoder(
        options.model,
        options.multi_scale,
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
    width, depth, heads = options.decoder_dim, options.decoder_depth, options.decoder_heads
    decoder = Decoder(encoder.out_dim, encoder.unit_size, options.in_chans, width, depth, heads)
    mae = MAE(encoder, decoder, options.mask_ratio, options.norm_targets, options.decode_ratio)
    if options.init:
        run.print(load_initial_weights(mae, options.init))

    transform, units = train_transform(size, options.crop_scale), math.prod(unit_grid(*size, encoder.unit_size))
    samples = SampleLoader(transform, options.in_chans, units, options.seed, (source.image, None), pixels=True)
    loader = train_loader(source, samples, plan, options.workers)
    optimizer = adamw(mae, options.lr, options.weight_decay, options.betas)
    schedule = cosine(optimizer, plan.steps, round(options.warmup_epochs * plan.steps_per_epoch))
    run.print(describe_method(mae, source.length, options.lr))
    about = options.mean, options.std, size, options.lr, options.warmup_epochs, options.workers, asdict(options)
    preflight(Job(run, source, samples, *about), mae, optimizer, options.dry_run)
    if options.dry_run:
        return
    run.write_config(asdict(options), source)
    model, stepper = run.prepare(mae, optimizer, options.clip_grad)

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
            export_pretrained(run, mae, size, normalize)  # first, so that a run with its last checkpoint has it
            run.save(step)
    summarize(run, mae, source, size, normalize)
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
