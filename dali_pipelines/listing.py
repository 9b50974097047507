"""Images that are files of their own: a folder, globs, a text list or an address becomes one sorted list of paths.

More than 300 lines: a function for each way to name images.
"""

from __future__ import annotations

import codecs
import errno
import fnmatch
import glob
import logging
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dune_fast.dali_pipelines.addresses import LISTING, ask, is_url, list_address
from dune_fast.dali_pipelines.errors import DataError
from dune_fast.dali_pipelines.images import SUFFIXES
from dune_fast.dali_pipelines.storage import Location, Reader

logger = logging.getLogger(__name__)

SPLITS = {
    "train": ("train", "training"),
    "val": ("validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"),
}
"""Folders of a Hugging Face imagefolder, the preferred one first."""
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
"""What Windows puts before a text; UTF-32's before UTF-16's, with which it begins. The encodings take it away."""


class PathList(Sequence[str]):
    """Image files, their paths in one block of bytes: 20 million Python strings would cost every rank two gigabytes.

    Args:
        paths: below the root, or absolute ones, or addresses; these two stand for themselves.
        root: folder or address that the others start at.
        left_out: files there that are no images, by suffix.
    """

    def __init__(self, paths: Iterable[str], root: str = "", left_out: Mapping[str, int] | None = None) -> None:
        self.root, self.left_out = root, left_out or {}
        block, ends = bytearray(), array("q", [0])
        for path in paths:
            block += path.encode("utf-8", "surrogateescape")  # os.fsencode takes twice as long
            ends.append(len(block))
        self._bytes = bytes(block)
        self._ends = np.frombuffer(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        path = self.relative(index)
        if not self.root or is_url(path):
            return path
        return f"{self.root.rstrip('/')}/{path}" if is_url(self.root) else os.path.join(self.root, path)

    def relative(self, index: int) -> str:
        """The path as it is below the root."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._bytes[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")

    def source_path(self, index: int, reader: Reader) -> str:
        """The same; shards have to be read for it."""
        return self.relative(index)

    def locate(self, index: int) -> Location:
        """Where the bytes of an image are."""
        return Location(self[index])

    def select(self, indices: Iterable[int]) -> PathList:
        """Only these images, in this order."""
        return PathList((self.relative(i) for i in indices), self.root, self.left_out)


def list_images(name: str, given: str, pattern: str, key: str) -> PathList:
    """The images of a folder, of globs, of a text file or below an address, sorted.

    `given` and `pattern` are what `DatasetConfig.root` and `pattern` describe, shards apart. DataError if nothing is
    there: its message names the dataset and the setting, `key`.
    """
    where = f"data.datasets.{name}.{key}"
    left_out: Counter[str] = Counter()
    if is_url(given):
        folder, relative = given, _list_url(given, pattern, left_out)
    else:
        folder = os.path.abspath(os.path.expanduser(given))
        if os.path.isfile(folder):
            return _read_list(name, folder)
        if not os.path.isdir(folder) and glob.has_magic(folder):
            if pattern:
                raise DataError(f"dataset {name!r}: {where} is a glob and there is a pattern as well: keep one of them")
            folder, pattern = _split_glob(folder)
        if not os.path.isdir(folder):
            raise DataError(f"dataset {name!r}: {given} is neither a folder nor a text file of paths; correct {where}")
        relative = _glob(folder, pattern) if pattern else _walk(folder, left_out)
    if not relative:
        looked_for = f"no file matches {pattern!r}" if pattern else f"no file ends in {', '.join(SUFFIXES[:8])} ..."
        others = f" ({name_left_out(left_out)})" if left_out else ""
        raise DataError(
            f"dataset {name!r}: {looked_for} in {given} or below{others}; correct {where} or "
            f"data.datasets.{name}.pattern"
        )
    return PathList(relative, folder, left_out)


def name_left_out(by_suffix: Mapping[str, int]) -> str:
    """ "17 other files left out: .txt 12, .mp4 5": the most frequent suffixes first, at most eight."""
    total, common = sum(by_suffix.values()), sorted(by_suffix.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{suffix or 'without a suffix'} {count:,}" for suffix, count in common[:8]]
    parts += ["..."] if len(common) > 8 else []
    return f"{total:,} other file{'s' if total > 1 else ''} left out: {', '.join(parts)}"


def imagefolder_splits(name: str, folder: str) -> tuple[str, str]:
    """The folders of training and validation images of a Hugging Face imagefolder; the second is "" without one.

    Its layout: one folder of each kind of SPLITS, there or in `data/`; a `test/` beside a `validation/` is not used.
    DataError if there is no folder of training images.
    """
    top = folder.rstrip("/") if is_url(folder) else os.path.abspath(os.path.expanduser(folder))
    for parent in (top, f"{top}/data"):
        there = _folders(parent)
        found = {split: next((there[n] for n in names if n in there), "") for split, names in SPLITS.items()}
        if found["train"]:
            return found["train"], found["val"]
    raise DataError(
        f"dataset {name!r}: {folder} has no folder train/, so it is no imagefolder; "
        f"for a plain folder of images set data.datasets.{name}.root to it without `imagefolder:`"
    )


def _folders(parent: str) -> dict[str, str]:
    """name in small letters -> path or address of all folders in a folder; none where there is no such folder."""
    if not is_url(parent):
        try:
            return {entry.name.lower(): entry.path for entry in os.scandir(parent) if _is(entry.is_dir)}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise DataError(
                f"the folder {parent} cannot be listed ({error.strerror}): see that you may read it and that its "
                "storage answers, then start the same command again"
            ) from error
    try:
        found = ask(parent, lambda fs, path: fs.ls(path, detail=True), LISTING)
    except FileNotFoundError:
        return {}
    names = [entry["name"].rstrip("/").rpartition("/")[2] for entry in found if entry["type"] == "directory"]
    return {name.lower(): f"{parent}/{name}" for name in names}


def _images_among(paths: Iterable[str], left_out: Counter[str]) -> list[str]:
    """Those that are images by their suffix; the suffixes of the others are counted."""
    images = []
    for path in paths:
        if path.lower().endswith(SUFFIXES):
            images.append(path)
        else:
            left_out[os.path.splitext(path)[1].lower()] += 1
    return images


def _walk(folder: str, left_out: Counter[str]) -> list[str]:
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_unlisted):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder above would never end
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        below = os.path.relpath(parent, folder)
        images = _images_among((f for f in files if not f.startswith(".")), left_out)
        found.extend(f if below == "." else os.path.join(below, f) for f in images)
    return sorted(found)


def _unlisted(error: OSError) -> None:
    """os.walk would leave the folder out without a word, and ranks would disagree on which images there are."""
    if not isinstance(error, PermissionError):  # such as lost+found
        raise DataError(
            f"{error.filename} cannot be listed ({error.strerror}): see that its storage answers, then start the same "
            "command again"
        ) from error
    logger.warning("%s may not be listed: what is in it is left out", error.filename)


def _glob(folder: str, pattern: str) -> list[str]:
    found = set()
    for part in pattern.split("|"):
        first, *rest = part.strip().split("/")
        found.update(_matching(folder, "", [first or "/", *filter(None, rest)]))
    return sorted(found)


def _matching(top: str, below: str, globs: list[str]) -> Iterator[str]:
    """Files that `glob.iglob(..., recursive=True)` would find, which leaves out without a word what it cannot list.

    Globs are one a folder; `below` is the path from the top that was matched so far.
    """
    first, *rest = globs
    if not glob.has_magic(first):
        path = os.path.join(below, first)
        if not rest and os.path.isfile(os.path.join(top, path)):
            yield path
        elif rest and os.path.isdir(os.path.join(top, path)):
            yield from _matching(top, path, rest)
        return
    if first == "**" and rest:
        yield from _matching(top, below, rest)  # no folder at all
    try:
        entries = list(os.scandir(os.path.join(top, below)))
    except OSError as error:
        _unlisted(error)
        return
    for entry in entries:
        if entry.name.startswith(".") and not first.startswith("."):
            continue
        if _is(entry.is_dir):
            if first == "**" and not _leads_back(entry):
                yield from _matching(top, os.path.join(below, entry.name), globs)
            elif rest and first != "**" and fnmatch.fnmatchcase(entry.name, first):
                yield from _matching(top, os.path.join(below, entry.name), rest)
        elif not rest and fnmatch.fnmatchcase(entry.name, first) and _is(entry.is_file):
            yield os.path.join(below, entry.name)


def _is(kind: Callable[[], bool]) -> bool:
    """`DirEntry.is_dir` or `is_file`, which themselves answer False for a link that leads nowhere."""
    try:
        return kind()
    except OSError as error:
        if error.errno != errno.ELOOP:  # links that lead to each other
            _unlisted(error)
        return False


def _leads_back(entry: os.DirEntry) -> bool:
    """Whether a folder is a link to one that it is in: following it would never end."""
    if not entry.is_symlink():
        return False
    target = os.path.realpath(entry.path)
    return os.path.commonpath([target, os.path.realpath(os.path.dirname(entry.path))]) == target


def _split_glob(path: str) -> tuple[str, str]:
    """ "/data/*/a.jpg" -> ("/data", "*/a.jpg")."""
    folder, pattern = os.path.split(path)
    while glob.has_magic(folder):
        folder, last = os.path.split(folder)
        pattern = os.path.join(last, pattern)
    return folder, pattern


def _list_url(url: str, pattern: str, left_out: Counter[str]) -> list[str]:
    def paths_below(fs: Any, top: str) -> set[str]:
        """Of all files, or of those that match, without the address's own path."""
        top = top.rstrip("/")
        if pattern:
            found = (path for part in pattern.split("|") for path in fs.glob(f"{top}/{part.strip()}"))
        else:
            found = fs.find(top) or fs.ls(top)  # which says that nothing is there, where `find` finds none
        return {path[len(top) :].lstrip("/") for path in found}

    relative = list_address(url, paths_below)
    if "" in relative:
        raise DataError(
            f"{url} is a file: give the folder that the images are in, or tar files. A list of paths is read from a "
            "local file; its lines may be addresses"
        )
    shown = sorted(path for path in relative if not any(part.startswith(".") for part in path.split("/")))
    return shown if pattern else _images_among(shown, left_out)


def _read_text(file: str) -> str:
    """A text in UTF-8, or in what its byte order mark says. Bytes that are none of it stand for themselves."""
    data = Path(file).read_bytes()
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    return data.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "replace")


def _read_list(name: str, file: str) -> PathList:
    try:
        lines = _read_text(file).splitlines()
    except OSError as error:
        raise DataError(f"dataset {name!r}: cannot read {file}: {error}") from error
    folder = os.path.dirname(file)
    paths = sorted({line.strip() for line in lines if line.strip() and not line.startswith("#")})
    if not paths:
        raise DataError(f"dataset {name!r}: {file} lists no path; it should hold one path a line")
    if not any(is_url(path) or os.path.isfile(os.path.join(folder, path)) for path in paths[:16]):
        raise DataError(
            f"dataset {name!r}: none of the first paths in {file} exists, such as {paths[0]!r}; "
            f"paths that are not absolute start at {folder}"
        )
    return PathList(paths, folder)


def is_turned(images: PathList, index: int, pattern: str) -> bool:
    """Whether an image is stored turned: its path below the root matches the glob ("*" also stands for slashes)."""
    return bool(pattern) and fnmatch.fnmatchcase(images.relative(index), pattern)
