"""Is a pre-training run healthy? Its losses beside those of our own runs of the same recipe, and what it waited for.

recipes/references/*.yaml hold the losses (benchmarks/loss_bands.py records them): of runs with other seeds and the same
options, at fractions of their steps. Their tolerance, a share of the loss, is what a further seed stays within 99 times
in 100, by Student's t: the spread between seeds is pooled over the fractions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from mimkit.errors import UserError
from mimkit.files import read_metrics, read_options
from mimkit.training.run_dir import MAY_CHANGE

FRACTIONS = (0.25, 0.5, 0.75, 1.0)
WINDOW = 0.1  # of a run, over which its loss is averaged
# What a loss doesn't depend on, but by chance
BY_CHANCE = MAY_CHANGE | {"seed", "compile", "grad_checkpointing", "streaming", "dry_run"}
MUCH_WAITING = 0.2  # share of the time


@dataclass
class Reference:
    """Losses of our own runs.

    Args:
        options: all that the loss depends on.
        loss: for each fraction of a run, of each seed.
        tolerance: share of the mean of these.
    """

    name: str
    options: dict[str, Any]
    loss: dict[float, list[float]]
    tolerance: float

    def band(self, fraction: float) -> tuple[float, float]:
        """From, to."""
        mean = sum(self.loss[fraction]) / len(self.loss[fraction])
        return mean * (1 - self.tolerance), mean * (1 + self.tolerance)

    def differing(self, config: dict[str, Any]) -> list[str]:
        """Options that another run has otherwise, in words."""
        return [
            f"{key} is {config.get(key)} and not {value}"
            for key, value in self.options.items()
            if config.get(key) != value
        ]


def tolerance(loss: dict[float, list[float]]) -> float:
    """Of two runs' losses at four fractions: Student's t for 99 % and 4 degrees of freedom, for a new value."""
    spread = [2 * (a - b) / (a + b) for a, b in loss.values()]
    return 4.604 * math.sqrt(1.5 * sum(d * d for d in spread) / (2 * len(spread)))


def references() -> list[Reference]:
    """All that we have."""
    files = sorted((Path(str(resources.files("mimkit.recipes"))) / "references").glob("*.yaml"))
    return [Reference(file.stem, **yaml.safe_load(file.read_text())) for file in files]


def nearest(config: dict[str, Any]) -> tuple[Reference, list[str]]:
    """The reference with the fewest other options than a run's resolved ones, and these."""
    return min(((found, found.differing(config)) for found in references()), key=lambda pair: len(pair[1]))


def losses(
    lines: Sequence[dict[str, float]], steps: float, fractions: Sequence[float] = FRACTIONS
) -> dict[float, float]:
    """Means over the tenth of a run before each fraction of its steps that it has come to."""
    found = {}
    for fraction in fractions:
        last = fraction * steps
        window = [x["loss"] for x in lines if "loss" in x and last - WINDOW * steps < x["step"] <= last + 1e-6]
        if window and lines[-1]["step"] >= last - 1e-6:
            found[fraction] = sum(window) / len(window)
    return found


def expected(config: dict[str, Any]) -> str:
    """What the losses of a run should be, in words."""
    reference, differing = nearest(config)
    if differing:
        return f"no reference: {_words(differing)} as in {reference.name}, the nearest run of ours"
    bands = ", ".join("{:.3f} to {:.3f} at {:.0%}".format(*reference.band(f), f) for f in reference.loss)
    return f"of our own runs of {reference.name}: {bands} of the steps"


def health(folder: Path) -> tuple[list[str], list[str]]:
    """What can be said of a run from its directory, and of that what is wrong, both as sentences."""
    if not all((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise UserError(f"--run {folder} holds no config.yaml and metrics.jsonl: pass the directory of a run.")
    config = read_options(folder)
    if not isinstance(config.get("epochs"), int | float):
        raise UserError(f"{folder}/config.yaml has no epochs: pass the directory of a run.")
    names = "loss", "step", "epoch", "waiting"
    logged = (line for line in read_metrics(folder) if all(isinstance(line.get(n), int | float) for n in names))
    lines = [line for line in logged if line["epoch"] > 0]
    if not lines:
        return [f"{folder} has logged no loss yet."], []
    said, wrong = [], []
    if odd := [line["step"] for line in lines if not math.isfinite(line["loss"])]:
        wrong.append(f"The loss is not finite at step {odd[0]:.0f}: lower --lr, or pass --precision bf16 or fp32.")
        return wrong, wrong
    first, last = lines[0], lines[-1]
    steps = last["step"] / last["epoch"] * config["epochs"]
    recent = [line["loss"] for line in lines if line["step"] > last["step"] - WINDOW * steps]
    mean = sum(recent) / len(recent)
    if len(lines) > len(recent):
        fell = mean < first["loss"]
        sentence = f"The loss {'fell' if fell else 'did not fall'} from {first['loss']:.3f} to {mean:.3f}"
        said.append(f"{sentence}." if fell else f"{sentence}: lower --lr, and look at the images.")
        wrong += [] if fell else said[-1:]
    waiting = sum(line["waiting"] for line in lines) / len(lines)
    text = f"It waited for data in {waiting:.0%} of the time"
    said.append(f"{text}: raise --workers, or store smaller images." if waiting > MUCH_WAITING else f"{text}.")
    reference, differing = nearest(config)
    found = losses(lines, steps, list(reference.loss))
    if differing:
        said.append(f"Its loss cannot be compared with ours: {_words(differing)} as in {reference.name}.")
    elif not found:
        said.append(f"It is too early to compare its loss with ours ({expected(config)}).")
    else:
        places = [(f, x, *reference.band(f)) for f, x in found.items()]
        high = [place for place in places if place[1] > place[3]]
        low = [place for place in places if place[1] < place[2]]
        fraction, loss, start, end = (high or low or places[-1:])[-1]
        where = f"{loss:.3f} after {fraction:.0%} of the steps, where ours are from {start:.3f} to {end:.3f}"
        if high:
            wrong.append(
                f"Its loss is above the band of {reference.name} ({where}): look for what the options don't say."
            )
            said.append(wrong[-1])
        elif low:
            said.append(
                f"Its loss is below the band of {reference.name} ({where}): data or code are not what ours were."
            )
        else:
            said.append(f"Its loss is inside the band of {reference.name} ({where}).")
    return said, wrong


def _words(differing: list[str]) -> str:
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    return f"{', '.join(differing[:3])}{more}"
