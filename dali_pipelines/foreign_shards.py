"""Tar shards that other WebDataset tools have written: finding them, and an index made from their headers.

Members' names are only looked at, never used as paths; nothing is extracted.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np

from dune_fast.dali_pipelines.errors import DataError
from dune_fast.dali_pipelines.images import SUFFIXES
from dune_fast.dali_pipelines.progress import Progress
from dune_fast.dali_pipelines.shards import ShardImages
from dune_fast.dali_pipelines.storage import cached, file_system, is_url, patiently
from dune_fast.dali_pipelines.tar_index import RECORD, open_index, scan_tar, write_index

logger = logging.getLogger(__name__)

_PARALLEL_FROM = 8  # shards: below, starting processes takes longer than reading the headers
_RULES = 2  # version of those by which `scan_tar` chooses images: indices of other rules are made again
_PATIENCE = 30.0  # seconds for which a failing read is tried again


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
        fs, top = file_system(given)
        tars = sorted(fs.unstrip_protocol(path) for path in fs.glob(f"{top.rstrip('/')}/*.tar"))
        return tars or None
    folder = os.path.abspath(os.path.expanduser(given))
    tars = []
    if os.path.isdir(folder):
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.name.lower().endswith(SUFFIXES) or entry.is_dir():
                    return None
                if entry.name.endswith(".tar"):
                    tars.append(entry.path)
    return sorted(tars) or None


def open_foreign_shards(shards: Sequence[str], pattern: str) -> ShardImages:
    """The images of tar files without an index: their headers are read once, the result is kept in the cache folder.

    It is used for as long as no file's size and time of change (or what stands for it in an object store) differ.
    Several processes may call this at once: one reads, the others wait.

    Args:
        shards: paths or addresses.
        pattern: see `tar_index.scan_tar`.

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
    work = functools.partial(scan_tar, pattern=pattern, patience=_PATIENCE)
    parts: list[np.ndarray] = []
    workers = min(len(shards), os.cpu_count() or 1)
    pool: Executor
    if len(shards) < _PARALLEL_FROM:
        pool = ThreadPoolExecutor(workers)
    else:
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    with pool, Progress("reading tar headers", len(shards), "shards") as progress:
        try:
            for number, records in enumerate(pool.map(work, shards)):
                records["shard"] = number
                parts.append(records)
                progress.advance(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return np.concatenate(parts)


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
        fs, stripped = file_system(path)
        if glob.has_magic(stripped):
            return [fs.unstrip_protocol(found) for found in fs.glob(stripped)]
        return [path]
    path = os.path.abspath(os.path.expanduser(path))
    return glob.glob(path) if glob.has_magic(path) and not os.path.exists(path) else [path]


def _version(path: str) -> str:
    """Something that changes with a file."""
    try:
        if is_url(path):
            fs, stripped = file_system(path)
            return str(patiently(lambda: fs.ukey(stripped), path, _PATIENCE))
        status = os.stat(path)
        return f"{status.st_size}.{status.st_mtime_ns}"
    except OSError as error:
        raise DataError(f"the tar file {path} cannot be read: {error.strerror or error}") from error
