import io
import pickle
import random

import datasets
import numpy as np
import pytest
import tifffile
import torch
from conftest import batches, encoded, picture, viewer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from mimkit.data.decode import decode, decode_pixels, jpeg_channels
from mimkit.data.loader import eval_loader, limit_bad_images, train_loader
from mimkit.data.order import Order, Plan
from mimkit.data.sample import seeded
from mimkit.data.sources import open_source
from mimkit.data.transforms import Normalize, eval_transform, parse_size, train_transform
from mimkit.errors import UserError


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.noise, y.noise) and torch.equal(x.labels, y.labels)
        for x, y in zip(a, b, strict=True)
    )


# Order and randomness


@pytest.mark.parametrize("streaming", [False, True])
def test_workers_resume_and_processes_change_nothing(parquet, streaming):
    source = open_source(str(parquet), streaming=streaming)
    assert source.length == 75
    common = {"batch_size": 8, "steps": 12}  # 9 steps an epoch: the second one has begun
    alone = batches(source, **common)
    assert len(alone) == 12
    for workers in (1, 2):
        assert same(batches(source, workers, **common), alone)
    for start in (3, 10):
        assert same(batches(source, 2, start=start, **common), alone[start:])
    shares = [batches(source, rank=rank, world_size=2, **common) for rank in (0, 1)]
    joined = [torch.cat([a.images, b.images]) for a, b in zip(*shares, strict=True)]
    assert all(torch.equal(a, b.images) for a, b in zip(joined, alone, strict=True))
    parts = batches(source, grad_accum_steps=4, **common)
    assert torch.equal(torch.cat([b.images for b in parts]), torch.cat([b.images for b in alone]))


@pytest.mark.parametrize("streaming", [False, True])
def test_an_epoch_sees_each_image_once_in_an_order_of_its_own(parquet, streaming):
    source = open_source(str(parquet), streaming=streaming)
    epochs = [
        torch.cat([b.labels for b in batches(source, batch_size=25, start=3 * e, steps=3 * e + 3)]) for e in (0, 1)
    ]
    expected = sorted([*range(20), *range(25), *range(30)])
    assert all(sorted(labels.tolist()) == expected for labels in epochs)
    assert not torch.equal(*epochs)
    runs = sum(b == a + 1 for a, b in zip(epochs[0].tolist(), epochs[0].tolist()[1:], strict=False))
    assert runs < 15  # shuffled, not merely shards in another order


@pytest.mark.parametrize("window", [0, 1, 5])
def test_a_short_window_loses_no_row(parquet, monkeypatch, window):
    """Also when a row, even the first one, is let go at once."""
    monkeypatch.setattr("mimkit.data.WINDOW", window)
    source = open_source(str(parquet), streaming=True)
    labels = torch.cat([b.labels for b in batches(source, batch_size=25, steps=3)])
    assert sorted(labels.tolist()) == sorted([*range(20), *range(25), *range(30)])


def test_a_view_depends_on_seed_epoch_and_index_only(folder):
    source = open_source(str(folder))
    row = source.rows[3]
    first = viewer(source)(row, 2, 3)
    torch.rand(100)
    random.random()
    again = viewer(source)(row, 2, 3)
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.noise, again.noise)
    for other in (viewer(source, seed=1)(row, 2, 3), viewer(source)(row, 1, 3), viewer(source)(row, 2, 4)):
        assert not torch.equal(first.noise, other.noise)
        assert not torch.equal(first.image, other.image)


def test_seeding_is_numpys_own():
    """What a key gives inside is what the usual calls give, so that older runs go on as they began."""
    words = np.random.SeedSequence((1, 2, 3)).generate_state(3)
    with seeded(1, 2, 3):
        drawn = random.random(), np.random.rand(5), np.random.randn(3), torch.rand(1)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))
    assert random.random() == drawn[0]
    assert np.array_equal(np.random.rand(5), drawn[1])
    assert np.array_equal(np.random.randn(3), drawn[2])
    assert torch.equal(torch.rand(1), drawn[3])


def test_seeding_leaves_other_generators_alone():
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    with seeded(1, 2, 3):
        torch.rand(3), random.random(), np.random.rand()
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


