"""One image file of any kind -> a picture or an array of the channels asked for."""

import io
from typing import Any

import numpy as np
import tifffile
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

NPY, TIFF = b"\x93NUMPY", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
EXTENSIONS = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN} | {".npy"}


def decode(data: bytes, in_chans: int = 3) -> Image.Image | Tensor:
    """Bytes of an image file -> a PIL image (grey for 1 channel, RGB for 3) or an array (c H W).

    EXIF rotation is applied, transparency is laid over white, 16-bit grey is scaled to 8. `.npy` files, and TIFF files
    for other than 1 or 3 channels, stay arrays: uint8 as it is, everything else float32, where uint16 is scaled to 0-1
    and floats are expected there already.

    Raises:
        ValueError: an array whose channels are not `in_chans`; and whatever a broken file makes the readers raise.
    """
    if data.startswith(NPY):
        return to_tensor(np.load(io.BytesIO(data), allow_pickle=False), in_chans)
    if data.startswith(TIFF) and in_chans not in (1, 3):
        return to_tensor(tifffile.imread(io.BytesIO(data)), in_chans)
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        if data.startswith(TIFF):  # of a kind that PIL does not know, such as floating-point colours
            return to_tensor(tifffile.imread(io.BytesIO(data)), in_chans)
        raise ValueError("not an image of a known kind") from None
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if in_chans not in (1, 3):
        return to_tensor(np.asarray(image), in_chans)
    if image.mode.startswith(("I", "F")):  # 16-bit and floating-point grey, which PIL would clip to 8 bits
        scale = 255 if image.mode == "F" else 1 / 257
        image = Image.fromarray(np.clip(np.asarray(image) * scale, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("L" if in_chans == 1 else "RGB")


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
