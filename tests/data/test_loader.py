import gc
import threading
import time
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import batches, encoded, picture, viewer

from mimkit.data import loader
from mimkit.data.loader import Loader, Watchdog, eval_loader, limit_bad_images, train_loader
from mimkit.data.order import Plan
from mimkit.data.sample import SampleLoader
from mimkit.data.sources import open_labeled, open_source
from mimkit.data.transforms import eval_transform, train_transform
from mimkit.errors import UserError

# Order and randomness ------------------------------------------------------------------------------------------------


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.noise, y.noise) and torch.equal(x.labels, y.labels)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_resume_and_world_size_do_not_change_batches(parquet, streaming):
    source = open_source(str(parquet), streaming=streaming)
    assert source.length == 75
    common = {"batch_size": 8, "steps": 12}  # an epoch has 9 steps, so this is part of a second one
    single = batches(source, **common)
    assert len(single) == 12
    for workers in (1, 2):
        assert same(batches(source, workers, **common), single)
    for start in (3, 10):
        assert same(batches(source, 2, start=start, **common), single[start:])
    by_rank = [batches(source, rank=rank, world_size=2, **common) for rank in (0, 1)]
    joined = [torch.cat([a.images, b.images]) for a, b in zip(*by_rank, strict=True)]
    assert all(torch.equal(a, b.images) for a, b in zip(joined, single, strict=True))
    accumulated = batches(source, grad_accum_steps=4, **common)
    assert torch.equal(torch.cat([b.images for b in accumulated]), torch.cat([b.images for b in single]))


@pytest.mark.parametrize("streaming", [False, True])
def test_each_epoch_has_every_image_once_in_its_own_order(parquet, streaming):
    source = open_source(str(parquet), streaming=streaming)
    epochs = [
        torch.cat([b.labels for b in batches(source, batch_size=25, start=3 * e, steps=3 * e + 3)]) for e in (0, 1)
    ]
    expected = sorted([*range(20), *range(25), *range(30)])
    assert all(sorted(labels.tolist()) == expected for labels in epochs)
    assert not torch.equal(*epochs)
    neighbors = sum(b == a + 1 for a, b in zip(epochs[0].tolist(), epochs[0].tolist()[1:], strict=False))
    assert neighbors < 15  # rows are shuffled, and not only the shards


@pytest.mark.parametrize("window", [0, 1, 5])
def test_short_shuffle_window_loses_no_row(parquet, monkeypatch, window):
    """This holds also if a row, even the first one, has no delay."""
    monkeypatch.setattr("mimkit.data.streaming.WINDOW", window)
    source = open_source(str(parquet), streaming=True)
    labels = torch.cat([b.labels for b in batches(source, batch_size=25, steps=3)])
    assert sorted(labels.tolist()) == sorted([*range(20), *range(25), *range(30)])


def test_eval_loader_is_divided_among_processes(parquet):
    source = open_source(str(parquet))
    labels = [
        torch.cat([b.labels for b in eval_loader(source, (8, 8), 3, 50, rank=rank, world_size=3)]) for rank in range(3)
    ]
    together = torch.cat([b.labels for b in eval_loader(source, (8, 8), 3, 50)])
    assert len(together) == 50
    assert all(torch.equal(labels[rank], together[rank::3]) for rank in range(3))


# Bad images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_logged_and_counted(folder, workers):
    (folder / "cat" / "torn.png").write_bytes(encoded(picture())[:60])
    (folder / "dog" / "text.jpg").write_text("not an image")
    source = open_source(str(folder))
    plan, said = Plan(14, 7, 4), []
    found = list(limit_bad_images(train_loader(source, viewer(source), plan, workers), 2, said.append))
    assert all(len(b.images) == len(b.noise) == 7 for b in found)
    assert len(said) == 2  # each is logged once, although there were two epochs
    assert "torn.png" in "".join(said)
    assert "text.jpg" in "".join(said)
    for rank in (0, 1):  # each process meets both sooner or later
        plan = Plan(14, 2, 60, rank=rank, world_size=2)
        assert len(list(limit_bad_images(train_loader(source, viewer(source), plan, workers), 2, said.append))) == 60
    with pytest.raises(UserError, match=r"2 images cannot be used.*--max-bad"):
        list(limit_bad_images(train_loader(source, viewer(source), plan, workers), 1, said.append))


@pytest.mark.parametrize("streaming", [False, True])
def test_replacement_of_a_bad_image_does_not_depend_on_world_size(tmp_path, streaming):
    """This holds also for micro-batches of one image, where the batch has no other image to take."""
    cells = [{"bytes": encoded(picture(i))[: 60 if i in (3, 4) else None], "path": None} for i in range(13)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=features).to_parquet(tmp_path / "train.parquet")
    source = open_source(str(tmp_path), streaming=streaming)
    single = list(train_loader(source, viewer(source), Plan(13, 4, 6), 0))
    assert {name for b in single for name, _ in b.bad}
    for world_size, steps in ((4, 1), (2, 2), (1, 4)):
        plans = [Plan(13, 4, 6, rank=rank, world_size=world_size, grad_accum_steps=steps) for rank in range(world_size)]
        divided = [list(train_loader(source, viewer(source), plan, 0)) for plan in plans]
        for step, batch in enumerate(single):
            micro_batches = [divided[rank][step * steps + part] for part in range(steps) for rank in range(world_size)]
            assert torch.equal(torch.cat([b.images for b in micro_batches]), batch.images)
            assert torch.equal(torch.cat([b.noise for b in micro_batches]), batch.noise)
            assert [name for b in micro_batches for name in b.names] == batch.names


