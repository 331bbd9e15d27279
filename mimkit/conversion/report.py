"""What a conversion did: every tensor, the sizes, the checks."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from torch import nn

from mimkit.flops import count_gmacs
from mimkit.io.weights import weight_files


class Row(NamedTuple):
    """What became of a file's tensors, or where the target's came from."""

    action: str  # copied, renamed, resized, dropped or fresh
    origins: tuple[str, ...]  # names in the file
    target: str | None
    why: str = ""


@dataclass
class Report:
    """What a conversion did."""

    source: str
    file: str
    sha256: str
    layout: str
    taken: str  # which of the states in the file, and of what numbers
    target: str
    rows: list[Row]
    sizes: dict[str, tuple[float, float]]  # parameters (M) and GMACs, of source and target
    checks: list[dict[str, Any]] | None

    @property
    def described(self) -> str:
        """Layout and state."""
        return f"{self.layout}, {self.taken}" if self.taken else self.layout

    def counts(self) -> Counter[tuple[str, str]]:
        """Tensors by what became of them and why."""
        return Counter((row.action, row.why) for row in self.rows)

    def markdown(self) -> str:
        """The whole report."""
        lines = [
            f"# {self.source} -> {self.target}",
            "",
            f"File: `{self.file}` ({self.described}), SHA-256 `{self.sha256}`.",
        ]
        lines += ["", "| | parameters (M) | GMACs |", "|---|---|---|"]
        lines += [f"| {name} | {p:.3f} | {g:.3f} |" for name, (p, g) in self.sizes.items()]
        lines += ["", "## Checks", ""]
        if self.checks is None:
            lines.append("NOT CHECKED (--no-checks).")
        lines += [f"- **{c['name']}**: {c['result']}. {c['text']}" for c in self.checks or []]
        lines += [
            "",
            "## Tensors",
            "",
            "| what became of it | in the file | in the target | why |",
            "|---|---|---|---|",
        ]
        lines += [f"| {r.action} | {', '.join(r.origins)} | {r.target or ''} | {r.why} |" for r in self.rows]
        return "\n".join(lines) + "\n"

    def show(self) -> None:
        """The short of it, on the screen."""
        console = Console(markup=False, highlight=False)  # paths may hold brackets
        console.print(f"{self.source} -> {self.target}\n{self.file} ({self.described})\nSHA-256 {self.sha256}")
        table = Table("tensors", "what became of them", "why")
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
        """As report.json and report.md."""
        content = {**self.__dict__, "rows": [row._asdict() for row in self.rows]}
        (folder / "report.json").write_text(json.dumps(content, indent=1))
        (folder / "report.md").write_text(self.markdown())


def sha256(file: Path) -> str:
    """Of a file, or of all files of a folder's weights in turn."""
    digest = hashlib.sha256()
    for part in weight_files(file):
        with part.open("rb") as opened:
            while block := opened.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def measure(net: nn.Module, size: tuple[int, ...]) -> tuple[float, float]:
    """Parameters (M) and GMACs."""
    return sum(p.numel() for p in net.parameters()) / 1e6, count_gmacs(net, 1, *size)
