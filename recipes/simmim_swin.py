"""Pre-train a Swin by SimMIM: the whole map is computed, mask tokens and all.

accelerate launch recipes/simmim_swin.py
    a small Swin on 10,000 Fashion-MNIST images, the preset `simmim_swin_small`: 2 min 15 s on
    2 CPU cores (AMD EPYC), kNN accuracy 57.8 % after it and 59.4 % at random
accelerate launch recipes/simmim_swin.py --config simmim_swin_b_800ep --data /path/to/imagenet --grad-accum-steps 4
    SimMIM's published pre-training of Swin-B, batch 2048 (by default for 100 epochs); not run

Read `mimkit/simmim.py` for the method, and `benchmarks/mim_race.md` for what it costs beside networks that skip units.
"""

import math
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
from mimkit.methods.simmim import PixelHead, SimMIM
from mimkit.models.factory import create_network, has_weights
from mimkit.models.swin import MaskedSwin
from mimkit.training.export import export_pretrained
from mimkit.training.online_knn import OnlineKNN
from mimkit.training.optim import adamw, cosine
from mimkit.training.run import Run
from mimkit.units import unit_grid


@dataclass
class Options:
    """The defaults are SimMIM's published pre-training of Swin-B for 100 epochs (Xie et al., CVPR 2022, appendix A).

    Args:
        model: a Swin known to timm.
        data: 'sample', a folder of images, parquet or .tar (webdataset) files, or the name of a set on the hub.
        out: directory of the run; runs/simmim_swin, or the next free number, by default.
        resume: 'auto' goes on from the last checkpoint, if there is one; or the directory of a run. Trust ZeRO's and
            FSDP's like code: the engine unpickles its files.
        init: released or earlier weights to start from: a run, or an encoder's file or folder, with its head or not.
        dry_run: look closely at data, speed, memory and disk, and stop: what `mimkit doctor` runs.
        img_size: input in pixels: 192 or HEIGHTxWIDTH.
        patch_size: pixels of a patch; a mask unit is eight times as wide.
        model_args: other arguments of the model, such as {window_size: 6}; windows are cut to the map by timm.
        in_chans: channels of the images.
        mean: mean of each channel, in 0-1, or one for all; ImageNet's by default.
        std: deviation of each channel, or one for all.
        mask_ratio: share of the units that is masked.
        epochs: passes over the data, parts of one too.
        warmup_epochs: of them with a rising learning rate.
        batch_size: images of one step, over all processes and accumulated parts.
        grad_accum_steps: parts that a step is computed in.
        blr: learning rate for a batch of 256.
        lr: learning rate; blr x batch_size / 256 by default.
        weight_decay: AdamW's.
        betas: AdamW's.
        clip_grad: largest norm of the gradient; null for any.
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

    model: str = "swin_base_patch4_window7_224"
    data: str = "sample"
    out: str | None = None
    resume: str | None = None
    init: str | None = None
    dry_run: bool = False
    img_size: int | str = 192
    patch_size: PositiveInt = 4
    model_args: dict[str, Any] = field(default_factory=lambda: {"window_size": 6})
    in_chans: PositiveInt = 3
    mean: list[float] | None = None
    std: list[float] | None = None
    mask_ratio: float = 0.6
    epochs: PositiveFloat = 100.0
    warmup_epochs: NonNegativeFloat = 10.0
    batch_size: PositiveInt = 2048
    grad_accum_steps: PositiveInt = 1
    blr: PositiveFloat = 1e-4
    lr: PositiveFloat | None = None
    weight_decay: NonNegativeFloat = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad: PositiveFloat | None = 5.0
    crop_scale: tuple[float, float] = (0.67, 1.0)
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
    options = parse_recipe(Options, __doc__ or "", recipe="simmim_swin", argv=argv)
    size = parse_size(options.img_size)
    normalize = default_normalization(options.in_chans, options.mean, options.std)
    options.mean, options.std = normalize.values
    options.lr = options.lr or options.blr * options.batch_size / 256
    options.workers = default_workers() if options.workers is None else options.workers
    source = open_source(options.data, streaming=options.streaming)
    run = Run("simmim_swin", options)
    normalize.to(run.accelerator.device)
    plan = run.plan(source.length, options.batch_size, options.epochs)
    watch = OnlineKNN(run, source, size, normalize, required=options.knn_every > 0)

    swin = create_network(
        options.model,
        num_classes=0,
        img_size=size,
        patch_size=options.patch_size,
        in_chans=options.in_chans,
        drop_path_rate=0.0,  # timm's own is .1
        **options.model_args,
    )
    swin.set_grad_checkpointing(options.grad_checkpointing)
    encoder = MaskedSwin(swin)
    units = math.prod(unit_grid(*size, encoder.unit_size))
    head = PixelHead(encoder.out_dim, encoder.unit_size, encoder.token_dim, options.in_chans)
    simmim = SimMIM(encoder, head, options.mask_ratio)
    if options.init:
        run.print(load_initial_weights(simmim, options.init))

    transform = train_transform(size, options.crop_scale)
    viewer = SampleLoader(transform, options.in_chans, units, options.seed, (source.image, None), pixels=True)
    loader = train_loader(source, viewer, plan, options.workers)
    optimizer = adamw(simmim, options.lr, options.weight_decay, options.betas)
    schedule = cosine(optimizer, plan.steps, round(options.warmup_epochs * plan.steps_per_epoch))
    run.print(describe_method(simmim, source.length, options.lr))
    preflight(run, simmim, optimizer, source, viewer)
    if options.dry_run:
        return
    run.write_config()
    model, stepper = run.prepare(simmim, optimizer)

    if not plan.start:
        watch(0, encoder, "at the start" if options.init or has_weights(options.model) else "at random")
    for step, parts in run.steps(loader):
        schedule.step_update(step)
        for batch in parts:
            with run.accumulate(model):
                loss = model(normalize(batch.images), batch.noise).loss
                run.accelerator.backward(loss)
                if options.clip_grad and run.accelerator.sync_gradients:
                    run.accelerator.clip_grad_norm_(model.parameters(), options.clip_grad)
                stepper.step()
                stepper.zero_grad()
            run.record(loss=loss)
        run.end_step(step)
        if run.due(step, options.knn_every):
            watch(step + 1, encoder, f"after {step + 1} steps")
        if run.due(step, options.save_every):
            export_pretrained(
                run, simmim, size, normalize
            )  # first, so that a run with its last checkpoint has this too
            run.save(step)
    summarize(run, simmim, source, size, normalize)
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
