"""Webdataset shards: fields that differ between samples, labels of all kinds, braces, dots in names, leftovers."""

import io
import json
import tarfile

import pytest
from conftest import batches, encoded, picture

from mimkit.data.sources import open_source
from mimkit.data.tars import open_tars
from mimkit.errors import UserError, tell

PNG, JPG = encoded(picture()), encoded(picture(), "JPEG")


@pytest.fixture(autouse=True)
def _told_anew():
    tell.cache_clear()


def write(file, *members):
    """Write pairs of a name and its content to a tar file. Return the file's name."""
    with tarfile.open(file, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(file)


def labels(source):
    """Return the labels of a source, by name where classes have names."""
    values = source.rows[source.label][:]
    names = getattr(source.rows.features[source.label], "names", None)
    return [names[value] if names and value is not None and value >= 0 else value for value in values]


def read(data):
    """Open a set as a table and as a stream, and read all images. Return the table."""
    table, stream = open_source(data), open_source(data, streaming=True)
    assert len(list(stream.rows)) == stream.length == table.length
    for source in (table, stream):
        batch = batches(source, batch_size=source.length, steps=1)[0]
        assert not batch.bad
        assert len(batch.images) == source.length
    return table


def test_entry_that_is_null_first_and_text_later(tmp_path):
    """Its type shows after the samples that a schema would be inferred from."""
    samples = [({"label": i % 2, "note": None if i < 6 else "text"}, f"{i}") for i in range(8)]
    fields = [x for about, i in samples for x in ((f"{i}.png", PNG), (f"{i}.json", json.dumps(about).encode()))]
    assert read(write(tmp_path / "a.tar", *fields)).length == 8
    rows, length = open_tars("a", [str(tmp_path / "a.tar")], streaming=False)
    assert length == 8
    assert rows["note"][:] == [None] * 6 + ["text"] * 2
    assert rows["label"][:] == [0, 1] * 4


@pytest.mark.parametrize("jpgs", [1, 6])
def test_jpg_and_png_in_one_shard(tmp_path, jpgs):
    fields = [x for i in range(8) for x in ((f"{i}.jpg", JPG) if i < jpgs else (f"{i}.PNG", PNG), (f"{i}.cls", b"1"))]
    source = read(write(tmp_path / "a.tar", *fields))
    assert (source.length, source.image, source.label) == (8, "image", "cls")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["cat", "dog", "cat"], ["cat", "dog", "cat"]),
        (["10", "9", "10\n"], [10, 9, 10]),
        (["1", "cat", "2"], ["1", "cat", "2"]),
    ],
)
def test_labels_in_fields(tmp_path, texts, expected):
    fields = [x for i, t in enumerate(texts) for x in ((f"{i}.png", PNG), (f"{i}.cls", t.encode()))]
    found = labels(read(write(tmp_path / "a.tar", *fields)))
    assert list(map(str, found)) == list(map(str, expected))


def test_names_after_the_first_samples(tmp_path):
    """All labels are names, then. A stream has seen the first samples only, and takes a name for no label."""
    fields = [x for i in range(120) for x in ((f"{i}.png", PNG), (f"{i}.cls", b"cat" if i == 119 else b"%d" % (i % 2)))]
    data = write(tmp_path / "a.tar", *fields, ("119.json", b'{"image": 1, "new": 2}'))
    assert set(map(str, labels(open_source(data)))) == {"0", "1", "cat"}
    assert [row["cls"] for row in open_source(data, streaming=True).rows][-3:] == [1, 0, None]


def test_labels_in_json(tmp_path):
    fields = [
        x
        for i in range(4)
        for x in ((f"{i}.png", PNG), (f"{i}.json", json.dumps({"kind": "ab"[i % 2], "size": [1, 2]}).encode()))
    ]
    rows, _ = open_tars("a", [write(tmp_path / "a.tar", *fields)], streaming=False)
    assert rows.column_names == ["image", "kind"]  # --label-column kind
    assert rows["kind"][:] == ["a", "b", "a", "b"]
    with pytest.raises(UserError, match=r"A .json file of a sample is not valid .*: b'\{'. Correct it."):
        open_source(write(tmp_path / "b.tar", ("0.png", PNG), ("0.json", b"{")))


def test_ranges_in_braces(tmp_path):
    for i in range(2):
        write(tmp_path / f"s-{i}.tar", (f"{i}.png", PNG), (f"{i}.cls", b"%d" % i))
    assert read(f"{tmp_path}/s-{{0..1}}.tar").length == 2
    with pytest.raises(UserError, match=r"1 of the 3 names .* do not exist, such as .*s-2.tar"):
        open_source(f"{tmp_path}/s-{{0..2}}.tar")


