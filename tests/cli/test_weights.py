"""Reading and writing weight files."""

import argparse
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from mimkit.errors import UserError
from mimkit.files import replacing, replacing_file
from mimkit.io.weights import load_strictly, on_meta, read_weights, strip
from mimkit.methods.checkpoint import read_decoder, write_decoder
from mimkit.methods.decoder import Decoder


class Trap:
    """An object whose pickle creates the file `trapped`."""

    def __reduce__(self):
        return (open, ("trapped", "w"))


def test_all_file_formats_give_the_same_tensors(tmp_path):
    state = {"a.weight": torch.randn(2, 3), "b": torch.arange(3.0)}
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "flat.pth")
    torch.save({"model": state}, tmp_path / "wrapped.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "parallel.bin")
    for path in (tmp_path, *(tmp_path / name for name in ("flat.pth", "wrapped.pt", "parallel.bin"))):
        loaded = read_weights(path)
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[k], state[k]) for k in state)


# Pickles of training scripts -----------------------------------------------------------------------------------------


class Config:
    """A class of a training script, whose options are saved with the weights."""


@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])  # its name in numpy 1
@pytest.mark.parametrize("zipped", [True, False])
def test_numpy_scalars_and_namespaces_beside_the_weights_are_read(zipped, module, tmp_path):
    scalars = [np.float64(0.5), np.float32(0.5), np.float16(1), np.int64(3), np.uint8(3), np.bool_(True)]
    options = argparse.Namespace(lr=np.float64(1e-3), inner=argparse.Namespace(seed=np.int64(0)))
    content = {"model": {"a": torch.ones(2)}, "best": scalars, "args": options}
    file = tmp_path / "a.pth"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    if not zipped:
        assert b"numpy._core.multiarray" in file.read_bytes()
        file.write_bytes(file.read_bytes().replace(b"numpy._core.multiarray", module))
    assert torch.equal(read_weights(file)["a"], torch.ones(2))


