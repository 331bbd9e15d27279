"""Classification: learning rates by layer, augmentation, scores, the recipe, probes and exports."""

import csv
import itertools
import json
import re
import shlex
import shutil
from dataclasses import asdict
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from conftest import command, encoded, launched, picture
from encoders import INPUT, SMALL_VIT, write_encoders
from mimkit.recipes import finetune, linear_probe, mae, simmim
from PIL import Image
from poison import poison
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms.v2.functional import pil_to_tensor

from mimkit.config import presets
from mimkit.data.loader import eval_loader
from mimkit.data.sample import Batch, SampleLoader
from mimkit.data.sources import open_source
from mimkit.data.transforms import Normalize, finetune_transform
from mimkit.errors import UserError
from mimkit.evaluation.features import map_batches
from mimkit.evaluation.probes import FrozenProbe
from mimkit.io.weights import read_weights, write_model
from mimkit.models import SViT
from mimkit.models.pretrained import load_network
from mimkit.tasks.classification import count_scores, fit_head, mixup_function
from mimkit.training.optim import layer_groups
from mimkit.training.run import Run

QUICK = ["--epochs", "4", "--batch-size", "8", "--warmup-epochs", "1", "--lr", "1e-3", "--workers", "0"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Dark, gray and light images, 32 for training and 12 for validation, and pre-trained encoders."""
    for name in ("matplotlib.pyplot", "torchmetrics.functional.classification"):  # the slow imports of a run
        import_module(name)
    folder = tmp_path_factory.mktemp("made")
    for part, count in (("train", 32), ("test", 12)):
        for i in range(count):
            place = folder / "images" / part / ("dark", "gray", "light")[i % 3]
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i + 1000 * count).integers(0, 80, (20, 24, 3)) + 80 * (i % 3)
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    return write_encoders(folder)


def reset():
    """Let the next recipe of this process create its own accelerate."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def tune(*argv):
    finetune.main(list(map(str, argv)))
    reset()


def refused(capsys, recipe, *argv):
    """Run a recipe that ends with exit code 2, and return its message."""
    with pytest.raises(SystemExit) as stop:
        recipe.main(list(map(str, argv)))
    reset()
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in err
    return err


# Learning rates by layer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers", "places"),
    [
        # stem, 2 + 2 stem blocks, 10 main blocks, head; a merge (2, 5) has the layer of the block before it
        (
            "hivit_t",
            16,
            {
                "absolute_pos_embed": 0,
                "patch_embed.norm.weight": 0,
                "blocks.0.mlp.fc1.weight": 1,
                "blocks.1.norm2.bias": 2,
                "blocks.2.reduction.weight": 2,
                "blocks.2.norm.weight": 2,
                "blocks.3.mlp.fc2.weight": 3,
                "blocks.5.reduction.weight": 4,
                "blocks.6.attn.relative_position_bias_table": 5,
                "blocks.15.attn.qkv.weight": 14,
                "fc_norm.weight": 15,
                "head.weight": 15,
            },
        ),
        # stem, 3 + 5 + 9 + 3 blocks, head with the tail; a merge has the layer of the block before it
        (
            "svit_s",
            22,
            {
                "stem.convs.0.weight": 0,
                "stem.norms.3.bias": 0,
                "stages.0.0.pos_conv.weight": 1,
                "stages.0.2.mlp.fc2.weight": 3,
                "merges.0.conv.weight": 3,
                "stages.1.0.attn.qkv.weight": 4,
                "stages.2.8.norm2.weight": 17,
                "merges.2.norm.bias": 17,
                "stages.3.2.mlp.conv.weight": 20,
                "tail.weight": 20,
                "norm.weight": 20,
                "head.weight": 21,
            },
        ),
        ("hpvit_s", 14, {"pos_embed": 0, "blocks.0.attn.qkv.weight": 1, "blocks.11.mlp.fc2.bias": 12, "head.bias": 13}),
        ("vit_base_patch16_224", 14, {"cls_token": 0, "blocks.0.norm1.weight": 1, "blocks.11.attn.proj.weight": 12}),
    ],
)
def test_layer_decay_reaches_every_parameter(name, layers, places):
    net = timm.create_model(name, num_classes=10)
    groups = layer_groups(net, 0.05, 0.65, pool_scale=10)
    found = {parameter: group for group in groups for parameter in group["param_names"]}
    assert found.keys() == {n for n, p in net.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(found)
    for parameter, group in found.items():
        if parameter.startswith("pools."):
            assert (group["lr_scale"], group["weight_decay"]) == (10, 0)
            continue
        assert group["lr_scale"] == pytest.approx(0.65 ** (layers - 1 - group["layer"])), parameter
        tensor = net.get_parameter(parameter)
        table = any(word in parameter for word in ("pos_embed", "cls_token", "bias_table"))
        assert group["weight_decay"] == (0 if tensor.ndim < 2 or table else 0.05), parameter
    assert {found[p]["layer"] for p in found} == set(range(layers))
    for parameter, layer in places.items():
        assert found[parameter]["layer"] == layer, parameter
    if name == "hpvit_s":
        assert {p for p in found if p.startswith("pools.")} == {"pools.0.weight", "pools.1.weight"}


def test_dry_run_prints_learning_rates_and_names_a_damaged_image(made, capsys, tmp_path):
    tune("--model", made / "hivit", "--data", made / "images", "--dry-run", "--out", tmp_path / "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if "blocks.2." in line]
    assert any("merge" in line or "reduction" in line or "blocks.2.norm" in line for line in lines)
    shutil.copytree(made / "images", tmp_path / "images")
    damaged = min(f for f in (tmp_path / "images" / "test").rglob("*") if f.is_file())
    damaged.write_text("none")
    with pytest.raises(SystemExit):
        tune("--model", made / "hivit", "--data", tmp_path / "images", "--dry-run", "--out", tmp_path / "run")
    assert f"{damaged} cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_head_starts_near_zero_on_large_sets_only(made, capsys, monkeypatch, tmp_path):
    """A head of 2e-5 costs 2 to 6 points in a few hundred steps (docs/finetuning.md)."""

    def head(*argv):
        tune("--model", made / "hivit", "--data", made / "images", "--dry-run", "--out", tmp_path / "run", *argv)
        return capsys.readouterr().out.split("fresh head of 3 classes (head)")[1].splitlines()[0]

    assert head() == ""
    assert head("--head-std", "2e-5") == ", std 2e-05"
    monkeypatch.setattr(finetune, "LARGE", 32)
    assert head() == ", std 2e-05"
    assert head("--head-std", "null") == ""


# Augmentation --------------------------------------------------------------------------------------------------------


def test_augmentation_is_a_function_of_seed_epoch_and_image():
    transform = finetune_transform((24, 32), (0.3, 1.0), "rand-m9-mstd0.5-inc1", 1.0, Normalize([0.5] * 3, [0.25] * 3))
    row = {"image": {"bytes": None, "path": None}, "label": 1}
    load = SampleLoader(transform, 3, 0, 5, ("image", "label"), pixels=True)
    row["image"]["bytes"] = encoded(picture())
    views = {(e, i): load(row, e, i).image for e in (0, 1) for i in (0, 1)}
    np.random.seed(99)
    torch.manual_seed(99)
    assert all(torch.equal(load(row, e, i).image, view) for (e, i), view in views.items())
    assert not torch.equal(views[0, 0], views[1, 0])
    assert not torch.equal(views[0, 0], views[0, 1])
    assert views[0, 0].shape == (3, 24, 32)
    assert views[0, 0].dtype == torch.float32


def test_augmentation_of_other_channels_and_of_none():
    plain = finetune_transform((16, 16), (1.0, 1.0), None, 0.0, Normalize([0.5], [0.25]))
    x = plain(pil_to_tensor(picture(size=(16, 16)).convert("L")))
    assert x.shape == (1, 16, 16)
    assert -2 <= x.min() < -1.5
    assert 1.5 < x.max() <= 2
    gray = finetune_transform((16, 16), (1.0, 1.0), "rand-m9-mstd0.5", 1.0, Normalize([0.5], [0.25]))
    assert gray(pil_to_tensor(picture().convert("L"))).shape == (1, 16, 16)
    five = finetune_transform((16, 16), (1.0, 1.0), "rand-m9-mstd0.5", 1.0, Normalize([0.5] * 5, [0.25] * 5))
    assert five(torch.rand(5, 20, 20)).shape == (5, 16, 16)
    with pytest.raises(UserError, match="--aa dance"):
        finetune_transform((16, 16), (1.0, 1.0), "dance", 0, Normalize([0.5], [0.25]))


def test_mixup():
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 2])
    same, targets = mixup_function(3, 4, 0, 0, 0.3)(images, labels)
    assert same is images
    assert torch.allclose(targets[0], torch.tensor([0.8, 0.1, 0.1]))
    np.random.seed(0)
    mixed, targets = mixup_function(3, 4, 0.8, 1.0, 0.0)(images.clone(), labels)
    assert not torch.equal(mixed, images)
    assert torch.allclose(targets.sum(1), torch.ones(4))
    assert 0 < targets[0, 0] < 1
    with pytest.raises(UserError, match="has 5"):
        mixup_function(3, 5, 0.8, 0, 0)


