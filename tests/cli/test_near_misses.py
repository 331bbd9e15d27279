"""Names and commands that are almost right are refused at once, with what to type instead."""

import re

import datasets
import pytest
from conftest import RECIPES, command

from mimkit import cli
from mimkit.conversion.family import check_model
from mimkit.conversion.source import find_source
from mimkit.data.sources import open_source
from mimkit.errors import UserError


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("hivit_nanoo", "Did you mean hivit_nano or"),
        ("HiViT-B", "Did you mean hivit_b, hivit_b24"),
        ("vit_base_patch16", "Did you mean vit_base_patch16_224,"),
        ("vit_b_mae", "Pass --model vit_base_patch16_224.mae instead"),
        ("vit_base_patch16_224.may", "Did you mean vit_base_patch16_224.mae,"),
        ("hivit_b.mae", "timm has none for it"),
        ("zzz", "`mimkit models` lists ours"),
        ("{folder}/encodr", "Did you mean encoder?"),
        ("runs/mae_hivit/encoder", "`accelerate launch recipes/mae_hivit.py` makes it"),
        ("runs/never_run", "does not exist. Pass a folder, or a network's name."),
        ("hpvit_b_mae", "If it is a folder that `mimkit convert --out` writes, make it first"),
    ],
)
def test_an_unknown_model_is_refused_first_with_the_name_to_type(name, hint, tmp_path, monkeypatch):
    (tmp_path / "encoder").mkdir()
    monkeypatch.chdir(tmp_path)
    name = name.format(folder=tmp_path)
    with pytest.raises(UserError, match=re.escape(f"--model {name} ")) as refused:
        check_model(name)
    assert hint in str(refused.value)
    monkeypatch.setattr("mimkit.data.sources.open_source", lambda *_, **__: pytest.fail("the data came first"))
    monkeypatch.setattr("mimkit.data.sources.open_labeled", lambda *_, **__: pytest.fail("the data came first"))
    for call in (cli.knn, cli.probe, lambda name: cli.predict(name, "nowhere"), cli.export):
        with pytest.raises(UserError, match=re.escape(hint)):
            call(name)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.__name__.rsplit(".", 1)[-1])
def test_a_recipe_refuses_an_unknown_model_before_it_opens_data(recipe, capsys):
    with pytest.raises(SystemExit) as stop:
        recipe.main(["--model", "hivit_nanoo", "--data", "nowhere"])
    assert stop.value.code == 2
    assert "--model hivit_nanoo is unknown to timm and mimkit. Did you mean hivit_nano" in capsys.readouterr().err


def test_known_models_are_accepted(tmp_path):
    for name in ("hivit_nano", "vit_base_patch16_224.mae", "resnet18", str(tmp_path)):
        check_model(name)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["conver"], "mimkit conver: there is no such command. Did you mean convert?"),
        (["dance"], "mimkit dance: there is no such command. Commands: models, convert,"),
        (["doctor", "mae_hivi"], "mimkit doctor mae_hivi: there is no such recipe. Did you mean mae_hivit?"),
        (["knn", "--modle", "hivit_nano"], "Did you mean --model? See --help."),
        (
            ["convert", "--from", "vit_b_mae", "--to", "hpvit-b", "--out", "x"],
            "--to hpvit-b is unknown. Did you mean hpvit_b",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_that_is_almost_right_is_named(argv, sentence, capsys, monkeypatch):
    code, _, err = command(capsys, monkeypatch, *argv)
    assert (code, len(err.splitlines())) == (2, 1)
    assert sentence in err


def test_sources_of_a_conversion_that_are_almost_right_are_named():
    for source, hint in [("vit_b_may", "vit_b_mae"), ("vit_base_patch16_224.maee", "vit_base_patch16_224.mae")]:
        with pytest.raises(UserError, match=f"Did you mean {re.escape(hint)}"):
            find_source(source)


def test_a_path_next_to_existing_files_is_never_asked_from_the_hub(tmp_path, monkeypatch):
    (tmp_path / "data" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: asked.append(name) or ["train"])
    with pytest.raises(UserError, match=r"data/phtos: there is no such file or folder.*Did you mean photos\?"):
        open_source("data/phtos")
    assert not asked
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, **_: (_ for _ in ()).throw(ConnectionError("no network"))
    )
    with pytest.raises(UserError, match="could not be fetched from the hub"):
        open_source("owner/photos")
    assert asked == ["owner/photos"]
