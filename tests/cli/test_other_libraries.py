"""Folders that mimkit writes, in transformers, segmentation-models-pytorch and torchvision."""

import json
import re
import shutil

import pytest
import timm
import torch
import transformers
from conftest import ROOT, fill, picture

from mimkit.io.model_card import find_pushable, write_repository
from mimkit.io.weights import write_model

LABELS = ["ant", "bee", "cat"]
PLAIN = {"embed_dim": 48, "depth": 3, "num_heads": 2, "img_size": 64}
NETWORKS = {
    "hivit": ("hivit_nano", {"embed_dim": 32, "depths": (1, 1, 2), "img_size": 64}),
    "hivit before fine-tuning": ("hivit_nano", {"embed_dim": 32, "unit_form": True, "multi_scale": True}),
    "svit": ("svit_nano", {"img_size": 64}),
    "hpvit": ("hpvit", {"source_args": PLAIN}),
    "hpvit, RoPE": ("hpvit", {"source": "vit_small_patch16_dinov3", "source_args": PLAIN, "depths": "1-1-0-1"}),
    "hpvit, relative bias": ("hpvit", {"source": "beit_base_patch16_224", "source_args": PLAIN, "depths": "light"}),
    "vit": ("vit_tiny_patch16_224", PLAIN),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1, 1, 1), "img_size": 64}),
    "resnet": ("resnet10t", {}),
}


def write(folder, name, options, classes=0):
    """Write a small network with random weights to a folder, and return it."""
    net = fill(timm.create_model(name, num_classes=classes, **options)).eval()
    write_model(net, folder, label_names=LABELS[:classes])
    return net


def from_transformers(kind, folder, **options):
    """Load a folder, and assert that no weight is missing or of another shape."""
    net, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, **options)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    return net.eval(), report["unexpected_keys"]


def equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


# transformers' wrapper ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", NETWORKS)
@torch.no_grad()
def test_a_network_without_classes_is_read_by_transformers(key, tmp_path):
    name, options = NETWORKS[key]
    net, x = write(tmp_path, name, options), torch.randn(1, 3, 128, 128)
    x = x[..., :64, :64] if key in ("vit", "swin") else x
    assert "num_classes" not in json.loads((tmp_path / "config.json").read_text()).get("model_args", {})
    wrapped, unexpected = from_transformers("AutoModel", tmp_path)
    assert not unexpected
    torch.testing.assert_close(wrapped(x).last_hidden_state, net.forward_features(x))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert loaded.num_classes == 0
    torch.testing.assert_close(loaded(x), net(x))


@pytest.mark.parametrize("key", ["hivit", "svit", "hpvit", "vit", "swin", "resnet"])
@torch.no_grad()
def test_a_classifier_is_read_by_transformers(key, tmp_path):
    name, options = NETWORKS[key]
    net, x = write(tmp_path, name, options, classes=3), torch.randn(1, 3, 64, 64)
    wrapped, unexpected = from_transformers("TimmWrapperForImageClassification", tmp_path)
    assert not unexpected
    torch.testing.assert_close(wrapped(x).logits, net(x))
    assert wrapped.config.id2label == dict(enumerate(LABELS))
    features, unexpected = from_transformers("AutoModel", tmp_path)
    head = (name for name in net.state_dict() if name.startswith(net.pretrained_cfg["classifier"]))
    assert unexpected == {f"timm_model.{name}" for name in head}
    torch.testing.assert_close(features(x).last_hidden_state, net.forward_features(x))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert (loaded.num_classes, loaded.pretrained_cfg["label_names"]) == (3, LABELS)
    torch.testing.assert_close(loaded(x), net(x))
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=5)
    assert other.get_classifier().out_features == 5


def test_pushing_what_was_written_before_makes_it_readable(tmp_path):
    old = ROOT / "tests" / "fixtures" / "written_by_0.1" / "mae_hivit" / "encoder"
    with pytest.raises(TypeError, match="multiple values for keyword argument 'num_classes'"):
        transformers.AutoModel.from_pretrained(old)
    write_repository(find_pushable(str(old)), "me/it", tmp_path)
    x = torch.randn(1, 3, 32, 32)
    wrapped, unexpected = from_transformers("AutoModel", tmp_path)
    assert not unexpected
    net = timm.create_model(f"local-dir:{old}", pretrained=True).eval()
    torch.testing.assert_close(wrapped(x).last_hidden_state, net.forward_features(x))


# transformers' backbones ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depths", "names"),
    [
        ("0-0-3-0", ["patch_embed", "pools.0", "blocks.2", "pools.2"]),
        ("0-1-2-0", ["patch_embed", "blocks.0", "blocks.2", "pools.2"]),
        ("1-1-1-0", ["blocks.0", "blocks.1", "blocks.2", "pools.2"]),
        ("1-1-0-1", ["blocks.0", "blocks.1", "pools.1", "blocks.2"]),
        ("0-0-0-3", ["patch_embed", "pools.0", "pools.1", "blocks.2"]),
    ],
)
@torch.no_grad()
def test_each_map_of_an_hpvit_has_its_own_name(depths, names, tmp_path):
    net, x = write(tmp_path, "hpvit", {"source_args": PLAIN, "depths": depths}), torch.randn(1, 3, 64, 64)
    assert [info["module"] for info in net.feature_info] == names
    assert set(names) <= {name for name, _ in net.named_modules()}
    _, maps = net.forward_intermediates(x)
    for indices in ([0, 1, 2, 3], [3], [0, 2]):
        backbone = transformers.TimmBackbone.from_pretrained(f"local-dir:{tmp_path}", out_indices=indices).eval()
        assert backbone.out_features == [names[i] for i in indices]
        equal(backbone(x).feature_maps, [maps[i] for i in indices])


