"""Which part of a data set is trained on, which one is evaluated on, and what is left out: for all kinds of sets."""

import io
import json
import tarfile
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import batches, encoded, picture
from datasets.splits import SplitDict
from PIL import Image

from mimkit.data.detection import open_boxes
from mimkit.data.parts import choose_parts
from mimkit.data.segmentation import open_masked
from mimkit.data.sources import open_all, open_images, open_labeled, open_source
from mimkit.data.transforms import Normalize
from mimkit.errors import UserError
from mimkit.training.online_knn import OnlineKNN


def tree(root, **counts):
    """Write images into folders, whose names have __ for a slash. Return the root."""
    for place, count in counts.items():
        folder = root / place.replace("__", "/")
        folder.mkdir(parents=True)
        for i in range(count):
            picture(i, (12, 12)).save(folder / f"{i}.png")
    return root


def table(file, labels):
    images = [{"bytes": encoded(picture(i, (12, 12))), "path": None} for i in range(len(labels))]
    file.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": labels}), file)


def shard(file, labels):
    file.parent.mkdir(exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for i, label in enumerate(labels):
            for name, content in (("png", encoded(picture(i, (12, 12)))), ("cls", b"%d" % label)):
                info = tarfile.TarInfo(f"{i}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def squares(root, **counts):
    """Write images/ and masks/ of two classes for each part; no masks for counts below 0."""
    for part, count in counts.items():
        for kind in ("images", "masks")[: 1 + (count > 0)]:
            (root / part / kind).mkdir(parents=True)
        for i in range(abs(count)):
            picture(i, (12, 12)).save(root / part / "images" / f"{i}.png")
            if count > 0:
                Image.fromarray(np.eye(12, dtype=np.uint8)).save(root / part / "masks" / f"{i}.png")
    return root


def coco(root, name, count, objects=True):
    box = {"bbox": [1, 1, 4, 4], "category_id": 1, "iscrowd": 0}
    images = [{"id": i, "file_name": f"{i}.png", "height": 12, "width": 12} for i in range(count)]
    made = [{"id": i, "image_id": i, **box} for i in range(count)] if objects else []
    (root / "annotations").mkdir(exist_ok=True, parents=True)
    file = root / "annotations" / f"instances_{name}.json"
    file.write_text(json.dumps({"images": images, "annotations": made, "categories": [{"id": 1, "name": "a"}]}))
    tree(root, **{name: count})


@pytest.mark.parametrize(
    ("names", "wanted", "unlabeled", "chosen"),
    [
        ("train val test", None, "", ("train", "val")),
        ("test train", None, "", ("train", "test")),
        ("train validation test", None, "test", ("train", "validation")),
        ("train test", None, "test", ("train", None)),  # every fifth is held out
        ("train val", None, "val", ("train", "val")),  # which is then an error
        ("train val test", None, "val", ("train", "test")),
        ("Train Valid unlabeled", None, "unlabeled", ("Train", "Valid")),
        ("training testing", None, "", ("training", "testing")),
        ("train dev test extra", None, "", ("train", "dev")),
        ("train val test", "train test", "", ("train", "test")),
        ("train val test", "train", "", ("train", None)),
        ("train extra val", "train extra val", "", ("train extra", "val")),
        ("val test", None, "", ("", "val")),
        ("test2017 train2017 unlabeled2017 val2017", None, "", ("train2017", "val2017")),
        ("train_extra train validation_b validation", None, "", ("train", "validation")),
    ],
)
def test_one_rule_chooses(names, wanted, unlabeled, chosen):
    found = choose_parts(names.split(), wanted and wanted.split(), lambda name: name not in unlabeled.split())
    assert found == (chosen[0].split(), chosen[1])


@pytest.mark.parametrize("kind", ["folders", "parquet", "tars"])
def test_val_is_evaluated_on_and_what_is_left_out_is_named(kind, tmp_path):
    counts = {"train": 6, "val": 4, "test": 3, "unlabeled": 5}
    if kind == "folders":
        tree(tmp_path / "set", train__a=3, train__b=3, val__a=2, val__b=2, test=3, unlabeled=5)
    for name, count in counts.items():
        labels = [-1] * count if name in ("test", "unlabeled") else [0, 1] * (count // 2)
        if kind == "parquet":
            table(tmp_path / "set" / f"{name}-0.parquet", labels)
        elif kind == "tars":
            shard(tmp_path / "set" / f"{name}-0.tar", labels)
    train, test = open_labeled(str(tmp_path / "set"))
    assert (train.length, test.length, test.part) == (6, 4, "val")
    assert train.about == "Training images: train (6). Validation images: val (4). Left out: test (3), unlabeled (5)."
    everything = open_images(str(tmp_path / "set"))
    assert (everything.length, everything.label) == (18, None)
    assert everything.about == "Images: train (6), test (3), unlabeled (5), val (4)."
    assert [part.length for part in open_all(str(tmp_path / "set"))] == [6, 3, 5, 4]
    some = open_images(str(tmp_path / "set"), "train,Unlabeled")
    assert (some.length, some.about) == (11, "Images: train (6), unlabeled (5). Left out: test (3), val (4).")


@pytest.mark.parametrize("kind", ["folders", "parquet"])
def test_test_is_evaluated_on_only_without_val(kind, tmp_path):
    if kind == "folders":
        tree(tmp_path / "set", train__a=5, train__b=5, test__a=2, test__b=2)
    else:
        table(tmp_path / "set" / "train.parquet", [0, 1] * 5)
        table(tmp_path / "set" / "test.parquet", [0, 1] * 2)
    assert open_labeled(str(tmp_path / "set"))[1].length == 4
    if kind == "folders":
        for name in "ab":
            (tmp_path / "set" / "test" / name / "0.png").rename(tmp_path / "set" / "test" / f"{name}.png")
            (tmp_path / "set" / "test" / name / "1.png").unlink()
    else:
        table(tmp_path / "set" / "test.parquet", [-1] * 2)
    train, test = open_labeled(str(tmp_path / "set"))
    assert (train.length, test.length, test.part) == (8, 2, "held-out")
    held_out = "Training images: train (8). Validation images: every fifth of train (2). Left out: "
    assert train.about == f"{held_out}test (2, without labels)."


@pytest.mark.parametrize("others", [{"unlabeled": 4}, {"raw": 4}, {"unlabeled__x": 4}])
def test_folders_beside_train_are_no_classes(others, tmp_path):
    """These were two classes, train and the other folder."""
    root = tree(tmp_path / "set", train__a=5, train__b=5, **others)
    train, test = open_labeled(str(root))
    assert train.rows.features["label"].names == ["a", "b"]
    assert (train.length, test.length) == (8, 2)
    assert train.about.endswith(f"Left out: {next(iter(others)).split('__')[0]} (4).")
    assert open_images(str(root)).length == 14


def test_folders_named_almost_like_parts(tmp_path):
    root = str(tree(tmp_path / "coco", train2017__a=5, train2017__b=5, unlabeled2017=2, val2017__a=1, val2017__b=1))
    about = "Training images: train2017 (10). Validation images: val2017 (2). Left out: unlabeled2017 (2)."
    assert open_labeled(root)[0].about == about
    classes = str(tree(tmp_path / "classes", bullet_train=5, test_tube=5, zebra=5))
    assert open_labeled(classes)[0].rows.features["label"].names == ["bullet_train", "test_tube", "zebra"]


def test_parts_may_be_named(tmp_path):
    root = str(tree(tmp_path / "set", train__a=5, train__b=5, val__a=1, val__b=1, test__a=2, test__b=2, more__a=3))
    assert open_labeled(root, "train,test")[1].length == 4
    train, test = open_labeled(root, "train,more,val")
    assert (train.length, test.length, train.parts) == (13, 2, ("train", "more"))
    assert np.bincount(train.rows["label"]).tolist() == [8, 5]
    assert open_labeled(root, "train")[0].length == 8
    with pytest.raises(UserError, match=r"--parts train,vall: .* has no part vall. Choose from more, test, train, val"):
        open_labeled(root, "train,vall")
    flat = str(tree(tmp_path / "flat", one__a=5, one__b=4, two__a=3))  # two classes, unless someone says otherwise
    assert open_images(flat, "one").length == 9
    assert open_labeled(flat)[0].rows.features["label"].names == ["one", "two"]


@pytest.mark.parametrize("streaming", [False, True])
def test_parts_are_joined(streaming, tmp_path):
    """The labels of one part are numbers, of the other there are none; every image is read once in an epoch."""
    table(tmp_path / "train-0.parquet", [0, 1] * 4)
    table(tmp_path / "train-1.parquet", [0, 1] * 4)
    images = [{"bytes": encoded(picture(20 + i, (12, 12))), "path": None} for i in range(4)]
    pq.write_table(pa.table({"photo": images}), tmp_path / "unlabeled.parquet")
    source = open_images(str(tmp_path), streaming=streaming)
    assert (source.length, source.parts) == (20, ("train", "unlabeled"))
    assert sum(len(batch.images) for batch in batches(source, batch_size=4, steps=5)) == 20
    if streaming:
        assert source.rows.num_shards == 3
        for workers in (2, 3):
            assert sum(len(batch.images) for batch in batches(source, workers, batch_size=4, steps=5)) == 20


def test_splits_of_the_hub(tmp_path, monkeypatch):
    table(tmp_path / "train.parquet", [0, 1] * 5)
    table(tmp_path / "validation.parquet", [0, 1])
    table(tmp_path / "test.parquet", [-1] * 3)
    counts = {"test": 3, "train": 10, "unsupervised": 7, "validation": 2}
    load = datasets.load_dataset

    def fetch(name, split, streaming):
        assert split != "unsupervised"  # what is left out is not fetched
        rows = load("parquet", data_files=[str(tmp_path / f"{split}.parquet")], split="train", streaming=streaming)
        rows.info.splits = SplitDict({n: datasets.SplitInfo(n, num_examples=c) for n, c in counts.items()})
        return rows

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: list(counts))
    monkeypatch.setattr(datasets, "load_dataset", fetch)
    train, test = open_labeled("someone/pictures")
    assert (train.length, test.length) == (10, 2)
    assert train.about.endswith("Validation images: validation (2). Left out: test (3), unsupervised (7).")
    with pytest.raises(UserError, match="training split without labels"):
        open_labeled("someone/pictures", "test")


def test_the_sample_is_not_pre_trained_on_its_test_images():
    assert open_images("sample").about == "Images: train (10,000). Left out: test (2,000)."
    assert open_images("sample", "train,test").length == 12_000
    assert [part.length for part in open_all("sample")] == [10_000, 2_000]


def test_knn_is_measured_on_validation_images_whatever_is_pre_trained_on(tmp_path):
    root = str(tree(tmp_path / "set", train__a=6, train__b=6, val__a=2, val__b=2, unlabeled=3))
    said = []
    run = SimpleNamespace(print=said.append, engine=SimpleNamespace(on_main=lambda call, *args: call(*args)))
    for parts in (None, "train,unlabeled"):
        knn = OnlineKNN(run, open_images(root, parts), (32, 32), Normalize([0.5], [0.5]), 0, required=True)
        bank, measured = ({cell["path"] for cell in part.rows["image"]} for part in knn.parts)
        assert (len(bank), len(measured), bank & measured) == (12, 4, set())
    about = "kNN: Training images: train (12). Validation images: val (4). Left out: unlabeled (3)."
    shared = "The validation images of kNN are pre-trained on too; --parts train,unlabeled keeps them apart."
    assert said == [about, shared, about]


# Masks and boxes -----------------------------------------------------------------------------------------------------


def test_masks(tmp_path):
    root = squares(tmp_path / "set", train=6, val=4, test=3)
    tree(root, unlabeled=5)
    train, test, _ = open_masked(str(root))
    assert (train.length, test.length) == (6, 4)
    assert train.about == "Training images: train (6). Validation images: val (4). Left out: test (3), unlabeled (5)."
    assert open_masked(str(root), parts="train,test")[1].length == 3
    train, test, _ = open_masked(str(squares(tmp_path / "flat", train=10, test=-3)))
    assert (train.length, test.length) == (8, 2)
    assert train.about.endswith("every fifth of train (2). Left out: test (3).")
    with pytest.raises(UserError, match="have no masks"):
        open_masked(str(squares(tmp_path / "forgotten", train=10, val=-3)))
    with pytest.raises(UserError, match="--label-column mask names a column of a table"):
        open_masked(str(root), label_column="mask")


def test_masks_in_tables(tmp_path):
    cells = [encoded(picture(i, (12, 12))) for i in range(6)]
    drawn = [encoded(Image.fromarray(np.eye(12, dtype=np.uint8)))] * 6
    for part, count, masks in (("train", 6, [*drawn[:4], None, None]), ("val", 2, drawn[:2]), ("test", 3, [None] * 3)):
        columns = {"scan": cells[:count], "other": cells[:count], "truth": pa.array(masks, pa.binary())}
        pq.write_table(pa.table(columns), tmp_path / f"{part}.parquet")
    train, test, classes = open_masked(str(tmp_path), image_column="other", label_column="truth")
    assert (train.length, test.length, train.image, train.mask, classes.names) == (4, 2, "other", "truth", ["0", "1"])
    assert "Left out: test (3), images of train without a mask (2)." in train.about


def test_boxes(tmp_path):
    pytest.importorskip("faster_coco_eval")
    root = tmp_path / "set"
    for name, count in (("train2014", 3), ("train2017", 6), ("val2017", 4), ("test2017", 2)):
        coco(root, name, count)
    tree(root, unlabeled2017=5)
    train, _, test, _ = open_boxes(str(root), masks=False)
    assert (train.length, test.length) == (6, 4)
    assert train.about == (
        "Training images: train (6). Validation images: val (4). Left out: test (2), train2014 (3), unlabeled2017 (5)."
    )
    assert open_boxes(str(root), False, "train,test")[2].length == 2
    for file in root.glob("annotations/instances_val*"):
        file.unlink()
    coco(tmp_path / "empty", "test2017", 2, objects=False)
    (tmp_path / "empty" / "annotations" / "instances_test2017.json").rename(
        root / "annotations" / "instances_test2017.json"
    )
    train, _, test, _ = open_boxes(str(root), masks=False)
    assert (train.length, test.length) == (4, 2)
    assert "Validation images: every fifth of train (2)" in train.about


def test_a_source_of_one_part_is_as_before(tmp_path):
    root = str(tree(tmp_path / "set", train__a=3, train__b=3, val__a=2, val__b=2))
    assert (open_source(root).length, open_source(root, train=False).length) == (6, 4)


def test_a_part_that_is_left_out_stops_nothing(tmp_path):
    table(tmp_path / "train.parquet", [0, 1] * 5)
    table(tmp_path / "val.parquet", [0, 1])
    (tmp_path / "test.parquet").write_bytes(b"damaged")
    assert "Left out: test (cannot be read)." in open_labeled(str(tmp_path))[0].about
    assert "Left out: test (cannot be read), val (2)." in open_images(str(tmp_path), "train").about
    images = [{"bytes": encoded(picture(i, (12, 12))), "path": None} for i in range(4)]
    for name, columns in (("train", {"kind": [0, 1, 0, 1]}), ("test", {})):
        pq.write_table(pa.table({"photo": images, **columns}), tmp_path / f"{name}.parquet")
    (tmp_path / "val.parquet").unlink()
    train, test = open_labeled(str(tmp_path), label_column="kind")
    assert (test.part, "Left out: test (without labels)." in train.about) == ("held-out", True)
    assert open_images(str(tmp_path), label_column="kind").length == 8
    with pytest.raises(UserError, match="--label-column sort"):
        open_labeled(str(tmp_path), label_column="sort")


def test_a_folder_beside_train_with_the_same_classes_is_a_part(tmp_path):
    root = str(tree(tmp_path / "set", train__a=5, train__b=5, extra__a=3, extra__b=2))
    train, _ = open_labeled(root)
    assert train.rows.features["label"].names == ["a", "b"]
    assert "Left out: extra (5)." in train.about


def test_classes_of_several_parts_are_in_one_order(tmp_path):
    root = str(tree(tmp_path / "set", train__a=3, train__c=3, more__b=3, val__a=1))
    train, test = open_labeled(root, "train,more,val")
    assert train.rows.features["label"].names == test.rows.features["label"].names == ["a", "b", "c"]
    assert np.bincount(train.rows["label"]).tolist() == [3, 3, 3]