def test_only_bad_images(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_text("x")
    source = open_source(str(tmp_path))
    with pytest.raises(UserError, match="4 images cannot be used"):
        list(limit_bad_images(eval_loader(source, (8, 8), 3), 3, lambda _: None))
    with pytest.raises(UserError, match=r"--crop-scale \[2, 1\] is no range"):
        train_transform((8, 8), (2, 1))


def test_rows_without_a_file_are_named_by_their_split(tmp_path):
    for part in ("train", "test"):
        data = [encoded(picture()), b"no image"] * 5
        rows = {"image": [{"bytes": cell, "path": None} for cell in data], "label": [0, 1] * 5}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{part}.parquet")
    sources = [open_source(str(tmp_path), train) for train in (True, False)]
    sources += open_labeled(str(tmp_path / "train.parquet"))
    for source, name in zip(sources, ("image 1", "test image 1", "kept image 0", "held-out image 1"), strict=True):
        said = []
        list(limit_bad_images(eval_loader(source, (8, 8), 3), 9, said.append))
        assert said[0] == f"skipped {name}, which cannot be used (not an image of a known kind)"
    assert SampleLoader(eval_transform((8, 8)), 3, 0, 0, ("image", None))(sources[0].rows[0], 0, 0).name == "image 0"


# Watchdog ------------------------------------------------------------------------------------------------------------


class Iterator:
    """Stands in for torch's iterator over the batches of its workers."""

    def __init__(self):
        self.killed = []
        self._workers = [SimpleNamespace(kill=lambda i=i: self.killed.append(i)) for i in range(2)]
        self._worker_pids_set = True


def watchdogs():
    return [thread for thread in threading.enumerate() if thread.name == "mimkit-watchdog"]


def eventually(condition):
    until = time.monotonic() + 10
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


@pytest.fixture
def watched(monkeypatch):
    """A watchdog and the iterator that it watches; a wait may take 0.3 s."""
    monkeypatch.setattr(loader, "WAIT", 0.3)
    monkeypatch.setattr(loader, "_remove_worker_pids", lambda _: None)  # torch does not know the iterator
    batches = Iterator()
    watchdog = Watchdog(batches)
    yield watchdog, batches
    watchdog.stop()


def test_watchdog_kills_workers_after_one_long_wait(watched):
    watchdog, batches = watched
    with watchdog.waiting():
        assert eventually(lambda: batches.killed == [0, 1])
    assert not batches._worker_pids_set


def test_watchdog_ignores_many_short_waits_and_the_time_between_them(watched):
    watchdog, batches = watched
    for _ in range(10):
        with watchdog.waiting():
            time.sleep(0.05)
    time.sleep(0.7)
    with watchdog.waiting():
        time.sleep(0.05)
    assert not batches.killed
    with watchdog.waiting():  # it still watches
        assert eventually(lambda: batches.killed)


@pytest.mark.parametrize("end", ["exhausted", "stopped", "failed"])
def test_one_watchdog_thread_per_iterator(end, parquet):
    """No thread is started per batch. The watchdog ends with the iterator, and does not keep the workers alive."""
    source = open_source(str(parquet))
    iterator = iter(train_loader(source, viewer(source), Plan(source.length, 4, 30), 2))
    next(iterator)
    threads = set(threading.enumerate())
    assert len(watchdogs()) == 1
    for _ in range(19):
        next(iterator)
        assert set(threading.enumerate()) == threads
    workers = torch.multiprocessing.active_children()
    assert len(workers) == 2
    if end == "exhausted":
        assert len(list(iterator)) == 10
    elif end == "failed":
        for worker in workers:
            worker.kill()
        with pytest.raises((RuntimeError, UserError), match=r"DataLoader worker \(pid|ended while"):
            list(iterator)
    del iterator, workers
    gc.collect()
    assert eventually(lambda: not watchdogs() and not torch.multiprocessing.active_children())


def test_no_watchdog_without_workers(parquet):
    source = open_source(str(parquet))
    iterator = iter(train_loader(source, viewer(source), Plan(source.length, 4, 30), 0))
    next(iterator)
    assert not watchdogs()


def test_stuck_worker_ends_the_iteration(monkeypatch):
    monkeypatch.setattr(loader, "WAIT", 1)

    class Stuck(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            if index == 2:
                time.sleep(600)
            return index

    found = []
    with pytest.raises((RuntimeError, UserError), match=r"DataLoader worker \(pid|ended while"):
        found.extend(Loader(Stuck(), 1, num_workers=1))
    assert eventually(lambda: not torch.multiprocessing.active_children())
