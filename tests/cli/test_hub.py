"""The Hugging Face hub, simulated by a local folder. Errors come from the real client."""

import json
import shutil
import time
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
import yaml
from conftest import command, fill
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save_file

from mimkit.data.transforms import Normalize
from mimkit.errors import UserError
from mimkit.io import hub
from mimkit.io.hub import local_path
from mimkit.io.model_card import final_metrics, find_pushable, without_local_paths
from mimkit.io.weights import write_model
from mimkit.methods.checkpoint import load_run, write_decoder
from mimkit.methods.decoder import Decoder
from mimkit.models.factory import create_network
from mimkit.tasks.classification import classifier
from mimkit.tasks.dense_checkpoint import write_dense
from mimkit.tasks.segmentation import Segmenter

DATA = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "input_size": (3, 32, 32)}


@pytest.fixture(autouse=True)
def _empty_cache():
    hub._fetch.cache_clear()


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Replace the hub by the folder `root` and the cache by the folder `cache`. Each model has the tags `tags`."""
    local = SimpleNamespace(root=tmp_path / "hub", cache=tmp_path / "cache", tags=[], commits=[])

    def matches(name, patterns):
        return any(fnmatch(name, pattern) for pattern in patterns)

    def fetch(repo_id, revision=None, allow_patterns=(), local_files_only=False):
        for file in (local.root / repo_id).rglob("*"):
            name = file.relative_to(local.root / repo_id).as_posix()
            if file.is_file() and matches(name, allow_patterns):
                (local.cache / repo_id / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, local.cache / repo_id / name)
        return str(local.cache / repo_id)

    class Api:
        def model_info(self, repo_id, revision, timeout):
            assert revision in (None, "v1")
            return SimpleNamespace(tags=local.tags)

        def create_repo(self, repo_id, private, exist_ok):
            assert exist_ok
            (local.root / repo_id).mkdir(parents=True, exist_ok=True)
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message, allow_patterns, delete_patterns):
            local.commits.append(commit_message)
            for file in (local.root / repo_id).rglob("*"):
                if file.is_file() and matches(file.relative_to(local.root / repo_id).as_posix(), delete_patterns):
                    file.unlink()
            for file in Path(folder_path).rglob("*"):
                name = file.relative_to(folder_path).as_posix()
                if file.is_file() and matches(name, allow_patterns):
                    (local.root / repo_id / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, local.root / repo_id / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setenv("HF_TOKEN", "hf_nothing")
    return local


@pytest.fixture
def run(tmp_path):
    """Write the directory of a pre-training run."""
    folder = tmp_path / "run"
    encoder = fill(timm.create_model("hivit_nano", num_classes=0, unit_form=True, img_size=32))
    write_model(encoder, folder / "encoder", **DATA)
    write_decoder(Decoder(encoder.out_dim, encoder.unit_size, 3, 32, 1, 2), folder / "decoder", mask_ratio=0.75)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "optimizer.safetensors").write_bytes(b"secret")
    torch.save({}, folder / "encoder" / "pytorch_model.bin")
    lines = [{"step": 0, "knn_10": 53.1}, {"step": 20, "loss": 0.75, "lr": 1e-4}, {"step": 40, "loss": 0.51234}]
    lines += [{"step": 40, "knn_10": 72.25, "box_ap_large": float("nan")}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"model": "hivit_nano", "data": f"{Path.home()}/photos", "out": str(folder), "seed": 3}
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    (folder / "curves.png").write_bytes(b"png")
    return folder


def test_a_pushed_run_loads_from_the_hub(fake, run, capsys, monkeypatch):
    code, out, err = command(capsys, monkeypatch, "push", run, "--to", "me/mine")
    assert (code, err) == (0, "")
    assert "https://hub/me/mine" in out
    files = {file.relative_to(fake.root / "me/mine").as_posix() for file in fake.root.rglob("*") if file.is_file()}
    decoder = {"decoder/config.json", "decoder/model.safetensors"}
    assert files == {"README.md", "config.json", "model.safetensors", "curves.png", *decoder}
    x = torch.randn(2, 3, 32, 32)
    original = create_network(str(run / "encoder")).eval()
    by_timm = timm.create_model(f"local-dir:{fake.root}/me/mine", pretrained=True).eval()
    for name in ("hf-hub:me/mine", "hf_hub:me/mine@v1"):
        hub._fetch.cache_clear()
        assert torch.equal(original(x), create_network(name).eval()(x))
    assert torch.equal(original(x), by_timm(x))
    mae, _ = load_run("hf-hub:me/mine")
    assert mae.mask_ratio == 0.75

    card = (fake.root / "me/mine/README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "timm"
    assert "| knn_10 | 72.2500 | 40 |" in card
    assert "| loss | 0.5123 | 40 |" in card
    assert not any(word in card for word in ("53.1", "box_ap_large", "license", str(Path.home() / "photos"), str(run)))
    assert "data: photos" in card


def test_a_pushed_classifier_replaces_earlier_files_of_mimkit_only(fake, tmp_path, capsys, monkeypatch):
    (fake.root / "me/mine").mkdir(parents=True)
    for name in ("segmenter.json", "notes.txt"):
        (fake.root / "me/mine" / name).write_text("{}")
    network = fill(timm.create_model("hivit_nano", num_classes=2, img_size=32))
    for part in ("best", "last"):
        write_model(network, tmp_path / "run" / part, label_names=["root", "b"], **DATA)
    lines = [{"step": 1, "top1": 60.0}, {"step": 2, "top1": 70.0, "top1_raw": 1.0}, {"step": 3, "top1": 65.0}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "run" / "config.yaml").write_text("seed: 0\n")
    assert final_metrics(find_pushable(str(tmp_path / "run"))) == [("top1", 70.0, 2)]
    assert final_metrics(find_pushable(str(tmp_path / "run" / "last"))) == [("top1", 65.0, 3)]
    code, out, _ = command(capsys, monkeypatch, "push", tmp_path / "run", "--to", "me/mine", "--dry-run")
    assert code == 0
    assert "mimkit predict --model hf-hub:me/mine" in out
    assert fake.commits == []
    assert command(capsys, monkeypatch, "push", tmp_path / "run", "--to", "me/mine")[0] == 0
    assert not (fake.root / "me/mine/segmenter.json").exists()
    assert (fake.root / "me/mine/notes.txt").exists()
    loaded = classifier("hf-hub:me/mine").eval()
    assert loaded.pretrained_cfg["label_names"] == ["root", "b"]
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), network.eval()(x))


@pytest.mark.parametrize(
    ("config", "tags", "card"),
    [
        ({"auto_map": {"AutoModel": "modeling.Net"}}, [], ""),
        ({"architecture": "hivit_nano", "net": "modeling.py"}, [], ""),
        ({}, ["custom_code"], ""),
        ({}, [], "---\ntags:\n- custom_code\n---\n"),
    ],
)
def test_a_repository_that_asks_to_run_its_own_code_is_refused(fake, config, tags, card):
    repository, fake.tags = fake.root / "evil/net", tags
    repository.mkdir(parents=True)
    (repository / "config.json").write_text(json.dumps(config))
    (repository / "README.md").write_text(card)
    (repository / "modeling.py").write_text("raise SystemExit")
    save_file({"a": torch.zeros(1)}, repository / "model.safetensors")
    with pytest.raises(UserError, match="asks for code of its own"):
        local_path("hf-hub:evil/net")
    assert {file.name for file in fake.cache.rglob("*") if file.is_file()} == {"config.json", "README.md"}


def test_pickles_are_not_fetched(fake):
    (fake.root / "old/net").mkdir(parents=True)
    (fake.root / "old/net/config.json").write_text("{}")
    torch.save({"a": torch.zeros(1)}, fake.root / "old/net/pytorch_model.bin")
    with pytest.raises(UserError, match="no pickle is read"):
        local_path("hf-hub:old/net")
    assert not list(fake.cache.rglob("*.bin"))


def test_local_paths_are_not_published():
    home = Path.home()
    paths = [f"{home}/a", "~/b", "../c/d", str(home), "runs/x", "sample", r"C:\Users\me\e", "local-dir:/x/f"]
    assert without_local_paths(paths) == ["a", "b", "d", "a local folder", "runs/x", "sample", "e", "f"]


def test_without_a_network_commands_fail_fast(run, tmp_path, capsys, monkeypatch):
    """The real client asks an address where nothing listens. It must not retry for minutes."""
    monkeypatch.setenv("HF_TOKEN", "hf_nothing")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    for argv in (
        ["knn", "--model", "hf-hub:a/b"],
        ["predict", "--model", "hf-hub:a/b@v2", "--images", "sample"],
        ["convert", "--from", "hf-hub:a/b", "--dry-run"],
        ["convert", "--from", "vit_b_mae", "--checkpoint", "hf-hub:a/b", "--dry-run"],
        ["reconstruct", "--run", "hf-hub:a/b"],
    ):
        code, _, err = command(capsys, monkeypatch, *argv)
        assert code == 2
        assert "hf-hub:a/b" in err, argv
        assert "cannot be fetched (ConnectError" in err, err
        assert err.count("\n") == 1
    code, _, err = command(capsys, monkeypatch, "push", run, "--to", "me/mine")
    assert code == 2
    assert "--to me/mine cannot be pushed to (ConnectError" in err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is enabled" in command(capsys, monkeypatch, "knn", "--model", "hf-hub:a/b")[2]
    assert "offline mode is enabled" in command(capsys, monkeypatch, "push", run, "--to", "me/mine")[2]
    assert time.monotonic() - start < 30


def test_what_cannot_be_pushed_is_refused(run, tmp_path, capsys, monkeypatch):
    for source, to, message in (
        (run, "mine", "--to mine names no repository: write OWNER/NAME"),
        (tmp_path / "nowhere", "me/mine", "nowhere holds no network"),
        (run / "checkpoints", "me/mine", "holds no network"),
    ):
        code, _, err = command(capsys, monkeypatch, "push", source, "--to", to)
        assert code == 2
        assert message in err
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "run `hf auth login`" in command(capsys, monkeypatch, "push", run, "--to", "me/mine")[2]


def test_a_pushed_segmenter_predicts_the_same_masks(fake, tmp_path, folder, capsys, monkeypatch):
    backbone = timm.create_model("hivit_nano", num_classes=0, img_size=32)
    network = Segmenter(backbone, 3, "fpn", 32).eval()
    about = {"short": 32, "crop": None, "flip": False}
    best = tmp_path / "run" / "best"
    colors = Normalize((0.5,) * 3, (0.25,) * 3)
    write_dense(network, best, "segmenter", ["a", "b", "c"], [0, 1, 2], colors, **about)
    assert command(capsys, monkeypatch, "push", tmp_path / "run", "--to", "me/seg")[0] == 0
    assert "library_name: mimkit" in (fake.root / "me/seg/README.md").read_text()
    argv = ["predict", "--images", folder, "--model"]
    for out, name in (("from_hub", "hf-hub:me/seg"), ("from_run", best)):
        code, _, err = command(capsys, monkeypatch, *argv, name, "--out", tmp_path / out)
        assert code == 0, err
    masks = sorted((tmp_path / "from_run").rglob("*.png"))
    assert len(masks) == 12
    for mask in masks:
        assert mask.read_bytes() == (tmp_path / "from_hub" / mask.relative_to(tmp_path / "from_run")).read_bytes()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_refusals_by_the_hub_are_one_sentence(fake, run, status, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        error = HfHubHTTPError("long\nstory", response=SimpleNamespace(status_code=status, headers={}, request=None))
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    for argv in (["push", run, "--to", "me/mine"], ["knn", "--model", "hf-hub:me/mine"]):
        code, _, err = command(capsys, monkeypatch, *argv)
        assert code == 2
        assert f"({status}: " in err
        assert err.count("\n") == 1
    assert "names no repository" in command(capsys, monkeypatch, "knn", "--model", "hf-hub:mine")[2]
