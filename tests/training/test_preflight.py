"""Preflight checks before a run, `mimkit doctor RECIPE`, the health of a run, and its summary."""

import json
import random
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from conftest import command, encoded, picture
from mimkit.recipes import mae, mae_hivit, simmim
from PIL import Image
from safetensors.torch import load_file

from mimkit.config import parse_recipe
from mimkit.data import transforms
from mimkit.data.order import Plan
from mimkit.data.sample import SampleLoader
from mimkit.data.sources import open_source
from mimkit.doctor import preflight
from mimkit.doctor.gain import pretraining_run, scratch_gain
from mimkit.doctor.loss_bands import health, losses, nearest, references, tolerance
from mimkit.doctor.summary import describe_method, summarize
from mimkit.evaluation.knn import standard_error
from mimkit.files import read_metrics
from mimkit.methods.decoder import Decoder
from mimkit.methods.mae import MAE

TINY = ["--batch-size", "8", "--workers", "0", "--epochs", "2"]
FULL = preflight.FULL
QUICK = preflight.Budget(64, 60.0, 0.02)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(preflight, "FULL", FULL._replace(seconds=0.2))
    monkeypatch.setattr(preflight, "MIN_STEPS", 0)  # the runs below are short


@pytest.fixture
def images(tmp_path):
    """Return a folder of 37 gray images with a mean of one half."""
    (tmp_path / "images").mkdir()
    for i in range(37):
        pixels = np.random.default_rng(i).normal(128, 64, (20, 24 + i % 2)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i:02d}.png")
    return tmp_path / "images"


# The checks, with a run that only has what they read -----------------------------------------------------------------


@pytest.fixture
def method():
    """Return an MAE with units of 4 px, which predicts half of the masked units."""
    encoder = timm.create_model(
        "hivit_nano", num_classes=0, unit_form=True, multi_scale=True, img_size=32, patch_size=1
    )
    return MAE(encoder, Decoder(encoder.out_dim, 4, dim=32, depth=1, num_heads=4), 0.7, decode_ratio=0.5)


@pytest.fixture
def optimizer(method):
    return torch.optim.AdamW(method.parameters(), 1e-3)


@pytest.fixture
def make_job(images, tmp_path):
    """Return a function that makes a `Job` on the images. Its keywords change the run, the plan or the job."""
    printed = []

    def make(plan=None, job=None, **run):
        source = open_source(str(images))
        engine = SimpleNamespace(is_main=True, device=torch.device("cpu"), wait=lambda: printed.append("waited"))
        defaults = {"engine": engine, "folder": tmp_path / "run", "print": printed.append, "compile": False}
        defaults |= {"accelerator": SimpleNamespace(autocast=nullcontext), "checkpoints": SimpleNamespace(keep=2)}
        defaults |= {"max_bad": 0.01, "save_every": 1.0, "keep_every": 0}
        fake = SimpleNamespace(**defaults | run, plan=replace(Plan(source.length, 8, steps=8), **plan or {}))
        samples = SampleLoader(transforms.train_transform((32, 32)), 3, 64, 0, (source.image, None), pixels=True)
        config = {"data": str(images), "epochs": 2.0}
        made = preflight.Job(fake, source, samples, [0.5] * 3, [0.25] * 3, (32, 32), 0.01, 0.3, 0, config)
        return made._replace(**job or {})

    make.printed = printed
    return make


@pytest.fixture
def check(make_job, method, optimizer):
    """Return a function that checks a job -> its lines by name, its problems."""

    def run(**options):
        findings = preflight.run_checks(make_job(**options), method, optimizer, QUICK)
        return findings.lines, findings.problems

    return run


