"""Images, masks, boxes and tar files are found by one walk: links, leftovers of systems, globs, names, endings."""

import json
import os
import shutil

import numpy as np
import pytest
from conftest import picture
from PIL import Image

from mimkit.data import walk
from mimkit.data.decode import EXTENSIONS
from mimkit.data.detection import open_boxes
from mimkit.data.segmentation import open_masked
from mimkit.data.sources import open_source
from mimkit.data.walk import find_files
from mimkit.errors import UserError, tell

LATIN = os.fsdecode(b"caf\xe9.png")  # not UTF-8


@pytest.fixture(autouse=True)
def _told_anew():
    tell.cache_clear()


@pytest.fixture(params=["images", "masks", "boxes"])
def kind(request):
    return request.param


def write(kind, root):
    """Write a set of six images, without a split. Return its folder of images."""
    folder = root / {"images": "all", "masks": "images", "boxes": "train"}[kind] / "a"
    folder.mkdir(parents=True)
    for i in range(6):
        picture(i, (20, 16)).save(folder / f"{i}.png")
    annotate(kind, root)
    return folder


def annotate(kind, root):
    """Write the masks or boxes of all images, again."""
    folder = root / {"images": "all", "masks": "images", "boxes": "train"}[kind]
    files = sorted(file.relative_to(folder) for file in folder.rglob("*.png"))
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    for i, file in enumerate(files):
        coco["images"].append({"id": i, "file_name": str(file), "height": 16, "width": 20})
        coco["annotations"].append({"image_id": i, "category_id": 1, "bbox": [1, 1, 5, 5]})
        if kind == "masks":
            (root / "masks" / file).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.eye(16, 20, dtype=np.uint8)).save(root / "masks" / file)
    if kind == "boxes":
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / "instances_train.json").write_text(json.dumps(coco))


def count(kind, root):
    """Return the number of images that are found."""
    if kind == "images":
        return open_source(str(root / "all")).length
    train, test = open_masked(str(root))[:2] if kind == "masks" else open_boxes(str(root), False)[::2]
    return train.length + test.length


def test_links_to_folders_are_followed(kind, tmp_path):
    folder = write(kind, tmp_path / "set")
    shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert count(kind, tmp_path / "set") == 6


def test_a_loop_is_followed_once_and_told(kind, tmp_path, capsys):
    folder = write(kind, tmp_path / "set")
    (folder / "back").symlink_to("..")
    (folder / "above").symlink_to(tmp_path)  # a folder around the whole set
    assert count(kind, tmp_path / "set") == 6
    err = capsys.readouterr().err
    assert f"did not follow {folder}/above and 1 more: it is a link to a folder that it lies in.\n" in err
    assert count(kind, tmp_path / "set") == 6
    assert capsys.readouterr().err == ""  # told once


