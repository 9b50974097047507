"""The binary index of a set of tar shards, and how it is made for shards that other tools have written.

An index file is a header of 64 bytes and one record of 24 bytes an image, little-endian, mapped into memory: ranks of a
machine share its pages. 20.7 million images take 0.5 GB on disk. The dataset is the same for all records of a file, so
its name stands in the manifest beside it (`shards`).

    header: magic (8 bytes), version (u32), number of shards (u32), number of images (u64), CRC-32 of the records (u32)
    record: offset (u64), length (u32), shard (u32), CRC-32 of the image (u32), width (u16), height (u16)

Width and height are 0 and the checksum is 0 where only the tar's headers were read (`scan_tar`).
"""

from __future__ import annotations

import fnmatch
import itertools
import os
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from dune_fast.dali_pipelines.errors import DataError
from dune_fast.dali_pipelines.images import SUFFIXES
from dune_fast.dali_pipelines.storage import open_binary, patiently, write_whole

RECORD = np.dtype(
    [("offset", "<u8"), ("length", "<u4"), ("shard", "<u4"), ("crc", "<u4"), ("width", "<u2"), ("height", "<u2")]
)
assert RECORD.itemsize == 24
MAGIC, VERSION = b"DUNEFIDX", 1
IMAGE_EXTENSIONS = tuple(suffix[1:] for suffix in SUFFIXES)
"""Members that are images, the preferred one of a sample first."""
_HEADER = struct.Struct("<8sIIQI36x")
_BLOCK = 512


def write_index(path: Path, records: np.ndarray, num_shards: int) -> None:
    """Writes an index file; see `storage.write_whole`."""
    assert records.dtype == RECORD and (not len(records) or records["shard"].max() < num_shards)
    records = np.ascontiguousarray(records)
    write_whole(path, _HEADER.pack(MAGIC, VERSION, num_shards, len(records), zlib.crc32(records)), records)


def open_index(path: Path, num_shards: int) -> np.ndarray:
    """The records of an index file, mapped into memory, after a look at the header and all checksums.

    Args:
        path: of the file.
        num_shards: how many shards it should speak of.

    Raises:
        DataError: it is missing, no index, of another version, cut off or damaged, or belongs to other shards.
    """
    remedy = "make it again with `dune-fast data shard` (the shards themselves are kept)"
    try:
        with open(path, "rb") as file:
            header, size = file.read(_HEADER.size), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(f"the index {path} cannot be read ({error.strerror}); {remedy}") from error
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise DataError(f"{path} is no index of shards: it does not begin with {MAGIC.decode()}; {remedy}")
    _, version, shards, count, crc = _HEADER.unpack(header)
    if version != VERSION:
        raise DataError(f"the index {path} has version {version}, this program reads version {VERSION}; {remedy}")
    if size != _HEADER.size + count * RECORD.itemsize:
        expected = _HEADER.size + count * RECORD.itemsize
        raise DataError(f"the index {path} has {size} bytes, its {count} images need {expected}; {remedy}")
    if not count:
        return np.empty(0, RECORD)
    records = np.memmap(path, RECORD, "r", offset=_HEADER.size, shape=(count,))
    if zlib.crc32(records) != crc:
        raise DataError(f"the index {path} is damaged: its checksum differs; {remedy}")
    if shards != num_shards or int(records["shard"].max()) >= num_shards:
        raise DataError(f"the index {path} is of {shards} shards, not of {num_shards}; {remedy}")
    return records


def scan_tar(path: str, pattern: str, patience: float) -> np.ndarray:
    """Records of the images in one tar file, shard number 0, in the order of the file. Nothing is extracted.

    A sample is a run of members with one key (the name up to the first dot after the last slash, as in WebDataset). Of
    a sample's members one is the image: "key.jpg", else jpeg, png, webp and so on. Names with further dots, such as
    "key.1.jpg", are samples of their own; unless what the further dots enclose is a word and the sample has an image
    without it: "key.mask.png" beside "key.jpg" is taken only where the pattern asks for it.

    Args:
        path: a file or an address.
        pattern: instead, take all members whose name matches one of these globs, separated by "|".
        patience: seconds for which a failing read is tried again.

    Raises:
        DataError: it cannot be opened, is no tar file, a compressed one, or a damaged or truncated one; or its samples
            have several images each, such as "key.rgb.png" and "key.depth.png", and the pattern is empty.
        StorageError: the storage does not answer.
    """
    try:
        members = patiently(lambda: list(_members(path)), path, patience)
    except OSError as error:
        raise DataError(f"the tar file {path} cannot be read: {error.strerror or error}") from error
    globs = [part.strip() for part in pattern.split("|")]
    chosen = [m for m in members if any(fnmatch.fnmatchcase(m.name, g) for g in globs)] if pattern else _images(members)
    records = np.zeros(len(chosen), RECORD)
    records["offset"] = [member.offset for member in chosen]
    records["length"] = [member.length for member in chosen]
    return records


class _Member(NamedTuple):
    """A file in a tar, and where its bytes are."""

    name: str
    offset: int
    length: int


def _members(path: str) -> Iterator[_Member]:
    """The regular files below 4 GiB in a tar file."""
    with open_binary(path) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        found = 0
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
                        yield _Member(member.name, member.offset_data, member.size)
                _check_end(stream, archive.offset, path, found)
        except tarfile.TarError as error:
            stream.seek(0)
            compressed = stream.read(4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd"))
            hint = "it is compressed, so nothing in it can be read at random: decompress it" if compressed else error
            raise DataError(f"{path} cannot be read as a tar file: {hint}") from error


def _images(members: list[_Member]) -> list[_Member]:
    """One image of each sample."""
    split = [(_split_name(member.name), member) for member in members]
    images = [(*parts, member) for parts, member in split if parts is not None]
    chosen: list[_Member] = []
    together: Counter[tuple[str, ...]] = Counter()  # the words of samples that have several
    for _, run in itertools.groupby(images, key=lambda image: image[0]):
        best: dict[str, tuple[int, _Member]] = {}  # by what is between the key and the extension
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
    if together and together.most_common(1)[0][1] > 1:
        words = together.most_common(1)[0][0]
        named = " and ".join(f"KEY.{word}.*" for word in words)
        raise DataError(
            f"its samples have several images each, {named}: say which are meant by `pattern`, for instance "
            f"pattern='*.{words[-1]}.*'"
        )
    return chosen


def _check_end(stream: BinaryIO, offset: int, path: str, images: int) -> None:
    """tarfile ends without a word at a header that it does not understand; the real end is a block of zeros."""
    stream.seek(offset)
    block = stream.read(_BLOCK)
    if not block or (len(block) == _BLOCK and block.count(0) == _BLOCK):
        return
    raise DataError(f"{path} is damaged or truncated after {images} images, at byte {offset}: no tar header is there")


def _split_name(name: str) -> tuple[str, str, int] | None:
    """(key with its folder, what further dots enclose, rank of the extension) of an image's name."""
    folder, _, base = name.rpartition("/")
    stem, _, rest = base.partition(".")
    inner, _, extension = rest.rpartition(".")
    extension = extension.lower()
    if not stem or extension not in IMAGE_EXTENSIONS:
        return None
    return f"{folder}/{stem}", inner, IMAGE_EXTENSIONS.index(extension)
