"""Training curves."""

from pathlib import Path

from matplotlib import pyplot as plt

from mimkit.figures import save_figure


def curves(metrics: list[dict[str, float]], file: Path) -> None:
    """Write a picture of the loss, the learning rate and what accuracy was measured."""
    titles = {
        "knn_10": "kNN accuracy, % (k = 10)",
        "top1": "top-1 accuracy, %",
        "miou": "mIoU, %",
        "box_ap": "box AP, %",
    }
    names = [n for n in ("loss", "lr", *titles) if any(n in line for line in metrics)]
    figure, axes = plt.subplots(1, max(1, len(names)), figsize=(4 * max(1, len(names)), 3), squeeze=False)
    for name, axis in zip(names, axes[0], strict=False):
        points = [(line["step"], line[name]) for line in metrics if name in line]
        axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 10 else None)
        axis.set_title(titles.get(name, name))
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    save_figure(figure, file)
