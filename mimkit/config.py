"""Options: shared groups of flags, presets, and the parser of recipes and commands (jsonargparse).

A recipe's options are one flat dataclass, composed of the groups below. A group documents each of its flags once, and a
recipe may give a flag another default.
"""

import argparse
import dataclasses
import inspect
import re
import sys
import typing
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import docstring_parser
import jsonargparse
import yaml

from mimkit.errors import UserError, did_you_mean, shorten
from mimkit.files import read_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    PositiveInt: TypeAlias = int
    NonNegativeInt: TypeAlias = int
    PositiveFloat: TypeAlias = float
    NonNegativeFloat: TypeAlias = float
else:  # the same with a range, which jsonargparse checks
    from jsonargparse.typing import NonNegativeInt as NonNegativeInt
    from jsonargparse.typing import PositiveInt as PositiveInt
    from jsonargparse.typing import restricted_number_type

    large = ("<", 1e9)  # steps are counted by products of such numbers, which must stay finite
    PositiveFloat = restricted_number_type("PositiveFloatBelow1e9", float, [(">", 0), large])
    NonNegativeFloat = restricted_number_type("NonNegativeFloatBelow1e9", float, [(">=", 0), large])

PLAIN_WORDS = {
    PositiveInt: "a whole number of at least 1",
    NonNegativeInt: "a whole number of at least 0",
    PositiveFloat: "a number above 0 and below 1e9",
    NonNegativeFloat: "a number of at least 0 and below 1e9",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
    list[NonNegativeInt]: "a list of whole numbers, such as 0,255",
    list[float]: "a list of numbers, such as [0.5,0.25]",
    tuple[float, float]: "two numbers, such as [0.1,0.9]",
    tuple[int, int]: "two whole numbers, such as [4,8]",
    dict[str, Any]: "names with values, such as {name: 3}",
}
REFUSED_VALUE = re.compile(
    r".*Given value: (.+)$|Got value: (.+)$|[:,] '(.+)'$|: (\S+) (?:does not conform|not an integer)"
)
jsonargparse.set_parsing_settings(import_path_denylist=["*"])  # a class_path in a config is never imported
T = TypeVar("T", bound="DataclassInstance")


# Groups of options ---------------------------------------------------------------------------------------------------


@dataclass
class RunOptions:
    """Run: its directory, checkpoints, precision and guards.

    Args:
        out: Directory of the run. Default: runs/NAME of the recipe, or the next free runs/NAME-2, ...
        resume: Continue from the last checkpoint if there is one ('auto'), or the run in this directory. Trust the
            checkpoints of ZeRO and FSDP as you trust code: the engine unpickles its files.
        seed: Seed of everything that is random.
        precision: auto, fp32, bf16 or fp16.
        compile: Use torch.compile.
        grad_accum_steps: Number of gradient accumulation steps.
        save_every: Epochs between checkpoints. One is always written at the end.
        keep: Number of latest checkpoints to keep.
        keep_every: Keep every Nth checkpoint permanently. 0 disables this.
        max_bad: Fraction of images that may be impossible to decode.
        max_spike: Skip a step whose loss exceeds this multiple of the running mean. Non-finite steps are always
            skipped.
        track: Also log to tensorboard, wandb or trackio.
        threads: CPU threads of each training process. Default: OMP_NUM_THREADS, else its share of the cores.
    """

    out: str | None = None
    resume: str | None = None
    seed: NonNegativeInt = 0
    precision: str = "auto"
    compile: bool = False
    grad_accum_steps: PositiveInt = 1
    save_every: NonNegativeFloat = 10.0
    keep: PositiveInt = 2
    keep_every: NonNegativeInt = 0
    max_bad: NonNegativeFloat = 0.01
    max_spike: PositiveFloat | None = None
    track: str | None = None
    threads: PositiveInt | None = None


@dataclass
class DataOptions:
    """Data: what is loaded, and how many images at once.

    Args:
        data: Images: see docs/data.md.
        parts: Parts of the data to use, separated by commas, such as train,unlabeled. Default: where labels are needed,
            train, and val (else test) to evaluate on; otherwise all images.
        image_column: Column of the images in tables. Default: the first one with image files.
        label_column: Column of the labels, or of the masks, in tables. Default: found by its type and name.
        value_range: Values of floating-point images that become 0 and 1.
        batch_size: Images per step, over all processes and gradient accumulation steps.
        workers: Data loading processes per training process. Default: one core is left for training.
        img_size: Input size in pixels: 224 or HEIGHTxWIDTH.
        crop_scale: Range of the fraction of the image's area that a random crop shows.
    """

    data: str = "sample"
    parts: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    value_range: tuple[float, float] = (0.0, 1.0)
    batch_size: PositiveInt = 256
    workers: NonNegativeInt | None = None
    img_size: int | str | None = None
    crop_scale: tuple[float, float] = (0.2, 1.0)


