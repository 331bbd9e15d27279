"""Whole runs of the pre-training recipes: what they leave, how they are resumed, stopped and shared by processes."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import psutil
import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import LoggerType
from conftest import ROOT, command, launched, launching, losses
from mimkit.recipes import mae, mae_hivit, simmim
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from short_runs import SIMMIM_SVIT, TINY, VIT, fails, run, wait_for_loss

from mimkit.data.transforms import Normalize
from mimkit.io.weights import read_weights
from mimkit.methods.checkpoint import load_run
from mimkit.methods.reconstruction import reconstruct
from mimkit.training import checkpoint, precision
from mimkit.training.checkpoint import checkpoints, digest
from mimkit.training.run import Run
from mimkit.units import serialize

pytestmark = pytest.mark.e2e


def weights(run, step=16):
    """The weights in a checkpoint, in memory: a file is mapped, and a test may change it."""
    states = load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
    return {name: tensor.clone() for name, tensor in states.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# What a run leaves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "tiny"), [(mae_hivit, TINY), (mae, VIT)], ids=["hivit", "vit"])
def test_what_a_run_leaves(recipe, tiny, images, tmp_path, capsys):
    out = tmp_path / "run"
    run(recipe, *tiny, "--data", images, "--out", out)
    printed = capsys.readouterr().out
    assert "kNN at random: " in printed
    assert "kNN after 16 steps: " in printed
    assert f'timm.create_model("local-dir:{out}/encoder", pretrained=True)' in printed.replace("\n", "")
    names = {"config.yaml", "metrics.jsonl", "curves.png", "reconstructions.png", "checkpoints", "encoder", "decoder"}
    assert {f.name for f in out.iterdir()} == names
    assert Image.open(out / "reconstructions.png").size[0] > 800
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["lr"] == pytest.approx(config["blr"] * 8 / 256)
    assert config["precision"] == "fp32"
    assert len(config["mean"]) == 3
    assert (config["workers"], config["resume"], config["out"]) == (0, None, str(out))

    # timm gives exactly the trained weights, and the outputs of the trained encoder
    encoder = timm.create_model(f"local-dir:{out}/encoder", pretrained=True).eval()
    trained = weights(out)
    prefix = "encoder.vit." if recipe is mae else "encoder."
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, trained[prefix + name])
    method, cfg = load_run(out)
    assert tuple(cfg["input_size"]) == (3, 32, 32)
    x = torch.randn(2, 3, 32, 32)
    size, (gh, gw) = method.encoder.unit_size, (32 // method.encoder.unit_size,) * 2
    every = torch.arange(gh * gw).expand(2, -1)
    latent = method.encoder.encode_units(serialize(x, size), every, (gh, gw))
    features = encoder.forward_features(x)
    if recipe is mae_hivit:  # the decoder sees the stages beside each other, and the last one is the main output
        outputs = encoder.stages(serialize(x, size), every, (gh, gw))
        features = encoder.norm(torch.cat([stage.flatten(2) for stage in outputs], -1))
    assert torch.allclose(latent, features, atol=1e-5)
    assert not torch.allclose(timm.create_model(f"local-dir:{out}/encoder").eval()(x), encoder(x), atol=1e-3)


def test_init_continues_from_a_run(images, tmp_path, capsys):
    run(mae_hivit, "--data", images, "--out", tmp_path / "first", *TINY)
    capsys.readouterr()
    run(mae_hivit, "--out", tmp_path / "second", "--data", images, "--init", tmp_path / "first", *TINY)
    printed = capsys.readouterr().out
    assert "encoder and decoder from" in printed
    assert "kNN at the start" in printed


@pytest.mark.parametrize(
    "argv",
    [
        ["--img-size", "32x64", "--mask-ratio", "0.5", "--norm-targets", "false"],
        ["--decode-ratio", "0.25", "--multi-scale", "false", "--crop-scale", "[0.5,1.0]", "--knn-every", "2"],
        ["--patch-size", "2", "--grad-checkpointing", "true", "--precision", "bf16", "--in-chans", "1"],
    ],
    ids=str,
)
def test_options(argv, images, tmp_path):
    run(mae_hivit, "--data", images, "--out", tmp_path / "run", *TINY, *argv)
    assert np.isfinite(losses(tmp_path / "run")[16])


def test_five_channels(tmp_path):
    for i in range(8):
        np.save(tmp_path / f"{i}.npy", np.random.default_rng(i).random((5, 20, 24), dtype=np.float32))
    run(mae_hivit, "--data", tmp_path, "--in-chans", "5", "--out", tmp_path / "run", *TINY)
    encoder = timm.create_model(f"local-dir:{tmp_path}/run/encoder", pretrained=True)
    assert encoder.patch_embed.proj.in_channels == 5
    assert encoder.pretrained_cfg["mean"] == [0.5] * 5


def test_normalization_is_exported_with_the_encoder(images, tmp_path):
    argv = ["--mean", "[0.1,0.2,0.3]", "--std", "[0.4,0.5,0.6]"]
    run(mae_hivit, "--data", images, "--out", tmp_path / "run", *TINY, *argv)
    cfg = timm.create_model(f"local-dir:{tmp_path}/run/encoder", pretrained=True).pretrained_cfg
    assert torch.allclose(Normalize(cfg["mean"], cfg["std"]).std.flatten(), torch.tensor([0.4, 0.5, 0.6]))


def test_a_run_of_simmim_is_drawn_and_continued(images, tmp_path, capsys):
    tiny = [*SIMMIM_SVIT, "--data", images, "--epochs", "1", "--warmup-epochs", "0"]
    run(simmim, *tiny, "--out", tmp_path / "first")
    method, config = load_run(tmp_path / "first")
    assert tuple(config["input_size"]) == (3, 32, 32)
    state = weights(tmp_path / "first", 4)
    assert all(torch.equal(tensor, state[name]) for name, tensor in method.state_dict().items())
    x, shown, made = reconstruct(method, torch.randn(2, 3, 32, 32))
    hidden = shown == 0
    assert hidden.float().mean() == pytest.approx(10 / 16)
    assert torch.equal(made[~hidden], x[~hidden])
    capsys.readouterr()
    run(simmim, *tiny, "--out", tmp_path / "second", "--init", tmp_path / "first", "--lr", "1e-30")
    assert "encoder and decoder from" in capsys.readouterr().out
    again, _ = load_run(tmp_path / "second")
    assert torch.allclose(again.decoder.pred.weight, method.decoder.pred.weight)


def test_trackers(images, tmp_path, monkeypatch):
    """No tracker is installed here: accelerate is told that one is, and what it is given is kept."""
    given = []
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *_: [])
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name, config: given.append((name, config["lr"])))
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: given.append(values))
    run(mae_hivit, "--data", images, "--out", tmp_path / "run", "--track", "tensorboard", *TINY)
    assert given[0] == ("run", pytest.approx(8e-3 * 8 / 256))
    assert "loss" in given[2]


def test_a_few_images_need_no_neighbors(tmp_path, capsys):
    for i in range(8):
        (tmp_path / "images" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "images" / str(i % 2) / f"{i}.png")
    run(mae_hivit, "--data", tmp_path / "images", "--out", tmp_path / "run", *TINY)
    assert "no kNN: kNN needs at least 10 training images; there are 6." in capsys.readouterr().out


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_with_inductor(images, tmp_path):
    argv = ["--data", images, *TINY, "--epochs", "1", "--knn-every", "0", "--decoder-depth", "1"]
    argv += ["--model-args", "{embed_dim: 16, num_heads: 2, depths: [1, 1, 1]}"]  # each kernel is compiled
    run(mae_hivit, "--out", tmp_path / "plain", *argv)
    run(mae_hivit, "--out", tmp_path / "compiled", *argv, "--compile", "true")
    assert losses(tmp_path / "compiled")[4] == pytest.approx(losses(tmp_path / "plain")[4], abs=1e-4)


# Errors of the user --------------------------------------------------------------------------------------------------


def test_wrong_options_are_one_sentence(images, tmp_path, capsys):
    out = str(tmp_path / "run")
    data = ["--data", images, "--out", out]
    for argv, message in [
        (["--data", str(tmp_path / "nowhere")], "no such file or folder"),
        ([*data, "--batch-size", "64"], "--batch-size 64 is more than the 32 images"),
        ([*data, "--batch-size", "7", "--grad-accum-steps", "2"], "choose a multiple of 2"),
        ([*data, "--model", "hivit_x", "--batch-size", "8"], "--model hivit_x is unknown to timm and mimkit"),
        ([*data, "--model", "resnet18", "--batch-size", "8"], "--model resnet18 does not take these options"),
        ([*data, "--img-size", "30", *TINY], "height of 30 px is not a multiple of the mask unit of 4 px"),
        ([*data, "--img-size", "axb"], "'axb' is neither a number nor HEIGHTxWIDTH"),
        ([*data, "--mask-ratio", "1.5", *TINY], "mask_ratio is 1.5"),
        ([*data, *TINY, "--epochs", "0.1"], "--epochs 0.1 with 4 steps per epoch is less than one step"),
        ([*data, "--epochs", "0"], "epochs"),
        ([*data, "--grad-accum-steps", "0"], "--grad-accum-steps 0: expected a whole number of at least 1"),
        ([*data, "--patch-size", "-1"], "--patch-size -1: expected a whole number of at least 1"),
        ([*data, *TINY, "--decoder-heads", "7"], "is not divisible by 7 heads"),
        ([*data, "--epochs", "many"], "epochs"),
        ([*data, "--track", "nothing"], "--track nothing is not installed"),
        ([*data, "--streaming", "true", "--knn-every", "1", *TINY], "--streaming false"),
        ([*data, "--precision", "fp8"], "--precision fp8 is unknown"),
        ([*data, "--mean", "[0.5,1]"], "--mean [0.5, 1.0] does not fit 3 channels"),
        ([*data, "--init", "nowhere.pth", *TINY], "nowhere.pth: there is no such file"),
        ([*data, "--resume", str(tmp_path)], "holds no checkpoint"),
        ([*data, "--color", "red"], "--color"),
        ([*data, "--config", "nothing.yaml"], "nothing.yaml"),
        ([*data, *TINY, "--warmup-epochs", "4"], "A warm-up of 16 steps fills the whole run of 16 steps"),
    ]:
        assert message in fails(capsys, *argv), argv
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "good", "other"),
    [
        (mae, {"hivit_nano": 16, "svit_nano": 32}, ["swin_tiny_patch4_window7_224"]),
        (simmim, {"swin_tiny_patch4_window7_224": 32, "svit_nano": 32}, ["hivit_nano", "vit_tiny_patch16_224"]),
    ],
    ids=["mae", "simmim"],
)
def test_a_wrong_network_or_size_is_one_sentence_before_anything_is_written(
    recipe, good, other, images, tmp_path, capsys
):
    data = ["--data", images, "--batch-size", "8", "--workers", "0", "--out", tmp_path / "run"]
    name, size = "simmim" if recipe is mae else "mae", ["--img-size", "100", "--patch-size", "4"]
    for model in other:
        assert f"Use recipes/{name}.py instead." in fails(capsys, *data, "--model", model, recipe=recipe)
    assert "choose" in fails(capsys, *data, "--model", "resnet18", recipe=recipe).lower()
    for model, unit in good.items():
        printed = fails(capsys, *data, "--model", model, *size, recipe=recipe)
        assert f"height of 100 px is not a multiple of the mask unit of {unit} px" in printed
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten(images, tmp_path, capsys):
    argv = ["--data", images, "--out", tmp_path / "run", *TINY]
    run(mae_hivit, *argv)
    assert "already holds a run. To continue it" in fails(capsys, *argv)
    assert "batch_size: 8 there, 4 here" in fails(capsys, *argv, "--resume", "auto", "--batch-size", "4")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 17, "lo')  # killed while writing
    run(mae_hivit, *argv, "--resume", "auto")


def test_default_directories_are_numbered(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--data", images, *TINY]
    run(mae_hivit, *argv)
    run(mae_hivit, *argv)
    assert sorted(f.name for f in (tmp_path / "runs").iterdir()) == ["mae_hivit", "mae_hivit-2"]
    before = (tmp_path / "runs" / "mae_hivit" / "metrics.jsonl").read_text()
    run(mae_hivit, *argv, "--resume", "auto")  # continues the last one, which is complete
    assert (tmp_path / "runs" / "mae_hivit" / "metrics.jsonl").read_text() == before
    assert len(list((tmp_path / "runs").iterdir())) == 2
    run(mae, *argv)
    assert (tmp_path / "runs" / "mae" / "metrics.jsonl").exists()


def test_only_one_of_two_runs_that_start_together_gets_the_folder(images, tmp_path, capsys, monkeypatch):
    write_config = Run.write_config

    def second(run, *config):
        run.folder.mkdir(parents=True)
        write_config(run, *config)

    monkeypatch.setattr(Run, "write_config", second)
    monkeypatch.chdir(tmp_path)
    printed = fails(capsys, "--data", images, *TINY)
    assert "Another run has just created runs/mae_hivit. Start again." in printed
    assert not list((tmp_path / "runs" / "mae_hivit").iterdir())


# Checkpoints and resuming --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "tiny", "options"),
    [
        (mae_hivit, TINY, ""),
        (mae_hivit, TINY, "--streaming true"),
        (mae_hivit, TINY, "--grad-accum-steps 2 --workers 1"),
        (simmim, SIMMIM_SVIT, ""),  # has running statistics
    ],
    ids=["plain", "streaming", "accumulated", "simmim"],
)
def test_a_resumed_run_is_the_run(recipe, tiny, options, images, tmp_path, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    argv = [*tiny, "--data", images, *options.split()]
    run(recipe, *argv, "--out", whole)
    shutil.copytree(whole, broken)
    for name in ("encoder", "decoder", "checkpoints/step-00000016"):
        shutil.rmtree(broken / name)
    capsys.readouterr()
    run(recipe, *argv, "--out", broken, "--resume", "auto")
    assert "resuming from" in capsys.readouterr().out
    assert losses(broken) == losses(whole)
    assert same(weights(whole), weights(broken))
    assert sorted(f.name for f in (whole / "checkpoints").iterdir()) == ["step-00000008", "step-00000016"]


def test_the_scale_of_gradients_survives(images, tmp_path, monkeypatch):
    """The scaler of fp16, without its GPU: the scale doubles every five steps."""
    init, ends = Run.__init__, []

    def scaled(run, *args, **options):
        init(run, *args, **options)
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8, growth_interval=5)

    monkeypatch.setattr(Run, "__init__", scaled)
    argv = ["--data", images, "--out", tmp_path / "run", *TINY, "--knn-every", "0", "--resume", "auto"]
    for _ in range(2):
        run(mae_hivit, *argv)
        last = tmp_path / "run" / "checkpoints" / "step-00000016"
        ends.append((json.loads((last / "state.json").read_text())["scaler"], weights(tmp_path / "run")))
        shutil.rmtree(last)
    assert ends[0][0] == ends[1][0]
    assert (ends[0][0]["scale"], ends[0][0]["_growth_tracker"]) == (64, 1)
    assert same(ends[0][1], ends[1][1])


def test_gradient_accumulation_changes_nothing(images, tmp_path):
    for steps in ("1", "4"):
        run(mae_hivit, "--data", images, "--out", tmp_path / steps, "--grad-accum-steps", steps, *TINY)
    a, b = (read_weights(tmp_path / steps / "encoder") for steps in ("1", "4"))
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
    assert losses(tmp_path / "1")[16] == pytest.approx(losses(tmp_path / "4")[16], abs=1e-4)


def shorter(content):
    return content[:100]


def flipped(content):
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


def spoil(file, damage):
    file.write_bytes(damage(file.read_bytes()))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", flipped),
        ("optimizer.safetensors", shorter),
        ("state.json", flipped),
        ("manifest.json", shorter),
    ],
)
def test_a_corrupt_checkpoint_is_passed_over(name, damage, images, tmp_path, capsys):
    out = tmp_path / "run"
    argv = ["--data", images, "--out", out, *TINY, "--knn-every", "0"]
    run(mae_hivit, *argv)
    last = out / "checkpoints" / "step-00000016"
    before, whole = losses(out), weights(out)
    spoil(last / name, damage)
    capsys.readouterr()
    run(mae_hivit, *argv, "--resume", "auto")
    printed = capsys.readouterr().out.replace("\n", "")
    assert "step-00000016 is corrupt" in printed
    assert f"resuming from {out}/checkpoints/step-00000008" in printed
    assert losses(out) == before
    assert same(weights(out), whole)
    for folder in checkpoints(out):
        spoil(folder / name, damage)
    for _ in range(2):  # it never starts from the beginning
        printed = fails(capsys, *argv, "--resume", "auto")
        assert "has no valid checkpoint. Start a new run with another --out." in printed


def test_permanent_checkpoints(images, tmp_path):
    argv = ["--data", images, *TINY, "--save-every", "0.5", "--knn-every", "0", "--keep", "1", "--keep-every", "3"]
    run(mae_hivit, "--out", tmp_path / "run", *argv)
    assert [f.name[-2:] for f in checkpoints(tmp_path / "run")] == ["06", "12", "16"]


def test_training_continues_while_a_checkpoint_is_written(images, tmp_path, monkeypatch):
    argv = ["--data", images, *TINY, "--knn-every", "0"]
    run(mae_hivit, "--out", tmp_path / "a", *argv)
    later, end_step, write = threading.Event(), Run.end_step, checkpoint.write_checkpoint

    def slow(*args):
        assert later.wait(60)
        write(*args)

    def watched(self, step):
        end_step(self, step)
        if step == 10:  # 8 steps were done when it began
            assert [f.name for f in checkpoints(tmp_path / "b")] == []
            later.set()

    monkeypatch.setattr(checkpoint, "write_checkpoint", slow)
    monkeypatch.setattr(Run, "end_step", watched)
    run(mae_hivit, "--out", tmp_path / "b", *argv)
    for name in ("model", "optimizer"):
        a, b = (load_file(tmp_path / f / "checkpoints" / "step-00000008" / f"{name}.safetensors") for f in "ab")
        assert same(a, b)


@pytest.mark.parametrize("missing", ["sums", "param_groups", "count"])
def test_a_checkpoint_that_lacks_a_part_is_one_sentence(missing, images, tmp_path, capsys):
    argv = ["--data", images, "--out", tmp_path / "run", *TINY]
    run(mae_hivit, *argv)
    last = checkpoints(tmp_path / "run")[-1]
    values = json.loads((last / "state.json").read_text())
    values.pop(missing)
    (last / "state.json").write_text(json.dumps(values))
    hashes = json.loads((last / "manifest.json").read_text())
    (last / "manifest.json").write_text(json.dumps(hashes | {"state.json": digest(last / "state.json")}))
    printed = fails(capsys, *argv, "--resume", "auto")
    assert "was not written by a run" in printed
    assert "Start a new one with another --out." in printed


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "model.safetensors"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
    ],
)
def test_a_full_disk_leaves_the_last_checkpoint(error, images, tmp_path, capsys, monkeypatch):
    save_file = checkpoint.save_file

    def full(state, file):
        if "00000016" in str(file):
            file.write_bytes(b"half")
            raise error
        save_file(state, file)

    monkeypatch.setattr(checkpoint, "save_file", full)
    printed = fails(capsys, "--data", images, "--out", tmp_path / "run", *TINY)
    assert "The disk is full" in printed
    assert "step-00000008 is complete; continue with" in printed
    assert [f.name for f in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000008"]


def test_a_resumed_run_keeps_its_precision(images, tmp_path, capsys, monkeypatch):
    argv = ["--data", images, "--out", tmp_path / "run", *TINY, "--precision", "auto"]
    for bf16 in (3, 1):  # the second machine is another one
        monkeypatch.setattr(precision, "seconds_of", {torch.float32: 2, torch.bfloat16: bf16}.get)
        run(mae_hivit, *argv, "--resume", "auto")
        assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["precision"] == "fp32"
    assert "precision: fp32 there, bf16 here" in fails(capsys, *argv, "--resume", "auto", "--precision", "bf16")


def test_the_same_images_in_another_place(images, tmp_path, capsys):
    """A job that is queued again may find its data under another path. A run of earlier versions compared the path."""
    argv, out = [*TINY, "--knn-every", "0", "--out", tmp_path / "run"], tmp_path / "run"
    run(mae_hivit, *argv, "--data", images)
    resume = [*argv, "--resume", "auto"]
    shutil.copytree(images, tmp_path / "job2")
    run(mae_hivit, *resume, "--data", tmp_path / "job2")
    assert yaml.safe_load((out / "config.yaml").read_text())["data"] == str(tmp_path / "job2")
    (tmp_path / "job2" / "class0" / "0.png").rename(tmp_path / "job2" / "class0" / "00.png")
    assert "holds other images than those" in fails(capsys, *resume, "--data", tmp_path / "job2")

    for folder in checkpoints(out):  # as they were written before
        state = json.loads((folder / "state.json").read_text())
        del state["names"]
        (folder / "state.json").write_text(json.dumps(state))
        manifest = json.loads((folder / "manifest.json").read_text()) | {"state.json": digest(folder / "state.json")}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "data: " in fails(capsys, *resume, "--data", images)
    capsys.readouterr()
    run(mae_hivit, *resume, "--data", tmp_path / "job2")
    assert "resuming from" in capsys.readouterr().out


def test_what_to_do_next_is_commands_that_work(images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.move(images, "my images")
    run(mae_hivit, *TINY, "--data", "my images", "--out", "my run")
    hints = re.findall(r"mimkit (?:probe|reconstruct) .*", capsys.readouterr().out)
    assert len(hints) == 2
    for hint in hints:
        assert command(capsys, monkeypatch, *shlex.split(hint)[1:])[0] == 0


# Signals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "tiny"), [(mae_hivit, TINY), (simmim, SIMMIM_SVIT)], ids=["mae", "simmim"])
def test_interrupting_saves_and_says_how_to_continue(recipe, tiny, images, tmp_path, capsys, monkeypatch):
    """The flags that are printed are all that it takes, also for a folder whose name the shell would split."""
    end_step, out = Run.end_step, tmp_path / "my run"

    def interrupted(self, step):
        end_step(self, step)
        if step == 10:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C

    monkeypatch.setattr(Run, "end_step", interrupted)
    printed = fails(capsys, *tiny, "--data", images, "--out", out, recipe=recipe, code=130)
    assert "Stopped by SIGINT after step 11, which is saved. Continue with " in printed
    monkeypatch.setattr(Run, "end_step", end_step)
    run(recipe, *shlex.split(printed.split("Continue with ")[1].removesuffix(".")))
    assert f"resuming from {out}/checkpoints/step-00000011" in capsys.readouterr().out.replace("\n", "")
    assert checkpoints(out)[-1].name == "step-00000016"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_scheduler_stops_a_run_that_continues_as_if_it_had_not(name, images, tmp_path, capsys, monkeypatch):
    argv = ["--data", images, *TINY, "--knn-every", "2"]
    run(mae_hivit, "--out", tmp_path / "whole", *argv)
    end_step = Run.end_step

    def signaled(self, step):
        end_step(self, step)
        if step in (4, 7):  # between readings, and where a measurement and a checkpoint are due
            signal.raise_signal(getattr(signal, name))

    monkeypatch.setattr(Run, "end_step", signaled)
    for done in (5, 8):
        printed = fails(capsys, *argv, "--out", tmp_path / "run", "--resume", "auto", code=75)
        assert f"Stopped by {name} after step {done}, which is saved. Continue with --config" in printed
        assert checkpoints(tmp_path / "run")[-1].name == f"step-{done:08d}"
    monkeypatch.setattr(Run, "end_step", end_step)
    run(mae_hivit, "--out", tmp_path / "run", *argv, "--resume", "auto")
    read = [[json.loads(line) for line in (tmp_path / f / "metrics.jsonl").open()] for f in ("whole", "run")]
    for lines in read:
        for line in lines:
            for clock in ("images_per_s", "waiting"):
                line.pop(clock, None)
    assert read[0] == read[1]
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


@pytest.mark.parametrize("where", ["preflight", "summarize"])
def test_a_run_that_is_stopped_before_or_after_its_steps_can_be_queued_again(
    where, images, tmp_path, capsys, monkeypatch
):
    argv = ["--data", images, "--out", tmp_path / "run", *TINY]
    with monkeypatch.context() as patch:
        patch.setattr(mae, where, lambda *_: signal.raise_signal(signal.SIGTERM))
        printed = fails(capsys, *argv, code=75)
    assert "Stopped by SIGTERM outside of training steps: start it again" in printed
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run(mae_hivit, *argv, "--resume", "auto")
    assert (tmp_path / "run" / "encoder" / "model.safetensors").exists()


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_to_the_whole_job_spares_the_data_workers(name, code, images, tmp_path):
    argv = ["--data", images, "--out", tmp_path / "run", *TINY, "--workers", "2", "--epochs", "1000"]
    words = [sys.executable, ROOT / "recipes" / "mae_hivit.py", *argv, "--knn-every", "0"]
    job = subprocess.Popen(list(map(str, words)), stderr=subprocess.PIPE, text=True, process_group=0)
    try:
        wait_for_loss(job, tmp_path / "run")
        assert len(psutil.Process(job.pid).children()) >= 2
        os.killpg(job.pid, getattr(signal, name))
        printed = job.communicate(timeout=120)[1]
    finally:
        job.kill()
    assert job.returncode == code, printed
    assert "which is saved" in printed
    assert "Traceback" not in printed


# Several processes ---------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_any_number_of_processes_is_the_same_run(images, tmp_path):
    """Two processes are in the default tier, in test_distributed.py."""
    run(mae_hivit, "--data", images, *TINY, "--out", tmp_path / "1")
    printed = launched(4, "mae_hivit", "--data", images, *TINY, "--out", tmp_path / "4")
    assert "8 = 2 images x 4 processes" in printed
    assert printed.count("configured mean") == 1  # one of them prints
    one, four = (losses(tmp_path / count) for count in "14")
    assert four == pytest.approx(one, abs=1e-4)

    *_, half, whole = checkpoints(tmp_path / "4")  # which two processes continue
    shutil.rmtree(whole)
    argv = ["--data", images, *TINY, "--grad-accum-steps", "2", "--resume", "auto"]
    assert f"resuming from {half}" in launched(2, "mae_hivit", *argv, "--out", tmp_path / "4")
    assert losses(tmp_path / "4") == pytest.approx(one, abs=1e-4)
    odd = launching(2, "mae_hivit", "--data", images, *TINY, "--batch-size", "7", "--out", tmp_path / "odd")
    assert "--batch-size 7 cannot be shared by 2 processes" in odd.communicate()[1]  # so there are two


LONG = ["--epochs", "4000", "--warmup-epochs", "1", "--knn-every", "0"]


@pytest.mark.distributed
@pytest.mark.parametrize("who", ["1", "launcher"])
def test_a_process_that_is_killed_ends_the_others(who, images, tmp_path):
    job = launching(2, "mae_hivit", "--data", images, *TINY, *LONG, "--out", tmp_path / "run")
    try:
        wait_for_loss(job, tmp_path / "run")
        workers = psutil.Process(job.pid).children(recursive=True)
        killed = job if who == "launcher" else next(p for p in workers if p.environ().get("RANK") == who)
        killed.kill()
        job.communicate(timeout=120)
    finally:
        job.kill()
    assert job.returncode
    assert not psutil.wait_procs(workers, timeout=10)[1]


@pytest.mark.distributed
def test_a_process_that_cannot_be_reached_ends_the_others(images, tmp_path, monkeypatch):
    """As with a machine that is lost, its connections stay open."""
    monkeypatch.setenv("BEAT", ".5")
    probe = ROOT / "tests" / "training" / "engine_probe.py"
    argv = ["--data", images, *TINY, *LONG, "--out", tmp_path / "run"]
    job = launching(2, probe, tmp_path / "found", "mae_hivit", *argv)
    try:
        wait_for_loss(job, tmp_path / "run")
        workers = psutil.Process(job.pid).children(recursive=True)
        next(p for p in workers if p.environ().get("RANK") == "1").suspend()
        printed = job.communicate(timeout=120)[1]
    finally:
        job.kill()
    assert "cannot be reached (no sign of life from process 1 for 8 seconds)" in printed
    assert job.returncode
    assert not psutil.wait_procs(workers, timeout=10)[1]


@pytest.mark.distributed
def test_processes_stop_together_when_one_is_signaled(images, tmp_path):
    argv = ["--data", images, *TINY, "--epochs", "40", "--save-every", "40", "--knn-every", "0"]
    launched(2, "mae_hivit", *argv, "--out", tmp_path / "whole")
    job = launching(2, "mae_hivit", *argv, "--out", tmp_path / "run")
    try:
        wait_for_loss(job, tmp_path / "run")
        workers = psutil.Process(job.pid).children(recursive=True)
        next(p for p in workers if p.environ().get("RANK") == "1").send_signal(signal.SIGUSR1)
        printed = job.communicate(timeout=120)[1]
    finally:
        job.kill()
    assert "Stopped by SIGUSR1 after step" in printed
    assert "Stopped by a signal to another process after step" in printed
    (saved,) = checkpoints(tmp_path / "run")
    assert 20 <= int(saved.name[-3:]) < 160
    launched(2, "mae_hivit", *argv, "--out", tmp_path / "run", "--resume", "auto")
    whole, again = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert whole.keys() == again.keys()
    assert all(whole[step] == pytest.approx(again[step], abs=1e-6) for step in whole)
