"""Read webdataset shards: tar files in which the files of a sample follow each other and share a name.

The name of a sample ends at the first dot of a file's name, and its field is the rest: `0001.jpg` and `0001.cls` are
the fields "jpg" and "cls" of the sample "0001".
"""

import json
import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, groupby, islice
from typing import Any, NamedTuple

from mimkit.data.decode import EXTENSIONS
from mimkit.data.walk import is_leftover, is_utf8
from mimkit.errors import UserError, some, tell

FIRST = 100  # samples in which the fields are looked up
MAX_PICTURES = 16  # more images with one name before the first dot are most likely samples of their own
AS_TEXT = " as text"
TEXTS = ("cls", "cls2", "class", "label", "labels", "index", "inx", "id", "txt", "text")
DOTS = "The name of a sample ends at the first dot"


class Columns(NamedTuple):
    """The columns of a table of samples.

    Args:
        pictures: columns with images: "image" for `0001.jpg` and "left" for `0001.left.jpg`; or the fields themselves.
        texts: fields with text, such as "cls", and entries of the field "json" that are numbers or text.
        numbers: those of `texts` that are whole numbers in the first samples.
        whole: whether `pictures` are fields, because samples have both `0001.jpg` and `0001.png`.
    """

    pictures: tuple[str, ...]
    texts: tuple[str, ...]
    numbers: tuple[str, ...]
    whole: bool


def open_tars(data: str, files: list[str], streaming: bool) -> tuple[Any, int]:
    """Open tar files as a table, and count its rows.

    The table is copied to the cache of `datasets`, or read in order with `streaming`. Samples without an image are left
    out. The texts of a column become numbers if all of them are. A stream has seen the first samples only, and takes a
    later text among numbers for a missing one.

    Args:
        data: what the user named.
        files: the tar files.
        streaming: whether to return a `datasets.IterableDataset`, instead of a `datasets.Dataset`.

    Raises:
        UserError: there are no images, a file is damaged, or names of samples have dots.
    """
    import datasets

    columns = _find_columns(data, files)
    texts = [name if name not in columns.numbers else f"{name}{AS_TEXT}" for name in columns.texts]
    features = datasets.Features(
        {name: datasets.Image(decode=False) for name in columns.pictures}
        | {name: datasets.Value("string") for name in texts}
        | {name: datasets.Value("int64") for name in columns.numbers}
    )
    arguments: dict[str, Any] = {"columns": columns, "quiet": streaming}
    if streaming:
        rows = datasets.IterableDataset.from_generator(read_rows, features, arguments | {"files": files})
        return rows.remove_columns([name for name in texts if name.endswith(AS_TEXT)]), count_samples(files)
    state = tuple((os.path.getsize(file), os.stat(file).st_mtime_ns) for file in files)
    arguments |= {"files": tuple(files), "state": state}  # of a list, files would be read one by one
    rows = datasets.Dataset.from_generator(read_rows, features, gen_kwargs=arguments)
    for name in columns.numbers:
        if all(map(_is_number, rows[f"{name}{AS_TEXT}"][:])):
            rows = rows.remove_columns(f"{name}{AS_TEXT}")
        else:
            rows = rows.remove_columns(name).rename_column(f"{name}{AS_TEXT}", name)
    return rows.select_columns([*columns.pictures, *columns.texts]), len(rows)


def _find_columns(data: str, files: list[str]) -> Columns:
    """Find the columns of the first samples. Say so if the images have dots in their names."""
    samples = [
        (name, {field: b"" if _is_picture(field) else content for field, content in fields.items()})
        for name, fields in islice(chain.from_iterable(map(read_samples, files)), FIRST)
    ]
    pictures = [list(filter(_is_picture, contents)) for _, contents in samples]
    for (name, _), own in zip(samples, pictures, strict=True):
        if len(own) > MAX_PICTURES:
            raise UserError(
                f"--data {data}: the sample {name} has {len(own)} images, such as {name}.{own[0]}. {DOTS}: replace the "
                "other dots in the names of the files."
            )
    whole = any(len(set(map(_column, own))) < len(own) for own in pictures)
    counts = Counter(_column(field, whole) for own in pictures for field in own)
    if not counts:
        raise UserError(f"--data {data} has no images, such as 0001.jpg, in its first samples: pass other files.")
    if max(counts.values()) * 2 < sum(map(bool, pictures)):
        name, own = next((name, own) for (name, _), own in zip(samples, pictures, strict=True) if own)
        raise UserError(
            f"--data {data}: {name}.{own[0]} is the image {own[0]} of the sample {name}. {DOTS}: replace the others."
        )
    if len(counts) > 1 and (whole or "image" not in counts):
        tell(
            f"{data}: a sample, such as {samples[0][0]}, has the images {', '.join(counts)}. The first is used: name "
            f"another by --image-column. {DOTS} in the names of files."
        )
    texts = [_texts(contents) for _, contents in samples]
    names = {name: None for own in texts for name in own if name not in counts}
    numbers = (n for n in names if all(_is_number(own.get(n)) for own in texts) and any(own.get(n) for own in texts))
    return Columns(tuple(counts), tuple(names), tuple(numbers), whole)


