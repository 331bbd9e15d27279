"""Open what `--data` names: files, folders and sets on the Hugging Face hub become tables of images.

Tables are read through the `datasets` library. It takes long to import, so this is done where it is used.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from mimkit.data.decode import EXTENSIONS
from mimkit.data.read_errors import explain, reading
from mimkit.data.tars import open_tars
from mimkit.data.walk import ending_of, find_files
from mimkit.errors import UserError, did_you_mean

TRAIN, TEST = ("train", "training"), ("test", "val", "validation", "valid", "eval")  # names of splits
VAL = ("val", "validation", "valid", "test", "eval")  # for dense prediction, where test splits often lack masks
LABELS = ("label", "labels", "cls", "class")
MASKS = ("mask", "masks", "annotation", "annotations", "segmentation", "segmentation_mask", "label", "labels")
READERS = {".parquet": "parquet", ".tar": "webdataset"} | dict.fromkeys(EXTENSIONS, "images")


class NoSplitError(UserError):
    """The data set does not have the requested split."""


@dataclass
class Source:
    """A table of images, and the names of its columns.

    Args:
        name: what `--data` named.
        rows: a `datasets.Dataset`, or a `datasets.IterableDataset` if the source is streaming. Cells of the image and
            the mask column are {"bytes", "path"}; images are not decoded yet.
        image: name of the image column.
        label: name of the label column, or None.
        length: number of rows.
        mask: name of the column with segmentation masks, or None.
        part: name of the split if it is not a training split, such as "test" or "held-out". Names of images without a
            file begin with it.
    """

    name: str
    rows: Any
    image: str
    label: str | None
    length: int
    mask: str | None = None
    part: str = ""

    @property
    def streaming(self) -> bool:
        """Whether rows can only be read in order."""
        import datasets

        return isinstance(self.rows, datasets.IterableDataset)


def open_source(data: str, train: bool = True, streaming: bool = False) -> Source:
    """Open one split of a data set.

    Args:
        data: one of: 'sample' (Fashion-MNIST, included in the package); an image file, a parquet file or a .tar file
            (webdataset); a folder or a glob of such files, all of one kind, where images may lie in class folders;
            the name of a data set on the Hugging Face hub. See `find_files` about globs.
        train: whether to open the training split or the test split. Files and folders named train, test, val or
            validation are splits. A data set without splits is all training data.
        streaming: whether to read rows in order, instead of preparing the whole data set first.

    Raises:
        NoSplitError: the data set has no such split.
        UserError: there is no such data set, or it cannot be read.
    """
    import datasets

    path = Path(f"{resources.files('mimkit.sample')}/*.parquet" if data == "sample" else data).expanduser()
    files = find_files(str(path), READERS)
    if not files and not path.exists():
        return _open_hub(data, train, streaming)
    readers = {READERS[ending_of(file)] for file in files}
    if not readers:
        raise UserError(f"--data {data} has no images: pass a folder with image files, such as .jpg or .png.")
    if len(readers) > 1:
        raise UserError(
            f"--data {data} holds {' and '.join(sorted(readers))} files: pass files of one kind, for example by a glob."
        )
    reader = readers.pop()
    root = path if path.is_dir() else Path(os.path.commonpath([str(Path(file).parent) for file in files]))
    inside = [Path(file).relative_to(root).parts for file in files]
    if reader == "images":
        return _open_images(data, files, inside, train, streaming)
    chosen = _select_split([_split_of("/".join(parts)) for parts in inside], train)
    if not chosen:
        raise NoSplitError(f"--data {data} has no {'training' if train else 'test'} split among its files.")
    files = [files[i] for i in chosen]
    with reading(data, files):
        if reader == "webdataset":
            rows, length = open_tars(data, files, streaming)
        else:
            rows = datasets.load_dataset(reader, data_files=files, split="train", streaming=streaming)
            length = sum(map(_count_rows, files)) if streaming else len(rows)
        return _source(data, rows, length, train)


def open_all(data: str) -> list[Source]:
    """Open all splits that a data set has: the training split, the test split, or both.

    Raises:
        UserError: there is no such data set, or it cannot be read.
    """
    try:
        parts = [open_source(data)]
    except NoSplitError:
        parts = []
    try:
        return [*parts, open_source(data, train=False)]
    except NoSplitError:
        if not parts:
            raise
        return parts


def _split_of(name: str) -> bool | None:
    """Return whether a path names the training split (train-00.parquet, train/x.tar); None if it names no split."""
    words = set("".join(c if c.isalpha() else " " for c in name.lower()).split())
    return True if words & set(TRAIN) else False if words & set(TEST) else None


def _select_split(splits: Sequence[bool | None], train: bool) -> list[int]:
    """Return the indices of the files of one split, given the split that each file names.

    A single file is training data, and so are all files if none names a split. A file that names no split is training
    data if no other file names the training split.
    """
    if len(splits) == 1 or not any(split is not None for split in splits):
        return list(range(len(splits))) if train else []
    return [i for i, split in enumerate(splits) if split is train or (train and split is None and True not in splits)]


def _count_rows(file: str) -> int:
    """Count the rows of a parquet file."""
    from pyarrow import parquet

    return parquet.read_metadata(file).num_rows


def _open_images(data: str, files: list[str], inside: list[tuple[str, ...]], train: bool, streaming: bool) -> Source:
    """Open image files, given their paths and the parts of these paths below the root.

    Top-level folders named like splits are splits if there are no others, or if both splits are there. Otherwise, and
    below the splits, top-level folders are classes, provided that all images lie in one.
    """
    import datasets

    tops = {parts[0] for parts in inside if len(parts) > 1}
    splits = {top: top.lower() in TRAIN for top in tops if top.lower() in (*TRAIN, *TEST)}
    if splits and (splits.keys() == tops or len(set(splits.values())) == 2):
        chosen = [i for i, parts in enumerate(inside) if len(parts) > 1 and splits.get(parts[0]) is train]
        files, inside = [files[i] for i in chosen], [inside[i][1:] for i in chosen]
    elif not train:
        files = []
    if not files:
        which = "training split (a folder named train)" if train else "test split (a folder named test or val)"
        raise NoSplitError(f"--data {data} has no {which} with images.")
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
    """Open a data set on the Hugging Face hub."""
    import datasets

    path = Path(data).expanduser()
    local = path.parent != Path() and path.parent.is_dir()  # OWNER/NAME on the hub has no folder OWNER here
    if local or data.startswith((".", "/", "~")) or data.count("/") > 1 or path.suffix.lower() in READERS:
        near = did_you_mean(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
        raise UserError(f"--data {data}: there is no such file or folder; check the path.{near}")
    try:
        splits = datasets.get_dataset_split_names(data)
        found = [split for split in (TRAIN if train else TEST) if split in splits]
        rows = datasets.load_dataset(data, split=found[0], streaming=streaming) if found else None
    except Exception as error:  # the hub, the network and the system raise many kinds
        reason, hint = explain(error)
        hint = hint or "check the path, or without a network pass 'sample', or files: images, parquet or .tar"
        raise UserError(
            f"--data {data} is no file or folder here, and could not be fetched from the hub ({reason}): {hint}."
        ) from error
    if rows is None:
        wanted = "training" if train else "testing"
        raise NoSplitError(f"--data {data} has the splits {', '.join(splits)}: none for {wanted}.")
    length = rows.info.splits[found[0]].num_examples if streaming and rows.info.splits else 0
    if streaming and not length:
        raise UserError(
            f"--data {data} does not declare its number of rows, which a stream needs: pass --streaming false."
        )
    return _source(data, rows, length if streaming else len(rows), train)


def _source(name: str, rows: Any, length: int, train: bool) -> Source:
    """Find the columns: the first one with images (or with their bytes), and those with labels and masks."""
    import datasets

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
    labels = [c for c, f in features.items() if isinstance(f, datasets.ClassLabel) or (c in LABELS and _is_label(f))]
    labels = labels[:1]
    rows = rows.select_columns([images[0], *labels, *masks])
    for column in (images[0], *masks):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    if labels and "string" in features[labels[0]].dtype:  # class names, which only a table can be searched for
        if isinstance(rows, datasets.IterableDataset):
            labels = []
        else:
            rows = rows.class_encode_column(labels[0])
    label, mask = (columns[0] if columns else None for columns in (labels, masks))
    return Source(name, rows, images[0], label, length, mask, "" if train else "test")


def _is_label(feature: Any) -> bool:
    """Return whether a column holds one number or name for each image, and not lists (such as boxes) or nothing."""
    return str(getattr(feature, "dtype", "")).rstrip("0123456789") in ("int", "uint", "bool", "string", "large_string")


def hold_out(source: Source) -> tuple[Source, Source]:
    """Split a source into a training split and a test split, which consists of every fifth row."""
    held_out = np.arange(source.length) % 5 == 0
    chosen = {"kept": ~held_out, "held-out": held_out}
    selected = {part: source.rows.select(np.flatnonzero(mask)) for part, mask in chosen.items()}
    train, test = (
        dataclasses.replace(source, rows=rows, length=len(rows), part=part) for part, rows in selected.items()
    )
    return train, test


def open_labeled(data: str) -> tuple[Source, Source]:
    """Open the training split and the test split of a data set with labels.

    If there is no test split, every fifth image is held out as one. The label columns of both give the same class
    the same index.

    Raises:
        UserError: an image has no label, there is one class only, or the test split has classes that the training
            split lacks; or there is no such data set.
    """
    train = open_source(data)
    if train.label is None:
        raise UserError(f"--data {data} has no labels, and this needs them: pass class folders, or a label column.")
    try:
        test = open_source(data, train=False)
    except NoSplitError:
        train, test = hold_out(train)
    for which, part in (("training", train), ("test", test)):
        if part.label is None or any(label is None or label < 0 for label in part.rows[part.label]):
            raise UserError(
                f"--data {data} has a {which} split without labels, and this needs one for each image: add them."
            )
    if len(set(train.rows[train.label])) < 2:
        raise UserError(f"--data {data} has one class only: classification needs at least 2.")
    names, others = (getattr(part.rows.features[part.label], "names", None) for part in (train, test))
    if names and others and names != others:
        unknown = sorted(set(others) - set(names))
        if unknown:
            raise UserError(
                f"--data {data}: the test split has classes that the training split lacks: {', '.join(unknown)}."
            )
        test.rows = test.rows.align_labels_with_mapping({name: i for i, name in enumerate(names)}, test.label)
    return train, test
