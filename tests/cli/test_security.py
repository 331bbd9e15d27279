"""Nothing in a config, a checkpoint or a data set is executed."""

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
from mimkit.recipes import finetune, mae
from PIL import EpsImagePlugin, Image

import mimkit
from mimkit import cli
from mimkit.data.decode import decode
from mimkit.data.find import _find_hub_parts
from mimkit.data.segmentation import read_mask
from mimkit.data.sources import open_source
from mimkit.errors import UserError
from mimkit.io.weights import read_weights
from mimkit.training.checkpoint import digest, remove_old, verify_checkpoint
from mimkit.training.run import Run

PACKAGES = [Path(package.__path__[0]) for package in (mimkit, mimkit.recipes, mimkit.converters)]
FILES = sorted(file for package in PACKAGES for file in package.rglob("*.py"))
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def dangers(code: str) -> list[str]:
    """Return the calls and imports by which a file that is read could run code or write anywhere."""
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


def test_all_rooms_are_searched():
    assert {"cli.py", "io/weights.py", "training/checkpoint.py"} <= {
        file.relative_to(PACKAGES[0]).as_posix() for file in FILES if file.is_relative_to(PACKAGES[0])
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_our_code_does_not_execute_what_it_reads(file):
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
def test_the_search_finds_each_danger(code):
    assert dangers(code)


# A pickle in place of each file --------------------------------------------------------------------------------

SMALL = ["--workers", "0", "--batch-size", "8", "--save-every", "1"]


class Trap:
    """An object whose pickle creates the file `canary`."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


def pickled_trap(canary, protocol=4):
    return pickle.dumps({"model": Trap(canary)}, protocol)


def reset_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Write images, a pre-training run with a skipped step, a fine-tuning of it, and a conversion of its encoder."""
    root = tmp_path_factory.mktemp("made")
    for i in range(16):
        file = root / "images" / f"class{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(file)
    data = ["--data", str(root / "images")]
    args = ["--model-args", "{embed_dim: 32, depth: 2, num_heads: 2}", "--decoder-dim", "24", "--epochs", "2"]
    pretrain = ["--config", "mae_vit_small", *data, "--out", str(root / "run"), *SMALL, *args, "--knn-every", "0"]
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

    def record_nan(run, **values):
        record(run, **{name: value * (torch.nan if run.step == 1 else 1) for name, value in values.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "record", record_nan)  # so that the run skips a step and keeps it for a replay
        mae.main(pretrain)
        reset_accelerate()
        patch.undo()
        finetune.main(tune)
        reset_accelerate()
        convert = ["convert", "--from", root / "run/encoder", "--to", "hpvit", "--depths", "1-1-0-0", "--no-checks"]
        patch.setattr(sys, "argv", ["mimkit", *map(str, convert), "--out", str(root / "converted")])
        cli.main()
    return root, pretrain, tune


def ends(capsys, call):
    """Assert that a call ends cleanly, or with exit code 2 and one sentence, and return the sentence."""
    code = 0
    capsys.readouterr()
    try:
        call()
    except SystemExit as stop:
        code = stop.code
    reset_accelerate()
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    if not code:
        return ""
    assert code == 2
    assert lines[-1].startswith(("mimkit: ", "pytest: ", "__main__.py: ", "mimkit "))
    assert lines[-1].endswith(".")
    return lines[-1]


def seal(checkpoint):
    """Rewrite the manifest of hashes so that it matches, as anyone can who can write the files."""
    names = [file for file in checkpoint.iterdir() if file.name != "manifest.json"]
    (checkpoint / "manifest.json").write_text(json.dumps({file.name: digest(file) for file in names}))


def readers(root, made, monkeypatch):
    """Return the calls that read the files in a copy of `made`, by what they are given."""

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
    resume = [["--out", str(root / name), "--resume", "auto"] for name in ("run", "tuned")]
    return {
        "run": [lambda: mae.main([*pretrain, *resume[0]])],
        "init": [lambda: mae.main([*pretrain, *new, "--init", str(run)])],
        "doctor": [mimkit("doctor", "--run", run)],
        "replay": [mimkit("replay", next(run.glob("replay/*")))],
        "push": [mimkit("push", run, "--to", "OWNER/NAME", "--dry-run")],
        "reconstruct": [mimkit("reconstruct", "--run", run, "--images", images, "--out", picture)],
        "encoder": [
            lambda: finetune.main([*tune, *new, "--model", str(run), "--dry-run"]),
            mimkit("knn", "--model", encoder, *data),
            mimkit("convert", "--from", encoder, "--dry-run", "--depths", "1-1-0-0", "--no-checks"),
        ],
        "tuned": [lambda: finetune.main([*tune, *resume[1]])],
        "last": [
            lambda: finetune.main([*tune, *new, "--model", str(tuned), "--eval-only"]),
            mimkit("predict", "--model", tuned, "--images", images, "--out", root / "new/a.csv"),
            mimkit("export", "--model", tuned, "--out", root / "new/a.pt2"),
        ],
        "converted": [
            mimkit("convert", "--from", converted, "--to", "timm", "--dry-run", "--no-checks"),
            mimkit("knn", "--model", converted, *data),
        ],
        "config": [lambda: mae.main(["--config", str(run / "config.yaml"), *new])],
        "weights": [
            mimkit("convert", "--from", "vit_tiny_patch16_224", "--checkpoint", weights, "--dry-run"),
            lambda: mae.main([*pretrain, *new, "--init", str(weights)]),
        ],
    }


READ_AT = {  # files -> keys of `readers`
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


NOT_REFUSED = ("run/metrics.jsonl", "tuned/metrics.jsonl", "converted/report.*")  # a killed run leaves half a line


def test_every_file_is_tested(made):
    """`READ_AT` lists all files that mimkit writes, except pictures and names of classes, which nothing reads."""
    root = made[0]
    listed = {file for kind in READ_AT for file in root.glob(kind)}
    written = {file for name in ("run", "tuned", "converted") for file in (root / name).rglob("*") if file.is_file()}
    left = {file.name for file in written - listed if "best" not in file.parts and file.suffix != ".png"}
    assert left == {"classes.json"}


def in_manifest(kind):
    """Return whether a manifest has the hash of a file."""
    return ("checkpoints" in kind and "safetensors" in kind) or "state" in kind


@pytest.mark.parametrize("protocol", [0, 4])  # 0 is text
@pytest.mark.parametrize(
    ("kind", "manifest"),
    [(kind, "old") for kind in READ_AT] + [(kind, "new") for kind in READ_AT if in_manifest(kind)],
)
def test_a_pickle_in_place_of_a_file_is_not_executed(kind, manifest, protocol, made, tmp_path, capsys, monkeypatch):
    """The file is replaced in all checkpoints of the run, so that the run cannot resume from another one."""
    root, canary = tmp_path / "made", tmp_path / "canary"
    shutil.copytree(made[0], root)
    calls, files = readers(root, made, monkeypatch), list(root.glob(kind))
    assert files
    for file in files:
        file.write_bytes(pickled_trap(canary, protocol))
        if manifest == "new":
            seal(file.parent)
    for reader in READ_AT[kind]:
        for call in calls[reader]:
            shutil.rmtree(root / "new", ignore_errors=True)
            said = ends(capsys, call)
            assert not canary.exists()
            assert said or kind in NOT_REFUSED


def test_a_manifest_lists_exactly_the_files_of_its_checkpoint(made, tmp_path):
    checkpoint = tmp_path / "step-00000004"
    shutil.copytree(next((made[0] / "run/checkpoints").iterdir()), checkpoint)
    assert not verify_checkpoint(checkpoint)
    manifest = checkpoint / "manifest.json"
    own = json.loads(manifest.read_text())
    (tmp_path / "secret").write_text("outside")
    for name in ("../secret", str(tmp_path / "secret"), "nowhere"):
        manifest.write_text(json.dumps({**own, name: digest(tmp_path / "secret")}))
        assert verify_checkpoint(checkpoint) == f"{name} differ from what was written"
    for content in ("[" * 100_000, "[]", "7", json.dumps({"state.json": None}), "{}"):
        manifest.write_text(content)
        assert verify_checkpoint(checkpoint)
    manifest.write_text(json.dumps(own))
    shutil.copy(checkpoint / "model.safetensors", checkpoint / "added.safetensors")
    assert verify_checkpoint(checkpoint) == "added.safetensors differ from what was written"
    (checkpoint / "added.safetensors").rename(checkpoint / "mp_rank_!_model_states.pt")  # DeepSpeed would unpickle it
    assert verify_checkpoint(checkpoint) == "mp_rank_!_model_states.pt differ from what was written"


def test_a_pickle_in_an_old_checkpoint_is_not_executed(made, tmp_path):
    """Old checkpoints that cannot be read are not removed."""
    for step in (1, 2, 3):
        shutil.copytree(next((made[0] / "run/checkpoints").iterdir()), tmp_path / f"checkpoints/step-{step:08d}")
    (tmp_path / "checkpoints/step-00000001/state.json").write_bytes(pickled_trap(tmp_path / "canary"))
    (tmp_path / "checkpoints/step-other").mkdir()
    remove_old(tmp_path, 3, 1)
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000001",
        "step-00000003",
        "step-other",
    ]
    assert not (tmp_path / "canary").exists()


# Weights, shards and configs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.bin", "a.safetensors", "model/pytorch_model.bin"])
@pytest.mark.parametrize("write", [torch.save, lambda content, file: Path(file).write_bytes(pickle.dumps(content))])
def test_a_pickle_given_as_weights_is_not_executed(write, name, tmp_path, capsys, monkeypatch):
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
        with suppress(RuntimeError):  # the trap works where it is not guarded against
            torch.load(file, weights_only=False)
        assert canary.exists()


def test_shards_must_be_in_the_folder_of_their_index(tmp_path):
    (tmp_path / "model").mkdir()
    torch.save({"a": torch.ones(1)}, tmp_path / "outside.bin")
    for name in ("../outside.bin", str(tmp_path / "outside.bin"), "", ".", "..", 7, None):
        index = {"weight_map": {"a": name}}
        (tmp_path / "model/pytorch_model.bin.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match="but files in its own folder are needed"):
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
def test_a_config_cannot_call_functions(tag, key, tmp_path, capsys):
    canary = tmp_path / "canary"
    tag = tag.replace("CANARY", str(canary))
    (tmp_path / "a.yaml").write_text(f"model: vit_tiny_patch16_224\n{key}: {tag}\n")
    for main in (mae.main, finetune.main):
        assert ends(
            capsys, lambda main=main: main(["--config", str(tmp_path / "a.yaml"), "--out", str(tmp_path / "new")])
        )
        if key != "unknown":
            flag = f"--{key.replace('_', '-')}"
            assert ends(capsys, lambda main=main, flag=flag: main([flag, tag, "--out", str(tmp_path / "new")]))
    assert not canary.exists()
    assert not (tmp_path / "new").exists()


def test_a_config_cannot_import_modules(tmp_path, capsys, monkeypatch):
    """jsonargparse would import the `class_path` of any value whose type is Any."""
    (tmp_path / "named.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'canary')!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    given = {"class_path": "named.Thing", "init_args": {}}
    (tmp_path / "a.yaml").write_text(json.dumps({"model_args": {"x": given}}))
    for main in (mae.main, finetune.main):
        assert ends(
            capsys, lambda main=main: main(["--config", str(tmp_path / "a.yaml"), "--out", str(tmp_path / "new")])
        )
    convert = ["mimkit", "convert", "--from", "vit_tiny_patch16_224", "--source-args", json.dumps({"x": given})]
    monkeypatch.setattr(sys, "argv", [*convert, "--dry-run"])
    assert ends(capsys, cli.main)
    assert not (tmp_path / "canary").exists()
    import named  # noqa: F401  the trap works where it is not guarded against

    assert (tmp_path / "canary").exists()


# Data ----------------------------------------------------------------------------------------------------------------


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    canary, buffer = tmp_path / "canary", io.BytesIO()
    np.save(buffer, np.array([Trap(canary)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        decode(buffer.getvalue())
    assert not canary.exists()


def test_eps_images_are_refused(monkeypatch):
    """PIL would let ghostscript run an EPS image, which is a program."""

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
    """Write a tar of images, their classes, and links to files outside."""
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
def test_a_shard_cannot_write_outside(streaming, tmp_path, monkeypatch):
    cache, inside = tmp_path / "cache", tmp_path / "a/b/c"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    names = ["../../evil", str(tmp_path / "absolute"), "../../../../evil", "good"]
    shard("a.tar", *names)
    source = open_source("a.tar", streaming=streaming)
    loaded = batches(source, batch_size=4, steps=1)
    assert loaded[0].images.shape[0] == 4
    left = {file for file in tmp_path.rglob("*") if not file.is_relative_to(cache)}
    assert left == {tmp_path / "a", tmp_path / "a/b", inside, inside / "a.tar"}
    assert not any("evil" in file.name or "absolute" in file.name for file in Path(cache).rglob("*"))


def test_the_script_of_a_data_set_is_not_executed(tmp_path, monkeypatch):
    """The script has the name that the hub expects, and is in a folder of data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/pictures.py").write_text("open('canary', 'w')\nimport datasets\n")
    for data in ("pictures/pictures.py", "pictures", "./pictures"):
        with pytest.raises(UserError, match="has no images"):
            open_source(data)
        with pytest.raises(UserError, match=r"could not be fetched|no such file"):
            _find_hub_parts(data)
    assert not (tmp_path / "canary").exists()
