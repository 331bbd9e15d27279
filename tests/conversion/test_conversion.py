"""`mimkit convert`: what it writes, what it refuses, and what its checks catch."""

import errno
import json
import pickle
import re
from functools import partial

import huggingface_hub
import pytest
import timm
import torch
from conftest import command, fill
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from timm.data import IMAGENET_DEFAULT_MEAN

from mimkit.conversion import convert as convert_module
from mimkit.conversion import verify
from mimkit.conversion.convert import convert
from mimkit.conversion.family import Remap, families, plain_vits
from mimkit.conversion.source import find_source, read_plain
from mimkit.conversion.verify import difference, in_float64, linear_cka, sample_input
from mimkit.errors import UserError
from mimkit.io.weights import read_weights, write_model
from mimkit.models.hpvit import Pool, plain_vit
from mimkit.models.layers.patch_embed import resize_kernel, resize_matrix, restore_kernel

TINY = {"depth": 4, "embed_dim": 48, "num_heads": 3, "img_size": 64}
NAME = "vit_base_patch16_224"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file of a tiny random ViT in timm's layout, with every tensor at order 1."""
    torch.manual_seed(0)
    net = fill(plain_vit(NAME, **TINY, num_classes=0)).eval()
    path = tmp_path_factory.mktemp("file") / "vit.pth"
    torch.save({"model": net.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def transformers():
    """Import transformers with the classes that the tests use, which takes seconds."""
    import transformers

    assert all(map(transformers.__getattr__, ("ViTConfig", "ViTModel", "TimmWrapperModel")))
    return transformers


def run(capsys, monkeypatch, *argv):
    """Run `mimkit convert`, and return its exit code and its outputs with line breaks replaced by spaces."""
    code, out, err = command(capsys, monkeypatch, "convert", *argv)
    return code, " ".join(out.split()), " ".join(err.split())


def options(file, **more):
    return {"checkpoint": file, "layout": "timm", "source_args": TINY, **more}


def flags(file):
    return ["--from", NAME, "--checkpoint", file, "--layout", "timm", "--source-args", json.dumps(TINY)]


# The command ---------------------------------------------------------------------------------------------------------


def test_convert_and_back(capsys, monkeypatch, file, tmp_path):
    code, out, _ = run(capsys, monkeypatch, *flags(file), "--to", "hpvit", "--out", tmp_path / "out")
    assert code == 0
    assert "the pyramid is the plain ViT: passed" in out
    assert "an independent reader: passed" in out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "model.safetensors",
        "config.json",
        "report.json",
        "report.md",
    }
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["sha256"]) == 64
    assert report["sizes"]["hpvit"][1] > report["sizes"][NAME][1]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [check["result"] for check in config["mimkit"]["checks"]] == ["passed", "not applicable", "passed"]
    code, out, _ = run(capsys, monkeypatch, "--from", tmp_path / "out", "--to", "timm", "--out", tmp_path / "back")
    assert code == 0
    assert "the pyramid that was read is the plain ViT: passed" in out
    before, after = read_weights(file), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    # the encoder of a run has timm's hub layout too, and is converted in the same way
    code, out, _ = run(capsys, monkeypatch, "--from", tmp_path / "back", "--out", tmp_path / "again")
    assert code == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(
        torch.equal(again[key], value) for key, value in load_file(tmp_path / "out" / "model.safetensors").items()
    )


def test_dry_run_and_no_checks(capsys, monkeypatch, file, tmp_path):
    code, out, _ = run(capsys, monkeypatch, *flags(file), "--dry-run")
    assert code == 0
    assert "passed" in out
    assert not [*tmp_path.iterdir()]
    code, out, _ = run(capsys, monkeypatch, *flags(file), "--no-checks", "--out", tmp_path / "out")
    assert (code, "NOT CHECKED" in out) == (0, True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mimkit"]["checks"] == "NOT CHECKED"
    assert "NOT CHECKED" in (tmp_path / "out" / "report.md").read_text()
    assert timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).depths == (0, 0, 4, 0)