def test_lines_are_right(check, images):
    lines, problems = check()
    assert problems == []
    assert lines["data"] == "37 images; 37 checked: all can be decoded, no duplicates"
    assert lines["images"] == "20x24 to 20x25 px (height x width), L (100%), decoded to 3 channels"
    # 32 px in units of 4 px are 64 units. floor(64 x .3) = 19 are visible, and half of 45 are predicted
    assert lines["units"] == "8 x 8 units of 4 px = 64: 19 visible, 45 masked, 22 of them predicted"
    # 37 images are 4 batches of 8, so 0.3 epochs are 1 step
    assert lines["steps"] == (
        "batch size 8 = 8 images x 1 processes x 1 gradient accumulation steps; 4 steps per epoch, 8 in 2 epochs; "
        "lr 0.01 after 1 warmup steps"
    )
    numbers = np.concatenate([np.asarray(Image.open(file)).ravel() for file in sorted(images.iterdir())]) / 255
    assert lines["colors"].startswith(f"mean {' '.join([f'{numbers.mean():.3f}'] * 3)}, std ")
    assert lines["colors"].endswith("; configured mean 0.500 0.500 0.500, std 0.250 0.250 0.250")
    assert float(lines["colors"].split("std ")[1].split()[0]) == pytest.approx(numbers.std(), abs=2e-3)
    assert lines["disk"].startswith("2 checkpoints of ")
    assert list(lines) == "data images colors units steps speed time memory disk".split()  # own data have no reference


def test_steps_of_several_processes(check):
    lines, _ = check(plan={"world_size": 2, "grad_accum_steps": 2})
    assert "batch size 8 = 2 images x 2 processes x 2 gradient accumulation steps" in lines["steps"]


def test_damaged_images(check, images):
    for i in (3, 20):
        (images / f"{i:02d}.png").write_bytes(b"no image")
    lines, problems = check(max_bad=0.1)
    assert problems == []
    assert lines["data"] == "37 images; 37 checked: 2 cannot be decoded, no duplicates"
    assert lines["damaged"].startswith(f"{images}/03.png (not an image of a known kind), {images}/20.png (not an image")
    lines, problems = check()
    assert len(problems) == 1
    assert problems[0].startswith("2 of 37 images cannot be decoded, more than --max-bad 0.01 allows, such as ")
    assert f"{images}/20.png (not an image" in problems[0]
    assert "damaged" not in lines


def test_no_image_can_be_decoded(make_job, images):
    for file in images.iterdir():
        file.write_bytes(b"no image")
    findings = preflight.Findings()
    preflight.check_images(make_job(max_bad=1.0), QUICK, findings)
    assert "37 cannot be decoded" in findings.lines["data"]
    assert "images" not in findings.lines
    assert findings.problems == []


@pytest.mark.parametrize(
    ("mean", "std"),
    [([123.0] * 3, [58.0] * 3), ([0.5, 0.5, 1.0], [0.25] * 3), ([0.5] * 3, [0.05] * 3), ([0.5] * 3, [0.8] * 3)],
    ids=["0-255", "a channel", "narrow", "wide"],
)
def test_colors_far_from_the_configured_ones(check, mean, std):
    _, problems = check(job={"mean": mean, "std": std})
    assert len(problems) == 1
    assert problems[0].startswith("The images have mean 0.5")
    assert "Pass --mean [0.5" in problems[0]
    assert len(problems[0]) < 300


def test_duplicates(check, images):
    for i in range(5):
        (images / f"again{i}.png").write_bytes((images / "05.png").read_bytes())
    lines, problems = check()
    assert "5 duplicates, such as " in lines["data"]
    assert len(problems) == 1
    assert f"5 of 42 images are duplicates, such as {images}/again0.png of {images}/05.png" in problems[0]
    for i in range(4):
        (images / f"again{i}.png").unlink()
    lines, problems = check()
    assert "1 duplicates" in lines["data"]
    assert problems == []  # 1 of 38 is less than a twentieth


def test_memory_is_that_of_weights_gradients_optimizer_and_activations(check, method):
    parts = dict(part.rsplit(" ", 2)[:2] for part in check()[0]["memory"].split(": ")[1].split(", "))
    weights = sum(x.nbytes for x in method.state_dict().values()) / 1e6
    trained = [p for p in method.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trained) / 1e6
    assert float(parts["weights"]) == pytest.approx(weights, abs=0.06)
    assert float(parts["gradients"]) == pytest.approx(gradients, abs=0.06)
    assert float(parts["optimizer"]) == pytest.approx(2 * gradients + 4e-6 * len(trained), abs=0.06)  # and step counts
    lines, _ = check(plan={"batch_size": 16, "steps": 4})
    twice = float(lines["memory"].split("activations ")[1].split()[0])
    assert twice == pytest.approx(2 * float(parts["activations"]), rel=0.05)