def test_dots_in_names_are_told(tmp_path, capsys):
    many = [(f"{name}.{i}.png", PNG) for name in ("cat", "dog") for i in range(20)]
    with pytest.raises(
        UserError, match=r"the sample cat has 20 images, such as cat.0.png. The name of a sample ends at"
    ):
        open_source(write(tmp_path / "a.tar", *many))
    dates = [(f"IMG{i}.2024.{i}.png", PNG) for i in range(5)]
    with pytest.raises(UserError, match=r"IMG0.2024.0.png is the image 2024.0.png of the sample IMG0\."):
        open_source(write(tmp_path / "b.tar", *dates))
    mixed = [(f"{name}.{i}.png", PNG) for i in range(2) for name in ("cat", "dog")]
    with pytest.raises(UserError, match=r"cat.1.png is not next to the other files of the sample cat"):
        open_source(write(tmp_path / "c.tar", *mixed))
    assert capsys.readouterr().err == ""
    views = [(f"{i}.{view}.png", PNG) for i in range(3) for view in ("left", "right")]
    source = open_source(write(tmp_path / "d.tar", *views))
    assert (source.length, source.image) == (3, "left")
    assert "has the images left, right. The first is used: name another by --image-column." in capsys.readouterr().err


def test_sample_with_two_images(tmp_path, capsys):
    source = read(write(tmp_path / "a.tar", *((f"{i}.{end}", PNG) for i in range(3) for end in ("jpg", "mask.png"))))
    assert (source.image, source.mask) == ("image", "mask")
    assert capsys.readouterr().err == ""
    both = [(f"{i}.{end}", PNG) for i in range(3) for end in ("jpg", "png")]
    assert open_source(write(tmp_path / "b.tar", *both)).image == "jpg"
    assert "has the images jpg, png" in capsys.readouterr().err
    late = [(f"{i}.jpg", PNG) for i in range(110)]
    with pytest.raises(UserError, match=r"x.png is one of two images of its sample"):
        open_source(write(tmp_path / "c.tar", *late, ("x.jpg", PNG), ("x.png", PNG)))


def test_leftovers_and_other_files_are_no_rows(tmp_path, capsys):
    names = ["./a.png", "./a.cls", "._a.png", "__MACOSX/a.png", "__MACOSX/._b.png", "sub/.DS_Store", "sub/b.png"]
    names += ["README.txt", "caf\udce9.png"]
    contents = {"png": PNG, "cls": b"1", "txt": b"text", "sub/": b""}
    source = read(write(tmp_path / "a.tar", *((name, contents.get(name[-3:], b"")) for name in names)))
    assert source.length == 2
    err = capsys.readouterr().err
    assert f"left out README in {tmp_path}/a.tar: a sample without an image." in err
    assert f"left out caf\\xe9 in {tmp_path}/a.tar: its name is not UTF-8." in err


def test_samples_without_a_field(tmp_path):
    fields = [("a.png", PNG), ("b.cls", b"0"), ("c.png", PNG), ("c.cls", b"1"), ("d.png", PNG), ("d.cls", b"")]
    rows, length = open_tars("a", [write(tmp_path / "a.tar", *fields)], streaming=False)
    assert length == 3
    assert rows["cls"][:] == [None, 1, None]


def test_damaged_tar_files_are_named(tmp_path):
    good = write(tmp_path / "s-0.tar", ("a.png", PNG), ("b.png", PNG))
    content = (tmp_path / "s-0.tar").read_bytes()
    second = content.index(b"b.png")
    for damaged in (b"", content[: second - 700], content[:second] + b"\xff" * 512 + content[second + 512 :]):
        (tmp_path / "s-1.tar").write_bytes(damaged)
        for streaming in (False, True):
            with pytest.raises(UserError, match=rf"^{tmp_path}/s-1.tar cannot be read \(.*\): get another copy of it."):
                open_source(f"{tmp_path}/s-*.tar", streaming=streaming)
    assert open_source(good).length == 2


def test_file_that_changed_is_read_anew(tmp_path):
    assert open_source(write(tmp_path / "a.tar", ("a.png", PNG))).length == 1
    assert open_source(write(tmp_path / "a.tar", ("a.png", PNG), ("b.png", PNG))).length == 2


def test_entries_of_json_are_read_as_tables_are(tmp_path):
    """Whole floats are numbers, NaN is no label, large numbers are text, and a .cls file comes before a json entry."""
    image = encoded(picture())
    rows = [{"label": 1.0, "hash": 2**70}, {"label": 0.0, "hash": 1}, {"label": float("nan"), "hash": 2}]
    members = [(f"{i}.{end}", content) for i, row in enumerate(rows)
               for end, content in (("jpg", image), ("json", json.dumps(row).encode()))]  # fmt: skip
    write(tmp_path / "a.tar", *members)
    assert open_source(str(tmp_path / "a.tar")).rows["label"] == [1, 0, -1]
    caption = ("json", b'{"label": "a caption"}')
    members = [(f"{i}.{end}", content) for i in range(4)
               for end, content in (("jpg", image), ("cls", str(i % 2).encode()), caption)]  # fmt: skip
    write(tmp_path / "b.tar", *members)
    assert open_source(str(tmp_path / "b.tar")).rows["cls"] == [0, 1, 0, 1]