def test_options_reach_the_network(capsys, monkeypatch, file, tmp_path):
    more = "--depths 1-1-1-1 --pool conv --pool-init 0.5 --attention local --padding [0,12] --prefix drop --window 3"
    code, out, _ = run(capsys, monkeypatch, *flags(file), "--out", tmp_path / "out", *more.split())
    assert code == 0
    assert "not applicable" in out
    assert "Linear CKA" in out
    net = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True)
    assert (net.depths, net.padding, net.num_prefix_tokens, net.window) == ((1, 1, 1, 1), (0, 12), 0, 3)
    assert (net.pools[0].kind, net.pools[0].share, net.attention) == ("conv", 0.5, "local")


def test_list(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "--list")
    assert code == 0
    for word in (
        "vit_b_mae vit_base_patch16_224.mae",
        "dinov2_s",
        "clip_b16",
        "--layout hf",
        f"{len(plain_vits())} plain",
    ):
        assert word in out


def test_every_alias_is_a_plain_vit_with_weights():
    for layout, family in families().items():
        for alias, name in family.aliases.items():
            assert name in timm.list_models(f"{name.split('.')[0]}.*", pretrained=True), alias
            assert find_source(alias)[:2] == (name, layout)


# Errors --------------------------------------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return (print, ("code ran",))


def corrupt(state, path):
    save_file(state, path.with_suffix(".safetensors"))
    content = path.with_suffix(".safetensors").read_bytes()
    path.with_suffix(".safetensors").write_bytes(content[: len(content) // 2])
    return path.with_suffix(".safetensors")


def corrupt_pickle(state, path):
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:5000])
    return path


def malicious(state, path):
    path.write_bytes(pickle.dumps({"model": Malicious()}))
    return path


def damaged(change):
    def save(state, path):
        torch.save(change(dict(state)), path)
        return path

    save.__name__ = change.__name__
    return save


def with_nan(state):
    state["blocks.1.mlp.fc1.weight"] = torch.full_like(state["blocks.1.mlp.fc1.weight"], torch.nan)
    return state


def missing_block(state):
    return {key: value for key, value in state.items() if not key.startswith("blocks.3.")}


def missing_tensor(state):
    return {key: value for key, value in state.items() if key != "blocks.2.attn.qkv.bias"}


def unexpected_tensor(state):
    return state | {"surprise.weight": torch.zeros(3)}


def wrong_shape(state):
    return state | {"blocks.0.mlp.fc1.bias": torch.zeros(3)}


def odd_positions(state):
    return state | {"pos_embed": torch.zeros(1, 12, 48)}


def mmpretrain_layout(state):
    return {f"layers.0.ln1.weight{i}": torch.zeros(3) for i in range(2)} | {
        "patch_embed.projection.weight": torch.zeros(3),
        "layers.0.ln1.weight": torch.zeros(3),
        "layers.0.ffn.layers.0.0.weight": torch.zeros(3),
    }


def another_network(state):
    return {"weight": torch.zeros(3)}