def test_small_memories(check, monkeypatch):
    memory = SimpleNamespace(total=22_000_000)
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: memory)
    lines, problems = check()
    assert lines["memory"].startswith("at least ")
    assert " of 22.0 MB: " in lines["memory"]
    assert len(problems) == 1
    assert problems[0].startswith("A step of 8 images needs ")
    assert "but a process has 22.0 MB. Pass --grad-accum-steps " in problems[0]
    assert problems[0].endswith(", or --grad-checkpointing.")
    memory.total = 100_000_000
    assert check()[1] == []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "10")  # processes on this machine, which share its memory
    assert "Choose a smaller --model" in check()[1][0]


def test_what_makes_a_run_worth_little_is_a_warning(make_job, method, optimizer, images, monkeypatch):
    def warnings(**options):
        findings = preflight.run_checks(make_job(**options), method, optimizer, QUICK)
        assert findings.problems == []
        return findings.warnings

    assert warnings() == []
    monkeypatch.setattr(preflight, "MIN_STEPS", 300)
    assert warnings(plan={"steps": 300}) == []
    (few,) = warnings(plan={"steps": 299})
    assert few.startswith("The run has 299 steps, too few to learn from the images. Pass --epochs 75 or more")
    monkeypatch.setattr(preflight, "MIN_STEPS", 0)
    method.decoder = Decoder(method.encoder.out_dim, 4, dim=128, depth=6, num_heads=4)
    (large,) = warnings()
    assert large.startswith("The decoder has 1.3 M parameters, more than the encoder's 0.9 M. Omit --decoder-dim")


@pytest.mark.parametrize(
    ("side", "size", "patch", "advice"),
    [
        (500, (32, 32), 1, "--img-size 128 --patch-size 4"),
        (64, (32, 32), 1, "--img-size 64 --patch-size 2"),
        (500, (64, 128), None, "--img-size 128x256"),
        (4000, (112, 112), None, "--img-size 224"),
        (60, (32, 32), 1, None),
        (4000, (128, 128), None, None),
        (4000, (224, 224), None, None),
    ],
)
def test_an_input_far_below_the_size_of_photographs(make_job, side, size, patch, advice):
    findings = preflight.Findings()
    job = make_job(job={"size": size, "config": {"patch_size": patch}})
    preflight.check_input_size([(side, side + 9), (side + 2, side), (side, side)], job, findings)
    assert [text.split("Pass ")[1] for text in findings.warnings] == ([f"{advice}."] if advice else [])
    if advice:
        assert f"whose short side is {side} px" in findings.warnings[0]


def test_warnings_do_not_end_a_dry_run(make_job, method, optimizer, monkeypatch):
    monkeypatch.setattr(preflight, "MIN_STEPS", 300)
    preflight.preflight(make_job(), method, optimizer, dry_run=True)
    assert make_job.printed[1].startswith("WARNING: The run has 8 steps")


def test_full_disks(check, monkeypatch):
    usage = SimpleNamespace(free=5_000_000)
    monkeypatch.setattr(preflight, "disk_usage", lambda place: usage)
    _, problems = check()
    assert len(problems) == 1
    assert problems[0].startswith("2 checkpoints need ")
    assert "has 5.0 MB free. Choose a lower --keep" in problems[0]
    usage.free = 10**12
    assert check()[1] == []


@pytest.mark.parametrize(
    ("save_every", "keep", "keep_every", "count"),
    [(1, 2, 0, 2), (0.25, 2, 0, 3), (0.25, 1, 0, 2), (0.25, 2, 2, 7), (0, 2, 0, 1), (2, 2, 0, 1)],
)
def test_checkpoints_on_disk(check, save_every, keep, keep_every, count):
    """There are 8 steps in 2 epochs. A checkpoint is written before the oldest one is removed."""
    lines, _ = check(save_every=save_every, keep_every=keep_every, checkpoints=SimpleNamespace(keep=keep))
    assert lines["disk"].startswith(f"{count} checkpoints of ")


def test_combined_rate():
    assert preflight.combined_rate(100, 100, 0, 4) == pytest.approx(50)
    assert preflight.combined_rate(100, 1000, 4, None) == pytest.approx(100)
    assert preflight.combined_rate(1000, 100, 1, 2) == pytest.approx(1 / (1 / 100 + 0.5 / 1000))


