"""Draw docs/converting.png: how an HPViT starts as the plain ViT that it was converted from.

python docs/converting.py [OUT]
"""

import itertools
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from einops import rearrange
from matplotlib.patches import ConnectionPatch, Rectangle

CELLS = 3  # tokens of the plain ViT along a side, in the picture
OWN = (1, 1)  # row and column of the sub-grid with the plain ViT's own patches, for the padding (4, 8)
COLORS = rearrange(plt.get_cmap("tab20c")(range(16)), "(n k) c -> n k c", n=4)
FRAME = {"fill": False, "edgecolor": "black", "linewidth": 1.6}


def finish(axis, x, y, title):
    """Set the limits and the title of a panel, and hide its axes."""
    axis.set(xlim=x, ylim=y, aspect="equal")
    axis.set_title(title, fontsize=9)
    axis.axis("off")


def draw_map(axis, side, color, is_framed, title):
    """Draw a map of side x side tokens. `color` and `is_framed` are functions of a token's row and column."""
    for row in range(side):
        for column in range(side):
            corner = (column + 0.05, side - 1 - row + 0.05)
            axis.add_patch(Rectangle(corner, 0.9, 0.9, color=color(row, column), linewidth=0))
            if is_framed(row, column):
                axis.add_patch(Rectangle(corner, 0.9, 0.9, **FRAME))
    finish(axis, (-0.1, side + 0.1), (-0.1, side + 0.1), title)


def draw_subgrids(axis, side, style, title):
    """Draw side x side separate sub-grids. `style` returns whether sub-grid (n, k) is framed, and its color."""
    step = CELLS + 0.8
    for n in range(side):
        for k in range(side):
            framed, color = style(n, k)
            for cell in range(CELLS**2):
                row, column = divmod(cell, CELLS)
                corner = (k * step + column, (side - 1 - n) * step + CELLS - 1 - row)
                axis.add_patch(Rectangle(corner, 0.92, 0.92, color=color, linewidth=0))
            if framed:
                corner = (k * step - 0.2, (side - 1 - n) * step - 0.2)
                axis.add_patch(Rectangle(corner, CELLS + 0.32, CELLS + 0.32, **FRAME))
    finish(axis, (-0.5, side * step), (-0.5, side * step), title)


def draw_pool(axis, row, column, title):
    """Draw the 2 x 2 weights of a pool, of which one is 1."""
    for place in range(4):
        y, x = divmod(place, 2)
        one = (y, x) == (row, column)
        axis.add_patch(Rectangle((x, 1 - y), 0.94, 0.94, facecolor="0.25" if one else "0.92", linewidth=0))
        axis.text(x + 0.47, 1.47 - y, "1" if one else "0", ha="center", va="center", color="white" if one else "0.5")
    finish(axis, (-0.6, 2.6), (-1.2, 3.2), title)


def draw(out: Path) -> None:
    """Draw the picture and write it to `out`."""
    figure, axes = plt.subplots(1, 6, figsize=(15, 3.6), width_ratios=[4, 4.6, 1.6, 2.8, 1.6, 2.2])
    figure.subplots_adjust(left=0.01, right=0.99, top=0.8, bottom=0.06, wspace=0.16)
    draw_map(
        axes[0],
        4 * CELLS,
        lambda row, column: COLORS[row % 4, column % 4],
        lambda row, column: (row % 4, column % 4) == OWN,
        "feature map at stride 4\n(framed: the plain ViT's own patches)",
    )
    draw_subgrids(
        axes[1],
        4,
        lambda n, k: ((n, k) == OWN, COLORS[n, k]),
        "stage 1: 16 sub-grids in the batch,\neach one a token grid of the plain ViT",
    )
    draw_pool(axes[2], OWN[0] % 2, OWN[1] % 2, "pool 1\n(initial weights)")
    draw_subgrids(
        axes[3],
        2,
        lambda n, k: ((n, k) == (0, 0), COLORS[2 * n + OWN[0] % 2, 2 * k + OWN[1] % 2]),
        "stage 2: 4 sub-grids,\nat 1/8 of the image",
    )
    draw_pool(axes[4], OWN[0] // 2, OWN[1] // 2, "pool 2\n(initial weights)")
    draw_subgrids(axes[5], 1, lambda n, k: (True, COLORS[OWN]), "stage 3: the plain ViT's\ntokens, at 1/16")
    for left, right in itertools.pairwise(axes):
        ends = {"xyA": (1.01, 0.5), "coordsA": "axes fraction", "xyB": (-0.03, 0.5), "coordsB": "axes fraction"}
        figure.add_artist(ConnectionPatch(**ends, axesA=left, axesB=right, arrowstyle="->"))
    figure.savefig(out, dpi=110)
    print(f"wrote {out}")


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".png"))
