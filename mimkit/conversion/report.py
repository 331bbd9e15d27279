"""The report of a conversion: what happened to every tensor, the networks' sizes, and the checks."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from mimkit.flops import count_gmacs
from mimkit.io.weights import weight_files


class Row(NamedTuple):
    """What happened to tensors of the file, or where a tensor of the target comes from."""

    action: str  # copied, renamed, resized, dropped or fresh
    origins: tuple[str, ...]  # names in the file
    target: str | None  # name in the target
    why: str = ""


@dataclass
class Report:
    """What a conversion did. report.json holds these fields."""

    source: str  # as the user named it
    file: str
    sha256: str
    layout: str  # the file's family
    taken: str  # which state dict of the file was used, and which data types became float32
    target: str
    rows: list[Row]
    sizes: dict[str, tuple[float, float]]  # parameters (M) and GMACs of source and target
    checks: list[dict[str, Any]] | None  # None: not checked

    @property
    def described(self) -> str:
        """The family and the state dict that was used."""
        return f"{self.layout}, {self.taken}" if self.taken else self.layout

    def counts(self) -> Counter[tuple[str, str]]:
        """Count the tensors by action and reason."""
        return Counter((row.action, row.why) for row in self.rows)

    def markdown(self) -> str:
        """Format the whole report as Markdown."""
        lines = [f"# {self.source} -> {self.target}", ""]
        lines += [f"File: `{self.file}` ({self.described}), SHA-256 `{self.sha256}`.", ""]
        lines += ["| network | parameters (M) | GMACs |", "|---|---|---|"]
        lines += [f"| {name} | {p:.3f} | {g:.3f} |" for name, (p, g) in self.sizes.items()]
        lines += ["", "## Checks", ""]
        if self.checks is None:
            lines.append("NOT CHECKED (--no-checks).")
        lines += [f"- **{check['name']}**: {check['result']}. {check['text']}" for check in self.checks or []]
        lines += ["", "## Tensors", "", "| action | in the file | in the target | reason |", "|---|---|---|---|"]
        lines += [f"| {row.action} | {', '.join(row.origins)} | {row.target or ''} | {row.why} |" for row in self.rows]
        return "\n".join(lines) + "\n"

    def show(self) -> None:
        """Print a summary of the report."""
        from rich.console import Console
        from rich.table import Table

        console = Console(markup=False, highlight=False)  # paths may hold brackets, which rich takes for markup
        console.print(f"{self.source} -> {self.target}\n{self.file} ({self.described})\nSHA-256 {self.sha256}")
        table = Table("tensors", "action", "reason")
        for (action, why), count in sorted(self.counts().items()):
            table.add_row(str(count), action, why)
        console.print(table)
        for name, (parameters, gmacs) in self.sizes.items():
            console.print(f"{name}: {parameters:.3f} M parameters, {gmacs:.3f} GMACs")
        if self.checks is None:
            console.print("NOT CHECKED")
        for check in self.checks or []:
            console.print(f"{check['name']}: {check['result']}. {check['text']}")

    def save(self, folder: Path) -> None:
        """Write report.json and report.md."""
        content = {**self.__dict__, "rows": [row._asdict() for row in self.rows]}
        (folder / "report.json").write_text(json.dumps(content, indent=1))
        (folder / "report.md").write_text(self.markdown())


def sha256(file: Path) -> str:
    """Compute the SHA-256 of a weight file, or of all weight files of a folder in turn."""
    digest = hashlib.sha256()
    for part in weight_files(file):
        with part.open("rb") as opened:
            while block := opened.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def measure(net: nn.Module, size: tuple[int, ...]) -> tuple[float, float]:
    """Return a network's parameters (M) and its GMACs for one input of this size (c H W)."""
    return sum(p.numel() for p in net.parameters()) / 1e6, count_gmacs(net, 1, *size)