def test_the_bottleneck_is_named(monkeypatch):
    monkeypatch.setattr(preflight, "cpu_count", lambda: 8)
    for device in ("CPU", "GPU"):
        text = preflight.describe_bottleneck(200, 100, 2, device)
        assert text.startswith("data loading 200 images/s with 2 workers, network 100 images/s. ")
        assert text.endswith(f"The {device} is the bottleneck, not data loading.")
    slow = partial(preflight.describe_bottleneck, 100, 200)
    assert slow(2, "GPU").endswith("Data loading is the bottleneck. Raise --workers to 7.")
    assert slow(7, "GPU").endswith("Data loading is the bottleneck. Store smaller images, or use more CPU cores.")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert slow(2, "GPU").endswith("Raise --workers to 3.")


def test_time(make_job):
    def time_of(network, loader, **options):
        findings = preflight.Findings()
        preflight.estimate_time(network, 16, loader, make_job(**options), findings)
        return findings.lines["time"]

    steps = {"steps": 9000}  # 72,000 images
    assert time_of(10, None, plan=steps).startswith("about 2 h 0 min, plus kNN evaluation, at 10 images/s; measured ")
    assert time_of(20, 20, plan=steps).startswith("about 2 h 0 min")  # they take turns
    assert time_of(10, None, plan={**steps, "start": 8875}).startswith("about 1 min 40 s")
    assert time_of(10, None, plan={**steps, "world_size": 2}).startswith("about 1 h 0 min, plus kNN evaluation, at 20 ")
    assert "measured with 16 images per step on " in time_of(10, None)
    assert "measured without torch.compile, with 16 images" in time_of(10, None, compile=True)


def test_streams_are_checked_from_their_first_images(make_job, images, method, optimizer):
    job = make_job(job={"source": open_source(str(images), streaming=True)})
    lines = preflight.run_checks(job, method, optimizer, QUICK._replace(images=30)).lines
    assert lines["data"] == "37 images; 30 checked: all can be decoded, no duplicates"
    assert "speed" in lines
    lines = preflight.run_checks(job, method, optimizer, preflight.BRIEF).lines  # a run measures no stream's loader
    assert lines["loader"].startswith("not measured for a stream")
    assert "speed" not in lines


def test_checking_images_stops_after_its_time(make_job):
    findings = preflight.Findings()
    preflight.check_images(make_job(), QUICK._replace(image_seconds=0.0), findings)
    assert findings.lines["data"].startswith("37 images; 1 checked: ")


def test_preflight_prints_its_findings(make_job, method, optimizer, images):
    preflight.preflight(make_job(), method, optimizer)
    lines, verdict, waited = make_job.printed
    assert lines.splitlines()[0] == "data     37 images; 37 checked: all can be decoded, no duplicates"
    assert (verdict, waited) == ("Preflight checks passed.", "waited")


def test_problems_end_a_dry_run_only(make_job, method, optimizer):
    wrong = make_job(job={"mean": [123.0] * 3})
    preflight.preflight(wrong, method, optimizer)
    assert make_job.printed[1].startswith("WARNING: The images have mean 0.5")
    with pytest.raises(SystemExit) as stop:
        preflight.preflight(wrong, method, optimizer, dry_run=True)
    assert stop.value.code == 1
    assert make_job.printed[-1] == "waited"
    preflight.preflight(make_job(), method, optimizer, dry_run=True)


def test_resumed_runs_and_other_processes_are_not_checked(make_job, method, optimizer):
    preflight.preflight(make_job(plan={"start": 3}), method, optimizer)
    other = make_job()
    other.run.engine.is_main = False
    preflight.preflight(other, method, optimizer, dry_run=True)
    assert make_job.printed == ["waited", "waited"]
    preflight.preflight(make_job(plan={"start": 3}), method, optimizer, dry_run=True)
    assert "Preflight checks passed." in make_job.printed


def generators():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def test_preflight_changes_neither_weights_nor_optimizer_nor_generators(make_job, method, optimizer):
    weights, before = {k: v.clone() for k, v in method.state_dict().items()}, generators()
    method.eval()
    preflight.preflight(make_job(), method, optimizer)
    assert generators() == before
    assert all(torch.equal(v, weights[k]) for k, v in method.state_dict().items())
    assert all(p.grad is None for p in method.parameters())
    assert not optimizer.state
    assert not method.training


