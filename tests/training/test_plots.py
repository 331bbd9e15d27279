"""Figures: they are drawn whatever backend a notebook exports, and show no more than was measured."""

import os
import subprocess
import sys

import torch

from mimkit.evaluation.knn import standard_error
from mimkit.tasks import plots as tasks_plots
from mimkit.training import plots


def test_figures_are_drawn_whatever_backend_is_exported(tmp_path):
    """Without matplotlib_inline, which a notebook of another environment exports, matplotlib cannot be imported."""
    backend = "module://matplotlib_inline.backend_inline"
    code = (
        "import os, sys, types; sys.modules['mimkit.models'] = types.ModuleType('mimkit.models')\n"  # it takes seconds
        "from mimkit.figures import new_figure, save_figure\n"
        "figure, axes = new_figure((2, 2)); save_figure(figure, 'a.png'); save_figure(figure, 'a.pdf')\n"
        "print(os.environ['MPLBACKEND'], 'matplotlib.pyplot' in sys.modules)"
    )
    environment = os.environ | {"MPLBACKEND": backend}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"{backend} False\n", done.stderr  # the user's figures are left alone
    assert {file.name for file in tmp_path.iterdir()} == {"a.png", "a.pdf"}


def test_the_user_s_own_figures_keep_the_backend(tmp_path):
    code = (
        "import sys, types; sys.modules['mimkit.models'] = types.ModuleType('mimkit.models')\n"
        "from mimkit.figures import new_figure; new_figure((2, 2))\n"
        "import matplotlib; print(matplotlib.get_backend())"
    )
    environment = os.environ | {"MPLBACKEND": "svg"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "svg\n", done.stderr


def test_a_short_window_at_a_checkpoint_is_no_spike():
    """Checkpoints after 63 and 126 steps: windows of 3 and 6 steps, whose noise looked like spikes."""
    lines = [{"step": step, "loss": loss} for step, loss in ((20, 3.0), (40, 2.0), (60, 1.0), (63, 9.0), (80, 1.0))]
    points = plots.even_windows([*lines, {"step": 100, "loss": 1.0}, {"step": 102, "loss": 7.0}])
    assert points == [(20, 3.0), (40, 2.0), (60, 1.0), (80, (3 * 9 + 17) / 20), (102, (20 + 2 * 7) / 22)]
    assert plots.even_windows(lines[:1]) == [(20, 3.0)]
    short = [{"step": step, "loss": float(step)} for step in (1, 2, 3)]  # a run that saves after each step
    assert plots.even_windows(short) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def drawn(monkeypatch, module, draw, *args):
    """The figure that a function saves, laid out."""
    figures = []
    monkeypatch.setattr(module, "save_figure", lambda figure, *_, **__: figures.append(figure))
    draw(*args, None)
    (figure,) = figures
    figure.tight_layout()
    figure.canvas.draw()
    return figure


def test_knn_accuracies_show_their_standard_error(monkeypatch):
    assert standard_error(50.0, 100) == 5.0
    lines = [{"step": step, "knn_10": value, "knn_10_se": 5.0} for step, value in ((0, 50.0), (10, 60.0))]
    axis = drawn(monkeypatch, plots, plots.curves, lines).axes[0]
    (bars,) = axis.containers
    assert [[end.tolist() for end in bar] for bar in bars[2][0].get_segments()] == [
        [[0, 45], [0, 55]],
        [[10, 55], [10, 65]],
    ]
    before = [{"step": 0, "knn_10": 50.0}]  # written by an earlier version
    assert not drawn(monkeypatch, plots, plots.curves, before).axes[0].containers[0].has_yerr


def test_labels_of_objects_stay_inside_their_frames(monkeypatch):
    corners = [[0.0, 0, 9, 9], [90, 0, 99, 9], [0, 90, 9, 99], [90, 90, 99, 99], [-5, -5, 120, 120], [40, 40, 60, 60]]
    found = {"boxes": torch.tensor(corners), "labels": torch.ones(6, dtype=torch.int64), "scores": torch.ones(6)}
    example = torch.zeros(3, 100, 100), {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}, found
    figure = drawn(monkeypatch, tasks_plots, tasks_plots.plot_detections, [example, example], ["motorcycle"])
    frames = [axis for axis in figure.axes if axis.texts]
    assert len(frames) == 2
    for axis in frames:
        frame = axis.get_window_extent()
        for text in axis.texts:
            inside = text.get_window_extent()
            assert frame.x0 - 1 <= inside.x0 <= inside.x1 <= frame.x1 + 1
            assert frame.y0 - 1 <= inside.y0 <= inside.y1 <= frame.y1 + 1
            assert text.get_clip_on()  # a name may be longer than the image is wide
