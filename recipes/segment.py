"""Semantic segmentation: a checkpoint as a pyramid under UPerNet or an FPN.

accelerate launch recipes/segment.py --config segment_vit_b_ade20k --data /path/to/ADEChallengeData2016
    the rates and the schedule of MAE's; not run

What `--data` may be: docs/data.md. What maps a backbone gives: `mimkit/pyramid.py`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3

from mimkit.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, parse_recipe
from mimkit.data.loader import train_loader
from mimkit.data.order import default_workers
from mimkit.data.sample import SampleLoader
from mimkit.data.segmentation import open_masked, train_pairs
from mimkit.data.transforms import parse_size
from mimkit.errors import UserError, cli_entry
from mimkit.models.factory import ANY_SIZE
from mimkit.models.pretrained import checkpoint_blocks, start_from
from mimkit.tasks.dense_checkpoint import find_dense, go_on_from
from mimkit.tasks.segmentation import Segmentation, Segmenter, loss_of
from mimkit.training.optim import cosine, groups_with_head, poly, show_groups
from mimkit.training.run import Run
from mimkit.training.validation import Evaluator


@dataclass
class Options:
    """The defaults are rates and schedule of MAE's UPerNet on ADE20K; docs/segmentation.md says what else differs.

    Args:
        model: a run, a folder that timm can read (an encoder/, a converted checkpoint), or a name known to timm; a
            run of this recipe is judged, or trained on.
        data: folder of ADE20K or Cityscapes, a folder with images/ and masks/, or parquet files with both.
        out: directory of the run; runs/segment, or the next free number, by default.
        resume: 'auto' goes on from the last checkpoint, if there is one; or the directory of a run. Trust ZeRO's and
            FSDP's like code: the engine unpickles its files.
        init: a file of weights for the model, in its own names; mimkit convert reads others.
        from_scratch: leave the weights, and start at random.
        eval_only: judge the model as it is.
        dry_run: read a few images and masks, compute one step, print what each layer learns at, and stop.
        classes: how many; by default what classes.txt or the masks say.
        zero_ignored: 0 in a mask stands for nothing, and classes begin at 1.
        img_size: crop in pixels, 512 or HEIGHTxWIDTH.
        short_side: of an image at scale 1, in training and when it is judged; that of the crop by default, and what a
            run had when it is judged again.
        scales: range of the random scale.
        model_args: other arguments of the model, such as {patch_size: 16}.
        in_chans: channels of the images.
        mean: mean of each channel, in 0-1, or one for all; the model's own by default.
        std: deviation of each channel, or one for all.
        drop_path: rate of stochastic depth at the last block.
        neck: what the decoder gets: maps of the stages, a pyramid of the last map, both, or auto.
        window: largest side, in tokens, of windows that a HiViT, an HPViT or a plain ViT attends in, for large images;
            the last block of each quarter is global. 0: the model as it is.
        decoder: upernet or fpn.
        decoder_dim: its channels.
        model_ema_decay: average the weights by this decay, which begins at 0; 0 for no average.
        layer_decay: factor of the learning rate from each layer to the one below.
        pool_scale: factor of the learning rate of an HPViT's pools, which have no layer.
        epochs: passes over the data, parts of one too.
        warmup_epochs: of them with a rising learning rate.
        schedule: poly (a line) or cosine.
        batch_size: images of one step, over all processes and accumulated parts.
        grad_accum_steps: parts that a step is computed in.
        lr: learning rate.
        weight_decay: AdamW's.
        betas: AdamW's.
        clip_grad: largest norm of the gradient; null for any.
        slide: judge windows as large as the crop, and average them, instead of whole images. (default: as the run that
            is judged again did, else false)
        flip_test: judge images and their mirror images, and average. (default: as slide's)
        max_bad: share of images that may be impossible to use.
        workers: processes that load data; one core is left for training by default.
        seed: of everything that is random.
        precision: auto, fp32, bf16 or fp16.
        compile: use torch.compile.
        grad_checkpointing: recompute activations to save memory.
        save_every: epochs between checkpoints; one is written at the end.
        max_spike: a step whose loss is so many times the mean before it is passed by, as one that is not finite.
        keep: how many of the last checkpoints stay.
        keep_every: each so-manieth checkpoint stays for good; 0 for none.
        eval_every: epochs between measurements on the test images; 0: at the end.
        track: tensorboard, wandb or trackio.
    """

    model: str = "vit_base_patch16_224.mae"
    data: str = "ADEChallengeData2016"
    out: str | None = None
    resume: str | None = None
    init: str | None = None
    from_scratch: bool = False
    eval_only: bool = False
    dry_run: bool = False
    classes: PositiveInt | None = None
    zero_ignored: bool = False
    img_size: int | str = 512
    short_side: PositiveInt | None = None
    scales: tuple[float, float] = (0.5, 2.0)
    model_args: dict[str, Any] = field(default_factory=dict)
    in_chans: PositiveInt = 3
    mean: list[float] | None = None
    std: list[float] | None = None
    drop_path: NonNegativeFloat = 0.1
    neck: str = "auto"
    window: NonNegativeInt = 0
    decoder: str = "upernet"
    decoder_dim: PositiveInt = 512
    model_ema_decay: NonNegativeFloat = 0.0
    layer_decay: PositiveFloat = 0.65
    pool_scale: NonNegativeFloat = 10.0
    epochs: PositiveFloat = 126.7
    warmup_epochs: NonNegativeFloat = 1.2
    schedule: str = "poly"
    batch_size: PositiveInt = 16
    grad_accum_steps: PositiveInt = 1
    lr: PositiveFloat = 1e-4
    weight_decay: NonNegativeFloat = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad: PositiveFloat | None = None
    slide: bool | None = None
    flip_test: bool | None = None
    max_bad: NonNegativeFloat = 0.01
    workers: NonNegativeInt | None = None
    seed: NonNegativeInt = 0
    precision: str = "auto"
    compile: bool = False
    grad_checkpointing: bool = False
    save_every: NonNegativeFloat = 10.0
    max_spike: PositiveFloat | None = None
    keep: PositiveInt = 2
    keep_every: NonNegativeInt = 0
    eval_every: NonNegativeFloat = 10.0
    track: str | None = None


@cli_entry
def main(argv: list[str] | None = None) -> None:
    """Parse the options, train, leave the run's directory."""
    options = parse_recipe(Options, __doc__ or "", recipe="segment", argv=argv)
    options.workers = default_workers() if options.workers is None else options.workers
    if options.schedule not in ("poly", "cosine"):
        raise UserError(f"--schedule {options.schedule} is unknown: choose poly or cosine.")
    if not 0 < options.scales[0] <= options.scales[1]:
        raise UserError(f"--scales {list(options.scales)} is no range: give two numbers above 0, like 0.5,2.")
    size = parse_size(options.img_size)
    short = options.short_side or min(size)
    data, test, classes = open_masked(options.data, options.classes, options.zero_ignored)
    run = Run("segment", options)

    before: dict[str, Any] = {}  # how the run was judged that is judged again
    if trained := find_dense(options.model, "segmenter"):
        network, about, start, normalize = go_on_from(trained, "segmenter", Segmenter, options, classes.names)
        own = about["segmenter_args"]
        if options.eval_only:
            short, before = options.short_side or about["short"], about
        options.neck, options.window = own["neck"], own["window"]
        options.decoder, options.decoder_dim = own["decoder"], own["width"]
    else:
        built = None if options.window else size  # for windows tables are cut from the checkpoint's own
        backbone, start, normalize = start_from(options, img_size=built, **ANY_SIZE)
        shape = options.decoder, options.decoder_dim, options.neck
        network = Segmenter(backbone, len(classes.names), *shape, window=options.window)
    if options.grad_checkpointing:
        checkpoint_blocks(network.pyramid.backbone)
    normalize.to(run.accelerator.device)
    if options.slide is None:
        options.slide = bool(before.get("crop"))
    if options.flip_test is None:
        options.flip_test = before.get("flip", False)
    crop = (before.get("crop") or size) if options.slide else None
    task = Segmentation(run, test, classes, normalize, short, crop, options.flip_test)
    judge = Evaluator(run, task)
    if options.eval_only:
        if not trained:
            raise UserError(f"--model {options.model} is no run of recipes/segment.py: there is nothing to judge yet.")
        judge.alone(network.to(run.accelerator.device))
        return

    groups = groups_with_head(
        network, "pyramid.backbone", options.weight_decay, options.layer_decay, options.pool_scale
    )
    transform = train_pairs(size, short, options.scales, normalize.values[0])
    viewer = SampleLoader(transform, options.in_chans, 0, options.seed, (data.image, data.mask), classes)
    length = max(data.length, options.batch_size) if options.dry_run else data.length  # a few images rehearse a set
    plan = run.plan(length, options.batch_size, options.epochs)
    if options.decoder == "upernet" and plan.micro_batch_size < 2:  # it normalizes one number for an image over a batch
        raise UserError(
            "UPerNet needs 2 images or more in each part of a step on each process: choose a larger --batch-size, "
            "fewer --grad-accum-steps, or --decoder fpn."
        )
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas)
    warmup = round(options.warmup_epochs * plan.steps_per_epoch)
    schedule = (poly if options.schedule == "poly" else cosine)(optimizer, plan.steps, warmup)
    if options.dry_run:
        show_groups(groups, options.lr, run.console)
        task.rehearse(network.to(run.accelerator.device), viewer, data)
        return
    loader = train_loader(data, viewer, plan, options.workers)
    run.write_config()
    run.print(
        f"{start}; {len(classes.names)} classes; {data.length:,} + {test.length:,} images; {network.pyramid.neck}"
    )
    ema = ModelEmaV3(network, options.model_ema_decay, use_warmup=True) if options.model_ema_decay else None
    model, stepper = run.prepare(network, optimizer, **({"ema": ema.module} if ema else {}))

    for step, parts in run.steps(loader):
        schedule.step_update(step)
        for batch in parts:
            with run.accumulate(model):
                loss = loss_of(model(normalize(batch.images)), batch.labels)
                run.accelerator.backward(loss)
                if options.clip_grad and run.accelerator.sync_gradients:
                    run.accelerator.clip_grad_norm_(model.parameters(), options.clip_grad)
                stepper.step()
                stepper.zero_grad()
            run.record(loss=loss)
        if ema:
            ema.update(network, step)
        run.end_step(step)
        if run.due(step, options.eval_every):
            judge(step + 1, network, ema and ema.module)
        if run.due(step, options.save_every):
            run.save(step)
    judge.finish(ema.module if ema else network)
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
