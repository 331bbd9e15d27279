import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mimkit.saving
import numpy as np
import psutil
import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import LoggerType
from conftest import ROOT, launched, launching, losses
from mimkit.recipes import mae_hivit, mae_svit, mae_vit, simmim_svit, simmim_swin
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

import mimkit.training
from mimkit.data.transforms import Normalize
from mimkit.io.weights import read_weights
from mimkit.methods.checkpoint import load_run
from mimkit.methods.reconstruction import reconstruct
from mimkit.training.checkpoint import checkpoints, digest
from mimkit.training.optim import adamw, cosine
from mimkit.training.precision import resolve_precision, seconds_of
from mimkit.training.run import Run
from mimkit.units import serialize

TINY = ["--epochs", "4", "--batch-size", "8", "--decoder-dim", "24", "--workers", "0", "--save-every", "2"]


def run(recipe, *argv):
    recipe.main(list(argv))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("recipe", [mae_hivit, mae_vit], ids=["hivit", "vit"])
def test_what_a_run_leaves(recipe, images, tmp_path, capsys):
    out = tmp_path / "run"
    run(recipe, "--data", images, "--out", str(out), *TINY)
    said = capsys.readouterr().out
    assert "kNN at random: " in said
    assert "kNN after 16 steps: " in said
    assert f'timm.create_model("local-dir:{out}/encoder", pretrained=True)' in said.replace("\n", "")
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
    trained = load_file(out / "checkpoints" / "step-00000016" / "model.safetensors")
    prefix = "encoder.vit." if recipe is mae_vit else "encoder."
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, trained[prefix + name])
    mae, cfg = load_run(out)
    assert tuple(cfg["input_size"]) == (3, 32, 32)
    x = torch.randn(2, 3, 32, 32)
    size, (gh, gw) = mae.encoder.unit_size, (32 // mae.encoder.unit_size,) * 2
    every = torch.arange(gh * gw).expand(2, -1)
    latent = mae.encoder.encode_units(serialize(x, size), every, (gh, gw))
    features = encoder.forward_features(x)
    if recipe is mae_hivit:  # the decoder's view: the last 128 channels before the norm are the main output
        outputs = encoder.stages(serialize(x, size), every, (gh, gw))
        features = encoder.norm(torch.cat([stage.flatten(2) for stage in outputs], -1))
    assert torch.allclose(latent, features, atol=1e-5)
    assert not torch.allclose(timm.create_model(f"local-dir:{out}/encoder").eval()(x), encoder(x), atol=1e-3)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (mae_hivit, ""),
        (mae_hivit, "--streaming true"),
        (mae_hivit, "--grad-accum-steps 2 --workers 1"),
        (simmim_svit, ""),  # has running statistics
    ],
    ids=["plain", "streaming", "accumulated", "simmim"],
)
def test_a_resumed_run_is_the_run(recipe, options, images, tmp_path, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    tiny = [word for word in TINY if recipe is mae_hivit or word not in ("--decoder-dim", "24")]
    argv = ["--data", images, *tiny, *options.split()]
    run(recipe, "--out", str(whole), *argv)
    shutil.copytree(whole, broken)
    for name in ("encoder", "decoder", "checkpoints/step-00000016"):
        shutil.rmtree(broken / name)
    capsys.readouterr()
    run(recipe, "--out", str(broken), "--resume", "auto", *argv)
    assert "going on from" in capsys.readouterr().out
    assert losses(broken) == losses(whole)
    a, b = (load_file(f / "checkpoints" / "step-00000016" / "model.safetensors") for f in (whole, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert sorted(f.name for f in (whole / "checkpoints").iterdir()) == ["step-00000008", "step-00000016"]


def test_a_scale_of_gradients_survives(images, tmp_path, monkeypatch):
    """fp16's, without its GPU: it doubles every five steps."""
    init, ends = Run.__init__, []

    def scaled(run, *args):
        init(run, *args)
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8, growth_interval=5)

    monkeypatch.setattr(Run, "__init__", scaled)
    argv = ["--data", images, "--out", str(tmp_path / "run"), *TINY, "--knn-every", "0", "--resume", "auto"]
    for _ in range(2):
        run(mae_hivit, *argv)
        last = tmp_path / "run" / "checkpoints" / "step-00000016"
        weights = {name: tensor.clone() for name, tensor in load_file(last / "model.safetensors").items()}
        ends.append((json.loads((last / "state.json").read_text())["scaler"], weights))
        shutil.rmtree(last)
    assert ends[0][0] == ends[1][0]
    assert (ends[0][0]["scale"], ends[0][0]["_growth_tracker"]) == (64, 1)
    assert all(torch.equal(tensor, ends[1][1][name]) for name, tensor in ends[0][1].items())


def test_accumulating_changes_nothing(images, tmp_path):
    for parts in ("1", "4"):
        run(mae_hivit, "--data", images, "--out", str(tmp_path / parts), "--grad-accum-steps", parts, *TINY)
    a, b = (read_weights(tmp_path / parts / "encoder") for parts in ("1", "4"))
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
    assert losses(tmp_path / "1")[16] == pytest.approx(losses(tmp_path / "4")[16], abs=1e-4)


def test_init_goes_on_from_a_run(images, tmp_path, capsys):
    run(mae_hivit, "--data", images, "--out", str(tmp_path / "first"), *TINY)
    capsys.readouterr()
    argv = ["--out", str(tmp_path / "second"), "--data", images, "--init", str(tmp_path / "first"), *TINY]
    run(mae_hivit, *argv)
    said = capsys.readouterr().out
    assert "encoder and decoder from" in said
    assert "kNN at the start" in said


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
    run(mae_hivit, "--data", images, "--out", str(tmp_path / "run"), *TINY, *argv)
    assert np.isfinite(losses(tmp_path / "run")[16])


def test_five_channels(tmp_path):
    for i in range(8):
        np.save(tmp_path / f"{i}.npy", np.random.default_rng(i).random((5, 20, 24), dtype=np.float32))
    run(mae_hivit, "--data", str(tmp_path), "--in-chans", "5", "--out", str(tmp_path / "run"), *TINY)
    encoder = timm.create_model(f"local-dir:{tmp_path}/run/encoder", pretrained=True)
    assert encoder.patch_embed.proj.in_channels == 5
    assert encoder.pretrained_cfg["mean"] == [0.5] * 5


def fails(capsys, *argv, recipe=mae_hivit):
    """Ends with one sentence and exit code 2; -> the sentence."""
    with pytest.raises(SystemExit) as caught:
        recipe.main(list(argv))
    assert caught.value.code == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said.err.strip().splitlines()[-1]


def test_wrong_options_are_one_sentence(images, tmp_path, capsys):
    out = str(tmp_path / "run")
    data = ["--data", images, "--out", out]
    for argv, message in [
        (["--data", str(tmp_path / "nowhere")], "no such file or folder"),
        ([*data, "--batch-size", "64"], "--batch-size 64 is more than the 32 images"),
        ([*data, "--batch-size", "7", "--grad-accum-steps", "2"], "choose a multiple of 2"),
        ([*data, "--model", "hivit_x", "--batch-size", "8"], "--model hivit_x is not known"),
        ([*data, "--model", "resnet18", "--batch-size", "8"], "--model resnet18 does not take these options"),
        ([*data, "--img-size", "30", *TINY], "height of 30 px is not a multiple of the mask unit of 4 px"),
        ([*data, "--img-size", "axb"], "'axb' is neither a number nor HEIGHTxWIDTH"),
        ([*data, "--mask-ratio", "1.5", *TINY], "mask_ratio is 1.5"),
        ([*data, *TINY, "--epochs", "0.1"], "--epochs 0.1 of 4 steps is not one step"),
        ([*data, "--epochs", "0"], "epochs"),
        ([*data, "--grad-accum-steps", "0"], "grad_accum_steps"),
        ([*data, "--patch-size", "-1"], "patch_size"),
        ([*data, *TINY, "--decoder-heads", "7"], "does not divide into 7 heads"),
        ([*data, "--epochs", "many"], "epochs"),
        ([*data, "--track", "nothing"], "--track nothing is not installed"),
        ([*data, "--streaming", "true", "--knn-every", "1", *TINY], "--streaming false"),
        ([*data, "--precision", "fp8"], "--precision fp8 is unknown"),
        ([*data, "--mean", "[0.5,1]"], "--mean [0.5, 1.0] does not fit 3 channels"),
        ([*data, "--init", "nowhere.pth", *TINY], "nowhere.pth: there is no such file"),
        ([*data, "--resume", str(tmp_path)], "holds no checkpoint"),
        ([*data, "--color", "red"], "--color"),
        ([*data, "--config", "nothing.yaml"], "nothing.yaml"),
    ]:
        assert message in fails(capsys, *argv), argv
        AcceleratorState._reset_state(reset_partial_state=True)
    assert not Path(out).exists()
    assert "swin" in fails(capsys, *data, *TINY, "--model", "swin_tiny_patch4_window7_224", recipe=mae_vit).lower()


def test_a_run_is_never_written_over(images, tmp_path, capsys):
    argv = ["--data", images, "--out", str(tmp_path / "run"), *TINY]
    run(mae_hivit, *argv)
    assert "holds a run already: pass --resume auto" in fails(capsys, *argv)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "batch_size: 8 there, 4 here" in fails(capsys, *argv, "--resume", "auto", "--batch-size", "4")
    AcceleratorState._reset_state(reset_partial_state=True)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 17, "lo')  # killed while writing
    run(mae_hivit, *argv, "--resume", "auto")


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
def test_a_torn_checkpoint_is_passed_over(name, damage, images, tmp_path, capsys):
    out = tmp_path / "run"
    argv = ["--data", images, "--out", str(out), *TINY, "--knn-every", "0"]
    run(mae_hivit, *argv)
    last = out / "checkpoints" / "step-00000016" / "model.safetensors"
    before, whole = losses(out), {key: tensor.clone() for key, tensor in load_file(last).items()}  # a file is mapped
    spoil(last.with_name(name), damage)
    capsys.readouterr()
    run(mae_hivit, *argv, "--resume", "auto")
    said = capsys.readouterr().out.replace("\n", "")
    assert "step-00000016 is torn" in said
    assert f"going on from {out}/checkpoints/step-00000008" in said
    again = load_file(last)
    assert losses(out) == before
    assert all(torch.equal(again[key], whole[key]) for key in whole)
    for folder in checkpoints(out):
        spoil(folder / name, damage)
    for _ in range(2):  # not the first time nor the second does it begin at the beginning
        assert "is whole: start anew" in fails(capsys, *argv, "--resume", "auto")
        AcceleratorState._reset_state(reset_partial_state=True)


def test_checkpoints_that_stay(images, tmp_path):
    argv = ["--data", images, *TINY, "--save-every", "0.5", "--knn-every", "0", "--keep", "1", "--keep-every", "3"]
    run(mae_hivit, "--out", str(tmp_path / "run"), *argv)
    assert [f.name[-2:] for f in checkpoints(tmp_path / "run")] == ["06", "12", "16"]


def test_training_goes_on_while_a_checkpoint_is_written(images, tmp_path, monkeypatch):
    argv = ["--data", images, *TINY, "--knn-every", "0"]
    run(mae_hivit, "--out", str(tmp_path / "a"), *argv)
    later, end_step, write = threading.Event(), Run.end_step, mimkit.training.write

    def slow(*args):
        assert later.wait(60)
        write(*args)

    def watched(self, step):
        end_step(self, step)
        if step == 10:  # 8 steps were done when it began
            assert [f.name for f in checkpoints(tmp_path / "b")] == []
            later.set()

    monkeypatch.setattr(mimkit.training, "write", slow)
    monkeypatch.setattr(Run, "end_step", watched)
    run(mae_hivit, "--out", str(tmp_path / "b"), *argv)
    for name in ("model", "optimizer"):
        a, b = (load_file(tmp_path / f / "checkpoints" / "step-00000008" / f"{name}.safetensors") for f in "ab")
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_default_directories_are_numbered(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--data", images, *TINY]
    run(mae_hivit, *argv)
    run(mae_hivit, *argv)
    assert sorted(f.name for f in (tmp_path / "runs").iterdir()) == ["mae_hivit", "mae_hivit-2"]
    before = (tmp_path / "runs" / "mae_hivit" / "metrics.jsonl").read_text()
    run(mae_hivit, *argv, "--resume", "auto")  # goes on with the last one, which is complete
    assert (tmp_path / "runs" / "mae_hivit" / "metrics.jsonl").read_text() == before
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_of_two_runs_that_begin_together_one_keeps_its_directory(images, tmp_path, capsys, monkeypatch):
    write_config = Run.write_config

    def second(run):
        run.folder.mkdir(parents=True)
        write_config(run)

    monkeypatch.setattr(Run, "write_config", second)
    monkeypatch.chdir(tmp_path)
    said = fails(capsys, "--data", images, *TINY)
    assert "runs/mae_hivit was begun by another run just now: start once more." in said
    assert not list((tmp_path / "runs" / "mae_hivit").iterdir())


def test_interrupting_says_how_to_go_on(images, tmp_path, capsys, monkeypatch):
    end_step = Run.end_step

    def interrupted(self, step):
        end_step(self, step)
        if step == 10:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C

    monkeypatch.setattr(Run, "end_step", interrupted)
    with pytest.raises(SystemExit) as caught:
        mae_hivit.main(["--data", images, "--out", str(tmp_path / "run"), *TINY])
    assert caught.value.code == 130
    said = capsys.readouterr().err
    assert "the last checkpoint is" in said
    assert "step-00000008" in said
    assert "--resume auto" in said


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_scheduler_stops_a_run_which_goes_on_as_if_it_had_not(name, images, tmp_path, capsys, monkeypatch):
    argv = ["--data", images, *TINY, "--knn-every", "2"]
    run(mae_hivit, "--out", str(tmp_path / "whole"), *argv)
    end_step = Run.end_step

    def told(self, step):
        end_step(self, step)
        if step in (4, 7):  # between readings, and where a measurement and a checkpoint are due
            signal.raise_signal(getattr(signal, name))

    monkeypatch.setattr(Run, "end_step", told)
    for done in (5, 8):
        with pytest.raises(SystemExit) as caught:
            mae_hivit.main([*argv, "--out", str(tmp_path / "run"), "--resume", "auto"])
        assert caught.value.code == 75
        said = capsys.readouterr().err
        assert f"Stopped by {name} after step {done}, which is saved: go on with --out" in said
        assert checkpoints(tmp_path / "run")[-1].name == f"step-{done:08d}"
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    monkeypatch.setattr(Run, "end_step", end_step)
    run(mae_hivit, "--out", str(tmp_path / "run"), *argv, "--resume", "auto")
    read = [[json.loads(line) for line in (tmp_path / f / "metrics.jsonl").open()] for f in ("whole", "run")]
    for lines in read:
        for line in lines:
            for clock in ("images_per_s", "waiting"):
                line.pop(clock, None)
    assert read[0] == read[1]
    a, b = (load_file(tmp_path / f / "checkpoints/step-00000016/model.safetensors") for f in ("whole", "run"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_resumed_run_keeps_its_precision(images, tmp_path, monkeypatch):
    argv = ["--data", images, "--out", str(tmp_path / "run"), *TINY, "--precision", "auto"]
    for bf16 in (3, 1):  # the second machine is another one
        monkeypatch.setattr(mimkit.training, "seconds_of", {torch.float32: 2, torch.bfloat16: bf16}.get)
        run(mae_hivit, *argv, "--resume", "auto")
        assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["precision"] == "fp32"
    with pytest.raises(SystemExit):
        run(mae_hivit, *argv, "--resume", "auto", "--precision", "bf16")


@pytest.mark.parametrize("missing", ["sums", "param_groups", "count"])
def test_a_checkpoint_that_lacks_a_part_is_one_sentence(missing, images, tmp_path, capsys):
    argv = ["--data", images, "--out", str(tmp_path / "run"), *TINY]
    run(mae_hivit, *argv)
    checkpoint = checkpoints(tmp_path / "run")[-1]
    own = json.loads((checkpoint / "state.json").read_text())
    own.pop(missing)
    (checkpoint / "state.json").write_text(json.dumps(own))
    hashes = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(hashes | {"state.json": digest(checkpoint / "state.json")}))
    assert "start anew with another --out" in fails(capsys, *argv, "--resume", "auto")


@pytest.mark.parametrize("where", ["preflight", "finish"])
def test_a_run_that_is_stopped_before_or_after_its_steps_can_be_queued_again(
    where, images, tmp_path, capsys, monkeypatch
):
    argv = ["--data", images, "--out", str(tmp_path / "run"), *TINY]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(mae_hivit, where, lambda *_: signal.raise_signal(signal.SIGTERM))
        mae_hivit.main(argv)
    assert caught.value.code == 75
    assert "Stopped by SIGTERM outside of training steps: start it as before" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    run(mae_hivit, *argv, "--resume", "auto")
    assert (tmp_path / "run" / "encoder" / "model.safetensors").exists()


def until_it_trains(job, run):
    """Wait for its first loss."""
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and "loss" in metrics.read_text()) and job.poll() is None:
        time.sleep(0.05)


def test_a_signal_to_the_whole_job_spares_the_data_workers(images, tmp_path):
    argv = [
        "--data",
        images,
        "--out",
        tmp_path / "run",
        *TINY,
        "--workers",
        "2",
        "--epochs",
        "1000",
        "--knn-every",
        "0",
    ]
    words = [sys.executable, ROOT / "recipes" / "mae_hivit.py", *argv]
    job = subprocess.Popen(list(map(str, words)), stderr=subprocess.PIPE, text=True, process_group=0)
    try:
        until_it_trains(job, tmp_path / "run")
        assert len(psutil.Process(job.pid).children()) >= 2
        os.killpg(job.pid, signal.SIGTERM)
        said = job.communicate(timeout=120)[1]
    finally:
        job.kill()
    assert job.returncode == 75, said
    assert "which is saved" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "model.safetensors"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
    ],
)
def test_a_full_disk_leaves_the_last_checkpoint(error, images, tmp_path, capsys, monkeypatch):
    def full(state, file):
        if "00000016" in str(file):
            Path(file).write_bytes(b"half")
            raise error
        save_file(state, file)

    save_file = mimkit.saving.save_file
    monkeypatch.setattr(mimkit.saving, "save_file", full)
    said = fails(capsys, "--data", images, "--out", str(tmp_path / "run"), *TINY)
    assert "The disk is full" in said
    assert "step-00000008 is whole: go on with" in said
    assert [f.name for f in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000008"]


def test_precision_is_what_the_device_does_well(monkeypatch):
    assert resolve_precision("bf16") == "bf16"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert 0 < seconds_of(torch.bfloat16) < 1
    for bf16, expected in [(1, "bf16"), (3, "fp32")]:
        monkeypatch.setattr(mimkit.training, "seconds_of", {torch.float32: 2, torch.bfloat16: bf16}.get)
        assert resolve_precision("auto") == expected
    for cuda, capability, expected in [(False, None, "fp32"), (True, (7, 5), "fp16"), (True, (9, 0), "bf16")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert resolve_precision("auto") == expected
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert resolve_precision("auto") == "fp32"


def test_parameter_groups_and_schedule():
    model = timm.create_model("hivit_nano", img_size=32, patch_size=1)
    optimizer = adamw(model, 1.0, 0.05, (0.9, 0.95))
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    no_decay_names = {names[id(p)] for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]}
    assert decayed | no_decay_names == set(names.values())
    assert "blocks.4.attn.qkv.weight" in decayed
    assert {"absolute_pos_embed", "blocks.4.attn.relative_position_bias_table", "head.bias"} <= no_decay_names
    schedule, rates = cosine(optimizer, 100, 10), []
    for step in range(100):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    expected = [s / 10 if s < 10 else 0.5 * (1 + np.cos(np.pi * (s - 10) / 90)) for s in range(100)]
    assert rates == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_processes_share_the_work_and_change_nothing(images, tmp_path):
    run(mae_hivit, "--data", images, *TINY, "--out", str(tmp_path / "1"))
    for count in (2, 4):
        said = launched(count, "mae_hivit", "--data", images, *TINY, "--out", tmp_path / str(count))
        assert f"8 = {8 // count} images x {count} processes x 1 parts" in said
        assert said.count("configured mean") == 1  # by one of them
    one, two, four = (losses(tmp_path / count) for count in "124")
    assert two == pytest.approx(one, abs=1e-4)
    assert four == pytest.approx(one, abs=1e-4)

    *_, half, whole = checkpoints(tmp_path / "4")  # which two go on with
    shutil.rmtree(whole)
    argv = ["--data", images, *TINY, "--grad-accum-steps", "2", "--resume", "auto"]
    assert f"going on from {half}" in launched(2, "mae_hivit", *argv, "--out", tmp_path / "4")
    assert losses(tmp_path / "4") == pytest.approx(one, abs=1e-4)
    odd = launching(2, "mae_hivit", "--data", images, *TINY, "--batch-size", "7", "--out", tmp_path / "odd")
    assert "--batch-size 7 cannot be shared by 2 processes" in odd.communicate()[1]  # so there are two


@pytest.mark.slow
@pytest.mark.parametrize("who", ["1", "launcher"])
def test_a_process_that_is_killed_ends_the_others(who, images, tmp_path):
    argv = ["--data", images, *TINY, "--epochs", "4000", "--warmup-epochs", "1", "--knn-every", "0"]
    job = launching(2, "mae_hivit", *argv, "--out", tmp_path / "run")
    try:
        until_it_trains(job, tmp_path / "run")
        workers = psutil.Process(job.pid).children(recursive=True)
        killed = job if who == "launcher" else next(p for p in workers if p.environ().get("RANK") == who)
        killed.kill()
        job.communicate(timeout=120)
    finally:
        job.kill()
    assert job.returncode
    assert not psutil.wait_procs(workers, timeout=10)[1]


@pytest.mark.slow
def test_a_process_that_cannot_be_reached_ends_the_others(images, tmp_path, monkeypatch):
    """As of a machine that is lost, its connections stay open."""
    monkeypatch.setenv("BEAT", ".5")
    argv = ["--data", images, *TINY, "--epochs", "4000", "--warmup-epochs", "1", "--knn-every", "0"]
    job = launching(
        2,
        ROOT / "tests" / "training" / "engine_probe.py",
        tmp_path / "found",
        "mae_hivit",
        *argv,
        "--out",
        tmp_path / "run",
    )
    try:
        until_it_trains(job, tmp_path / "run")
        workers = psutil.Process(job.pid).children(recursive=True)
        next(p for p in workers if p.environ().get("RANK") == "1").suspend()
        said = job.communicate(timeout=120)[1]
    finally:
        job.kill()
    assert "cannot be reached (no sign of life from process 1 for 8 seconds)" in said
    assert job.returncode
    assert not psutil.wait_procs(workers, timeout=10)[1]


@pytest.mark.slow
def test_processes_stop_together_when_one_is_told(images, tmp_path):
    argv = ["--data", images, *TINY, "--epochs", "40", "--save-every", "40", "--knn-every", "0"]
    launched(2, "mae_hivit", *argv, "--out", tmp_path / "whole")
    job = launching(2, "mae_hivit", *argv, "--out", tmp_path / "run")
    try:
        until_it_trains(job, tmp_path / "run")
        workers = psutil.Process(job.pid).children(recursive=True)
        next(p for p in workers if p.environ().get("RANK") == "1").send_signal(signal.SIGUSR1)
        said = job.communicate(timeout=120)[1]
    finally:
        job.kill()
    assert "Stopped by SIGUSR1 after step" in said
    assert "Stopped by the signal to another process after step" in said
    (saved,) = checkpoints(tmp_path / "run")
    assert 20 <= int(saved.name[-3:]) < 160
    launched(2, "mae_hivit", *argv, "--out", tmp_path / "run", "--resume", "auto")
    whole, again = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert whole.keys() == again.keys()
    assert all(whole[step] == pytest.approx(again[step], abs=1e-6) for step in whole)


def test_trackers(images, tmp_path, capsys, monkeypatch):
    """No tracker is installed here: accelerate's own check is told that one is, and what it is given is kept."""
    logged = []
    monkeypatch.setattr("mimkit.training.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name, config: logged.append((name, config["lr"])))
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.append(values))
    run(mae_hivit, "--data", images, "--out", str(tmp_path / "run"), "--track", "tensorboard", *TINY)
    assert logged[0] == ("run", pytest.approx(8e-3 * 8 / 256))
    assert "loss" in logged[2]


def test_a_warmup_that_fills_the_run(images, tmp_path, capsys):
    argv = ["--data", images, "--out", str(tmp_path / "run"), *TINY, "--warmup-epochs", "4"]
    assert "A warm-up of 16 steps fills the run of 16" in fails(capsys, *argv)


def test_a_few_images_need_no_neighbors(tmp_path, capsys):
    for i in range(8):
        (tmp_path / "images" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "images" / str(i % 2) / f"{i}.png")
    run(mae_hivit, "--data", str(tmp_path / "images"), "--out", str(tmp_path / "run"), *TINY)
    assert "no kNN: 6 training images are fewer" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_with_inductor(images, tmp_path):
    argv = ["--data", images, *TINY, "--epochs", "1"]
    run(mae_hivit, "--out", str(tmp_path / "plain"), *argv)
    run(mae_hivit, "--out", str(tmp_path / "compiled"), *argv, "--compile", "true")
    assert losses(tmp_path / "compiled")[4] == pytest.approx(losses(tmp_path / "plain")[4], abs=1e-4)


def test_normalize_is_exported_with_the_encoder(images, tmp_path):
    argv = ["--mean", "[0.1,0.2,0.3]", "--std", "[0.4,0.5,0.6]"]
    run(mae_hivit, "--data", images, "--out", str(tmp_path / "run"), *TINY, *argv)
    cfg = timm.create_model(f"local-dir:{tmp_path}/run/encoder", pretrained=True).pretrained_cfg
    assert torch.allclose(Normalize(cfg["mean"], cfg["std"]).std.flatten(), torch.tensor([0.4, 0.5, 0.6]))


@pytest.mark.parametrize("recipe", [simmim_svit, mae_svit, simmim_swin])
def test_wrong_networks_and_sizes_end_in_a_sentence_before_anything_is_written(recipe, images, tmp_path, capsys):
    data = ["--data", images, "--batch-size", "8", "--workers", "0", "--out", str(tmp_path / "run")]
    others = ["hivit_nano", "vit_tiny_patch16_224", "resnet18", "swin_tiny_patch4_window7_224", "svit_nano"]
    own = "swin_tiny_patch4_window7_224" if recipe is simmim_swin else "svit_nano"
    for name in others:
        if name != own:
            assert "choose" in fails(capsys, *data, "--model", name, recipe=recipe)
    said = fails(capsys, *data, "--model", own, "--img-size", "100", "--patch-size", "4", recipe=recipe)
    assert "height of 100 px is not a multiple of the mask unit of 32 px" in said
    assert not (tmp_path / "run").exists()


def test_a_simmim_run_is_drawn_and_started_from(images, tmp_path, capsys):
    tiny = ["--data", images, "--batch-size", "8", "--workers", "0", "--epochs", "1", "--warmup-epochs", "0"]
    run(simmim_svit, *tiny, "--out", str(tmp_path / "first"))
    simmim, config = load_run(tmp_path / "first")
    assert tuple(config["input_size"]) == (3, 32, 32)
    state = load_file(tmp_path / "first" / "checkpoints" / "step-00000004" / "model.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in simmim.state_dict().items())
    x, shown, made = reconstruct(simmim, torch.randn(2, 3, 32, 32))
    hidden = shown == 0
    assert hidden.float().mean() == pytest.approx(10 / 16)
    assert torch.equal(made[~hidden], x[~hidden])
    capsys.readouterr()
    run(simmim_svit, *tiny, "--out", str(tmp_path / "second"), "--init", str(tmp_path / "first"), "--lr", "1e-30")
    assert "encoder and decoder from" in capsys.readouterr().out
    again, _ = load_run(tmp_path / "second")
    assert torch.allclose(again.decoder.pred.weight, simmim.decoder.pred.weight)
