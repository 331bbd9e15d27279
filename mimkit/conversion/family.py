"""Checkpoint families: how a library's tensor names and layouts translate into timm's."""

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import timm
import torch
from torch import Tensor

from mimkit.conversion.report import Row
from mimkit.errors import UserError, some
from mimkit.io.hub import local_path
from mimkit.io.weights import State
from mimkit.models.factory import check_name

OWN = ("hivit", "svit")  # families of networks that mimkit implements; the networks' names start with the family's name
MODULES = ("vision_transformer", "deit", "beit", "eva", "vision_transformer_sam")  # timm's modules with plain ViTs


class Remap:
    """Moves a file's tensors to timm's names and records what happened to each of them.

    A family's `remap` function calls the methods below. Tensors that it leaves in `remaining` are an error.

    Args:
        state: the file's tensors.
        wanted: names of the target network's tensors.
    """

    def __init__(self, state: State, wanted: set[str]):
        self.remaining, self.wanted = dict(state), wanted
        self.found: State = {}
        self.rows: list[Row] = []

    def take(self, pattern: str) -> list[tuple[re.Match[str], Tensor]]:
        """Remove and return the remaining tensors whose whole name matches the pattern."""
        matches = [match for name in self.remaining if (match := re.fullmatch(pattern, name))]
        return [(match, self.remaining.pop(match[0])) for match in matches]

    def put(self, action: str, origins: tuple[str, ...], target: str, tensor: Tensor, why: str = "") -> None:
        """Add a tensor under its name in timm.

        Raises:
            UserError: another tensor already has this name.
        """
        if target in self.found:
            raise UserError(f"{some(origins)}: the file already has a {target}. Pass a file with one network.")
        self.found[target] = tensor
        self.rows.append(Row(action, origins, target, why))

    def rename(self, pattern: str, to: str, change: Callable[[Tensor], Tensor] | None = None, why: str = "") -> None:
        """Rename tensors one to one, e.g. r"layer\\.(\\d+)\\.(.*)" to r"blocks.\\1.\\2", and optionally change them."""
        for match, tensor in self.take(pattern):
            target = match.expand(to)
            action = "copied" if target == match[0] and change is None else "renamed"
            try:
                changed = change(tensor) if change else tensor
            except (RuntimeError, LookupError, TypeError, ValueError) as error:
                raise UserError(
                    f"{match[0]} has the shape {tuple(tensor.shape)}, which no network of this family has. Get another "
                    "copy of the file."
                ) from error
            self.put(action, (match[0],), target, changed, why)

    def rename_all(self, table: Mapping[str, str]) -> None:
        """Apply several renames in order."""
        for pattern, to in table.items():
            self.rename(pattern, to)

    def fuse(self, pattern: str, to: str, parts: tuple[str, ...]) -> None:
        """Concatenate several tensors along the first axis.

        The pattern's group `part` says which of `parts` a tensor is.

        Raises:
            UserError: a part is missing.
        """
        groups: dict[str, dict[str, tuple[str, Tensor]]] = {}
        for match, tensor in self.take(pattern):
            groups.setdefault(match.expand(to), {})[match["part"]] = (match[0], tensor)
        for target, group in groups.items():
            if missing := set(parts) - group.keys():
                raise UserError(f"The file has no {', '.join(sorted(missing))} for {target}. Get a complete copy.")
            names, tensors = zip(*(group[part] for part in parts), strict=True)
            self.put("renamed", names, target, torch.cat(tensors), f"{', '.join(parts)} fused")

    def drop(self, pattern: str, why: str, known: Callable[[Tensor], bool] | None = None) -> None:
        """Drop tensors that the target network does not have.

        Args:
            known: returns whether a tensor holds the values that the target network computes instead.

        Raises:
            UserError: a tensor holds other values, so the target network would not compute what the file's does.
        """
        for match, tensor in self.take(pattern):
            if known and not known(tensor):
                raise UserError(
                    f"{match[0]} does not hold the values that our network computes instead ({why}). Get another copy "
                    "of the file."
                )
            self.rows.append(Row("dropped", (match[0],), None, why))

    def skip(self, name: str, why: str) -> None:
        """Drop a tensor that `take` returned."""
        self.rows.append(Row("dropped", (name,), None, why))

    def split(self, name: str, parts: Mapping[str, Tensor], why: str) -> None:
        """Add the parts of a tensor that `take` returned, under their names in timm."""
        self.found |= parts
        self.rows.append(Row("renamed", (name,), ", ".join(parts), why))

    def make(self, target: str, tensor: Tensor, why: str) -> None:
        """Add a tensor that the file does not have."""
        self.put("fresh", (), target, tensor, why)


@dataclass(frozen=True)
class Family:
    """A layout of checkpoints. Each module of converters/ (installed as mimkit.converters) defines one as FAMILY, named
    after the module.

    Args:
        title: origin of such files, usually a repository.
        marks: patterns that identify the family. Every file of it has, for each pattern, a tensor whose whole name
            matches.
        remap: moves a file's tensors to timm's names.
        options: returns the arguments of `plain_vit` that no tensor shows, given the file's state and the config.json
            next to it. For a family in OWN it returns the arguments of our network, given the state under our names.
        data: data configuration (mean, std) that all files of the family share.
        reader: library that can read the file independently: 'timm', 'transformers', or None.
        parity_test: test in tests/conversion/test_converters.py that covers the family if there is no reader.
        aliases: short names of released networks, and their names in timm.
    """

    title: str
    marks: tuple[str, ...]
    remap: Callable[[Remap], None]
    options: Callable[[State, dict[str, Any]], dict[str, Any]] = lambda state, config: {}
    data: Mapping[str, Any] = field(default_factory=dict)
    reader: str | None = "timm"
    parity_test: str = "test_own_layouts"
    aliases: Mapping[str, str] = field(default_factory=dict)

    def fits(self, state: State) -> bool:
        """Return whether a file looks like one of this family."""
        return all(any(re.fullmatch(mark, name) for name in state) for mark in self.marks)


@cache
def families() -> dict[str, Family]:
    """Return all families by name."""
    import mimkit.converters as package

    modules = {info.name: f"{package.__name__}.{info.name}" for info in pkgutil.iter_modules(package.__path__)}
    return {name: importlib.import_module(module).FAMILY for name, module in modules.items()}


def check_model(name: str) -> None:
    """Refuse a `--model` that is no folder and no network, before anything else is done.

    Raises:
        UserError: the name is unknown, or an alias of `mimkit convert`. The message says what to type instead.
    """
    network = next((family.aliases[name] for family in families().values() if name in family.aliases), None)
    if network and not local_path(name).exists():
        raise UserError(f"--model {name} is an alias that only `mimkit convert` takes. Pass --model {network} instead.")
    check_name(name)


def own_family(name: str) -> str | None:
    """Return the family of a network that mimkit implements (HiViT, SViT), or None for any other name."""
    return next((layout for layout in OWN if name.startswith(f"{layout}_")), None)


def own_names() -> list[str]:
    """Return the names of the networks that have a family of their own."""
    return timm.list_models([f"{layout}_*" for layout in OWN])


@cache
def plain_vits() -> list[str]:
    """Return the names of timm's plain ViTs."""
    return [name for module in MODULES for name in timm.list_models(module=module)]
