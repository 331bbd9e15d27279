"""Find the parts of a data set: among files and folders, or on the Hugging Face hub."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from mimkit.data.decode import EXTENSIONS
from mimkit.data.parts import OTHER, TEST, TRAIN, UNLABELED, VAL, part_of
from mimkit.data.read_errors import cause_of
from mimkit.data.tars import count_samples, open_tars
from mimkit.data.walk import ending_of, find_files, is_leftover
from mimkit.errors import UserError, did_you_mean

READERS = {".parquet": "parquet", ".tar": "webdataset"} | dict.fromkeys(EXTENSIONS, "images")


@dataclass(frozen=True)
class Part:
    """A part (split) of a data set, such as its validation images, which is not opened yet.

    Args:
        count: returns the number of images.
        load: returns the rows and their number. Its argument is whether to stream them.
        files: files of the part.
    """

    count: Callable[[], int]
    load: Callable[[bool], tuple[Any, int]]
    files: Sequence[str] = ()


def find_parts(data: str, parts: str | None = None) -> dict[str, Part]:
    """Find the parts of a data set by name. A data set without parts is one, named train.

    Args:
        parts: what `--parts` names. Folders that are named there are parts in any case.
    """
    path = Path(f"{resources.files('mimkit.sample')}/*.parquet" if data == "sample" else data).expanduser()
    files = find_files(str(path), READERS)
    if not files and not path.exists():
        return _find_hub_parts(data)
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
        return _find_image_parts(files, inside, parts)
    names = [part_of("/".join(parts)) for parts in inside]
    if len(files) == 1 or not any(names):
        names = [TRAIN[0]] * len(files)
    groups: dict[str, list[str]] = {}
    for file, name in zip(files, names, strict=True):
        groups.setdefault(name or (OTHER if TRAIN[0] in names else TRAIN[0]), []).append(file)
    return {
        name: Part(partial(_count_rows, chosen), partial(_load_tables, data, reader, chosen), chosen)
        for name, chosen in groups.items()
    }


def _load_tables(data: str, reader: str, files: list[str], streaming: bool) -> tuple[Any, int]:
    """Return the rows of parquet or tar files, and their number."""
    import datasets

    if reader == "webdataset":
        return open_tars(data, files, streaming)
    rows = datasets.load_dataset(reader, data_files=files, split="train", streaming=streaming)
    return rows, _count_rows(files) if streaming else len(rows)


def count_images(folder: Path) -> int:
    """Count the images in a folder and its subfolders."""
    return sum(ending_of(file) in EXTENSIONS for file in find_files(str(folder)))


def folders_in(place: Path) -> list[str]:
    """Return the names of the folders in a folder."""
    return sorted(folder.name for folder in place.iterdir() if folder.is_dir() and not is_leftover(folder.name))


def unused(root: Path, used: Iterable[Path]) -> dict[str, int]:
    """Return the folders in `root` that hold images and none of the places in `used`, with their numbers of images."""
    taken = {place.relative_to(root).parts[0] for place in used if place.is_relative_to(root) and place != root}
    counts = {name: count_images(root / name) for name in folders_in(root) if name not in taken}
    return {name: count for name, count in counts.items() if count}


def images_in(part: Part) -> int | str:
    """Return the number of images of a part that is left out, or why it is unknown. It never stops a command."""
    try:
        return part.count() or "unknown"
    except Exception:  # pyarrow, tarfile and the system raise many kinds
        return "cannot be read"


def _count_rows(files: list[str]) -> int:
    """Count the rows of parquet files or the samples of tar files."""
    from pyarrow import parquet

    if ending_of(files[0]) == ".tar":
        return count_samples(files)
    return sum(parquet.read_metadata(file).num_rows for file in files)


def _find_image_parts(files: list[str], inside: list[tuple[str, ...]], wanted: str | None) -> dict[str, Part]:
    """Find the parts of image files, given their paths and the parts of these paths below the root.

    Top-level folders named like parts are parts if there are no others, if both a training part and one to evaluate on
    are there, or if the training folder holds class folders and another holds none, or the same ones. Folders such as
    train2017 are parts if all are named so. Otherwise, and below the parts, top-level folders are classes, provided
    that all images lie in one.
    """
    tops: dict[str, bool] = {}  # whether all images of a folder lie in folders below it
    inner: dict[str, set[str]] = defaultdict(set)  # the names of these folders
    for path in inside:
        if len(path) > 1:
            tops[path[0]] = tops.get(path[0], True) and len(path) > 2
        if len(path) > 2:
            inner[path[0]].add(path[1])
    training, others = ({top for top in tops if top.lower() in names} for names in (TRAIN, (*VAL, *TEST, *UNLABELED)))
    complete = training | others == tops.keys() or (training and any(top.lower() not in UNLABELED for top in others))
    nested = any(tops[top] for top in training) and not all(tops.values())
    kinds = {part_of(top) for top in tops}
    alike = "" not in kinds and TRAIN[0] in kinds and len(kinds) > 1  # a class may be named bullet_train
    alike = alike or any(inner[top] & inner[other] for top in training for other in tops if other != top)
    asked = {name.strip().lower() for name in wanted.split(",")} if wanted else {""}
    has_parts = complete or nested or alike or asked <= {top.lower() for top in tops}
    names = [(path[0] if len(path) > 1 else OTHER) if has_parts and tops else TRAIN[0] for path in inside]
    parts = {}
    for name in sorted(set(names)):
        chosen = [i for i, other in enumerate(names) if other == name]
        own = [files[i] for i in chosen]
        below = [inside[i][1:] if has_parts and len(inside[i]) > 1 else inside[i] for i in chosen]
        parts[name] = Part(partial(len, chosen), partial(_load_images, own, below), own)
    return parts


def _load_images(files: list[str], inside: list[tuple[str, ...]], streaming: bool) -> tuple[Any, int]:
    """Return rows of image files with their classes, if they lie in class folders, and their number."""
    import datasets

    columns: dict[str, list[Any]] = {"image": files}
    features: dict[str, Any] = {"image": datasets.Image(decode=False)}
    if all(len(parts) > 1 for parts in inside):
        classes = {name: i for i, name in enumerate(sorted({parts[0] for parts in inside}))}
        columns["label"] = [classes[parts[0]] for parts in inside]
        features["label"] = datasets.ClassLabel(names=list(classes))
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return rows.to_iterable_dataset(num_shards=min(64, len(files))) if streaming else rows, len(files)


def _find_hub_parts(data: str) -> dict[str, Part]:
    """Find the splits of a data set on the Hugging Face hub."""
    import datasets

    path = Path(data).expanduser()
    local = path.parent != Path() and path.parent.is_dir()  # OWNER/NAME on the hub has no folder OWNER here
    if local or data.startswith((".", "/", "~")) or data.count("/") > 1 or path.suffix.lower() in READERS:
        near = did_you_mean(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
        raise UserError(f"--data {data}: there is no such file or folder; check the path.{near}")
    counts: dict[str, int] = {}  # known once a split is loaded
    splits = _from_hub(data, partial(datasets.get_dataset_split_names, data))
    return {name: Part(partial(_known, counts, name), partial(_load_split, data, name, counts)) for name in splits}


def _known(counts: dict[str, int], split: str) -> int:
    """Return the number of rows of a split, or 0 if it is not known."""
    return counts.get(split, 0)


def _load_split(data: str, split: str, counts: dict[str, int], streaming: bool) -> tuple[Any, int]:
    """Return the rows of a split, and their number. Note the numbers of all splits in `counts`."""
    import datasets

    rows = _from_hub(data, partial(datasets.load_dataset, data, split=split, streaming=streaming))
    counts |= {name: info.num_examples or 0 for name, info in (rows.info.splits or {}).items()}
    length = counts.get(split, 0) if streaming else len(rows)
    if streaming and not length:
        raise UserError(
            f"--data {data} does not declare its number of rows, which a stream needs: pass --streaming false."
        )
    return rows, length


def _from_hub(data: str, fetch: Callable[[], Any]) -> Any:
    """Return what `fetch` gets from the hub."""
    try:
        return fetch()
    except Exception as error:  # the hub, the network and the system raise many kinds
        reason, hint = cause_of(error)
        hint = hint or "check the path, or without a network pass 'sample', or files: images, parquet or .tar"
        raise UserError(
            f"--data {data} is no file or folder here, and could not be fetched from the hub ({reason}): {hint}."
            f"{did_you_mean(data, os.listdir())}"
        ) from error
