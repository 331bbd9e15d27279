"""Flags and YAML for flat dataclasses and plain functions, through jsonargparse, with hyphens in the flags."""

import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentParser

T = TypeVar("T")


class HyphenParser(ArgumentParser):
    """`batch_size` is written --batch-size on the command line and batch_size in YAML."""

    def add_argument(self, *names: Any, **kwargs: Any) -> Any:
        """argparse's, with hyphens."""
        hyphened = [n.replace("_", "-") if n.startswith("--") and n != "--print_config" else n for n in names]
        return super().add_argument(*hyphened, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """One sentence, and where to look."""
        first = " ".join(str(message).split())
        self.exit(2, f"{self.prog}: {first.rstrip('.')}; see --help.\n")


def presets() -> dict[str, Path]:
    """Shipped configurations by name."""
    folder = Path(str(resources.files("mimkit.recipes"))) / "presets"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def parse_recipe(options: type[T], description: str, small: str, argv: list[str] | None = None) -> T:
    """Options of a recipe from flags and `--config`, a YAML file or the name of a preset.

    The defaults are the published ones; without --model and --config the preset `small` stands in for them.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    shipped = presets()
    for i, word in enumerate(argv):  # the name of a preset becomes its path
        if word.startswith("--config="):
            name = word.removeprefix("--config=")
            argv[i] = f"--config={shipped.get(name, name)}"
        elif i and argv[i - 1] == "--config":
            argv[i] = str(shipped.get(word, word))
    if not any(word.split("=")[0] in ("--config", "--model", "--help", "-h") for word in argv):
        argv = ["--config", str(shipped[small]), *argv]
    parser = HyphenParser(description=f"{description}\n\nPresets for --config: {', '.join(shipped)}.")
    parser.add_argument("--config", action="config", help="YAML file, or the name of a preset")
    parser.add_class_arguments(options)
    values = parser.parse_args(argv)
    return options(**{k: v for k, v in values.items() if k != "config"})


def run_command(commands: dict[str, Callable[..., None]], description: str, version: str) -> None:
    """Parse `mimkit COMMAND --flags` and call the function of that name."""
    parser = HyphenParser(prog="mimkit", description=description)
    parser.add_argument("--version", action="version", version=version)
    subcommands = parser.add_subcommands(metavar="COMMAND", help="what to do")
    for name, function in commands.items():
        summary = (function.__doc__ or "").splitlines()[0]
        subparser = HyphenParser(prog=f"mimkit {name}", description=function.__doc__)
        subparser.add_function_arguments(function)
        subcommands.add_subcommand(name, subparser, help=summary)
    values = parser.parse_args()
    arguments = values[values.subcommand].as_dict()
    commands[values.subcommand](**arguments)
