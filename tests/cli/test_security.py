"""Nothing that a config, a checkpoint or a data set holds is executed."""

import ast
import io
import json
import pickle
import shutil
import sys
import tarfile
from contextlib import suppress
from pathlib import Path

import datasets
import mimkit.converters
import mimkit.recipes
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import batches, command, encoded, picture
from mimkit.recipes import finetune, mae_vit
from PIL import EpsImagePlugin, Image

import mimkit
from mimkit import cli
from mimkit.data.decode import decode
from mimkit.data.segmentation import read_mask
from mimkit.data.sources import _open_hub, open_source
from mimkit.errors import UserError
from mimkit.io.weights import read_weights
from mimkit.training.checkpoint import digest, trim, verify_checkpoint
from mimkit.training.run import Run

FILES = sorted(
    file for package in (mimkit, mimkit.recipes, mimkit.converters) for file in Path(package.__path__[0]).glob("*.py")
)
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def dangers(code: str) -> list[str]:
    """Calls and imports by which a file that is read could run code, or write where it likes."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLERS:
            found.append(node.module or "")
        elif isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            if name in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
                found.append(name)
            if name.endswith((".extractall", ".extract")):
                found.append(name)
            if name == "torch.load" and given.get("weights_only") != "True":
                found.append(name)
            found += [word for word in ("allow_pickle", "trust_remote_code") if given.get(word, "False") != "False"]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_no_code_of_ours_executes_what_it_reads(file):
    assert dangers(file.read_text()) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "eval(x)",
        "exec(x)",
        "yaml.load(x)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "np.load(x, allow_pickle=True)",
        "f(trust_remote_code=True)",
        "tar.extractall(x)",
    ],
)
def test_the_search_for_dangers_finds_them(code):
    assert dangers(code)


# A pickle in the place of every file --------------------------------------------------------------------------------

SMALL = ["--workers", "0", "--batch-size", "8", "--save-every", "1"]


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


def trapped(canary, protocol=4):
    return pickle.dumps({"model": Trap(canary)}, protocol)


def anew():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pre-training run, what fine-tuning and conversion make of it, and the images."""
    root = tmp_path_factory.mktemp("made")
    for i in range(16):
        place = root / "images" / f"class{i % 2}" / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(place)
    data = ["--data", str(root / "images")]
    args = ["--model-args", "{embed_dim: 32, depth: 2, num_heads: 2}", "--decoder-dim", "24", "--epochs", "2"]
    pretrain = [*data, "--out", str(root / "run"), *SMALL, *args, "--knn-every", "0"]
    tune = [
        *data,
        "--out",
        str(root / "tuned"),
        *SMALL,
        "--model",
        str(root / "run"),
        "--epochs",
        "1",
        "--warmup-epochs",
        "0",
    ]
    tune += ["--compare-scratch", "false"]
    record = Run.record

    def spoiled(run, **values):
        record(run, **{name: value * (torch.nan if run.step == 1 else 1) for name, value in values.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "record", spoiled)  # it leaves a step to replay
        mae_vit.main(pretrain)
        anew()
        patch.undo()
        finetune.main(tune)
        anew()
        convert = ["convert", "--from", root / "run/encoder", "--to", "hpvit", "--depths", "1-1-0-0", "--no-checks"]
        patch.setattr(sys, "argv", ["mimkit", *map(str, convert), "--out", str(root / "converted")])
        cli.main()
    return root, pretrain, tune


def ends(capsys, call):
    """Ends cleanly, or with exit code 2 and one sentence; -> the sentence"""
    code = 0
    capsys.readouterr()
    try:
        call()
    except SystemExit as stop:
        code = stop.code
    anew()
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    if not code:
        return ""
    assert code == 2
    assert lines[-1].startswith(("mimkit: ", "pytest: ", "__main__.py: ", "mimkit "))
    assert lines[-1].endswith(".")
    return lines[-1]


def seal(checkpoint):
    """Rewrite the manifest of hashes to match, as who can write the files can."""
    names = [file for file in checkpoint.iterdir() if file.name != "manifest.json"]
    (checkpoint / "manifest.json").write_text(json.dumps({file.name: digest(file) for file in names}))


def readers(root, made, monkeypatch):
    """What reads files in a copy of all that was made, by what it is given."""

    def mimkit(*argv):
        def call():
            monkeypatch.setattr(sys, "argv", ["mimkit", *map(str, argv)])
            cli.main()

        return call

    images = made[0] / "images"
    data, new = ["--data", str(images)], ["--out", str(root / "new")]
    run, encoder, tuned, converted = (root / name for name in ("run", "run/encoder", "tuned/last", "converted"))
    weights, picture = next(run.glob("checkpoints/*/model.safetensors")), root / "new/a.png"
    pretrain, tune = made[1:]
    again = ["--out", str(run), "--resume", "auto"], ["--out", str(root / "tuned"), "--resume", "auto"]
    return {
        "run": [lambda: mae_vit.main([*pretrain, *again[0]])],
        "init": [lambda: mae_vit.main([*pretrain, *new, "--init", str(run)])],
        "doctor": [mimkit("doctor", "--run", run)],
        "replay": [mimkit("replay", next(run.glob("replay/*")))],
        "push": [mimkit("push", run, "--to", "OWNER/NAME", "--dry-run")],
        "reconstruct": [mimkit("reconstruct", "--run", run, "--images", images, "--out", picture)],
        "encoder": [
            lambda: finetune.main([*tune, *new, "--model", str(run), "--dry-run"]),
            mimkit("knn", "--model", encoder, *data),
            mimkit("convert", "--from", encoder, "--dry-run", "--depths", "1-1-0-0", "--no-checks"),
        ],
        "tuned": [lambda: finetune.main([*tune, *again[1]])],
        "last": [
            lambda: finetune.main([*tune, *new, "--model", str(tuned), "--eval-only"]),
            mimkit("predict", "--model", tuned, "--images", images, "--out", root / "new/a.csv"),
            mimkit("export", "--model", tuned, "--out", root / "new/a.pt2"),
        ],
        "converted": [
            mimkit("convert", "--from", converted, "--to", "timm", "--dry-run", "--no-checks"),
            mimkit("knn", "--model", converted, *data),
        ],
        "config": [lambda: mae_vit.main(["--config", str(run / "config.yaml"), *new])],
        "weights": [
            mimkit("convert", "--from", "vit_tiny_patch16_224", "--checkpoint", weights, "--dry-run"),
            lambda: mae_vit.main([*pretrain, *new, "--init", str(weights)]),
        ],
    }


READ_AT = {  # files -> what reads them
    "run/config.yaml": ["run", "config", "doctor", "push", "replay"],
    "run/metrics.jsonl": ["run", "doctor", "push"],
    "run/encoder/config.json": ["encoder", "init", "reconstruct", "push"],
    "run/encoder/model.safetensors": ["encoder", "init", "reconstruct", "push"],
    "run/decoder/config.json": ["reconstruct"],
    "run/decoder/model.safetensors": ["init", "reconstruct"],
    "run/checkpoints/*/model.safetensors": ["weights", "run"],
    "run/checkpoints/*/optimizer.safetensors": ["run"],
    "run/checkpoints/*/state.json": ["run"],
    "run/checkpoints/*/manifest.json": ["run"],
    "run/replay/*/about.json": ["run", "replay"],
    "run/replay/*/rank-0/*": ["replay"],
    "run/replay/*/weights/*": ["replay"],
    "tuned/config.yaml": ["tuned"],
    "tuned/metrics.jsonl": ["tuned"],
    "tuned/checkpoints/*/*.safetensors": ["tuned"],
    "tuned/checkpoints/*/*.json": ["tuned"],
    "tuned/last/config.json": ["last"],
    "tuned/last/model.safetensors": ["last"],
    "converted/config.json": ["converted"],
    "converted/model.safetensors": ["converted"],
    "converted/report.*": ["converted"],
}


UNMISSED = ("run/metrics.jsonl", "tuned/metrics.jsonl", "converted/report.*")  # half a line in them is expected


def test_every_file_is_meant(made):
    """What a pickle takes the place of below is all that there is, but the pictures, which nothing reads."""
    root = made[0]
    meant = {file for kind in READ_AT for file in root.glob(kind)}
    others = {file for place in ("run", "tuned", "converted") for file in (root / place).rglob("*") if file.is_file()}
    assert {file.name for file in others - meant if "best" not in file.parts and file.suffix != ".png"} == set()


@pytest.mark.parametrize("protocol", [0, 4])  # 0 is text
@pytest.mark.parametrize("resealed", [False, True], ids=["manifest as it was", "manifest rewritten"])
@pytest.mark.parametrize("kind", READ_AT)
def test_a_pickle_in_the_place_of_a_file_is_not_run(kind, resealed, protocol, made, tmp_path, capsys, monkeypatch):
    """Its file in all checkpoints of a run at once, so that none is left to go on from."""
    if resealed and not (("checkpoints" in kind and "safetensors" in kind) or "state" in kind):
        pytest.skip("has no manifest")
    root, canary = tmp_path / "made", tmp_path / "canary"
    shutil.copytree(made[0], root)
    calls, found = readers(root, made, monkeypatch), list(root.glob(kind))
    assert found
    for file in found:
        file.write_bytes(trapped(canary, protocol))
        if resealed:
            seal(file.parent)
    for place in READ_AT[kind]:
        for call in calls[place]:
            shutil.rmtree(root / "new", ignore_errors=True)
            said = ends(capsys, call)
            assert not canary.exists()
            assert said or kind in UNMISSED


def test_a_manifest_names_files_of_its_checkpoint_and_all_that_is_read(made, tmp_path):
    checkpoint = tmp_path / "step-00000004"
    shutil.copytree(next((made[0] / "run/checkpoints").iterdir()), checkpoint)
    assert not verify_checkpoint(checkpoint)
    manifest = checkpoint / "manifest.json"
    own = json.loads(manifest.read_text())
    (tmp_path / "secret").write_text("outside")
    for name in ("../secret", str(tmp_path / "secret"), "nowhere"):
        manifest.write_text(json.dumps({**own, name: digest(tmp_path / "secret")}))
        assert verify_checkpoint(checkpoint) == f"{name}: not what was written"
    for content in ("[" * 100_000, "[]", "7", json.dumps({"state.json": None}), "{}"):
        manifest.write_text(content)
        assert verify_checkpoint(checkpoint)
    manifest.write_text(json.dumps(own))
    shutil.copy(checkpoint / "model.safetensors", checkpoint / "added.safetensors")
    assert verify_checkpoint(checkpoint) == "added.safetensors: not what was written"
    (checkpoint / "added.safetensors").rename(checkpoint / "mp_rank_!_model_states.pt")  # an engine would unpickle it
    assert verify_checkpoint(checkpoint) == "mp_rank_!_model_states.pt: not what was written"


def test_a_pickle_where_a_checkpoint_is_kept_that_goes(made, tmp_path):
    """Old checkpoints that cannot be read are left alone."""
    for step in (1, 2, 3):
        shutil.copytree(next((made[0] / "run/checkpoints").iterdir()), tmp_path / f"checkpoints/step-{step:08d}")
    (tmp_path / "checkpoints/step-00000001/state.json").write_bytes(trapped(tmp_path / "canary"))
    (tmp_path / "checkpoints/step-other").mkdir()
    trim(tmp_path, 3, 1)
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000001",
        "step-00000003",
        "step-other",
    ]
    assert not (tmp_path / "canary").exists()


