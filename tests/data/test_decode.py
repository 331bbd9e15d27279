import io
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from conftest import encoded, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import bomb_checks, bombs, distance, png, smooth, strip_checks, tiff
from PIL import Image
from torchvision.transforms import v2

from mimkit.data.decode import decode, decode_pixels, float_range, jpeg_channels

# Formats and modes ---------------------------------------------------------------------------------------------------


def test_formats_and_modes_become_rgb_or_gray():
    color = picture()
    for image, options in [
        (color, {"kind": "PNG"}),
        (color, {"kind": "JPEG"}),
        (color.convert("L"), {"kind": "PNG"}),
        (color.convert("CMYK"), {"kind": "JPEG"}),
        (color.convert("P"), {"kind": "GIF"}),
        (color.convert("1"), {"kind": "PNG"}),
        (color, {"kind": "WEBP"}),
        (color, {"kind": "TIFF"}),
    ]:
        decoded = decode(encoded(image, **options))
        assert (decoded.mode, decoded.size) == ("RGB", (40, 30))
        assert decode(encoded(image, **options), in_chans=1).mode == "L"


def test_transparent_pixels_are_blended_with_white():
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((0, 0), (255, 0, 0, 255))
    decoded = decode(encoded(rgba))
    assert decoded.getpixel((0, 0)) == (255, 0, 0)
    assert decoded.getpixel((1, 1)) == (255, 255, 255)


def test_16_bit_gray_is_scaled():
    values = np.array([[0, 257, 65535, 32896]], dtype=np.uint16)
    decoded = decode(encoded(Image.fromarray(values)))
    assert [decoded.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 255, 128]


