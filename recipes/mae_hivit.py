"""Pre-train a HiViT by masked autoencoding.

accelerate launch recipes/mae_hivit.py
    hivit_nano on 10,000 Fashion-MNIST images, the preset `mae_hivit_small`: under 2 minutes on 2 CPU cores (AMD EPYC),
    kNN accuracy from 53 % to 72 %
accelerate launch recipes/mae_hivit.py --model hivit_b --data /path/to/imagenet --grad-accum-steps 8
    the published pre-training of HiViT-B: 1600 epochs, batch 4096; not run

Read `mimkit/mae.py` for the method.
"""

from dataclasses import dataclass, field
from typing import Any

from mimkit.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, parse_recipe
from mimkit.data.loader import train_loader
from mimkit.data.order import default_workers
from mimkit.data.sample import SampleLoader
from mimkit.data.sources import open_source
from mimkit.data.transforms import default_normalization, parse_size, train_transform
from mimkit.doctor.preflight import preflight
from mimkit.doctor.summary import describe_method, summarize
from mimkit.errors import cli_entry
from mimkit.methods.checkpoint import load_initial_weights
from mimkit.methods.decoder import Decoder
from mimkit.methods.mae import MAE
from mimkit.models.factory import create_network, has_weights
from mimkit.training.export import export_pretrained
from mimkit.training.online_knn import OnlineKNN
from mimkit.training.optim import adamw, cosine
from mimkit.training.run import Run


@dataclass
class Options:
    """The defaults are HiViT's published pre-training (facebookresearch/mae's, with the HiViT paper's changes).

    Args:
        model: a HiViT known to timm (see `mimkit models`).
        data: 'sample', a folder of images, parquet or .tar (webdataset) files, or the name of a set on the hub.
        out: directory of the run; runs/mae_hivit, or the next free number, by default.
        resume: 'auto' goes on from the last checkpoint, if there is one; or the directory of a run. Trust ZeRO's and
            FSDP's like code: the engine unpickles its files.
        init: released or earlier weights to start from: a run, or an encoder's file or folder, with its decoder or not.
        dry_run: look closely at data, speed, memory and disk, and stop: what `mimkit doctor` runs.
        img_size: input in pixels: 224 or HEIGHTxWIDTH.
        patch_size: pixels of a patch; a mask unit is four times as wide.
        model_args: other arguments of the model, such as {embed_dim: 160}.
        in_chans: channels of the images.
        mean: mean of each channel, in 0-1, or one for all; ImageNet's by default.
        std: deviation of each channel, or one for all.
        mask_ratio: share of the units that is masked.
        norm_targets: predict units normalized one by one.
        decode_ratio: share of the masked units that is predicted.
        multi_scale: give the decoder the features before each merge as well.
        decoder_dim: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_heads: attention heads of the decoder.
        epochs: passes over the data, parts of one too.
        warmup_epochs: of them with a rising learning rate.
        batch_size: images of one step, over all processes and accumulated parts.
        grad_accum_steps: parts that a step is computed in.
        blr: learning rate for a batch of 256.
        lr: learning rate; blr x batch_size / 256 by default.
        weight_decay: AdamW's.
        betas: AdamW's.
        crop_scale: share of the image's area that a crop has.
        streaming: read the data in order instead of preparing it first.
        max_bad: share of images that may be impossible to decode.
        workers: processes that load data; one core is left for training by default.
        seed: of everything that is random.
        precision: auto, fp32, bf16 or fp16.
        compile: use torch.compile.
        grad_checkpointing: recompute activations to save memory.
        save_every: epochs between checkpoints; one is written at the end.
        max_spike: a step whose loss is so many times the mean before it is passed by, as one that is not finite.
        keep: how many of the last checkpoints stay.
        keep_every: each so-manieth checkpoint stays for good; 0 for none.
        knn_every: epochs between measurements of kNN accuracy; 0: at both ends, where there are labels.
        track: tensorboard, wandb or trackio.
    """

    model: str = "hivit_b"
    data: str = "sample"
    out: str | None = None
    resume: str | None = None
    init: str | None = None
    dry_run: bool = False
    img_size: int | str = 224
    patch_size: PositiveInt = 4
    model_args: dict[str, Any] = field(default_factory=dict)
    in_chans: PositiveInt = 3
    mean: list[float] | None = None
    std: list[float] | None = None
    mask_ratio: float = 0.75
    norm_targets: bool = True
    decode_ratio: float = 1.0
    multi_scale: bool = True
    decoder_dim: PositiveInt = 512
    decoder_depth: PositiveInt = 6
    decoder_heads: PositiveInt = 16
    epochs: PositiveFloat = 1600.0
    warmup_epochs: NonNegativeFloat = 40.0
    batch_size: PositiveInt = 4096
    grad_accum_steps: PositiveInt = 1
    blr: PositiveFloat = 1e-4
    lr: PositiveFloat | None = None
    weight_decay: NonNegativeFloat = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    crop_scale: tuple[float, float] = (0.2, 1.0)
    streaming: bool = False
    max_bad: NonNegativeFloat = 0.01
    workers: NonNegativeInt | None = None
    seed: NonNegativeInt = 0
    precision: str = "auto"
    compile: bool = False
    grad_checkpointing: bool = False
    save_every: NonNegativeFloat = 20.0
    max_spike: PositiveFloat | None = None
    keep: PositiveInt = 2
    keep_every: NonNegativeInt = 0
    knn_every: NonNegativeFloat = 0.0
    track: str | None = None


