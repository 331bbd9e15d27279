"""Health of a pre-training run: compare its losses with those of our own runs, and report the time spent on data.

recipes/references/*.yaml hold the losses of two of our runs that differ in their seed only, at fractions of their
steps (benchmarks/loss_bands.py records them). A band around their mean covers the loss of another seed 99 times in 100,
by Student's t-distribution with the spread of the two seeds pooled over the fractions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from mimkit.doctor.gain import knn_gain, scratch_gain
from mimkit.errors import UserError
from mimkit.files import read_metrics, read_options
from mimkit.training.run_dir import MAY_CHANGE

FRACTIONS = (0.25, 0.5, 0.75, 1.0)  # of the steps of a run
WINDOW = 0.1  # fraction of the steps over which a loss is averaged
# Options on which the loss does not depend, except by chance
BY_CHANCE = MAY_CHANGE | {"seed", "compile", "grad_checkpointing", "streaming", "dry_run"}
MAX_WAITING = 0.2  # fraction of the time


@dataclass
class Reference:
    """Losses of our own runs of one preset.

    Args:
        name: of the preset.
        options: all options that the loss depends on.
        loss: losses of all seeds, by the fraction of the steps.
        tolerance: half the width of the band, as a fraction of the mean loss.
    """

    name: str
    options: dict[str, Any]
    loss: dict[float, list[float]]
    tolerance: float

    def band(self, fraction: float) -> tuple[float, float]:
        """Return the lowest and the highest loss to expect after this fraction of the steps."""
        mean = sum(self.loss[fraction]) / len(self.loss[fraction])
        return mean * (1 - self.tolerance), mean * (1 + self.tolerance)

    def differing(self, config: dict[str, Any]) -> list[str]:
        """Describe each option that has another value in the `config` of a run."""
        return [
            f"{key} is {config.get(key)} instead of {value}"
            for key, value in self.options.items()
            if config.get(key) != value
        ]


def tolerance(loss: dict[float, list[float]]) -> float:
    """Return the tolerance for the losses of two runs at four fractions.

    It is Student's t for 99 % and 4 degrees of freedom, times the relative deviation of a new value from their mean.
    """
    spread = [2 * (a - b) / (a + b) for a, b in loss.values()]
    return 4.604 * math.sqrt(1.5 * sum(d * d for d in spread) / (2 * len(spread)))


def references() -> list[Reference]:
    """Return all shipped references."""
    files = sorted((Path(str(resources.files("mimkit.recipes"))) / "references").glob("*.yaml"))
    return [Reference(file.stem, **yaml.safe_load(file.read_text())) for file in files]


def nearest(config: dict[str, Any]) -> tuple[Reference, list[str]]:
    """Return the reference whose options differ least from a run's, and descriptions of these differences.

    Args:
        config: the resolved options of the run.
    """
    compared = [(reference, reference.differing(config)) for reference in references()]
    return min(compared, key=lambda pair: len(pair[1]))


def is_own_data(config: dict[str, Any]) -> bool:
    """Return whether a run is on images that none of our runs used, so that its losses say nothing next to ours."""
    return all(reference.options["data"] != config.get("data") for reference in references())


def losses(
    lines: Sequence[dict[str, float]], steps: float, fractions: Sequence[float] = FRACTIONS
) -> dict[float, float]:
    """Return the loss at each fraction of the steps that a run has reached, averaged over the tenth of a run before it.

    Args:
        lines: metrics of the run. Lines without a loss are ignored.
        steps: number of steps of the complete run.
        fractions: of the steps.
    """
    means = {}
    for fraction in fractions:
        last = fraction * steps
        window = [x["loss"] for x in lines if "loss" in x and last - WINDOW * steps < x["step"] <= last + 1e-6]
        if window and lines[-1]["step"] >= last - 1e-6:
            means[fraction] = sum(window) / len(window)
    return means


def expected(config: dict[str, Any]) -> str:
    """Describe the losses that a run should have. Empty for data that none of our runs used.

    Args:
        config: the resolved options of the run.
    """
    reference, differing = nearest(config)
    if is_own_data(config):
        return ""
    if differing:
        return f"no reference losses: {_summary(differing)} (compared with {reference.name}, our closest run)"
    bands = ", ".join("{:.3f} to {:.3f} at {:.0%}".format(*reference.band(f), f) for f in reference.loss)
    return f"expected from our runs of {reference.name}: {bands} of the steps"


def health(folder: Path) -> tuple[list[str], list[str]]:
    """Describe the health of a run that may still be in progress.

    Args:
        folder: the run's directory.

    Returns:
        Sentences about the run, and those of them that name a problem.

    Raises:
        UserError: if the folder is not the directory of a run.
    """
    if not all((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise UserError(f"--run {folder} holds no config.yaml and metrics.jsonl. Pass the directory of a run.")
    config = read_options(folder)
    if not isinstance(config.get("epochs"), int | float):
        raise UserError(f"{folder}/config.yaml has no epochs. Pass the directory of a run.")
    names = "loss", "step", "epoch", "waiting"
    logged = (line for line in read_metrics(folder) if all(isinstance(line.get(n), int | float) for n in names))
    lines = [line for line in logged if line["epoch"] > 0]
    if not lines:
        return [f"{folder} has not logged a loss yet."], []
    if bad_steps := [line["step"] for line in lines if not math.isfinite(line["loss"])]:
        problem = f"The loss is not finite at step {bad_steps[0]:.0f}. Lower --lr, or pass --precision bf16 or fp32."
        return [problem], [problem]
    steps = lines[-1]["step"] / lines[-1]["epoch"] * config["epochs"]
    sentences, problems = [], []
    for sentence, is_problem in (*_trend(lines, steps), _waiting(lines), *_comparison(lines, steps, config)):
        sentences.append(sentence)
        problems += [sentence] if is_problem else []
    gains = knn_gain(folder), scratch_gain(folder)
    return [*sentences, *(found[0] for found in gains if found)], problems


def _trend(lines: list[dict[str, float]], steps: float) -> list[tuple[str, bool]]:
    """Return a sentence that says whether the loss fell, and whether this is a problem; nothing in a young run."""
    recent = [line["loss"] for line in lines if line["step"] > lines[-1]["step"] - WINDOW * steps]
    if len(lines) == len(recent):
        return []
    first, last = lines[0]["loss"], sum(recent) / len(recent)
    if last < first:
        return [(f"The loss fell from {first:.3f} to {last:.3f}.", False)]
    return [(f"The loss did not fall from {first:.3f}: it is {last:.3f}. Lower --lr, and inspect the images.", True)]


def _waiting(lines: list[dict[str, float]]) -> tuple[str, bool]:
    """Return a sentence on the time spent on data, which is never a problem."""
    waiting = sum(line["waiting"] for line in lines) / len(lines)
    advice = " Raise --workers, or store smaller images." if waiting > MAX_WAITING else ""
    return f"The run waited for data {waiting:.0%} of the time.{advice}", False


def _comparison(lines: list[dict[str, float]], steps: float, config: dict[str, Any]) -> list[tuple[str, bool]]:
    """Return a sentence that compares the loss with our own runs, and whether this is a problem; none for other data.

    It is about the last fraction at which the loss is above the band, else the last one at which it is below, else the
    last one.
    """
    reference, differing = nearest(config)
    if is_own_data(config):
        return []
    if differing:
        return [(f"The loss cannot be compared with our runs of {reference.name}: {_summary(differing)}.", False)]
    places = [(f, loss, *reference.band(f)) for f, loss in losses(lines, steps, list(reference.loss)).items()]
    if not places:
        return [(f"It is too early to compare the loss with our runs ({expected(config)}).", False)]
    above = [place for place in places if place[1] > place[3]]
    below = [place for place in places if place[1] < place[2]]
    fraction, loss, low, high = (above or below or places)[-1]
    where = "above" if above else "below" if below else "inside"
    sentence = f"The loss is {where} the band of {reference.name}: {loss:.3f} after {fraction:.0%} of the steps, "
    sentence += f"where our runs have {low:.3f} to {high:.3f}."
    if above:
        sentence += " Check what the options do not record, such as changes of the code and the data."
    elif below:
        sentence += " The data or the code differ from those of our runs."
    return [(sentence, bool(above))]


def _summary(differing: list[str]) -> str:
    """List the first three differences, and the number of others."""
    others = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    return f"{', '.join(differing[:3])}{others}"