GRAY = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21  # up to 64,491
COLORS = np.stack([GRAY, GRAY[::-1], GRAY.T.reshape(48, 64)], -1)
DEEP = {
    "png": encoded(Image.fromarray(GRAY)),
    "png of colors": png(64, 48, 16, 2, b"".join(b"\0" + row.tobytes() for row in COLORS.astype(">u2"))),
    "pgm, I": b"P5 64 48 65535\n" + GRAY.astype(">u2").tobytes(),
    "jpeg 2000": encoded(Image.fromarray(GRAY), "JPEG2000"),
    "tiff, I;16": encoded(Image.fromarray(GRAY), "TIFF"),
    "tiff, I;16B": tiff(GRAY, byteorder=">"),
    "tiff, I": encoded(Image.fromarray(GRAY.astype(np.int32)), "TIFF"),
    "tiff, 32 bits": tiff(GRAY.astype(np.uint32) << 16),
    "tiff of colors": tiff(COLORS, photometric="rgb"),
    "tiff of planes": tiff(np.moveaxis(COLORS, -1, 0), photometric="rgb", planarconfig="separate"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_eight_bits_are_scaled(kind):
    decoded = decode(DEEP[kind])
    found = 255 * decoded.permute(1, 2, 0).numpy() if torch.is_tensor(decoded) else np.asarray(decoded)
    expected = COLORS if kind.endswith(("colors", "planes")) else GRAY[..., None]
    assert found.shape == (48, 64, 3)
    assert np.abs(found - expected / 257).max() <= 1
    assert found.max() < 255  # nothing is clipped


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_keeps_its_colors(kind):
    decoded = decode(encoded(smooth().convert("CMYK"), kind))
    assert distance(decoded, smooth()) < 3
    assert distance(decoded, 255 - np.asarray(smooth())) > 60


def rotated(image, orientation, kind="JPEG", **options):
    """A file as a rotated camera stores it, with an EXIF tag that says how to turn it upright"""
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
    undo |= {7: "TRANSVERSE", 8: "ROTATE_270"}
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = image.transpose(Image.Transpose[undo[orientation]]) if orientation in undo else image
    return encoded(stored, kind, exif=exif, **options)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied(kind):
    for orientation in range(1, 9):
        decoded = decode(rotated(smooth(), orientation, kind))
        assert decoded.size == (64, 48)
        assert distance(decoded, smooth()) < 3, orientation
    assert distance(decode(encoded(smooth().rotate(180), kind)), smooth()) > 60


def test_exif_rotation_swaps_the_sides():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert decode(encoded(picture(), "JPEG", exif=exif)).size == (30, 40)


def test_first_frame_of_an_animation_is_used():
    frames = [smooth((20, 24)).quantize(64), *(Image.new("RGB", (20, 24), color) for color in ("lime", "blue"))]
    first = frames[0].convert("RGB")
    for kind, options in (("GIF", {}), ("PNG", {}), ("PNG", {"default_image": True}), ("WEBP", {"lossless": True})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert Image.open(io.BytesIO(data)).is_animated
        assert distance(decode(data), first) == 0
        assert distance(decode(data), frames[1]) > 60


# Tensors -------------------------------------------------------------------------------------------------------------


def textured(size, mode="RGB"):
    """A picture with edges and slopes in all colors."""
    return picture(1, (size[0] // 10, size[1] // 10)).resize(size, Image.Resampling.BICUBIC).convert(mode)


def test_decode_pixels_equals_decode_for_all_modes():
    exif = Image.Exif()
    exif[0x0112] = 6
    color, gray = textured((100, 80)), textured((100, 80), "L")
    sixteen = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    for file, shown in [
        (encoded(color, "PNG", exif=exif), color.transpose(Image.Transpose.ROTATE_270)),
        (encoded(sixteen), gray.convert("RGB")),
        (encoded(gray), gray.convert("RGB")),
        (encoded(color.convert("CMYK"), "TIFF"), color.convert("CMYK").convert("RGB")),
    ]:
        assert torch.equal(decode_pixels(file), v2.functional.pil_to_tensor(shown))


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from(["RGB", "L", "CMYK"]), st.data())
def test_decode_pixels_equals_decode_for_jpegs(wide, high, mode, data):
    """Both give the same pixels for every subsampling, progressive or rotated; truncated files give the same error."""
    options = {"quality": data.draw(st.integers(1, 100)), "progressive": data.draw(st.booleans())}
    options["subsampling"] = data.draw(st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]))
    exif = Image.Exif()
    if orientation := data.draw(st.integers(0, 8)):  # torchvision decodes files without EXIF data only
        exif[0x0112] = orientation
        options["exif"] = exif
    file = encoded(textured((wide, high)).convert(mode), "JPEG", **options)
    assert jpeg_channels(file) == (0 if orientation or mode == "CMYK" else {"L": 1, "RGB": 3}[mode])
    for in_chans in (1, 3):
        expected = v2.functional.pil_to_tensor(decode(file, in_chans)).int()
        assert (decode_pixels(file, in_chans).int() - expected).abs().max() <= 1
    for broken in (file[: len(file) // 2], file[:3]):
        errors = []
        for read in (decode, decode_pixels):
            with pytest.raises((OSError, ValueError, SyntaxError)) as error:
                read(broken)
            errors.append((type(error.value), str(error.value)))
        assert errors[0] == errors[1]


def test_arrays_of_any_number_of_channels():
    def npy(array):
        buffer = io.BytesIO()
        np.save(buffer, array)
        return buffer.getvalue()

    array = np.random.default_rng(0).integers(0, 255, (30, 40, 7), dtype=np.uint8)
    channels_first = torch.from_numpy(array).permute(2, 0, 1)
    assert torch.equal(decode(npy(array), 7), channels_first)
    assert torch.equal(decode(npy(np.moveaxis(array, -1, 0)), 7), channels_first)
    sixteen = (array.astype(np.uint16) * 257,)[0]
    assert torch.allclose(decode(npy(sixteen), 7), channels_first / 255, atol=1e-4)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.moveaxis(array, -1, 0), photometric="minisblack")
    assert torch.equal(decode(buffer.getvalue(), 7), channels_first)
    for bad, why in [
        (array, "does not have 5 channels"),
        (array[..., :5].astype(np.int64), "int64"),
        (np.full((4, 4, 5), np.nan, np.float32), "not finite"),
    ]:
        with pytest.raises(ValueError, match=why):
            decode(npy(bad), 5)


def test_big_and_planar_tiffs_of_floats():
    array = np.random.default_rng(0).random((5, 6, 7), dtype=np.float32)
    for channels, options in ((5, {"bigtiff": True}), (3, {"photometric": "rgb", "planarconfig": "separate"})):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, array[:channels], **options)
        assert torch.equal(decode(buffer.getvalue(), channels), torch.from_numpy(array[:channels]))


@pytest.mark.parametrize("in_chans", [1, 3, 5])
@pytest.mark.parametrize("kind", ["npy", "tiff"])
def test_floats_of_any_range_become_0_to_1(in_chans, kind):
    unit = np.random.default_rng(0).random((in_chans, 6, 7), dtype=np.float32)
    array = 100 + 3900 * unit if in_chans > 1 else (100 + 3900 * unit)[0]
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, array)
    else:
        tifffile.imwrite(buffer, array, **({"planarconfig": "separate", "photometric": "rgb"} if in_chans == 3 else {}))
    low, high = float_range(buffer.getvalue())
    assert (low, high) == (array.min(), array.max())
    for read in (decode, decode_pixels):
        image = read(buffer.getvalue(), in_chans, (100, 4000))
        pixels = image if torch.is_tensor(image) else v2.functional.pil_to_tensor(image)
        found = pixels / 255 if pixels.dtype == torch.uint8 else pixels  # PIL has no gray image of more bits for us
        assert np.allclose(found.numpy(), unit, atol=1e-5 if found is pixels else 1 / 255)
        white = read(buffer.getvalue(), in_chans)
        assert (white if torch.is_tensor(white) else v2.functional.pil_to_tensor(white)).min() > 99


def test_files_that_are_not_floats_have_no_range():
    sixteen = io.BytesIO()
    tifffile.imwrite(sixteen, np.zeros((5, 6), np.uint16))
    for data in (encoded(picture()), encoded(picture(), "TIFF"), sixteen.getvalue(), b"II*\0torn", b""):
        assert float_range(data) is None
    assert np.array_equal(np.asarray(decode(encoded(picture()), 3, (0, 4000))), np.asarray(picture()))


# Damaged and huge files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000"])
def test_truncated_files_are_refused(kind):
    complete = encoded(picture(), kind)
    assert decode(complete).size == (40, 30)
    for length in (1, 40, len(complete) // 3, len(complete) * 2 // 3):
        with pytest.raises((ValueError, OSError, SyntaxError)):
            decode(complete[:length])


def test_bombs_are_refused():
    for data, in_chans, reason in bombs():
        with pytest.raises(Exception, match=reason):
            decode(data, in_chans)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is measured through /proc")
@pytest.mark.parametrize("check", [strip_checks, bomb_checks])
def test_memory_of_strips_and_bombs(check):
    """Each check runs in a new process, because memory that other tests have freed would not count."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        process.submit(check).result()
