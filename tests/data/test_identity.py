"""What a data set is: the same in another place, and another one if a name or an image differs."""

import shutil

import datasets
from conftest import encoded, picture

from mimkit.data.identity import names_hash
from mimkit.data.sources import hold_out, open_source


def test_the_same_files_in_another_place(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "else" / "where")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    spelled = [str(folder), "images", "./images/", "else/where", f"{tmp_path}/else/../images", "link"]
    assert len({names_hash(open_source(name)) for name in spelled}) == 1


def test_other_names_are_other_images(folder):
    before = names_hash(open_source(str(folder)))
    (folder / "cat" / "01.png").rename(folder / "cat" / "001.png")
    assert names_hash(open_source(str(folder))) != before


def test_one_image(tmp_path):
    hashes = []
    for name in ("a.png", "b.png"):
        picture().save(tmp_path / name)
        hashes.append(names_hash(open_source(str(tmp_path / name))))
    assert hashes[0] != hashes[1]


def table(file, seeds, names=None):
    rows = {"image": [{"bytes": encoded(picture(seed)), "path": names and names[seed]} for seed in seeds]}
    features = datasets.Features({"image": datasets.Image()})
    file.parent.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    return open_source(str(file))


def test_tables(tmp_path):
    """Without names, the bytes of a few images tell sets of the same size apart."""
    first = names_hash(table(tmp_path / "a" / "train.parquet", range(5)))
    assert names_hash(table(tmp_path / "b" / "other.parquet", range(5))) == first
    assert names_hash(table(tmp_path / "c" / "train.parquet", range(1, 6))) != first
    assert names_hash(table(tmp_path / "d" / "train.parquet", range(5), "abcde")) != first


def test_parts_and_streams(folder):
    train, test = hold_out(open_source(str(folder)))
    stream = names_hash(open_source(str(folder), streaming=True))
    assert len({names_hash(train), stream, ""}) == 3
    moved = shutil.move(folder, folder.with_name("moved"))
    assert names_hash(open_source(str(moved), streaming=True)) == stream
    next(moved.rglob("*.png")).unlink()
    assert names_hash(open_source(str(moved), streaming=True)) != stream
    assert len(names_hash(test)) == 64
