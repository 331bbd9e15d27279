"""Fine-tuning: what it starts from, what it learns at, what it leaves."""

import csv
import json
import shutil
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from conftest import command, encoded, fill, launched, picture
from mimkit.recipes import finetune, linear_probe, mae_hivit, mae_svit, mae_vit, simmim_svit, simmim_swin
from PIL import Image
from safetensors.torch import load_file, save_file
from svit_reference import released, shaken
from torchvision.transforms.v2.functional import pil_to_tensor

from mimkit.config import presets
from mimkit.data.loader import eval_loader
from mimkit.data.sample import SampleLoader
from mimkit.data.sources import open_source
from mimkit.data.transforms import Normalize, finetune_transform
from mimkit.errors import UserError
from mimkit.evaluation.probes import FrozenProbe
from mimkit.io import onnx
from mimkit.io.onnx import export_model
from mimkit.io.weights import read_weights, write_model
from mimkit.models import SViT
from mimkit.models.pretrained import load_network, new_head
from mimkit.tasks.classification import mixing, score
from mimkit.training.optim import layer_groups
from mimkit.training.run import Run

MIM = ["--epochs", "1", "--batch-size", "16", "--decoder-dim", "24", "--workers", "0"]
QUICK = ["--epochs", "4", "--batch-size", "8", "--warmup-epochs", "1", "--lr", "1e-3", "--workers", "0"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Dark, middling and bright images: 32 to train on, 12 to judge by; and what pre-training leaves of a HiViT."""
    folder = tmp_path_factory.mktemp("made")
    for part, count in (("train", 32), ("test", 12)):
        for i in range(count):
            place = folder / "images" / part / ("dark", "gray", "light")[i % 3]
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i + 1000 * count).integers(0, 80, (20, 24, 3)) + 80 * (i % 3)
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")
    mae_hivit.main(["--data", str(folder / "images"), "--out", str(folder / "hivit"), *MIM])
    anew()
    mae_vit.main(["--data", str(folder / "images"), "--out", str(folder / "vit"), *MIM])
    anew()
    fill_folder(folder / "hivit" / "encoder")
    fill_folder(folder / "vit" / "encoder")
    return folder


def anew():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def fill_folder(folder):
    """Weights at order 1: those after two steps would hide what is lost."""
    net = fill(timm.create_model(f"local-dir:{folder}", pretrained=True))
    write_model(net, folder, **{k: net.pretrained_cfg[k] for k in ("input_size", "mean", "std")})


def tune(*argv):
    finetune.main(list(map(str, argv)))
    anew()


def refused(capsys, recipe, *argv):
    with pytest.raises(SystemExit) as stop:
        recipe.main(list(map(str, argv)))
    anew()
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in err
    return err


# What each layer learns at -------------------------------------------------------------------------------------------


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
def test_layer_decay_reaches_every_block(name, layers, places):
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


def test_a_dry_run_prints_the_table(made, capsys, tmp_path):
    tune("--model", made / "hivit", "--data", made / "images", "--dry-run", "--out", tmp_path / "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if "blocks.2." in line]
    assert any("merge" in line or "reduction" in line or "blocks.2.norm" in line for line in lines)
    shutil.copytree(made / "images", tmp_path / "images")
    bad = min(f for f in (tmp_path / "images" / "test").rglob("*") if f.is_file())
    bad.write_text("none")
    with pytest.raises(SystemExit):
        tune("--model", made / "hivit", "--data", tmp_path / "images", "--dry-run", "--out", tmp_path / "run")
    assert f"{bad} cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# What it starts from -------------------------------------------------------------------------------------------------


def test_a_hivit_of_pretraining_becomes_its_supervised_form_exactly(made):
    own = timm.create_model(f"local-dir:{made}/hivit/encoder", pretrained=True).eval().double()
    net, words = load_network(str(made / "hivit"))
    x = torch.randn(2, 3, 32, 32)
    tokens, expected = net.eval().double().forward_features(x.double()), own.forward_features(x.double())
    assert torch.allclose(tokens, expected, rtol=0, atol=1e-12)  # the bias tables start at 0
    net.float()
    assert {n for n, _ in net.named_parameters() if "bias_table" in n}
    assert "4 relative bias tables at 0" in words
    assert "left out: norm.bias, norm.weight" in words
    new_head(net, 7, 2e-5)
    assert net(x).shape == (2, 7)
    assert 1e-5 < net.head.weight.std() < 3e-5
    assert not net.head.bias.any()


@pytest.mark.parametrize("pool", [None, "avg"])
def test_a_vit_of_pretraining_keeps_its_blocks(made, pool):
    own = timm.create_model(f"local-dir:{made}/vit/encoder", pretrained=True).eval()
    net, words = load_network(str(made / "vit"), global_pool=pool)
    x = torch.randn(2, 3, 32, 32)
    tokens = own.forward_features(x)
    if pool:
        assert "fresh: fc_norm.bias, fc_norm.weight; left out: norm.bias, norm.weight" in words
        net.norm = own.norm
    assert torch.equal(net.eval().forward_features(x), tokens)
    assert net.global_pool == (pool or "token")


@pytest.mark.parametrize(
    "name", ["hivit_nano", "svit_nano", "vit_tiny_patch16_224", "hpvit", "resnet10t", "swin_tiny_patch4_window7_224"]
)
def test_any_model_starts_from_its_own_folder_with_other_classes(name, tmp_path):
    options = {"source": "vit_tiny_patch16_224", "source_args": {"depth": 4}} if name == "hpvit" else {}
    net = fill(timm.create_model(name, num_classes=5, **options)).eval()
    about = {"input_size": (3, 224, 224), "mean": [0.5] * 3, "std": [0.5] * 3}
    write_model(net, tmp_path / "model", **about)
    found, _ = load_network(str(tmp_path / "model"))
    for key, tensor in net.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor), key
    new_head(found, 3, None)
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(found.eval().forward_features(x), net.forward_features(x))
    assert found(x).shape == (1, 3)
    fresh, words = load_network(str(tmp_path / "model"), scratch=True)
    assert "at random" in words
    assert any(not torch.equal(fresh.state_dict()[key], tensor) for key, tensor in net.state_dict().items())


@pytest.mark.parametrize("kind", ["hivit", "vit"])
@pytest.mark.parametrize("break_it", ["missing", "unexpected", "misshapen", "stem"])
def test_a_folder_that_does_not_load_completely_is_refused_by_name(kind, break_it, made, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(made / kind / "encoder", folder)
    state = load_file(folder / "model.safetensors")
    key = "blocks.2.mlp.fc1.weight"
    if break_it == "missing":
        del state[key]
    elif break_it == "stem":
        key = "patch_embed.proj.weight"
        del state[key]
    elif break_it == "unexpected":
        key = "blocks.2.mlp.fc9.weight"
        state[key] = torch.zeros(3)
    else:
        state[key] = state[key][:-1].clone()
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=key):
        load_network(str(folder))
    if break_it in ("missing", "unexpected"):  # timm itself says nothing
        timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=9)


def test_strictness_cannot_be_switched_off(made, tmp_path):
    """timm lets go of it for other classes, and for a stem that it cannot adapt; a file goes before a folder."""
    folder = tmp_path / "broken"
    shutil.copytree(made / "vit" / "encoder", folder)
    state = load_file(folder / "model.safetensors")
    whole = {key: tensor * 2 for key, tensor in state.items()}
    save_file(whole, tmp_path / "other.safetensors")
    found, words = load_network(str(made / "vit"), str(tmp_path / "other.safetensors"))
    assert "other.safetensors" in words
    assert torch.equal(found.state_dict()["cls_token"], whole["cls_token"])
    del state["blocks.2.mlp.fc1.weight"]
    save_file(state, folder / "model.safetensors")
    save_file(state, tmp_path / "less.safetensors")
    for given in ({}, {"num_classes": 7}, {"in_chans": 1}):
        with pytest.raises(UserError, match=r"blocks\.2\.mlp\.fc1\.weight"):
            load_network(str(folder), **given)
    with pytest.raises(UserError, match=r"blocks\.2\.mlp\.fc1\.weight"):
        load_network(str(made / "vit"), str(tmp_path / "less.safetensors"))
    gray, _ = load_network(str(made / "vit"), in_chans=1)
    rgb = load_file(made / "vit" / "encoder" / "model.safetensors")["patch_embed.proj.weight"]
    assert torch.allclose(gray.patch_embed.proj.weight, rgb.sum(1, keepdim=True), atol=1e-5)


@pytest.mark.parametrize(
    "given", [{"patch_size": 2, "img_size": 32}, {"in_chans": 1, "img_size": 64}, {"img_size": (32, 64)}], ids=str
)
def test_a_hivit_file_of_any_input(given, tmp_path):
    net = fill(timm.create_model("hivit_nano", num_classes=0, **given))
    save_file(net.state_dict(), tmp_path / "file.safetensors")
    say = given if isinstance(given["img_size"], tuple) else {}
    found, _ = load_network("hivit_nano", str(tmp_path / "file.safetensors"), **say)
    assert all(torch.equal(found.state_dict()[key], tensor) for key, tensor in net.state_dict().items())
    assert found.grid == net.grid


@pytest.mark.parametrize("kind", ["mae", "mae with decoder", "fine-tuned", "hivit", "hivit fine-tuned"])
def test_a_file_loads_completely_or_is_refused_by_name(kind, tmp_path):
    if "hivit" in kind:
        name = "hivit_nano"
        options = {"num_classes": 4} if "tuned" in kind else {"num_classes": 0, "unit_form": True, "multi_scale": True}
    else:
        name = "vit_tiny_patch16_224"
        options = {"num_classes": 4, "global_pool": "avg"} if kind == "fine-tuned" else {"num_classes": 0}
    net = fill(timm.create_model(name, **options)).eval()
    state = net.state_dict()
    if kind == "mae with decoder":
        state |= {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 192)}
    torch.save({"model": state}, tmp_path / "file.pth")
    found, _ = load_network(name, str(tmp_path / "file.pth"), img_size=(64, 64))
    assert torch.equal(found.blocks[2].mlp.fc1.weight, net.blocks[2].mlp.fc1.weight)
    x = torch.randn(1, 3, 224, 224, dtype=torch.double)
    whole, _ = load_network(name, str(tmp_path / "file.pth"))
    tokens, expected = whole.eval().double().forward_features(x), net.double().forward_features(x)
    assert torch.allclose(tokens, expected, rtol=0, atol=1e-12)
    for key in ("blocks.2.mlp.fc1.weight", "patch_embed.proj.weight"):
        torch.save({"model": {k: v for k, v in state.items() if k != key}}, tmp_path / "less.pth")
        with pytest.raises(UserError, match=key):
            load_network(name, str(tmp_path / "less.pth"))
    torch.save({"model": {**state, "blocks.2.more": torch.zeros(2)}}, tmp_path / "more.pth")
    with pytest.raises(UserError, match=r"blocks\.2\.more"):
        load_network(name, str(tmp_path / "more.pth"))


# Augmentation --------------------------------------------------------------------------------------------------------


def test_augmentation_is_a_function_of_seed_epoch_and_image():
    transform = finetune_transform((24, 32), (0.3, 1.0), "rand-m9-mstd0.5-inc1", 1.0, Normalize([0.5] * 3, [0.25] * 3))
    row = {"image": {"bytes": None, "path": None}, "label": 1}
    viewer = SampleLoader(transform, 3, 0, 5, ("image", "label"), pixels=True)
    row["image"]["bytes"] = encoded(picture())
    views = {(e, i): viewer(row, e, i).image for e in (0, 1) for i in (0, 1)}
    np.random.seed(99)
    torch.manual_seed(99)
    assert all(torch.equal(viewer(row, e, i).image, view) for (e, i), view in views.items())
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


def test_mixing():
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 2])
    same, targets = mixing(3, 4, 0, 0, 0.3)(images, labels)
    assert same is images
    assert torch.allclose(targets[0], torch.tensor([0.8, 0.1, 0.1]))
    np.random.seed(0)
    mixed, targets = mixing(3, 4, 0.8, 1.0, 0.0)(images.clone(), labels)
    assert not torch.equal(mixed, images)
    assert torch.allclose(targets.sum(1), torch.ones(4))
    assert 0 < targets[0, 0] < 1
    with pytest.raises(UserError, match="has 5"):
        mixing(3, 5, 0.8, 0, 0)


# How it is judged ----------------------------------------------------------------------------------------------------


def test_scores_are_their_definition():
    logits, labels = torch.randn(200, 7), torch.randint(7, (200,))
    found = score(logits, labels)
    assert found.top1 == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    order = logits.argsort(1, descending=True)[:, :5]
    assert found.top5 == pytest.approx(
        100 * np.mean([int(y) in row for y, row in zip(labels, order.tolist(), strict=True)])
    )
    assert found.confusion[2, 3] == int(((labels == 2) & (logits.argmax(1) == 3)).sum())
    assert found.confusion.sum() == 200
    assert score(torch.eye(3), torch.arange(3)).top5 == 100


def test_the_middle_of_an_image_is_judged(tmp_path):
    picture(size=(40, 40)).save(tmp_path / "a.png")
    source = open_source(str(tmp_path))
    whole, middle = (next(iter(eval_loader(source, (20, 20), 3, crop_pct=pct))).images for pct in (1.0, 0.5))
    pixels = torch.from_numpy(np.asarray(picture(size=(40, 40)))).permute(2, 0, 1)
    assert torch.equal(middle[0], pixels[:, 10:30, 10:30])
    assert not torch.equal(whole, middle)


# Runs ----------------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(made, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    heavy = ["--model-ema-decay", "0.9", "--drop-path", "0.1", "--clip-grad", "1", "--grad-checkpointing"]
    tune("--model", made / "hivit", "--data", made / "images", "--out", out, *QUICK, *heavy, "--save-every", "1")
    said = capsys.readouterr().out
    assert "fresh head of 3 classes (head)" in said
    assert "of 12 test images" in said
    names = {"config.yaml", "metrics.jsonl", "curves.png", "confusion.png", "checkpoints", "best", "last"}
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

    # judging it alone gives the last figure, and predict the labels behind it
    final = [line["top1"] for line in lines if "top1" in line][-1]
    tune("--model", out / "last", "--data", made / "images", "--eval-only")
    assert f"top-1 {final:.2f} % of 12 test images" in capsys.readouterr().out
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


@pytest.mark.parametrize("step", [0, 2, 5, 6, 15])
def test_a_run_interrupted_at_any_step_ends_the_same(step, made, tmp_path, monkeypatch, capsys):
    argv = ["--model", made / "hivit", "--data", made / "images", "--model-ema-decay", "0.9", *QUICK, *HEAVY]
    argv += ["--save-every", "0.75", "--precision", "fp32"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    tune("--out", whole, *argv)

    def end_step(self, done, before=Run.end_step):
        before(self, done)
        if done == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Run, "end_step", end_step)
        with pytest.raises(SystemExit) as stop:
            finetune.main(list(map(str, ["--out", broken, *argv])))
        assert stop.value.code == 130
    anew()
    assert not (broken / "checkpoints" / "step-00000016").exists()
    tune("--out", broken, "--resume", "auto", *argv)
    assert ("going on from" in capsys.readouterr().out) is (step >= 3)
    for name in ("model", "ema", "optimizer"):
        a, b = (load_file(f / "checkpoints" / "step-00000016" / f"{name}.safetensors") for f in (whole, broken))
        assert all(torch.equal(a[key], b[key]) for key in a), name
    scores = [
        [line for line in (f / "metrics.jsonl").read_text().splitlines() if "top1" in line] for f in (whole, broken)
    ]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_any_number_of_processes_learns_and_judges_the_same(made, tmp_path, capsys):
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


def test_from_scratch_beside(made, tmp_path, capsys):
    tune("--model", made / "hivit", "--data", made / "images", "--out", tmp_path / "run", *QUICK, "--compare-scratch")
    said = capsys.readouterr().out
    assert "weights at random" in said
    assert " % from scratch: " in said
    assert (tmp_path / "run" / "scratch" / "last" / "model.safetensors").exists()


def test_every_network_has_layers():
    net = timm.create_model("poolformer_s12", num_classes=3)  # timm has no group_matcher for it
    groups = layer_groups(net, 0.05, 0.5)
    assert {name for group in groups for name in group["param_names"]} == {name for name, _ in net.named_parameters()}
    assert len({group["lr_scale"] for group in groups}) > 5


@pytest.mark.slow
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


def test_what_does_not_fit_is_one_sentence(made, tmp_path, capsys, folder):
    data = ["--data", made / "images", *QUICK]
    flat = tmp_path / "flat"
    flat.mkdir()
    picture().save(flat / "a.png")
    tune(*data, "--out", tmp_path / "run", "--model", made / "hivit")
    for argv, message in [
        (["--model", made / "nowhere", *data], "nowhere"),
        (["--model", tmp_path, *data], "holds no config.json"),
        (["--model", "runs/mae_nothing", *data], "accelerate launch recipes/mae_hivit.py"),
        (["--model", "hivit_x", *data], "--model hivit_x is not known"),
        (["--model", made / "hivit", "--model-args", "{num_classes: 3}", *data], "num_classes, which follows"),
        (["--model", "vgg11", "--grad-checkpointing", "--dry-run", *data], "timm has none for a VGG"),
        (["--model", "hivit_nano", "--data", flat], "has no labels"),
        (["--model", "hivit_nano", "--out", tmp_path / "run", *data], "holds a run already"),
        (["--model", "hivit_nano", "--eval-only", "--data", made / "images"], "knows 1000 classes, and"),
        (["--model", tmp_path / "run", "--eval-only", "--data", folder], "knows 3 classes, and"),
        (
            ["--model", "hivit_nano", "--init", made / "vit" / "encoder", "--data", made / "images"],
            "pass it as --model",
        ),
        (["--model", "hivit_nano", "--init", tmp_path / "no.pth", "--data", made / "images"], "no such file"),
        (["--model", made / "hivit", "--data", made / "images", "--batch-size", "2048"], "more than the 32 images"),
        (["--model", made / "hivit", "--data", made / "images", "--batch-size", "9", "--out", tmp_path / "r"], "has 9"),
        (["--model", made / "hivit", "--data", made / "images", "--img-size", "33", *QUICK], "multiple"),
        (
            ["--model", made / "hivit", "--data", made / "images", "--aa", "dance", "--out", tmp_path / "q", *QUICK],
            "dance",
        ),
        (["--model", made / "hivit", "--data", made / "images", "--in-chans", "0"], "in_chans"),
        (["--model", made / "vit", "--global-pool", "map", *data], "attn_pool"),
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


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [simmim_swin, simmim_svit, mae_svit])
def test_what_pretraining_leaves_fine_tunes(recipe, made, tmp_path, capsys):
    mim = [word for word in MIM if recipe is mae_svit or word not in ("--decoder-dim", "24")]
    recipe.main(["--data", str(made / "images"), "--out", str(tmp_path / "mim"), *mim])
    anew()
    assert "kNN after 2 steps" in capsys.readouterr().out
    encoder = timm.create_model(f"local-dir:{tmp_path}/mim/encoder", pretrained=True).state_dict()
    network, words = load_network(str(tmp_path / "mim"))
    assert "all weights of" in words
    assert all(torch.equal(tensor, encoder[name]) for name, tensor in network.state_dict().items())
    tune("--model", tmp_path / "mim", "--data", made / "images", "--out", tmp_path / "run", *QUICK, *SMALL)
    assert "top-1" in capsys.readouterr().out


def test_an_svit_trains_in_train_mode_and_its_average_is_judged(made, tmp_path, monkeypatch):
    """The reference's own 384 px ran in evaluation mode, and judged without the average (facts)."""
    forward, seen = SViT.forward, []

    def watched(net, x):
        seen.append((net.training, net.norm.running_mean.clone(), torch.is_grad_enabled()))
        return forward(net, x)

    monkeypatch.setattr(SViT, "forward", watched)
    svit = ["--model", "svit_nano", "--model-args", '{"patch_size": 1}', "--from-scratch", "--drop-path", "0.1"]
    argv = [*svit, "--data", made / "images", "--model-ema-decay", "0.9", "--aug-repeats", "2", *QUICK, *SMALL]
    tune(*argv, "--out", tmp_path / "run")
    trained, judged = [s for s in seen if s[2]], [s for s in seen if not s[2]]
    assert len(trained) == 16
    assert all(training for training, _, _ in trained)  # after evaluations too
    assert not any(torch.equal(a[1], b[1]) for a, b in pairwise(trained))  # statistics move
    assert not any(training for training, _, _ in judged)
    last = timm.create_model(f"local-dir:{tmp_path}/run/last", pretrained=True)
    raw = load_file(next((tmp_path / "run" / "checkpoints").glob("*16/model.safetensors")))
    assert not torch.equal(last.norm.running_mean, raw["norm.running_mean"])  # what is kept is the average


def test_a_classifier_keeps_its_head_for_the_same_classes_at_another_size(made, tmp_path, capsys):
    """As the published 384 px goes on from 224: without learning, it is what it was."""
    svit = ["--model", "svit_nano", "--model-args", '{"patch_size": 1}', "--from-scratch", "--drop-path", "0.1"]
    tune(*svit, "--data", made / "images", *QUICK, *SMALL, "--out", tmp_path / "first")
    before = load_file(tmp_path / "first" / "best" / "model.safetensors")  # which is what a run stands for
    capsys.readouterr()
    larger = ["--img-size", "64", "--epochs", "1", "--batch-size", "16", "--warmup-epochs", "0", "--lr", "1e-30"]
    larger += ["--model-ema-decay", "0.5", "--layer-decay", "1", "--weight-decay", "1e-8", "--workers", "0"]
    tune("--model", tmp_path / "first", "--data", made / "images", *larger, "--out", tmp_path / "second")
    said = capsys.readouterr().out
    assert "fresh head" not in said
    assert "by their average" in said
    after = load_file(tmp_path / "second" / "last" / "model.safetensors")
    assert torch.equal(after["head.weight"], before["head.weight"])
    assert not torch.equal(after["norm.running_mean"], before["norm.running_mean"])  # it ran in train mode, at 64 px
    nameless = tmp_path / "first" / "best" / "config.json"  # as released classifiers are
    nameless.write_text(json.dumps({k: v for k, v in json.loads(nameless.read_text()).items() if k != "label_names"}))
    tune("--model", nameless.parent, "--data", made / "images", *larger, "--dry-run")
    assert "its own head, whose 3 classes have no names" in capsys.readouterr().out


def test_an_svit_starts_from_files(tmp_path):
    net = shaken(timm.create_model("svit_s", depths=(1, 1, 1, 1), num_classes=3, in_chans=1))
    torch.save({"model": released(net)}, tmp_path / "released.pth")
    save_file(net.state_dict(), tmp_path / "own.safetensors")
    found, _ = load_network("svit_s", str(tmp_path / "released.pth"), img_size=(384, 384), in_chans=1)
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in found.state_dict().items())
    found, _ = load_network("svit_s", str(tmp_path / "own.safetensors"), in_chans=1, depths=(1, 1, 1, 1))
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in found.state_dict().items())


