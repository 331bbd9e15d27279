"""Train a detector on any checkpoint: a feature pyramid of the network under Mask R-CNN or Faster R-CNN.

accelerate launch recipes/detect.py --config detect_hivit_b_coco_3x --model runs/mae_hivit --data /path/to/coco
    HiViT-B's published schedule; not run
accelerate launch recipes/detect.py --config detect_small --data FOLDER --model-args "{patch_size: 4, img_size: 128}"
    what `recipes/mae_hivit.py` left in runs/mae_hivit, on small images of yours, without a GPU; not run

docs/data.md lists what `--data` may be. `mimkit/models/feature_pyramid.py` makes the maps, and
`mimkit/tasks/detection.py` has the detector and COCO's metrics.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mimkit  # noqa: F401  before torch, whose threads it tells how to wait

# isort: split
import torch
from timm.utils import ModelEmaV3

from mimkit.config import (
    DenseOptions,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    RunOptions,
    options_of,
    parse_recipe,
)
from mimkit.conversion.convert import read_released
from mimkit.conversion.family import check_model
from mimkit.data.detection import CocoGroundTruth, open_boxes, read_objects, train_objects
from mimkit.data.loader import default_workers, train_loader
from mimkit.data.sample import SampleLoader, collate_list
from mimkit.data.sources import set_value_range
from mimkit.data.transforms import Normalize, default_normalization, parse_size
from mimkit.errors import UserError, cli_entry
from mimkit.models.factory import ANY_SIZE
from mimkit.models.pretrained import checkpoint_blocks, start_from
from mimkit.tasks.dense_checkpoint import continue_from, find_dense
from mimkit.tasks.detection import Detection, Detector
from mimkit.training.optim import cosine, groups_with_head, multistep, poly, show_groups
from mimkit.training.run import Run
from mimkit.training.validation import Evaluator


@dataclass
class Options(DenseOptions):
    """The defaults are HiViT-B's published settings (36 epochs of COCO), with the image sizes of Swin's Mask R-CNN.

    Args:
        masks: Predict masks as well (Mask R-CNN), instead of boxes alone (Faster R-CNN).
        long_side: Maximum length of the long side. Default: that of the run in --model, else 1333.
        fpn_dim: Number of channels of the feature pyramid and the heads.
        roi_samples: Number of regions per image that the heads are trained on.
        schedule: steps, poly (linear decay) or cosine.
        drop_epochs: Epochs after which the learning rate of the steps schedule drops to a tenth.
    """

    model: str = "runs/mae_hivit"
    data: str = "coco"
    masks: bool = True
    long_side: PositiveInt | None = None
    scales: tuple[float, float] = (0.6, 1.0)
    drop_path: NonNegativeFloat = 0.2
    fpn_dim: PositiveInt = 256
    roi_samples: PositiveInt = 512
    layer_decay: PositiveFloat = 0.9
    schedule: str = "steps"
    drop_epochs: list[PositiveFloat] = field(default_factory=lambda: [27.0, 33.0])
    epochs: PositiveFloat = 36.0
    warmup_epochs: NonNegativeFloat = 0.14
    batch_size: PositiveInt = 16
    lr: PositiveFloat = 1e-4
    save_every: NonNegativeFloat = 1.0


def build(options: Options, truth: CocoGroundTruth) -> tuple[Detector, str, Normalize]:
    """Read the detector of an earlier run, or put new heads on a checkpoint, and complete the options.

    Returns:
        The network, what it starts from, and the normalization of its input.
    """
    if folder := find_dense(options.model, "detector"):
        other_start = bool(options.init or options.from_scratch or options.model_args)
        network, about, start, normalize = continue_from(folder, "detector", Detector, truth.names, other_start)
        options.in_chans, (options.mean, options.std) = about["in_chans"], normalize.values
        arguments = about["detector_args"]
        if arguments["masks"] != options.masks:
            trained = str(arguments["masks"]).lower()
            raise UserError(f"--model {options.model} was trained with --masks {trained}. Pass the same.")
        options.neck, options.window = arguments["neck"], arguments["window"]
        options.fpn_dim, options.roi_samples = arguments["width"], arguments["samples"]
        return network, start, normalize
    if options.eval_only:
        raise UserError(f"--model {options.model} is no run of recipes/detect.py, so it cannot be evaluated. Train it.")
    backbone, start, (mean, std) = start_from(
        options.model,
        init=options.init,
        from_scratch=options.from_scratch,
        model_args=options.model_args,
        in_chans=options.in_chans,
        drop_path_rate=options.drop_path,
        read_released=read_released,
        **ANY_SIZE,
    )
    normalize = default_normalization(options.in_chans, options.mean or mean, options.std or std)
    options.mean, options.std = normalize.values
    heads = options.masks, options.neck, options.window, options.fpn_dim, options.roi_samples
    return Detector(backbone, len(truth.names), *heads, mean=options.mean, std=options.std), start, normalize


@cli_entry
def main(argv: list[str] | None = None, replay: Path | None = None) -> None:
    """Parse the options, train, and write the run's directory, runs/detect by default."""
    options = parse_recipe(Options, __doc__ or "", recipe="detect", argv=argv)
    check_model(options.model)
    options.workers = default_workers() if options.workers is None else options.workers
    if options.schedule not in ("steps", "poly", "cosine"):
        raise UserError(f"--schedule {options.schedule} is unknown. Choose steps, poly or cosine.")
    if not 0 < options.scales[0] <= options.scales[1]:
        raise UserError(f"--scales {list(options.scales)} is not a range. Pass two numbers above 0, such as 0.6,1.")
    size = parse_size(options.img_size) if options.img_size else None
    chosen = options.parts, options.image_column, options.label_column
    data, _, test, truth = open_boxes(options.data, options.masks, *chosen)
    data, test = set_value_range(options.value_range, data, test)
    run = Run("detect", **options_of(RunOptions, options), measure_every=options.eval_every, replay=replay)
    run.print(data.about)
    network, start, normalize = build(options, truth)
    short, long = options.short_side, options.long_side = network.set_size(options.short_side, options.long_side)
    if options.grad_checkpointing:
        checkpoint_blocks(network.pyramid.backbone)
    task = Detection(run, test, truth, normalize, options.masks, options.workers, options.max_bad)
    evaluator = Evaluator(run, task)
    if options.eval_only:
        evaluator.evaluate_only(network.to(run.engine.device), draw=bool(options.out))
        return

    decays = options.weight_decay, options.layer_decay, options.pool_scale
    groups = groups_with_head(network, "rcnn.backbone.pyramid.backbone", *decays)
    transform = train_objects(size, short, long, options.scales, normalize.values[0])
    fields = (data.image, data.label)
    samples = SampleLoader(transform, options.in_chans, 0, options.seed, fields, read_objects(options.masks))
    length = max(data.length, options.batch_size) if options.dry_run else data.length  # a few images are enough for it
    plan = run.make_plan(length, options.batch_size, options.epochs)
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas)
    warmup, per_epoch = round(options.warmup_epochs * plan.steps_per_epoch), plan.steps_per_epoch
    if options.schedule == "steps":
        schedule: Any = multistep(optimizer, plan.steps, warmup, [round(e * per_epoch) for e in options.drop_epochs])
    else:
        schedule = (poly if options.schedule == "poly" else cosine)(optimizer, plan.steps, warmup)
    if options.dry_run:
        show_groups(groups, options.lr, run.display.console)
        task.dry_run(network.to(run.engine.device), samples, data)
        return
    loader = train_loader(data, samples, plan, options.workers, collate_list)
    run.write_config(asdict(options), data)
    counts = f"{len(truth.names)} classes; {data.length:,} training and {test.length:,} test images"
    run.print(f"{start}; {counts}; neck: {network.pyramid.neck}")
    ema = ModelEmaV3(network, options.model_ema_decay, use_warmup=True) if options.model_ema_decay else None
    model, stepper = run.prepare(network, optimizer, options.clip_grad, **({"ema": ema.module} if ema else {}))

    for step, micro_batches in run.steps(loader):
        schedule.step_update(step)
        for batch in micro_batches:
            with run.accelerator.accumulate(model):
                losses = model(batch.images, batch.labels)
                loss = sum(losses.values())
                run.accelerator.backward(loss)
                if options.clip_grad and run.accelerator.sync_gradients:
                    run.accelerator.clip_grad_norm_(model.parameters(), options.clip_grad)
                stepper.step()
                stepper.zero_grad()
            run.record(loss=loss, **losses)
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
