"""The options of recipes: groups, flags, presets and files."""

import json
import typing
from dataclasses import dataclass, fields

import pytest
import yaml
from conftest import RECIPES
from mimkit.recipes import finetune, mae, mae_hivit, simmim
from mimkit.recipes.mae import Options

from mimkit.config import PretrainOptions, RunOptions, _in_words, options_of, parse_recipe, presets
from mimkit.errors import UserError


def parse(*argv, options=Options, recipe="mae", small="mae_hivit_small"):
    return parse_recipe(options, "Pre-train.\n\nThe rest is not shown.", recipe, [str(word) for word in argv], small)


def refused(capsys, *argv, **more):
    """The sentence that ends a wrong command line."""
    with pytest.raises(SystemExit) as stop:
        parse(*argv, **more)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def changed(options, base):
    """The options that differ."""
    return {f.name: getattr(options, f.name) for f in fields(base) if getattr(options, f.name) != getattr(base, f.name)}


# Flags ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag", ["compile", "norm-targets", "multi-scale", "streaming", "dry-run", "grad-checkpointing"]
)
def test_a_switch_has_a_value_or_none(flag):
    name = flag.replace("-", "_")
    for argv, value in [
        ([f"--{flag}"], True),
        ([f"--{flag}", "true"], True),
        ([f"--{flag}", "yes"], True),
        ([f"--{flag}=true"], True),
        ([f"--{flag}", "false"], False),
        ([f"--{flag}=false"], False),
        ([f"--no-{flag}"], False),
        ([f"--{flag}", "--epochs", "7"], True),
        ([f"--no-{flag}", "--epochs", "7"], False),
    ]:
        options = parse(*argv)
        assert getattr(options, name) is value, argv
        assert changed(options, parse()).keys() <= {name, "epochs"}


def test_values_have_types_and_ranges(capsys):
    options = parse("--lr", "1e-3", "--betas", "[0.8,0.9]", "--mean", "[0.5]", "--img-size", "32x64", "--workers", "0")
    assert (options.lr, options.betas, options.mean, options.img_size) == (1e-3, (0.8, 0.9), [0.5], "32x64")
    assert options.workers == 0
    assert parse("--img-size", "64").img_size == 64
    assert parse("--model-args", "{embed_dim: 16}").model_args == {"embed_dim": 16}
    assert parse("--model-args.embed_dim", "16").model_args == {"embed_dim": 16}
    assert parse("--value-range", "-30,50").value_range == parse("--value-range=-30,50").value_range == (-30, 50)
    assert parse("--workers", "null", "--clip-grad", "null").workers is None
    for flag, value in [
        ("epochs", "0"),
        ("epochs", "many"),
        ("epochs", "inf"),
        ("batch-size", "2.5"),
        ("grad-accum-steps", "0"),
        ("lr", "nan"),
        ("seed", "-1"),
        ("save-every", "-1"),
        ("keep", "0"),
        ("compile", "maybe"),
        ("betas", "0.9"),
    ]:
        assert flag in refused(capsys, f"--{flag}", value).replace("_", "-")


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--epochs", "0", "a number above 0 and below 1e9"),
        ("--epochs", "many", "a number above 0 and below 1e9"),
        ("--batch-size", "2.5", "a whole number of at least 1"),
        ("--workers", "-1", "a whole number of at least 0, or null"),
        ("--mean", "x", "a list of numbers, such as [0.5,0.25], or null"),
        ("--betas", "[1, 2, 3]", "two numbers, such as [0.1,0.9]"),
        ("--model-args", "5", "names with values, such as {name: 3}"),
        ("--compile", "maybe", "true or false"),
        ("--mask-ratio", "x", "a number"),
    ],
)
def test_a_value_of_another_type_is_refused_in_plain_words(flag, value, expected, capsys, tmp_path):
    assert refused(capsys, flag, value).endswith(f": {flag} {value}: expected {expected}; see --help.")
    (tmp_path / "c.yaml").write_text(f"{flag[2:].replace('-', '_')}: {value}\n")
    assert f"{flag} {value}: expected {expected}; see" in refused(capsys, "--config", tmp_path / "c.yaml")


def test_every_type_of_an_option_has_plain_words():
    """An unknown type would be shown as Python writes it."""
    for recipe in RECIPES:
        for hint in typing.get_type_hints(recipe.Options).values():
            assert bool not in (hint, *typing.get_args(hint)) or hint in (bool, bool | None)
            assert "<class" not in _in_words(hint) or hint in (bool, bool | None), hint


