import io
import json
import os
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # pin each worker to a core, or threads would wait for each other
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    sys.argv[0] = "pytest"  # parsers put it in front of their messages
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import datasets
import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

import mimkit.models  # noqa: F401  registers the networks with timm
from mimkit import cli
from mimkit.data.loader import train_loader
from mimkit.data.order import Plan
from mimkit.data.sample import SampleLoader
from mimkit.data.transforms import train_transform
from mimkit.doctor import preflight
from mimkit.errors import LONGEST, UserError
from mimkit.training import precision

ROOT = Path(__file__).parent.parent
PLAIN = {"embed_dim": 32, "depth": 2, "num_heads": 2, "dynamic_img_size": True}
RECIPES = [import_module(f"mimkit.recipes.{name}") for name in cli.recipes()]
BACKBONES = {
    "hivit_nano": {},
    "hpvit": {"source_args": {"embed_dim": 32, "depth": 3, "num_heads": 2}, "depths": "1-1-1-0"},
    "svit_nano": {},
    "vit_tiny_patch16_224": PLAIN,
    "vit_tiny_patch16_224 /14": {**PLAIN, "patch_size": 14},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (1, 1, 1, 1), "img_size": 96, "strict_img_size": False},
    "resnet18": {"zero_init_last": False},
}


LIMIT, TWO_PROCESSES = 5.0, 30.0  # seconds of CPU that one test of the default tier may take


def pytest_collection_modifyitems(items):
    """Start the files with the most tests of the upper tiers first: the last one would keep a single worker busy."""
    upper = Counter(item.path for item in items if in_upper_tier(item))
    items.sort(key=lambda item: (-upper[item.path], item.path))


def in_upper_tier(item):
    return any(item.get_closest_marker(name) for name in ("e2e", "distributed", "slow", "gpu"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fail a test of the default tier that takes more CPU time than `pytest` without arguments can afford."""
    before = sum(os.times()[:4])
    result = yield
    spent = sum(os.times()[:4]) - before
    limit = TWO_PROCESSES if item.get_closest_marker("two_processes") else LIMIT
    if spent > limit and not in_upper_tier(item):
        pytest.fail(f"took {spent:.1f} s of CPU, more than {limit:g} s: make it smaller, or mark it slow or e2e.")
    return result


@pytest.fixture(autouse=True)
def _anew(monkeypatch):
    """Give each test its own seed, number of threads, and accelerate, which keeps its state for a whole process.

    Preflight measures for .1 seconds and takes any machine as free, and bf16 counts as slow on any CPU.
    """
    threads = torch.get_num_threads()
    monkeypatch.setattr(preflight, "BRIEF", preflight.BRIEF._replace(seconds=0.1))
    monkeypatch.setattr(preflight, "MAX_LOAD", 1000)
    monkeypatch.setattr(precision, "seconds_of", {torch.float32: 1, torch.bfloat16: 2}.get)
    torch.manual_seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _short_errors(monkeypatch):
    """Fail a test that makes an error of more than `LONGEST` characters, where long words, such as paths, count 40."""
    made = []
    monkeypatch.setattr(UserError, "__init__", lambda error, *args: made.append(" ".join(map(str, args))))
    yield
    clipped = [" ".join(word[:40] for word in message.split()) for message in made]
    assert not [message for message in clipped if len(message) > LONGEST]


def backbone(name, **options):
    """Build a tiny network of this kind."""
    return timm.create_model(name.split()[0], **(BACKBONES[name] | options))


@torch.no_grad()
def fill(model):
    """Fill every parameter at order 1: tables, biases and scales that start at 0 or 1e-5 would hide what drops them."""
    for parameter in model.parameters():
        if parameter.ndim < 2:
            parameter.normal_(0.5, 0.5)
        elif parameter.ndim == 3 or parameter.shape[-1] < 16:
            parameter.normal_(0, 0.5)
        else:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model


def joined(pyramid):
    """Randomize the weights that join the finer maps, which start at 0 and would hide these maps."""
    for side in pyramid.side:
        torch.nn.init.normal_(side.weight)
    return pyramid


def learns(model, steps=30):
    """Train on four smooth images under one mask. Return the last loss divided by the first.

    Assert that every parameter gets a gradient.
    """
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    images = torch.nn.functional.interpolate(torch.randn(4, 3, 4, 4), size=32, mode="bicubic")
    losses = []
    for _ in range(steps):
        loss = model(images, generator=torch.Generator().manual_seed(0)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert not [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    return losses[-1] / losses[0]


def picture(seed=0, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Write twelve images into two class folders. Return the folder."""
    for i in range(12):
        place = tmp_path / "images" / ("cat" if i % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        picture(i).save(place / f"{i:02d}.png")
    return tmp_path / "images"


def write_images(folder):
    """Write 32 images into two class folders, which are 4 steps of 8 per epoch. Return the folder."""
    for i in range(32):
        place = folder / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
    return str(folder)


@pytest.fixture
def images(tmp_path):
    """32 images in two classes: 4 steps of 8 in an epoch."""
    return write_images(tmp_path / "images")


@pytest.fixture
def parquet(tmp_path):
    """Write three parquet shards of 20, 25 and 30 images. Return the folder."""
    count = 0
    for shard, length in enumerate((20, 25, 30)):
        rows = {
            "image": [{"bytes": encoded(picture(count + i, (12, 12))), "path": None} for i in range(length)],
            "label": list(range(length)),
        }
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"train-{shard}.parquet")
        count += length
    return tmp_path


def viewer(source, seed=0, size=(16, 16), in_chans=3):
    return SampleLoader(train_transform(size), in_chans, 16, seed, (source.image, source.label), pixels=True)


def batches(source, workers=0, **plan):
    plan = Plan(source.length, **({"batch_size": 4, "steps": 5} | plan))
    return list(train_loader(source, viewer(source), plan, workers))


def launching(engine, recipe, *argv):
    """Start a recipe or a script through accelerate, in `engine` processes or in the two of a named engine."""
    name = engine if isinstance(engine, str) else "ddp" if engine > 1 else "cpu"
    config = ["--config_file", ROOT / "recipes" / "accelerate" / f"{name}.yaml", "--main_process_port", "0"]
    script = recipe if isinstance(recipe, Path) else ROOT / "recipes" / f"{recipe}.py"
    many = [] if isinstance(engine, str) else ["--num_processes", engine]
    exact = [] if "--precision" in argv else ["--precision", "fp32"]  # auto depends on the CPU
    launch = ["-m", "accelerate.commands.launch", *config, *many, script, *argv, *exact]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *map(str, launch)], env=environment, text=True, **pipes)


def launched(engine, recipe, *argv):
    """Run a recipe or a script through accelerate. Return what it printed."""
    job = launching(engine, recipe, *argv)
    out, err = job.communicate()
    assert job.returncode == 0, err[-2000:]
    return out


def losses(run):
    """Return the losses that a run has logged, by step."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def command(capsys, monkeypatch, *argv):
    """Run `mimkit ARGV`. Return the exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["mimkit", *map(str, argv)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert "likely a bug" not in printed.err  # an unexpected RuntimeError
    return code, printed.out, printed.err
