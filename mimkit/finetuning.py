"""Around a fine-tuning: a network out of any checkpoint, what its layers learn at, how it is judged, what it leaves."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor, nn

from mimkit.checkpoint import read_weights, write_model
from mimkit.conversion import as_hivit
from mimkit.converters.mae import split
from mimkit.data import Normalise, eval_loader, guarded
from mimkit.errors import UserError
from mimkit.evaluation import Scores, over, score
from mimkit.pretraining import comes_with_weights, create
from mimkit.sources import Source
from mimkit.training import Run
from mimkit.visualize import confusions, curves

# Where the forms of a network differ: in pre-training it ends in a norm of its own, and HiViT has no relative bias
FORMS = ("head.", "head_dist.", "fc_norm.", "norm.", "attn_pool.")
TABLE = "relative_position_bias_table"
PRETRAINED_ONLY = ("unit_form", "multi_scale", "fc_norm", "use_fc_norm", "num_classes", "global_pool")

# A network out of a checkpoint ---------------------------------------------------------------------------------------


def locate(name: str) -> str:
    """A run -> the folder of its network: encoder/ of a pre-training, best/ of a fine-tuning; else the name itself."""
    inside = [Path(name) / part for part in ("encoder", "best")]
    return next((str(folder) for folder in inside if (folder / "config.json").is_file()), name)


def load(
    name: str, init: str | None = None, scratch: bool = False, global_pool: str | None = None, **options: Any
) -> tuple[Any, str]:
    """A network with all of a checkpoint's weights, in the form that classifies.

    It is built with the checkpoint's own classes and form, and loaded strictly. Then, if that is the form of masked
    pre-training or its pooling is to be another one, its weights move into the other form, which differs at its end
    (`FORMS`) and, for HiViT, by relative position biases, which start at 0.

    Args:
        name: a run, a folder that timm can read, or a name in timm.
        init: a file of weights for it; an MAE's decoder in it is left out.
        scratch: leave the weights of the folder or name, and start at random.
        global_pool: as in timm; the checkpoint's own by default.
        options: timm's own.

    Returns:
        The network, and in words what it starts with.
    """
    name, channels = locate(name), options.get("in_chans", 3)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UserError(f"--model {name} holds no config.json: pass a run, its encoder/, or a converted checkpoint.")
    if name.startswith("runs/") and not Path(name).exists():
        raise UserError(f"--model {name} is not there: `accelerate launch recipes/mae_hivit.py` makes runs/mae_hivit.")
    if init and not scratch:
        own = _from_file(name, Path(init).expanduser(), options)
    else:
        own = create(name, weights=False if scratch else None, **options)
        known = own.pretrained_cfg["input_size"][0]
        if not scratch and comes_with_weights(name) and known not in (3, channels):
            raise UserError(f"--model {name} takes {known} channels, not {channels}: pass --in-chans {known}.")
    pool = global_pool or getattr(own, "global_pool", None)
    if not getattr(own, "unit_form", False) and pool == getattr(own, "global_pool", None):
        network, changed = own, ""
    else:
        network, changed = _reform(own, global_pool)
    at_random = scratch or not (init or comes_with_weights(name))
    architecture = network.pretrained_cfg["architecture"]
    where = "weights at random" if at_random else f"all of {init or name} but its head, if any{changed}"
    return network, f"{architecture}: {where}"


def _from_file(name: str, file: Path, options: dict[str, Any]) -> Any:
    if file.is_dir():
        raise UserError(f"--init {file} is a folder, which says itself what it holds: pass it as --model.")
    form: dict[str, Any] = {}
    if name.startswith("hivit"):
        target = as_hivit(name, file, None)[0]
        form, state = {**target.net._model_args, "num_classes": target.net.num_classes}, target.state
        form.pop("img_size", None)
    else:
        state = split(read_weights(file))[0]
        heads = create(name, weights=False, **options).pretrained_cfg.get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else heads
        counts = [len(state[f"{head}.weight"]) for head in heads if f"{head}.weight" in state]
        form = {"num_classes": counts[0] if counts else 0}
        if "fc_norm.weight" in state and "norm.weight" not in state:
            form["global_pool"] = "avg"
    return create(name, state=state, **form, **options)


def _reform(own: Any, global_pool: str | None) -> tuple[Any, str]:
    """The same weights in the supervised form, or with another pooling; -> it, and what is fresh or left, in words."""
    arguments = {key: value for key, value in own._model_args.items() if key not in PRETRAINED_ONLY}
    arguments |= {"global_pool": global_pool} if global_pool else {}
    network = create(own.pretrained_cfg["architecture"], weights=False, num_classes=0, **arguments)
    state, others = network.state_dict(), own.state_dict()
    fresh, left = state.keys() - others.keys(), others.keys() - state.keys()
    strange = [key for key in sorted(fresh | left) if not key.startswith(FORMS) and not key.endswith(TABLE)]
    if strange:
        raise UserError(f"--model: {', '.join(strange)} would be lost in another form: give its own --global-pool.")
    network.load_state_dict({key: others.get(key, tensor) for key, tensor in state.items()})
    network.pretrained_cfg.update(own.pretrained_cfg)
    tables = [key for key in fresh if key.endswith(TABLE)]
    words = sorted(fresh.difference(tables)) + ([f"{len(tables)} relative bias tables at 0"] if tables else [])
    kept = sorted(key for key in left if not key.startswith("head"))
    changes = {"fresh": words, "left out": kept}
    return network, "".join(f"; {how}: {', '.join(what)}" for how, what in changes.items() if what)


def classifier(model: str) -> Any:
    """A network that has been fine-tuned, from a run, a folder or a name of timm with a tag."""
    folder = locate(model)
    if not comes_with_weights(folder):
        raise UserError(f"--model {model} has no weights: pass a run of recipes/finetune.py, or a folder of a model.")
    network = create(folder)
    if not network.num_classes:
        raise UserError(f"--model {model} has no classifier, which recipes/finetune.py gives it: pass what that left.")
    return network


def new_head(network: Any, classes: int, std: float | None) -> None:
    """A head for so many classes; with `std`, from a normal distribution of that deviation (MAE: 2e-5) and bias 0."""
    network.reset_classifier(classes)
    head = network.get_classifier()
    for layer in head if isinstance(head, tuple) else (head,):
        if std is not None and hasattr(layer, "weight"):
            nn.init.trunc_normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)


def class_names(train: Source, test: Source) -> list[str]:
    """Of the labels; their numbers where they have no names."""
    column = train.label or ""
    names = getattr(train.rows.features[column], "names", None)
    return list(names or map(str, range(1 + max(*train.rows[column], *test.rows[test.label]))))


def check_classes(network: Any, names: list[str], model: str, data: str) -> None:
    """Refuse to judge a network by other classes than its own."""
    if network.num_classes != len(names):
        raise UserError(
            f"--model {model} knows {network.num_classes} classes, and --data {data} has {len(names)}: pass the data "
            "that it was trained for, or train it on these."
        )
    known = network.pretrained_cfg.get("label_names")
    if known and list(known) != names:
        odd = next(pair for pair in zip(known, names, strict=True) if pair[0] != pair[1])
        raise UserError(f"--model {model} has other classes than --data {data}: {odd[0]} there is {odd[1]} here.")


def mixing(
    classes: int, share: int, mixup: float, cutmix: float, smoothing: float
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images (b c H W), labels (b)) -> (images mixed by timm, soft labels (b classes)).

    Args:
        share: images that are mixed with each other, those of one forward pass.
        mixup, cutmix: their alphas; 0 for none.
    """
    if not (mixup or cutmix):
        return lambda images, labels: (images, mixup_target(labels, classes, smoothing=smoothing))
    if share % 2:
        raise UserError(f"Mixup pairs images, and there are {share} in a part of a step: choose an even --batch-size.")
    return Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=classes)


