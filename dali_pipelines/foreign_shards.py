"""Tar shards that other WebDataset tools have written: finding them, and an index made from their headers.

Members' names are only looked at, never used as paths; nothing is extracted.
"""

from __future__ import annotations

import fnmatch
import functools
import glob
import hashlib
import itertools
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import BinaryIO

import numpy as np

from dune_fast.dali_pipelines.addresses import PATIENCE, ask, is_url, list_address
from dune_fast.dali_pipelines.errors import DataError
from dune_fast.dali_pipelines.images import SUFFIXES
from dune_fast.dali_pipelines.patience import patiently
from dune_fast.dali_pipelines.storage import cached, open_binary
from dune_fast.dali_pipelines.tar_index import RECORD, ShardImages, open_index, write_index
from dune_fast.teachers.progress import Progress

logger = logging.getLogger(__name__)

_PARALLEL_FROM = 8  # shards: below, starting processes takes longer than reading the headers
_RULES = 2  # version of those by which `scan_tar` chooses images: indices of other rules are made again
_EXTENSIONS = tuple(suffix[1:] for suffix in SUFFIXES)  # of images, the preferred one of a sample first


def find_shards(given: str) -> list[str] | None:
    """Tar files of other tools that a root means, sorted; None if it means something else.

    They are meant by a path or an address that ends in ".tar", with globs ("*", "?", "[...]") and braces as in
    WebDataset ("train-{0000..0146}.tar", "{train,more}-0.tar"), and by a folder that holds tar files and neither images
    nor other folders.

    Raises:
        DataError: a path that ends in ".tar" and finds nothing, or a tar file that is not there.
    """
    if given.startswith("pipe:") or "::" in given:
        raise DataError(f"{given}: pipes and chained addresses cannot be read at random; give the tar files' own paths")
    if given.endswith(".tar"):
        found = [path for one in expand_braces(given) for path in _expand_glob(one)]
        if not found:
            raise DataError(f"no tar file matches {given}")
        return sorted(set(found))
    if is_url(given):
        return _glob_url(f"{given.rstrip('/')}/*.tar") or None
    folder = os.path.abspath(os.path.expanduser(given))
    if not os.path.isdir(folder):
        return None
    with os.scandir(folder) as entries:
        tars = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.name.lower().endswith(SUFFIXES) or entry.is_dir():
                return None  # an early end: a folder may hold millions of images
            if entry.name.endswith(".tar"):
                tars.append(entry.path)
    return sorted(tars) or None


def open_foreign_shards(shards: Sequence[str], pattern: str) -> ShardImages:
    """The images of tar files (see `scan_tar`), whose headers are read once; one process reads, the others wait.

    The index is kept in the cache folder, for as long as no file's size and time of change (or what stands for it in an
    object store) differ.

    Raises:
        DataError: a file is missing, no tar file, or damaged; or there is no image in any of them.
    """
    state = "\0".join([str(_RULES), pattern, str(RECORD), *(f"{path}\0{_version(path)}" for path in shards)])
    key = hashlib.blake2b(os.fsencode(state), digest_size=16).hexdigest()
    with cached(f"tar-index/{key}.index", f"the index of {shards[0]}") as index:
        try:
            records = open_index(index, len(shards))
        except DataError:  # none yet, or a damaged one
            write_index(index, _scan(shards, pattern), len(shards))
            records = open_index(index, len(shards))
    if not len(records):
        wanted = f"matches {pattern!r}" if pattern else "ends in .jpg, .png or another suffix of images"
        others = " and the others" if len(shards) > 1 else ""
        raise DataError(f"no member of {shards[0]}{others} {wanted}; `pattern` says which members are the images")
    parents = {path.rpartition("/")[0] for path in shards}
    return ShardImages(shards, records, parents.pop() if len(parents) == 1 else "")


