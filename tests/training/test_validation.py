"""Measuring a network while it trains: scores, kNN accuracy, curves, and what is printed and exported."""

import io
import json
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from mimkit.data.order import Plan
from mimkit.data.sources import open_source
from mimkit.data.transforms import Normalize
from mimkit.errors import UserError
from mimkit.methods.checkpoint import load_run
from mimkit.methods.decoder import Decoder
from mimkit.methods.mae import MAE
from mimkit.models.factory import unit_encoder
from mimkit.training import online_knn
from mimkit.training.display import Display
from mimkit.training.export import export_pretrained
from mimkit.training.online_knn import OnlineKNN
from mimkit.training.plots import curves
from mimkit.training.run import Run
from mimkit.training.validation import Evaluator


@pytest.fixture
def run(tmp_path):
    """A run with a directory."""
    run = Run("line", out=str(tmp_path / "run"), precision="fp32")
    run.make_plan(40, 8, 12)
    run.write_config({})
    return run


def logged(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


# Scores --------------------------------------------------------------------------------------------------------------


class Task:
    """A task that is scored by the weight of a network."""

    figure = "top1"
    test = SimpleNamespace(name="my images")
    hints = ("predict --model {model} --images {images}", "export --model {model}")

    def score(self, network):
        return {"top1": network.weight.item(), "top5": network.weight.item() + 5}

    def format_scores(self, scores):
        return f"top-1 {scores['top1']:.1f} %"

    def write(self, network, folder):
        folder.mkdir(exist_ok=True)
        (folder / "weight").write_text(f"{network.weight.item():g}")

    def draw(self, folder):
        (folder / "confusion.png").touch()
        return ["confusion.png"]


def network(weight):
    found = nn.Linear(1, 1, bias=False)
    nn.init.constant_(found.weight, weight)
    return found


def test_the_last_and_the_best_network_are_kept(run, capsys):
    evaluator = Evaluator(run, Task())
    for step, (weight, best) in enumerate([(50, "50"), (70, "70"), (60, "70"), (70, "70"), (80, "80")]):
        evaluator(step, network(weight))
        assert (run.folder / "last" / "weight").read_text() == str(weight)
        assert (run.folder / "best" / "weight").read_text() == best
    assert logged(run)[1] == {"step": 1, "top1": 70.0, "top5": 75.0}
    assert "after 1 steps: top-1 70.0 %" in capsys.readouterr().out
    # a resumed run knows the best one of before
    Evaluator(run, Task())(5, network(75))
    assert (run.folder / "best" / "weight").read_text() == "80"


def test_the_first_score_is_the_best_even_if_it_is_zero(run):
    Evaluator(run, Task())(5, network(0))
    assert (run.folder / "best" / "weight").read_text() == "0"


def test_averaged_weights_count_if_there_are_any(run, capsys):
    Evaluator(run, Task())(7, network(50), ema=network(60))
    assert logged(run) == [{"step": 7, "top1_raw": 50.0}, {"step": 7, "top1": 60.0, "top5": 65.0}]
    assert (run.folder / "best" / "weight").read_text() == (run.folder / "last" / "weight").read_text() == "60"
    printed = capsys.readouterr().out
    assert "top-1 50.0 % without averaging; with averaged weights:\nafter 7 steps: top-1 60.0 %" in printed


def test_complete_weights_are_scored(run, monkeypatch):
    """Under engines that shard them, these are in a copy of the network."""
    shard, full = network(1), network(90)
    monkeypatch.setattr(run.engine, "full_state", lambda found: full if found is shard else found)
    Evaluator(run, Task())(3, shard)
    assert logged(run)[0]["top1"] == 90
    assert (run.folder / "last" / "weight").read_text() == "90"


def test_the_end_names_what_was_written(run, capsys):
    evaluator = Evaluator(run, Task())
    for step, weight in ((10, 50), (20, 70), (30, 60)):
        run.log(step, loss=1 / step)
        evaluator(step, network(weight))
    assert evaluator.finish(network(60)) == 60
    printed = capsys.readouterr().out
    assert f"wrote {run.folder}/: last/ (60.00 %) and best/ (70.00 % after 20 steps, chosen on the valid" in printed
    images = f"--images '{Task.test.name}'"  # quoted, as a shell needs it
    assert (
        f"next: mimkit predict --model {run.folder}/best {images}\n      mimkit export --model {run.folder}/best"
        in printed
    )
    assert "confusion.png, curves.png, metrics.jsonl" in printed
    assert {"confusion.png", "curves.png"} <= {file.name for file in run.folder.iterdir()}


def test_scoring_without_training(tmp_path, capsys):
    run = Run("line", out=str(tmp_path / "run"), precision="fp32")
    evaluator = Evaluator(run, Task())
    assert evaluator.evaluate_only(network(40), draw=False) == 40
    assert not run.folder.exists()
    assert evaluator.evaluate_only(network(40), draw=True) == 40
    assert [file.name for file in run.folder.iterdir()] == ["confusion.png"]  # nothing was trained: no curves
    printed = capsys.readouterr().out
    assert printed.startswith("top-1 40.0 %\n")
    assert f"wrote {run.folder}/confusion.png" in printed


# kNN -----------------------------------------------------------------------------------------------------------------


def knn(run, source, required=True):
    return OnlineKNN(run, source, (32, 32), Normalize([0.5] * 3, [0.25] * 3), workers=0, required=required)


def tiny_encoder():
    return unit_encoder("hivit_nano", img_size=32, patch_size=1, embed_dim=16, num_heads=2)


def test_knn_is_printed_and_logged(run, images, capsys):
    knn(run, open_source(images))(7, tiny_encoder(), "after 7 steps")
    (line,) = logged(run)
    assert line.keys() == {"step", "knn_10", "knn_20", "knn_10_se", "knn_20_se"}
    assert line["knn_10_se"] == pytest.approx((line["knn_10"] * (100 - line["knn_10"]) / 7) ** 0.5)
    assert 0 <= line["knn_10"] <= 100
    text = f"kNN after 7 steps: {line['knn_10']:.1f} % (k = 10), {line['knn_20']:.1f} % (k = 20), 25 + 7 images"
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("streaming", "message"),
    [
        (True, "kNN needs random access to images, which a stream lacks. Pass --streaming false."),
        (False, "kNN needs at least 10 training images; there are 5."),
    ],
    ids=["stream", "few images"],
)
def test_knn_that_is_impossible_is_an_error_if_it_was_asked_for(streaming, message, run, capsys, monkeypatch):
    few = SimpleNamespace(length=5)
    monkeypatch.setattr(online_knn, "open_labeled", lambda *_: (few, few))
    monkeypatch.setattr(online_knn, "set_value_range", lambda value_range, *parts: parts)
    source = SimpleNamespace(streaming=streaming, name="data", value_range=(0, 1))
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        knn(run, source)
    knn(run, source, required=False)(7, tiny_encoder(), "at random")
    assert capsys.readouterr().out == f"no kNN: {message}\n"
    assert not (run.folder / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("classes", "length", "images", "noisy"),
    [
        (10, 60_000, 5_000, ""),
        (1_000, 1_281_167, 50_000, ""),
        (200, 6_000, 10_000, "30 images per class"),
        (10, 90, 5_000, ""),
    ],
)
def test_knn_has_enough_images_per_class(classes, length, images, noisy, run, capsys, monkeypatch):
    about = {"about": "", "part": "held-out", "parts": ()}
    part = SimpleNamespace(length=length, label="label", rows={"label": list(range(classes))}, **about)
    monkeypatch.setattr(online_knn, "open_labeled", lambda *_: (part, part))
    monkeypatch.setattr(online_knn, "set_value_range", lambda value_range, *parts: parts)
    assert knn(run, SimpleNamespace(streaming=False, name="data", value_range=(0, 1))).images == images
    printed = capsys.readouterr().out.removesuffix("kNN: \n")
    assert bool(printed) == bool(noisy)
    assert not noisy or f"kNN has {noisy}, fewer than 50: its accuracy is noisy." in printed