# Scores --------------------------------------------------------------------------------------------------------------


def whole_scores(logits, labels):
    """Compute (confusion, top-5 hits) from the logits of all images at once."""
    classes = logits.shape[1]
    confusion = torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2)
    likely = logits.topk(min(5, classes)).indices
    return confusion.view(classes, classes), (likely == labels[:, None]).sum()


def test_scores_are_their_definition():
    logits, labels = torch.randn(200, 7), torch.randint(7, (200,))
    found = count_scores([(logits, labels)], 7)
    assert found.top1 == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    order = logits.argsort(1, descending=True)[:, :5]
    assert found.top5 == pytest.approx(
        100 * np.mean([int(y) in row for y, row in zip(labels, order.tolist(), strict=True)])
    )
    assert found.confusion[2, 3] == int(((labels == 2) & (logits.argmax(1) == 3)).sum())
    assert found.confusion.sum() == 200
    assert count_scores([(torch.eye(3), torch.arange(3))], 3).top5 == 100


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 6, 40])
@pytest.mark.parametrize("ties", [False, True])
def test_scores_of_batches_are_those_of_all_logits(classes, ties):
    logits, labels = torch.randn(130, classes), torch.randint(classes, (130,))
    if ties:
        logits = (2 * logits).round()  # many logits of an image are equal
        logits[:10] = 0
    found = count_scores(zip(logits.split([64, 65, 1]), labels.split([64, 65, 1]), strict=True), classes)
    confusion, hits = whole_scores(logits, labels)
    assert torch.equal(found.confusion, confusion)
    assert found.top5_hits == hits
    assert (found.confusion.dtype, found.top5_hits.dtype) == (torch.int64, torch.int64)