# The snippets of docs/other_libraries.md ------------------------------------------------------------------------------

SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "other_libraries.md").read_text(), re.DOTALL)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Write the folders that the page names, and make their parent the current directory. Return their networks."""
    monkeypatch.chdir(tmp_path)
    names = {"runs/mae_hivit/encoder": ("hivit before fine-tuning", 0), "runs/finetune/best": ("hivit", 3)}
    names["hpvit_b_mae"] = ("hpvit", 0)
    old = ROOT / "tests" / "fixtures" / "written_by_0.1" / "mae_hivit" / "encoder"
    shutil.copytree(old, tmp_path / "written_by_0.1" / "encoder")
    return {folder: write(tmp_path / folder, *NETWORKS[key], classes) for folder, (key, classes) in names.items()}


def run_snippet(word):
    """Run the snippet that holds a word, and return its variables."""
    (snippet,) = (each for each in SNIPPETS if word in each)
    variables = {}
    exec(snippet, variables)
    return variables


def test_all_snippets_are_run():
    words = ["features_only=True)\nmaps", "smp.Unet", "FasterRCNN", "pipeline", "UperNetConfig(", "AutoConfig"]
    assert [sum(word in snippet for snippet in SNIPPETS) for word in words] == [1] * len(SNIPPETS)


@torch.no_grad()
def test_snippet_of_timm(folders):
    found, net = run_snippet("features_only=True)\nmaps"), folders["runs/mae_hivit/encoder"]
    torch.testing.assert_close(found["encoder"].eval()(found["images"]), net(found["images"]))
    assert [m.shape[-1] for m in found["maps"]] == [56, 28, 14]


@torch.no_grad()
def test_snippet_of_segmentation_models(folders):
    found, x = run_snippet("smp.Unet"), torch.randn(2, 3, 64, 64)
    for variable, folder in (("unet", "runs/mae_hivit/encoder"), ("upernet", "hpvit_b_mae")):
        model = found[variable].eval()
        equal(model.encoder(x)[2:], folders[folder].forward_intermediates(x, intermediates_only=True))
        assert model(x).shape == (2, 21, 64, 64)


@torch.no_grad()
def test_snippet_of_torchvision(folders):
    found, x = run_snippet("FasterRCNN"), torch.rand(3, 64, 96)
    maps = folders["runs/mae_hivit/encoder"].forward_intermediates(x[None], intermediates_only=True)
    equal(found["backbone"].eval().body(x[None]), maps)
    detector = found["detector"].eval()
    detector.transform.min_size = (64,)
    (objects,) = detector([x])
    assert objects["boxes"].shape[1] == 4


@torch.no_grad()
def test_snippet_of_transformers(folders):
    found = run_snippet("pipeline")
    assert found["tokens"].shape == (2, 14**2, 32)
    scores = found["classify"](picture(0, (64, 64)))
    assert {score["label"] for score in scores} == set(LABELS)
    x = torch.randn(1, 3, 64, 64)
    net = folders["runs/mae_hivit/encoder"]
    torch.testing.assert_close(found["encoder"].eval()(x).last_hidden_state, net.forward_features(x))
    torch.testing.assert_close(found["classify"].model(x).logits, folders["runs/finetune/best"](x))


@torch.no_grad()
def test_snippet_of_backbones_in_transformers(folders, tmp_path):
    found, x = run_snippet("UperNetConfig("), torch.randn(1, 3, 64, 64)
    maps = folders["hpvit_b_mae"].forward_intermediates(x, intermediates_only=True)
    segmenter, detector = found["segmenter"].eval(), found["detector"].eval()
    equal(segmenter.backbone(x).feature_maps, maps)
    assert segmenter(x).logits.shape == (1, 21, 64, 64)
    equal(detector.model.backbone.model(x), maps[2:3])
    assert detector(x).logits.shape == (1, 100, 92)
    segmenter.save_pretrained(tmp_path / "saved")
    again, _ = from_transformers("UperNetForSemanticSegmentation", tmp_path / "saved")
    torch.testing.assert_close(again(x).logits, segmenter(x).logits)


@torch.no_grad()
def test_snippet_of_what_was_written_before(folders):
    found, x = run_snippet("AutoConfig"), torch.randn(1, 3, 32, 32)
    net = timm.create_model("local-dir:written_by_0.1/encoder", pretrained=True).eval()
    torch.testing.assert_close(found["encoder"].eval()(x).last_hidden_state, net.forward_features(x))