# `mimkit doctor RECIPE` ----------------------------------------------------------------------------------------------


@pytest.fixture
def doctor(capsys, monkeypatch, tmp_path):
    """Return a function that runs `mimkit doctor mae_hivit` -> exit code, lines by name, all of its output.

    The command must not write anything.
    """
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*argv, recipe="mae_hivit"):
        before = sorted(tmp_path.rglob("*"))
        code, out, err = command(capsys, monkeypatch, "doctor", recipe, *TINY, *argv)
        assert sorted(tmp_path.rglob("*")) == before
        return code, dict(line.split(maxsplit=1) for line in out.splitlines() if " " in line), out + err

    return call


@pytest.mark.e2e
def test_doctor_checks_what_a_recipe_would_do(doctor, images):
    code, lines, output = doctor("--data", images, "--mask-ratio", "0.7", "--decode-ratio", "0.5", "--lr", "0.01")
    assert code == 0, output
    assert "Preflight checks passed." in output
    assert lines["data"] == "37 images; 37 checked: all can be decoded, no duplicates"
    assert lines["images"].startswith("20x24 to 20x25 px (height x width), L (100%), decoded to 3 channels")
    assert lines["units"] == "8 x 8 units of 4 px = 64: 19 visible, 45 masked, 22 of them predicted"
    assert lines["steps"].startswith("batch size 8 = 8 images x 1 processes x 1 gradient accumulation steps; 4 steps ")
    assert lines["steps"].endswith("; 4 steps per epoch, 8 in 2 epochs; lr 0.01 after 1 warmup steps")
    assert "configured mean 0.500 0.500 0.500, std 0.250 0.250 0.250" in lines["colors"]
    assert "loss" not in lines


@pytest.mark.e2e
def test_doctor_prints_what_follows_from_the_network_and_the_images(doctor, images):
    code, _, output = doctor("--data", images, "--model", "hivit_nano", "--img-size", "32", "--patch-size", "1")
    assert code == 0, output
    lines = output.splitlines()
    assert "--decoder-dim 128 instead of the published 512: the encoder is 128 wide" in lines
    assert any(line.startswith("--decoder-depth 1 instead of the published 6: a third of") for line in lines)
    assert "--warmup-epochs 0.2 instead of the published 40: a tenth of the epochs" in lines


@pytest.mark.e2e
def test_exit_codes(doctor, images):
    (images / "03.png").write_bytes(b"no image")
    code, _, output = doctor("--data", images, "--max-bad", "0.1")
    assert code == 0
    assert f"{images}/03.png (not an image of a known kind)" in output
    code, _, output = doctor("--data", images)
    assert code == 1
    assert "WARNING: 1 of 37 images cannot be decoded, more than --max-bad 0.01 allows" in output
    code, _, output = doctor("--data", images, "--max-bad", "1", "--mean", "[123]", "--std", "[58]")
    assert code == 1
    assert "WARNING: The images have mean 0.5" in output
    code, _, output = doctor("--data", images, "--batch-size", "64")
    assert code == 2
    assert "--batch-size 64 is more than the 37 images" in output


@pytest.mark.e2e
def test_a_checkpoint_takes_the_disk_space_that_is_announced(doctor, images, tmp_path, capsys):
    _, lines, _ = doctor("--data", images)
    out = tmp_path / "run"
    mae_hivit.main(["--data", str(images), "--out", str(out), *TINY])
    written = sum(file.stat().st_size for file in (out / "checkpoints" / "step-00000008").glob("*.safetensors"))
    assert lines["disk"].startswith("2 checkpoints of ")  # --save-every is 1 of 2 epochs
    assert float(lines["disk"].split()[3]) == pytest.approx(written / 1e6, rel=0.03)
    assert "grad" not in capsys.readouterr().err


@pytest.mark.e2e
def test_fewer_and_smaller_checkpoints_fit_a_full_disk(doctor, images, monkeypatch):
    monkeypatch.setattr(preflight, "disk_usage", lambda place: SimpleNamespace(free=10_000_000))
    code, _, output = doctor("--data", images)
    assert code == 1
    assert "WARNING: 2 checkpoints need " in output
    assert doctor("--data", images, "--model-args", "{embed_dim: 40}", "--save-every", "2")[0] == 0