def list_of_numbers(state):
    return [1, 2]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (corrupt, "cannot be read as weights"),
        (corrupt_pickle, "cannot be read as weights"),
        (malicious, "cannot be read as weights"),
        (damaged(with_nan), "has NaN or infinite values in blocks.1.mlp.fc1.weight"),
        (
            damaged(missing_block),
            "ViT of width 48 with 3 blocks and patches of 16 px, but vit_base_patch16_224 has width 48, 4 blocks",
        ),
        (damaged(missing_tensor), "blocks.2.attn.qkv.bias is missing"),
        (damaged(unexpected_tensor), "surprise.weight is not in vit_base"),
        (damaged(wrong_shape), r"blocks.0.mlp.fc1.bias is \(3,\) instead of \(192,\)"),
        (damaged(odd_positions), "11 positions, which do not form a square grid"),
        (damaged(mmpretrain_layout), "it looks like mmpretrain: pass --layout"),
        (damaged(another_network), "no family matches"),
        (damaged(list_of_numbers), "holds a list"),
    ],
)
def test_damaged_files_are_user_errors(damage, message, capsys, monkeypatch, tmp_path, file):
    bad = damage(read_weights(file), tmp_path / "bad.pth")
    code, out, err = run(capsys, monkeypatch, *flags(bad), "--out", tmp_path / "out")
    assert code == 2
    assert re.search(message, err), err
    assert "code ran" not in out + err
    assert not [p for p in tmp_path.iterdir() if "out" in p.name]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--to", "hpvit"], "pass --from NAME"),
        (["--from", "vit_b_may", "--dry-run"], "vit_b_mae"),
        (["--from", "resnet50", "--dry-run"], "not an alias, a plain ViT in timm, or a folder"),
        (["--from", "vit_base_patch16_224.nobody", "--dry-run"], "no such tag"),
        (["--from", "vit_b_mae"], "Pass --out DIR, or --dry-run"),
        (["--from", "vit_b_mae", "--to", "svit", "--dry-run"], "--to svit is unknown"),
        (["--from", "vit_b_mae", "--checkpoint", "nowhere.pth", "--dry-run"], "nowhere.pth: there is no such file"),
        (["--from", "vit_b_mae", "--layout", "jax", "--checkpoint", "x", "--dry-run"], "--layout jax is unknown"),
        (["--from", "vit_b_mae", "--depths", "1-1", "--checkpoint", "FILE", "--dry-run"], "12 blocks, but|4 blocks"),
        (["--from", "vit_b_mae", "--to", "hivit_b", "--checkpoint", "FILE", "--dry-run"], "cannot become hivit_b"),
        (["--from", "vit_base_patch32_224", "--checkpoint", "FILE", "--dry-run"], r"32 px\. Give --from another name"),
        (["--from", NAME, "--weights", "best", "--checkpoint", "FILE", "--dry-run"], "--weights best is unknown"),
        (
            ["--from", NAME, "--source-args", '{"kernel": 8}', "--checkpoint", "FILE", "--dry-run"],
            "--source-args kernel cannot be set",
        ),
        (
            ["--from", "hivit_b", "--to", "hivit_nano", "--checkpoint", "FILE", "--dry-run"],
            "Pass the same name to",
        ),
        (["--from", NAME, "--to", "timm", "--pool", "dw", "--checkpoint", "FILE", "--dry-run"], "does not take pool"),
    ],
)
def test_wrong_options_are_user_errors(argv, message, capsys, monkeypatch, file):
    argv = [str(file) if word == "FILE" else word for word in argv]
    code, _, err = run(capsys, monkeypatch, *argv)
    assert code == 2
    assert re.search(message, err), err


def test_a_named_target_must_fit(capsys, monkeypatch, file):
    code, _, err = run(capsys, monkeypatch, *flags(file), "--to", "hpvit_s", "--dry-run")
    assert code == 2
    assert "choose hpvit." in err


def test_the_hub_is_unreachable(capsys, monkeypatch):
    code, _, err = run(capsys, monkeypatch, "--from", "vit_b_mae", "--dry-run")
    assert code == 2
    assert "download https://huggingface.co/timm/vit_base_patch16_224.mae/resolve/main/model.safetensors" in err
    assert "--checkpoint FILE" in err


def test_published_weights(monkeypatch, file, tmp_path):
    """Published weights are downloaded from the hub."""
    save_file(read_weights(file), tmp_path / "model.safetensors")
    downloads = []
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda *argv: downloads.append(argv) or str(tmp_path / "model.safetensors"),
    )
    report = convert("vit_b_mae", dry_run=True, source_args=TINY)
    assert downloads == [("timm/vit_base_patch16_224.mae", "model.safetensors")]
    assert (report.layout, report.checks[-1]["result"]) == ("timm", "passed")


