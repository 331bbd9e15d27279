"""How a network is judged while it is trained."""

from pathlib import Path
from typing import Any, Protocol

from accelerate.utils import broadcast

from mimkit.training.plots import curves
from mimkit.training.run import Run


class Task(Protocol):
    """What a network is judged by."""

    figure: str  # of `score`, by which best/ is chosen
    hints: tuple[str, ...]  # commands of mimkit that take the folder of a network

    def score(self, network: Any) -> dict[str, float]:
        """Figures of merit on all test images, over all processes."""

    def words(self, figures: dict[str, float]) -> str:
        """Them, in a line."""

    def write(self, network: Any, folder: Path) -> None:
        """The network and what is to be known about it."""

    def draw(self, folder: Path) -> list[str]:
        """Pictures and tables of what was scored last. -> their names"""


class Evaluator:
    """Scores a network now and then, and keeps the last and the best one of a run."""

    def __init__(self, run: Run, task: Task):
        self.run, self.task = run, task
        self.latest: dict[str, float] | None = None

    def score(self, network: Any) -> dict[str, float]:
        """By the task."""
        network = self.run.whole(network)
        if self.run.accelerator.num_processes > 1:  # running statistics are each process's own; the main one's are kept
            broadcast(list(network.buffers()))
        self.latest = self.task.score(network)
        return self.latest

    def __call__(self, step: int, network: Any, ema: Any = None) -> None:
        """Measure, print and log; write last/, and best/ if it is. Where weights are averaged it is they that count."""
        run, name, network = self.run, self.task.figure, self.run.whole(network)
        before = max((line[name] for line in run.metrics() if name in line), default=-1.0)
        if ema:
            raw = self.score(network)
            run.log(step, **{f"{name}_raw": raw[name]})
            run.print(f"{self.task.words(raw)} by the weights as they are; by their average")
        figures = self.measure(step, ema or network)
        if run.accelerator.is_main_process:
            self.task.write(ema or network, run.folder / "last")
            if figures[name] > before:
                self.task.write(ema or network, run.folder / "best")
        run.accelerator.wait_for_everyone()

    def measure(self, step: int, network: Any) -> dict[str, float]:
        """Print and log."""
        figures = self.score(network)
        self.run.log(step, **figures)
        self.run.print(f"after {step} steps: {self.task.words(figures)}")
        return figures

    def alone(self, network: Any) -> float:
        """Evaluator a network as it is; with --out leave the pictures. -> the figure that counts"""
        figures = self.score(network)
        self.run.print(self.task.words(figures))
        if self.run.options.out:
            names = self.draw(network)
            self.run.print(f"wrote {', '.join(f'{self.run.folder}/{name}' for name in names)}")
        return figures[self.task.figure]

    def draw(self, network: Any) -> list[str]:
        """The task's pictures, and how training went, where there was any. -> their names"""
        if not self.latest:
            self.score(network)
        if not self.run.accelerator.is_main_process:
            return []
        self.run.folder.mkdir(parents=True, exist_ok=True)
        names = self.task.draw(self.run.folder)
        if metrics := self.run.metrics():
            curves(metrics, self.run.folder / "curves.png")
            names.append("curves.png")
        return names

    def finish(self, network: Any) -> float:
        """The pictures, and what to do next. -> the figure that counts, at the end"""
        run, name, drawn = self.run, self.task.figure, ", ".join(self.draw(network))
        assert self.latest is not None
        last = self.latest[name]
        if run.accelerator.is_main_process:
            best = max((line for line in run.metrics() if name in line), key=lambda line: line[name], default=None)
            words = f"{best[name]:.2f} % after {best['step']} steps, " if best else ""
            hints = "\n      ".join(f"mimkit {hint.format(f'{run.folder}/last')}" for hint in self.task.hints)
            run.print(
                f"\nwrote {run.folder}/: last/ ({last:.2f} %) and best/ ({words}chosen by the test "
                f"images),\n{drawn}, metrics.jsonl, config.yaml, checkpoints/\nnext: {hints}"
            )
        return last