@dataclass
class ModelOptions:
    """Model: the network, and the images that it takes.

    Args:
        model: The network: a name in timm, or a folder. See `mimkit models` and docs/.
        model_args: Further arguments of the network in timm, such as {embed_dim: 160}.
        in_chans: Number of channels of the images.
        mean: Mean of each channel in 0-1, or one for all. Default: the model's own, else ImageNet's.
        std: Standard deviation of each channel, or one for all. Default: as for the mean.
        grad_checkpointing: Recompute activations in the backward pass to save memory.
    """

    model: str = ""
    model_args: dict[str, Any] = field(default_factory=dict)
    in_chans: PositiveInt = 3
    mean: list[float] | None = None
    std: list[float] | None = None
    grad_checkpointing: bool = False


@dataclass
class ScheduleOptions:
    """Schedule: how long to train, and at what learning rate.

    Args:
        epochs: Passes over the data; may be fractional.
        warmup_epochs: Epochs in which the learning rate rises linearly from 0.
        lr: Peak learning rate.
        weight_decay: Weight decay of matrices; vectors have none.
    """

    epochs: PositiveFloat = 100.0
    warmup_epochs: NonNegativeFloat = 5.0
    lr: PositiveFloat | None = None
    weight_decay: NonNegativeFloat = 0.05


