"""Draw docs/converting.png: how an HPViT starts as the plain ViT. python docs/converting.py [OUT]"""

import itertools
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from einops import rearrange
from matplotlib.patches import ConnectionPatch, Rectangle

CELLS = 3  # tokens of the plain ViT along a side, in the picture
OURS = (1, 1)  # the sub-grid that holds the plain ViT's own patches, with padding (4, 8)
COLORS = rearrange(plt.get_cmap("tab20c")(range(16)), "(n k) c -> n k c", n=4)
DARK = "black"


def grid(axis, side, color, marked, title):
    """A map of side x side tokens; color and mark of each by its row and column."""
    for row in range(side):
        for column in range(side):
            own = marked(row, column)
            corner = (column + 0.05, side - 1 - row + 0.05)
            axis.add_patch(Rectangle(corner, 0.9, 0.9, color=color(row, column), linewidth=0))
            if own:
                axis.add_patch(Rectangle(corner, 0.9, 0.9, fill=False, edgecolor=DARK, linewidth=1.6))
    axis.set(xlim=(-0.1, side + 0.1), ylim=(-0.1, side + 0.1), aspect="equal")
    axis.set_title(title, fontsize=9)
    axis.axis("off")


def folded(axis, side, source, title):
    """side x side sub-grids, apart; each holds CELLS x CELLS tokens of one color."""
    step = CELLS + 0.8
    for n in range(side):
        for k in range(side):
            own, color = source(n, k)
            for cell in range(CELLS**2):
                row, column = divmod(cell, CELLS)
                corner = (k * step + column, (side - 1 - n) * step + CELLS - 1 - row)
                axis.add_patch(Rectangle(corner, 0.92, 0.92, color=color, linewidth=0))
            if own:
                corner = (k * step - 0.2, (side - 1 - n) * step - 0.2)
                axis.add_patch(Rectangle(corner, CELLS + 0.32, CELLS + 0.32, fill=False, edgecolor=DARK, linewidth=1.6))
    axis.set(xlim=(-0.5, side * step), ylim=(-0.5, side * step), aspect="equal")
    axis.set_title(title, fontsize=9)
    axis.axis("off")


def tap(axis, row, column, title):
    """A 2 x 2 pool with one weight of 1."""
    for place in range(4):
        y, x = divmod(place, 2)
        one = (y, x) == (row, column)
        axis.add_patch(Rectangle((x, 1 - y), 0.94, 0.94, facecolor="0.25" if one else "0.92", linewidth=0))
        axis.text(x + 0.47, 1.47 - y, "1" if one else "0", ha="center", va="center", color="white" if one else "0.5")
    axis.set(xlim=(-0.6, 2.6), ylim=(-1.2, 3.2), aspect="equal")
    axis.set_title(title, fontsize=9)
    axis.axis("off")


def draw(out: Path) -> None:
    """The whole picture."""
    figure, axes = plt.subplots(1, 6, figsize=(15, 3.6), width_ratios=[4, 4.6, 1.6, 2.8, 1.6, 2.2])
    figure.subplots_adjust(left=0.01, right=0.99, top=0.8, bottom=0.06, wspace=0.16)
    side = 4 * CELLS
    grid(
        axes[0],
        side,
        lambda row, column: COLORS[row % 4, column % 4],
        lambda row, column: (row % 4, column % 4) == OURS,
        "the map at stride 4\n(framed: the plain ViT's own patches)",
    )
    folded(
        axes[1],
        4,
        lambda n, k: ((n, k) == OURS, COLORS[n, k]),
        "stage 1: 16 sub-grids in the batch,\neach a plain ViT's grid",
    )
    tap(axes[2], OURS[0] % 2, OURS[1] % 2, "pool 1\nstarts as one tap")
    folded(
        axes[3],
        2,
        lambda n, k: ((n, k) == (0, 0), COLORS[2 * n + OURS[0] % 2, 2 * k + OURS[1] % 2]),
        "stage 2: 4 sub-grids,\n1/8 of the image",
    )
    tap(axes[4], OURS[0] // 2, OURS[1] // 2, "pool 2\nstarts as one tap")
    folded(axes[5], 1, lambda n, k: (True, COLORS[OURS]), "stage 3: the plain ViT's\ntokens, 1/16")
    for left, right in itertools.pairwise(axes):
        ends = {"xyA": (1.01, 0.5), "coordsA": "axes fraction", "xyB": (-0.03, 0.5), "coordsB": "axes fraction"}
        figure.add_artist(ConnectionPatch(**ends, axesA=left, axesB=right, arrowstyle="->"))
    figure.savefig(out, dpi=110)
    print(f"wrote {out}")


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".png"))
