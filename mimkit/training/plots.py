"""Training curves."""

from pathlib import Path

from mimkit.figures import pyplot, save_figure


def curves(metrics: list[dict[str, float]], file: Path) -> None:
    """Draw the loss, the learning rate and the accuracies that were logged.

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
    figure, axes = pyplot().subplots(1, max(1, len(names)), figsize=(4 * max(1, len(names)), 3), squeeze=False)
    for name, axis in zip(names, axes[0], strict=False):
        points = [(line["step"], line[name]) for line in metrics if name in line]
        axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 10 else None)
        axis.set_title(titles.get(name, name))
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    save_figure(figure, file)
