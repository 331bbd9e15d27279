"""Validation during training: score a network now and then, and keep its last and its best weights."""

from pathlib import Path
from shlex import quote
from typing import Any, Protocol

from mimkit.data.sources import Source
from mimkit.files import read_options, reading_flags
from mimkit.training.plots import curves
from mimkit.training.run import Run


class Task(Protocol):
    """What a network is scored on."""

    figure: str  # the score that chooses best/
    test: Source  # the validation images
    hints: tuple[str, ...]  # mimkit commands on the folder of a network, {model}, and on images, {images}

    def score(self, network: Any) -> dict[str, float]:
        """Score a network on all validation images, over all processes."""

    def format_scores(self, scores: dict[str, float]) -> str:
        """Format the scores as one line of text."""

    def write(self, network: Any, folder: Path) -> None:
        """Write the network and its description into a folder."""

    def draw(self, folder: Path) -> list[str]:
        """Write pictures and tables of what was scored last. Return their names."""


class Evaluator:
    """Scores a network during training, and keeps the last and the best one of a run.

    Args:
        run: the run, which logs the scores and whose directory receives last/ and best/.
        task: what to score on.
    """

    def __init__(self, run: Run, task: Task):
        self.run, self.task = run, task
        self.latest: dict[str, float] | None = None

    def score(self, network: Any) -> dict[str, float]:
        """Score a network on the task."""
        network = self.run.engine.full_state(network)
        if self.run.engine.world_size > 1:  # each process has its own running statistics; the main one's count
            from accelerate.utils import broadcast

            broadcast(list(network.buffers()))
        self.latest = self.task.score(network)
        return self.latest

    def __call__(self, step: int, network: Any, ema: Any = None) -> None:
        """Score, print and log after `step` steps; write last/, and best/ if the score is the best so far.

        Args:
            ema: a moving average of the weights. If there is one, its score counts.
        """
        run, name, network = self.run, self.task.figure, self.run.engine.full_state(network)
        best = max((line[name] for line in run.dir.metrics() if name in line), default=-1.0)
        if ema:
            raw = self.score(network)
            run.log(step, **{f"{name}_raw": raw[name]})
            run.print(f"{self.task.format_scores(raw)} without averaging; with averaged weights:")
        scores = self.measure(step, ema or network)
        if run.engine.is_main:
            self.task.write(ema or network, run.folder / "last")
            if scores[name] > best:
                self.task.write(ema or network, run.folder / "best")
        run.engine.wait()

    def measure(self, step: int, network: Any) -> dict[str, float]:
        """Score, print and log after `step` steps."""
        scores = self.score(network)
        self.run.log(step, **scores)
        self.run.print(f"after {step} steps: {self.task.format_scores(scores)}")
        return scores

    def evaluate_only(self, network: Any, draw: bool) -> float:
        """Score a network without training, and return the score that counts.

        Args:
            draw: write the pictures into the run's directory.
        """
        scores = self.score(network)
        self.run.print(self.task.format_scores(scores))
        if draw:
            names = self.draw(network)
            self.run.print(f"wrote {', '.join(f'{self.run.folder}/{name}' for name in names)}")
        return scores[self.task.figure]

    def draw(self, network: Any) -> list[str]:
        """Write the task's pictures and the training curves, if there are any. Return their names."""
        if not self.latest:
            self.score(network)
        if not self.run.engine.is_main:
            return []
        self.run.folder.mkdir(parents=True, exist_ok=True)
        names = self.task.draw(self.run.folder)
        if metrics := self.run.dir.metrics():
            curves(metrics, self.run.folder / "curves.png")
            names.append("curves.png")
        return names

    def finish(self, network: Any) -> float:
        """Write the pictures and print what to do next. Return the final score."""
        run, name, drawn = self.run, self.task.figure, ", ".join(self.draw(network))
        assert self.latest is not None
        last = self.latest[name]
        if run.engine.is_main:
            best = max((line for line in run.dir.metrics() if name in line), key=lambda line: line[name], default=None)
            score = f"{best[name]:.2f} % after {best['step']} steps, " if best else ""
            reading = reading_flags(read_options(run.folder), "image_column")
            places = {"model": quote(f"{run.folder}/best"), "images": quote(self.task.test.name) + reading}
            hints = "\n      ".join(f"mimkit {hint.format(**places)}" for hint in self.task.hints)
            run.print(
                f"\nwrote {run.folder}/: last/ ({last:.2f} %) and best/ ({score}chosen on the validation images),\n"
                f"{drawn}, metrics.jsonl, config.yaml, checkpoints/\nnext: {hints}"
            )
        return last