@dataclass
class AdamWOptions(ScheduleOptions):
    """Optimizer: AdamW.

    Args:
        betas: Decay rates of AdamW's moments.
        clip_grad: Maximum norm of the gradient. null disables clipping.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad: PositiveFloat | None = None


@dataclass
class PretrainOptions(RunOptions, AdamWOptions, DataOptions, ModelOptions):
    """Pre-training: what is masked, and how the encoder is measured.

    Args:
        init: Weights to start from: a run, or a file or folder of an encoder, with or without its decoder.
        dry_run: Check data, speed, memory and disk space, and stop. `mimkit doctor` passes this.
        patch_size: Patch size in pixels. Default: the model's own. A mask unit is 1 patch of a plain ViT, 4 x 4 patches
            of a HiViT, and 8 x 8 patches of an SViT or a Swin.
        mask_ratio: Fraction of units to mask.
        blr: Peak learning rate for a batch of 256; --lr is blr x batch_size / 256 if it is not given, or follows from
            the batch size and the published settings if neither is (docs/training.md).
        streaming: Read the data sequentially instead of preparing it first.
        knn_every: Epochs between measurements of kNN accuracy. 0: at the start and the end, if there are labels.
    """

    init: str | None = None
    dry_run: bool = False
    img_size: int | str = 224
    patch_size: PositiveInt | None = None
    mask_ratio: float = 0.75
    blr: PositiveFloat = 1e-4
    streaming: bool = False
    save_every: NonNegativeFloat = 20.0
    knn_every: NonNegativeFloat = 0.0


@dataclass
class FineTuneOptions(RunOptions, AdamWOptions, DataOptions, ModelOptions):
    """Fine-tuning: what a network starts from, how its layers learn, and how it is evaluated.

    Args:
        init: A file of weights for the model, in its own names. `mimkit convert` reads other files.
        from_scratch: Ignore the weights, and start at random.
        eval_only: Evaluate the model without training.
        dry_run: Check a few images, print the learning rate of each layer, and stop.
        drop_path: Stochastic depth rate of the last block.
        model_ema_decay: Decay of a moving average of the weights, which begins at 0. 0 disables averaging.
        layer_decay: Factor of the learning rate from each layer to the one below.
        pool_scale: Factor of the learning rate of an HPViT's pools, which belong to no layer.
        eval_every: Epochs between evaluations on the validation images. 0: at the end.
    """

    model: str = "vit_base_patch16_224.mae"
    init: str | None = None
    from_scratch: bool = False
    eval_only: bool = False
    dry_run: bool = False
    drop_path: NonNegativeFloat = 0.1
    model_ema_decay: NonNegativeFloat = 0.0
    layer_decay: PositiveFloat = 0.65
    pool_scale: NonNegativeFloat = 10.0
    eval_every: NonNegativeFloat = 1.0


@dataclass
class DenseOptions(FineTuneOptions):
    """Dense prediction: sizes of images, and what the head receives.

    Args:
        short_side: Length of the short side at scale 1, in training and in evaluation. Default: that of the run in
            --model, else the recipe's.
        scales: Range of the random scale.
        neck: What the head receives: the maps of the stages (maps), a pyramid of the last map (pyramid), both, or auto.
        window: Maximum side, in tokens, of attention windows for large images; the last block of each quarter stays
            global. 0: the model as it is.
    """

    short_side: PositiveInt | None = None
    scales: tuple[float, float] = (0.5, 2.0)
    neck: str = "auto"
    window: NonNegativeInt = 0


def options_of(group: type, options: Any) -> dict[str, Any]:
    """Return the options of a group by name, such as the keyword arguments of `Run` for `RunOptions`."""
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(group)}


# Parsing -------------------------------------------------------------------------------------------------------------


class HyphenParser(jsonargparse.ArgumentParser):
    """A parser whose options have hyphens on the command line, --batch-size, and underscores in YAML, batch_size.

    On the command line, underscores are understood too. A parameter whose name avoids a Python keyword, `from_`,
    becomes --from. Errors tell in plain words what was expected, and name options that resemble a misspelled one.
    """

    def add_argument(self, *names: Any, **kwargs: Any) -> Any:
        """Add an argument as argparse does, with hyphens in its name."""
        hyphened = [
            n.rstrip("_").replace("_", "-") if n.startswith("--") and n != "--print_config" else n for n in names
        ]
        return super().add_argument(*hyphened, **kwargs)

    def _parse_optional(self, arg_string: str) -> Any:
        """Read a flag in the other spelling, --batch_size or --print-config, as the one that was added."""
        if re.match(r"-[\d.]", arg_string):  # a negative number, or a list that begins with one
            return None
        flag, rest = re.match(r"([^=.]*)(.*)", arg_string, re.DOTALL).groups()  # type: ignore[union-attr]
        words = flag.removeprefix("--")
        spellings = [f"--{words.replace('_', '-')}", f"--{words.replace('-', '_')}"] if flag != words else []
        known = next((spelling for spelling in spellings if spelling in self._option_string_actions), flag)
        return super()._parse_optional(known + rest)

    def _get_values(self, action: Any, arg_strings: list[str]) -> Any:
        """Read 0.9,0.95 as the list [0.9,0.95]."""
        kind = getattr(action, "_typehint", None)
        takes_list = {list, tuple} & {typing.get_origin(each) for each in (kind, *typing.get_args(kind))}
        if takes_list and len(arg_strings) == 1 and re.fullmatch(r"[^\[(].*,.*", arg_strings[0]):
            arg_strings = [f"[{arg_strings[0]}]"]
        return super()._get_values(action, arg_strings)

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """Parse as jsonargparse does, but refuse NUL characters, which no file name can contain."""
        values = super().parse_args(*args, **kwargs)
        if nul := [name for name, value in values.items() if isinstance(value, str) and "\0" in value]:
            self.error(f"{', '.join(nul)}: contains a NUL character, which no name can contain")
        return values

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Exit with code 2 and one sentence, which points to --help."""
        sentence = " ".join(str(message).split()).rstrip(".")
        flags = {flag: action for action in self._actions for flag in action.option_strings}
        if wrong := re.match(r'(?:Parser key "|argument --)([\w.-]+)["/].*?: ', sentence):
            flag = "--" + wrong[1].replace("_", "-")
            value = next((v for v in (REFUSED_VALUE.findall(sentence) or [()])[-1] if v), None)
            if flag in flags and value is not None:
                sentence = f"{flag} {value}: expected {_in_words(flags[flag])}"
        elif unknown := re.match(r"unrecognized arguments: (--[^ =.]+)|Option '([^'.]+)' is not accepted", sentence):
            sentence += "." + did_you_mean("--" + (unknown[1] or unknown[2]).strip("-").replace("_", "-"), flags)
        end = " See --help." if sentence.endswith("?") else "; see --help."
        self.exit(2, shorten(f"{self.prog}: {sentence.rstrip('.')}{end}") + "\n")


def _in_words(kind: Any) -> str:
    """Describe the values that an option or a type takes."""
    if isinstance(kind, jsonargparse.ActionYesNo):
        return "true or false"
    kind = getattr(kind, "_typehint", kind)
    alternatives = typing.get_args(kind) if kind not in PLAIN_WORDS else ()
    return ", or ".join(map(_in_words, alternatives)) or PLAIN_WORDS.get(kind, str(kind))


class Switch(jsonargparse.ActionYesNo):
    """An option that is true or false: --flag, --flag true, --flag false, or --no-flag. Its errors name it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"_no_prefix": "no-"} | kwargs if kwargs else {"no_prefix": "no-"})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Set the option, or make the action of an option, which jsonargparse does in the same method."""
        return super().__call__(*args, **kwargs) if args else Switch(**kwargs)

    def _check_type(self, value: Any) -> bool:
        try:
            return super()._check_type(value)
        except TypeError as error:
            raise TypeError(f'Parser key "{self.dest}": Got value: {value}') from error


