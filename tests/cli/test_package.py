"""What a stranger meets: the wheel, the command, the README."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import RECIPES, command
from mimkit.recipes import mae_hivit, mae_svit, mae_vit, simmim_svit, simmim_swin
from PIL import Image

from mimkit.config import presets

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps, and its images in two classes."""
    folder = tmp_path_factory.mktemp("trained")
    for i in range(40):
        place = folder / "images" / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 128, (20, 24, 3)) + 127 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    argv = ["--data", str(folder / "images"), "--out", str(folder / "run"), "--epochs", "1", "--batch-size", "16"]
    mae_hivit.main([*argv, "--workers", "0"])
    return folder


def test_models(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    code, out, _ = command(capsys, monkeypatch, "models")
    assert code == 0
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if "│" in line}
    assert "README's 'base' row" in rows["hivit_b24"]
    assert [w.strip() for w in rows["hivit_b"].split("│")[2:5]] == ["66.42 M", "15.81", "4, 8, 16"]
    assert [w.strip() for w in rows["hpvit_b"].split("│")[2:5]] == ["86.57 M", "19.30", "4, 8, 16, 32"]
    _, out, _ = command(capsys, monkeypatch, "models", "--img-size", "256x512")
    assert "256x512" in out


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


def test_wrong_words_are_one_sentence(capsys, monkeypatch, trained, tmp_path):
    encoder = str(trained / "run" / "encoder")
    for argv, message in [
        (["knn"], "model"),
        (["knn", "--model", "hivit_x"], "--model hivit_x is not known"),
        (["knn", "--model", encoder, "--data", str(tmp_path / "nowhere")], "no such file or folder"),
        (["knn", "--model", encoder, "--data", str(tmp_path)], "has no images"),
        (["probe", "--model", str(tmp_path)], "cannot be loaded"),
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


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_print_and_reload_their_configuration(recipe, capsys, tmp_path):
    name = recipe.__name__.rsplit(".", 1)[-1]
    for argv in ([], ["--model", "hivit_b"], *(["--config", preset] for preset in presets(name))):
        with pytest.raises(SystemExit) as stop:
            recipe.main([*argv, "--print_config"])
        assert not stop.value.code
        printed = capsys.readouterr().out
        (tmp_path / "config.yaml").write_text(printed)
        with pytest.raises(SystemExit):
            recipe.main(["--config", str(tmp_path / "config.yaml"), "--print_config"])
        assert capsys.readouterr().out == printed
        preset = presets(name).get(argv[-1] if argv else f"{name}_small")
        chosen = yaml.safe_load(preset.read_text()) if preset else {}
        assert f"batch_size: {chosen.get('batch_size', recipe.Options().batch_size)}\n" in printed
    with pytest.raises(SystemExit):
        recipe.main(["--help"])
    assert "--batch-size" in capsys.readouterr().out


def test_published_defaults():
    hivit, vit = mae_hivit.Options(), mae_vit.Options()
    assert (hivit.blr, hivit.epochs, hivit.warmup_epochs, hivit.batch_size) == (1e-4, 1600, 40, 4096)
    assert (vit.blr, vit.epochs, vit.warmup_epochs, vit.batch_size) == (1.5e-4, 800, 40, 4096)
    for options in (hivit, vit):
        assert (options.mask_ratio, options.norm_targets, options.weight_decay) == (0.75, True, 0.05)
        assert (options.betas, options.crop_scale) == ((0.9, 0.95), (0.2, 1.0))
    assert (hivit.decoder_dim, hivit.decoder_depth, hivit.decoder_heads) == (512, 6, 16)
    assert vit.decoder_depth == 8
    swin, svit = simmim_swin.Options(), simmim_svit.Options()
    assert (swin.model, swin.img_size, swin.model_args) == ("swin_base_patch4_window7_224", 192, {"window_size": 6})
    assert (svit.model, svit.img_size, mae_svit.Options().mask_ratio) == ("svit_b", 224, 0.6)
    for options in (swin, svit):
        assert (options.mask_ratio, options.clip_grad, options.weight_decay) == (0.6, 5, 0.05)
        assert (options.betas, options.crop_scale) == ((0.9, 0.999), (0.67, 1.0))
        assert (options.epochs, options.warmup_epochs, options.batch_size, options.blr) == (100, 10, 2048, 1e-4)


@pytest.mark.slow
def test_the_wheel_works_on_its_own(tmp_path, trained):
    """Built from the files that git knows, unpacked into an empty folder, run from elsewhere."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).exists():
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "source" / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(tmp_path / "source")]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(tmp_path.glob("mimkit-*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"mimkit"}
    for name in (
        "recipes/mae_hivit.py",
        "recipes/presets/mae_hivit_small.yaml",
        "recipes/references/mae_hivit_small.yaml",
        "converters/mae.py",
        "sample/LICENSE",
    ):
        assert f"mimkit/{name}" in names
    assert sum(zipfile.ZipFile(wheel).getinfo(f"mimkit/sample/{p}.parquet").file_size for p in ("train", "test")) < 8e6
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True)

    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}

    def python(*argv):
        done = subprocess.run([sys.executable, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    where = python("-c", "import mimkit.recipes.mae_hivit as r, mimkit as m; print(m.__file__, r.__file__)").split()
    assert all(Path(file).is_relative_to(tmp_path / "site") for file in where)
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    argv = ["--data", str(trained / "images"), "--epochs", "1", "--batch-size", "16", "--workers", "0"]
    said = python(*launch, "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "mimkit.recipes.mae_hivit", *argv)
    assert "wrote runs/mae_hivit/" in said
    assert (tmp_path / "runs" / "mae_hivit" / "encoder" / "model.safetensors").exists()
    assert "hivit_b24" in python("-m", "mimkit.cli", "models")
    code = (
        "import timm, torch; net = timm.create_model('vit_tiny_patch16_224'); torch.save(net.state_dict(), 'vit.pth')"
    )
    python("-c", code)
    convert = ["--from", "vit_tiny_patch16_224", "--checkpoint", "vit.pth", "--layout", "timm", "--out", "converted"]
    assert "the pyramid is the plain ViT: passed" in python("-m", "mimkit.cli", "convert", *convert)
    assert (tmp_path / "converted" / "report.md").exists()


def test_readme_tells_what_is_there():
    text = (ROOT / "README.md").read_text()
    block = re.search(r"```\w*\n(.*?)```", text, re.DOTALL).group(1).strip().splitlines()
    assert len(block) == 2
    assert "accelerate launch recipes/mae_hivit.py" in block[0]
    assert block[1].endswith("pytest")
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:mimkit|recipes|benchmarks|docs|converters|tests)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
    commands = {"models", "convert", "knn", "probe", "reconstruct", "predict", "export", "push", "doctor"}
    assert set(re.findall(r"\bmimkit (\w+) --", text)) <= commands