def test_leftovers_of_systems_are_ignored(kind, tmp_path, capsys):
    folder = write(kind, tmp_path / "set")
    for name in (".ipynb_checkpoints/1-checkpoint.png", "__MACOSX/1.png", "@eaDir/1.png/SYNOPHOTO_THUMB_M.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(folder / name)
    for name in ("._1.png", ".DS_Store", "Thumbs.db"):
        (folder / name).write_bytes(b"a")
    assert count(kind, tmp_path / "set") == 6
    assert capsys.readouterr().err == ""


def test_names_that_are_not_utf8_are_left_out_by_name(kind, tmp_path, capsys):
    folder = write(kind, tmp_path / "set")
    picture(9, (20, 16)).save(folder / LATIN)
    annotate(kind, tmp_path / "set")
    assert count(kind, tmp_path / "set") == 6
    err = capsys.readouterr().err
    assert f"left out {folder}/caf\\xe9.png: its name is not UTF-8. Rename it.\n" in err


def test_class_folder_that_links_to_another_keeps_its_name(folder):
    (folder / "kitten").symlink_to("cat")
    source = open_source(str(folder))
    assert source.rows.features["label"].names == ["cat", "dog", "kitten"]
    assert np.bincount(source.rows["label"]).tolist() == [6, 6, 6]


def test_folder_of_a_mac_has_no_class_of_leftovers(folder):
    (folder / "__MACOSX" / "cat").mkdir(parents=True)
    picture().save(folder / "__MACOSX" / "cat" / "00.png")
    for data in (folder, folder / "*"):
        assert open_source(str(data)).rows.features["label"].names == ["cat", "dog"]


def test_cityscapes_with_leftovers(tmp_path):
    for part in ("train", "val"):
        for place, end in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
            city = tmp_path / place / part / "aachen"
            city.mkdir(parents=True)
            Image.fromarray(np.full((16, 20), 7, np.uint8)).save(city / f"aachen_000000_000019_{end}.png")
            (city.parent / ".DS_Store").write_bytes(b"a")
            (city / "Thumbs.db").write_bytes(b"a")
    train, test, _ = open_masked(str(tmp_path))
    assert (train.length, test.length) == (1, 1)


def test_endings_are_those_of_images_and_others_are_counted(tmp_path, capsys):
    for name in ("a.png", "b.mpg", "c.h5", "d.ps", "e.grib", "f.txt", "g.txt", "h"):
        picture().save(tmp_path / name, "PNG")
    assert open_source(str(tmp_path)).length == 1
    said = capsys.readouterr().err
    counts = said.removeprefix(f"mimkit: {tmp_path}: left out files of other kinds: ").rstrip(".\n").split(", ")
    assert counts[0] == "2 .txt"
    assert sorted(counts[1:]) == ["1 .grib", "1 .h5", "1 .mpg", "1 .ps", "1 without an ending"]
    assert {".jpg", ".jpeg", ".png", ".tif", ".webp", ".npy"} <= EXTENSIONS
    assert not {".mpg", ".mpeg", ".h5", ".hdf", ".ps", ".eps", ".grib", ".bufr", ".wmf"} & EXTENSIONS


def test_link_to_nothing_is_told(folder, capsys):
    (folder / "bird").symlink_to("/nowhere/bird")
    assert open_source(str(folder)).length == 12
    assert capsys.readouterr().err == f"mimkit: left out {folder}/bird: it is a link to a file that does not exist.\n"


def test_folder_that_cannot_be_read_ends_in_a_sentence(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if path.endswith("cat"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(walk.os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cat cannot be read \(Permission denied\): change its permissions"):
        open_source(str(folder))


@pytest.mark.parametrize(
    ("pattern", "names"),
    {
        "**/*.png": "a/b/c/1 a/2 3 d1/x d2/x",
        "**": "a/b/c/1 a/2 3 d1/x d2/x",
        "**/c/*": "a/b/c/1",
        "a/**/*.png": "a/b/c/1 a/2",
        "a/**/b/**/1.png": "a/b/c/1",
        "d?": "d1/x d2/x",
        "d[2-9]/*": "d2/x",
        "*": "a/b/c/1 a/2 3 d1/x d2/x",
        "{a,3.png}": "a/b/c/1 a/2 3",
        "d{1..2}": "d1/x d2/x",
        "d{2..1}/{x,x}.png": "d1/x d2/x",
        "nothing*": "",
        "{no,where}": "",
    }.items(),
)
def test_patterns_of_a_shell(tmp_path, pattern, names):
    for name in ("a/b/c/1", "a/2", "3", "d1/x", "d2/x", "a/.hidden/4", "__MACOSX/5", ".6"):
        (tmp_path / f"{name}.png").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(b"")
    (tmp_path / "a" / "b" / "back").symlink_to(tmp_path / "a")
    assert find_files(f"{tmp_path}/{pattern}") == sorted(f"{tmp_path}/{name}.png" for name in names.split())


def test_patterns_below_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "run[1]").mkdir()
    (tmp_path / "run[1]" / "{x}.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert find_files("**/*.png") == ["run[1]/{x}.png"]
    assert find_files("run[1]") == ["run[1]/{x}.png"]
    assert find_files("run[1]/{x}.png") == ["run[1]/{x}.png"]
    assert find_files("run[1]/*") == []  # as in a shell: [1] is a pattern, too


def test_zeros_in_braces_and_files_that_are_missing(tmp_path):
    for i in range(8, 12):
        (tmp_path / f"s-{i:03d}.tar").write_bytes(b"")
    assert len(find_files(f"{tmp_path}/s-{{008..011}}.tar")) == 4
    with pytest.raises(UserError, match=r"1 of the 5 names .* do not exist, such as .*s-012.tar"):
        find_files(f"{tmp_path}/s-{{008..012}}.tar")
