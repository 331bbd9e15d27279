"""Tables whose columns are not as `datasets` writes them: files of images as plain bytes, labels of all kinds."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import batches, command, encoded, picture
from mimkit.recipes import finetune
from short_runs import run

from mimkit.data.sources import class_labels, open_images, open_labeled, open_source
from mimkit.errors import UserError


def write(file, labels=None, cells=None, count=10, **more):
    cells = cells or [encoded(picture(i, (12, 12))) for i in range(len(labels) if labels is not None else count)]
    labels = {} if labels is None else {"label": labels}
    pq.write_table(pa.table({"image": cells, **labels, **more}), file)
    return str(file)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.large_binary(),
        pa.list_(pa.uint8()),
        pa.list_(pa.int8()),
        pa.list_(pa.binary()),
        pa.struct({"bytes": pa.binary()}),
    ],
    ids=["binary", "large_binary", "list of uint8", "list of int8", "list of binary", "struct without path"],
)
def test_images_as_plain_bytes(kind, streaming, tmp_path):
    files = [encoded(picture(i, (12, 12))) for i in range(8)]
    if pa.types.is_list(kind):
        numbers = {pa.uint8(): np.uint8, pa.int8(): np.int8}
        files = [list(np.frombuffer(f, numbers[kind.value_type])) if kind.value_type in numbers else [f] for f in files]
    if pa.types.is_struct(kind):
        files = [{"bytes": file} for file in files]
    columns = {"name": [b"x%d" % i for i in range(8)], "scan": pa.array(files, kind), "label": [0, 1] * 4}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    source = open_source(str(tmp_path), streaming=streaming)
    assert (source.image, source.label) == ("scan", "label")
    for batch in batches(source, steps=2):
        assert not batch.bad
        assert batch.images.shape == (4, 3, 16, 16)


def test_lists_of_several_images_are_refused(tmp_path):
    files = [[encoded(picture(i)), encoded(picture(i + 9))] for i in range(4)]
    pq.write_table(pa.table({"views": pa.array(files, pa.list_(pa.binary()))}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="The column views holds lists of 2 images"):
        open_images(str(tmp_path))


@pytest.mark.parametrize(
    ("labels", "names", "left_out"),
    [
        ([1000000, 1000001] * 5, ["1000000", "1000001"], 0),
        ([3, 20, 100] * 4, ["3", "20", "100"], 0),
        (["dog", "cat", None, ""] * 3, ["cat", "dog"], 6),
        ([1, 0, -1, None] * 3, ["0", "1"], 6),
        ([7.0, 9.0, None] * 4, ["7", "9"], 4),  # what pandas makes of numbers with gaps
        ([7.0, 9.0, float("nan")] * 4, ["7", "9"], 4),
        ([True, False] * 5, ["False", "True"], 0),
        (pa.array(["b", "a"] * 5, pa.large_string()), ["a", "b"], 0),
        (pa.array(["b", "a", None] * 5).dictionary_encode(), ["b", "a"], 5),
        (pa.array([4, 2] * 5, pa.uint8()), ["2", "4"], 0),
        (pa.array([b"b", b"a", b""] * 5), ["a", "b"], 5),
    ],
    ids=[
        "gaps",
        "more gaps",
        "names",
        "-1 and null",
        "floats",
        "NaN",
        "bool",
        "large_string",
        "dictionary",
        "uint8",
        "bytes",
    ],
)
def test_labels_are_numbered_by_their_names(labels, names, left_out, tmp_path):
    write(tmp_path / "x.parquet", labels)
    train, test = open_labeled(str(tmp_path))
    assert sorted(class_labels(train)) == sorted(names)
    given = labels.to_pylist() if isinstance(labels, pa.Array) else labels
    given = [g.decode() if isinstance(g, bytes) else g for g in given]
    given = [g for g in given if g is not None and g == g and g not in ("", -1)]
    found = [class_labels(train)[i] for part in (train, test) for i in part.rows["label"]]
    assert sorted(found) == sorted(str(int(g)) if isinstance(g, float) else str(g) for g in given)
    assert (f"Left out: images of train without a label ({left_out})." in train.about) == bool(left_out)


def test_both_parts_number_labels_alike(tmp_path):
    write(tmp_path / "train.parquet", [30, 10, 20, -1] * 3)
    write(tmp_path / "val.parquet", [30, -1, 20])
    train, test = open_labeled(str(tmp_path))
    assert (train.rows["label"][:3], test.rows["label"][:]) == ([2, 0, 1], [2, 1])
    assert "Left out: images of train without a label (3), images of val without a label (1)." in train.about
    write(tmp_path / "val.parquet", [30, 40])
    with pytest.raises(UserError, match="classes that the training split lacks: 40"):
        open_labeled(str(tmp_path))


def test_columns_may_be_named(tmp_path):
    other = [encoded(picture(i, (20, 20))) for i in range(10)]
    file = write(
        tmp_path / "x.parquet", [0] * 10, thumbnail=other, fine=["b", "a"] * 5, score=[0.5] * 10, ids=[[1]] * 10
    )
    train, test = open_labeled(file, image_column="thumbnail", label_column="fine")
    assert (train.image, class_labels(train), train.length, test.length) == ("thumbnail", ["a", "b"], 8, 2)
    assert open_images(file, image_column="thumbnail").rows[0]["thumbnail"]["bytes"] == other[0]
    for columns, message in (
        ({"image_column": "photo"}, "--image-column photo: .* has the columns image, label, thumbnail"),
        ({"image_column": "fine"}, "--image-column fine: the column holds .*string.*, not image files"),
        ({"label_column": "clas"}, "--label-column clas: .* has the columns"),
        ({"label_column": "ids"}, "--label-column ids: the column holds .*List"),
        ({"label_column": "score"}, "has the label 0.5, which is no class"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            open_labeled(file, **columns)
        assert len(str(caught.value)) < 300 + len(file)


def test_tables_without_images_or_labels(tmp_path):
    with pytest.raises(UserError, match=r"no column of images among image, label.* name it with --image-column"):
        open_images(write(tmp_path / "x.parquet", [0, 1], cells=[b"no", b"image"]))
    with pytest.raises(UserError, match="training split without labels"):
        open_labeled(write(tmp_path / "y.parquet", [-1, None] * 5))


@pytest.mark.e2e
def test_names_of_classes_reach_the_predictions(tmp_path, capsys, monkeypatch):
    """Labels with a gap made a head of 1,000,002 classes."""
    file = write(tmp_path / "x.parquet", [1000000, 1000001, -1] * 8)
    tiny = [
        "--model",
        "hivit_nano",
        "--from-scratch",
        "--model-args",
        "{embed_dim: 16, num_heads: 2}",
        "--img-size",
        "32",
    ]
    steps = ["--epochs", "1", "--warmup-epochs", "0", "--batch-size", "4", "--workers", "0"]
    run(finetune, "--data", file, *tiny, *steps, "--out", tmp_path / "run")
    assert "Left out: images of train without a label (8)." in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "classes.json").read_text()) == ["1000000", "1000001"]
    out = tmp_path / "found.csv"
    argv = ["predict", "--model", tmp_path / "run", "--images", file, "--out", out]
    code, _, err = command(capsys, monkeypatch, *argv)
    assert code == 0, err
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 24  # also those without a label
    write(tmp_path / "set-train.parquet", [1000001] * 2)
    write(tmp_path / "set-unlabeled.parquet", count=3, scan=[encoded(picture(9))] * 3)
    for parts, count in (((), 5), (("--parts", "unlabeled", "--image-column", "scan"), 3)):
        argv = ["predict", "--model", tmp_path / "run", "--images", tmp_path / "set-*.parquet", "--out", out, *parts]
        code, said, err = command(capsys, monkeypatch, *argv)
        assert code == 0, err
        assert f"unlabeled (3). {'Left out: train (2).' if parts else ''}".strip() in said
        assert len(list(csv.DictReader(out.open()))) == count
    assert {row["label"] for row in rows} <= {"1000000", "1000001"}


def test_numbers_as_text_are_in_the_order_of_numbers(tmp_path):
    write(tmp_path / "train.parquet", [str(i) for i in range(12)] * 2, count=24)
    assert class_labels(open_labeled(str(tmp_path))[0]) == [str(i) for i in range(12)]