@pytest.mark.e2e
def test_slow_loaders_and_slow_networks_are_found(doctor, images, monkeypatch):
    def slowly(function, *argv, **more):
        time.sleep(0.1)
        return function(*argv, **more)

    with monkeypatch.context() as patch:
        forward = MAE.forward
        patch.setattr(MAE, "forward", lambda *argv: time.sleep(1.5) or forward(*argv))
        assert "The CPU is the bottleneck" in doctor("--data", images)[1]["speed"]
    make = transforms.train_transform
    monkeypatch.setattr(mae, "train_transform", lambda *argv: partial(slowly, make(*argv)))
    _, lines, _ = doctor("--data", images)
    assert "Data loading is the bottleneck" in lines["speed"]
    assert 6 < float(lines["speed"].split()[2]) < 10.1  # 100 ms per image
    rate = float(lines["time"].split(" at ")[1].split()[0])
    assert rate < 10.1  # loader and network take turns


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("recipe", "options"), [(mae, []), (simmim, ["--config", "simmim_svit_small"])], ids=["hivit", "svit"]
)
def test_a_run_is_the_same_with_and_without_preflight(recipe, options, images, tmp_path, monkeypatch, capsys):
    """An SViT has running statistics, which the checks must not move."""
    weights, real = [], recipe.preflight

    def watched(*argv):
        before = generators()
        real(*argv)
        assert generators() == before

    def train(out, *argv):
        recipe.main([*options, "--data", str(images), "--out", str(tmp_path / out), *TINY, *argv])
        return capsys.readouterr().out

    monkeypatch.setattr(recipe, "preflight", watched)
    for out in ("with", "without"):
        if out == "without":
            monkeypatch.setattr(recipe, "preflight", lambda *argv: None)
        printed = train(out)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        assert ("configured mean" in printed) is (out == "with")
        weights.append(load_file(tmp_path / out / "checkpoints" / "step-00000008" / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert "our runs" not in printed  # which are on other data
    (tmp_path / "with" / "checkpoints" / "step-00000008").rename(tmp_path / "gone")
    monkeypatch.undo()
    assert "configured mean" not in train("with", "--resume", "auto")  # the checks were done before


@pytest.mark.e2e
def test_streams_and_workers(doctor, tmp_path):
    import datasets

    rows = [{"bytes": encoded(picture(i, (12, 12))), "path": None} for i in range(30)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(tmp_path / "train.parquet")
    code, lines, _ = doctor("--data", tmp_path / "train.parquet", "--streaming", "--workers", "1")
    assert code == 0
    assert "30 checked: all can be decoded" in lines["data"]
    assert "images/s with 1 workers" in lines["speed"]


@pytest.mark.e2e
def test_no_false_alarm_on_the_sample_images(doctor):
    code, lines, output = doctor("--config", "mae_hivit_small", "--epochs", "3", "--batch-size", "32")
    assert (code, "WARNING" in output) == (0, False)
    assert lines["loss"].startswith("expected from our runs of mae_hivit_small: ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["dance"], "Choose among detect"),
        (["linear_probe"], "has no --dry-run"),
        (["--run", "."], "holds no config.yaml"),
        (["mae_hivit", "--dance", "1"], "dance"),
    ],
)
def test_wrong_arguments_are_refused(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(capsys, monkeypatch, "doctor", *argv)
    assert (code, message in err) == (2, True), err


def test_help(capsys, monkeypatch):
    assert "doctor --run DIR" in command(capsys, monkeypatch, "doctor", "--help")[1]


# Health --------------------------------------------------------------------------------------------------------------


def write_run(folder, scale=lambda fraction: 1.0, waiting=0.05, **changes):
    """Write a run with the options and the losses of the reference mae_hivit_small, each loss times a scale."""
    reference = next(reference for reference in references() if reference.name == "mae_hivit_small")
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(reference.options | {"seed": 7, "out": "x"} | changes))
    lines = [{"step": 20, "loss": 1.5}]
    lines += [{"step": round(936 * f), "loss": scale(f) * values[0]} for f, values in reference.loss.items()]
    complete = [line | {"epoch": line["step"] / 312, "waiting": waiting} for line in lines]
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in complete) + "\n")
    return folder