@pytest.mark.parametrize(
    ("beside", "name"),
    [
        (Path("x"), "pathlib.PosixPath"),
        (Config(), f"{__name__}.Config"),
        (argparse.Namespace(out=Path("x")), "pathlib.PosixPath"),
        (np.zeros(3), "numpy._core.multiarray._reconstruct"),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (print, "print"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_class_beside_the_weights_is_named(zipped, beside, name, tmp_path):
    file = tmp_path / "a.pth"
    torch.save({"model": {"a": torch.ones(2)}, "beside": beside}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError) as caught:
        read_weights(file)
    assert str(caught.value) == (
        f"{file} cannot be read as weights: it also holds a {name}, which could run code. In the program that wrote "
        "it, save the weights alone: torch.save(model.state_dict(), FILE)."
    )


def test_a_whole_pickled_network_is_named(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"it also holds a torch\.nn\.modules\.linear\.Linear, .*state_dict\(\), FILE"):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize("prefix", ["model.", "net.", "module.model.", "model._orig_mod.", "_orig_mod.net.backbone."])
def test_prefixes_of_lightning_are_removed_where_they_start_all_names(prefix, tmp_path):
    state = {"blocks.0.weight": torch.ones(2), "head.bias": torch.zeros(1)}
    content = {"state_dict": {f"{prefix}{key}": tensor for key, tensor in state.items()}, "epoch": 3}
    torch.save(content | {"hyper_parameters": {"lr": 1e-3}, "callbacks": {}}, tmp_path / "last.ckpt")
    assert read_weights(tmp_path / "last.ckpt").keys() == state.keys()
    assert strip(state | {"model.a": torch.ones(1)}).keys() == {*state, "model.a"}
    assert strip({"model.a": torch.ones(1), "net.a": torch.ones(1)}).keys() == {"model.a", "net.a"}


# Shards and damaged files --------------------------------------------------------------------------------------------


def test_shards_are_joined(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_weights(tmp_path).keys() == {"a", "b"}


def test_unreadable_files_are_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": torch.randn(1000)}}, "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:500])
    save_file({"a": torch.randn(1000)}, "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:500])
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"model": Trap()}))
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("cut.pth", "cannot be read as weights"),
        ("cut.safetensors", "cannot be read as weights"),
        ("code.pth", "cannot be read as weights"),
        ("nowhere.pth", "no such file or folder"),
        ("empty", "holds no weights"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            read_weights(name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "trapped").exists()


def test_strict_loading_is_all_or_nothing():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {
        "0.weight": torch.ones(3, 2),
        "0.bias": torch.ones(3),
        "1.weight": torch.ones(2, 3),
        "extra": torch.ones(1),
    }
    with pytest.raises(UserError, match=r"missing: 1\.bias; unexpected: extra; of another shape: 1\.weight \(2, 3\)"):
        load_strictly(model, state, "file")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


PAIRS = [
    ("hivit_b", "hivit_nano", "width 512 instead of 128, depth of blocks 30 instead of 8;"),
    ("hivit_nano", "hivit_l", "width 128 instead of 768, depth of blocks 8 instead of 50;"),
    ("svit_l", "svit_nano", "width 448 instead of 128, depth of stages.0 4 instead of 1 and 3 more;"),
    ("vit_large_patch16_224", "vit_tiny_patch16_224", "width 1024 instead of 192, depth of blocks 24 instead of 12;"),
    ("vit_base_patch16_224", "deit3_base_patch16_224", "missing: "),
    ("swin_base_patch4_window7_224", "swin_tiny_patch4_window7_224", "width 512 instead of 384, depth of layers.2.bl"),
    ("resnet50", "resnet18", ", depth of layer1 3 instead of 2"),
    ("resnet50", "hivit_b", "missing: "),
    ("hivit_b", "resnet50", "missing: "),
]


@pytest.mark.parametrize(("theirs", "ours", "words"), PAIRS)
def test_weights_of_another_size_are_refused_by_width_and_depth(theirs, ours, words):
    state, net = on_meta(timm.create_model, theirs).state_dict(), on_meta(timm.create_model, ours)
    with pytest.raises(UserError) as caught:
        load_strictly(net, state, "some/folder/of/mine/weights.safetensors")
    said = str(caught.value)
    assert words in said
    assert len(said) < 300
    assert sum(name in said for name in net.state_dict().keys() | state.keys()) <= 3
    assert said.endswith(": check the model's name and options.")


def test_tensors_that_no_network_can_compute_with_are_refused():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = model.state_dict()
    before = {key: tensor.clone() for key, tensor in state.items()}
    for odd in (torch.nan, torch.inf, -torch.inf):
        damaged = {key: tensor * odd if tensor.is_floating_point() else tensor for key, tensor in state.items()}
        with pytest.raises(
            UserError, match=r"file has NaN or infinite values in 0\.weight, 0\.bias, 1\.weight and 3 more"
        ):
            load_strictly(model, damaged, "file")
    for odd in (torch.full((3, 2), 1e300, dtype=torch.double), torch.ones(3, 2).to_sparse(), torch.ones(3, 2).int()):
        with pytest.raises(UserError, match=r"0\.weight"):
            load_strictly(model, state | {"0.weight": odd}, "file")
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_no_partial_output_remains(tmp_path):
    with replacing(tmp_path / "out") as folder:
        (folder / "a").write_text("first")
    with pytest.raises(OSError, match="No space"), replacing(tmp_path / "out") as folder:
        (folder / "a").write_text("second")
        raise OSError(28, "No space left on device")
    assert (tmp_path / "out" / "a").read_text() == "first"
    with replacing(tmp_path / "out") as folder:
        (folder / "b").write_text("third")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["b"]
    with pytest.raises(KeyboardInterrupt), replacing_file(tmp_path / "c.png") as file:
        file.write_text("half")
        raise KeyboardInterrupt
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_decoder_and_its_method_round_trip(tmp_path):
    decoder = Decoder(7, 4, in_chans=2, dim=24, depth=1, num_heads=4)
    write_decoder(decoder, tmp_path / "decoder", mask_ratio=0.6, norm_targets=False)
    loaded, method = read_decoder(tmp_path / "decoder")
    assert method == {"mask_ratio": 0.6, "norm_targets": False}
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(UserError, match="holds no decoder"):
        read_decoder(tmp_path)