def test_scores_without_images_are_0():
    """One of several processes may have damaged images only, in batches without images."""
    empty = Batch(torch.empty(0), torch.empty(0), torch.empty(0), [], [("a.png", "not an image")])
    net = nn.Linear(1, 4)
    found = count_scores(map_batches(net, [empty, empty], Normalize([0.5], [0.5]), net), 4)
    assert found.confusion.shape == (4, 4)
    assert not found.confusion.any()
    assert not found.top5_hits.any()


@pytest.mark.parametrize("label", [-1, 3, 7])
def test_labels_that_are_no_class_are_refused(label):
    with pytest.raises(UserError, match=f"has the label {label}, which is not between 0 and 2"):
        count_scores([(torch.randn(2, 3), torch.tensor([1, label]))], 3)


def test_center_of_an_image_is_evaluated(tmp_path):
    picture(size=(40, 40)).save(tmp_path / "a.png")
    source = open_source(str(tmp_path))
    whole, middle = (next(iter(eval_loader(source, (20, 20), 3, crop_pct=pct))).images for pct in (1.0, 0.5))
    pixels = torch.from_numpy(np.asarray(picture(size=(40, 40)))).permute(2, 0, 1)
    assert torch.equal(middle[0], pixels[:, 10:30, 10:30])
    assert not torch.equal(whole, middle)


# Heads ---------------------------------------------------------------------------------------------------------------


def test_head_is_kept_for_the_same_classes_only():
    def network(**pretrained_cfg):
        net = timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=1, num_heads=2, num_classes=3)
        net.pretrained_cfg.update(pretrained_cfg)
        return net, net.head.weight.clone()

    net, before = network(label_names=["a", "b", "c"])
    assert "its own head" in fit_head(net, ["a", "b", "c"], 2e-5)
    assert torch.equal(net.head.weight, before)
    net, before = network()  # released classifiers have no names
    assert "its own head, whose 3 classes have no names" in fit_head(net, ["a", "b", "c"], 2e-5)
    assert torch.equal(net.head.weight, before)
    for names, known in ((["a", "b", "d"], ["a", "b", "c"]), (["a", "b"], None)):
        net, _ = network(label_names=known)
        assert f"fresh head of {len(names)} classes (head)" in fit_head(net, names, 2e-5)
        assert 1e-5 < net.head.weight.std() < 3e-5
    net, before = network(label_names=["a", "b", "c"])
    assert "fresh head of 3 classes" in fit_head(net, ["a", "b", "c"], 2e-5, random=True)
    assert not torch.equal(net.head.weight, before)
    assert net.head.weight.std() > 1e-2  # the network's own initialization


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cause", ["bad step", "fp16 scaler"])
def test_average_does_not_move_on_a_skipped_step(cause, made, tmp_path, monkeypatch):
    if cause == "bad step":
        poison(monkeypatch, step=2)
    else:  # the property is read once per step
        steps = itertools.count()
        dropped = property(lambda _: next(steps) == 2)
        monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", dropped)
    averages, end_step = {}, Run.end_step

    def observed(run, step):
        averages[step] = torch.cat([p.flatten().clone() for p in run.state.extra_modules["ema"].parameters()])
        end_step(run, step)

    monkeypatch.setattr(Run, "end_step", observed)
    argv = ["--model", made / "vit", "--data", made / "images", *QUICK, "--epochs", "1", "--warmup-epochs", "0"]
    tune(*argv, "--model-ema-decay", "0.9", "--out", tmp_path / "run")
    assert list(averages) == [0, 1, 2, 3]
    assert torch.equal(averages[2], averages[1])
    assert not torch.equal(averages[1], averages[0])
    assert not torch.equal(averages[3], averages[2])
    assert averages[3].isfinite().all()


