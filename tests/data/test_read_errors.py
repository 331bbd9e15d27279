"""Errors while a set is read begin with the cause, and say what to do about that cause."""

import errno

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encoded, picture
from datasets.arrow_writer import ArrowWriter

from mimkit.data.sources import open_source
from mimkit.errors import UserError


@pytest.fixture
def parquet(tmp_path):
    images = [{"bytes": encoded(picture(i)), "path": None} for i in range(4)]
    pq.write_table(pa.table({"image": images, "label": [0, 1, 0, 1]}), tmp_path / "a.parquet")
    return tmp_path / "a.parquet"


def test_cache_that_cannot_be_written(parquet, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for cache, reason in ((f"{tmp_path}/file/cache", "Not a directory"), ("/proc/cache", "No such file or directory")):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        with pytest.raises(UserError) as failed:
            open_source(str(parquet))
        hint = "set HF_HOME to a folder that can be written, where the cache goes."
        assert str(failed.value) == f"--data {parquet} cannot be read ({reason}: {cache}): {hint}"


@pytest.mark.parametrize(
    ("number", "reason", "hint"),
    [
        (errno.ENOSPC, "No space left on device", "free some space, or set HF_HOME to a folder on another disk"),
        (errno.EIO, "Input/output error", "check that the disk or the network works"),
        (errno.EACCES, "Permission denied", "change its permissions"),
    ],
)
def test_errors_of_the_system(parquet, tmp_path, monkeypatch, number, reason, hint):
    def fail(*_):
        raise OSError(number, reason)

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", f"{tmp_path}/cache")
    monkeypatch.setattr(ArrowWriter, "finalize", fail)
    with pytest.raises(UserError, match=rf"^--data {parquet} cannot be read \({reason}\): {hint}"):
        open_source(str(parquet))


def test_damaged_file_is_named_among_others(parquet):
    damaged = parquet.with_name("b.parquet")
    damaged.write_bytes(parquet.read_bytes()[:-30])
    with pytest.raises(UserError, match=rf"Parquet magic bytes not found in footer\): get another copy of {damaged}\."):
        open_source(str(parquet.parent))
    with pytest.raises(
        UserError, match=rf"Parquet magic bytes not found in footer.*\): get another copy of {damaged}\."
    ):
        open_source(str(parquet.parent), streaming=True)


def test_files_with_other_columns(parquet):
    images = pq.read_table(parquet)["image"]
    pq.write_table(pa.table({"image": images, "name": ["a"] * 4}), parquet.with_name("b.parquet"))
    with pytest.raises(
        UserError, match=r"\(in one of its files, there are 1 new columns .*\): give all files the same"
    ):
        open_source(str(parquet.parent))


def test_cache_of_the_hub_that_is_full(monkeypatch):
    def fail(name):
        raise RuntimeError("wrapped") from OSError(errno.ENOSPC, "No space left on device", "/cache/blobs/x")

    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    with pytest.raises(
        UserError, match=r"\(No space left on device: /cache/blobs/x\): free some space, or set HF_HOME"
    ):
        open_source("someone/pictures")