@cli_entry
def main(argv: list[str] | None = None) -> None:
    """Parse the options, train, leave the run's directory."""
    options = parse_recipe(Options, __doc__ or "", recipe="mae_hivit", argv=argv)
    size = parse_size(options.img_size)
    normalize = default_normalization(options.in_chans, options.mean, options.std)
    options.mean, options.std = normalize.values
    options.lr = options.lr or options.blr * options.batch_size / 256
    options.workers = default_workers() if options.workers is None else options.workers
    source = open_source(options.data, streaming=options.streaming)
    run = Run("mae_hivit", options)
    normalize.to(run.accelerator.device)
    plan = run.plan(source.length, options.batch_size, options.epochs)
    watch = OnlineKNN(run, source, size, normalize, required=options.knn_every > 0)

    encoder = create_network(
        options.model,
        num_classes=0,
        unit_form=True,
        multi_scale=options.multi_scale,
        img_size=size,
        patch_size=options.patch_size,
        in_chans=options.in_chans,
        **options.model_args,
    )
    encoder.set_grad_checkpointing(options.grad_checkpointing)
    width, depth, heads = options.decoder_dim, options.decoder_depth, options.decoder_heads
    decoder = Decoder(encoder.out_dim, encoder.unit_size, options.in_chans, width, depth, heads)
    mae = MAE(encoder, decoder, options.mask_ratio, options.norm_targets, options.decode_ratio)
    if options.init:
        run.print(load_initial_weights(mae, options.init))

    transform = train_transform(size, options.crop_scale)
    units = encoder.grid[0] * encoder.grid[1]
    viewer = SampleLoader(transform, options.in_chans, units, options.seed, (source.image, None), pixels=True)
    loader = train_loader(source, viewer, plan, options.workers)
    optimizer = adamw(mae, options.lr, options.weight_decay, options.betas)
    schedule = cosine(optimizer, plan.steps, round(options.warmup_epochs * plan.steps_per_epoch))
    run.print(describe_method(mae, source.length, options.lr))
    preflight(run, mae, optimizer, source, viewer)
    if options.dry_run:
        return
    run.write_config()
    model, stepper = run.prepare(mae, optimizer)

    if not plan.start:
        watch(0, encoder, "at the start" if options.init or has_weights(options.model) else "at random")
    for step, parts in run.steps(loader):
        schedule.step_update(step)
        for batch in parts:
            with run.accumulate(model):
                loss = model(normalize(batch.images), batch.noise).loss
                run.accelerator.backward(loss)
                stepper.step()
                stepper.zero_grad()
            run.record(loss=loss)
        run.end_step(step)
        if run.due(step, options.knn_every):
            watch(step + 1, encoder, f"after {step + 1} steps")
        if run.due(step, options.save_every):
            export_pretrained(run, mae, size, normalize)  # first, so that a run with its last checkpoint has this too
            run.save(step)
    summarize(run, mae, source, size, normalize)
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
