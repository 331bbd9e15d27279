"""The directory of a run: which folder it is, what may change on resume, and its metrics."""

import json
from pathlib import Path

import pytest
import yaml

from mimkit.errors import UserError
from mimkit.training.run_dir import MAY_CHANGE, RunDir


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def started(path, *steps, config=None):
    """The directory of a run with checkpoints of these steps."""
    run = RunDir.open(str(path), "mae", None)
    run.write_config({"lr": 0.1} if config is None else config)
    run.log(1, loss=1.0)
    for step in steps:
        (run.path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    return run


def test_runs_are_numbered_and_the_last_one_is_resumed():
    assert RunDir.open(None, "mae", None).path == Path("runs/mae")
    assert RunDir.open(None, "mae", "auto").path == Path("runs/mae")  # there is none to continue
    for folder in ("runs/mae", "runs/mae-2"):
        run = RunDir.open(None, "mae", None)
        assert (str(run.path), run.resuming) == (folder, False)
        run.write_config({"lr": 0.1})
    assert RunDir.open(None, "mae", None).path == Path("runs/mae-3")
    assert RunDir.open(None, "simmim", None).path == Path("runs/simmim")
    resumed = RunDir.open(None, "mae", "auto")
    assert (str(resumed.path), resumed.resuming) == ("runs/mae-2", True)


def test_out_names_the_folder():
    assert RunDir.open("here", "mae", None).path == Path("here")
    started("here")
    with pytest.raises(UserError, match=r"--out here already holds a run. To continue it with its own options"):
        RunDir.open("here", "mae", None)
    resumed = RunDir.open("here", "mae", "auto")
    assert (str(resumed.path), resumed.resuming) == ("here", True)
    Path("file").touch()
    for resume in (None, "auto"):
        with pytest.raises(UserError, match=r"--out file is a file. Choose a folder."):
            RunDir.open("file", "mae", resume)
    Path("empty").mkdir()
    RunDir.open("empty", "mae", None).write_config({})  # a folder without a run may exist


@pytest.mark.parametrize("content", ["", "checkpoints", "checkpoints/corrupt-step-00000001", "checkpoints/step-best"])
def test_resume_by_path_needs_a_checkpoint(content):
    (Path("run") / content).mkdir(parents=True)
    with pytest.raises(UserError, match=r"--resume run holds no checkpoint. Pass the directory of a run, or 'auto'."):
        RunDir.open(None, "mae", "run")


def test_resume_by_path_wins_over_out():
    started("first", 8)
    resumed = RunDir.open("second", "mae", "first")
    assert (str(resumed.path), resumed.resuming) == ("first", True)
    resumed.write_config({"lr": 0.1})
    assert not Path("second").exists()


def test_config_holds_every_option_as_it_was_resolved():
    run = started("run", config={"out": None, "resume": None, "scale": (0.2, 1.0), "model_args": {"depth": 2}})
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config == {"out": "run", "resume": None, "scale": [0.2, 1.0], "model_args": {"depth": 2}}
    assert list(config) == ["out", "resume", "scale", "model_args"]  # in their own order
    assert run.saved_options() == {}  # a new run continues nothing
    assert RunDir.open("run", "mae", "auto").saved_options() == config
    assert sorted(f.name for f in Path("run").iterdir()) == ["config.yaml", "metrics.jsonl"]


def test_resume_needs_the_same_options():
    started("run", 8, config={"lr": 0.1, "scale": (0.2, 1.0), "seed": 0})
    for resume in ("auto", "run"):
        run = RunDir.open("run", "mae", resume)
        run.write_config({"lr": 0.1, "scale": (0.2, 1.0), "seed": 0, "new": 1})  # an option that is new may have any
        with pytest.raises(UserError, match=r"other options than this run \(lr: 0.1 there, 0.2 here, seed: 0 there, 1"):
            run.write_config({"lr": 0.2, "scale": (0.2, 1.0), "seed": 1, "new": 1})
    assert yaml.safe_load(Path("run/config.yaml").read_text())["lr"] == 0.1


def test_some_options_may_change_on_resume():
    assert {"workers", "keep", "max_spike", "max_bad", "compile", "save_every", "grad_accum_steps"} <= MAY_CHANGE
    assert not {"lr", "seed", "batch_size", "data", "model", "precision", "epochs"} & MAY_CHANGE
    started("run", 8, config=dict.fromkeys(MAY_CHANGE, 1))
    RunDir.open("run", "mae", "auto").write_config(dict.fromkeys(MAY_CHANGE, 2))
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config == dict.fromkeys(MAY_CHANGE, 2) | {"out": "run", "resume": None}


def test_a_config_that_holds_no_options_is_one_sentence():
    started("run", 8)
    Path("run/config.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match=r"run/config.yaml holds no options"):
        RunDir.open("run", "mae", "auto").write_config({})


def test_only_one_of_two_runs_that_start_together_gets_the_folder():
    first, second = (RunDir.open(None, "mae", None) for _ in range(2))
    assert first.path == second.path
    first.write_config({"lr": 0.1})
    with pytest.raises(UserError, match=r"Another run has just created runs/mae. Start again."):
        second.write_config({"lr": 0.2})
    assert yaml.safe_load((first.path / "config.yaml").read_text())["lr"] == 0.1


def test_metrics_are_lines_that_can_be_truncated():
    run = started("run")
    for step in (20, 40, 60):
        run.log(step, loss=1 / step, epoch=step / 10)
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"step": 80, "lo')  # killed while writing
    assert [line["step"] for line in run.metrics()] == [1, 20, 40, 60]
    run.truncate(40)
    assert [line["step"] for line in run.metrics()] == [1, 20, 40]
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1] == {"step": 40, "loss": 0.025, "epoch": 4.0}
    run.truncate(-1)
    assert run.metrics() == []
    assert RunDir(Path("nowhere")).metrics() == []


def test_skipped_steps_have_folders():
    assert RunDir(Path("run")).replay(7) == Path("run/replay/step-00000007")


# The images ----------------------------------------------------------------------------------------------------------


def trained_on(names, data="/scratch/job1/photos"):
    """A run with a checkpoint, whose state has the hash of these names; None for one of an earlier version."""
    run = started("run", 8, config={"lr": 0.1, "data": data})
    state = {} if names is None else {"names": names}
    (run.path / "checkpoints" / "step-00000008" / "state.json").write_text(json.dumps(state))
    return RunDir.open("run", "mae", "auto")


def test_a_run_continues_on_the_same_images_in_another_place():
    config = {"lr": 0.1, "data": "/scratch/job2/photos"}
    trained_on("abc").write_config(config, "abc")
    assert yaml.safe_load(Path("run/config.yaml").read_text())["data"] == "/scratch/job2/photos"


def test_a_run_does_not_continue_on_other_images():
    before = trained_on("abc"), Path("run/config.yaml").read_text()
    with pytest.raises(UserError, match=r"--data /scratch/job1/photos holds other images than those that run was trai"):
        before[0].write_config({"lr": 0.1, "data": "/scratch/job1/photos"}, "xyz")  # of the same name
    with pytest.raises(UserError, match=r"\(lr: 0.1 there, 0.2 here\)"):
        before[0].write_config({"lr": 0.2, "data": "elsewhere"}, "abc")
    assert Path("run/config.yaml").read_text() == before[1]


@pytest.mark.parametrize("names", [None, ""], ids=["written before", "a stream"])
def test_without_names_the_option_is_compared(names):
    run = trained_on(names)
    run.write_config({"lr": 0.1, "data": "/scratch/job1/photos"}, "abc")
    with pytest.raises(UserError, match=r"data: /scratch/job1/photos there, /scratch/job2/photos here"):
        run.write_config({"lr": 0.1, "data": "/scratch/job2/photos"}, "abc")


def test_a_run_without_a_checkpoint_may_start_on_other_images():
    started("run", config={"lr": 0.1, "data": "a"})
    RunDir.open("run", "mae", "auto").write_config({"lr": 0.1, "data": "b"}, "abc")