@pytest.mark.e2e
def test_what_a_run_leaves(made, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    heavy = ["--model-ema-decay", "0.9", "--drop-path", "0.1", "--clip-grad", "1", "--grad-checkpointing"]
    tune("--model", made / "hivit", "--data", made / "images", "--out", out, *QUICK, *heavy, "--save-every", "1")
    said = capsys.readouterr().out
    assert "fresh head of 3 classes (head)" in said
    assert "on 12 test images" in said
    names = {
        "config.yaml",
        "classes.json",
        "metrics.jsonl",
        "curves.png",
        "confusion.png",
        "checkpoints",
        "best",
        "last",
    }
    assert {f.name for f in out.iterdir()} == names
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "top1" in line]) == 4
    assert len([line for line in lines if "top1_raw" in line]) == 4
    net = timm.create_model(f"local-dir:{out}/last", pretrained=True).eval()
    ema, raw = (load_file(out / "checkpoints" / "step-00000016" / f"{name}.safetensors") for name in ("ema", "model"))
    assert all(torch.equal(tensor, ema[key]) for key, tensor in net.state_dict().items())  # the average is what counts
    assert not torch.equal(ema["head.weight"], raw["head.weight"])
    config = json.loads((out / "last" / "config.json").read_text())
    assert config["label_names"] == ["dark", "gray", "light"]
    assert config["num_classes"] == 3

    # evaluating it alone gives the last score, and predict writes the labels
    final = [line["top1"] for line in lines if "top1" in line][-1]
    tune("--model", out / "last", "--data", made / "images", "--eval-only")
    assert f"top-1 {final:.2f} % on 12 test images" in capsys.readouterr().out
    table = tmp_path / "table.csv"
    (tmp_path / "some").mkdir()
    for i in range(3):
        shutil.copy(
            made / "images" / "test" / ("dark", "gray", "light")[i] / f"{i}.png", tmp_path / "some" / f"{i}.png"
        )
    (tmp_path / "some" / "1b.png").write_bytes(b"no image")
    assert "no config.json" in command(capsys, monkeypatch, "predict", "--model", tmp_path, "--images", "x")[2]
    argv = ["predict", "--model", out, "--images", tmp_path / "some", "--out", table, "--top", "2", "--max-bad", "1"]
    code, said, err = command(capsys, monkeypatch, *argv)
    assert code == 0, err
    assert "1b.png" in said
    rows = list(csv.DictReader(table.open()))
    assert [Path(row["image"]).name for row in rows] == ["0.png"] * 2 + ["1.png"] * 2 + ["2.png"] * 2
    best = timm.create_model(f"local-dir:{out}/best", pretrained=True).eval()
    batch = next(iter(eval_loader(open_source(str(tmp_path / "some" / "2.png")), (32, 32), 3)))
    expected = best(Normalize(config["pretrained_cfg"]["mean"], config["pretrained_cfg"]["std"])(batch.images)).softmax(
        1
    )
    assert float(rows[4]["probability"]) == pytest.approx(float(expected.max()), abs=1e-4)
    assert rows[4]["label"] == config["label_names"][int(expected.argmax())]

    # its encoder can be fine-tuned again, and it can be exported
    assert load_network(str(out))[0].num_classes == 3
    for name in ("x.onnx", "x.pt2"):
        code, said, err = command(capsys, monkeypatch, "export", "--model", out, "--out", tmp_path / name)
        assert code == 0, err
        assert (tmp_path / name).stat().st_size > 1e5
    code, _, err = command(capsys, monkeypatch, "export", "--model", out, "--out", tmp_path / "x.txt")
    assert (code, "x.txt" in err) == (2, True)


HEAVY = "--aa rand-m9-mstd0.5-inc1 --reprob 0.5 --mixup 0.8 --cutmix 1 --drop-path 0.3 --grad-accum-steps 2".split()


HEAVY += "--model-ema-decay 0.9 --save-every 0.75 --precision fp32".split()