def test_options_are_understood_with_hyphens_and_with_underscores(tmp_path, capsys):
    for flag in ("--batch-size", "--batch_size", "--batch_size=4"):
        assert parse(flag, *([] if "=" in flag else ["4"]), "--grad_accum-steps", "2").batch_size == 4
    assert parse("--model_args.embed_dim", "16").model_args == {"embed_dim": 16}
    assert parse("--norm_targets", "--no_multi_scale").multi_scale is False
    for flag in ("--print-config", "--print_config"):
        with pytest.raises(SystemExit) as stop:
            parse(flag)
        assert stop.value.code == 0
        assert "batch_size: 32" in capsys.readouterr().out
    (tmp_path / "c.yaml").write_text("batch_size: 4\ngrad_accum_steps: 2\nnorm_targets: false\n")
    options = parse("--config", tmp_path / "c.yaml")
    assert (options.batch_size, options.grad_accum_steps, options.norm_targets) == (4, 2, False)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--color", "red"], "--color"),
        (["stray"], "stray"),
        (["--model"], "--model"),
        (["--config"], "--config"),
        (["--model", "--epochs", "3"], "--model"),
        (["--config", "nothing.yaml"], "nothing.yaml"),
        (["--data", "a\0b"], "NUL character"),
        (["--model", "a\0b"], "NUL character"),
        (["--config", "a\0b"], "NUL character"),
        (["--out", "\0"], "NUL character"),
        (["--batch-sise", "4"], "Did you mean --batch-size"),
        (["--epohcs=4"], "Did you mean --epochs"),
        (["--config", "mae_hivit_smal"], "Did you mean mae_hivit_small"),
        (["--config", "nothing"], "Presets: mae_hivit_b_1600ep, mae_hivit_small"),
    ],
    ids=repr,
)
def test_a_wrong_command_line_is_one_sentence(argv, message, capsys):
    line = refused(capsys, *argv)
    assert message in line
    assert line.endswith(("; see --help.", "? See --help."))