# Pickles that torch reads, shards, configs --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.bin", "a.safetensors", "model/pytorch_model.bin"])
@pytest.mark.parametrize("write", [torch.save, lambda content, file: Path(file).write_bytes(pickle.dumps(content))])
def test_a_pickle_given_as_weights_is_not_run(write, name, tmp_path, capsys, monkeypatch):
    file, canary = tmp_path / name, tmp_path / "canary"
    file.parent.mkdir(exist_ok=True)
    write({"model": {"a": torch.ones(2), "b": Trap(canary)}}, file)
    if name.startswith("model"):
        about = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}}
        (file.parent / "config.json").write_text(json.dumps(about))
        argvs = [["knn", "--model", file.parent], ["convert", "--from", file.parent, "--dry-run"]]
        argvs += [["predict", "--model", file.parent, "--images", "sample"]]
    else:
        argvs = [["convert", "--from", "vit_tiny_patch16_224", "--checkpoint", file, "--dry-run"]]
    for argv in argvs:
        code, _, err = command(capsys, monkeypatch, *argv)
        assert code == 2
        assert "cannot be" in err
    assert not canary.exists()
    if file.suffix != ".safetensors":
        with suppress(RuntimeError):  # it would have run
            torch.load(file, weights_only=False)
        assert canary.exists()


