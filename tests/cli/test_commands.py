"""The commands on a run, their help, and what they refuse."""

import re

import docstring_parser
import numpy as np
import pytest
import timm
from conftest import command
from mimkit.recipes import mae_hivit
from PIL import Image

from mimkit import cli

ALL = [function.__name__ for function in cli.COMMANDS]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Write 40 images in two classes, dark and bright ones, and a run of two steps on them."""
    folder = tmp_path_factory.mktemp("trained")
    for i in range(40):
        file = folder / "images" / f"class{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 128, (20, 24, 3)) + 127 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(file)
    argv = ["--data", str(folder / "images"), "--out", str(folder / "run"), "--epochs", "1", "--batch-size", "16"]
    mae_hivit.main([*argv, "--workers", "0"])
    return folder


def rows(out):
    """Return the rows of the table that `mimkit models` prints, by name."""
    cells = ([cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line)
    return {name: others for name, *others in cells}


def test_models_shows_sizes_costs_and_strides(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(timm, "list_models", lambda patterns: ["hivit_b", "hivit_b24", "hpvit_b"])
    code, out, _ = command(capsys, monkeypatch, "models")
    assert code == 0
    table = rows(out)
    assert "README's 'base' row" in table["hivit_b24"][-1]
    assert table["hivit_b"][:3] == ["66.42 M", "15.81", "4, 8, 16"]
    assert table["hpvit_b"][:3] == ["86.57 M", "19.30", "4, 8, 16, 32"]
    monkeypatch.setattr(timm, "list_models", lambda patterns: ["hivit_nano"])
    code, out, _ = command(capsys, monkeypatch, "models", "--img-size", "256x512")
    assert code == 0
    assert "256x512" in out


@pytest.mark.slow
def test_models_lists_every_network(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    code, out, _ = command(capsys, monkeypatch, "models")
    assert code == 0
    assert rows(out).keys() == {*timm.list_models(["hivit_*", "hpvit_*", "svit_*"])}
    code, out, _ = command(capsys, monkeypatch, "models", "--img-size", "256x512")
    assert code == 0
    assert len(rows(out)) == 14


@pytest.mark.parametrize("name", ["knn", "probe"])
def test_knn_and_probe_take_arguments_of_the_network(name, capsys, monkeypatch, images):
    argv = ["--model", "hivit_nano", "--data", images, "--img-size", "32", "--model-args"]
    code, out, _ = command(capsys, monkeypatch, name, *argv, "{embed_dim: 16, num_heads: 2}")
    assert code == 0
    assert " %" in out
    sizes = []
    monkeypatch.setattr("mimkit.evaluation.features.extract_parts", lambda *given: sizes.append(given[2]) or (1, 2))
    with pytest.raises(AttributeError):  # there are no features
        command(capsys, monkeypatch, name, *argv[:4], "--model-args", "{img_size: 64}")
    assert sizes == [(64, 64)]
    code, _, err = command(capsys, monkeypatch, name, *argv, "{embed_dimension: 16}")
    assert code == 2
    assert "embed_dimension" in err


def test_commands_on_a_run(capsys, monkeypatch, trained, tmp_path):
    encoder, images = str(trained / "run" / "encoder"), str(trained / "images")
    code, out, _ = command(capsys, monkeypatch, "knn", "--model", encoder, "--data", images)
    assert code == 0
    assert re.search(r"kNN \d+\.\d\d % \(k = 10, 32 training and 8 test images\)", out)
    code, out, _ = command(capsys, monkeypatch, "probe", "--model", encoder, "--data", images)
    assert code == 0
    assert float(re.search(r"linear probe (\d+\.\d\d) %", out).group(1)) > 90  # dark and bright images
    picture = tmp_path / "new" / "picture.png"
    argv = ["--run", str(trained / "run"), "--images", images, "--out", str(picture), "--count", "3"]
    code, out, _ = command(capsys, monkeypatch, "reconstruct", *argv)
    assert (code, out) == (0, f"wrote {picture}\n")
    assert Image.open(picture).size[0] > 300


def test_wrong_arguments_are_refused_in_one_sentence(capsys, monkeypatch, trained, tmp_path):
    encoder = str(trained / "run" / "encoder")
    for argv, message in [
        (["knn"], "model"),
        (["knn", "--model", "hivit_x"], "--model hivit_x is unknown to timm"),
        (["knn", "--model", encoder, "--data", str(tmp_path / "nowhere")], "no such file or folder"),
        (["knn", "--model", encoder, "--data", str(tmp_path)], "has no images"),
        (["probe", "--model", str(tmp_path)], "holds no config.json. Pass a run"),
        (["models", "--img-size", "100"], "100 px is not a multiple of the mask unit of 16 px"),
        (["reconstruct", "--run", str(tmp_path)], "holds no encoder/"),
        (["reconstruct", "--run", str(trained / "run"), "--out", "x.txt"], "x.txt is no picture"),
        (["dance"], "dance"),
    ]:
        code, _, err = command(capsys, monkeypatch, *argv)
        assert code == 2, argv
        assert message in err, (argv, err)
    assert command(capsys, monkeypatch, "--version")[1].startswith("mimkit 0.")
    assert "reconstruct" in command(capsys, monkeypatch)[1]


@pytest.mark.parametrize("name", ALL)
def test_the_help_of_a_command_fits_on_a_screen(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = command(capsys, monkeypatch, name, "--help")
    assert code == 0
    assert len(out.splitlines()) <= 60
    assert out.startswith(f"usage: mimkit {name}")


def test_help_lines_are_sentences_and_agree_between_commands():
    texts = {}
    for function in cli.COMMANDS:
        doc = docstring_parser.parse(function.__doc__)
        assert re.fullmatch(r"[A-Z][^.]*(\.\w+[^.]*)*\.", doc.short_description), function.__name__
        for argument in doc.params:
            text = " ".join(argument.description.split())
            assert re.match("[A-Z'/.]", text), text
            assert text.endswith("."), text
            texts.setdefault(argument.arg_name, set()).add(text)
    for name in ("model", "data", "max_bad", "dry_run"):
        assert len(texts[name]) == 1, name