@pytest.fixture(scope="module")
def complete(made, tmp_path_factory):
    """A run that was not interrupted."""
    folder = tmp_path_factory.mktemp("complete")
    tune("--out", folder / "run", "--model", made / "vit", "--data", made / "images", *QUICK, *HEAVY)
    return folder / "run"


@pytest.mark.e2e
@pytest.mark.parametrize("step", [0, 2, 5, 6, 15])
def test_run_interrupted_at_any_step_ends_the_same(step, made, complete, tmp_path, monkeypatch, capsys):
    argv = ["--model", made / "vit", "--data", made / "images", *QUICK, *HEAVY]
    broken = tmp_path / "broken"

    def end_step(self, done, before=Run.end_step):
        before(self, done)
        if done == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Run, "end_step", end_step)
        with pytest.raises(SystemExit) as stop:
            finetune.main(list(map(str, ["--out", broken, *argv])))
        assert stop.value.code == 130
    reset()
    assert not (broken / "checkpoints" / "step-00000016").exists()
    tune("--out", broken, "--resume", "auto", *argv)
    assert ("resuming from" in capsys.readouterr().out) is (step >= 3)
    for name in ("model", "ema", "optimizer"):
        a, b = (load_file(f / "checkpoints" / "step-00000016" / f"{name}.safetensors") for f in (complete, broken))
        assert all(torch.equal(a[key], b[key]) for key in a), name
    scores = [
        [line for line in (f / "metrics.jsonl").read_text().splitlines() if "top1" in line] for f in (complete, broken)
    ]
    assert scores[0] == scores[1]


