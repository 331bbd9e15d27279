"""Flags and YAML for flat dataclasses and plain functions, through jsonargparse, with hyphens in the flags."""

import dataclasses
import inspect
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import docstring_parser
import jsonargparse
import yaml

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

jsonargparse.set_parsing_settings(import_path_denylist=["*"])  # a class_path in a config is never imported
T = TypeVar("T", bound="DataclassInstance")


class HyphenParser(jsonargparse.ArgumentParser):
    """`batch_size` is written --batch-size on the command line and batch_size in YAML.

    A parameter that is named around one of Python's keywords, `from_`, is written --from.
    """

    def add_argument(self, *names: Any, **kwargs: Any) -> Any:
        """argparse's, with hyphens."""
        hyphened = [
            n.rstrip("_").replace("_", "-") if n.startswith("--") and n != "--print_config" else n for n in names
        ]
        return super().add_argument(*hyphened, **kwargs)

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """jsonargparse's, but no word may hold the character 0, which no name of a file can."""
        values = super().parse_args(*args, **kwargs)
        if nul := [name for name, value in values.items() if isinstance(value, str) and "\0" in value]:
            self.error(f"{', '.join(nul)}: a NUL character is in it, which no name has")
        return values

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """One sentence, and where to look."""
        first = " ".join(str(message).split())
        self.exit(2, f"{self.prog}: {first.rstrip('.')}; see --help.\n")


def presets(recipe: str) -> dict[str, Path]:
    """Shipped configurations of a recipe, by name."""
    folder = Path(str(resources.files("mimkit.recipes"))) / "presets"
    return {file.stem: file for file in sorted(folder.glob(f"{recipe}_*.yaml"))}


def parse_recipe(options: type[T], description: str, recipe: str, argv: list[str] | None = None) -> T:
    """Options of a recipe from flags and `--config`, a YAML file or the name of a preset.

    The defaults are the published ones; without --model and --config the recipe's preset `_small` stands in for them,
    and where that preset's model is a run, also with this run as --model. A word that is true or false may stand alone.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    shipped = presets(recipe)
    true_or_false = bool, bool | None
    switches = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(options) if f.type in true_or_false}
    for i, word in enumerate(argv):
        if word in switches and argv[i + 1 : i + 2] not in (["true"], ["false"]):
            argv[i] = f"{word}=true"
    for i, word in enumerate(argv):  # the name of a preset becomes its path
        if word.startswith("--config="):
            name = word.removeprefix("--config=")
            argv[i] = f"--config={shipped.get(name, name)}"
        elif i and argv[i - 1] == "--config":
            argv[i] = str(shipped.get(word, word))
    given = dict(pairwise(argv)) | dict(word.split("=", 1) for word in argv if "=" in word)
    small = yaml.safe_load(shipped[f"{recipe}_small"].read_text())["model"]
    own = "/" in small and "--model" in given and Path(given["--model"]) == Path(small)
    if not any(name in given or name in argv for name in ("--config", "--help", "-h", *(() if own else ("--model",)))):
        argv = ["--config", str(shipped[f"{recipe}_small"]), *argv]
    summary = description.strip().splitlines()[0]
    parser = HyphenParser(description=f"{summary} Presets for --config: {', '.join(shipped)}.")
    parser.add_argument("--config", action="config", help="YAML file, or the name of a preset")
    parser.add_class_arguments(options)
    values = parser.parse_args(argv)
    return options(**{k: v for k, v in values.items() if k != "config"})


def run_command(functions: list[Callable[..., None]], description: str, version: str) -> None:
    """Parse `mimkit COMMAND --flags` and call the function of that name."""
    commands = {function.__name__: function for function in functions}
    summaries = {name: (function.__doc__ or "").splitlines()[0] for name, function in commands.items()}
    listing = "\n".join(f"  {name:12s} {summary}" for name, summary in summaries.items())
    text = f"{description}\n\n{listing}"
    top = ArgumentParser(prog="mimkit", description=text, formatter_class=RawDescriptionHelpFormatter)
    top.add_argument("--version", action="version", version=f"mimkit {version}")
    top.add_argument("command", choices=list(commands), help="`mimkit COMMAND --help` tells more")
    name = top.parse_args(sys.argv[1:2] or ["--help"]).command
    call(commands[name], f"mimkit {name}", sys.argv[2:])


def call(function: Callable[..., None], prog: str, argv: list[str]) -> None:
    """Call a function with its parameters as flags; one that is False by default is a switch, and
    one that is positional only stands without a flag.

    A function of `*words` gets them as they are.
    """
    if any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(function).parameters.values()):
        function(*argv)
        return
    parser = HyphenParser(prog=prog, description=(function.__doc__ or "").splitlines()[0])
    parameters = inspect.signature(function).parameters
    switches = [name for name, parameter in parameters.items() if parameter.default is False]
    placed = [name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_ONLY]
    parser.add_function_arguments(function, skip={*switches, *placed})
    explained = {p.arg_name: p.description for p in docstring_parser.parse(function.__doc__ or "").params}
    for name in placed:
        parser.add_argument(name, help=explained.get(name))
    for name in switches:
        parser.add_argument(f"--{name}", action="store_true", help=explained.get(name))
    values = parser.parse_args(argv).as_dict()
    named = {name: values[name.rstrip("_")] for name in parameters if name not in placed}
    function(*(values[name] for name in placed), **named)
