"""Whether a pre-training helped: kNN accuracy after and before it, and fine-tuning against training from scratch."""

from math import hypot
from pathlib import Path

from mimkit.files import read_metrics, read_options

ADVICE = (
    "Pre-train for longer (hivit_nano needed 120,000 images of CIFAR-10 for 10 points of kNN), or start from released "
    "weights (--model vit_base_patch16_224.mae): see docs/pretraining.md."
)


def difference(before: dict[str, float], after: dict[str, float], score: str) -> tuple[float, float]:
    """Return the difference of two scores, and its standard error.

    The error is that of independent scores, which is cautious: both are of the same images.
    """
    return after[score] - before[score], hypot(before[f"{score}_se"], after[f"{score}_se"])


def scores(run: Path, name: str) -> list[dict[str, float]]:
    """Return the lines of a run's metrics.jsonl that have a score and its standard error."""
    return [line for line in read_metrics(run) if {name, f"{name}_se"} <= line.keys()]


def knn_gain(run: Path) -> tuple[str, bool] | None:
    """Return a sentence that compares the kNN accuracy after a pre-training and before it, and whether it is a gain.

    A gain is more than two standard errors. The result is None if kNN was not measured before and after.
    """
    lines = scores(run, "knn_10")
    if len(lines) < 2 or lines[0]["step"]:
        return None
    first, last = lines[0], lines[-1]
    gain, error = difference(first, last, "knn_10")
    text = f"kNN {first['knn_10']:.1f} % before, {last['knn_10']:.1f} % after, {gain:+.1f} ± {error:.1f} points"
    if gain > 2 * error:
        return f"The pre-training helps: {text}.", True
    seen = last["step"] * read_options(run).get("batch_size", 0)
    return f"No gain yet in {seen:,} images: {text}. {ADVICE}", False


def pretraining_run(model: str) -> Path | None:
    """Return the run of pre-training that a network comes from, if it is one, or its encoder/."""
    folder = Path(model)
    run = folder.parent if folder.name == "encoder" else folder
    return run if (run / "encoder").is_dir() and (run / "config.yaml").is_file() else None


def scratch_gain(run: Path) -> tuple[str, bool] | None:
    """Return a sentence that compares a fine-tuning with the run from scratch in its scratch/, and whether it is ahead.

    The result is None if there are not two accuracies after the same number of steps.
    """
    tuned, scratch = scores(run, "top1"), scores(run / "scratch", "top1")
    if not tuned or not scratch or tuned[-1]["step"] != scratch[-1]["step"]:
        return None
    gain, error = difference(scratch[-1], tuned[-1], "top1")
    text = f"{tuned[-1]['top1']:.2f} % against {scratch[-1]['top1']:.2f} %, {gain:+.2f} ± {error:.2f} points"
    if gain > 2 * error:
        return f"Fine-tuning is ahead of training from scratch: {text}.", True
    verdict = "Fine-tuning trails training from scratch" if gain < 0 else "No gain over training from scratch yet"
    return f"{verdict}: {text}. {ADVICE}", False