@given(
    length=st.integers(4, 60),
    share=st.integers(1, 4),
    world=st.integers(1, 3),
    parts=st.integers(1, 3),
    seed=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_processes_share_each_step(length, share, world, parts, seed):
    size = share * world * parts
    if size > length:
        with pytest.raises(UserError, match=f"{size} is more than the {length} images"):
            Plan(length, size, 1)
        return
    plans = [
        Plan(length, size, 5, seed=seed, rank=rank, world_size=world, grad_accum_steps=parts) for rank in range(world)
    ]
    alone = list(Order(Plan(length, size, 5, seed=seed)))
    shared = [list(Order(plan)) for plan in plans]
    for step, batch in enumerate(alone):
        seen = [i for part in range(parts) for rank in range(world) for i in shared[rank][step * parts + part]]
        assert seen == batch


def test_repeated_augmentation():
    """Each image three times in a row, under numbers of its own to draw from, in an epoch of as many steps."""
    once, thrice = (list(Order(Plan(50, 12, 9, repeats=repeats))) for repeats in (1, 3))
    assert len(once) == len(thrice) == 9
    for epoch in (0, 1):
        places = [place for batch in thrice[4 * epoch : 4 * epoch + 4] for place in batch]
        first = [place[1] for batch in once[4 * epoch : 4 * epoch + 4] for place in batch]
        assert [index for _, index in places] == [index for index in first[:16] for _ in range(3)]
        assert [number for number, _ in places] == [3 * epoch + copy for _ in range(16) for copy in range(3)]
    everything = [place for batch in thrice for place in batch]
    assert len(set(everything)) == len(everything)


def test_a_batch_that_cannot_be_shared():
    with pytest.raises(UserError, match="--batch-size 10 cannot be shared by 2 processes x 3"):
        Plan(100, 10, 1, world_size=2, grad_accum_steps=3)


# Kinds of images


def test_kinds_of_files():
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


def test_transparency_is_laid_over_white():
    rgba = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    rgba.putpixel((0, 0), (255, 0, 0, 255))
    decoded = decode(encoded(rgba))
    assert decoded.getpixel((0, 0)) == (255, 0, 0)
    assert decoded.getpixel((1, 1)) == (255, 255, 255)


def test_sixteen_bit_gray_is_scaled():
    values = np.array([[0, 257, 65535, 32896]], dtype=np.uint16)
    decoded = decode(encoded(Image.fromarray(values)))
    assert [decoded.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 255, 128]


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert decode(encoded(picture(), "JPEG", exif=exif)).size == (30, 40)


def smooth(size, mode="RGB"):
    """A picture with edges and slopes, not all of which are gray."""
    return picture(1, (size[0] // 10, size[1] // 10)).resize(size, Image.Resampling.BICUBIC).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(100, 75), (75, 100), (40, 30), (150, 20), (20, 150)])
def test_a_training_crop_is_torchvisions(size, mode):
    """The same box and flip of the same draws, scaled as PIL does it but for roundings."""
    image = smooth(size, mode)
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop((24, 32), scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )
    ours = pickle.loads(pickle.dumps(train_transform((24, 32))))  # as a spawned worker has it
    apart = []
    for key in range(40):
        with seeded(key):
            crop = ours(v2.functional.pil_to_tensor(image))
        with seeded(key):
            expected = theirs(image)
        assert (crop.shape, crop.dtype) == (expected.shape, torch.uint8)
        apart.append((crop.float() - expected.float()).abs())
        assert apart[-1].square().mean() < 255**2 / 10**4.8  # 48 dB
    assert torch.stack(apart).le(1).float().mean() > 0.998
    with seeded(40):  # another box is far off; of a strip, in which none fits, it is the middle
        off = (ours(v2.functional.pil_to_tensor(image)).float() - expected.float()).abs().mean()
        assert off > 5 or 20 in size


def test_a_training_crop_of_arrays_is_torchvisions():
    """Arrays of any channels never were pictures, and are cropped as they are."""
    theirs = v2.RandomResizedCrop((16, 16), scale=(0.2, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    flip = v2.RandomHorizontalFlip()
    for array in (torch.rand(5, 30, 40), torch.randint(0, 256, (5, 30, 40), dtype=torch.uint8)):
        for key in range(8):
            with seeded(key):
                crop = train_transform((16, 16))(array)
            with seeded(key):
                assert torch.equal(crop, flip(theirs(array)))


def test_crops_of_all_kinds_of_files():
    """Turned by EXIF, with 16 bits, gray or CMYK: what is cropped is what the picture shows."""
    exif = Image.Exif()
    exif[0x0112] = 6
    color, gray = smooth((100, 80)), smooth((100, 80), "L")
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
def test_pixels_of_a_jpeg_are_those_of_pil(wide, high, mode, data):
    """By whichever library: of three subsamplings, progressive, turned; one that is cut short is the same error."""
    options = {"quality": data.draw(st.integers(1, 100)), "progressive": data.draw(st.booleans())}
    options["subsampling"] = data.draw(st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]))
    exif = Image.Exif()
    if turn := data.draw(st.integers(0, 8)):  # without a camera's word on it torchvision unpacks it
        exif[0x0112] = turn
        options["exif"] = exif
    file = encoded(smooth((wide, high)).convert(mode), "JPEG", **options)
    assert jpeg_channels(file) == (0 if turn or mode == "CMYK" else {"L": 1, "RGB": 3}[mode])
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


def test_arrays():
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


def test_kinds_of_tiff():
    array = np.random.default_rng(0).random((5, 6, 7), dtype=np.float32)
    for channels, options in ((5, {"bigtiff": True}), (3, {"photometric": "rgb", "planarconfig": "separate"})):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, array[:channels], **options)
        assert torch.equal(decode(buffer.getvalue(), channels), torch.from_numpy(array[:channels]))


def test_bytes_and_floats_in_one_batch(tmp_path):
    np.save(tmp_path / "a.npy", np.full((5, 8, 8), 255, np.uint8))
    np.save(tmp_path / "b.npy", np.full((5, 8, 8), 1.0, np.float32))
    source = open_source(str(tmp_path))
    batch = next(iter(train_loader(source, viewer(source, in_chans=5), Plan(2, 2, 1), 0)))
    assert torch.allclose(batch.images, torch.ones(2, 5, 16, 16))


def test_arrays_go_all_the_way(tmp_path):
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", np.random.default_rng(i).random((5, 20, 24), dtype=np.float32))
    source = open_source(str(tmp_path))
    plan = Plan(4, 4, 1)
    batch = next(iter(train_loader(source, viewer(source, in_chans=5), plan, 0)))
    assert batch.images.shape == (4, 5, 16, 16)
    assert batch.images.dtype == torch.float32
    assert Normalize([0.5] * 5, [0.25] * 5)(batch.images).shape == (4, 5, 16, 16)


def test_normalize_is_timms():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    expected = (images / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    assert torch.allclose(Normalize(mean, std)(images), expected)
    floats = images / 255
    kept = images.clone(), floats.clone()
    assert torch.equal(Normalize(mean, std)(floats), Normalize(mean, std)(images))
    assert torch.equal(images, kept[0])  # neither is written to
    assert torch.equal(floats, kept[1])


@given(w=st.integers(3, 60), h=st.integers(3, 60), size=st.tuples(st.integers(4, 32), st.integers(4, 32)))
@settings(max_examples=30, deadline=None)
def test_eval_covers_any_input(w, h, size):
    assert eval_transform(size)(Image.new("RGB", (w, h))).size == size[::-1]


def test_sizes():
    assert parse_size(224) == parse_size("224") == (224, 224)
    assert parse_size("256x512") == (256, 512)
    for wrong in ("axb", "1x2x3", "", "-4", "0"):
        with pytest.raises(UserError, match="neither a number nor HEIGHTxWIDTH"):
            parse_size(wrong)


# Bad images


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_skipped_named_and_counted(folder, workers):
    (folder / "cat" / "torn.png").write_bytes(encoded(picture())[:60])
    (folder / "dog" / "text.jpg").write_text("not an image")
    source = open_source(str(folder))
    plan, said = Plan(14, 7, 4), []
    found = list(limit_bad_images(train_loader(source, viewer(source), plan, workers), 2, said.append))
    assert all(len(b.images) == len(b.noise) == 7 for b in found)
    assert len(said) == 2  # each is named once, though there were two epochs
    assert "torn.png" in "".join(said)
    assert "text.jpg" in "".join(said)
    for rank in (0, 1):  # each process meets both sooner or later
        plan = Plan(14, 2, 60, rank=rank, world_size=2)
        assert len(list(limit_bad_images(train_loader(source, viewer(source), plan, workers), 2, said.append))) == 60
    with pytest.raises(UserError, match=r"2 images cannot be used.*--max-bad"):
        list(limit_bad_images(train_loader(source, viewer(source), plan, workers), 1, said.append))


@pytest.mark.parametrize("streaming", [False, True])
def test_who_stands_in_does_not_depend_on_the_share(tmp_path, streaming):
    """One image a process and a part, too: there is none beside a bad one then."""
    cells = [{"bytes": encoded(picture(i))[: 60 if i in (3, 4) else None], "path": None} for i in range(13)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=features).to_parquet(tmp_path / "train.parquet")
    source = open_source(str(tmp_path), streaming=streaming)
    whole = list(train_loader(source, viewer(source), Plan(13, 4, 6), 0))
    assert {name for b in whole for name, _ in b.bad}
    for world, parts in ((4, 1), (2, 2), (1, 4)):
        shares = [
            list(
                train_loader(
                    source, viewer(source), Plan(13, 4, 6, rank=rank, world_size=world, grad_accum_steps=parts), 0
                )
            )
            for rank in range(world)
        ]
        for step, batch in enumerate(whole):
            mine = [shares[rank][step * parts + part] for part in range(parts) for rank in range(world)]
            assert torch.equal(torch.cat([b.images for b in mine]), batch.images)
            assert torch.equal(torch.cat([b.noise for b in mine]), batch.noise)
            assert [name for b in mine for name in b.names] == batch.names


def test_only_bad_images(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.png").write_text("x")
    source = open_source(str(tmp_path))
    with pytest.raises(UserError, match="4 images cannot be used"):
        list(limit_bad_images(eval_loader(source, (8, 8), 3), 3, lambda _: None))
    with pytest.raises(UserError, match=r"--crop-scale \[2, 1\] is no range"):
        train_transform((8, 8), (2, 1))
