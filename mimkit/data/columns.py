"""Read columns of tables: files of images in any form, and labels as indices of classes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mimkit.data.decode import is_image_file
from mimkit.errors import UserError


def holds_files(rows: Any, column: str) -> bool:
    """Return whether a column of bytes, or of lists of them, holds image files, by its first cells."""
    import datasets

    feature = rows.features[column]
    item = feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature
    if not isinstance(item, datasets.Value) or item.dtype not in ("binary", "large_binary", "uint8", "int8"):
        return False
    if item is feature and "binary" not in item.dtype:
        return False
    cells = [to_cell(column, row)[column] for row in rows.select_columns([column]).take(10)]
    return any(cell and is_image_file(cell["bytes"]) for cell in cells)


def to_cell(column: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return the cell of an image file that a row holds as bytes, a list of numbers, or a list with the bytes."""
    value = row[column]
    if isinstance(value, list) and value and isinstance(value[0], bytes):
        if len(value) > 1:
            raise UserError(
                f"The column {column} holds lists of {len(value)} images. Pass data with one image in a row."
            )
        value = value[0]
    elif isinstance(value, list):
        value = np.array(value, np.int64).astype(np.uint8).tobytes()
    return {column: value and {"bytes": value, "path": None}}


def number_classes(name: str, rows: Any, column: str) -> Any:
    """Replace a column of numbers or names by indices of classes, whose names it keeps; -1 stands for no label."""
    values = [_class_of(name, value) for value in rows[column][:]]
    kinds = {value for value in values if value is not None}
    classes = sorted(kinds, key=class_order)
    index: dict[Any, int] = {value: i for i, value in enumerate(classes)}
    return set_labels(rows, column, [index.get(value, -1) for value in values], list(map(str, classes)))


def class_order(value: Any) -> tuple[int, int, str]:
    """Return the sort key of a class: numbers in their order, also as text, and then names."""
    return (0, int(value), "") if str(value).isdecimal() else (1, 0, str(value))


def _class_of(name: str, value: Any) -> int | str | None:
    """Return the class that a label stands for. Null, NaN, an empty text and negative numbers stand for none."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if value is None or value != value or value in ("", "-1"):
        return None
    if isinstance(value, str | bool):
        return value
    if value % 1:  # also for infinity
        raise UserError(f"--data {name} has the label {value}, which is no class: pass whole numbers or names.")
    return int(value) if value >= 0 else None


def set_labels(rows: Any, column: str, codes: Sequence[int], names: list[str]) -> Any:
    """Replace a column by class indices and the names of the classes."""
    import datasets

    feature = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    return rows.remove_columns(column).add_column(column, np.array(codes, np.int64), feature=feature)
