"""Bytes of unusual image files, and checks of memory that run in a process of their own."""

import io
import itertools
import resource
import struct
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from mimkit.data.decode import decode
from mimkit.data.transforms import eval_transform


def smooth(size=(64, 48)):
    """A picture whose corners differ, and that compression hardly changes."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    return Image.fromarray((255 * np.stack([x, y, 1 - x * y / 2], -1)).astype(np.uint8))


def distance(image, other):
    """The mean absolute difference of two pictures, in levels of 255"""
    return float(np.abs(np.asarray(image).astype(int) - np.asarray(other).astype(int)).mean())


def png(width, height, depth, kind, rows):
    """A PNG of these bytes: for each row, a filter and the samples"""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(array, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def black_tiff(*shape, **options):
    """A TIFF of zeros (... 14,000 14,000), compressed once for all of its strips"""
    strip = zlib.compress(bytes(500 * shape[-1]))
    strips = itertools.repeat(strip, int(np.prod(shape[:-1])) // 500)
    return tiff(strips, shape=shape, dtype=np.uint8, compression="zlib", rowsperstrip=500, **options)


def bombs():
    """(file, in_chans, reason): small files that would fill the memory, and why each is refused"""
    bomb = png(20_000, 20_000, 1, 0, bytes(20_000 * 2_501))
    return [
        (bomb, 3, "400000000 pixels"),
        (bomb, 5, "400000000 pixels"),
        (black_tiff(14_000, 14_000), 3, "196000000 pixels"),
        (black_tiff(5, 14_000, 14_000, photometric="minisblack"), 5, "is more than 178956970"),
    ]


@contextmanager
def memory_limit(megabytes):
    """Limit the memory to this much more than what is in use."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def raises(error, function, *argv):
    """What a function raises, which must be of this class"""
    try:
        function(*argv)
    except error as raised:
        return str(raised)
    raise AssertionError(f"{function} did not raise {error}")


def strip_checks():
    wide = Image.new("RGB", (20_000, 3), "red")
    wide.paste((0, 255, 0), (9_995, 0, 10_005, 3))
    for image in (wide, wide.rotate(90, expand=True)):
        with memory_limit(200):
            middle = eval_transform((224, 224))(image)
        assert middle.size == (224, 224)
        assert distance(middle, Image.new("RGB", (224, 224), (0, 255, 0))) < 1
    with memory_limit(200):  # resizing all of it would need more
        raises(MemoryError, wide.resize, (20_000 * 75, 224))


def bomb_checks():
    for data, in_chans, reason in bombs():
        assert len(data) < 4e6
        with memory_limit(100):
            assert reason in raises(Exception, decode, data, in_chans)
    with memory_limit(100):
        raises(MemoryError, np.zeros, 400_000_000, np.uint8)
