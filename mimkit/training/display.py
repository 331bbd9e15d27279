"""What a run prints: lines on the main process, and a progress bar where there is a terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from mimkit.data.order import Plan


class Display:
    """Prints on the main process only.

    Args:
        quiet: whether this is another process.
    """

    def __init__(self, quiet: bool = False):
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self.printed: set[str] = set()

    def print(self, *text: Any) -> None:
        """Print a line."""
        self.console.print(*text, markup=False)

    def print_once(self, text: str) -> None:
        """Print a line unless it was printed before: each measurement meets the same bad images again."""
        if text not in self.printed:
            self.printed.add(text)
            self.print(text)

    @contextmanager
    def progress(self, start: int, steps: int) -> Iterator[None]:
        """Show a progress bar inside."""
        columns = TextColumn("training"), BarColumn(), TextColumn("{task.fields[text]}")
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as self.bar:
            self.task = self.bar.add_task("", total=steps, completed=start, text="")
            yield

    def update(self, plan: Plan, done: int, means: dict[str, float], rate: float, waiting: float, line: bool) -> None:
        """Show what was measured after `done` steps, in the progress bar or, without a terminal, as a line.

        Args:
            means: the loss and other values by name.
            rate: images per second.
            waiting: fraction of the time spent waiting for data.
            line: whether to print a line without a terminal.
        """
        left = int((plan.steps - done) * plan.batch_size / rate)
        numbers = " · ".join(f"{name} {value:.4f}" for name, value in means.items())
        text = f"step {done}/{plan.steps} · {numbers} · {rate:.0f} images/s · waiting {waiting:.0%} · "
        text += f"{left // 60}:{left % 60:02d} left"
        self.bar.update(self.task, completed=done, text=text)
        if line and not self.console.is_terminal:
            self.print(text)