def test_a_folder_that_is_not_a_conversion_is_kept(file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not a conversion"):
        convert(NAME, out=tmp_path / "out", **options(file))
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("when", ["weights", "report"])
def test_a_full_disk_leaves_no_files(when, capsys, monkeypatch, file, tmp_path):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "out"))

    if when == "weights":
        monkeypatch.setattr("safetensors.torch.save_file", full)
    else:
        monkeypatch.setattr(convert_module.Report, "save", full)
    code, _, err = run(capsys, monkeypatch, *flags(file), "--out", tmp_path / "out")
    assert code == 2
    assert "the disk is full" in err
    assert not [*tmp_path.iterdir()]


def test_an_interrupt_leaves_no_files(capsys, monkeypatch, file, tmp_path):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "check_pyramid", stop)
    code, _, err = run(capsys, monkeypatch, *flags(file), "--out", tmp_path / "out")
    assert (code, "Interrupted" in err) == (130, True)
    assert not [*tmp_path.iterdir()]


def test_a_trained_pyramid_is_not_converted_back(capsys, monkeypatch, file, tmp_path):
    convert(NAME, out=tmp_path / "out", checks=False, **options(file))
    state = load_file(tmp_path / "out" / "model.safetensors")
    state["pools.1.weight"] += 1e-3
    save_file(state, tmp_path / "out" / "model.safetensors")
    code, _, err = run(capsys, monkeypatch, "--from", tmp_path / "out", "--to", "timm", "--out", tmp_path / "back")
    assert code == 2
    assert "was trained or changed after its conversion" in err


def test_the_encoder_of_a_run(tmp_path):
    """Convert the encoder of a run on small images: its patches have 4 px, though its name says 16."""
    small = {"depth": 4, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 4}
    vit = fill(timm.create_model("vit_tiny_patch16_224", **small, num_classes=0, dynamic_img_size=True)).eval()
    write_model(vit, tmp_path / "encoder", mean=(0.5,) * 3, std=(0.25,) * 3)
    report = convert(str(tmp_path / "encoder"), out=tmp_path / "out")
    assert [check["result"] for check in report.checks] == ["passed", "passed", "passed"]
    assert "vit_tiny_patch16_224" in report.sizes  # without the tag and the license of timm's default weights
    assert "license" not in (tmp_path / "out" / "config.json").read_text()
    pyramid = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True)
    assert (pyramid.grid, pyramid.pretrained_cfg["input_size"]) == ((8, 8), (3, 128, 128))
    convert(str(tmp_path / "out"), "timm", out=tmp_path / "back")
    back = timm.create_model(f"local-dir:{tmp_path}/back", pretrained=True).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert difference(back(x), vit(x)) < 1e-5


def test_the_data_configuration_is_kept(file, tmp_path):
    """A timm folder's mean, std and interpolation are kept, also on the way back."""
    net = timm.create_model(NAME, **TINY, num_classes=0)
    write_model(net, tmp_path / "run", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear")
    convert(str(tmp_path / "run"), out=tmp_path / "out")
    convert(str(tmp_path / "out"), "timm", out=tmp_path / "back")
    for folder in ("out", "back"):
        cfg = timm.create_model(f"local-dir:{tmp_path}/{folder}", pretrained=True).pretrained_cfg
        assert list(cfg["mean"]) == [0.1, 0.2, 0.3]
        assert (list(cfg["std"]), cfg["interpolation"]) == ([0.4, 0.5, 0.6], "bilinear")
    convert(NAME, out=tmp_path / "mae", checkpoint=file, layout="mae", source_args=TINY)
    cfg = json.loads((tmp_path / "mae" / "config.json").read_text())
    assert cfg["pretrained_cfg"]["mean"] == list(IMAGENET_DEFAULT_MEAN)  # of MAE, not of timm's default weights
    assert cfg["model_args"].keys() >= {"source", "source_args", "depths", "pool", "padding", "prefix", "window"}
    other = convert(str(tmp_path / "out"), out=tmp_path / "fine", depths="fine")
    assert {check["name"] for check in other.checks} == {
        "the pyramid that was read is the plain ViT",
        "the pyramid is the plain ViT",
    }


def test_transformers_reads_what_is_written_for_timm(file, tmp_path, transformers):
    """transformers loads timm's hub layout through its TimmWrapperModel."""
    convert(NAME, "timm", out=tmp_path / "out", **options(file))
    wrapped = transformers.TimmWrapperModel.from_pretrained(tmp_path / "out").eval()
    net = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(pixel_values=x).last_hidden_state, net.forward_features(x))


