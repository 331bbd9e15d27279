"""One image file of any kind -> a picture or an array of the channels asked for."""

import io
import struct
from contextlib import suppress
from typing import Any

import numpy as np
import tifffile
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import pil_to_tensor

LARGEST = 178_956_970  # pixels: what PIL refuses to unpack above
APP1, SOF = 0xE1, (0xC0, 0xC1, 0xC2)  # markers of a JPEG: where a camera writes, and where the frame is described
JPEG, NPY, TIFF = b"\xff\xd8", b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BITS, PLANES = 258, 284  # of a TIFF: bits of each sample, and 2 where each channel is a plane of its own
EXTENSIONS = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN} | {".npy"}


def decode(data: bytes, in_chans: int = 3) -> Image.Image | Tensor:
    """Bytes of an image file -> a PIL image (gray for 1 channel, RGB for 3) or an array (c H W).

    What a file is follows from its bytes. EXIF rotation is applied, transparency is laid over white, 16-bit gray is
    scaled to 8, and so is 32-bit gray that needs more than 16; of an animation it is the first picture. `.npy` files,
    and TIFF files for other than 1 or 3 channels, stay arrays: uint8 as it is, everything else float32, where uint16 is
    scaled to 0-1 and floats are expected there already.

    Raises:
        ValueError: an array whose channels are not `in_chans`; and whatever a broken file makes the readers raise, or
            one of more than `LARGEST` pixels, which is not unpacked.
    """
    if data.startswith(NPY):
        return to_tensor(np.load(io.BytesIO(data), allow_pickle=False), in_chans)
    if data.startswith(TIFF) and in_chans not in (1, 3):
        return read_tiff(data, in_chans)
    try:
        image: Image.Image = open_image(data)
    except UnidentifiedImageError:
        if data.startswith(TIFF):  # of a kind that PIL does not know, such as floating-point colors
            return read_tiff(data, in_chans)
        raise ValueError("not an image of a known kind" if data else "an empty file") from None
    tags = getattr(image, "tag_v2", {})
    if len(image.getbands()) > 1 and tags.get(PLANES) == 2 and max(tags[BITS]) > 8:  # PIL would misread them
        return read_tiff(data, in_chans)
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if in_chans not in (1, 3):
        return to_tensor(np.asarray(image), in_chans)
    if image.mode.startswith(("I", "F")):  # 16-bit and floating-point gray, which PIL would clip to 8 bits
        gray = np.asarray(image)
        if image.mode == "I" and gray.max() > 65535:  # 32 bits, which PIL takes for signed ones
            gray = gray.view(np.uint32) >> 16
        scale = 255 if image.mode == "F" else 1 / 257
        image = Image.fromarray(np.clip(gray * scale, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("L" if in_chans == 1 else "RGB")


def decode_pixels(data: bytes, in_chans: int = 3) -> Tensor:
    """The same as (c H W). An ordinary JPEG is unpacked by torchvision, to the same bytes as by PIL, but faster."""
    if in_chans in (1, 3) and jpeg_channels(data) in (1, in_chans):
        with suppress(RuntimeError):  # below PIL says what is wrong with it
            mode = ImageReadMode.GRAY if in_chans == 1 else ImageReadMode.RGB
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode)
    image = decode(data, in_chans)
    return image if torch.is_tensor(image) else pil_to_tensor(image)


def jpeg_channels(data: bytes) -> int:
    """1 or 3 of a JPEG of 8 bits that no camera may have turned (ITU-T T.81, annex B), else 0. PIL's header takes as
    long as a tenth of the picture."""
    at = 2 if data.startswith(JPEG) else len(data)
    while at + 10 <= len(data) and data[at] == 0xFF and data[at + 1] != APP1:
        if data[at + 1] in SOF:
            precision, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            return channels if precision == 8 and channels in (1, 3) and height * width <= LARGEST else 0
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return 0


def read_tiff(data: bytes, in_chans: int) -> Tensor:
    """Bytes of a TIFF file of any kind -> (c H W), uint8 or float32"""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        if series.size > LARGEST * in_chans:
            raise ValueError(f"an array of shape {series.shape} is more than {LARGEST} pixels")
        return to_tensor(series.asarray(), in_chans)


def open_image(data: bytes) -> Image.Image:
    """PIL's, but not of a program."""
    image = Image.open(io.BytesIO(data))
    if image.format == "EPS":  # ghostscript would run it
        raise ValueError("EPS is a program, not an image: convert it")
    return image


def to_tensor(array: np.ndarray[Any, Any], in_chans: int) -> Tensor:
    """(H W), (H W c) or (c H W) -> (c H W), uint8 or float32"""
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
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError("an array with values that are not finite")
    return torch.from_numpy(np.ascontiguousarray(array))