def _scan(shards: Sequence[str], pattern: str) -> np.ndarray:
    logger.info("reading the headers of %d tar files, once", len(shards))
    parts: list[np.ndarray] = []
    kind = ThreadPoolExecutor
    if len(shards) >= _PARALLEL_FROM:
        kind = functools.partial(ProcessPoolExecutor, mp_context=get_context("spawn"))
    pool = kind(min(len(shards), os.cpu_count() or 1))
    with pool, Progress("reading tar headers", len(shards), "shards") as progress:
        try:
            for number, records in enumerate(pool.map(functools.partial(scan_tar, pattern=pattern), shards)):
                records["shard"] = number
                parts.append(records)
                progress.advance(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return np.concatenate(parts)


def scan_tar(path: str, pattern: str) -> np.ndarray:
    """Records of the images in one tar file, shard number 0, in the order of the file.

    A sample is a run of members with one key (the name up to the first dot after the last slash, as in WebDataset). Of
    a sample's members one is the image: "key.jpg", else jpeg, png, webp and so on. Names with further dots, such as
    "key.1.jpg", are samples of their own; unless what the further dots enclose is a word and the sample has an image
    without it: "key.mask.png" beside "key.jpg" is taken only where the pattern asks for it.

    With a `pattern`, the images are instead all members whose name matches one of its globs, separated by "|".

    Raises:
        DataError: no tar file, or one that is compressed, damaged or cut off; or its samples have several images each,
            such as "key.rgb.png" and "key.depth.png", and the pattern is empty.
        StorageError: the storage does not answer.
    """
    try:
        members = patiently(lambda: list(_members(path)), path, PATIENCE)
    except OSError as error:
        raise DataError(f"the tar file {path} cannot be read: {error.strerror or error}") from error
    globs = [part.strip() for part in pattern.split("|")]
    chosen = [m for m in members if any(fnmatch.fnmatchcase(m.name, g) for g in globs)] if pattern else _images(members)
    records = np.zeros(len(chosen), RECORD)
    records["offset"] = [member.offset_data for member in chosen]
    records["length"] = [member.size for member in chosen]
    return records


def _members(path: str) -> Iterator[tarfile.TarInfo]:
    """The regular files below 4 GiB in a tar file."""
    with open_binary(path) as stream:
        size, found = stream.seek(0, os.SEEK_END), 0
        stream.seek(0)
        try:
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # tarfile would keep every header
                    if not member.isreg() or member.issparse():
                        continue
                    if member.offset_data + member.size > size:
                        raise DataError(f"{path} is truncated: {member.name} goes beyond its {size} bytes")
                    found += member.name.lower().endswith(SUFFIXES)
                    if member.size < 1 << 32:
                        yield member
                _check_end(stream, archive.offset, path, found)
        except tarfile.TarError as error:
            stream.seek(0)
            compressed = stream.read(4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd"))
            hint = "it is compressed, so nothing in it can be read at random: decompress it" if compressed else error
            raise DataError(f"{path} cannot be read as a tar file: {hint}") from error


def _images(members: list[tarfile.TarInfo]) -> list[tarfile.TarInfo]:
    """One image of each sample."""
    images = [(*parts, member) for member in members if (parts := _split_name(member.name)) is not None]
    chosen: list[tarfile.TarInfo] = []
    together: Counter[tuple[str, ...]] = Counter()  # the words of samples that have several
    for _, run in itertools.groupby(images, key=lambda image: image[0]):
        best: dict[str, tuple[int, tarfile.TarInfo]] = {}  # by what is between the key and the extension
        for _, inner, rank, member in run:
            if inner not in best or rank < best[inner][0]:
                best[inner] = rank, member
        words = [inner for inner in best if inner.replace("_", "").isalpha()]
        if "" in best:
            for word in words:
                del best[word]
        elif len(words) > 1:
            together[tuple(sorted(words))] += 1
        chosen += sorted((member for _, member in best.values()), key=lambda member: member.offset)
    words, count = max(together.items(), key=lambda item: item[1], default=((), 0))
    if count > 1:
        named = " and ".join(f"KEY.{word}.*" for word in words)
        raise DataError(
            f"its samples have several images each, {named}: say which are meant by `pattern`, for instance "
            f"pattern='*.{words[-1]}.*'"
        )
    return chosen


def _check_end(stream: BinaryIO, offset: int, path: str, images: int) -> None:
    """tarfile ends without a word at a header that it does not understand; the real end is a block of zeros."""
    stream.seek(offset)
    if stream.read(tarfile.BLOCKSIZE) not in (b"", tarfile.NUL * tarfile.BLOCKSIZE):
        problem = f"damaged or truncated after {images} images, at byte {offset}: no tar header is there"
        raise DataError(f"{path} is {problem}")


def _split_name(name: str) -> tuple[str, str, int] | None:
    """(key with its folder, what further dots enclose, rank of the extension) of an image's name."""
    folder, _, base = name.rpartition("/")
    stem, _, rest = base.partition(".")
    inner, _, extension = rest.rpartition(".")
    if not stem or (extension := extension.lower()) not in _EXTENSIONS:
        return None
    return f"{folder}/{stem}", inner, _EXTENSIONS.index(extension)


def expand_braces(pattern: str) -> list[str]:
    """ "a-{00..02}.tar" -> a-00.tar, a-01.tar, a-02.tar; "{a,b}.tar" -> a.tar, b.tar; several pairs multiply."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    inside = match.group(1)
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = numbers.groups()
        choices = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    else:
        choices = inside.split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [path for choice in choices for path in expand_braces(f"{before}{choice}{after}")]


def _expand_glob(path: str) -> list[str]:
    if is_url(path):
        return _glob_url(path) if glob.has_magic(path) else [path]
    path = os.path.abspath(os.path.expanduser(path))
    return glob.glob(path) if glob.has_magic(path) and not os.path.exists(path) else [path]


def _glob_url(url: str) -> list[str]:
    return list_address(url, lambda fs, path: sorted(fs.unstrip_protocol(found) for found in fs.glob(path)))


def _version(path: str) -> str:
    """Something that changes with a file."""
    try:
        if is_url(path):
            return str(ask(path, lambda fs, stripped: fs.ukey(stripped)))
        status = os.stat(path)
        return f"{status.st_size}.{status.st_mtime_ns}"
    except OSError as error:
        raise DataError(f"the tar file {path} cannot be read: {error.strerror or error}") from error