def test_only_what_a_killed_conversion_left_is_removed(file, tmp_path):
    """Folders of other names and of running processes are kept."""
    folders = {".out-backup": True, ".out.mimkit-1-abc": True, f".out.mimkit-{2**22 + 1}-abc": False}
    for name in folders:
        (tmp_path / name).mkdir()
    convert(NAME, out=tmp_path / "out", checks=False, **options(file))
    assert {name: (tmp_path / name).exists() for name in folders} == folders


@pytest.mark.parametrize("place", [".", "link"])
def test_output_directories_that_cannot_be_replaced(place, capsys, monkeypatch, file, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path / "empty")
    out = place if place == "." else tmp_path / "link"
    code, _, err = run(capsys, monkeypatch, *flags(file), "--out", out)
    assert (code, "Choose another" in err) == (2, True)


def test_paths_with_brackets(capsys, monkeypatch, file, tmp_path):
    odd = tmp_path / "vit [b] [" / "x].pth"  # rich takes both for markup
    odd.parent.mkdir()
    odd.write_bytes(file.read_bytes())
    code, out, _ = run(capsys, monkeypatch, *flags(odd), "--no-checks", "--out", tmp_path / "o [y]")
    assert code == 0
    assert "[b] [/x].pth" in out


# Files ---------------------------------------------------------------------------------------------------------------


def test_shards_prefixes_and_several_states(file, tmp_path):
    state = read_weights(file)
    names = sorted(state)
    for kind, save in (("model.safetensors", save_file), ("pytorch_model.bin", torch.save)):
        folder = tmp_path / kind
        folder.mkdir()
        stem, ending = kind.split(".")
        shards = {f"{stem}-{i}.{ending}": names[i::2] for i in range(2)}
        for shard, chosen in shards.items():
            save({name: state[name] for name in chosen}, folder / shard)
        index = {"weight_map": {name: shard for shard, chosen in shards.items() for name in chosen}}
        (folder / f"{kind}.index.json").write_text(json.dumps(index))
        read = read_weights(folder)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[name], state[name]) for name in names)
        assert len(convert_module.sha256(folder)) == 64
    prefixed = {f"module._orig_mod.backbone.{name}": tensor for name, tensor in state.items()}
    noise = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    content = {"student": noise, "teacher": prefixed, "state_dict": noise, "state_dict_ema": noise, "epoch": 1}
    torch.save(content, tmp_path / "parts.pth")
    assert torch.equal(read_weights(tmp_path / "parts.pth", "teacher")["cls_token"], state["cls_token"])
    for which in (None, "ema", "student", "model"):
        assert torch.equal(read_weights(tmp_path / "parts.pth", which)["cls_token"], noise["cls_token"])
    torch.save({"model": state}, tmp_path / "one.pth")
    with pytest.raises(UserError, match="holds no teacher weights"):
        read_weights(tmp_path / "one.pth", "teacher")


def test_remap():
    remap = Remap({"a.weight": torch.zeros(1), "b.weight": torch.ones(1)}, set())
    remap.rename(r"a\.(.*)", r"c.\1")
    assert list(remap.remaining) == ["b.weight"]
    with pytest.raises(UserError, match=r"already has a c\.weight"):
        remap.rename(r"b\.(.*)", r"c.\1")
    halves = Remap({"q.weight": torch.zeros(1)}, set())
    with pytest.raises(UserError, match=r"has no k for qk\.weight"):
        halves.fuse(r"(?P<part>q|k)\.weight", "qk.weight", ("q", "k"))