# Output --------------------------------------------------------------------------------------------------------------


def test_curves_are_drawn(tmp_path):
    curves([{"step": step, "loss": 1 / step, "lr": step} for step in range(1, 30)], tmp_path / "two.png")
    curves([{"step": 1, "loss": 1.0}, {"step": 1, "knn_10": 50.0}, {"step": 2, "miou": 5.0}], tmp_path / "three.png")
    curves([], tmp_path / "none.png")
    widths = [Image.open(tmp_path / f"{name}.png").size[0] for name in ("two", "three", "none")]
    assert widths == [800, 1200, 400]


def test_an_exported_network_is_loaded(run):
    method = MAE(encoder := tiny_encoder(), Decoder(encoder.out_dim, encoder.unit_size, 3, 24, 1, 2), 0.75)
    export_pretrained(run, method, (32, 32), Normalize([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    loaded, config = load_run(run.folder)
    assert all(torch.equal(tensor, method.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert (config["mean"], config["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert timm.create_model(f"local-dir:{run.folder}/encoder", pretrained=True).patch_embed.patch_size == 1


def test_display_prints_on_the_main_process_only(capsys):
    for quiet in (True, False):
        display = Display(quiet)
        for _ in range(2):
            display.print("[b]a line[/b]")
            display.print_once("one line")
    assert capsys.readouterr().out == "[b]a line[/b]\none line\n[b]a line[/b]\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_or_lines(terminal):
    display, plan, out = Display(), Plan(40, 8, 60), io.StringIO()
    display.console = Console(file=out, force_terminal=terminal, width=200)
    with display.progress(0, 60):
        display.update(plan, 20, {"loss": 0.5}, rate=16.0, waiting=0.25, line=False)
        display.update(plan, 30, {"loss": 0.25}, rate=4.0, waiting=0.5, line=True)
        display.bar.refresh()
    text = "step 30/60 · loss 0.2500 · 4 images/s · waiting 50% · 1:00 left"
    assert text in out.getvalue()
    assert ("training" in out.getvalue()) == terminal
    assert terminal or out.getvalue() == f"{text}\n"