# What it learns at ---------------------------------------------------------------------------------------------------


def show_groups(groups: list[dict[str, Any]], lr: float) -> None:
    """Print the table of layer decay: each group of parameters, its layer's id, its scale and what results."""
    table = Table("parameters", "tensors", "layer", "scale", "lr", "weight decay")
    for group in groups:
        names = group["param_names"]
        shown = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
        numbers = f"{group['lr_scale']:.6g}", f"{lr * group['lr_scale']:.3g}", f"{group['weight_decay']:g}"
        table.add_row(shown, str(len(names)), str(group["layer"]), *numbers)
    Console(width=140).print(table)


# How it is judged ----------------------------------------------------------------------------------------------------


class Judge:
    """Accuracy of a network on labelled images, counted over all processes.

    Args:
        shape: of the input, (c H W).
        crop_pct: the input is the middle of an image that is 1 / crop_pct times as large.
        names: of the classes.
    """

    def __init__(
        self,
        run: Run,
        test: Source,
        shape: tuple[int, int, int],
        normalise: Normalise,
        crop_pct: float,
        names: Sequence[str],
    ):
        self.run, self.test, self.shape, self.normalise = run, test, shape, normalise
        self.crop_pct, self.names = crop_pct, list(names)
        self.latest: Scores | None = None

    def score(self, network: Any) -> Scores:
        """Of all test images."""
        run, accelerator = self.run, self.run.accelerator
        loader = eval_loader(
            self.test,
            self.shape[1:],
            self.shape[0],
            batch_size=128,
            workers=run.options.workers,
            crop_pct=self.crop_pct,
            share=(accelerator.process_index, accelerator.num_processes),
        )
        batches = guarded(loader, run.options.max_bad * self.test.length, run.print)
        with accelerator.autocast():
            found = over(network, batches, self.normalise, network)
        counts = [accelerator.reduce(x.to(accelerator.device), "sum").cpu() for x in score(found.x, found.y)]
        self.latest = Scores(*counts)
        return self.latest

    def __call__(self, step: int, network: Any, ema: Any = None) -> None:
        """Measure, print and log; write last/, and best/ if it is. Where weights are averaged it is they that count."""
        before = max((line["top1"] for line in self.run.metrics() if "top1" in line), default=-1.0)
        if ema:
            raw = self.score(network).top1
            self.run.log(step, top1_raw=raw)
            self.run.print(f"top-1 {raw:.2f} % by the weights as they are; by their average")
        scores = self.measure(step, ema or network)
        self.write(ema or network, "last")
        if scores.top1 > before:
            self.write(ema or network, "best")
        self.run.accelerator.wait_for_everyone()

    def measure(self, step: int, network: Any) -> Scores:
        """Print and log."""
        scores = self.score(network)
        self.run.log(step, top1=scores.top1, top5=scores.top5)
        self.run.print(f"after {step} steps: {self.words(scores)}")
        return scores

    def words(self, scores: Scores) -> str:
        """In a line."""
        top5 = f", top-5 {scores.top5:.2f} %" if len(self.names) > 5 else ""
        return f"top-1 {scores.top1:.2f} %{top5} of {scores.confusion.sum()} test images"

    def write(self, network: Any, name: str) -> None:
        """Into the run's directory, in timm's layout, with the names of its classes."""
        if self.run.accelerator.is_main_process:
            mean, std = self.normalise.values
            about = {"input_size": self.shape, "crop_pct": self.crop_pct, "interpolation": "bicubic"}
            write_model(network, self.run.folder / name, mean=mean, std=std, label_names=self.names, **about)

    def alone(self, network: Any) -> float:
        """Judge a network as it is; with --out leave the picture. -> top-1 accuracy"""
        scores = self.score(network)
        self.run.print(self.words(scores))
        if self.run.options.out:
            self.draw(scores)
            self.run.print(f"wrote {self.run.folder}/confusion.png")
        return scores.top1

    def draw(self, scores: Scores) -> None:
        """The confusion of classes, and how training went, where there was any."""
        if self.run.accelerator.is_main_process:
            confusions(scores.confusion, self.names, self.run.folder / "confusion.png")
            if metrics := self.run.metrics():
                curves(metrics, self.run.folder / "curves.png")

    def finish(self, network: Any) -> float:
        """The pictures, and what to do next. -> top-1 accuracy at the end"""
        run, scores = self.run, self.latest or self.score(network)
        self.draw(scores)
        best = max((line for line in run.metrics() if "top1" in line), key=lambda line: line["top1"])
        run.print(
            f"\nwrote {run.folder}/: last/ ({scores.top1:.2f} %) and best/ ({best['top1']:.2f} % after {best['step']} "
            "steps, chosen by the test images) for timm,\n"
            "confusion.png, curves.png, metrics.jsonl, config.yaml, checkpoints/\n"
            f"next: mimkit predict --model {run.folder}/last --images FOLDER\n"
            f"      mimkit export --model {run.folder}/last --out model.onnx"
        )
        return scores.top1
