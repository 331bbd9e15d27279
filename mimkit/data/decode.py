"""Decode one image file, of any format, to a PIL image or a tensor with the requested number of channels."""

import io
import struct
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import pil_to_tensor

ValueRange = tuple[float, float]
UNIT: ValueRange = (0.0, 1.0)
MAX_PIXELS = 178_956_970  # PIL refuses to decode larger images too: they may be decompression bombs
APP1, SOF = 0xE1, (0xC0, 0xC1, 0xC2)  # JPEG markers: EXIF data of a camera, and the frame header
JPEG, NPY, TIFF = b"\xff\xd8", b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # first bytes of a file
BITS_PER_SAMPLE, PLANAR_CONFIG = 258, 284  # TIFF tags; PlanarConfiguration 2 stores each channel separately
NO_IMAGES = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # PIL knows these formats, but cannot decode them by itself
EXTENSIONS = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in NO_IMAGES}
EXTENSIONS |= {".npy"}


def decode(data: bytes, in_chans: int = 3, value_range: ValueRange = UNIT) -> Image.Image | Tensor:
    """Decode the bytes of an image file to a PIL image, or to a tensor (c H W) where PIL has no such mode.

    The content decides the format, not the file name. EXIF rotation is applied, and transparent pixels are blended with
    white. Gray images of 16 or 32 bits are scaled to 8 bits; 32-bit images without values above 65,535 count as 16-bit.
    Of an animation, the first frame is used.

    Args:
        data: content of the file.
        in_chans: number of channels. 1 gives a gray image, 3 an RGB image. `.npy` files give tensors, and so do TIFF
            files unless `in_chans` is 1 or 3: uint8 stays uint8; everything else becomes float32, where uint16 is
            scaled to 0-1.
        value_range: floating-point values that become 0 and 1.

    Raises:
        ValueError: an array does not have `in_chans` channels, or the file is not an image.
        Exception: whatever PIL, NumPy or tifffile raise for a damaged file or one of more than `MAX_PIXELS` pixels.
    """
    if data.startswith(NPY):
        return to_tensor(np.load(io.BytesIO(data), allow_pickle=False), in_chans, value_range)
    if data.startswith(TIFF) and in_chans not in (1, 3):
        return read_tiff(data, in_chans, value_range)
    try:
        image: Image.Image = open_image(data)
    except UnidentifiedImageError:
        if data.startswith(TIFF):  # a kind of TIFF that PIL does not support, such as floating-point RGB
            return read_tiff(data, in_chans, value_range)
        raise ValueError("not an image of a known kind" if data else "an empty file") from None
    tags = getattr(image, "tag_v2", {})
    if len(image.getbands()) > 1 and tags.get(PLANAR_CONFIG) == 2 and max(tags[BITS_PER_SAMPLE]) > 8:
        return read_tiff(data, in_chans, value_range)  # PIL decodes such files wrongly
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if in_chans not in (1, 3):
        return to_tensor(np.asarray(image), in_chans, value_range)
    if image.mode.startswith(("I", "F")):  # 16-bit and floating-point gray, which PIL would clip to 8 bits
        gray = np.asarray(image)
        if image.mode == "I" and gray.max() > 65535:  # 32 bits, which PIL reads as signed integers
            gray = gray.view(np.uint32) >> 16
        scaled = 255 * to_unit(gray, value_range) if image.mode == "F" else gray / 257
        image = Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("L" if in_chans == 1 else "RGB")


def decode_pixels(data: bytes, in_chans: int = 3, value_range: ValueRange = UNIT) -> Tensor:
    """Decode the bytes of an image file to a tensor (c H W).

    Like `decode`, but ordinary JPEG files are decoded by torchvision, which is faster than PIL. The values of the two
    differ by at most 1 of 255.
    """
    if in_chans in (1, 3) and jpeg_channels(data) in (1, in_chans):
        with suppress(RuntimeError):  # PIL, below, has the better error message
            mode = ImageReadMode.GRAY if in_chans == 1 else ImageReadMode.RGB
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode)
    image = decode(data, in_chans, value_range)
    return image if torch.is_tensor(image) else pil_to_tensor(image)