def count_samples(files: Sequence[str]) -> int:
    """Return the number of samples with an image."""
    return sum(1 for _ in _select(files, content=False))


def _select(
    files: Sequence[str], content: bool = True, quiet: bool = False
) -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """Yield the file, the name and the fields of the samples with an image. Say which others there are."""
    skipped: dict[str, list[str]] = defaultdict(list)
    for file in files:
        for name, fields in read_samples(file, content):
            if not any(map(_is_picture, fields)):
                skipped["a sample without an image"].append(f"{name} in {file}")
            elif not is_utf8(name):
                skipped["its name is not UTF-8"].append(f"{name} in {file}")
            else:
                yield file, name, fields
    for why, names in {} if quiet else skipped.items():
        tell(f"left out {some(names, 1)}: {why}.")


def read_rows(
    files: Sequence[str], columns: Columns, quiet: bool = False, state: Any = None
) -> Iterator[dict[str, Any]]:
    """Yield a row for each sample with an image. Columns of numbers are also there as texts, named with `AS_TEXT`.

    Args:
        files: the tar files.
        columns: the columns of a row.
        quiet: whether not to say which samples are left out.
        state: sizes and times of the files. A change makes `datasets` prepare its cache anew.
    """
    for file, name, fields in _select(files, quiet=quiet):
        pictures: dict[str, Any] = {}
        for field in filter(_is_picture, fields):
            column = _column(field, columns.whole)
            if column not in columns.pictures or column in pictures:
                raise UserError(
                    f"{file}: {name}.{field} is one of two images of its sample, or not named like the others. "
                    f"{DOTS}: rename it, a mask to {name}.mask.png."
                )
            pictures[column] = {"bytes": fields[field], "path": f"{name}.{field}"}
        found = _texts(fields)
        texts: dict[str, Any] = {column: found.get(column) for column in columns.texts}
        for column in columns.numbers:
            text = texts[f"{column}{AS_TEXT}"] = texts[column]
            texts[column] = int(text) if text and _is_number(text) else None
        yield dict.fromkeys(columns.pictures) | texts | pictures


def read_samples(file: str, content: bool = True) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the name and the fields of each sample in a tar file. Without `content`, the fields are empty.

    Raises:
        UserError: the file is damaged, or the files of a sample do not follow each other.
    """
    seen = set()
    try:
        with tarfile.open(file) as tar:
            members = (member for member in tar if member.isfile() and not is_leftover(member.name))
            for name, group in groupby(members, lambda member: _split(member.name)[0]):
                fields: dict[str, bytes] = {}
                for member in group:
                    field = _split(member.name)[1]
                    if name in seen or field in fields:
                        raise UserError(
                            f"{file}: {member.name} is not next to the other files of the sample {name}, or is there "
                            f"twice. {DOTS}: sort the files by name, or replace the other dots in their names."
                        )
                    source = tar.extractfile(member) if content else None
                    fields[field] = source.read() if source else b""
                seen.add(name)
                yield name, fields
            if tar.fileobj:
                tar.fileobj.seek(tar.offset)
                if any(tar.fileobj.read(tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end of the file
                    raise tarfile.ReadError("a damaged header")
    except (tarfile.TarError, EOFError) as error:
        reason = "not a tar file" if "\n" in str(error) else error  # tarfile lists all compressions that it tried
        raise UserError(f"{file} cannot be read ({reason}): get another copy of it.") from error


def _split(path: str) -> tuple[str, str]:
    """Split the path of a file in a tar file into the name of its sample and its field."""
    folder, name = os.path.split(path.removeprefix("./"))
    name, _, field = name.partition(".")
    return os.path.join(folder, name), field.lower()


def _is_picture(field: str) -> bool:
    return f".{field.rpartition('.')[2]}" in EXTENSIONS


def _column(field: str, whole: bool = False) -> str:
    """Return the column of a field with an image."""
    return field if whole else field.rpartition(".")[0] or "image"


def _texts(fields: dict[str, bytes]) -> dict[str, str | None]:
    """Return the fields with text, and the numbers and texts in the field "json". Empty ones are None."""
    try:
        entries = json.loads(fields.get("json") or "{}")
    except ValueError as error:  # not JSON, or not UTF-8
        content = fields["json"][:60]
        raise UserError(f"A .json file of a sample is not valid ({error}): {content!r}. Correct it.") from error
    plain = {k: v for k, v in entries.items() if not isinstance(v, list | dict)} if isinstance(entries, dict) else {}
    files = {field: fields[field].decode(errors="replace").strip() for field in fields if field in TEXTS}
    values = files | {
        name: value for name, value in plain.items() if name not in files
    }  # the first label column is used
    whole = {n: int(v) for n, v in values.items() if isinstance(v, float) and v.is_integer()}
    return {n: None if v in (None, "") or v != v else str(whole.get(n, v)) for n, v in values.items()}


def _is_number(text: str | None) -> bool:
    """Return whether a text is a whole number of 64 bits, or missing."""
    return text is None or (text.removeprefix("-").isdecimal() and len(text) <= 18)
