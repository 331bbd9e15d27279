"""Object detection and instance segmentation: a checkpoint as a pyramid under Mask R-CNN or Faster R-CNN.

accelerate launch recipes/detect.py --config detect_hivit_b_coco_3x --model runs/mae_hivit --data /path/to/coco
    HiViT's published schedule; not run

What `--data` may be: docs/data.md. What maps a backbone gives: `mimkit/pyramid.py`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3

from mimkit.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, parse_recipe
from mimkit.data.detection import open_boxes, read_objects, train_objects
from mimkit.data.loader import train_loader
from mimkit.data.order import default_workers
from mimkit.data.sample import SampleLoader, collate_list
from mimkit.data.transforms import parse_size
from mimkit.errors import UserError, cli_entry
from mimkit.models.factory import ANY_SIZE
from mimkit.models.pretrained import checkpoint_blocks, start_from
from mimkit.tasks.dense_checkpoint import find_dense, go_on_from
from mimkit.tasks.detection import Detection, Detector
from mimkit.training.optim import cosine, groups_with_head, multistep, poly, show_groups
from mimkit.training.run import Run
from mimkit.training.validation import Evaluator


@dataclass
class Options:
    """The defaults are HiViT-B's published ones (36 epochs of COCO), with the sizes of Swin's Mask R-CNN.

    Args:
        model: a run, a folder that timm can read (an encoder/, a converted checkpoint), or a name known to timm; a
            run of this recipe is judged, or trained on.
        data: folder in COCO's layout: train2017/, val2017/, annotations/instances_train2017.json, ...
        out: directory of the run; runs/detect, or the next free number, by default.
        resume: 'auto' goes on from the last checkpoint, if there is one; or the directory of a run. Trust ZeRO's and
            FSDP's like code: the engine unpickles its files.
        init: a file of weights for the model, in its own names; mimkit convert reads others.
        from_scratch: leave the weights, and start at random.
        eval_only: judge the model as it is.
        dry_run: read a few images and their objects, compute one step, print what each layer learns at, and stop.
        masks: find masks too (Mask R-CNN); else boxes alone (Faster R-CNN).
        img_size: crop of large-scale jitter in pixels, 1024 or HEIGHTxWIDTH; whole images of several scales by default.
        short_side: of an image at scale 1, in training without a crop and when it is judged; by default what the
            run in `model` had, else 800.
        long_side: of an image at most, likewise; else 1333.
        scales: range of the random scale.
        model_args: other arguments of the model, such as {patch_size: 16}.
        in_chans: channels of the images.
        mean: mean of each channel, in 0-1, or one for all; the model's own by default.
        std: deviation of each channel, or one for all.
        drop_path: rate of stochastic depth at the last block.
        neck: what the heads get: maps of the stages, a pyramid of the last map, both, or auto.
        window: largest side, in tokens, of windows that blocks attend in, the last of each quarter aside; 0 for none.
        fpn_dim: channels of the feature pyramid and of the heads.
        roi_samples: regions of an image that the heads learn from.
        model_ema_decay: average the weights by this decay, which begins at 0; 0 for no average.
        layer_decay: factor of the learning rate from each layer to the one below.
        pool_scale: factor of the learning rate of an HPViT's pools, which have no layer.
        epochs: passes over the data, parts of one too.
        warmup_epochs: of them with a rising learning rate.
        schedule: steps, poly (a line) or cosine.
        drop_epochs: epochs after which the rate of steps is a tenth of what it was.
        batch_size: images of one step, over all processes and accumulated parts.
        grad_accum_steps: parts that a step is computed in.
        lr: learning rate.
        weight_decay: AdamW's.
        betas: AdamW's.
        clip_grad: largest norm of the gradient; null for any.
        max_bad: share of images that may be impossible to use.
        workers: processes that load data; one core is left for training by default.
        seed: of everything that is random.
        precision: auto, fp32, bf16 or fp16.
        compile: use torch.compile on the backbone and its feature pyramid.
        grad_checkpointing: recompute activations to save memory.
        save_every: epochs between checkpoints; one is written at the end.
        max_spike: a step whose loss is so many times the mean before it is passed by, as one that is not finite.
        keep: how many of the last checkpoints stay.
        keep_every: each so-manieth checkpoint stays for good; 0 for none.
        eval_every: epochs between measurements on the test images; 0: at the end.
        track: tensorboard, wandb or trackio.
    """

    model: str = "runs/mae_hivit"
    data: str = "coco"
    out: str | None = None
    resume: str | None = None
    init: str | None = None
    from_scratch: bool = False
    eval_only: bool = False
    dry_run: bool = False
    masks: bool = True
    img_size: int | str | None = None
    short_side: PositiveInt | None = None
    long_side: PositiveInt | None = None
    scales: tuple[float, float] = (0.6, 1.0)
    model_args: dict[str, Any] = field(default_factory=dict)
    in_chans: PositiveInt = 3
    mean: list[float] | None = None
    std: list[float] | None = None
    drop_path: NonNegativeFloat = 0.2
    neck: str = "auto"
    window: NonNegativeInt = 0
    fpn_dim: PositiveInt = 256
    roi_samples: PositiveInt = 512
    model_ema_decay: NonNegativeFloat = 0.0
    layer_decay: PositiveFloat = 0.9
    pool_scale: NonNegativeFloat = 10.0
    epochs: PositiveFloat = 36.0
    warmup_epochs: NonNegativeFloat = 0.14
    schedule: str = "steps"
    drop_epochs: list[PositiveFloat] = field(default_factory=lambda: [27.0, 33.0])
    batch_size: PositiveInt = 16
    grad_accum_steps: PositiveInt = 1
    lr: PositiveFloat = 1e-4
    weight_decay: NonNegativeFloat = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad: PositiveFloat | None = None
    max_bad: NonNegativeFloat = 0.01
    workers: NonNegativeInt | None = None
    seed: NonNegativeInt = 0
    precision: str = "auto"
    compile: bool = False
    grad_checkpointing: bool = False
    save_every: NonNegativeFloat = 1.0
    max_spike: PositiveFloat | None = None
    keep: PositiveInt = 2
    keep_every: NonNegativeInt = 0
    eval_every: NonNegativeFloat = 1.0
    track: str | None = None


@cli_entry
def main(argv: list[str] | None = None) -> None:
    """Parse the options, train, leave the run's directory."""
    options = parse_recipe(Options, __doc__ or "", recipe="detect", argv=argv)
    options.workers = default_workers() if options.workers is None else options.workers
    if options.schedule not in ("steps", "poly", "cosine"):
        raise UserError(f"--schedule {options.schedule} is unknown: choose steps, poly or cosine.")
    if not 0 < options.scales[0] <= options.scales[1]:
        raise UserError(f"--scales {list(options.scales)} is no range: give two numbers above 0, like 0.6,1.")
    size = parse_size(options.img_size) if options.img_size else None
    data, _, test, truth = open_boxes(options.data, options.masks)
    run = Run("detect", options)

    if trained := find_dense(options.model, "detector"):
        network, about, start, normalize = go_on_from(trained, "detector", Detector, options, truth.names)
        own = about["detector_args"]
        if own["masks"] != options.masks:
            had = str(own["masks"]).lower()
            raise UserError(f"--model {options.model} was trained with --masks {had}: pass that.")
        options.neck, options.window = own["neck"], own["window"]
        options.fpn_dim, options.roi_samples = own["width"], own["samples"]
    else:
        backbone, start, normalize = start_from(options, **ANY_SIZE)
        heads = options.masks, options.neck, options.window, options.fpn_dim, options.roi_samples
        mean, std = normalize.values
        network = Detector(backbone, len(truth.names), *heads, mean=mean, std=std)
    short, long = options.short_side, options.long_side = network.scale_to(options.short_side, options.long_side)
    if options.grad_checkpointing:
        checkpoint_blocks(network.pyramid.backbone)
    task = Detection(run, test, truth, normalize, options.masks)
    judge = Evaluator(run, task)
    if options.eval_only:
        if not trained:
            raise UserError(f"--model {options.model} is no run of recipes/detect.py: there is nothing to judge yet.")
        judge.alone(network.to(run.accelerator.device))
        return

    inside = "rcnn.backbone.pyramid.backbone"
    groups = groups_with_head(network, inside, options.weight_decay, options.layer_decay, options.pool_scale)
    transform = train_objects(size, short, long, options.scales, normalize.values[0])
    fields = (data.image, data.label)
    viewer = SampleLoader(transform, options.in_chans, 0, options.seed, fields, read_objects(options.masks))
    length = max(data.length, options.batch_size) if options.dry_run else data.length  # a few images rehearse a set
    plan = run.plan(length, options.batch_size, options.epochs)
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas)
    warmup, per_epoch = round(options.warmup_epochs * plan.steps_per_epoch), plan.steps_per_epoch
    if options.schedule == "steps":
        schedule: Any = multistep(optimizer, plan.steps, warmup, [round(e * per_epoch) for e in options.drop_epochs])
    else:
        schedule = (poly if options.schedule == "poly" else cosine)(optimizer, plan.steps, warmup)
    if options.dry_run:
        show_groups(groups, options.lr, run.console)
        task.rehearse(network.to(run.accelerator.device), viewer, data)
        return
    loader = train_loader(data, viewer, plan, options.workers, collate_list)
    run.write_config()
    run.print(f"{start}; {len(truth.names)} classes; {data.length:,} + {test.length:,} images; {network.pyramid.neck}")
    ema = ModelEmaV3(network, options.model_ema_decay, use_warmup=True) if options.model_ema_decay else None
    model, stepper = run.prepare(network, optimizer, **({"ema": ema.module} if ema else {}))

    for step, parts in run.steps(loader):
        schedule.step_update(step)
        for batch in parts:
            with run.accumulate(model):
                losses = model(batch.images, batch.labels)
                loss = sum(losses.values())
                run.accelerator.backward(loss)
                if options.clip_grad and run.accelerator.sync_gradients:
                    run.accelerator.clip_grad_norm_(model.parameters(), options.clip_grad)
                stepper.step()
                stepper.zero_grad()
            run.record(loss=loss, **losses)
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