@pytest.mark.parametrize(
    ("changes", "code", "sentence"),
    [
        ({}, 0, "The loss is inside the band of mae_hivit_small: 0.727 after 100%"),
        ({"scale": lambda f: 1 + 0.1 * (f == 1)}, 1, "The loss is above the band"),
        ({"scale": lambda f: 1 + 0.1 * (f == 0.5)}, 1, "above the band of mae_hivit_small: 0.820 after 50%"),
        ({"scale": lambda f: 0.9}, 0, "The loss is below the band"),
        ({"scale": lambda f: 3}, 1, "The loss did not fall from 1.500"),
        ({"scale": lambda f: float("nan") if f == 0.5 else 1}, 1, "The loss is not finite at step 468"),
        ({"waiting": 0.5}, 0, "The run waited for data 50% of the time. Raise --workers"),
        ({"norm_targets": False}, 0, "mae_hivit_small: norm_targets is False instead of True."),
        (
            {"clip_grad": 1.0},
            0,
            "cannot be compared with our runs of mae_hivit_small: clip_grad is 1.0 instead of None",
        ),
    ],
    ids="inside above above-earlier below flat nan waits other-target other-clipping".split(),
)
def test_health(changes, code, sentence, tmp_path, capsys, monkeypatch):
    folder = write_run(tmp_path / "run", **changes)
    exit_code, printed, _ = command(capsys, monkeypatch, "doctor", "--run", folder)
    assert (exit_code, sentence in printed) == (code, True), printed
    sentences, problems = health(folder)
    assert printed.splitlines() == sentences
    assert bool(problems) is bool(code)
    assert set(problems) <= set(sentences)


def test_health_of_a_young_run(tmp_path):
    folder = write_run(tmp_path / "run")
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines()[0] + "\n")
    assert "too early" in " ".join(health(folder)[0])
    metrics.write_text("")
    assert health(folder) == ([f"{folder} has not logged a loss yet."], [])


def with_knn(folder, before, after, images=2000):
    """Add kNN accuracies at the start and after the last step to the metrics of a run."""
    lines = [(0, before), (936, after)]
    logged = [{"step": step, "knn_10": knn, "knn_10_se": standard_error(knn, images)} for step, knn in lines]
    metrics = folder / "metrics.jsonl"
    first, last = map(json.dumps, logged)
    metrics.write_text(f"{first}\n{metrics.read_text()}{last}\n")
    return folder


def test_a_run_without_a_gain_says_so(tmp_path, capsys, monkeypatch):
    """These are the figures of 2,392 photographs of textures: the loss fell, and kNN stayed."""
    none = with_knn(write_run(tmp_path / "none"), 35.5, 36.1)
    code, printed, _ = command(capsys, monkeypatch, "doctor", "--run", none)
    assert code == 0
    sentence = printed.splitlines()[-1]
    assert sentence.startswith("No gain yet in 29,952 images: kNN 35.5 % before, 36.1 % after, +0.6 ± 1.5 points. ")
    assert "Pre-train for longer" in sentence
    assert "start from released weights (--model vit_base_patch16_224.mae)" in sentence
    assert len(sentence) < 300
    gained = with_knn(write_run(tmp_path / "gained"), 53.1, 71.8)
    assert health(gained)[0][-1] == "The pre-training helps: kNN 53.1 % before, 71.8 % after, +18.7 ± 1.5 points."
    few = with_knn(write_run(tmp_path / "few"), 40.0, 60.0, images=20)  # 20 images tell nothing
    assert "No gain yet" in health(few)[0][-1]
    assert "kNN" not in " ".join(health(write_run(tmp_path / "unmeasured"))[0])


