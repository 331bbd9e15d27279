"""Open what `--data` names: files, folders and sets on the Hugging Face hub become tables of images.

Tables are read through the `datasets` library. It takes long to import, so this is done where it is used.
"""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from mimkit.data.columns import class_order, holds_files, number_classes, set_labels, to_cell
from mimkit.data.decode import UNIT, ValueRange, float_range
from mimkit.data.find import Part, find_parts, images_in
from mimkit.data.order import evenly_spaced
from mimkit.data.parts import TRAIN, choose_parts, describe, wanted_parts
from mimkit.data.read_errors import reading
from mimkit.data.sample import read_bytes
from mimkit.errors import UserError, some, tell

LABELS = ("label", "labels", "cls", "class")
MASKS = ("mask", "masks", "annotation", "annotations", "segmentation", "segmentation_mask", "label", "labels")


class NoColumnError(UserError):
    """A part of a data set does not have the requested column."""


@dataclass
class Source:
    """A table of images, and the names of its columns.

    Args:
        name: what `--data` named.
        rows: a `datasets.Dataset`, or a `datasets.IterableDataset` if the source is streaming. Cells of the image and
            the mask column are {"bytes", "path"}; images are not decoded yet.
        image: name of the image column.
        label: name of the label column, or None. Of a table that is not streaming, it holds class indices, and -1 for
            images without a label.
        length: number of rows.
        mask: name of the column with segmentation masks, or None.
        part: name of the split if it is not a training split, such as "test" or "held-out". Names of images without a
            file begin with it.
        parts: names of the parts of the data set that the rows come from.
        about: which parts were taken and which were left out, as sentences to print.
        value_range: values of floating-point images that become 0 and 1.
        files: the files that the rows come from; empty for a data set on the hub.
    """

    name: str
    rows: Any
    image: str
    label: str | None
    length: int
    mask: str | None = None
    part: str = ""
    parts: tuple[str, ...] = ()
    about: str = ""
    value_range: ValueRange = UNIT
    files: tuple[str, ...] = ()

    @property
    def streaming(self) -> bool:
        """Whether rows can only be read in order."""
        import datasets

        return isinstance(self.rows, datasets.IterableDataset)