@pytest.mark.parametrize("content", ["batch_sizes: 4\n", "epochs: many\n", "- a\n", "text", "{", "a: b: c"])
def test_a_wrong_file_is_one_sentence(content, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(content)
    assert refused(capsys, "--config", tmp_path / "c.yaml")


# Presets -------------------------------------------------------------------------------------------------------------


def test_without_a_model_the_small_preset_gives_the_defaults():
    small = yaml.safe_load(presets("mae")["mae_hivit_small"].read_text())
    options = parse()
    assert {name: getattr(options, name) for name in small} == small
    assert changed(options, Options()).keys() <= small.keys()
    options = parse("--epochs", "7")
    assert (options.model, options.epochs) == ("hivit_nano", 7)


def test_with_a_model_the_published_settings_of_its_family_are_the_defaults(tmp_path):
    assert changed(parse("--model", "hivit_b"), Options()) == {}
    assert changed(parse("--model=hivit_s"), Options()) == {"model": "hivit_s"}
    vit = {"model": "vit_base_patch16_224", "decoder_depth": 8, "epochs": 800.0, "blr": 1.5e-4}
    assert changed(parse("--model", "vit_base_patch16_224"), Options()) == vit
    assert changed(parse("--model", "vit_base_patch16_224", "--epochs", "3"), Options()) == vit | {"epochs": 3.0}
    assert changed(parse("--model", "svit_b"), Options()) == {"model": "svit_b", "mask_ratio": 0.6}
    # a network in a folder is of the family that its config.json names
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    assert changed(parse("--model", tmp_path), Options()) == vit | {"model": str(tmp_path)}
    for content in ("[]", "{", ""):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config.json .*\. Get another copy of it\.$"):
            parse("--model", tmp_path)
    swin = parse(
        "--model", "swin_base_patch4_window7_224", options=simmim.Options, recipe="simmim", small="simmim_swin_small"
    )
    assert swin.model_args == {"window_size": 6}


def test_a_config_replaces_the_small_preset(tmp_path):
    (tmp_path / "c.yaml").write_text("model: svit_s\nepochs: 2\n")
    options = parse("--config", tmp_path / "c.yaml")
    assert changed(options, Options()) == {"model": "svit_s", "epochs": 2.0}
    assert parse("--config", tmp_path / "c.yaml", "--epochs", "7").epochs == 7
    assert parse(f"--config={tmp_path}/c.yaml", "--model", "vit_base_patch16_224").decoder_depth == 6


def test_a_preset_has_a_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for argv in (["--config", "mae_vit_small"], ["--config=mae_vit_small"]):
        options = parse(*argv)
        assert (options.model, options.model_args["embed_dim"]) == ("vit_tiny_patch16_224", 128)
    assert parse("--config", "mae_vit_small", "--epochs", "7").epochs == 7


@pytest.mark.parametrize("recipe", [mae, simmim, finetune], ids=lambda recipe: recipe.__name__.split(".")[-1])
def test_every_preset_is_understood(recipe):
    name = recipe.__name__.split(".")[-1]
    shipped = presets(name)
    assert len(shipped) > 3
    for preset, file in shipped.items():
        options = parse("--config", preset, options=recipe.Options, recipe=name)
        given = yaml.safe_load(file.read_text())
        assert json.loads(json.dumps({key: getattr(options, key) for key in given})) == given, preset


def test_the_run_that_a_small_preset_starts_from_keeps_it():
    """`finetune.py --model runs/mae_hivit` is the small fine-tuning, as without --model."""
    more = {"options": finetune.Options, "recipe": "finetune", "small": None}
    small = parse(**more)
    for model in (small.model, f"{small.model}/"):
        assert changed(parse("--model", model, **more), small).keys() <= {"model"}
    assert parse("--model", "hivit_b", **more).epochs == finetune.Options.epochs


def test_mae_hivit_has_the_options_of_mae(monkeypatch):
    ran = []
    monkeypatch.setattr(mae, "main", lambda *argv, **more: ran.append((argv, more)))
    mae_hivit.main(["--epochs", "3"])
    assert ran == [((["--epochs", "3"], None), {"name": "mae_hivit"})]
    assert mae_hivit.Options is mae.Options


# Groups and help -----------------------------------------------------------------------------------------------------


def test_help_shows_groups_and_published_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    titles = [line for line in printed.splitlines() if line.endswith(":") and not line.startswith(" ")]
    starts = ["options", "Model", "Data", "Schedule", "Optimizer", "Run", "Pre-training", "Recipe"]
    assert [title.split(":")[0] for title in titles] == starts
    words = " ".join(printed.split())
    assert "Pre-train. Presets for --config: mae_hivit_b_1600ep, mae_hivit_small," in words
    assert "The rest is not shown" not in words
    for text in ("--batch-size BATCH_SIZE Images per step, over all", "Width of the decoder.", "default: 1600.0"):
        assert text in words
    recipe = words[words.index("Recipe:") :]
    assert "--decoder-dim" in recipe
    assert "--batch-size" not in recipe  # a recipe's own default moves no option out of its group


def test_a_recipe_is_a_composition_of_groups():
    @dataclass
    class Recipe(PretrainOptions):
        """One more option.

        Args:
            width: Width of something.
        """

        model: str = "hivit_b"
        width: int = 3
        keep: int = 5  # another default

    options = parse("--model", "hivit_b", "--width", "4", options=Recipe)
    assert (options.width, options.keep) == (4, 5)
    group = options_of(RunOptions, options)
    assert group.keys() == {f.name for f in fields(RunOptions)}
    assert (group["keep"], group["seed"]) == (5, 0)


def test_an_option_without_help_is_an_error_of_the_recipe():
    @dataclass
    class Recipe(PretrainOptions):
        """No help.

        Args:
            other: Something else.
        """

        width: int = 3

    with pytest.raises(KeyError, match="width"):
        parse(options=Recipe)


def test_a_config_of_a_run_continues_that_run_wherever_it_was_moved(tmp_path):
    run = tmp_path / "moved"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("out: runs/before\nbatch_size: 4\n")
    assert parse("--config", run / "config.yaml", "--resume", "auto").out == str(run)
    assert parse("--config", run / "config.yaml", "--out", "other").out == "other"
    (run / "checkpoints").rmdir()
    assert parse("--config", run / "config.yaml").out == "runs/before"


def test_arguments_of_the_network_do_not_repeat_options():
    with pytest.raises(UserError, match="--model-args has img_size, which follows from another option"):
        parse("--model-args", "{img_size: 32}")
