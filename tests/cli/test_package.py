"""What a new user meets: the wheel, the recipes' options, the README."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import RECIPES
from mimkit.recipes import mae, mae_hivit, simmim

from mimkit import cli
from mimkit.config import presets

ROOT = Path(__file__).parent.parent.parent


PRESETS = {"mae_hivit": "mae"}  # recipes whose presets have the prefix of another one
SMALL = {"mae": "mae_hivit_small", "mae_hivit": "mae_hivit_small", "simmim": "simmim_swin_small"}


def printed(capsys, recipe, *argv):
    """Return what a recipe prints for --print_config."""
    with pytest.raises(SystemExit) as stop:
        recipe.main([*argv, "--print_config"])
    assert not stop.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__.rsplit(".", 1)[-1])
def test_recipes_print_and_reload_their_configuration(recipe, capsys, tmp_path):
    name = recipe.__name__.rsplit(".", 1)[-1]
    shipped = presets(PRESETS.get(name, name))
    for argv in ([], ["--model", "hivit_b"], *(["--config", preset] for preset in shipped)):
        config = printed(capsys, recipe, *argv)
        (tmp_path / "config.yaml").write_text(config)
        assert printed(capsys, recipe, "--config", str(tmp_path / "config.yaml")) == config
        preset = shipped.get(argv[-1] if argv else SMALL.get(name, f"{name}_small"))
        chosen = yaml.safe_load(preset.read_text()) if preset else {}
        assert f"batch_size: {chosen.get('batch_size', recipe.Options().batch_size)}\n" in config
    with pytest.raises(SystemExit):
        recipe.main(["--help"])
    assert "--batch-size" in capsys.readouterr().out


def test_published_defaults(capsys):
    """The defaults for each family of networks are those of its paper."""

    def defaults(recipe, model):
        return SimpleNamespace(**yaml.safe_load(printed(capsys, recipe, "--model", model)))

    hivit, vit, svit = (defaults(mae, model) for model in ("hivit_b", "vit_base_patch16_224", "svit_b"))
    assert (hivit.blr, hivit.epochs, hivit.warmup_epochs, hivit.batch_size) == (1e-4, 1600, 40, 4096)
    assert (vit.blr, vit.epochs, vit.warmup_epochs, vit.batch_size) == (1.5e-4, 800, 40, 4096)
    for options in (hivit, vit):
        assert (options.mask_ratio, options.norm_targets, options.weight_decay) == (0.75, True, 0.05)
        assert (options.betas, options.crop_scale) == ([0.9, 0.95], [0.2, 1.0])
    assert (hivit.decoder_dim, hivit.decoder_depth, hivit.decoder_heads) == (512, 6, 16)
    assert vit.decoder_depth == 8
    assert svit.mask_ratio == 0.6
    assert defaults(mae_hivit, "hivit_b") == hivit
    svit, swin = (defaults(simmim, model) for model in ("svit_b", "swin_base_patch4_window7_224"))
    assert simmim.Options().model == swin.model == "swin_base_patch4_window7_224"
    assert (swin.img_size, swin.model_args) == (192, {"window_size": 6})
    assert (svit.model, svit.img_size) == ("svit_b", 224)
    for options in (swin, svit):
        assert (options.mask_ratio, options.clip_grad, options.weight_decay) == (0.6, 5, 0.05)
        assert (options.betas, options.crop_scale) == ([0.9, 0.999], [0.67, 1.0])
        assert (options.epochs, options.warmup_epochs, options.batch_size, options.blr) == (100, 10, 2048, 1e-4)


@pytest.mark.slow
def test_the_wheel_works_without_the_repository(tmp_path, images):
    """The wheel is built from the files that git tracks, installed into an empty folder, and run elsewhere."""
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
        "recipes/mae.py",
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
    argv = ["--data", images, "--epochs", "1", "--batch-size", "16", "--workers", "0"]
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


def test_the_readme_names_files_and_commands_that_exist():
    text = (ROOT / "README.md").read_text()
    block = re.search(r"```\w*\n(.*?)```", text, re.DOTALL).group(1).strip().splitlines()
    assert len(block) == 2
    assert "accelerate launch recipes/mae_hivit.py" in block[0]
    assert block[1].endswith("pytest")
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:mimkit|recipes|benchmarks|docs|converters|tests)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
    assert set(re.findall(r"\bmimkit (\w+) --", text)) <= {function.__name__ for function in cli.COMMANDS}
