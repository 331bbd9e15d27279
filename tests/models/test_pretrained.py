"""Networks that are loaded from pre-training runs, folders and files, and the refusal of incomplete ones."""

import shutil

import pytest
import timm
import torch
from conftest import fill
from encoders import write_encoders
from safetensors.torch import load_file, save_file
from svit_reference import released, shaken

from mimkit.conversion.convert import read_released
from mimkit.errors import UserError
from mimkit.io.weights import write_model
from mimkit.models.pretrained import load_network, new_head


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return write_encoders(tmp_path_factory.mktemp("encoders"))


# Runs of pre-training ------------------------------------------------------------------------------------------------


def test_pretrained_hivit_gets_its_supervised_form_with_equal_tokens(encoders):
    own = timm.create_model(f"local-dir:{encoders}/hivit/encoder", pretrained=True).eval().double()
    net, origin = load_network(str(encoders / "hivit"))
    x = torch.randn(2, 3, 32, 32)
    tokens, expected = net.eval().double().forward_features(x.double()), own.forward_features(x.double())
    assert torch.allclose(tokens, expected, rtol=0, atol=1e-12)  # the bias tables start at 0
    net.float()
    assert {n for n, _ in net.named_parameters() if "bias_table" in n}
    assert "4 relative bias tables at 0" in origin
    assert "dropped: norm.bias, norm.weight" in origin
    new_head(net, 7, 2e-5)
    assert net(x).shape == (2, 7)
    assert 1e-5 < net.head.weight.std() < 3e-5
    assert not net.head.bias.any()


@pytest.mark.parametrize("pool", [None, "avg"])
def test_pretrained_vit_keeps_its_blocks(encoders, pool):
    own = timm.create_model(f"local-dir:{encoders}/vit/encoder", pretrained=True).eval()
    net, origin = load_network(str(encoders / "vit"), global_pool=pool)
    x = torch.randn(2, 3, 32, 32)
    tokens = own.forward_features(x)
    if pool:
        assert "fresh: fc_norm.bias, fc_norm.weight; dropped: norm.bias, norm.weight" in origin
        net.norm = own.norm
    assert torch.equal(net.eval().forward_features(x), tokens)
    assert net.global_pool == (pool or "token")


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["hivit_nano", "svit_nano", "vit_tiny_patch16_224", "hpvit", "resnet10t", "swin_tiny_patch4_window7_224"]
)
def test_any_model_loads_from_its_folder_and_gets_other_classes(name, tmp_path):
    size = 224 if name in ("svit_nano", "resnet10t", "swin_tiny_patch4_window7_224") else 64
    options = {
        "hpvit": {"source": "vit_tiny_patch16_224", "source_args": {"depth": 4, "img_size": size}},
        "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (1, 1, 1, 1)},
        "resnet10t": {},
        "svit_nano": {"depths": (1, 1, 1, 1)},
    }
    net = fill(timm.create_model(name, num_classes=5, **options.get(name, {"img_size": size}))).eval()
    about = {"input_size": (3, size, size), "mean": [0.5] * 3, "std": [0.5] * 3}
    write_model(net, tmp_path / "model", **about)
    found, _ = load_network(str(tmp_path / "model"))
    for key, tensor in net.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor), key
    new_head(found, 3, None)
    x = torch.randn(1, 3, size, size)
    assert torch.equal(found.eval().forward_features(x), net.forward_features(x))
    assert found(x).shape == (1, 3)
    random, origin = load_network(str(tmp_path / "model"), scratch=True)
    assert "random weights" in origin
    assert any(not torch.equal(random.state_dict()[key], tensor) for key, tensor in net.state_dict().items())


@pytest.mark.parametrize("kind", ["hivit", "vit"])
@pytest.mark.parametrize("damage", ["missing", "unexpected", "misshapen", "stem"])
def test_folder_that_does_not_load_completely_is_refused_by_key(kind, damage, encoders, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(encoders / kind / "encoder", folder)
    state = load_file(folder / "model.safetensors")
    key = "blocks.2.mlp.fc1.weight"
    if damage == "missing":
        del state[key]
    elif damage == "stem":
        key = "patch_embed.proj.weight"
        del state[key]
    elif damage == "unexpected":
        key = "blocks.2.mlp.fc9.weight"
        state[key] = torch.zeros(3)
    else:
        state[key] = state[key][:-1].clone()
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=key):
        load_network(str(folder))
    if damage in ("missing", "unexpected"):  # timm itself loads it without a word
        timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=9)