def test_all_unexplained_tensors_are_named(file, tmp_path, capsys, monkeypatch):
    state = read_weights(file) | {"surprise.weight": torch.zeros(2), "wonder": torch.zeros(1)}
    torch.save(state, tmp_path / "more.pth")
    with pytest.raises(UserError, match=r"2 tensors that mae does not explain: surprise.weight, wonder"):
        read_plain(NAME, tmp_path / "more.pth", "mae", given=TINY)


def test_the_configuration_of_transformers_is_kept(tmp_path, transformers):
    """The epsilon, activation, mean, std and interpolation in a folder of transformers reach the written network."""
    size = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 192}
    config = transformers.ViTConfig(**size, image_size=64, layer_norm_eps=1e-3, hidden_act="gelu_pytorch_tanh")
    transformers.ViTModel(config).save_pretrained(tmp_path / "hf")
    preprocessor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2}
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    convert(NAME, out=tmp_path / "out", checkpoint=tmp_path / "hf", layout="hf", source_args=TINY)
    net = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True)
    assert {m.eps for m in net.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-3}
    assert net.blocks[0].mlp.act.__class__.__name__ == "GELUTanh"
    cfg = net.pretrained_cfg
    assert list(cfg["mean"]) == [0.1, 0.2, 0.3]
    assert (list(cfg["std"]), cfg["interpolation"]) == ([0.4, 0.5, 0.6], "bilinear")


# Checks --------------------------------------------------------------------------------------------------------------


def test_a_wrong_pool_is_caught(monkeypatch, file, tmp_path):
    start = Pool.start
    monkeypatch.setattr(Pool, "start", lambda self: start(self).flip(-1))
    with pytest.raises(UserError, match="The pyramid differs from the plain ViT"):
        convert(NAME, out=tmp_path / "out", **options(file))
    assert not (tmp_path / "out").exists()


def test_a_wrong_kernel_is_caught(monkeypatch, tmp_path):
    net = fill(plain_vit("vit_base_patch14_dinov2", **{**TINY, "img_size": 56}, num_classes=0))
    save_file(net.state_dict(), tmp_path / "vit.safetensors")
    more = {"checkpoint": tmp_path / "vit.safetensors", "layout": "timm", "source_args": {**TINY, "img_size": 56}}
    resize = partial(torch.nn.functional.interpolate, mode="bilinear")
    monkeypatch.setattr(verify, "resize_kernel", lambda kernel, side: resize(kernel, (side, side)))
    with pytest.raises(UserError, match="The resized kernel is wrong"):
        convert("vit_base_patch14_dinov2", out=tmp_path / "out", **more)
    monkeypatch.undo()
    assert convert("vit_base_patch14_dinov2", dry_run=True, **more).checks[1]["error"] < 1e-12


@pytest.mark.parametrize("name", [NAME, "beit_base_patch16_224", "vit_small_patch16_dinov3", "samvit_base_patch16"])
def test_a_large_difference_is_checked_in_float64(name, monkeypatch, tmp_path):
    monkeypatch.setattr(verify, "DOUBT", -1.0)  # every difference is checked again
    save_file(fill(plain_vit(name, **TINY, num_classes=0)).state_dict(), tmp_path / "vit.safetensors")
    report = convert(name, dry_run=True, **options(tmp_path / "vit.safetensors"))
    assert report.checks[-1]["float64"] < 1e-9


def test_a_difference_in_float64_is_an_error(monkeypatch, file):
    monkeypatch.setattr(verify, "DOUBT", -1.0)
    monkeypatch.setattr(verify, "LIMIT64", -1.0)
    with pytest.raises(UserError, match="in float64"):
        convert(NAME, dry_run=True, **options(file))


