"""What `--data` names -> a table of images, read through `datasets`."""

import dataclasses
import glob
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq

from mimkit.data.decode import EXTENSIONS
from mimkit.errors import UserError

TRAIN, TEST = ("train", "training"), ("test", "val", "validation", "valid", "eval")
VAL = ("val", "validation", "valid", "test", "eval")  # of dense prediction, whose test parts often lack masks
LABELS = ("label", "labels", "cls", "class")
MASKS = ("mask", "masks", "annotation", "annotations", "segmentation", "segmentation_mask", "label", "labels")
READERS = {".parquet": "parquet", ".tar": "webdataset"} | dict.fromkeys(EXTENSIONS, "images")


class NoPartError(UserError):
    """The data has no such part."""


@dataclass
class Source:
    """Rows of images, by index or as a stream."""

    name: str
    rows: Any  # datasets.Dataset or datasets.IterableDataset; the image column as {"bytes", "path"}
    image: str  # name of the image column
    label: str | None  # name of the label column
    length: int
    mask: str | None = None  # name of the column of masks, images of classes
    part: str = ""  # what tells its rows from those of the training part: test, held-out

    @property
    def streaming(self) -> bool:
        """Whether rows come in order only."""
        return isinstance(self.rows, datasets.IterableDataset)


def open_source(data: str, train: bool = True, streaming: bool = False) -> Source:
    """Open what `--data` names.

    Args:
        data: 'sample' (Fashion-MNIST, in the package); an image, a parquet or .tar (webdataset) file, a folder or a
            glob of one kind of them, where images may lie in class folders; or the name of a set on the hub.
        train: the training part, else the test part: files or folders named train, test, val, validation. What has no
            parts is all training, and has no test part.
        streaming: read rows in order, without preparing the whole set first.
    """
    path = Path(str(resources.files("mimkit.sample"))) if data == "sample" else Path(data).expanduser()
    found = [str(path)] if path.exists() else sorted(glob.glob(str(path)))
    found = [file for place in found for file in _files_below(Path(place))]
    if not found and not path.exists():
        return _open_hub(data, train, streaming)
    readers = {READERS[Path(file).suffix.lower()] for file in found if Path(file).suffix.lower() in READERS}
    if not readers:
        raise UserError(f"--data {data} has no images: pass a folder with image files, such as .jpg or .png.")
    if len(readers) > 1:
        raise UserError(
            f"--data {data} holds {' and '.join(sorted(readers))} files: pass those of one kind, as a glob."
        )
    reader = readers.pop()
    files = [file for file in found if READERS.get(Path(file).suffix.lower()) == reader]
    root = path if path.is_dir() else Path(os.path.commonpath([str(Path(file).parent) for file in files]))
    inside = [Path(file).relative_to(root).parts for file in files]
    if reader == "images":
        return _open_images(data, files, inside, train, streaming)
    chosen = _of_part([_part_of("/".join(parts)) for parts in inside], train)
    if not chosen:
        raise NoPartError(f"--data {data} has no {'training' if train else 'test'} part among its files.")
    files = [files[i] for i in chosen]
    try:
        rows = datasets.load_dataset(reader, data_files=files, split="train", streaming=streaming)
        length = sum(map(_count, files)) if streaming else len(rows)
    except Exception as error:  # whatever arrow, tarfile and the system raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--data {data} cannot be read ({reason}): check that its files are whole.") from error
    return _source(data, rows, length, train)


def open_all(data: str) -> list[Source]:
    """The parts that there are, training and test."""
    try:
        parts = [open_source(data)]
    except NoPartError:
        parts = []
    try:
        return [*parts, open_source(data, train=False)]
    except NoPartError:
        if not parts:
            raise
        return parts


