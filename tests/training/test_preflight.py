"""What a run says before its first step, and what `mimkit doctor` says of it, and of its loss."""

import json
import random
import time
from functools import partial

import mimkit.preflight
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from conftest import command, encoded, picture
from mimkit.recipes import mae_hivit, simmim_svit
from PIL import Image
from safetensors.torch import load_file

from mimkit.data import transforms
from mimkit.doctor import preflight
from mimkit.doctor.loss_bands import health, losses, nearest, references, tolerance
from mimkit.methods.mae import MAE

TINY = ["--batch-size", "8", "--workers", "0", "--epochs", "2"]
FULL = preflight.FULL


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(mimkit.preflight, "FULL", FULL._replace(seconds=0.2))


@pytest.fixture
def images(tmp_path):
    """37 gray images as bright as half of all, in a folder."""
    (tmp_path / "images").mkdir()
    for i in range(37):
        pixels = np.random.default_rng(i).normal(128, 64, (20, 24 + i % 2)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i:02d}.png")
    return tmp_path / "images"


@pytest.fixture
def doctor(capsys, monkeypatch, tmp_path):
    """`mimkit doctor mae_hivit` -> (exit code, lines by name, all of it); it leaves nothing behind."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*argv, recipe="mae_hivit"):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = command(capsys, monkeypatch, "doctor", recipe, *TINY, *argv)
        assert sorted(tmp_path.rglob("*")) == before
        return code, dict(line.split(maxsplit=1) for line in out.splitlines() if " " in line), out + err

    return call


def test_numbers_are_right(doctor, images):
    code, lines, said = doctor("--data", images, "--mask-ratio", "0.7", "--decode-ratio", "0.5", "--lr", "0.01")
    assert code == 0, said
    assert "nothing found that would spoil the run" in said
    assert lines["data"] == "37 images; of 37 looked at 0 cannot be read, 0 are copies of another of these"
    assert lines["images"].startswith("20x24 to 20x25 px (height x width), L (100%), read as 3 channels")
    # 32 px, units of 4: 64, of which floor(64 x .3) = 19 are visible, and half of 45 predicted
    assert lines["units"] == "8 x 8 of 4 px = 64: 19 visible, 45 masked, 22 of them predicted"
    # 37 images are 4 batches of 8; .3 epochs of warm-up are 1 step
    assert lines["steps"].startswith("batch 8 = 8 images x 1 processes x 1 parts; 4 steps an epoch, 8 in 2 epochs; ")
    assert lines["steps"].endswith("lr 0.01 after 1 steps of warm-up")
    numbers = np.concatenate([np.asarray(Image.open(file)).ravel() for file in sorted(images.iterdir())]) / 255
    assert f"mean {' '.join([f'{numbers.mean():.3f}'] * 3)}" in lines["colors"]
    assert float(lines["colors"].split("deviation ")[1].split()[0]) == pytest.approx(numbers.std(), abs=2e-3)
    assert "no reference: data is" in lines["loss"]


def test_memory_and_disk(doctor, images, tmp_path, capsys):
    _, lines, _ = doctor("--data", images)
    out = tmp_path / "run"
    mae_hivit.main(["--data", str(images), "--out", str(out), *TINY])
    written = sum(file.stat().st_size for file in (out / "checkpoints" / "step-00000008").glob("*.safetensors"))
    # save_every is 1 of 2 epochs: 2 checkpoints
    assert lines["disk"].startswith("2 checkpoints of ")
    assert float(lines["disk"].split()[3]) == pytest.approx(written / 1e6, rel=0.03)
    parts = dict(part.rsplit(" ", 2)[:2] for part in lines["memory"].split(": ")[1].split(", "))
    assert float(parts["gradients"]) * 2 == pytest.approx(float(parts["optimizer"]), rel=0.02)
    twice = float(doctor("--data", images, "--batch-size", "16")[1]["memory"].split("backward ")[1].split()[0])
    assert twice == pytest.approx(2 * float(parts["kept for backward"]), rel=0.05)
    assert "grad" not in capsys.readouterr().err


def test_what_would_spoil_a_run(doctor, images, monkeypatch):
    for i in (3, 20):
        (images / f"{i:02d}.png").write_bytes(b"no image")
    code, _, said = doctor("--data", images, "--max-bad", "0.1")
    assert code == 0
    assert f"{images}/03.png (not an image of a known kind)" in said  # named all the same
    code, _, said = doctor("--data", images)
    assert code == 1
    assert "WARNING: 2 of 37 images cannot be read, more than --max-bad 0.01 allows" in said
    assert f"{images}/20.png (not an image" in said

    code, _, said = doctor("--data", images, "--max-bad", "1", "--mean", "[123]", "--std", "[58]")
    assert code == 1
    assert "WARNING: The images have mean 0.5" in said

    for i in range(5):
        (images / f"again{i}.png").write_bytes((images / "05.png").read_bytes())
    code, _, said = doctor("--data", images, "--max-bad", "1")
    assert code == 1
    assert f"WARNING: 5 of 42 images are copies of another, such as {images}/again0.png of {images}/05.png" in said

    code, _, said = doctor("--data", images, "--batch-size", "64")
    assert code == 2
    assert "--batch-size 64 is more than the 42 images" in said


def test_full_disks_and_small_memories(doctor, images, monkeypatch):
    free = type("Usage", (), {"free": 10_000_000})
    monkeypatch.setattr(mimkit.preflight, "disk_usage", lambda place: free)
    code, _, said = doctor("--data", images)
    assert code == 1
    assert "WARNING: 2 checkpoints take " in said
    assert doctor("--data", images, "--model-args", "{embed_dim: 40}", "--save-every", "2")[0] == 0  # and a smaller one
    monkeypatch.setattr(mimkit.preflight, "disk_usage", lambda place: type("Usage", (), {"free": 10**12}))
    memory = type("Memory", (), {"total": 22_000_000})
    monkeypatch.setattr(mimkit.preflight.psutil, "virtual_memory", lambda: memory)
    code, _, said = doctor("--data", images)
    assert code == 1
    assert "pass --grad-accum-steps" in said


def test_the_slower_one_is_named(doctor, images, monkeypatch):
    def slowly(function, *argv, **more):
        time.sleep(0.1)
        return function(*argv, **more)

    with monkeypatch.context() as patch:
        forward = MAE.forward
        patch.setattr(MAE, "forward", lambda *argv: time.sleep(1.5) or forward(*argv))
        assert "the network is the bottleneck" in doctor("--data", images)[1]["speed"]
    make = transforms.train_transform
    monkeypatch.setattr(mae_hivit, "train_transform", lambda *argv: partial(slowly, make(*argv)))
    _, lines, _ = doctor("--data", images)
    assert "the loader is the bottleneck" in lines["speed"]
    assert 6 < float(lines["speed"].split()[0]) < 10.1  # 100 ms an image
    rate = float(lines["time"].split("checks, ")[1].split()[0])
    assert rate < 10.1  # they take turns


def test_together():
    assert preflight.together(100, 100, 0, 4) == pytest.approx(50)
    assert preflight.together(100, 1000, 4, None) == pytest.approx(100)
    assert preflight.together(1000, 100, 1, 2) == pytest.approx(1 / (1 / 100 + 0.5 / 1000))


@pytest.mark.parametrize("recipe", [mae_hivit, simmim_svit], ids=["hivit", "svit"])  # the second has running statistics
def test_a_run_is_the_same_with_it(recipe, images, tmp_path, monkeypatch, capsys):
    weights, made = [], recipe.preflight

    def watched(*argv):
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        made(*argv)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]

    monkeypatch.setattr(recipe, "preflight", watched)
    for way in ("with", "without"):
        if way == "without":
            monkeypatch.setattr(recipe, "preflight", lambda *argv: None)
        recipe.main(["--data", str(images), "--out", str(tmp_path / way), *TINY])
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        said = capsys.readouterr().out
        assert ("configured mean" in said) is (way == "with")
        weights.append(load_file(tmp_path / way / "checkpoints" / "step-00000008" / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert "Its loss cannot be compared with ours: " in said
    (tmp_path / "with" / "checkpoints" / "step-00000008").rename(tmp_path / "gone")
    monkeypatch.undo()
    recipe.main(["--data", str(images), "--out", str(tmp_path / "with"), "--resume", "auto", *TINY])
    assert "configured mean" not in capsys.readouterr().out  # a resumed run has been looked at


def test_streams_and_workers(doctor, tmp_path):
    import datasets

    rows = [{"bytes": encoded(picture(i, (12, 12))), "path": None} for i in range(30)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(tmp_path / "train.parquet")
    code, lines, _ = doctor("--data", tmp_path / "train.parquet", "--streaming", "--workers", "1")
    assert code == 0
    assert "of 30 looked at 0 cannot be read" in lines["data"]
    assert "images/s by 1 workers" in lines["speed"]


def test_no_false_alarm_on_sample(doctor):
    code, lines, said = doctor("--config", "mae_hivit_small", "--epochs", "3", "--batch-size", "32")
    assert (code, "WARNING" in said) == (0, False)
    assert lines["loss"].startswith("of our own runs of mae_hivit_small: ")


def test_wrong_words(capsys, monkeypatch, tmp_path):
    for argv, message in [
        (["dance"], "choose a recipe among detect"),
        (["linear_probe"], "has no --dry-run"),
        (["--run", tmp_path], "holds no config.yaml"),
        (["mae_hivit", "--dance", "1"], "dance"),
    ]:
        code, _, err = command(capsys, monkeypatch, "doctor", *argv)
        assert (code, message in err) == (2, True), err
    assert "doctor --run DIR" in command(capsys, monkeypatch, "doctor", "--help")[1]


# Health --------------------------------------------------------------------------------------------------------------


def written(folder, scale=lambda fraction: 1.0, waiting=0.05, **changes):
    """A run of mae_hivit_small's options whose losses are the reference's, times something."""
    reference = next(found for found in references() if found.name == "mae_hivit_small")
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(reference.options | {"seed": 7, "out": "x"} | changes))
    lines = [{"step": 20, "loss": 1.5}]
    lines += [{"step": round(936 * f), "loss": scale(f) * values[0]} for f, values in reference.loss.items()]
    about = [line | {"epoch": line["step"] / 312, "waiting": waiting} for line in lines]
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in about) + "\n")
    return folder


def test_health(tmp_path, capsys, monkeypatch):
    for name, make, code, words in [
        ("fine", {}, 0, "Its loss is inside the band of mae_hivit_small (0.727 after 100%"),
        ("high", {"scale": lambda f: 1 + 0.1 * (f == 1)}, 1, "Its loss is above the band"),
        ("low", {"scale": lambda f: 0.9}, 0, "Its loss is below the band"),
        ("flat", {"scale": lambda f: 3}, 1, "The loss did not fall from 1.500"),
        ("nan", {"scale": lambda f: float("nan") if f == 0.5 else 1}, 1, "The loss is not finite at step 468"),
        ("waits", {"waiting": 0.5}, 0, "It waited for data in 50% of the time: raise --workers"),
        ("other", {"norm_targets": False}, 0, "cannot be compared with ours: norm_targets is False and not True"),
    ]:
        folder = written(tmp_path / name, **make)
        got, out, _ = command(capsys, monkeypatch, "doctor", "--run", folder)
        assert (got, words in out) == (code, True), out
    early = tmp_path / "fine" / "metrics.jsonl"
    early.write_text(early.read_text().splitlines()[0] + "\n")
    assert "too early" in " ".join(health(tmp_path / "fine")[0])


def test_references_are_of_the_presets():
    """Every pre-training preset's options, as a run resolves them, still are those of its reference."""
    names = {"mae_hivit_small", "mae_svit_small", "mae_vit_small", "simmim_svit_small", "simmim_swin_small"}
    assert {reference.name for reference in references()} == names
    for reference in references():
        assert reference.tolerance == pytest.approx(tolerance(reference.loss), abs=1e-4)
        assert nearest(reference.options)[1] == []
        assert nearest(reference.options)[0].name == reference.name


def test_losses_are_of_the_tenth_before():
    lines = [{"step": step, "loss": float(step)} for step in range(10, 61, 10)]
    assert losses(lines, 100, [0.25, 0.5, 0.75]) == {0.25: 20.0, 0.5: 50.0}