class CommandParser(ArgumentParser):
    """A parser of the word after `mimkit`."""

    def error(self, message: str) -> Any:
        """Exit with code 2 and one sentence, which points to --help."""
        self.exit(2, f"{shorten(f'{self.prog}: {message}; see --help.')}\n")


class HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Help with defaults, and without the names of types and the --no- forms, which fill the screen."""

    def _get_help_string(self, action: Any) -> str:
        text = " ".join((action.help or "").split())
        shown = action.default not in (None, argparse.SUPPRESS, {}) and "Default:" not in text
        return f"{text} (default: %(default)s)" if shown and action.option_strings else text

    def _format_action_invocation(self, action: Any) -> str:
        if isinstance(action, jsonargparse.ActionYesNo):
            return f"{action.option_strings[0]} [true|false]"
        return super()._format_action_invocation(action)


def presets(recipe: str) -> dict[str, Path]:
    """Return the shipped configurations of a recipe by name."""
    folder = Path(str(resources.files("mimkit.recipes"))) / "presets"
    return {file.stem: file for file in sorted(folder.glob(f"{recipe}_*.yaml"))}


class PresetFile(jsonargparse.ActionConfigFile):
    """--config: a YAML file, or the name of a preset."""

    shipped: typing.ClassVar[dict[str, Path]] = {}

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Replace the name of a preset by its file."""
        if "\0" in str(values):
            parser.error("config: contains a NUL character, which no name can contain")
        if values not in self.shipped and not Path(values).is_file():
            hint = did_you_mean(Path(values).name, self.shipped) or f" Presets: {', '.join(self.shipped)}."
            parser.error(f"--config {values}: expected a YAML file or the name of a preset.{hint}")
        super().__call__(parser, cfg, str(self.shipped.get(values, values)), option_string)


def default_preset(shipped: dict[str, Path], recipe: str, small: str, argv: list[str]) -> Path | None:
    """Return the preset whose values are the defaults of this command line, if there is one.

    Without --model it is the small preset. With --model it is the preset that has the published settings of the model's
    family, such as mae_vit, where they differ from the recipe's. With --config it is none.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--model", "--config"):
        first.add_argument(flag, nargs="?")  # the parser of the recipe reports a missing value
    given = first.parse_known_args(argv)[0]
    if given.config or {"-h", "--help"} & {*argv}:
        return None
    if given.model is None:
        return shipped[small]
    if Path(given.model) == Path(yaml.safe_load(shipped[small].read_text())["model"]) and "/" in given.model:
        return shipped[small]  # the run that the small preset starts from
    config = Path(given.model) / "config.json"
    name = read_json(config).get("architecture", "") if config.is_file() else given.model
    family = re.match(r"[a-z]*", str(name))
    return shipped.get(f"{recipe}_{family[0]}") if family else None


class Parsed(typing.NamedTuple, typing.Generic[T]):
    """The options of a command line."""

    options: T
    given: set[str]  # names of the options that the user or a preset set
    published: T  # the defaults of the model's family


def parse_recipe(
    options: type[T], description: str, recipe: str, argv: list[str] | None = None, small: str | None = None
) -> T:
    """Return the options of `parse_given`."""
    return parse_given(options, description, recipe, argv, small).options


def parse_given(
    options: type[T], description: str, recipe: str, argv: list[str] | None = None, small: str | None = None
) -> Parsed[T]:
    """Parse the options of a recipe from flags and `--config`, a YAML file or the name of a preset.

    The defaults of `options` are the published ones. Without --model and --config, the small preset replaces them.

    Args:
        options: a flat dataclass composed of groups.
        recipe: prefix of the names of its presets.
        argv: sys.argv[1:] by default.
        small: name of the small preset; RECIPE_small by default.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    shipped = presets(recipe)
    summary = f"{description.strip().splitlines()[0]} Presets for --config: {', '.join(shipped)}."
    parser = HyphenParser(usage="%(prog)s [options]", description=summary, formatter_class=HelpFormatter)
    action = type("PresetFile", (PresetFile,), {"shipped": shipped})
    parser.add_argument("--config", action=action, help="YAML file, or the name of a preset.")
    preset = default_preset(shipped, recipe, small or f"{recipe}_small", argv)
    parser.default_config_files = [str(preset)] if preset else []
    hints, fields = typing.get_type_hints(options), {f.name: f for f in dataclasses.fields(options)}
    groups = [kind for kind in reversed(options.__mro__) if dataclasses.is_dataclass(kind)]
    added: set[str] = set()
    for kind in groups:
        doc = docstring_parser.parse(kind.__doc__ or "")
        title = "Recipe" if kind is options else doc.short_description or ""
        group = parser.add_argument_group(title.rstrip("."))
        explained = {p.arg_name: " ".join((p.description or "").split()) for p in doc.params}
        for name in inspect.get_annotations(kind):
            if name not in added:
                _add_option(group, fields[name], hints[name], explained[name])
            added.add(name)
    values, defaults = parser.parse_args(argv), parser.get_defaults()
    files = [Path(str(file)) for file in values.config or []]
    named = {re.split("[=.]", word)[0].removeprefix("--").removeprefix("no-") for word in argv if word[:2] == "--"}
    named = named.union(*(yaml.safe_load(file.read_text()) for file in files))
    if preset and preset == shipped.get(small or f"{recipe}_small"):
        named |= set(yaml.safe_load(preset.read_text()))
    named = {name.replace("-", "_") for name in named}
    abbreviated = tuple(named - fields.keys())
    given = {field for field in fields if field in named or field.startswith(abbreviated)}
    folders = [file.parent for file in files]
    if folders and (folders[-1] / "checkpoints").is_dir() and not any(re.match("--out?(=|$)", word) for word in argv):
        values["out"] = str(folders[-1])  # the run that the file lies in, wherever it was moved to
    parsed, published = (options(**{name: found[name] for name in fields}) for found in (values, defaults))
    if repeated := {"img_size", "patch_size", "in_chans"} & fields.keys() & values.get("model_args", {}).keys():
        raise UserError(f"--model-args has {', '.join(sorted(repeated))}, which follows from another option. Omit it.")
    return Parsed(parsed, given, published)


