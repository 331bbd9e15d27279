import io
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import batches, encoded, picture
from datasets.splits import SplitDict

from mimkit.data.sources import open_labeled, open_source
from mimkit.errors import UserError


def test_sample_has_labels_and_both_splits():
    train, test = open_labeled("sample")
    assert (train.length, test.length) == (10_000, 2_000)
    assert len(train.rows.features["label"].names) == 10
    assert np.bincount(train.rows["label"]).min() > 900


def test_class_folders_and_hidden_files(folder):
    source = open_source(str(folder))
    assert source.rows.features["label"].names == ["cat", "dog"]
    assert (source.length, source.label) == (12, "label")
    picture().save(folder / "loose.png")
    assert open_source(str(folder)).label is None  # an image outside of the class folders: no labels
    (folder / ".hidden").mkdir()
    picture().save(folder / ".hidden" / "x.png")
    assert open_source(str(folder)).length == 13


def test_split_folders(folder, tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    (folder / "cat").parent.rename(root / "train")
    with pytest.raises(UserError, match="no test split"):
        open_source(str(root), train=False)
    (root / "val" / "cat").mkdir(parents=True)
    picture().save(root / "val" / "cat" / "a.png")
    assert open_source(str(root)).length == 12
    assert open_source(str(root), train=False).length == 1


def test_class_named_train_is_not_a_split(tmp_path):
    for name in ("bus", "car", "train"):
        (tmp_path / name).mkdir()
        picture().save(tmp_path / name / "a.png")
    source = open_source(str(tmp_path))
    assert source.rows.features["label"].names == ["bus", "car", "train"]


def test_both_splits_number_the_classes_alike(tmp_path):
    for part, classes in (("train", "ant bee cat"), ("val", "bee cat")):
        for name in classes.split():
            (tmp_path / part / name).mkdir(parents=True)
            picture().save(tmp_path / part / name / "a.png")
    train, test = open_labeled(str(tmp_path))
    assert (train.rows["label"][:], test.rows["label"][:]) == ([0, 1, 2], [1, 2])
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "dog")
    with pytest.raises(UserError, match="classes that the training split lacks: dog"):
        open_labeled(str(tmp_path))
    for folder in ("dog", "cat"):
        (tmp_path / "val" / folder / "a.png").rename(tmp_path / "val" / f"{folder}.png")
    with pytest.raises(UserError, match="test split without labels"):
        open_labeled(str(tmp_path))


def test_files_of_two_kinds_need_a_glob(folder):
    (folder / "original.tar").write_bytes(b"")
    with pytest.raises(UserError, match="holds images and webdataset files"):
        open_source(str(folder))
    assert open_source(str(folder / "*" / "*.png")).length == 12
    assert open_source(str(folder / "cat" / "01.png")).length == 1


def test_parquet_not_written_by_datasets(tmp_path):
    """It has class names instead of numbers, and images as a struct without the feature type of `datasets`."""
    images = [{"bytes": encoded(picture(i)), "path": None} for i in range(10)]
    table = pa.table({"picture": images, "label": ["dog", "cat"] * 5})
    pq.write_table(table, tmp_path / "x.parquet")
    source = open_source(str(tmp_path))
    assert source.rows.features["label"].names == ["cat", "dog"]
    assert batches(source, batch_size=5, steps=1)[0].images.shape == (5, 3, 16, 16)
    assert open_source(str(tmp_path), streaming=True).label is None


def test_lists_and_empty_columns_are_no_labels(tmp_path):
    """A set with lists (boxes, several labels) or an empty label column can be used for pre-training."""
    images = [{"bytes": encoded(picture(i)), "path": None} for i in range(4)]
    for labels in ([[1, 2]] * 4, pa.nulls(4)):
        pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / "x.parquet")
        for streaming in (False, True):
            source = open_source(str(tmp_path), streaming=streaming)
            assert source.label is None
            assert batches(source, batch_size=2, steps=1)[0].labels.tolist() == [-1, -1]


def test_folder_with_brackets_and_a_link_to_itself(tmp_path):
    folder = tmp_path / "run[1]"
    folder.mkdir()
    picture().save(folder / "a.png")
    (folder / "again").symlink_to(folder)
    assert open_source(str(folder)).length == 1


def test_every_fifth_image_is_held_out_without_a_test_split(folder):
    train, test = open_labeled(str(folder))
    assert (train.length, test.length) == (9, 3)
    assert not set(map(str, train.rows["image"])) & set(map(str, test.rows["image"]))


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_shards(tmp_path, streaming):
    for shard in range(2):
        with tarfile.open(tmp_path / f"shard-{shard}.tar", "w") as tar:
            for i in range(6):
                for name, content in ((f"{i}.png", encoded(picture(i))), (f"{i}.cls", b"%d" % (i % 3))):
                    info = tarfile.TarInfo(f"{shard}{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    source = open_source(str(tmp_path / "shard-*.tar"), streaming=streaming)
    assert (source.length, source.label) == (12, "cls")
    found = batches(source, steps=3)
    assert sorted(torch.cat([b.labels for b in found]).tolist()) == [0] * 4 + [1] * 4 + [2] * 4


def test_streaming_a_folder(folder):
    found = batches(open_source(str(folder), streaming=True), steps=3)
    assert sorted(torch.cat([b.labels for b in found]).tolist()) == [0] * 6 + [1] * 6


@pytest.mark.parametrize("streaming", [False, True])
def test_data_set_on_the_hub(parquet, monkeypatch, streaming):
    """Tests cannot reach the hub: two functions of `datasets` are replaced by ones that read local files."""
    load = datasets.load_dataset

    def fetch(name, split, streaming):
        assert (name, split) == ("someone/pictures", "validation")
        files = [str(f) for f in parquet.glob("*.parquet")]
        rows = load("parquet", data_files=files, split="train", streaming=streaming)
        rows.info.splits = SplitDict({split: datasets.SplitInfo(split, num_examples=75)})
        return rows

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train", "validation"])
    monkeypatch.setattr(datasets, "load_dataset", fetch)
    source = open_source("someone/pictures", train=False, streaming=streaming)
    assert (source.length, source.streaming) == (75, streaming)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train"])
    with pytest.raises(UserError, match="has the splits train: none for testing"):
        open_source("someone/pictures", train=False)


def test_errors_for_missing_and_damaged_data(tmp_path):
    for data, message in [
        (str(tmp_path / "nowhere"), "no such file or folder"),
        ("./nowhere.parquet", "no such file or folder"),
        (str(tmp_path), "has no images"),
        ("no/such-set", "could not be fetched from the hub"),
    ]:
        with pytest.raises(UserError, match=message):
            open_source(data)
    (tmp_path / "a.parquet").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        open_source(str(tmp_path / "a.parquet"))
    (tmp_path / "b.tar").write_bytes(b"torn")
    with pytest.raises(UserError, match="holds parquet and webdataset files"):
        open_source(str(tmp_path))


def test_open_labeled_needs_two_classes(tmp_path):
    for i in range(10):
        picture(i).save(tmp_path / f"{i}.png")
    with pytest.raises(UserError, match="has no labels"):
        open_labeled(str(tmp_path))
    (tmp_path / "only").mkdir()
    for i in range(10):
        (tmp_path / f"{i}.png").rename(tmp_path / "only" / f"{i}.png")
    with pytest.raises(UserError, match="one class only"):
        open_labeled(str(tmp_path))