def jpeg_channels(data: bytes) -> int:
    """Return the number of channels (1 or 3) of an 8-bit JPEG without EXIF data, or 0 for any other file.

    Parse the header only (ITU-T T.81, annex B). Letting PIL parse it would take a tenth of the decoding time.
    """
    at = 2 if data.startswith(JPEG) else len(data)
    while at + 10 <= len(data) and data[at] == 0xFF and data[at + 1] != APP1:
        if data[at + 1] in SOF:
            precision, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            return channels if precision == 8 and channels in (1, 3) and height * width <= MAX_PIXELS else 0
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return 0


def read_tiff(data: bytes, in_chans: int, value_range: ValueRange = UNIT) -> Tensor:
    """Decode the bytes of a TIFF file to a tensor (c H W), uint8 or float32."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        if series.size > MAX_PIXELS * in_chans:
            raise ValueError(f"an array of shape {series.shape} is more than {MAX_PIXELS} pixels")
        return to_tensor(series.asarray(), in_chans, value_range)


def float_range(data: bytes) -> ValueRange | None:
    """Return the smallest and the largest value of a file with floating-point values, or None for any other file."""
    import tifffile

    with suppress(Exception):  # image libraries raise many kinds of exceptions for damaged files
        if data.startswith(NPY):
            array = np.load(io.BytesIO(data), allow_pickle=False)
        elif not data.startswith(TIFF):
            image = open_image(data)
            array = np.asarray(image) if image.mode == "F" else np.zeros(1, np.uint8)
        else:
            with tifffile.TiffFile(io.BytesIO(data)) as file:
                array = file.series[0].asarray() if file.series[0].size <= MAX_PIXELS else np.zeros(1, np.uint8)
        if np.issubdtype(array.dtype, np.floating) and np.isfinite(array).all():
            return float(array.min()), float(array.max())
    return None


def to_unit(array: np.ndarray[Any, Any], value_range: ValueRange) -> np.ndarray[Any, Any]:
    """Scale floating-point values so that `value_range` becomes 0-1."""
    low, high = value_range
    return array if value_range == UNIT else (array.astype(np.float64) - low) / (high - low)


def open_image(data: bytes) -> Image.Image:
    """Open an image with PIL, but refuse EPS: it is a program, which PIL would run with Ghostscript."""
    image = Image.open(io.BytesIO(data))
    if image.format == "EPS":
        raise ValueError("EPS is a program, not an image: convert it")
    return image


def is_image_file(data: bytes) -> bool:
    """Return whether bytes begin as an image file or an array does."""
    if data.startswith((NPY, *TIFF)):
        return True
    try:
        return bool(open_image(data))
    except (OSError, ValueError, SyntaxError):  # what PIL raises for damaged headers
        return False


def to_tensor(array: np.ndarray[Any, Any], in_chans: int, value_range: ValueRange = UNIT) -> Tensor:
    """Convert an array (H W), (H W c) or (c H W) to a tensor (c H W), uint8 or float32.

    Raises:
        ValueError: the array has another number of channels, another type, or values that are not finite.
    """
    shape = array.shape
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and shape[0] != in_chans and shape[-1] == in_chans:
        array = np.moveaxis(array, -1, 0)
    if array.ndim != 3 or array.shape[0] != in_chans:
        raise ValueError(f"an array of shape {shape} does not have {in_chans} channels")
    if array.dtype == np.uint16:
        array = array.astype(np.float32) / 65535
    elif array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"an array of {array.dtype} is neither uint8, uint16 nor floating point")
    elif array.dtype != np.uint8:
        array = to_unit(array, value_range).astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError("an array with values that are not finite")
    return torch.from_numpy(np.ascontiguousarray(array))