def test_float64_leaves_the_weights_as_they_are():
    net = fill(timm.create_model("hpvit", source=NAME, source_args=TINY)).eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with torch.no_grad(), in_float64(net):
        output = net(torch.randn(1, 3, 64, 64, dtype=torch.float64))
    assert output.dtype == torch.float64
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_linear_cka():
    a = torch.randn(500, 8, dtype=torch.float64)
    wide = [torch.randn(100, 384, dtype=torch.float64) for _ in range(2)]  # fewer tokens than channels
    assert abs(linear_cka(*wide)) < 0.1
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    assert linear_cka(a, 3 * a @ rotation + 5) == pytest.approx(1)
    assert linear_cka(a, torch.randn(500, 8, dtype=torch.float64)) < 0.1


@given(st.integers(4, 16), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_kernel_round_trip(side, seed):
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(5, 3, side, side, generator=generator)
    resized = resize_kernel(kernel, 16)
    patch = torch.randn(3, side, side, generator=generator, dtype=torch.float64)
    larger = (resize_matrix(side, 16) @ patch.flatten(1).T).T
    expected = (kernel.double().flatten(1) @ patch.flatten())[:, None]
    torch.testing.assert_close(resized.double().flatten(1) @ larger.reshape(-1, 1), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(restore_kernel(resized, side), kernel, rtol=1e-4, atol=1e-5)


def test_kernels_are_resized_as_by_timm():
    kernel = torch.randn(5, 3, 14, 14)
    theirs = timm.layers.resample_patch_embed(kernel, [16, 16])
    assert difference(resize_kernel(kernel, 16), theirs) < 1e-4
    with pytest.raises(UserError, match="was shrunk"):
        restore_kernel(torch.randn(5, 3, 16, 16), 32)


def test_the_difference_of_nan_is_infinite():
    assert difference(torch.tensor([1.0, torch.nan]), torch.ones(2)) == float("inf")
    assert difference(torch.zeros(2), torch.zeros(2)) == 0


def test_a_kernel_of_32_px_is_shrunk(tmp_path):
    net = fill(plain_vit("vit_base_patch32_224", **{**TINY, "img_size": 128}, num_classes=0))
    save_file(net.state_dict(), tmp_path / "vit.safetensors")
    more = {"checkpoint": tmp_path / "vit.safetensors", "layout": "timm", "source_args": {**TINY, "img_size": 128}}
    report = convert("vit_base_patch32_224", out=tmp_path / "out", **more)
    assert report.checks[1]["result"] == "shrunk"
    assert report.checks[1]["error"] > 1e-3
    with pytest.raises(UserError, match="32 px was shrunk"):
        convert(str(tmp_path / "out"), "timm", dry_run=True)


def test_sample_input():
    """The checks' images cover any input size, are normalized, and have any number of channels."""
    x = sample_input((3, 20, 31), {"mean": (0.5, 0.25, 0.0), "std": (0.5, 0.25, 1.0)}, count=3)
    assert x.shape == (3, 3, 20, 31)
    red, green, blue = x.unbind(1)
    torch.testing.assert_close(0.5 * red + 0.5, blue)
    torch.testing.assert_close(0.25 * green + 0.25, blue)
    assert 0 <= blue.min() < 0.1 < 0.9 < blue.max() <= 1
    assert not torch.equal(x[0], x[1])
    wide = sample_input((4, 64, 64), {"mean": (0.5,) * 3, "std": (0.25,) * 3})
    assert wide.shape == (2, 4, 64, 64)
    assert (wide.min(), wide.max()) == (-1, 1)


def test_four_channels(tmp_path):
    """The encoder of a run on images with four channels is checked too."""
    net = fill(timm.create_model(NAME, **TINY, num_classes=0, in_chans=4))
    write_model(net, tmp_path / "encoder", input_size=(4, 64, 64), mean=(0.5,) * 4, std=(0.25,) * 4)
    report = convert(str(tmp_path / "encoder"), dry_run=True)
    assert [check["result"] for check in report.checks] == ["passed", "not applicable", "passed"]
