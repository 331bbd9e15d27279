"""The umask decides the permissions of what is written, whoever writes it."""

import os

import pytest
import torch
from safetensors.torch import save_file

from mimkit.files import replacing, replacing_file


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder):
    return {str(file.relative_to(folder)): oct(file.stat().st_mode & 0o777) for file in folder.rglob("*")}


def write(folder):
    """Write as safetensors does, whose files are the owner's alone, and as everyone else does."""
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "below").mkdir()
    (folder / "below" / "text").touch(mode=0o600)


@pytest.mark.parametrize("exists", [False, True])
def test_files_and_folders_follow_the_umask(umask, exists, tmp_path):
    if exists:
        (tmp_path / "new").mkdir(mode=0o700)
    with replacing(tmp_path / "new") as temporary:
        write(temporary)
    with replacing_file(tmp_path / "one.safetensors") as file:
        save_file({"a": torch.zeros(1)}, file)
    folder, file = oct(0o777 & ~umask), oct(0o666 & ~umask)
    assert modes(tmp_path) == {
        "new": folder,
        "new/below": folder,
        "new/below/text": file,
        "new/model.safetensors": file,
        "one.safetensors": file,
    }
