"""Images in tar shards (WebDataset) with an index and a manifest. A folder of `dune-fast data shard` holds one dataset:

    manifest.json                     what there is: `Manifest`
    train.index, val.index            where every image is: `tar_index`
    train-000000.tar, ...             members KEY.jpg (KEY.png where no JPEG is as large) and KEY.json, as WebDataset
    quarantine.jsonl                  images of the source that are broken, one JSON object a line
    records/                          what the shards hold one by one; only needed to go on with the sharding

The folder may be an address that fsspec knows. Shards of other tools have no manifest: `foreign_shards`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dune_fast.dali_pipelines.addresses import PATIENCE, ask, is_url, list_address
from dune_fast.dali_pipelines.errors import DataError
from dune_fast.dali_pipelines.patience import patiently
from dune_fast.dali_pipelines.storage import cached, open_binary, write_whole
from dune_fast.dali_pipelines.tar_index import ShardImages, open_index

FORMAT = 1
"""Version of the manifest."""
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One tar file in the folder of the manifest."""

    name: str
    bytes: int
    images: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The shards of one split."""

    name: str
    """"train" or "val"."""
    images: int
    broken: int
    """Images of the source that were broken and are in no shard."""
    index: str
    """Name of the index file."""
    index_sha256: str
    shards: list[Shard]
    """In the order of their numbers in the index."""


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds."""

    format: int
    dataset: str
    source: str
    """Fingerprint of the source: a hash over the number and the names of its images, split by split."""
    settings: dict
    """How the shards were made: the fields of `sharding.ShardSettings`."""
    splits: list[Split]
    """Those that have images."""

    def dump(self) -> str:
        """As JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def parse(cls, text: str, where: str) -> Manifest:
        """From JSON, read at `where`. DataError if it has another version, or names files outside its folder."""
        try:
            values = json.loads(text)
            if values["format"] != FORMAT:
                raise DataError(f"{where} has format {values['format']}, this program reads format {FORMAT}")
            values["splits"] = [
                Split(**{**split, "shards": [Shard(**shard) for shard in split["shards"]]})
                for split in values["splits"]
            ]
            manifest = cls(**values)
            files = [(split.index, split.index_sha256) for split in manifest.splits]
            files += [(shard.name, shard.sha256) for split in manifest.splits for shard in split.shards]
            for name, sha256 in files:  # both become parts of paths
                if "/" in name or name in ("", ".", "..") or not re.fullmatch("[0-9a-f]{64}", sha256):
                    raise DataError(f"{where} names a file {name!r} with SHA-256 {sha256!r}: it has been tampered with")
            return manifest
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{where} is no manifest of shards ({type(error).__name__}: {error})") from error


def read_manifest(folder: str) -> Manifest:
    """The manifest of a folder or address; DataError if there is none or it is wrong."""
    path = f"{folder.rstrip('/')}/{MANIFEST}"
    try:
        return Manifest.parse(_read_file(path).decode(), path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def is_manifest_folder(given: str) -> bool:
    """Whether a folder or an address holds shards of our own."""
    if not is_url(given):
        return os.path.isfile(os.path.join(given, MANIFEST))
    try:
        return ask(given, lambda fs, folder: fs.info(f"{folder.rstrip('/')}/{MANIFEST}"))["type"] == "file"
    except FileNotFoundError:
        return False


def open_manifest_folder(folder: str) -> dict[str, ShardImages]:
    """The images of a folder of our own shards: "train", and "val" where it has any.

    Raises:
        DataError: a manifest, an index or a shard is missing, damaged or of another version; the message names it.
    """
    folder = folder.rstrip("/")
    manifest = read_manifest(folder)
    sizes = _sizes(folder)
    result = {}
    for split in manifest.splits:
        for shard in split.shards:
            if (found := sizes.get(shard.name)) != shard.bytes:
                state = "is missing" if found is None else f"has {found} bytes instead of {shard.bytes}"
                raise DataError(
                    f"the shard {folder}/{shard.name} {state}: copy it again from where it came, or make it again "
                    f"with the `dune-fast data shard` command that has filled the folder (the others are kept)"
                )
        records = _open_index(f"{folder}/{split.index}", split.index_sha256, len(split.shards))
        if len(records) != split.images:
            raise DataError(
                f"{folder}/{split.index} lists {len(records)} images, {MANIFEST} {split.images}: they do not belong "
                "together; copy both again, or run the `dune-fast data shard` command again"
            )
        shards = [f"{folder}/{shard.name}" for shard in split.shards]
        result[split.name] = ShardImages(shards, records, folder, described=True)
    return result


def _sizes(folder: str) -> dict[str, int]:
    """name -> bytes of all files in a folder."""
    if is_url(folder):
        listing = list_address(folder, lambda fs, path: fs.ls(path, detail=True))
        return {entry["name"].rpartition("/")[2]: int(entry["size"] or 0) for entry in listing}
    return {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()}


def _read_file(path: str) -> bytes:
    if not is_url(path):
        return patiently(lambda: Path(path).read_bytes(), path, PATIENCE)
    with open_binary(path) as stream:
        return stream.read()


def _open_index(path: str, sha256: str, num_shards: int) -> np.ndarray:
    """The records of an index file; of one at an address, those of its copy in the cache folder."""
    if not is_url(path):
        return open_index(Path(path), num_shards)
    with cached(f"shard-index/{sha256}.index", path) as copy:
        with contextlib.suppress(DataError):  # no copy yet, or a damaged one
            return open_index(copy, num_shards)
        try:
            data = _read_file(path)
        except OSError as error:
            raise DataError(f"the index {path} cannot be read: {error}") from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DataError(f"{path} is not the index that {MANIFEST} beside it was made with: copy both again")
        write_whole(copy, data)
        return open_index(copy, num_shards)


def verify_shards(folder: str, report: Callable[[int], None] = lambda _: None) -> list[str]:
    """What is wrong with a folder of our own shards, one sentence each: every byte is read and hashed.

    `report` is told how many bytes were read since the last call.

    Raises:
        DataError: what `open_manifest_folder` raises: the folder cannot be used at all.
    """
    open_manifest_folder(folder)
    problems = []
    for split in read_manifest(folder).splits:
        for name, expected in [(split.index, split.index_sha256)] + [(s.name, s.sha256) for s in split.shards]:
            path = f"{folder.rstrip('/')}/{name}"
            digest = hashlib.sha256()
            with open_binary(path) as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
                    report(len(chunk))
            if digest.hexdigest() != expected:
                problems.append(f"{path} has SHA-256 {digest.hexdigest()}, {MANIFEST} says {expected}: it is damaged")
    return problems
