"""Train a segmenter on any checkpoint: a feature pyramid of the network under UPerNet or an FPN decoder.

accelerate launch recipes/segment.py --config segment_vit_b_ade20k --data /path/to/ADEChallengeData2016
    MAE's ViT-B with the learning rate and schedule of its published UPerNet; not run
accelerate launch recipes/segment.py --config segment_small --model-args.patch_size 4 --data FOLDER
    what `recipes/mae_hivit.py` left in runs/mae_hivit, on small images of yours, without a GPU; not run

docs/data.md lists what `--data` may be. `mimkit/models/feature_pyramid.py` makes the maps, and
`mimkit/tasks/segmentation.py` has the decoders, the loss and the metric.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mimkit  # noqa: F401  before torch, whose threads it tells how to wait

# isort: split
import torch
from timm.utils import ModelEmaV3

from mimkit.config import (
    DenseOptions,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    RunOptions,
    options_of,
    parse_recipe,
)
from mimkit.conversion.convert import read_released
from mimkit.conversion.family import check_model
from mimkit.data.loader import default_workers, train_loader
from mimkit.data.sample import SampleLoader
from mimkit.data.segmentation import Classes, open_masked, train_pairs
from mimkit.data.sources import set_value_range
from mimkit.data.transforms import Normalize, Size, default_normalization, parse_size
from mimkit.errors import UserError, cli_entry
from mimkit.models.factory import ANY_SIZE
from mimkit.models.pretrained import checkpoint_blocks, start_from
from mimkit.tasks.dense_checkpoint import continue_from, find_dense
from mimkit.tasks.segmentation import Segmentation, Segmenter, segmentation_loss
from mimkit.training.optim import cosine, groups_with_head, poly, show_groups
from mimkit.training.run import Run
from mimkit.training.validation import Evaluator


@dataclass
class Options(DenseOptions):
    """The defaults are the schedule of MAE's UPerNet on ADE20K; docs/segmentation.md lists what differs.

    Args:
        classes: Number of classes. Default: what classes.txt or the masks say.
        zero_ignored: Ignore pixels whose mask is 0, and let classes begin at 1.
        mask_values: Number that stands for each class in the masks, such as 0,255. Default: 0,1,2 and so on.
        decoder: upernet or fpn.
        decoder_dim: Number of channels of the decoder.
        schedule: poly (linear decay) or cosine.
        slide: Evaluate by averaging over sliding windows of the size of the crop, instead of on whole images. Default:
            as the run in --model did, else false.
        flip_test: Evaluate images and their mirror images, and average. Default: as for --slide.
    """

    data: str = "ADEChallengeData2016"
    classes: PositiveInt | None = None
    zero_ignored: bool = False
    mask_values: list[NonNegativeInt] | None = None
    img_size: int | str = 512
    decoder: str = "upernet"
    decoder_dim: PositiveInt = 512
    schedule: str = "poly"
    slide: bool | None = None
    flip_test: bool | None = None
    epochs: PositiveFloat = 126.7
    warmup_epochs: NonNegativeFloat = 1.2
    batch_size: PositiveInt = 16
    lr: PositiveFloat = 1e-4
    eval_every: NonNegativeFloat = 10.0


def build(options: Options, classes: Classes, size: Size) -> tuple[Segmenter, str, Normalize, dict[str, Any]]:
    """Read the segmenter of an earlier run, or put a new decoder on a checkpoint, and complete the options.

    Returns:
        The network, what it starts from, the normalization of its input, and the description of the earlier run, which
        is empty if there is none.
    """
    if folder := find_dense(options.model, "segmenter"):
        other_start = bool(options.init or options.from_scratch or options.model_args)
        network, about, start, normalize = continue_from(folder, "segmenter", Segmenter, classes.names, other_start)
        options.in_chans, (options.mean, options.std) = about["in_chans"], normalize.values
        arguments = about["segmenter_args"]
        options.neck, options.window = arguments["neck"], arguments["window"]
        options.decoder, options.decoder_dim = arguments["decoder"], arguments["width"]
        return network, start, normalize, about
    if options.eval_only:
        raise UserError(
            f"--model {options.model} is no run of recipes/segment.py, so it cannot be evaluated. Train it."
        )
    backbone, start, (mean, std) = start_from(
        options.model,
        init=options.init,
        from_scratch=options.from_scratch,
        model_args=options.model_args,
        in_chans=options.in_chans,
        drop_path_rate=options.drop_path,
        read_released=read_released,
        img_size=None if options.window else size,  # windows cut their position tables out of the checkpoint's
        **ANY_SIZE,
    )
    normalize = default_normalization(options.in_chans, options.mean or mean, options.std or std)
    options.mean, options.std = normalize.values
    decoder = options.decoder, options.decoder_dim, options.neck
    return Segmenter(backbone, len(classes.names), *decoder, window=options.window), start, normalize, {}


@cli_entry
def main(argv: list[str] | None = None, replay: Path | None = None) -> None:
    """Parse the options, train, and write the run's directory, runs/segment by default."""
    options = parse_recipe(Options, __doc__ or "", recipe="segment", argv=argv)
    check_model(options.model)
    options.workers = default_workers() if options.workers is None else options.workers
    if options.schedule not in ("poly", "cosine"):
        raise UserError(f"--schedule {options.schedule} is unknown. Choose poly or cosine.")
    if not 0 < options.scales[0] <= options.scales[1]:
        raise UserError(f"--scales {list(options.scales)} is not a range. Pass two numbers above 0, such as 0.5,2.")
    size = parse_size(options.img_size)
    chosen = options.parts, options.image_column, options.label_column
    data, test, classes = open_masked(options.data, options.classes, options.zero_ignored, options.mask_values, *chosen)
    data, test = set_value_range(options.value_range, data, test)
    run = Run("segment", **options_of(RunOptions, options), measure_every=options.eval_every, replay=replay)
    run.print(data.about)
    network, start, normalize, about = build(options, classes, size)
    if options.grad_checkpointing:
        checkpoint_blocks(network.pyramid.backbone)
    normalize.to(run.engine.device)

    evaluated = about if options.eval_only else {}  # by default, an earlier run is evaluated as it was before
    short = options.short_side or evaluated.get("short") or min(size)
    options.slide = bool(evaluated.get("crop")) if options.slide is None else options.slide
    options.flip_test = evaluated.get("flip", False) if options.flip_test is None else options.flip_test
    crop = (evaluated.get("crop") or size) if options.slide else None
    task = Segmentation(run, test, classes, normalize, short, crop, options.flip_test, options.workers, options.max_bad)
    evaluator = Evaluator(run, task)
    if options.eval_only:
        evaluator.evaluate_only(network.to(run.engine.device), draw=bool(options.out))
        return

    decays = options.weight_decay, options.layer_decay, options.pool_scale
    groups = groups_with_head(network, "pyramid.backbone", *decays)
    transform = train_pairs(size, short, options.scales, normalize.values[0])
    samples = SampleLoader(transform, options.in_chans, 0, options.seed, (data.image, data.mask), classes)
    length = max(data.length, options.batch_size) if options.dry_run else data.length  # a few images are enough for it
    plan = run.make_plan(length, options.batch_size, options.epochs)
    if options.decoder == "upernet" and plan.micro_batch_size < 2:  # one of its batch norms sees one value per image
        raise UserError(
            f"UPerNet needs at least 2 images in a micro-batch, but there is {plan.micro_batch_size}. Choose a larger "
            "--batch-size, fewer --grad-accum-steps, or --decoder fpn."
        )
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas)
    warmup = round(options.warmup_epochs * plan.steps_per_epoch)
    schedule = (poly if options.schedule == "poly" else cosine)(optimizer, plan.steps, warmup)
    if options.dry_run:
        show_groups(groups, options.lr, run.display.console)
        task.dry_run(network.to(run.engine.device), samples, data)
        return
    loader = train_loader(data, samples, plan, options.workers)
    run.write_config(asdict(options), data)
    counts = f"{len(classes.names)} classes; {data.length:,} training and {test.length:,} test images"
    run.print(f"{start}; {counts}; neck: {network.pyramid.neck}")
    ema = ModelEmaV3(network, options.model_ema_decay, use_warmup=True) if options.model_ema_decay else None
    model, stepper = run.prepare(network, optimizer, options.clip_grad, **({"ema": ema.module} if ema else {}))

    for step, micro_batches in run.steps(loader):
        schedule.step_update(step)
        for batch in micro_batches:
            with run.accelerator.accumulate(model):
                loss = segmentation_loss(model(normalize(batch.images)), batch.labels)
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
    evaluator.finish(ema.module if ema else network)
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
