"""Weights that are malformed or not finite: every reader refuses them in a short sentence that names the tensors."""

import pytest
import timm
import torch
from conftest import command, fill
from encoders import write_encoders
from safetensors.torch import load_file, save_file
from svit_reference import released, shaken

from mimkit.conversion.convert import convert, read_released
from mimkit.data.transforms import Normalize
from mimkit.errors import LONGEST, UserError
from mimkit.io.model_card import find_pushable, model_card
from mimkit.io.weights import write_model
from mimkit.methods.checkpoint import load_initial_weights, load_run, write_decoder
from mimkit.methods.decoder import Decoder
from mimkit.methods.mae import MAE
from mimkit.models.factory import create_network, input_of, unit_encoder
from mimkit.models.pretrained import read_network
from mimkit.tasks.classification import classifier
from mimkit.tasks.dense_checkpoint import read_dense, write_dense
from mimkit.tasks.segmentation import Segmenter

SVIT = {"depths": (1, 1, 1, 1), "num_classes": 3}
ABOUT = {"input_size": (3, 32, 32), "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture(scope="module")
def states():
    """Return the state dicts of released files, by the networks' names."""
    hivit = fill(timm.create_model("hivit_nano", img_size=32, num_classes=3)).state_dict()
    vit = timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=2, num_classes=3)
    svit = released(shaken(timm.create_model("svit_nano", **SVIT)))
    return {"hivit_nano": hivit, "svit_nano": svit, "vit_tiny_patch16_224": vit.state_dict()}


def refusal(read):
    """Return the error of a reader, without the folder of the test in it."""
    with pytest.raises(UserError) as caught:
        read()
    return str(caught.value)


QKV = {"hivit_nano": "blocks.4.attn.qkv.weight", "svit_nano": "layers.2.blocks.0.attn.stoken_refine.qkv.weight"}
MALFORMED = [
    ("hivit_nano", "absolute_pos_embed", lambda t: t[0], "(4, 128) has 2 dimensions instead of 3"),
    ("hivit_nano", "absolute_pos_embed", lambda t: t.sum(), "() has 0 dimensions instead of 3"),
    ("hivit_nano", "patch_embed.proj.weight", lambda t: t.flatten(1), "(32, 48) has 2 dimensions instead of 4"),
    ("hivit_nano", "head.weight", lambda t: t.sum(), "() has 0 dimensions instead of 2"),
    ("hivit_nano", "head.weight", lambda t: t[0], "(128,) has 1 dimensions instead of 2"),
    ("hivit_nano", "blocks.4.attn.relative_position_bias_table", lambda t: t[0], "(4,) has 1 dimensions instead of 2"),
    ("hivit_nano", QKV["hivit_nano"], lambda t: t[:-1], "(383, 128) for (384, 128)"),
    ("svit_nano", QKV["svit_nano"], lambda t: t[:191], "has the shape (191, 128, 1, 1)"),
    ("svit_nano", QKV["svit_nano"], lambda t: t.sum(), "has the shape ()"),
    ("svit_nano", "patch_embed.proj.0.weight", lambda t: t.flatten(1), "stem.convs.0.weight (16, 27) has 2 dimensions"),
    ("svit_nano", "head.weight", lambda t: t.sum(), "() has 0 dimensions instead of 2"),
    ("vit_tiny_patch16_224", "head.weight", lambda t: t.sum(), "head.weight () has 0 dimensions instead of 2"),
    ("vit_tiny_patch16_224", "pos_embed", lambda t: t[0], "pos_embed (197, 32) has 2 dimensions instead of 3"),
]


@pytest.mark.parametrize(("name", "key", "damage", "words"), MALFORMED)
def test_a_malformed_tensor_is_named(name, key, damage, words, states, tmp_path):
    file = tmp_path / "file.pth"
    torch.save(states[name] | {key: damage(states[name][key])}, file)
    layout = "timm" if name.startswith("vit") else name.split("_")[0]
    given = {"source_args": {"embed_dim": 32, "depth": 2, "num_heads": 2}} if layout == "timm" else {}
    readers = [lambda: convert(name, "timm" if given else name, None, file, layout, dry_run=True, **given)]
    readers.append(lambda: read_network(name, str(file), read_released=read_released, **given.get("source_args", {})))
    if name == "hivit_nano":
        folder = tmp_path / "folder"
        write_model(timm.create_model(name, img_size=32, num_classes=3), folder, **ABOUT)
        save_file(torch.load(file), folder / "model.safetensors")
        method = MAE(unit_encoder(name, img_size=(32, 32)), Decoder(896, 16, 3, 24, 1, 4))
        readers += [lambda: create_network(str(folder)), lambda: load_initial_weights(method, str(file))]
    for read in readers[: -1 if key.startswith(("head", "blocks")) and len(readers) == 4 else None]:
        said = refusal(read)
        assert words in said
        assert len(said.removeprefix(str(tmp_path))) < LONGEST - 40
        assert str(tmp_path) in said or "this family" in said


