"""Checkpoints: atomic, verified by hash before they are read, in the background, and few."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from two_parameters import train, train_state, weights

from mimkit.errors import UserError
from mimkit.training import checkpoint
from mimkit.training.checkpoint import (
    Checkpointer,
    checkpoints,
    digest,
    read_checkpoint,
    step_of,
    verify_checkpoint,
    write_checkpoint,
)
from mimkit.training.distributed import Engine

SNAPSHOT = {"model": {"weight": torch.arange(3.0)}, "ema": {"weight": torch.ones(2, 2)}}, {"step": 8, "sums": {}}
FULL = [
    OSError(errno.ENOSPC, "No space left on device", "model.safetensors"),
    OSError(errno.EDQUOT, "Disk quota exceeded", "model.safetensors"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
    RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0"),  # torch's, and so an engine's
]


def shorter(content):
    return content[:20]


def flipped(content):
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


def spoil(file, damage=flipped):
    file.write_bytes(damage(file.read_bytes()))


def reseal(folder):
    """Rewrite the hashes, as someone who changes a file may do."""
    hashes = json.loads((folder / "manifest.json").read_text())
    hashes = {name: digest(folder / name) for name in hashes}
    (folder / "manifest.json").write_text(json.dumps(hashes))


def names(run):
    return sorted(folder.name for folder in (run / "checkpoints").iterdir())


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    folder = tmp_path / "checkpoints" / "step-00000008"
    write_checkpoint(folder, SNAPSHOT)
    assert verify_checkpoint(folder) == ""
    states, values = read_checkpoint(folder)
    assert values == SNAPSHOT[1]
    assert states.keys() == SNAPSHOT[0].keys()
    assert all(torch.equal(states[name]["weight"], SNAPSHOT[0][name]["weight"]) for name in states)
    assert {f.name for f in folder.iterdir()} == {"model.safetensors", "ema.safetensors", "state.json", "manifest.json"}
    assert checkpoints(tmp_path) == [folder]
    assert step_of(folder) == 8
    write_checkpoint(folder, ({}, {"step": 9}))  # replaces it
    assert read_checkpoint(folder) == ({}, {"step": 9})
    assert names(tmp_path) == ["step-00000008"]


@pytest.mark.parametrize("damage", [flipped, shorter, lambda content: b"", lambda content: b"[" * 100_000])
@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a_damaged_file_is_found(name, damage, tmp_path):
    write_checkpoint(tmp_path / "a", SNAPSHOT)
    spoil(tmp_path / "a" / name, damage)
    reason = verify_checkpoint(tmp_path / "a")
    assert reason
    if name != "manifest.json":
        assert reason == f"{name} differ from what was written"


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a_missing_file_is_found(name, tmp_path):
    write_checkpoint(tmp_path / "a", SNAPSHOT)
    (tmp_path / "a" / name).unlink()
    assert name in verify_checkpoint(tmp_path / "a")


def test_an_added_file_is_found(tmp_path):
    """Each .safetensors file would be read, and an engine unpickles what it finds."""
    write_checkpoint(tmp_path / "a", SNAPSHOT)
    (tmp_path / "a" / ".nfs0001").touch()  # hidden files are a file system's own, and nothing reads them
    assert verify_checkpoint(tmp_path / "a") == ""
    (tmp_path / "a" / "engine").mkdir()
    (tmp_path / "a" / "engine" / "optim_states.pt").touch()
    assert verify_checkpoint(tmp_path / "a") == "engine/optim_states.pt differ from what was written"


@pytest.mark.parametrize("manifest", ["[]", "3", "null", "{}", '{"../outside": ""}', '{"model.safetensors": 5}'])
def test_an_odd_manifest_is_found(manifest, tmp_path):
    write_checkpoint(tmp_path / "a", SNAPSHOT)
    (tmp_path / "outside").touch()
    (tmp_path / "a" / "manifest.json").write_text(manifest)
    assert verify_checkpoint(tmp_path / "a")


def test_a_writer_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "checkpoints" / "step-00000008", SNAPSHOT)

    def fail(state, file):
        Path(file).write_bytes(b"half")
        raise FULL[0]

    monkeypatch.setattr(checkpoint, "save_file", fail)
    for step in (8, 16):
        with pytest.raises(OSError, match="No space left"):
            write_checkpoint(tmp_path / "checkpoints" / f"step-{step:08d}", SNAPSHOT)
    assert names(tmp_path) == ["step-00000008"]
    assert verify_checkpoint(tmp_path / "checkpoints" / "step-00000008") == ""


def test_a_file_that_someone_changed_with_its_hash_is_one_sentence(tmp_path):
    write_checkpoint(tmp_path / "a", SNAPSHOT)
    spoil(tmp_path / "a" / "model.safetensors", shorter)
    reseal(tmp_path / "a")
    assert verify_checkpoint(tmp_path / "a") == ""
    with pytest.raises(UserError, match=r"a cannot be read \(.*\). Start a new run with another --out."):
        read_checkpoint(tmp_path / "a")


# Checkpointer --------------------------------------------------------------------------------------------------------


class Saver:
    """A checkpointer, its state and what it printed."""

    def __init__(self, run, **options):
        self.printed = []
        self.checkpointer = Checkpointer(run, Engine(), log=self.printed.append, **options)
        self.state = train_state()
        self.ends = {}  # weights by the number of steps done

    def train(self, *saved, steps):
        """Train, and save after these steps."""
        for done in range(1, steps + 1):
            train(self.state, done - 1)
            self.ends[done] = weights(self.state)
            if done in saved:
                self.checkpointer.save(done, self.state)
        self.checkpointer.wait()
        return self


@pytest.fixture
def saver(tmp_path):
    """A run of ten steps with checkpoints after 3, 6 and 9."""
    return Saver(tmp_path, keep=3).train(3, 6, 9, steps=10)


def test_the_latest_checkpoint_is_found_and_loaded(saver, tmp_path):
    assert names(tmp_path) == ["step-00000003", "step-00000006", "step-00000009"]
    assert saver.checkpointer.latest == saver.checkpointer.folder(9)
    fresh = Saver(tmp_path)
    found = fresh.checkpointer.latest_valid()
    assert found == fresh.checkpointer.latest == tmp_path / "checkpoints" / "step-00000009"
    fresh.checkpointer.begin(fresh.state)
    assert weights(fresh.state) == saver.ends[9]
    assert fresh.printed == [f"resuming from {found}"]
    assert fresh.checkpointer.latest_valid(before=8).name == "step-00000006"
    assert fresh.checkpointer.latest_valid(before=6).name == "step-00000006"
    assert fresh.checkpointer.latest_valid(before=2) is None
    (tmp_path / "checkpoints" / "step-best").mkdir()  # someone's copy
    assert fresh.checkpointer.latest_valid().name == "step-00000009"


def test_a_checkpoint_holds_copies(saver, tmp_path, monkeypatch):
    """Training continues while it is written."""
    go_on, write = threading.Event(), checkpoint.write_checkpoint
    monkeypatch.setattr(checkpoint, "write_checkpoint", lambda *args: go_on.wait(60) and write(*args))
    before = weights(saver.state)
    saver.checkpointer.save(10, saver.state)
    train(saver.state, 10)
    assert weights(saver.state) != before
    assert "step-00000010" not in names(tmp_path)
    assert saver.checkpointer.latest.name == "step-00000009"
    go_on.set()
    saver.checkpointer.wait()
    assert saver.checkpointer.latest.name == "step-00000010"
    saver.checkpointer.load(saver.checkpointer.latest, saver.state)
    assert weights(saver.state) == before


def test_corrupt_checkpoints_are_renamed_and_the_one_before_is_taken(saver, tmp_path):
    for step, name in ((9, "model.safetensors"), (6, "manifest.json")):
        spoil(saver.checkpointer.folder(step) / name, shorter)
    again = Saver(tmp_path)
    assert again.checkpointer.latest_valid().name == "step-00000003"
    assert names(tmp_path) == ["corrupt-step-00000006", "corrupt-step-00000009", "step-00000003"]
    folder = tmp_path / "checkpoints" / "step-00000009"
    assert again.printed[0] == (
        f"WARNING: {folder} is corrupt (model.safetensors differ from what was written). It is now corrupt-"
        "step-00000009; looking for an earlier one."
    )
    again.checkpointer.begin(again.state)
    assert weights(again.state) == saver.ends[3]
    # a corrupt checkpoint of the same step replaces that of before
    again.train(9, steps=9)
    spoil(folder / "model.safetensors", shorter)
    assert Saver(tmp_path).checkpointer.latest_valid().name == "step-00000003"
    # when none is left, the run never starts from the beginning
    spoil(tmp_path / "checkpoints" / "step-00000003" / "state.json")
    for _ in range(2):
        with pytest.raises(UserError, match=r"has no valid checkpoint. Start a new run with another --out."):
            Saver(tmp_path).checkpointer.latest_valid()


@pytest.mark.parametrize(
    ("keep", "every", "left"),
    [(1, 0, "8"), (2, 0, "78"), (3, 0, "678"), (1, 3, "368"), (2, 2, "24678"), (1, 1, "12345678")],
)
def test_old_checkpoints_go_but_some_are_permanent(keep, every, left, tmp_path):
    saver = Saver(tmp_path, keep=keep)
    saver.checkpointer.permanent_every = every
    saver.train(*range(1, 9), steps=8)
    assert "".join(str(step_of(folder)) for folder in checkpoints(tmp_path)) == left


def test_a_checkpoint_that_cannot_be_read_is_not_removed(saver, tmp_path):
    (saver.checkpointer.folder(3) / "state.json").write_text("{")
    saver.checkpointer.keep = 1
    saver.checkpointer.save(10, saver.state)
    saver.checkpointer.wait()
    assert names(tmp_path) == ["step-00000003", "step-00000010"]


def test_later_checkpoints_stay_when_a_run_has_returned(saver, tmp_path):
    """A run that returned to step 3 saves after 4 steps; what is later may be written anew, and is not old."""
    saver.checkpointer.keep = 1
    saver.checkpointer.save(4, saver.state)
    saver.checkpointer.wait()
    assert names(tmp_path) == ["step-00000004", "step-00000006", "step-00000009"]


def test_leftovers_of_killed_writers_are_removed(saver, tmp_path):
    for name in (".step-00000009.mimkit-1-abc", ".step-00000012.mimkit-999999-x"):
        (tmp_path / "checkpoints" / name / "old").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-00000012.mimkit-999999-x" / "model.safetensors").write_bytes(b"half")
    assert saver.checkpointer.latest_valid().name == "step-00000009"
    saver.checkpointer.save(10, saver.state)
    saver.checkpointer.wait()
    assert names(tmp_path) == ["step-00000006", "step-00000009", "step-00000010"]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk_is_one_sentence_that_names_the_last_checkpoint(error, saver, tmp_path, monkeypatch):
    save_file = checkpoint.save_file

    def full(state, file):
        Path(file).write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    saver.checkpointer.save(10, saver.state)
    message = (
        f"The disk is full, and a checkpoint could not be written. {saver.checkpointer.folder(9)} is complete; continue"
        f" with --config {tmp_path}/config.yaml --resume auto when there is space."
    )
    with pytest.raises(UserError) as caught:
        saver.checkpointer.wait()
    assert str(caught.value) == message
    assert names(tmp_path) == ["step-00000003", "step-00000006", "step-00000009"]
    saver.checkpointer.wait()  # the error is reported once
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    saver.checkpointer.save(10, saver.state)
    saver.checkpointer.wait()
    assert verify_checkpoint(saver.checkpointer.folder(10)) == ""


def test_a_disk_that_was_full_from_the_start(tmp_path, monkeypatch):
    saver = Saver(tmp_path)

    def full(state, file):
        raise FULL[0]

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(
        UserError, match=r"could not be written. No checkpoint is left; start again when there is space"
    ):
        saver.train(2, steps=2)


def test_another_error_of_the_writer_stays_what_it_is(saver, monkeypatch):
    done = threading.Event()

    def denied(state, file):
        done.set()
        raise PermissionError(errno.EACCES, "Permission denied", "model.safetensors")

    monkeypatch.setattr(checkpoint, "save_file", denied)
    saver.checkpointer.save(10, saver.state)
    assert done.wait(60)
    saver.checkpointer.writer.submit(int).result()  # the writer is free again
    with pytest.raises(PermissionError):
        saver.checkpointer.poll()


def test_polling_does_not_wait(saver, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(checkpoint, "write_checkpoint", lambda *_: go_on.wait(60))
    saver.checkpointer.save(10, saver.state)
    saver.checkpointer.poll()
    assert saver.checkpointer.writing
    go_on.set()
    saver.checkpointer.writing.result()
    saver.checkpointer.poll()
    assert not saver.checkpointer.writing
    assert saver.checkpointer.latest == saver.checkpointer.folder(10)


def test_the_initial_state_is_kept_until_there_is_a_checkpoint(tmp_path):
    saver = Saver(tmp_path)
    saver.checkpointer.begin(saver.state)
    start = weights(saver.state)
    assert not (tmp_path / "checkpoints").exists()
    for _ in range(2):  # it can be returned to more than once
        saver.train(steps=3)
        assert saver.checkpointer.restore(2, saver.state) == 0
        assert weights(saver.state) == start
        assert not saver.state.optimizer.state_dict()["state"]
    saver.train(3, steps=4)
    assert saver.checkpointer.initial is None
    assert saver.checkpointer.restore(2, saver.state) is None
    assert saver.checkpointer.restore(3, saver.state) == 3
    assert weights(saver.state) == saver.ends[3]
    assert saver.checkpointer.latest == saver.checkpointer.folder(3)


# Sharded checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(monkeypatch):
    """An engine that writes the weights and the optimizer itself. -> the folders that it read"""
    read = []
    monkeypatch.setattr(Engine, "sharded_checkpoint", True)
    monkeypatch.setattr(Engine, "__str__", lambda engine: "ZeRO-2, 2 processes")
    monkeypatch.setattr(Engine, "save_shards", lambda engine, folder: (folder / "shard.pt").write_bytes(b"own"))
    monkeypatch.setattr(Engine, "load_shards", lambda engine, folder: read.append(folder))
    return read


def test_an_engine_writes_its_own_files(sharded, tmp_path):
    saver = Saver(tmp_path, keep=1)
    saver.state.sharded = True
    saver.checkpointer.begin(saver.state)  # so that there is something to return to
    assert names(tmp_path) == ["step-00000000"]
    saver.train(4, steps=5)
    assert names(tmp_path) == ["step-00000004"]
    folder = saver.checkpointer.latest
    assert {f.name for f in folder.iterdir()} == {"shard.pt", "state.json", "manifest.json"}
    saver.checkpointer.load(folder, saver.state)
    assert sharded == [folder]
    spoil(folder / "shard.pt", lambda content: b"pickle")
    assert "shard.pt" in verify_checkpoint(folder)
    # a run that replays a step writes nothing
    other = Saver(tmp_path / "replay")
    other.checkpointer.begin(other.state, save=False)
    assert not (tmp_path / "replay").exists()


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk_under_an_engine(error, sharded, tmp_path, monkeypatch):
    saver = Saver(tmp_path)
    saver.state.sharded = True
    saver.train(4, steps=4)

    def full(*_):
        raise error

    for owner, name in ((Engine, "save_shards"), (checkpoint, "seal")):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="step-00000004 is complete; continue"):
            patch.setattr(owner, name, full)
            saver.checkpointer.save(5, saver.state)
        assert names(tmp_path) == ["step-00000004"]


def test_a_checkpoint_of_another_engine_is_refused(tmp_path, sharded, monkeypatch):
    saver = Saver(tmp_path)
    saver.state.sharded = True
    saver.train(4, steps=4)
    monkeypatch.undo()
    plain = Saver(tmp_path)
    folder = plain.checkpointer.latest_valid()
    with pytest.raises(
        UserError, match=r"was written by ZeRO-2, 2 processes, but this is one process. Launch with the"
    ):
        plain.checkpointer.load(folder, plain.state)


def test_a_checkpoint_of_one_process_is_refused_by_an_engine(saver, tmp_path, sharded):
    state = saver.state
    with pytest.raises(UserError, match="was written by one process, but this is ZeRO-2, 2 processes"):
        Checkpointer(tmp_path, Engine()).load(saver.checkpointer.folder(9), state)


def test_the_number_of_processes_may_change_where_a_checkpoint_is_complete(saver, tmp_path):
    folder = saver.checkpointer.folder(9)
    values = json.loads((folder / "state.json").read_text())
    assert (values["engine"], values["step"], values["permanent"]) == ("one process", 9, False)
    (folder / "state.json").write_text(json.dumps(values | {"engine": "data-parallel, 4 processes"}))
    saver.checkpointer.load(folder, saver.state)
    assert weights(saver.state) == saver.ends[9]


def test_checkpoints_can_be_moved(saver, tmp_path):
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "moved" / "checkpoints")
    assert Saver(tmp_path / "moved").checkpointer.latest_valid().name == "step-00000009"
    assert os.listdir(tmp_path / "moved") == ["checkpoints"]
