import pickle

import pytest
import torch
from conftest import encoded, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import distance, smooth
from PIL import Image
from torchvision.transforms import v2

from mimkit.data.decode import decode_pixels
from mimkit.data.detection import fitting
from mimkit.data.sample import seeded
from mimkit.data.segmentation import check_sizes
from mimkit.data.transforms import Normalize, eval_transform, parse_size, train_transform
from mimkit.errors import UserError


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(100, 75), (75, 100), (40, 30), (150, 20), (20, 150)])
def test_training_crop_equals_torchvision(size, mode):
    """The same draws give the same box and flip. Pixels equal those that PIL resizes, up to rounding."""
    image = picture(1, (size[0] // 10, size[1] // 10)).resize(size, Image.Resampling.BICUBIC).convert(mode)
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop((24, 32), scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )
    ours = pickle.loads(pickle.dumps(train_transform((24, 32))))  # a spawned worker gets it pickled
    differences = []
    for key in range(40):
        with seeded(key):
            crop = ours(v2.functional.pil_to_tensor(image))
        with seeded(key):
            expected = theirs(image)
        assert (crop.shape, crop.dtype) == (expected.shape, torch.uint8)
        differences.append((crop.float() - expected.float()).abs())
        assert differences[-1].square().mean() < 255**2 / 10**4.8  # 48 dB
    assert torch.stack(differences).le(1).float().mean() > 0.998
    with seeded(40):  # another box differs much; in a strip no box fits, and each crop is its center
        off = (ours(v2.functional.pil_to_tensor(image)).float() - expected.float()).abs().mean()
        assert off > 5 or 20 in size


def test_training_crop_of_arrays_equals_torchvision():
    """Arrays of any number of channels are cropped without PIL."""
    theirs = v2.RandomResizedCrop((16, 16), scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    flip = v2.RandomHorizontalFlip()
    for array in (torch.rand(5, 30, 40), torch.randint(0, 256, (5, 30, 40), dtype=torch.uint8)):
        for key in range(8):
            with seeded(key):
                crop = train_transform((16, 16))(array)
            with seeded(key):
                assert torch.equal(crop, flip(theirs(array)))


def test_normalize_is_timms():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    expected = (images / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(Normalize(mean, std)(images), expected)
    floats = images / 255
    kept = images.clone(), floats.clone()
    assert torch.equal(Normalize(mean, std)(floats), Normalize(mean, std)(images))
    assert torch.equal(images, kept[0])  # neither is changed
    assert torch.equal(floats, kept[1])


@given(w=st.integers(3, 60), h=st.integers(3, 60), size=st.tuples(st.integers(4, 32), st.integers(4, 32)))
@settings(max_examples=30, deadline=None)
def test_eval_transform_covers_any_size(w, h, size):
    assert eval_transform(size)(Image.new("RGB", (w, h))).size == size[::-1]


def test_eval_transform_of_a_moderate_strip_is_a_center_crop():
    image = smooth((210, 30))  # one side is 7 times the other: not cropped before resizing
    expected = image.resize((224, 32), Image.Resampling.BICUBIC).crop((96, 0, 128, 32))
    assert distance(eval_transform((32, 32))(image), expected) == 0


def test_parse_size():
    assert parse_size(224) == parse_size("224") == (224, 224)
    assert parse_size("256x512") == (256, 512)
    for wrong in ("axb", "1x2x3", "", "-4", "0"):
        with pytest.raises(UserError, match="neither a number nor HEIGHTxWIDTH"):
            parse_size(wrong)


def test_one_pixel_becomes_an_image_of_one_color():
    for transform in (eval_transform((16, 16)), train_transform((16, 16))):
        pixels = transform(decode_pixels(encoded(Image.new("RGB", (1, 1), (200, 10, 20)))))
        assert torch.equal(pixels, torch.tensor([200, 10, 20], dtype=torch.uint8)[:, None, None].expand(3, 16, 16))


def test_strips_are_refused_for_dense_prediction():
    strip, mask = Image.new("RGB", (20_000, 3)), torch.zeros(3, 20_000)
    for check in (lambda: check_sizes(strip, mask), lambda: fitting(strip, {})):
        with pytest.raises(ValueError, match="it is a strip of 3x20000"):
            check()