# Probes and exports --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", ["linear", "attentive"])
def test_a_probe_trains_only_itself(probe, made, tmp_path, capsys):
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


def test_a_cached_probe_is_the_commands(made, capsys):
    linear_probe.main(["--model", str(made / "hivit"), "--data", str(made / "images"), "--probe", "cached"])
    assert float(capsys.readouterr().out.split(" %")[0].split()[-1]) > 60
    assert "choose linear, attentive or cached" in refused(
        capsys, linear_probe, "--probe", "x", "--model", "hivit_nano"
    )


@pytest.mark.parametrize("name", ["hivit_nano", "svit_nano", "hpvit", "vit_tiny_patch16_224", "resnet10t"])
def test_an_attentive_probe_reads_every_network(name):
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", [".onnx", ".pt2"])
@pytest.mark.parametrize("name", ["hivit_nano", "svit_nano", "hpvit", "vit_tiny_patch16_224"])
def test_an_export_computes_the_same(name, kind, tmp_path):
    pyramid = {"source": "vit_tiny_patch16_224", "source_args": {"depth": 2, "img_size": 64}, "depths": "0-1-1-0"}
    options = {"hpvit": pyramid, "svit_nano": {"depths": (1, 1, 1, 1)}}.get(name, {"img_size": 64})
    net = fill(timm.create_model(name, num_classes=3, **options))
    net.pretrained_cfg["input_size"] = (3, 64, 64)
    assert export_model(net, tmp_path / f"x{kind}", {"label_names": ["a", "b", "c"]}) < 1e-4
    if kind == ".onnx":
        import onnx

        entries = {entry.key: entry.value for entry in onnx.load(tmp_path / "x.onnx").metadata_props}
        assert json.loads(entries["mimkit"]) == {"label_names": ["a", "b", "c"]}


def test_an_export_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    net = fill(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=3))
    net.pretrained_cfg["input_size"] = (3, 32, 32)
    read = onnx._read_program
    monkeypatch.setattr(onnx, "_read_program", lambda file, x: read(file, x) * 1.01)
    with pytest.raises(UserError, match="something else"):
        export_model(net, tmp_path / "x.pt2", {})
    assert not list(tmp_path.iterdir())