def test_strict_loading_cannot_be_switched_off(encoders, tmp_path):
    """timm loads non-strictly for other classes, and for a stem that it cannot adapt. A file replaces a folder's."""
    folder = tmp_path / "damaged"
    shutil.copytree(encoders / "vit" / "encoder", folder)
    state = load_file(folder / "model.safetensors")
    doubled = {key: tensor * 2 for key, tensor in state.items()}
    save_file(doubled, tmp_path / "other.safetensors")
    found, origin = load_network(str(encoders / "vit"), str(tmp_path / "other.safetensors"))
    assert "other.safetensors" in origin
    assert torch.equal(found.state_dict()["cls_token"], doubled["cls_token"])
    del state["blocks.2.mlp.fc1.weight"]
    save_file(state, folder / "model.safetensors")
    save_file(state, tmp_path / "less.safetensors")
    for given in ({}, {"num_classes": 7}, {"in_chans": 1}):
        with pytest.raises(UserError, match=r"blocks\.2\.mlp\.fc1\.weight"):
            load_network(str(folder), **given)
    with pytest.raises(UserError, match=r"blocks\.2\.mlp\.fc1\.weight"):
        load_network(str(encoders / "vit"), str(tmp_path / "less.safetensors"))
    gray, _ = load_network(str(encoders / "vit"), in_chans=1)
    rgb = load_file(encoders / "vit" / "encoder" / "model.safetensors")["patch_embed.proj.weight"]
    assert torch.allclose(gray.patch_embed.proj.weight, rgb.sum(1, keepdim=True), atol=1e-5)


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", [{"patch_size": 2, "img_size": 32}, {"in_chans": 1, "img_size": 64}, {"img_size": (32, 64)}], ids=str
)
def test_hivit_file_implies_its_input(given, tmp_path):
    net = fill(timm.create_model("hivit_nano", num_classes=0, **given))
    save_file(net.state_dict(), tmp_path / "file.safetensors")
    size = given if isinstance(given["img_size"], tuple) else {}
    file = str(tmp_path / "file.safetensors")
    found, _ = load_network("hivit_nano", file, read_released=read_released, **size)
    assert all(torch.equal(found.state_dict()[key], tensor) for key, tensor in net.state_dict().items())
    assert found.grid == net.grid


@pytest.mark.parametrize("kind", ["mae", "mae with decoder", "fine-tuned", "hivit", "hivit fine-tuned"])
def test_file_loads_completely_or_is_refused_by_key(kind, tmp_path):
    if "hivit" in kind:
        name = "hivit_nano"
        options = {"num_classes": 4} if "tuned" in kind else {"num_classes": 0, "unit_form": True, "multi_scale": True}
    else:
        name = "vit_tiny_patch16_224"
        options = {"num_classes": 4, "global_pool": "avg"} if kind == "fine-tuned" else {"num_classes": 0}
    size = {} if "hivit" in kind else {"depth": 4}
    net = fill(timm.create_model(name, **options, **size)).eval()
    state = net.state_dict()
    if kind == "mae with decoder":
        state |= {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 192)}

    def load(file, **options):
        return load_network(name, str(tmp_path / file), read_released=read_released, **options, **size)[0]

    torch.save({"model": state}, tmp_path / "file.pth")
    assert torch.equal(load("file.pth", img_size=(64, 64)).blocks[2].mlp.fc1.weight, net.blocks[2].mlp.fc1.weight)
    x = torch.randn(1, 3, 224, 224, dtype=torch.double)
    tokens, expected = load("file.pth").eval().double().forward_features(x), net.double().forward_features(x)
    assert torch.allclose(tokens, expected, rtol=0, atol=1e-12)
    for key in ("blocks.2.mlp.fc1.weight", "patch_embed.proj.weight"):
        torch.save({"model": {k: v for k, v in state.items() if k != key}}, tmp_path / "less.pth")
        with pytest.raises(UserError, match=key):
            load("less.pth")
    torch.save({"model": {**state, "blocks.2.more": torch.zeros(2)}}, tmp_path / "more.pth")
    with pytest.raises(UserError, match=r"blocks\.2\.more"):
        load("more.pth")


def test_svit_loads_from_a_released_file_and_from_its_own(tmp_path):
    net = shaken(timm.create_model("svit_s", depths=(1, 1, 1, 1), num_classes=3, in_chans=1))
    torch.save({"model": released(net)}, tmp_path / "released.pth")
    save_file(net.state_dict(), tmp_path / "own.safetensors")
    for file, options in (("released.pth", {"img_size": (384, 384)}), ("own.safetensors", {"depths": (1, 1, 1, 1)})):
        found, _ = load_network("svit_s", str(tmp_path / file), read_released=read_released, in_chans=1, **options)
        assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in found.state_dict().items())
