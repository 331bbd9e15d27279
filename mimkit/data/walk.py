"""Find the files of a data set: one walk through folders for images, masks, boxes and tar files."""

import glob
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path

from mimkit.errors import UserError, some, tell

LEFTOVERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "thumbs.db", "desktop.ini"}
LEFTOVERS |= {"lost+found", "#recycle"}
BRACES = re.compile(r"\{(?:(-?\d+)\.\.(-?\d+)|([^{}]*,[^{}]*))\}")  # {000..123} or {train,val}
ANY_FOLDERS = re.compile(r"(?:^|/)\*\*(?:/|$)")
LITERAL = re.compile(r"[^*?[]*/")  # the folders of a pattern before the first that is a pattern


def is_leftover(path: str) -> bool:
    """Return whether a part of a path is hidden (`.ipynb_checkpoints`, `._x.jpg`), or left behind by a system."""
    parts = [part for part in path.split("/") if part not in (".", "..")]
    return any(part.startswith(".") or part.lower() in LEFTOVERS for part in parts)


def ending_of(name: str) -> str:
    """Return the ending of a file's name in lower case, such as ".jpg", or an empty string."""
    return os.path.splitext(name)[1].lower()


def is_utf8(name: str) -> bool:
    """Return whether a name from the file system is valid UTF-8. Tables cannot hold other names."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def find_files(data: str, endings: Collection[str] | None = None) -> list[str]:
    """Find the files that `data` names, sorted by path. Say which ones are left out.

    Folders are read with all subfolders. A link to a folder is followed, unless it leads back to a folder that it lies
    in. Files that systems leave behind are ignored, see `is_leftover`. Files whose names are not UTF-8 are left out.

    Args:
        data: a file, a folder, or a pattern as in a shell: `*`, `?`, `[ab]`, `**` for any number of folders, `{a,b}`
            and `{000..123}`. A name that exists is never read as a pattern. No match gives an empty list.
        endings: endings to keep, such as ".jpg". By default, all files are kept.

    Raises:
        UserError: a folder cannot be read, or some of the names that braces stand for do not exist.
    """
    skipped: dict[str, list[str]] = defaultdict(list)
    names = [data] if os.path.exists(os.path.expanduser(data)) else _expand_braces(data)
    matches = {name: _matches(os.path.expanduser(name), skipped) for name in names}
    missing = [name for name in names if not matches[name]]
    if missing and len(missing) < len(names):
        raise UserError(
            f"{data}: {len(missing)} of the {len(names)} names that its braces stand for do not exist, such as "
            f"{missing[0]}: correct the braces, or get these files."
        )
    places = (str(Path(place)) for found in matches.values() for place in found)
    found = sorted({file for place in places for _, files in _walk(place, skipped) for file in files})
    files = []
    for file in found:
        if not is_utf8(file):
            skipped["name"].append(file)
        elif endings is None or ending_of(file) in endings:
            files.append(file)
        else:
            skipped["ending"].append(file)
    _tell_skipped(data, skipped)
    return files


def _matches(pattern: str, skipped: dict[str, list[str]], root: str = "") -> list[str]:
    """Return the files and folders below `root` that a pattern matches; `**` stands for any number of folders."""
    if os.path.exists(os.path.join(root, pattern)):
        return [os.path.join(root, pattern)]
    if not (stars := ANY_FOLDERS.search(pattern)):
        literal = LITERAL.match(pattern)
        chosen = glob.glob(pattern, root_dir=root or None)
        return [os.path.join(root, name) for name in chosen if not is_leftover(name[literal.end() if literal else 0 :])]
    head, tail = pattern[: stars.start()] or ("/" if pattern.startswith("/") else "."), pattern[stars.end() :]
    tops = _matches(head, skipped, root)
    if not tail:
        return tops
    folders = (folder for top in tops if os.path.isdir(top) for folder, _ in _walk(top, skipped))
    return [match for folder in folders for match in _matches(tail, skipped, folder)]


def _expand_braces(text: str) -> list[str]:
    """Return the texts that the braces in a text stand for: {a,b}, {0..12} and {000..012}, as in a shell."""
    if not (match := BRACES.search(text)):
        return [text]
    first, last, listed = match.groups()
    if listed is None:
        step = 1 if int(first) <= int(last) else -1
        padded = any(re.match(r"-?0\d", number) for number in (first, last))
        width = max(len(first), len(last)) if padded else 0
        choices = [str(number).zfill(width) for number in range(int(first), int(last) + step, step)]
    else:
        choices = listed.split(",")
    before, after = text[: match.start()], text[match.end() :]
    return list(dict.fromkeys(name for choice in choices for name in _expand_braces(before + choice + after)))


def _walk(place: str, skipped: dict[str, list[str]], around: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder and its files, from `place` downward. A file is yielded as the only file of its folder.

    Args:
        place: a folder or a file.
        skipped: links that lead back to a folder around them are added to the list "loop".
        around: real paths of the folders that were entered on the way to `place`.
    """
    if not os.path.isdir(place):
        yield os.path.dirname(place), [place]
        return
    real = os.path.realpath(place)
    if any(f"{folder}/".startswith(f"{real.rstrip('/')}/") for folder in around):
        skipped["loop"].append(place)
        return
    files: list[str] = []
    folders: list[str] = []
    try:
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.is_symlink() and not os.path.exists(entry.path):
                    skipped["dead"].append(entry.path)
                elif not is_leftover(entry.name):
                    is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
                    (folders if is_folder else files).append(entry.path)
    except OSError as error:
        reason = f"{place} cannot be read ({error.strerror})"
        raise UserError(f"{reason}: change its permissions, or leave it out.") from error
    yield place, files
    for folder in sorted(folders):
        yield from _walk(folder, skipped, (*around, real))


def _tell_skipped(data: str, skipped: dict[str, list[str]]) -> None:
    """Say which files were left out, and why."""
    for why, text in {
        "name": "left out {}: its name is not UTF-8. Rename it",
        "loop": "did not follow {}: it is a link to a folder that it lies in",
        "dead": "left out {}: it is a link to a file that does not exist",
    }.items():
        if paths := sorted(set(skipped[why])):
            tell(f"{text.format(some(paths, 1))}.")
    if others := skipped["ending"]:
        counts = Counter(ending_of(file) or "without an ending" for file in others)
        listed = ", ".join(f"{count} {ending}" for ending, count in counts.most_common(8))
        more = f" and {len(counts) - 8} more endings" if len(counts) > 8 else ""
        tell(f"{data}: left out files of other kinds: {listed}{more}.")