@pytest.mark.e2e
def test_what_to_do_next_is_commands_that_work(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tune("--out", "my run", "--model", made / "vit", "--data", made / "images", *QUICK)
    hints = re.findall(r"mimkit (?:predict|export) .*", capsys.readouterr().out)
    assert [hint.split(" --model ")[1].startswith("'my run/best'") for hint in hints] == [True, True]
    assert command(capsys, monkeypatch, *shlex.split(hints[0])[1:])[0] == 0
    assert len(Path("predictions.csv").read_text().splitlines()) == 1 + 32 + 12


@pytest.mark.distributed
def test_two_processes_learn_and_evaluate_as_one_does(made, tmp_path, capsys):
    argv = ["--model", made / "hivit", "--data", made / "images", *QUICK, "--mixup", "0", "--cutmix", "0"]
    argv += ["--drop-path", "0", "--model-ema-decay", "0.9"]
    tune(*argv, "--out", tmp_path / "1")
    said = capsys.readouterr().out, launched(2, "finetune", *argv, "--out", tmp_path / "2")
    lines = [[json.loads(line) for line in (tmp_path / str(n) / "metrics.jsonl").open()] for n in (1, 2)]
    one, two = ([line["loss"] for line in own if "loss" in line] for own in lines)
    assert one == pytest.approx(two, abs=1e-4)  # Adam makes steps of equal size out of the rounding of tiny gradients
    assert [line for line in said[0].splitlines() if "12 test images" in line] == [
        line for line in said[1].splitlines() if "12 test images" in line
    ]


@pytest.mark.e2e
def test_training_from_scratch_for_comparison(made, tmp_path, capsys):
    tune("--model", made / "hivit", "--data", made / "images", "--out", tmp_path / "run", *QUICK, "--compare-scratch")
    said = capsys.readouterr().out
    assert "random weights" in said
    assert " % from scratch: " in said
    assert (tmp_path / "run" / "scratch" / "last" / "model.safetensors").exists()


@pytest.mark.e2e
def test_fine_tuning_from_a_run_without_a_gain(made, tmp_path, capsys, monkeypatch):
    """It says so at the start, and the command that it prints at the end measures training from scratch."""
    pretraining, out = tmp_path / "mae", tmp_path / "run"
    shutil.copytree(made / "hivit", pretraining)
    (pretraining / "config.yaml").write_text("batch_size: 32")
    lines = [{"step": step, "knn_10": knn, "knn_10_se": 1.07} for step, knn in ((0, 35.5), (666, 36.1))]
    (pretraining / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tune("--model", pretraining, "--data", made / "images", "--out", out, *QUICK)
    said = capsys.readouterr().out
    assert f"WARNING: {pretraining}: No gain yet in 21,312 images: kNN 35.5 % before, 36.1 % after" in said
    launch, doctor = said.split("from scratch:\n")[1].splitlines()
    assert launch.split()[:3] == ["accelerate", "launch", "recipes/finetune.py"]
    tune(*launch.split()[3:])
    said = capsys.readouterr().out
    assert "random weights" in said
    assert "Compare with training" not in said
    assert " points." in command(capsys, monkeypatch, *doctor.split()[1:])[1].splitlines()[-1]


def test_every_network_has_layers():
    net = timm.create_model("poolformer_s12", num_classes=3)  # timm has no group_matcher for it
    groups = layer_groups(net, 0.05, 0.5)
    assert {name for group in groups for name in group["param_names"]} == {name for name, _ in net.named_parameters()}
    assert len({group["lr_scale"] for group in groups}) > 5


@pytest.mark.e2e
def test_any_network_and_input_is_fine_tuned(made, tmp_path):
    for i, argv in enumerate(
        [
            ["--model", "resnet10t", "--aa", "null", "--mixup", "0", "--cutmix", "0"],
            ["--model", made / "vit", "--global-pool", "avg", "--img-size", "64x32"],
            ["--model", "hivit_nano", "--img-size", "32x48", "--model-args.patch_size", "2", "--in-chans", "1"],
            [
                *("--model", "hpvit", "--img-size", "32", "--model-ema-decay", "0.9", "--head-std", "null"),
                *("--model-args", "{source: vit_tiny_patch16_224, source_args: {depth: 2}, depths: 0-1-1-0}"),
            ],
        ]
    ):
        out = tmp_path / str(i)
        tune("--data", made / "images", "--out", out, *QUICK, "--epochs", "2", *argv)
        assert timm.create_model(f"local-dir:{out}/last", pretrained=True).num_classes == 3
        assert not read_weights(out / "last")["head.weight" if i else "fc.weight"].isnan().any()


def test_wrong_model_is_one_sentence(made, tmp_path, capsys, folder):
    data = ["--data", made / "images", *QUICK]
    net = timm.create_model("vit_tiny_patch16_224", **SMALL_VIT, img_size=32, num_classes=3)
    write_model(net, tmp_path / "tuned", **INPUT)
    for argv, message in [
        (["--model", made / "nowhere", *data], "nowhere"),
        (["--model", tmp_path, *data], "holds no config.json"),
        (["--model", "runs/mae_nothing", *data], "runs/mae_nothing does not exist. Pass a folder"),
        (["--model", "hivit_x", *data], "--model hivit_x is unknown"),
        (["--model", made / "vit", "--model-args", "{num_classes: 3}", *data], "num_classes, which follows"),
        (["--model", "dla46_c", "--grad-checkpointing", "--dry-run", *data], "timm does not support it for a DLA"),
        (["--model", "hivit_nano", "--eval-only", "--data", made / "images"], "has 1000 classes, but"),
        (["--model", tmp_path / "tuned", "--eval-only", "--data", folder], "has 3 classes, but"),
        (["--model", "hivit_nano", "--init", made / "vit" / "encoder", *data], "Pass it as --model"),
        (["--model", "hivit_nano", "--init", tmp_path / "no.pth", *data], "no such file"),
        (["--model", made / "vit", "--global-pool", "map", *data], "attn_pool"),
    ]:
        assert message in refused(capsys, finetune, *argv), argv


def test_wrong_option_is_one_sentence(made, tmp_path, capsys):
    model, data = ["--model", made / "vit"], ["--data", made / "images"]
    flat, run = tmp_path / "flat", tmp_path / "run"
    flat.mkdir()
    picture().save(flat / "a.png")
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    for argv, message in [
        ([*model, "--data", flat], "has no labels"),
        ([*model, *data, *QUICK, "--out", run], "already holds a run"),
        ([*model, *data, "--batch-size", "2048"], "more than the 32 images"),
        ([*model, *data, "--batch-size", "9", "--out", tmp_path / "r"], "has 9"),
        (["--model", made / "hivit", *data, *QUICK, "--img-size", "33"], "multiple"),
        ([*model, *data, *QUICK, "--aa", "dance", "--out", tmp_path / "q"], "dance"),
        ([*model, *data, "--in-chans", "0"], "--in-chans 0: expected a whole number of at least 1"),
    ]:
        assert message in refused(capsys, finetune, *argv), argv


def test_published_recipes():
    defaults = asdict(finetune.Options())
    shipped = {name: defaults | yaml.safe_load(file.read_text()) for name, file in presets("finetune").items()}
    words = ("epochs", "warmup_epochs", "batch_size", "blr", "layer_decay", "drop_path", "weight_decay", "betas")
    for name, values in {
        "finetune_vit_b": (100, 5, 1024, 5e-4, 0.65, 0.1),
        "finetune_vit_l": (50, 5, 1024, 1e-3, 0.75, 0.2),
        "finetune_vit_h": (50, 5, 1024, 1e-3, 0.75, 0.3),
        "finetune_hivit_b": (100, 5, 1024, 5e-4, 0.85, 0.2),
        "finetune_hivit_t_supervised": (300, 20, 1024, 2.5e-4, 1.0, 0.05),
        "finetune_hivit_s_supervised": (300, 20, 1024, 2.5e-4, 1.0, 0.3),
        "finetune_hivit_b24_supervised": (300, 20, 1024, 2.5e-4, 1.0, 0.5),
        "finetune_svit_s_supervised": (300, 5, 1024, 2.5e-4, 1.0, 0.1),
        "finetune_svit_b_supervised": (300, 5, 1024, 2.5e-4, 1.0, 0.4),
        "finetune_svit_l_supervised": (300, 5, 1024, 2.5e-4, 1.0, 0.6),
    }.items():
        assert [shipped[name][word] for word in words] == [*values, 0.05, (0.9, 0.999)], name
        mixed = [shipped[name][word] for word in ("aa", "mixup", "cutmix", "reprob", "smoothing", "model_ema_decay")]
        svit = name.startswith("finetune_svit")
        assert mixed == ["rand-m9-mstd0.5-inc1", 0.8, 1.0, 0.25, 0.1, 0.99996 if svit else 0.0]
        assert shipped[name]["aug_repeats"] == (3 if svit else 1)
        assert shipped[name]["clip_grad"] is None
    for size, rate in {"s": 0.1, "b": 0.4, "l": 0.6}.items():
        larger = shipped[f"finetune_svit_{size}_384"]
        words = ("img_size", "epochs", "lr", "weight_decay", "drop_path", "model_ema_decay")
        assert [larger[word] for word in words] == [384, 30, 5e-6, 1e-8, rate, 0.99996]
    probe = linear_probe.Options()
    assert (probe.epochs, probe.warmup_epochs, probe.batch_size, probe.crop_scale) == (90, 10, 16384, (0.08, 1.0))


# SViT and Swin -------------------------------------------------------------------------------------------------------

SMALL = ["--img-size", "32", "--crop-scale", "[0.5, 1.0]"]


PRETRAIN = ["--epochs", "1", "--batch-size", "16", "--workers", "0"]
PRESETS = ["simmim_swin_small", "simmim_svit_small", "mae_svit_small", "mae_hivit_small", "mae_vit_small"]


@pytest.mark.e2e
@pytest.mark.parametrize("preset", PRESETS)
def test_pretrained_network_is_fine_tuned(preset, made, tmp_path, capsys):
    recipe, few = (mae, ["--decoder-dim", "24"]) if preset.startswith("mae") else (simmim, [])
    argv = ["--config", preset, "--data", str(made / "images"), "--out", str(tmp_path / "mim"), *PRETRAIN, *few]
    recipe.main(argv)
    reset()
    assert "kNN after 2 steps" in capsys.readouterr().out
    encoder = timm.create_model(f"local-dir:{tmp_path}/mim/encoder", pretrained=True).state_dict()
    network, origin = load_network(str(tmp_path / "mim"))
    assert "all weights of" in origin
    state = network.state_dict()
    if preset == "mae_hivit_small":  # its classifier has another final norm, and relative bias tables
        assert "; fresh: fc_norm.bias, fc_norm.weight, 4 relative bias tables at 0; dropped: norm.bias" in origin
        state = {name: tensor for name, tensor in state.items() if "fc_norm" not in name and "bias_table" not in name}
    assert all(torch.equal(tensor, encoder[name]) for name, tensor in state.items())
    tune("--model", tmp_path / "mim", "--data", made / "images", "--out", tmp_path / "run", *QUICK, *SMALL)
    assert "top-1" in capsys.readouterr().out


@pytest.mark.e2e
def test_svit_trains_in_train_mode_and_its_average_is_evaluated(made, tmp_path, monkeypatch):
    """The reference's own training at 384 px ran in evaluation mode, and evaluated without the average."""
    forward, seen = SViT.forward, []

    def watched(net, x):
        seen.append((net.training, net.norm.running_mean.clone(), torch.is_grad_enabled()))
        return forward(net, x)

    monkeypatch.setattr(SViT, "forward", watched)
    svit = ["--model", "svit_nano", "--model-args", '{"patch_size": 1}', "--from-scratch", "--drop-path", "0.1"]
    argv = [*svit, "--data", made / "images", "--model-ema-decay", "0.9", "--aug-repeats", "2", *QUICK, *SMALL]
    tune(*argv, "--out", tmp_path / "run")
    trained, evaluated = [s for s in seen if s[2]], [s for s in seen if not s[2]]
    assert len(trained) == 16
    assert all(training for training, _, _ in trained)  # after evaluations too
    assert not any(torch.equal(a[1], b[1]) for a, b in pairwise(trained))  # statistics move
    assert not any(training for training, _, _ in evaluated)
    last = timm.create_model(f"local-dir:{tmp_path}/run/last", pretrained=True)
    raw = load_file(next((tmp_path / "run" / "checkpoints").glob("*16/model.safetensors")))
    assert not torch.equal(last.norm.running_mean, raw["norm.running_mean"])  # last/ holds the average


@pytest.mark.e2e
def test_classifier_keeps_its_head_for_the_same_classes_at_another_size(made, tmp_path, capsys):
    """The published training at 384 px continues from 224 px. With a learning rate near 0, the weights stay."""
    svit = ["--model", "svit_nano", "--model-args", '{"patch_size": 1}', "--from-scratch", "--drop-path", "0.1"]
    tune(*svit, "--data", made / "images", *QUICK, *SMALL, "--out", tmp_path / "first")
    before = load_file(tmp_path / "first" / "best" / "model.safetensors")  # the network of a run
    capsys.readouterr()
    larger = ["--img-size", "64", "--epochs", "1", "--batch-size", "16", "--warmup-epochs", "0", "--lr", "1e-30"]
    larger += ["--model-ema-decay", "0.5", "--layer-decay", "1", "--weight-decay", "1e-8", "--workers", "0"]
    tune("--model", tmp_path / "first", "--data", made / "images", *larger, "--out", tmp_path / "second")
    said = capsys.readouterr().out
    assert "fresh head" not in said
    assert "with averaged weights" in said
    after = load_file(tmp_path / "second" / "last" / "model.safetensors")
    assert torch.equal(after["head.weight"], before["head.weight"])
    assert not torch.equal(after["norm.running_mean"], before["norm.running_mean"])  # it ran in train mode, at 64 px
    nameless = tmp_path / "first" / "best" / "config.json"  # as released classifiers are
    nameless.write_text(json.dumps({k: v for k, v in json.loads(nameless.read_text()).items() if k != "label_names"}))
    tune("--model", nameless.parent, "--data", made / "images", *larger, "--dry-run")
    assert "its own head, whose 3 classes have no names" in capsys.readouterr().out


# Probes and exports --------------------------------------------------------------------------------------------------


@pytest.mark.e2e
@pytest.mark.parametrize("probe", ["linear", "attentive"])
def test_probe_trains_only_itself(probe, made, tmp_path, capsys):
    argv = ["--model", made / "hivit", "--data", made / "images", "--out", tmp_path / "run", "--probe", probe]
    argv += ["--epochs", "40", "--batch-size", "16", "--warmup-epochs", "1", "--workers", "0", "--eval-every", "40"]
    argv += ["--crop-scale", "[0.8,1]", "--blr", "50" if probe == "linear" else ".02"]
    linear_probe.main(list(map(str, argv)))
    said = capsys.readouterr().out
    assert float(said.split("top-1 ")[1].split(" %")[0]) > 60  # dark, gray and bright images
    state = load_file(next((tmp_path / "run" / "checkpoints").iterdir()) / "model.safetensors")
    assert not any(key.startswith(("network", "blocks")) for key in state)
    assert {"head.weight", "head.bias", "norm.running_mean"} <= state.keys()
    assert "norm.weight" not in state  # without affine


@pytest.mark.e2e
def test_cached_probe(made, capsys):
    linear_probe.main(["--model", str(made / "hivit"), "--data", str(made / "images"), "--probe", "cached"])
    assert float(capsys.readouterr().out.split(" %")[0].split()[-1]) > 60
    assert "Choose linear, attentive or cached" in refused(
        capsys, linear_probe, "--probe", "x", "--model", "hivit_nano"
    )


@pytest.mark.parametrize("name", ["hivit_nano", "svit_nano", "hpvit", "vit_tiny_patch16_224", "resnet10t"])
def test_attentive_probe_reads_every_network(name):
    net = timm.create_model(name, **({"source": "vit_tiny_patch16_224"} if name == "hpvit" else {}))
    probe = FrozenProbe(net, 5, attentive=True)
    x = torch.randn(4, 3, 224, 224)
    probe(x).sum().backward()
    assert all(p.grad is not None for n, p in probe.named_parameters() if "pos_embed" not in n)
    assert all(p.grad is None for p in net.parameters())
    before = torch.cat([b.flatten().float() for b in net.buffers()]) if list(net.buffers()) else torch.zeros(1)
    probe.train()(x)
    after = torch.cat([b.flatten().float() for b in net.buffers()]) if list(net.buffers()) else torch.zeros(1)
    assert torch.equal(before, after)  # running statistics of the frozen network too
