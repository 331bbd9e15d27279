"""Reading and writing weight files."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mimkit.errors import UserError
from mimkit.files import replacing, replacing_file
from mimkit.io.weights import load_strictly, read_weights
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