def open_source(
    data: str,
    train: bool = True,
    streaming: bool = False,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Source:
    """Open one split of a data set.

    Args:
        data: one of: 'sample' (Fashion-MNIST, included in the package); an image file, a parquet file or a .tar file
            (webdataset); a folder or a glob of such files, all of one kind, where images may lie in class folders;
            the name of a data set on the Hugging Face hub. See `find_files` about globs.
        train: whether to open the training split or the split to evaluate on, see `choose_parts`. Files and folders
            named train, val, test or the like are splits. A data set without splits is all training data.
        streaming: whether to read rows in order, instead of preparing the whole data set first.
        image_column, label_column: names of columns, where the data set is a table. By default they are found by their
            types and names.

    Raises:
        UserError: there is no such data set, or it cannot be read.
    """
    found = find_parts(data)
    training, judge = choose_parts(found)
    names = training if train else [judge] if judge else []
    if not names:
        raise UserError(
            f"--data {data} has no {'training' if train else 'test'} split. It has the splits {', '.join(found)}: none "
            f"for {'training' if train else 'testing'}."
        )
    return open_part(data, found, names[0], streaming, image_column, label_column)


def open_all(
    data: str,
    parts: str | None = None,
    streaming: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
) -> list[Source]:
    """Open all parts that a data set has, without their labels. Masks are kept.

    Args:
        parts: names of the parts to open, separated by commas. Default: all, also those that have another name than
            train, val or test.
        data, streaming, image_column, label_column: see `open_source`.

    Raises:
        UserError: there is no such data set or part, or it cannot be read.
    """
    found = find_parts(data, parts)
    names = wanted_parts(data, found, parts) or sorted(found, key=lambda name: name.lower() not in TRAIN)
    options = streaming, image_column, label_column
    opened = [open_part(data, found, name, *options, labeled=False) for name in names]
    used = {name: source.length for name, source in zip(names, opened, strict=True)}
    rest = {name: images_in(part) for name, part in found.items() if name not in used}
    about = describe(("Images", used), ("Left out", rest)) if len(found) > 1 else ""
    return [dataclasses.replace(source, about=about) for source in opened]


def open_images(
    data: str,
    parts: str | None = None,
    streaming: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Source:
    """Open the images of all parts of a data set as one source, without labels and masks.

    See `open_all` for the arguments. Of the included 'sample', the training images are the default: its published
    accuracies are measured on images that no network was pre-trained on.
    """
    opened = open_all(data, parts or ("train" if data == "sample" else None), streaming, image_column, label_column)
    return join(opened) if len(opened) > 1 else dataclasses.replace(opened[0], mask=None)


def join(sources: list[Source], *kept: str) -> Source:
    """Join sources to one with the rows of all, one after the other.

    Args:
        kept: which columns to keep besides the images: "label", "mask".
    """
    import datasets

    first, rows = sources[0], []
    for source in sources:
        columns = {getattr(source, kind): getattr(first, kind) for kind in ("image", *kept)}
        part = source.rows.select_columns(list(columns))
        for own, name in columns.items():
            part = part if own == name else part.rename_column(own, name)
        rows.append(part)
    if first.streaming:
        shards = [part.shard(part.num_shards, i) for part in rows for i in range(part.num_shards)]
        features = datasets.Features({first.image: datasets.Image(decode=False)})
        joined = datasets.IterableDataset.from_generator(_chain, features=features, gen_kwargs={"shards": shards})
    else:
        joined = datasets.concatenate_datasets(rows)
    length, parts = sum(source.length for source in sources), tuple(name for s in sources for name in s.parts)
    dropped: dict[str, Any] = {kind: None for kind in ("label", "mask") if kind not in kept}
    files = tuple(file for source in sources for file in source.files)
    return dataclasses.replace(first, rows=joined, length=length, part="", parts=parts, files=files, **dropped)


def _chain(shards: list[Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of shards. `datasets` gives each worker some of the list."""
    for shard in shards:
        for row in shard.iter(1):  # in a worker, a plain loop over a `datasets` stream yields only a part of its rows
            yield {name: cell[0] for name, cell in row.items()}


def set_value_range(value_range: ValueRange, *sources: Source) -> list[Source]:
    """Set which values of floating-point images become 0 and 1. Warn of images whose values lie outside.

    Such images would be decoded as black or white. A few images of each source are looked at.

    Raises:
        UserError: the range is empty.
    """
    low, high = value_range
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"--value-range {low:g},{high:g} must be two numbers, of which the second one is larger.")
    for source in sources:
        rows = (
            source.rows.take(8) if source.streaming else map(source.rows.__getitem__, evenly_spaced(source.length, 8))
        )
        ranges = []
        for row in rows:
            with suppress(OSError, ValueError):  # it counts as a bad image later
                ranges.append(float_range(read_bytes(row[source.image] or {"bytes": None, "path": None})))
        lows, highs = zip(*[found for found in ranges if found] or [value_range], strict=True)
        if min(lows) < low or max(highs) > high:
            tell(
                f"warning: {source.name} has floating-point images of values from {min(lows):g} to {max(highs):g}, and "
                f"{low:g} to {high:g} becomes 0 to 1: pass --value-range="
                f"{_round_down(min(lows)):g},{-_round_down(-max(highs)):g}."
            )
    return [dataclasses.replace(source, value_range=value_range) for source in sources]


def _round_down(value: float) -> float:
    """Round a value down to two significant digits; a positive one to 0."""
    if value >= 0:
        return 0
    value = float(f"{value:.5g}")  # float32 has no exact 0.001
    unit = 10.0 ** (math.floor(math.log10(-value)) - 1)
    return float(f"{math.floor(value / unit) * unit:g}")


# Columns -------------------------------------------------------------------------------------------------------------


def open_part(
    data: str,
    found: dict[str, Part],
    part: str,
    streaming: bool,
    image_column: str | None,
    label_column: str | None,
    labeled: bool = True,
) -> Source:
    """Open a part of a data set, with or without its labels."""
    with reading(data, found[part].files):
        rows, length = found[part].load(streaming)
        source = _source(data, rows, length, image_column, label_column, labeled)
    shown, files = "" if part.lower() in TRAIN else part, tuple(found[part].files)
    return dataclasses.replace(source, part=shown, parts=(part,), files=files)


def _source(
    name: str, rows: Any, length: int, image_column: str | None, label_column: str | None, labeled: bool = True
) -> Source:
    """Find the columns: the first one with images (or with their bytes), and those with labels and masks.

    Args:
        labeled: whether to keep the labels, as class indices.
    """
    import datasets

    features = rows.features or {}
    label_column = label_column if labeled or label_column in features else None
    for flag, column in (("--image-column", image_column), ("--label-column", label_column)):
        if column is not None and column not in features:
            raise NoColumnError(f"{flag} {column}: --data {name} has the columns {some(features, 6)}. Name one.")

    def holds_images(feature: Any) -> bool:
        return isinstance(feature, datasets.Image) or (
            isinstance(feature, dict) and {"bytes"} <= feature.keys() <= {"bytes", "path"}
        )

    pictures = [column for column, feature in features.items() if holds_images(feature)]
    candidates = list(filter(None, (image_column, label_column))) if image_column or pictures else [*features]
    pictures += [column for column in candidates if column not in pictures and holds_files(rows, column)]
    if image_column and image_column not in pictures:
        raise UserError(
            f"--image-column {image_column}: the column holds {str(features[image_column])[:100]}, not image files. "
            f"Choose from {some(features, 6)}."
        )
    masks = [c for c in pictures if c == label_column or (c.lower() in MASKS and label_column not in pictures)]
    masks = [column for column in masks if column != image_column][:1] if len(pictures) > 1 else []
    images = [image_column] if image_column else [column for column in pictures if column not in masks]
    if not images:
        raise UserError(
            f"--data {name} has no column of images among {some(features, 6) or 'none'}: add one, or name "
            "it with --image-column."
        )
    if not length:
        raise UserError(f"--data {name} has no images: it is empty.")
    labels = [c for c, f in features.items() if isinstance(f, datasets.ClassLabel) or (c in LABELS and _is_label(f))]
    if label_column and label_column not in masks:
        labels = [label_column] if _is_label(features[label_column]) else []
        if not labels:
            raise UserError(
                f"--label-column {label_column}: the column holds {str(features[label_column])[:100]}, where one "
                "number or name for each image is needed. Choose another column."
            )
    labels = [column for column in labels if labeled and column not in (*images[:1], *masks)][:1]
    rows = rows.select_columns([images[0], *labels, *masks])
    for column in (images[0], *masks):
        if isinstance(features[column], datasets.List | datasets.LargeList):
            changed = datasets.Features(rows.features | {column: datasets.Image(decode=False)})
            rows = rows.map(partial(to_cell, column), features=changed)
        rows = rows.cast_column(column, datasets.Image(decode=False))
    if labels and isinstance(rows, datasets.IterableDataset):
        if not str(features[labels[0]].dtype).startswith(
            ("int", "uint", "bool")
        ):  # class names, which only a table can be searched for
            labels = []
    elif labels and not isinstance(features[labels[0]], datasets.ClassLabel):
        rows = number_classes(name, rows, labels[0])
    label, mask = (columns[0] if columns else None for columns in (labels, masks))
    return Source(name, rows, images[0], label, length, mask)


def _is_label(feature: Any) -> bool:
    """Return whether a column holds one number or name for each image, and not lists (such as boxes) or nothing."""
    kind = str(getattr(feature, "dtype", "")).rstrip("0123456789")
    return kind in ("int", "uint", "bool", "float", "string", "large_string", "binary", "large_binary")


# Sets with labels ----------------------------------------------------------------------------------------------------


def hold_out(source: Source) -> tuple[Source, Source]:
    """Split a source into a training split and a test split, which consists of every fifth row."""
    held_out = np.arange(source.length) % 5 == 0
    chosen = {"kept": ~held_out, "held-out": held_out}
    selected = {part: source.rows.select(np.flatnonzero(mask)) for part, mask in chosen.items()}
    train, test = (
        dataclasses.replace(source, rows=rows, length=len(rows), part=part) for part, rows in selected.items()
    )
    return train, test


def open_labeled(
    data: str, parts: str | None = None, image_column: str | None = None, label_column: str | None = None
) -> tuple[Source, Source]:
    """Open the part of a data set with labels to train on, and the one to evaluate on, see `choose_parts`.

    If there is none to evaluate on, every fifth image is held out. Images without a label are left out. The label
    columns of both give the same class the same index. `about` of the first source describes all this.

    Args:
        parts: names of the parts to use, separated by commas. Default: train, and val or test.
        data, image_column, label_column: see `open_source`.

    Raises:
        UserError: no image has a label, there is one class only, or the test split has classes that the training
            split lacks; or there is no such data set.
    """
    found, unlabeled = find_parts(data, parts), dict[str, str]()
    opened = cache(lambda name: open_part(data, found, name, False, image_column, label_column))

    def labeled(name: str) -> bool:
        try:
            opened(name)
        except NoColumnError:
            if name.lower() in TRAIN:
                raise
            unlabeled[name] = "without labels"
            return False
        if (labels_of(opened(name)) >= 0).any():
            return True
        unlabeled[name] = f"{opened(name).length:,}, without labels"
        return False

    training, judge = choose_parts(found, wanted_parts(data, found, parts), labeled)
    if not training:
        raise UserError(f"--data {data} has the splits {some(found, 6)}: none for training. Choose by --parts.")
    for name in (*training, *([judge] if judge else [])):
        if name in training and opened(name).label is None:
            raise UserError(
                f"--data {data} has no labels in its part {name}, and this needs them: pass class folders, or a label "
                "column."
            )
        if not labeled(name):
            which = "training" if name in training else "test"
            raise UserError(f"--data {data} has a {which} split without labels, and this needs them: add them.")
    names = list(dict.fromkeys(label for name in training for label in class_labels(opened(name))))
    if any(class_labels(opened(name)) != names for name in training):
        names.sort(key=class_order)
    kept = {name: _keep_labeled(_renumber(opened(name), names)) for name in training}
    train = kept[training[0]] if len(training) == 1 else join(list(kept.values()), "label")
    if len(set(train.rows[train.label])) < 2:
        raise UserError(f"--data {data} has one class only: classification needs at least 2.")
    if judge is None:
        train, test = hold_out(train)
        evaluated = {f"every fifth of {' and '.join(training)}": test.length}
    else:
        if unknown := sorted(set(class_labels(opened(judge))) - set(names)):
            raise UserError(
                f"--data {data}: the test split has classes that the training split lacks: {some(unknown, 6)}."
            )
        kept[judge] = test = _keep_labeled(_renumber(opened(judge), names))
        evaluated = {judge: test.length}
    missing = {f"images of {name} without a label": opened(name).length - kept[name].length for name in kept}
    rest = {name: unlabeled.get(name) or images_in(part) for name, part in found.items() if name not in kept}
    rest |= {name: count for name, count in missing.items() if count}
    counts = {name: kept[name].length for name in training} if judge else {" and ".join(training): train.length}
    about = describe(("Training images", counts), ("Validation images", evaluated), ("Left out", rest))
    return dataclasses.replace(train, about=about), test


def labels_of(source: Source) -> np.ndarray[Any, Any]:
    """Return the class index of each image of a table, -1 for none."""
    if source.label is None:
        return np.full(source.length, -1)
    return np.array([-1 if label is None else label for label in source.rows[source.label][:]], np.int64)


def class_labels(source: Source) -> list[str]:
    """Return the names of the classes of a source with labels."""
    return list(source.rows.features[source.label].names)


def _keep_labeled(source: Source) -> Source:
    """Leave out the images without a label."""
    labeled = labels_of(source) >= 0
    if labeled.all():
        return source
    return dataclasses.replace(source, rows=source.rows.select(np.flatnonzero(labeled)), length=int(labeled.sum()))


def _renumber(source: Source, names: list[str]) -> Source:
    """Give the classes the indices that they have in `names`."""
    own = class_labels(source)
    if own == names or source.label is None:
        return source
    table = np.array([*(names.index(name) for name in own), -1])  # the last one is for images without a label, -1
    return dataclasses.replace(source, rows=set_labels(source.rows, source.label, table[labels_of(source)], names))