def test_fine_tuning_that_trails_training_from_scratch_says_so(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "scratch").mkdir()

    def compare(tuned, scratch, step=936):
        for folder, top1, at in ((run, tuned, 936), (run / "scratch", scratch, step)):
            line = {"step": at, "top1": top1, "top1_se": standard_error(top1, 2000)}
            (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return scratch_gain(run)

    text, ahead = compare(30.8, 35.0)
    assert not ahead
    assert text.startswith(
        "Fine-tuning trails training from scratch: 30.80 % against 35.00 %, -4.20 ± 1.48 points. Pre-"
    )
    assert compare(36.0, 35.0)[0].startswith("No gain over training from scratch yet: 36.00 %")
    assert compare(52.0, 39.0)[1]
    assert compare(52.0, 39.0, step=500) is None  # it is not complete
    assert scratch_gain(tmp_path) is None


def test_the_run_that_a_network_comes_from(tmp_path):
    (tmp_path / "run" / "encoder").mkdir(parents=True)
    assert pretraining_run(str(tmp_path / "run")) is None
    (tmp_path / "run" / "config.yaml").write_text("{}")
    for name in ("run", "run/encoder"):
        assert pretraining_run(str(tmp_path / name)) == tmp_path / "run"
    assert pretraining_run("vit_base_patch16_224.mae") is None


def test_references_have_the_options_of_the_presets():
    """The options of each small preset, as a run resolves them, are those of its reference."""
    names = {"mae_hivit_small", "mae_svit_small", "mae_vit_small", "simmim_svit_small", "simmim_swin_small"}
    assert {reference.name for reference in references()} == names
    for reference in references():
        assert reference.tolerance == pytest.approx(tolerance(reference.loss), abs=1e-4)
        assert nearest(reference.options)[1] == []
        assert nearest(reference.options)[0].name == reference.name
        recipe = reference.name.split("_")[0]
        module = import_module(f"mimkit.recipes.{recipe}")
        options = parse_recipe(module.Options, module.__doc__, recipe, ["--config", reference.name], reference.name)
        options.mean, options.std = transforms.default_normalization(options.in_chans, options.mean, options.std).values
        options.lr = options.lr or options.blr * options.batch_size / 256
        assert reference.differing(json.loads(json.dumps(asdict(options)))) == []


def test_losses_average_the_tenth_of_a_run_before_each_fraction():
    lines = [{"step": step, "loss": float(step)} for step in range(10, 61, 10)]
    assert losses(lines, 100, [0.25, 0.5, 0.75]) == {0.25: 20.0, 0.5: 50.0}


# Summary -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def matplotlib():
    """Import matplotlib, which takes a second."""
    from matplotlib import pyplot

    return pyplot


def test_a_method_is_described_in_one_line(method):
    line = describe_method(method, 10_000, 0.0012345)
    count = sum(p.numel() for p in method.encoder.parameters()) / 1e6
    assert line.startswith(f"hivit_nano: encoder {count:.2f} M + decoder 0.")
    assert line.endswith(" M parameters; lr 0.00123; 10,000 images")


@pytest.mark.usefixtures("matplotlib")
@pytest.mark.parametrize("is_main", [True, False])
def test_a_finished_run_is_summarized_by_the_main_process(is_main, method, images, tmp_path):
    printed, gathered = [], []
    folder = write_run(tmp_path / "run", label_column="fine", value_range=[0.0, 4000.0])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 936, "knn_10": 50.0}) + "\n")  # so the images have labels
    engine = SimpleNamespace(is_main=is_main, device=torch.device("cpu"))
    engine.full_state = lambda module: gathered.append(module) or module
    run_dir = SimpleNamespace(metrics=lambda: read_metrics(folder))
    run = SimpleNamespace(engine=engine, folder=folder, dir=run_dir, print=printed.append)
    method.decode_ratio = 1.0
    summarize(run, method, open_source(str(images)), (32, 32), transforms.default_normalization(3, None, None))
    assert gathered == [method]  # all processes take part
    pictures = {"curves.png", "reconstructions.png"}
    assert {file.name for file in folder.glob("*.png")} == (pictures if is_main else set())
    if is_main:
        assert "The loss is inside the band" in printed[0]
        assert f'timm.create_model("local-dir:{folder}/encoder", pretrained=True)' in printed[1]
        reading = f"--data {images} --label-column fine --value-range=0,4000\n"
        assert f"next: mimkit probe --model {folder}/encoder {reading}" in printed[1]
        assert printed[1].endswith(f"mimkit reconstruct --run {folder} --images {images} --value-range=0,4000")
        assert Image.open(folder / "reconstructions.png").size[0] > 100
