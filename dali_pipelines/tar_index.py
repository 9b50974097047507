"""Images in tar shards, found by a binary index.

An index file is a header of 64 bytes and one record of 24 bytes an image, little-endian, mapped into memory: ranks of a
machine share its pages. 20.7 million images take 0.5 GB on disk.

    header: magic (8 bytes), version (u32), number of shards (u32), number of images (u64), CRC-32 of the records (u32)
    record: offset (u64), length (u32), shard (u32), CRC-32 of the image (u32), width (u16), height (u16)

Width and height are 0 and the checksum is 0 where only the tar's headers were read (`foreign_shards`).
"""

from __future__ import annotations

import json
import os
import struct
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from dune_fast.dali_pipelines.errors import DataError
from dune_fast.dali_pipelines.storage import Location, Reader, write_whole

RECORD = np.dtype(
    [("offset", "<u8"), ("length", "<u4"), ("shard", "<u4"), ("crc", "<u4"), ("width", "<u2"), ("height", "<u2")]
)
assert RECORD.itemsize == 24
MAGIC, VERSION = b"DUNEFIDX", 1
_HEADER = struct.Struct("<8sIIQI36x")
_BLOCK = tarfile.BLOCKSIZE  # bytes of a header; a member's bytes are filled up to a multiple of it


def write_index(path: Path, records: np.ndarray, num_shards: int) -> None:
    """Writes an index file; see `storage.write_whole`."""
    assert records.dtype == RECORD and (not len(records) or records["shard"].max() < num_shards)
    records = np.ascontiguousarray(records)
    write_whole(path, _HEADER.pack(MAGIC, VERSION, num_shards, len(records), zlib.crc32(records)), records)


def open_index(path: Path, num_shards: int) -> np.ndarray:
    """The records of an index file of `num_shards` shards, mapped into memory, their checksum compared.

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
    if size != (expected := _HEADER.size + count * RECORD.itemsize):
        raise DataError(f"the index {path} has {size} bytes, its {count} images need {expected}; {remedy}")
    if not count:
        return np.empty(0, RECORD)
    records = np.memmap(path, RECORD, "r", offset=_HEADER.size, shape=(count,))
    if zlib.crc32(records) != crc:
        raise DataError(f"the index {path} is damaged: its checksum differs; {remedy}")
    if shards != num_shards or int(records["shard"].max()) >= num_shards:
        raise DataError(f"the index {path} is of {shards} shards, not of {num_shards}; {remedy}")
    return records


class ShardImages(Sequence[str]):
    """Images in tar shards; as a sequence their names, "SHARD.tar@OFFSET".

    Args:
        shards: paths or addresses of the tar files.
        records: of dtype RECORD, usually mapped into memory.
        root: the folder that all shards lie in, if there is one.
        rows: the records that belong to it, all of them by default.
        described: whether a JSON follows each image, as in shards of our own.
    """

    def __init__(
        self,
        shards: Sequence[str],
        records: np.ndarray,
        root: str = "",
        rows: np.ndarray | None = None,
        described: bool = False,
    ) -> None:
        self.shards, self.root, self.described = shards, root, described
        self.left_out: dict[str, int] = {}
        self._records, self._rows = records, rows

    def __len__(self) -> int:
        return len(self._records if self._rows is None else self._rows)

    def __getitem__(self, index: int) -> str:
        record = self._record(index)
        return f"{self.shards[record['shard']]}@{record['offset']}"

    def relative(self, index: int) -> str:
        """The name without the folder that all shards lie in."""
        return self[index].removeprefix(self.root).lstrip("/")

    def locate(self, index: int) -> Location:
        """Where the bytes of an image are."""
        record = self._record(index)
        crc = int(record["crc"]) or None
        return Location(self.shards[record["shard"]], int(record["offset"]), int(record["length"]), crc)

    def source_path(self, index: int, reader: Reader) -> str:
        """What an image was called below its root before it came into the shard, or its member's name in foreign ones.

        Raises what `Reader.read` raises, and DataError if no such thing stands there: the index is another tar file's.
        """
        place = self.locate(index)
        # the headers of a tar are before the bytes that they tell of
        header_at = place.offset + place.length + -place.length % _BLOCK if self.described else place.offset - _BLOCK
        try:
            header = reader.read(Location(place.path, header_at, _BLOCK)).tobytes()
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            if not self.described:
                return member.name
            return json.loads(reader.read(Location(place.path, header_at + _BLOCK, member.size)).tobytes())["path"]
        except (tarfile.TarError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self[index]} has no name in its shard ({error}): the index is another's") from error

    def select(self, indices: Iterable[int]) -> ShardImages:
        """Only these images, in this order."""
        chosen = np.fromiter(indices, np.int64)
        rows = chosen if self._rows is None else self._rows[chosen]
        return ShardImages(self.shards, self._records, self.root, rows, self.described)

    def _record(self, index: int) -> np.void:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._records[index if self._rows is None else self._rows[index]]
