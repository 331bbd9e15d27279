"""Fine-tune a network for classification, or train it from scratch.

accelerate launch recipes/finetune.py
    what `recipes/mae_hivit.py` left in runs/mae_hivit, on the sample set, and the same network from scratch beside it,
    the preset `finetune_small`: 1 min 40 s on 2 CPU cores (AMD EPYC), 66.2 % against 51.7 %
accelerate launch recipes/finetune.py --config finetune_vit_b --data /path/to/imagenet
    the published fine-tuning of MAE's ViT-B; not run

What a checkpoint starts as: `load` in `mimkit/finetuning.py`.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3

from mimkit.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, parse_recipe
from mimkit.data.loader import check_samples, train_loader
from mimkit.data.order import default_workers
from mimkit.data.sample import SampleLoader
from mimkit.data.sources import open_labeled
from mimkit.data.transforms import finetune_transform, parse_size
from mimkit.errors import StoppedError, cli_entry
from mimkit.models.factory import has_weights, input_of
from mimkit.models.pretrained import checkpoint_blocks, network_folder, new_head, start_from
from mimkit.tasks.classification import Classification, check_classes, class_names, head_fits, mixing
from mimkit.training.optim import cosine, layer_groups, show_groups
from mimkit.training.run import Run
from mimkit.training.validation import Evaluator


@dataclass
class Options:
    """The defaults are MAE's published fine-tuning of ViT-B (He et al., CVPR 2022, table 9).

    Args:
        model: a run, a folder that timm can read (an encoder/, a converted checkpoint), or a name known to timm.
        data: 'sample', a folder with class folders, parquet files with labels, or the name of a set on the hub.
        out: directory of the run; runs/finetune, or the next free number, by default.
        resume: 'auto' goes on from the last checkpoint, if there is one; or the directory of a run. Trust ZeRO's and
            FSDP's like code: the engine unpickles its files.
        init: a file of weights for the model, in its own names; mimkit convert reads others.
        from_scratch: leave the weights, and start at random.
        compare_scratch: do both, from scratch without layer decay, and tell the difference.
        eval_only: judge the model as it is.
        dry_run: look at 50 images of each part, print what each layer learns at, and stop.
        img_size: input in pixels, 224 or HEIGHTxWIDTH; the model's own by default.
        model_args: other arguments of the model, such as {patch_size: 8}.
        in_chans: channels of the images.
        mean: mean of each channel, in 0-1, or one for all; the model's own by default.
        std: deviation of each channel, or one for all.
        global_pool: how tokens become one, avg or token; the model's own by default.
        drop_path: rate of stochastic depth at the last block.
        head_std: deviation of the head's weights at the start; null for the network's own.
        crop_scale: share of the image's area that a crop has.
        aa: augmentation policy, as timm spells it; null for none.
        aug_repeats: times that an image stands in a step, each augmented on its own; an epoch has fewer images then.
        reprob: share of images in which a part is erased.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of cutmix; 0 for none.
        smoothing: of labels.
        model_ema_decay: average the weights by this decay, which begins at 0; 0 for no average.
        layer_decay: factor of the learning rate from each layer to the one below.
        pool_scale: factor of the learning rate of an HPViT's pools, which have no layer.
        epochs: passes over the data, parts of one too.
        warmup_epochs: of them with a rising learning rate.
        batch_size: images of one step, over all processes and accumulated parts.
        grad_accum_steps: parts that a step is computed in.
        blr: learning rate for a batch of 256.
        lr: learning rate; blr x batch_size / 256 by default.
        weight_decay: AdamW's.
        betas: AdamW's.
        clip_grad: largest norm of the gradient; null for any.
        crop_pct: share of the scaled image that is judged; the model's own by default.
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
        eval_every: epochs between measurements on the test images; 0: at the end.
        track: tensorboard, wandb or trackio.
    """

    model: str = "vit_base_patch16_224.mae"
    data: str = "sample"
    out: str | None = None
    resume: str | None = None
    init: str | None = None
    from_scratch: bool = False
    compare_scratch: bool = False
    eval_only: bool = False
    dry_run: bool = False
    img_size: int | str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    in_chans: PositiveInt = 3
    mean: list[float] | None = None
    std: list[float] | None = None
    global_pool: str | None = None
    drop_path: NonNegativeFloat = 0.1
    head_std: PositiveFloat | None = 2e-5
    crop_scale: tuple[float, float] = (0.08, 1.0)
    aa: str | None = "rand-m9-mstd0.5-inc1"
    aug_repeats: PositiveInt = 1
    reprob: NonNegativeFloat = 0.25
    mixup: NonNegativeFloat = 0.8
    cutmix: NonNegativeFloat = 1.0
    smoothing: NonNegativeFloat = 0.1
    model_ema_decay: NonNegativeFloat = 0.0
    layer_decay: PositiveFloat = 0.65
    pool_scale: NonNegativeFloat = 10.0
    epochs: PositiveFloat = 100.0
    warmup_epochs: NonNegativeFloat = 5.0
    batch_size: PositiveInt = 1024
    grad_accum_steps: PositiveInt = 1
    blr: PositiveFloat = 5e-4
    lr: PositiveFloat | None = None
    weight_decay: NonNegativeFloat = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad: PositiveFloat | None = None
    crop_pct: PositiveFloat | None = None
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
    eval_every: NonNegativeFloat = 1.0
    track: str | None = None


def train(options: Options) -> tuple[Run, float | None]:
    """One run -> it, and its top-1 accuracy at the end, unless it was a dry one."""
    options.lr = options.lr or options.blr * options.batch_size / 256
    options.workers = default_workers() if options.workers is None else options.workers
    data, test = open_labeled(options.data)
    names = class_names(data, test)
    run = Run("finetune", options)

    size = parse_size(options.img_size) if options.img_size else None
    network, start, normalize = start_from(options, img_size=size, global_pool=options.global_pool)
    _, own_size, _, own_crop = input_of(network)
    size = size or own_size
    shape = (options.in_chans, *size)
    judge = Evaluator(run, Classification(run, test, shape, normalize, options.crop_pct or own_crop, names))
    if options.eval_only:
        check_classes(network, names, options.model, options.data)
        return run, judge.alone(network.to(run.accelerator.device))

    random = options.from_scratch or not (options.init or has_weights(network_folder(options.model)))
    if random or not head_fits(network, names):
        start += "; " + new_head(network, len(names), None if random else options.head_std)
    elif not network.pretrained_cfg.get("label_names"):
        start += (
            f"; its own head, whose {len(names)} classes have no names: taken to be those of --data, in their order"
        )
    if options.grad_checkpointing:
        checkpoint_blocks(network)
    groups = layer_groups(network, options.weight_decay, options.layer_decay, options.pool_scale)
    transform = finetune_transform(size, options.crop_scale, options.aa, options.reprob, normalize)
    viewer = SampleLoader(transform, options.in_chans, 0, options.seed, (data.image, data.label), pixels=True)
    if options.dry_run:
        for part in (data, test):
            check_samples(part, replace(viewer, fields=(part.image, part.label)))
        run.print(start)
        show_groups(groups, options.lr, run.console)
        return run, None
    plan = replace(run.plan(data.length, options.batch_size, options.epochs), repeats=options.aug_repeats)
    run.write_config()
    run.print(f"{start}; {data.length:,} images, lr {options.lr:.3g}")

    loader = train_loader(data, viewer, plan, options.workers)
    mix = mixing(len(names), plan.micro_batch_size, options.mixup, options.cutmix, options.smoothing)
    criterion = SoftTargetCrossEntropy()
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas)
    schedule = cosine(optimizer, plan.steps, round(options.warmup_epochs * plan.steps_per_epoch))
    ema = ModelEmaV3(network, options.model_ema_decay, use_warmup=True) if options.model_ema_decay else None
    model, stepper = run.prepare(network, optimizer, **({"ema": ema.module} if ema else {}))

    for step, parts in run.steps(loader):
        schedule.step_update(step)
        for batch in parts:
            with run.accumulate(model):
                images, targets = mix(batch.images, batch.labels)
                loss = criterion(model(images), targets)
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
    return run, judge.finish(ema.module if ema else network)


@cli_entry
def main(argv: list[str] | None = None) -> None:
    """Parse the options, train, leave the run's directory."""
    options = parse_recipe(Options, __doc__ or "", recipe="finetune", argv=argv)
    run, tuned = train(options)
    if options.compare_scratch and tuned is not None and not options.eval_only:
        run.close()
        hint = f"Interrupted in the training from scratch: go on with --out {run.folder} --resume auto."
        if run.told:
            raise StoppedError(hint)
        beside = replace(options, out=f"{run.folder}/scratch", from_scratch=True, layer_decay=1.0)
        beside.resume = "auto" if options.resume else None
        try:
            run, scratch = train(beside)
        except (KeyboardInterrupt, StoppedError) as stop:
            raise type(stop)(hint) from stop
        assert scratch is not None  # it was no dry run
        run.print(f"\ntop-1 {tuned:.2f} % fine-tuned, {scratch:.2f} % from scratch: {tuned - scratch:+.2f} points")
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