def test_shards_lie_beside_their_index(tmp_path):
    (tmp_path / "model").mkdir()
    torch.save({"a": torch.ones(1)}, tmp_path / "outside.bin")
    for name in ("../outside.bin", str(tmp_path / "outside.bin"), "", ".", "..", 7, None):
        index = {"weight_map": {"a": name}}
        (tmp_path / "model/pytorch_model.bin.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match="where files beside it are needed"):
            read_weights(tmp_path / "model")


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch CANARY']",
        "!!python/object/new:os.system ['touch CANARY']",
        "!!python/object/apply:builtins.open ['CANARY', 'w']",
        "!!python/name:os.system",
        "!!python/module:os",
    ],
)
@pytest.mark.parametrize("key", ["data", "model_args", "seed", "unknown"])
def test_a_config_calls_nothing(tag, key, tmp_path, capsys):
    canary = tmp_path / "canary"
    tag = tag.replace("CANARY", str(canary))
    (tmp_path / "a.yaml").write_text(f"model: vit_tiny_patch16_224\n{key}: {tag}\n")
    for main in (mae_vit.main, finetune.main):
        assert ends(
            capsys, lambda main=main: main(["--config", str(tmp_path / "a.yaml"), "--out", str(tmp_path / "new")])
        )
        if key != "unknown":
            flag = f"--{key.replace('_', '-')}"
            assert ends(capsys, lambda main=main, flag=flag: main([flag, tag, "--out", str(tmp_path / "new")]))
    assert not canary.exists()
    assert not (tmp_path / "new").exists()


