"""A cache's folder: `cache.json` and shards of consecutive views, read row by row.

Row i of every tensor of shard s belongs to view s * rows + i. A row carries a checksum (CRC-32 over its bytes, tensor
by tensor in the order of their names), which every read compares; -1 stands for an image that could not be decoded.
Shards are whole files: they are written under another name and renamed.
"""

from __future__ import annotations

import functools
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dune_fast.cache.formats import decode

MANIFEST = "cache.json"
CHECKSUMS = "checksums"
VERSION = 1
_OPEN = 128  # shards that are mapped at once

class CacheError(ValueError):
    """A cache cannot be used; the message says why and what to do."""


Features = dict[str, dict[str, Tensor]]


def shard_path(folder: Path, index: int) -> Path:
    """Of one shard."""
    return folder / f"shard-{index:06}.safetensors"


def checksum(tensors: Mapping[str, Tensor], row: int) -> int:
    """Of one row."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name][row].contiguous().view(torch.uint8).numpy(), value)
    return value


def write_shard(path: Path, tensors: dict[str, Tensor], present: Tensor, about: dict[str, str]) -> None:
    """Writes a shard whole or not at all.

    Args:
        tensors: name -> [rows, ...].
        present: bool [rows], false where there is no image.
        about: metadata.
    """
    sums = [checksum(tensors, row) if there else -1 for row, there in enumerate(present.tolist())]
    fresh = path.with_name(f"{path.name}.part")  # what a kill leaves is overwritten
    save_file({**tensors, CHECKSUMS: torch.tensor(sums, dtype=torch.int64)}, fresh, metadata=about)
    fresh.chmod(0o666 & ~_umask())  # safetensors writes for the owner alone
    with fresh.open("rb") as handle:
        os.fsync(handle.fileno())
    fresh.replace(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class Store:
    """A cache that is read.

    Args:
        folder: where it is.
        tokens: (teacher, token type) that are wanted, in the order of the run.

    Raises:
        CacheError: there is none in the folder, it is not complete, or of another version.
    """

    def __init__(self, folder: str, tokens: Sequence[tuple[str, str]] = ()) -> None:
        self.folder, self.tokens = Path(folder).expanduser(), list(tokens)
        try:
            self.manifest: dict[str, Any] = json.loads((self.folder / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            raise CacheError(
                f"cache.folder={folder} holds no cache ({error}); `dune-fast cache build` makes one"
            ) from error
        if (found := self.manifest.get("version")) != VERSION:
            raise CacheError(f"the cache {folder} has format {found}, this version of dune-fast reads {VERSION}")
        self.rows: int = self.manifest["rows"]
        self.shards = -(-self.manifest["views"] // self.rows)
        missing = [s for s in range(self.shards) if not shard_path(self.folder, s).exists()]
        if missing:
            raise CacheError(
                f"the cache {folder} is not complete: {len(missing)} of {self.shards} shards are missing; the command "
                "that builds it goes on where it stopped"
            )
        self._open = functools.lru_cache(_OPEN)(self._shard)

    def _shard(self, index: int) -> Any:
        path = shard_path(self.folder, index)
        try:
            shard = safe_open(path, "pt")
            return shard, {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CacheError(f"{path} is damaged ({error}); delete it and build the cache again") from error

    def row(self, view: int) -> dict[str, Tensor]:
        """What is stored of one view: name -> [1, ...].

        Raises:
            CacheError: the row is damaged, or the image could not be decoded when the cache was built.
        """
        index, row = divmod(view, self.rows)
        _, slices = self._open(index)
        tensors = {name: values[row : row + 1] for name, values in slices.items()}
        expected = int(tensors.pop(CHECKSUMS))
        if expected == -1:
            raise CacheError(
                f"{shard_path(self.folder, index)} has no features of view {view}: its image was broken when the cache "
                "was built. Delete this file and build the cache again"
            )
        if checksum(tensors, 0) != expected:
            path = shard_path(self.folder, index)
            raise CacheError(f"{path} is damaged (view {view}); delete it and build the cache again")
        return tensors

    def read(self, views: np.ndarray) -> Stored:
        """What is stored of views, int64 [B]; for `ImageLoader.read_views`."""
        rows = [self.row(view) for view in views.tolist()]
        return Stored({name: torch.cat([row[name] for row in rows]) for name in rows[0]}, self.tokens)


class Stored:
    """Encoded features in the host's memory; called with a device, it decodes them there."""

    def __init__(self, tensors: dict[str, Tensor], tokens: Sequence[tuple[str, str]]) -> None:
        pin, self._tokens = torch.cuda.is_available(), tokens
        self._tensors = {name: x.pin_memory() if pin else x for name, x in tensors.items()}

    def __call__(self, device: torch.device) -> Features:
        """teacher -> token type -> [B, N, C] or [B, C]."""
        there = {name: x.to(device, non_blocking=True) for name, x in self._tensors.items()}
        features: Features = {}
        for teacher, kind in self._tokens:
            features.setdefault(teacher, {})[kind] = decode(f"{teacher}/{kind}", there)
        return features
