"""Checkpoint families: how the names and tensors of a library become those of timm."""

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
from mimkit.errors import UserError
from mimkit.io.weights import State

OWN = ("hivit", "svit")  # families, and what the names of our networks begin with that they are read into
MODULES = ("vision_transformer", "deit", "beit", "eva", "vision_transformer_sam")  # of timm, with plain ViTs


class Remap:
    """A file's tensors on their way to timm's names. A family calls its methods; what it leaves is an error.

    Args:
        state: the file's tensors.
        wanted: names that the plain ViT of timm has.
    """

    def __init__(self, state: State, wanted: set[str]):
        self.left, self.wanted = dict(state), wanted
        self.found: State = {}
        self.rows: list[Row] = []

    def take(self, pattern: str) -> list[tuple[re.Match[str], Tensor]]:
        """Tensors whose whole name matches, taken out of what is left."""
        matches = [match for name in self.left if (match := re.fullmatch(pattern, name))]
        return [(match, self.left.pop(match[0])) for match in matches]

    def put(self, action: str, origins: tuple[str, ...], target: str, tensor: Tensor, why: str = "") -> None:
        """A tensor under its name in timm."""
        if target in self.found:
            raise UserError(f"{', '.join(origins)}: {target} is there already, so this file holds two networks.")
        self.found[target] = tensor
        self.rows.append(Row(action, origins, target, why))

    def rename(self, pattern: str, to: str, change: Callable[[Tensor], Tensor] | None = None, why: str = "") -> None:
        """One to one, e.g. r"layer\\.(\\d+)\\.(.*)" to r"blocks.\\1.\\2"."""
        for match, tensor in self.take(pattern):
            target = match.expand(to)
            action = "copied" if target == match[0] and change is None else "renamed"
            self.put(action, (match[0],), target, change(tensor) if change else tensor, why)

    def rename_all(self, table: Mapping[str, str]) -> None:
        """Several of them, in order."""
        for pattern, to in table.items():
            self.rename(pattern, to)

    def fuse(self, pattern: str, to: str, parts: tuple[str, ...]) -> None:
        """Several to one, along the first axis; the pattern's group `part` names which of the parts a tensor is."""
        groups: dict[str, dict[str, tuple[str, Tensor]]] = {}
        for match, tensor in self.take(pattern):
            groups.setdefault(match.expand(to), {})[match["part"]] = (match[0], tensor)
        for target, group in groups.items():
            if missing := set(parts) - group.keys():
                raise UserError(f"{target} has no {', '.join(sorted(missing))} in this file: it is not complete.")
            names, tensors = zip(*(group[part] for part in parts), strict=True)
            self.put("renamed", names, target, torch.cat(tensors), f"{', '.join(parts)} fused")

    def drop(self, pattern: str, why: str) -> None:
        """Not of the plain ViT."""
        self.rows.extend(Row("dropped", (match[0],), None, why) for match, _ in self.take(pattern))

    def skip(self, name: str, why: str) -> None:
        """The same for one that was taken."""
        self.rows.append(Row("dropped", (name,), None, why))

    def split(self, name: str, parts: Mapping[str, Tensor], why: str) -> None:
        """One that was taken, to several."""
        self.found |= parts
        self.rows.append(Row("renamed", (name,), ", ".join(parts), why))

    def make(self, target: str, tensor: Tensor, why: str) -> None:
        """Not of the file."""
        self.put("fresh", (), target, tensor, why)


@dataclass(frozen=True)
class Family:
    """A layout of checkpoints. Each module of mimkit.converters holds one as FAMILY; its name is the module's.

    Args:
        title: where such files come from.
        marks: patterns, each of which is the whole name of some tensor in every file of the family.
        remap: puts a file's tensors under timm's names.
        options: what no tensor tells, from the state and a config.json beside it -> arguments of `plain_vit`. For a
            family in OWN, from the state under our names -> arguments of our network.
        data: mean, std and the like, where all of the family share them.
        reader: of the file without us: 'timm', 'transformers', or None.
        stand_in: the parity test in tests/test_converters.py that takes the reader's place where there is none.
        aliases: short names of released networks -> names in timm.
    """

    title: str
    marks: tuple[str, ...]
    remap: Callable[[Remap], None]
    options: Callable[[State, dict[str, Any]], dict[str, Any]] = lambda state, config: {}
    data: Mapping[str, Any] = field(default_factory=dict)
    reader: str | None = "timm"
    stand_in: str = "test_own_layouts"
    aliases: Mapping[str, str] = field(default_factory=dict)

    def fits(self, state: State) -> bool:
        """Whether a file looks like one of the family's."""
        return all(any(re.fullmatch(mark, name) for name in state) for mark in self.marks)


@cache
def families() -> dict[str, Family]:
    """All of them, by name."""
    import mimkit.converters as package

    modules = {info.name: f"{package.__name__}.{info.name}" for info in pkgutil.iter_modules(package.__path__)}
    return {name: importlib.import_module(module).FAMILY for name, module in modules.items()}


def own_family(name: str) -> str | None:
    """The family whose files become a network of ours of this name; None for a plain ViT or a pyramid."""
    return next((layout for layout in OWN if name.startswith(f"{layout}_")), None)


def own_names() -> list[str]:
    """Our networks that files of their own are read into."""
    return timm.list_models([f"{layout}_*" for layout in OWN])


@cache
def plain_vits() -> list[str]:
    """Names in timm."""
    return [name for module in MODULES for name in timm.list_models(module=module)]