def test_a_file_of_another_size_is_refused_by_every_reader(states, tmp_path):
    """The file has twice the width and one block more, so that most of its tensors do not fit."""
    wide = timm.create_model("hivit_nano", img_size=32, num_classes=3, embed_dim=256, depths=(1, 1, 5))
    file = tmp_path / "wide.pth"
    torch.save(wide.state_dict(), file)
    run, dense = write_encoders(tmp_path / "runs") / "hivit", tmp_path / "dense"
    write_model(timm.create_model("hivit_nano", img_size=32, num_classes=3), tmp_path / "folder", **ABOUT)
    save_file(wide.state_dict(), tmp_path / "folder/model.safetensors")
    write_decoder(Decoder(896, 16, 3, 24, 1, 4), run / "decoder", mask_ratio=0.75, norm_targets=True)
    save_file(Decoder(896, 16, 3, 48, 2, 4).state_dict(), run / "decoder/model.safetensors")
    write_dense(segmenter(), dense, "segmenter", ["a", "b"], [0, 1], Normalize([0.5] * 3, [0.5] * 3))
    save_file(segmenter(embed_dim=256).state_dict(), dense / "model.safetensors")
    method = MAE(unit_encoder("hivit_nano", img_size=(32, 32)), Decoder(896, 16, 3, 24, 1, 4))
    said = [
        refusal(lambda: convert("hivit_nano", "hivit_nano", None, file, "hivit", dry_run=True)),
        refusal(lambda: read_network("hivit_nano", str(file), read_released=read_released)),
        refusal(lambda: read_network("svit_nano", str(file), read_released=read_released)),
        refusal(lambda: read_network("vit_tiny_patch16_224", str(file), read_released=read_released)),
        refusal(lambda: load_initial_weights(method, str(file))),
        refusal(lambda: create_network(str(tmp_path / "folder"))),
        refusal(lambda: load_run(run)),
        refusal(lambda: read_dense(dense, "segmenter", Segmenter)),
    ]
    assert all(len(sentence.removeprefix(str(tmp_path))) < LONGEST - 20 for sentence in said), said
    assert all("width 256 instead of 128" in said[i] for i in (0, 1, 4, 5))
    assert all("depth of blocks 9 instead of 8" in said[i] for i in (0, 1, 4, 5))
    assert "width 48 instead of 24, depth of blocks 2 instead of 1" in said[6]
    assert "backbone.absolute_pos_embed (1, 4, 256) for (1, 4, 128), " in said[7]


def segmenter(**options):
    backbone = timm.create_model("hivit_nano", img_size=32, num_classes=0, **options)
    return Segmenter(backbone, 2, width=32)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_by_every_reader(odd, tmp_path, capsys, monkeypatch):
    """The readers are those of knn and probe, of predict and export, of --init, of runs, of segmenters, and of push."""

    def spoil(file, key=None):
        state = load_file(file)
        key = key or next(name for name in state if name.endswith("attn.qkv.weight"))
        state[key].flatten()[0] = odd
        save_file(state, file)
        return key

    folder, dense, name = tmp_path / "folder", tmp_path / "dense", "hivit_nano"
    run = write_encoders(tmp_path / "runs") / "hivit"
    write_model(timm.create_model(name, img_size=32, num_classes=3), folder, **ABOUT)
    write_decoder(Decoder(896, 16, 3, 24, 1, 4), run / "decoder", mask_ratio=0.75, norm_targets=True)
    write_dense(segmenter(), dense, "segmenter", ["a", "b"], [0, 1], Normalize([0.5] * 3, [0.5] * 3))
    method = MAE(unit_encoder(name, img_size=(32, 32)), Decoder(896, 16, 3, 24, 1, 4))
    vit = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    write_model(timm.create_model("vit_tiny_patch16_224", num_classes=3, **vit), tmp_path / "vit")
    vit_key = spoil(tmp_path / "vit/model.safetensors")
    key = spoil(folder / "model.safetensors")
    decoder_key = spoil(run / "decoder/model.safetensors")
    dense_key = spoil(dense / "model.safetensors")
    file = str(folder / "model.safetensors")
    readers = [
        (key, lambda: create_network(str(folder))),
        (key, lambda: create_network(str(folder), num_classes=0)),
        (key, lambda: classifier(str(folder))),
        (key, lambda: read_network(name, file, read_released=read_released)),
        (vit_key, lambda: read_network("vit_tiny_patch16_224", str(tmp_path / "vit/model.safetensors"), **vit)),
        (key, lambda: convert(name, name, None, file, "hivit", dry_run=True)),
        (key, lambda: model_card(find_pushable(str(folder)), "OWNER/NAME")),
        (decoder_key, lambda: load_run(run)),
        (decoder_key, lambda: load_initial_weights(method, str(run))),
        (dense_key, lambda: read_dense(dense, "segmenter", Segmenter)),
    ]
    for named, read in readers:
        assert f"has NaN or infinite values in {named}. Pass another file" in refusal(read)
    spoil(run / "encoder/model.safetensors", key)
    assert f"values in {key}" in refusal(lambda: load_initial_weights(method, str(run)))
    code, out, err = command(capsys, monkeypatch, "knn", "--model", folder, "--data", "sample", "--images", "40")
    assert (code, "kNN" in out) == (2, False)
    assert f"has NaN or infinite values in {key}" in err


@pytest.mark.parametrize(("mean", "std"), [([torch.nan] * 3, [0.5] * 3), ([0.5] * 3, [0.5, 0.5, 0.0])])
def test_a_normalization_that_is_not_finite_is_refused(mean, std):
    network = timm.create_model("hivit_nano", pretrained_cfg_overlay={"mean": mean, "std": std})
    with pytest.raises(UserError, match=r"lacks a valid input_size, mean or std .*Get another copy of its config"):
        input_of(network)


def test_a_folder_with_a_pickle_of_plain_objects_is_read(tmp_path):
    """timm reads the folder's pickle, and allows what `read_weights` allows."""
    import numpy as np

    net = timm.create_model("hivit_nano", img_size=32, num_classes=3)
    write_model(net, tmp_path / "folder", **ABOUT)
    (tmp_path / "folder/model.safetensors").unlink()
    torch.save({"state_dict": net.state_dict(), "best": np.float64(0.5)}, tmp_path / "folder/pytorch_model.bin")
    assert torch.equal(create_network(str(tmp_path / "folder")).head.weight, net.head.weight)
