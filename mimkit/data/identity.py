"""What a data set is, wherever it lies: a hash that a resumed run compares."""

import hashlib
import os

from mimkit.data.order import evenly_spaced
from mimkit.data.sources import Source

SAMPLED = 8  # images in a table whose bytes are hashed: many tables name no images


def names_hash(source: Source) -> str:
    """Return a hash of the names of all images in their order, relative to the folder that holds them.

    Images in a table count by their names there, if they have some, and by the bytes of a few. Of a stream, which can
    only be read in order, the number of rows and the names of its files count; one from the hub has an empty hash.
    """
    import pyarrow.compute as pc

    if source.streaming:
        names = list(source.files)
    else:
        column = source.rows.data.column(source.image)
        names = [name or "" for name in pc.struct_field(column, "path").to_pylist()]
    if not names:
        return ""
    root = len(os.path.dirname(os.path.commonprefix([min(names), max(names)])))  # noqa: RUF071  up to a slash
    hashed = hashlib.sha256("\0".join(name[root:] for name in names).encode(errors="surrogateescape"))
    hashed.update(str(source.length).encode() if source.streaming else b"")
    for index in [] if source.streaming else evenly_spaced(source.length, SAMPLED):
        hashed.update(source.rows[index][source.image]["bytes"] or b"")
    return hashed.hexdigest()
