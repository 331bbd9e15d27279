"""Training curves."""

from pathlib import Path

from mimkit.figures import new_figure, save_figure
from mimkit.training.run import LOG_EVERY


def even_windows(lines: list[dict[str, float]]) -> list[tuple[float, float]]:
    """Return (step, mean loss) over windows of about as many steps each, from the lines of metrics.jsonl with a loss.

    A loss is logged every few steps and before each checkpoint. The window of a few steps between the two is noisy, so
    it is joined with the next one, and the last one with the one before.
    """
    points: list[tuple[float, float]] = []
    starts = [0.0, *(line["step"] for line in lines)]
    counts = [line["step"] - start for line, start in zip(lines, starts, strict=False)]
    needed, total, steps = min(LOG_EVERY, max(counts, default=0)), 0.0, 0.0
    for line, count in zip(lines, counts, strict=True):
        total, steps = total + line["loss"] * count, steps + count
        if steps >= needed:
            points.append((line["step"], total / steps))
            last, (total, steps) = (total, steps), (0.0, 0.0)
    if steps:
        points[-1] = (lines[-1]["step"], (last[0] + total) / (last[1] + steps))
    return points


def curves(metrics: list[dict[str, float]], file: Path) -> None:
    """Draw the loss, the learning rate and the accuracies that were logged, with their standard errors.

    Args:
        metrics: lines of metrics.jsonl.
        file: the picture to write.
    """
    titles = {
        "knn_10": "kNN accuracy, % (k = 10)",
        "top1": "top-1 accuracy, %",
        "miou": "mIoU, %",
        "box_ap": "box AP, %",
    }
    names = [n for n in ("loss", "lr", *titles) if any(n in line for line in metrics)]
    figure, axes = new_figure((4 * max(1, len(names)), 3), columns=max(1, len(names)))
    for name, axis in zip(names, axes[0], strict=False):
        lines = [line for line in metrics if name in line]
        points = even_windows(lines) if name == "loss" else [(line["step"], line[name]) for line in lines]
        errors = [line.get(f"{name}_se", 0.0) for line in lines] if name != "loss" else [0.0]
        marker = "o" if len(points) < 10 else None
        axis.errorbar(*zip(*points, strict=True), errors if any(errors) else None, capsize=3, marker=marker)
        axis.set_title(titles.get(name, name))
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    save_figure(figure, file)
