"""Malformed input: whatever a command or a recipe is given, it ends with one sentence and leaves no partial output."""

import contextlib
import dataclasses
import inspect
import io
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from conftest import RECIPES, picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mimkit.recipes import detect, finetune, linear_probe, mae, mae_hivit, segment, simmim
from safetensors.torch import save_file

from mimkit import cli
from mimkit.data.sample import Sample, collate
from mimkit.errors import UserError
from mimkit.io.weights import write_model
from mimkit.methods.checkpoint import write_decoder
from mimkit.methods.decoder import Decoder
from mimkit.training.replay import save_batch, save_weights
from mimkit.training.run import Run

EXAMPLES = settings(
    max_examples=int(os.environ.get("MALFORMED", 12)),
    derandomize="MALFORMED" not in os.environ,  # for more examples: MALFORMED=1000 pytest tests/cli/test_malformed.py
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
PATHS = ("--config", "--data", "--images", "--model", "--init", "--resume", "--run", "--from", "--checkpoint", "--out")
COMMANDS = cli.COMMANDS
TRAINS = "it would train"

# Valid and broken files, and a folder to work in -----------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Write a small model, a run and images, and broken files of each kind."""
    root = tmp_path_factory.mktemp("root")
    for i in range(12):
        for file in (root / f"images/class{i % 2}/{i}.png", root / f"plain/{i}.png"):
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(i, (16, 16)).save(file)
    about = {"input_size": (3, 32, 32), "mean": [0.5] * 3, "std": [0.5] * 3}
    write_model(timm.create_model("hivit_nano", num_classes=2, img_size=32), root / "model", **about)
    encoder = timm.create_model("hivit_nano", num_classes=0, img_size=32, unit_form=True)
    write_model(encoder, root / "run/encoder", **about)
    decoder = Decoder(encoder.out_dim, encoder.unit_size, 3, 24, 1, 4)
    write_decoder(decoder, root / "run/decoder", mask_ratio=0.75, norm_targets=True)
    step = root / "run/replay/step-00000003"
    save_batch(step, 0, [collate([Sample(torch.rand(3, 32, 32), torch.rand(4), -1, "a")] * 4)])
    save_weights(step, encoder, "mae_hivit", 3, "its loss is not finite")
    (root / "run/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    options = mae_hivit.Options(
        model="hivit_nano", img_size=32, batch_size=4, epochs=1.0, warmup_epochs=0.0, data="sample"
    )
    (root / "run/config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(options)))
    vit = timm.create_model("vit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=2, num_classes=2, img_size=32)
    write_model(vit, root / "vit", **about)

    valid = (root / "model/model.safetensors").read_bytes()
    torch.save({"model": {"a": torch.ones(3)}}, root / "valid.pth")
    broken = {
        "empty": b"",
        "binary": bytes(range(256)) * 9,
        "text": b"no weights, no images\n",
        "cut.safetensors": valid[: len(valid) // 2],
        "header.safetensors": b"\xff" * 8 + valid[8:],
        "dtype.safetensors": valid[:8] + valid[8:].replace(b'"F32"', b'"I64"', 1),
        "deep.safetensors": (100_000).to_bytes(8, "little") + b"[" * 100_000,
        "text.safetensors": b"text",
        "pickle.safetensors": pickle.dumps({"a": 1}),
        "pickle.pth": pickle.dumps({"a": print}),
        "text.pth": b"text",
        "empty.pth": b"",
        "cut.pth": (root / "valid.pth").read_bytes()[:300],
        "cut.png": (root / "plain/0.png").read_bytes()[:60],
        "broken.parquet": b"PAR1 torn",
        "broken.tar": b"torn" * 200,
        "empty.npy": b"",
        "classes.json": b'{"images": 1, "annotations": [], "categories": []}',
        "no.yaml": b"model: [unclosed\n\t- }",
        "list.yaml": b"- 1\n- 2\n",
        "word.yaml": b"word",
        "binary.yaml": b"\x80\x81",
        "deep.yaml": b"[" * 3000,
        "alias.yaml": b"model_args: &a {x: *a}\n",
        "nul.yaml": b'data: "a\\0b"\nmodel: "a\\0b"\nout: "a\\0b"\n',
        "unknown.yaml": b"color: red\n",
        "twice.yaml": b"config: twice.yaml\n",
        "n\new\nlines.yaml": b"seed: [\n",
        "\u00fcn\u00ef\u4e2d\U0001f600": b"",
    }
    for name, content in broken.items():
        (root / name).write_bytes(content)
    for name, value in (("list.pth", [1]), ("number.pth", 7), ("nested.pth", {"model": {"model": {}}})):
        torch.save(value, root / name)
    save_file({"a": torch.ones(2)}, root / "other.safetensors")
    for name in ("folder", "new\nline/broken", "broken/checkpoints/step-00000001", "broken/checkpoints/step-x"):
        (root / name).mkdir(parents=True)
    shutil.copy(root / "cut.png", root / "new\nline/broken/a.png")
    (root / "broken/config.yaml").write_text("word")
    (root / "dense").mkdir()
    (root / "dense/segmenter.json").write_text('{"in_chans": 3}')
    (root / "dense/model.safetensors").write_bytes(valid)
    (root / "loop").symlink_to(root / "loop")
    return root


@contextlib.contextmanager
def working(root):
    """Work in an empty folder, and stop each recipe before it trains."""
    work, before = root / "work", Path.cwd()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()

    def prepare(*args, **kwargs):
        raise UserError(f"Nothing is wrong: {TRAINS}.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "prepare", prepare)
        patch.chdir(work)
        yield
    os.chdir(before)


def files(root):
    return {file for file in root.rglob("*") if not file.is_relative_to(root / "damaged")}


def check(root, main, *argv):
    """Assert that `main` ends as it should, and return the last line of stderr if it refused."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with working(root):
        before = files(root)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["mimkit", *argv])
            try:
                main() if main is cli.main else main(list(argv))
            except SystemExit as stop:
                code = stop.code or 0
            finally:
                AcceleratorState._reset_state(reset_partial_state=True)
                GradientState._reset_state()
        lines = err.getvalue().splitlines()
        assert "Traceback" not in err.getvalue() + out.getvalue()
        assert "likely a bug" not in err.getvalue()
        if code == 1:
            assert argv[0] == "doctor"  # it found a problem and reported it
            return ""
        if code:
            assert code == 2
            assert ": " in lines[-1]
            assert len(lines[-1]) <= 300
            if TRAINS not in lines[-1]:
                assert files(root) == before
        assert not [
            file for file in files(root) - before if "mimkit-" in file.name or file.name.startswith(f".{os.getpid()}")
        ]
    return lines[-1] if code else ""


# Arguments ------------------------------------------------------------------------------------------------------

WORDS = st.text(max_size=12).filter(lambda word: not word.startswith(("/", "~", "-")) and ".." not in word)
ODD = [
    *(
        "",
        " ",
        ".",
        "..",
        "null",
        "true",
        "-1",
        "0",
        "1e400",
        "nan",
        "-inf",
        "1e30",
        "1e39",
        "1e308",
        "0x10",
        "9" * 30,
        "1.5",
        "[]",
    ),
    *("{}", "[1,2,3]", "[nan,1]", "{a: b}", "[[[[1]]]]", "[" * 2000, "a\0b", "a\nb", "\udc80", "\u202e", "x" * 5000),
    *(
        "*",
        "?x[",
        "folder/..",
        "con:x",
        "hf-hub:a/b",
        "local-dir:a",
        "a/b",
        "a/b/c",
        "resnet18",
        "runs/x",
        "hivit_nano",
    ),
    *("vit_tiny_patch16_224.no", "swin_tiny_patch4_window7_224", "fp16", "uppernet", "0x0", "32x64", "1x2x3", "\u00b2"),
    *("x.onnx", "x.csv"),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | WORDS | st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


def values(root):
    """Draw a value of a flag: an odd word, or a path to something broken, of another kind, or missing."""
    paths = [str(file) for file in sorted(root.iterdir())]
    paths += [f"{path}/" for path in paths] + [f"{path}/below" for path in paths]
    return st.one_of(st.sampled_from(ODD), st.sampled_from(paths), WORDS, JSON.map(lambda value: json.dumps(value)))


def argvs(root, flags):
    """Draw one to three flags, most of them known, in both notations, and sometimes a stray word."""
    paths = [name for name in PATHS if name in flags]  # drawn more often, because they are looked up first
    names = st.sampled_from(paths or flags) | st.sampled_from(flags) | st.sampled_from(["--color", "--", "-x", "--Out"])
    pairs = st.tuples(names, values(root), st.booleans())
    words = pairs.map(lambda pair: [f"{pair[0]}={pair[1]}"] if pair[2] else [pair[0], pair[1]])
    stray = values(root).map(lambda word: [word])
    return st.lists(words | words | words | stray, min_size=1, max_size=3).map(
        lambda lists: [word for words in lists for word in words]
    )


def flag(name):
    return f"--{name.rstrip('_').replace('_', '-')}"


def base(root, program):
    """Return valid arguments."""
    model, images = ["--model", str(root / "model")], ["--data", str(root / "images")]
    if program is cli.convert:
        return ["--from", str(root / "vit"), "--no-checks", "--out", "out", "--depths", "1-1-0-0"]
    if program is cli.models:
        return ["--img-size", "30"]
    if program in (cli.knn, cli.probe):
        return [*model, *images]
    if program is cli.reconstruct:
        return ["--run", str(root / "run"), "--images", str(root / "plain")]
    if program is cli.predict:
        return [*model, "--images", str(root / "plain")]
    if program is cli.export:
        return [*model, "--out", "x.txt"]  # refused, because torch's export takes seconds
    if program is cli.push:
        return [str(root / "model"), "--to", "a/b", "--dry-run"]
    if program is cli.doctor:
        return ["--run", str(root / "run")]
    if program is cli.replay:
        return [str(root / "run/replay/step-00000003")]
    small = ["--batch-size", "4", "--workers", "0", "--out", "out", "--precision", "fp32", *images]
    if program in (mae, mae_hivit):
        decoder = ["--decoder-dim", "24", "--decoder-depth", "1", "--decoder-heads", "2"]
        return [*small, "--model", "hivit_nano", "--img-size", "32", *decoder]
    if program is simmim:
        shape = "{embed_dim: 8, depths: [1, 1, 1, 1], window_size: 4}"
        return [*small, "--model", "swin_tiny_patch4_window7_224", "--img-size", "64", "--model-args", shape]
    return [*model, *small]


def options_of(program):
    """Return the flags of a command or a recipe."""
    if program in COMMANDS:
        return list(map(flag, inspect.signature(program).parameters))
    return ["--config", *(flag(field.name) for field in dataclasses.fields(program.Options))]


def run(root, program, *argv):
    if program in COMMANDS:
        return check(root, cli.main, program.__name__, *argv)
    return check(root, program.main, *argv)


def test_valid_arguments_are_not_refused(root):
    for program in RECIPES:
        if program not in (segment, detect):
            said = run(root, program, *base(root, program), "--epochs", "2", "--warmup-epochs", "0")
            assert TRAINS in said, said
    assert TRAINS in run(root, cli.replay, *base(root, cli.replay))
    for program in COMMANDS:
        if program not in (cli.models, cli.export, cli.knn, cli.replay):
            assert not run(root, program, *base(root, program))


@pytest.mark.parametrize("program", [*COMMANDS, *RECIPES], ids=lambda program: program.__name__.split(".")[-1])
def test_wrong_flags_are_refused(program, root):
    @EXAMPLES
    @given(argvs(root, options_of(program)))
    def malformed(argv):
        run(root, program, *base(root, program), *argv)

    malformed()


@EXAMPLES
@given(st.data())
def test_wrong_words_after_mimkit_are_refused(root, data):
    check(root, cli.main, *data.draw(st.lists(values(root), max_size=3)))


@EXAMPLES
@given(st.data())
def test_wrong_configs_are_refused(root, data):
    """A YAML file holds odd values under the names of options and under other names."""
    program = data.draw(st.sampled_from(RECIPES))
    names = [field.name for field in dataclasses.fields(program.Options)]
    content = data.draw(st.dictionaries(st.sampled_from(names) | WORDS, JSON | values(root), max_size=3) | JSON)
    try:
        text = yaml.safe_dump(content, allow_unicode=data.draw(st.booleans()))
        (root / "damaged.yaml").write_text(text)
    except UnicodeEncodeError:
        return
    run(root, program, *base(root, program), "--config", str(root / "damaged.yaml"))


@EXAMPLES
@given(st.data())
def test_damaged_config_json_is_refused(root, data):
    """A config.json has another value somewhere, and each of its readers gets it."""
    kind = data.draw(st.sampled_from(["model", "run", "vit"]))
    shutil.rmtree(root / "damaged", ignore_errors=True)
    shutil.copytree(root / kind, root / "damaged/copy")
    folder = root / "damaged/copy"
    file = data.draw(st.sampled_from(sorted(folder.rglob("config.json"))))
    content = json.loads(file.read_text())
    level, key = content, data.draw(st.sampled_from(sorted(content)))
    while isinstance(level[key], dict) and level[key] and data.draw(st.integers(0, 2)):
        level, key = level[key], data.draw(st.sampled_from(sorted(level[key])))
    if data.draw(st.booleans()):
        level[key] = data.draw(JSON)
    else:
        del level[key]
    file.write_text(json.dumps(content))
    images, model = str(root / "images"), str(folder / "encoder" if kind == "run" else folder)
    small = ["--batch-size", "4", "--workers", "0", "--out", "out", "--data", images]
    readers = [
        [cli.knn, "--model", model, "--data", images],
        [cli.predict, "--model", model, "--images", images],
        [cli.convert, "--from", model, "--no-checks", "--dry-run"],
        [finetune, *small, "--model", str(folder)],
        [linear_probe, *small, "--model", str(folder)],
        [segment, *small, "--model", str(folder)],
    ]
    if kind == "run":
        readers += [
            [mae_hivit, *small, "--init", str(folder)],
            [cli.reconstruct, "--run", str(folder), "--images", images],
        ]
    run(root, *data.draw(st.sampled_from(readers)))


@EXAMPLES
@given(st.data())
def test_damaged_weights_are_refused(root, data):
    """Bytes of weight files are cut off, changed or inserted, also in the header of names and shapes."""
    shutil.rmtree(root / "damaged", ignore_errors=True)
    shutil.copytree(root / "vit", root / "damaged/vit")
    for name in ("model.safetensors", "a.pth"):
        file = root / "damaged/vit" / name
        content = (root / "vit/model.safetensors" if name.startswith("model") else root / "valid.pth").read_bytes()
        at = data.draw(st.integers(0, 1500) | st.integers(0, len(content)))
        middle, gap = data.draw(st.binary(max_size=8)), data.draw(st.integers(0, 8) | st.just(len(content)))
        file.write_bytes(content[:at] + middle + content[at + gap :])
    model, weights = str(root / "damaged/vit"), str(root / "damaged/vit/a.pth")
    readers = [
        [cli.predict, "--model", model, "--images", str(root / "plain")],
        [cli.convert, "--from", model, "--no-checks", "--dry-run", "--depths", "1-1-0-0"],
        [cli.convert, "--from", "vit_tiny_patch16_224", "--checkpoint", weights, "--dry-run"],
        [mae_hivit, *base(root, mae_hivit), "--init", model],
    ]
    run(root, *data.draw(st.sampled_from(readers)))