def test_a_config_imports_nothing(tmp_path, capsys, monkeypatch):
    """jsonargparse imports what a `class_path` names, while it parses, wherever anything may stand."""
    (tmp_path / "named.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'canary')!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    given = {"class_path": "named.Thing", "init_args": {}}
    (tmp_path / "a.yaml").write_text(json.dumps({"model_args": {"x": given}}))
    for main in (mae_vit.main, finetune.main):
        assert ends(
            capsys, lambda main=main: main(["--config", str(tmp_path / "a.yaml"), "--out", str(tmp_path / "new")])
        )
    convert = ["mimkit", "convert", "--from", "vit_tiny_patch16_224", "--source-args", json.dumps({"x": given})]
    monkeypatch.setattr(sys, "argv", [*convert, "--dry-run"])
    assert ends(capsys, cli.main)
    assert not (tmp_path / "canary").exists()
    import named  # noqa: F401  it would have

    assert (tmp_path / "canary").exists()


# Data ----------------------------------------------------------------------------------------------------------------


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    canary, buffer = tmp_path / "canary", io.BytesIO()
    np.save(buffer, np.array([Trap(canary)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        decode(buffer.getvalue())
    assert not canary.exists()


def test_a_program_is_no_image(monkeypatch):
    """PIL has ghostscript run EPS."""

    def run(*args, **kwargs):
        raise AssertionError("it ran")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    program = encoded(picture(), "EPS")
    with pytest.raises(AssertionError, match="it ran"):
        Image.open(io.BytesIO(program)).load()
    with pytest.raises(ValueError, match="EPS is a program"):
        decode(program)
    with pytest.raises(ValueError, match="EPS is a program"):
        read_mask({"bytes": program, "path": None})


def shard(file, *names):
    """A tar of pairs of an image and a class, and of links out of it."""
    with tarfile.open(file, "w") as tar:
        for i, name in enumerate(names):
            for ending, content in ((".png", encoded(picture(i))), (".cls", b"1")):
                info = tarfile.TarInfo(name + ending)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo("link")
            info.type, info.linkname = kind, "../../outside"
            tar.addfile(info)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_shard_writes_nothing_outside(streaming, tmp_path, monkeypatch):
    cache, inside = tmp_path / "cache", tmp_path / "a/b/c"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    names = ["../../evil", str(tmp_path / "absolute"), "../../../../evil", "good"]
    shard("a.tar", *names)
    source = open_source("a.tar", streaming=streaming)
    found = batches(source, batch_size=4, steps=1)
    assert found[0].images.shape[0] == 4
    left = {file for file in tmp_path.rglob("*") if not file.is_relative_to(cache)}
    assert left == {tmp_path / "a", tmp_path / "a/b", inside, inside / "a.tar"}
    assert not any("evil" in file.name or "absolute" in file.name for file in Path(cache).rglob("*"))


def test_code_of_a_data_set_is_refused(tmp_path, monkeypatch):
    """A script in the place where a hub's name would have one, and in a folder of data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/pictures.py").write_text("open('canary', 'w')\nimport datasets\n")
    for data in ("pictures/pictures.py", "pictures", "./pictures"):
        with pytest.raises(UserError, match="has no images"):
            open_source(data)
        with pytest.raises(UserError, match=r"could not be fetched|no such file"):
            _open_hub(data, True, False)
    assert not (tmp_path / "canary").exists()