def _files_below(place: Path) -> list[str]:
    """The file itself, or all files below a folder, also through links; hidden ones are not looked at."""
    if place.is_file():
        return [str(place)]
    files, seen = [], set()
    for folder, below, names in os.walk(place, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link leads back
            below.clear()
            continue
        seen.add(real)
        below[:] = [name for name in below if not name.startswith(".")]
        files += [f"{folder}/{name}" for name in names if not name.startswith(".")]
    return sorted(files)


def _part_of(name: str) -> bool | None:
    """Whether a name says training (train-00.parquet, train/x.tar) or test; None when neither."""
    words = set("".join(c if c.isalpha() else " " for c in name.lower()).split())
    return True if words & set(TRAIN) else False if words & set(TEST) else None


def _of_part(parts: Sequence[bool | None], train: bool) -> list[int]:
    """Places of the part that is wanted; what names no part, or stands alone, is training."""
    if len(parts) == 1 or not any(part is not None for part in parts):
        return list(range(len(parts))) if train else []
    return [i for i, part in enumerate(parts) if part is train or (train and part is None and True not in parts)]


def _count(file: str) -> int:
    """Rows in a parquet file, samples in a tar."""
    if file.endswith(".parquet"):
        return pq.read_metadata(file).num_rows
    with tarfile.open(file) as tar:
        names = [Path(member.name) for member in tar if member.isfile()]
    return len({(name.parent, name.name.split(".")[0]) for name in names})


def _open_images(data: str, files: list[str], inside: list[tuple[str, ...]], train: bool, streaming: bool) -> Source:
    """Image files: folders at the top are the parts, when that is all they are or both are there; else classes."""
    tops = {parts[0] for parts in inside if len(parts) > 1}
    named = {top: top.lower() in TRAIN for top in tops if top.lower() in (*TRAIN, *TEST)}
    if named and (named.keys() == tops or len(set(named.values())) == 2):
        chosen = [i for i, parts in enumerate(inside) if len(parts) > 1 and named.get(parts[0]) is train]
        files, inside = [files[i] for i in chosen], [inside[i][1:] for i in chosen]
    elif not train:
        files = []
    if not files:
        which = "training part (a folder named train)" if train else "test part (a folder named test or val)"
        raise NoPartError(f"--data {data} has no {which} with images.")
    columns: dict[str, list[Any]] = {"image": files}
    features: dict[str, Any] = {"image": datasets.Image(decode=False)}
    if all(len(parts) > 1 for parts in inside):
        classes = {name: i for i, name in enumerate(sorted({parts[0] for parts in inside}))}
        columns["label"] = [classes[parts[0]] for parts in inside]
        features["label"] = datasets.ClassLabel(names=list(classes))
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    shards = min(64, len(files))
    return _source(data, rows.to_iterable_dataset(num_shards=shards) if streaming else rows, len(files), train)


def _open_hub(data: str, train: bool, streaming: bool) -> Source:
    if data.startswith((".", "/", "~")) or data.count("/") > 1 or Path(data).suffix.lower() in READERS:
        raise UserError(f"--data {data}: there is no such file or folder; check the path.")
    try:
        splits = datasets.get_dataset_split_names(data)
        found = [split for split in (TRAIN if train else TEST) if split in splits]
        rows = datasets.load_dataset(data, split=found[0], streaming=streaming) if found else None
    except Exception as error:  # the hub's, the network's and the system's
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--data {data} is no file or folder here, and could not be fetched from the hub ({reason}): check the "
            "path, or without a network pass 'sample', a folder of images, or parquet or .tar files."
        ) from error
    if rows is None:
        wanted = "training" if train else "testing"
        raise NoPartError(f"--data {data} has the parts {', '.join(splits)}: none for {wanted}.")
    length = rows.info.splits[found[0]].num_examples if streaming and rows.info.splits else 0
    if streaming and not length:
        raise UserError(f"--data {data} does not say how long it is, which a stream needs: pass --streaming false.")
    return _source(data, rows, length if streaming else len(rows), train)


def _source(name: str, rows: Any, length: int, train: bool) -> Source:
    """Find the columns: the first of images (or of their bytes), and one of labels."""
    features = rows.features or {}

    def holds_images(feature: Any) -> bool:
        return isinstance(feature, datasets.Image) or (
            isinstance(feature, dict) and {"bytes", "path"} == feature.keys()
        )

    pictures = [column for column, feature in features.items() if holds_images(feature)]
    masks = [column for column in pictures if column.lower() in MASKS][:1] if len(pictures) > 1 else []
    images = [column for column in pictures if column not in masks]
    if not images:
        raise UserError(f"--data {name} has no column of images among {', '.join(features) or 'none'}: add one.")
    if not length:
        raise UserError(f"--data {name} has no images: it is empty.")
    labels = [c for c, f in features.items() if isinstance(f, datasets.ClassLabel) or (c in LABELS and _is_label(f))][
        :1
    ]
    rows = rows.select_columns([images[0], *labels, *masks])
    for column in (images[0], *masks):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    if labels and "string" in features[labels[0]].dtype:  # names of classes
        if isinstance(rows, datasets.IterableDataset):
            labels = []
        else:
            rows = rows.class_encode_column(labels[0])
    label, mask = (found[0] if found else None for found in (labels, masks))
    return Source(name, rows, images[0], label, length, mask, "" if train else "test")


def _is_label(feature: Any) -> bool:
    """One number or name for an image: not a list of boxes, not empty."""
    return str(getattr(feature, "dtype", "")).rstrip("0123456789") in ("int", "uint", "bool", "string", "large_string")


def hold_out(source: Source) -> tuple[Source, Source]:
    """Every fifth row is the test part."""
    held_out = np.arange(source.length) % 5 == 0
    parts = {"kept": ~held_out, "held-out": held_out}
    selected = {part: source.rows.select(np.flatnonzero(rows)) for part, rows in parts.items()}
    train, test = (
        dataclasses.replace(source, rows=rows, length=len(rows), part=part) for part, rows in selected.items()
    )
    return train, test


def open_labeled(data: str) -> tuple[Source, Source]:
    """The training and the test part, both with labels; every fifth image is the test part where there is none."""
    train = open_source(data)
    if train.label is None:
        raise UserError(f"--data {data} has no labels, and this needs them: pass class folders, or a label column.")
    try:
        test = open_source(data, train=False)
    except NoPartError:
        train, test = hold_out(train)
    for which, part in (("training", train), ("test", test)):
        if part.label is None or any(label is None or label < 0 for label in part.rows[part.label]):
            raise UserError(
                f"--data {data} has a {which} part without labels, and this needs one for each image: add them."
            )
    if len(set(train.rows[train.label])) < 2:
        raise UserError(f"--data {data} has one class only: telling classes apart needs at least 2.")
    names, others = (getattr(part.rows.features[part.label], "names", None) for part in (train, test))
    if names and others and names != others:
        strange = sorted(set(others) - set(names))
        if strange:
            raise UserError(
                f"--data {data}: the test part has classes that the training part lacks: {', '.join(strange)}."
            )
        test.rows = test.rows.align_labels_with_mapping({name: i for i, name in enumerate(names)}, test.label)
    return train, test