def _add_option(group: Any, option: "dataclasses.Field[Any]", hint: Any, explained: str) -> None:
    flag = f"--{option.name.replace('_', '-')}"
    factory = option.default_factory
    default = option.default if factory is dataclasses.MISSING else factory()
    if hint in (bool, bool | None):  # --flag, --flag true, --flag false and --no-flag
        group.add_argument(flag, action=Switch(), nargs="?", default=default, help=explained)
    else:
        group.add_argument(flag, type=hint, default=default, help=explained)


def run_command(functions: list[Callable[..., None]], description: str, version: str) -> None:
    """Parse `mimkit COMMAND --flags`, and call the function of that name."""
    commands = {function.__name__: function for function in functions}
    summaries = {name: (function.__doc__ or "").splitlines()[0] for name, function in commands.items()}
    listing = "\n".join(f"  {name:12s} {summary}" for name, summary in summaries.items())
    text = f"{description}\n\n{listing}"
    top = CommandParser(prog="mimkit", description=text, formatter_class=RawDescriptionHelpFormatter)
    top.add_argument("--version", action="version", version=f"mimkit {version}")
    top.add_argument("command", help="`mimkit COMMAND --help` describes its options.")
    name = top.parse_args(sys.argv[1:2] or ["--help"]).command
    if name not in commands:
        hint = did_you_mean(name, commands) or f" Commands: {', '.join(commands)}."
        raise UserError(shorten(f"mimkit {name}: there is no such command.{hint}"))
    call(commands[name], f"mimkit {name}", sys.argv[2:])


def call(function: Callable[..., None], prog: str, argv: list[str]) -> None:
    """Call a function with its parameters as flags.

    A parameter that is False by default becomes a switch, and a positional-only one an argument without a flag. A
    function of `*words` receives all arguments as they are.
    """
    if any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(function).parameters.values()):
        function(*argv)
        return
    parameters = inspect.signature(function).parameters
    switches = [name for name, parameter in parameters.items() if parameter.default is False]
    placed = [name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_ONLY]
    summary, usage = (function.__doc__ or "").splitlines()[0], " ".join([prog, "[options]", *placed])
    parser = HyphenParser(prog=prog, usage=usage, formatter_class=HelpFormatter, description=summary)
    parser.add_function_arguments(function, skip={*switches, *placed}, as_group=False)
    explained = {p.arg_name: p.description for p in docstring_parser.parse(function.__doc__ or "").params}
    for name in placed:
        parser.add_argument(name, help=explained.get(name))
    for name in switches:
        parser.add_argument(f"--{name}", action="store_true", help=explained.get(name))
    values = parser.parse_args(argv).as_dict()
    named = {name: values[name.rstrip("_")] for name in parameters if name not in placed}
    function(*(values[name] for name in placed), **named)
