"""A cache's folder: `cache.json` and shards of consecutive views, read row by row.

Row i of every tensor of shard s belongs to view s * rows + i. A row carries a checksum (CRC-32 over its bytes, tensor
by tensor in the order of their names), which every read compares; -1 stands for an image that could not be decoded. It
carries the checksum of its image, too, which is compared with that of the image that the run has read. Beside the rows
a shard has the moments of its features. Shards are whole files: they are written under another name and renamed.
"""

from __future__ import annotations

import functools
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dune_fast.cache.basis import FILE, read_basis
from dune_fast.cache.formats import Basis, decode

MANIFEST = "cache.json"
CHECKSUMS = "checksums"
IMAGES = "images"
"""Checksums of the views' images, see `dali_pipelines.source.Encoded`."""
PATCHES = "patches"
"""Of every view, the patches that were kept, int32 [n]; missing where all were."""
MOMENTS = "moments/"
"""Before a feature's name: float64 [1 + 2 C], number of tokens of a shard's views, their sum and sum of squares."""
VERSION = 2
_OPEN = 128  # shards that are mapped at once

class CacheError(ValueError):
    """A cache cannot be used; the message says why and what to do."""


Features = dict[str, dict[str, Tensor]]


class Moments(NamedTuple):
    """Of one teacher's token type, float64 [C] each."""

    mean: Tensor
    std: Tensor


def shard_path(folder: Path, index: int) -> Path:
    """Of one shard."""
    return folder / f"shard-{index:06}.safetensors"


def checksum(tensors: Mapping[str, Tensor], row: int) -> int:
    """Of one row."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name][row].reshape(-1).view(torch.uint8).numpy(), value)
    return value


def write_shard(
    path: Path, tensors: dict[str, Tensor], present: Tensor, about: dict[str, str], moments: dict[str, Tensor]
) -> None:
    """Writes a shard whole or not at all.

    Args:
        tensors: name -> [rows, ...].
        present: bool [rows], false where there is no image.
        about: metadata.
        moments: name -> what `MOMENTS` describes.
    """
    sums = [checksum(tensors, row) if there else -1 for row, there in enumerate(present.tolist())]
    fresh = path.with_name(f"{path.name}.part")  # what a kill leaves is overwritten
    beside = {MOMENTS + name: x for name, x in moments.items()}
    save_file({**tensors, CHECKSUMS: torch.tensor(sums, dtype=torch.int64), **beside}, fresh, metadata=about)
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
            raise CacheError(
                f"the cache {folder} is of version {found}, this dune-fast reads version {VERSION}: build it again in "
                "another folder"
            )
        self.rows: int = self.manifest["rows"]
        self.shards = -(-self.manifest["views"] // self.rows)
        missing = [s for s in range(self.shards) if not shard_path(self.folder, s).exists()]
        if missing:
            raise CacheError(
                f"the cache {folder} is not complete: {len(missing)} of {self.shards} shards are missing; the command "
                "that builds it goes on where it stopped"
            )
        self._bases: dict[str, Basis] = {}
        self._basis = ""
        if self.manifest["fingerprint"]["cache.components"]:
            try:
                self._bases, self._basis = read_basis(self.folder)
            except (OSError, ValueError) as error:
                raise CacheError(
                    f"the cache {folder} has lost its basis ({self.folder / FILE}: {error}): build it again in another "
                    "folder"
                ) from error
        self._open = functools.lru_cache(_OPEN)(self._shard)

    def _shard(self, index: int) -> Any:
        path = shard_path(self.folder, index)
        try:
            shard = safe_open(path, "pt")
            about = json.loads(shard.metadata()["about"])
            rows = {name: shard.get_slice(name) for name in shard.keys() if not name.startswith(MOMENTS)}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CacheError(f"{path} is damaged ({error}); delete it and build the cache again") from error
        if about["basis"] != self._basis:
            raise CacheError(
                f"{path} was not made with {self.folder / FILE}, which is damaged or of another build; delete the file "
                "and build the cache again"
            )
        return shard, rows, about

    def about(self) -> Iterator[dict[str, Any]]:
        """What each shard says of itself."""
        return (self._shard(index)[2] for index in range(self.shards))

    def moments(self) -> dict[str, dict[str, Moments]]:
        """teacher -> token type -> moments of the teachers' features over all views and patches."""
        sums: dict[str, Tensor] = {}
        for index in range(self.shards):
            shard, *_ = self._shard(index)
            for name in filter(lambda key: key.startswith(MOMENTS), shard.keys()):
                sums[name] = sums.get(name, 0) + shard.get_tensor(name)
        found: dict[str, dict[str, Moments]] = {}
        for name, values in sums.items():
            teacher, _, kind = name.removeprefix(MOMENTS).rpartition("/")
            channels = len(values) // 2
            count, total, squares = values.split([1, channels, channels])
            mean = total / count
            variance = ((squares - count * mean.square()) / (count - 1).clamp_min(1)).clamp_min(0)
            found.setdefault(teacher, {})[kind] = Moments(mean, variance.sqrt())
        return found

    def row(self, view: int) -> dict[str, Tensor]:
        """What is stored of one view: name -> [1, ...].

        Raises:
            CacheError: the row is damaged, or the image could not be decoded when the cache was built.
        """
        index, row = divmod(view, self.rows)
        _, slices, _ = self._open(index)
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

    def read(self, views: np.ndarray, images: np.ndarray, paths: Sequence[str]) -> Stored:
        """What is stored of views; for `ImageLoader.read_views`.

        Args:
            views: int64 [B].
            images: int64 [B], checksums of their images as the run has read them.
            paths: of these images.

        Raises:
            CacheError: see `row`; or an image is not the one that the features were made from.
        """
        rows = [self.row(view) for view in views.tolist()]
        for row, image, path in zip(rows, images.tolist(), paths, strict=True):
            if int(row.pop(IMAGES)) != image:
                raise CacheError(
                    f"the image {path} has changed since the cache {self.folder} was made of it: put the old one back, "
                    "or build the cache again in another folder"
                )
        return Stored({name: torch.cat([row[name] for row in rows]) for name in rows[0]}, self.tokens, self._bases)


class Stored:
    """Encoded features in the host's memory; called with a device, it decodes them there."""

    def __init__(
        self, tensors: dict[str, Tensor], tokens: Sequence[tuple[str, str]], bases: dict[str, Basis]
    ) -> None:
        pin, self._tokens, self._bases = torch.cuda.is_available(), tokens, bases
        self._tensors = {name: x.pin_memory() if pin else x for name, x in tensors.items()}

    def __call__(self, device: torch.device) -> tuple[Features, Tensor | None]:
        """teacher -> token type -> [B, n, C] or [B, C], and the patches that they are of, int64 [B, n], None for all.

        The device keeps the basis.
        """
        there = {name: x.to(device, non_blocking=True) for name, x in self._tensors.items()}
        features: Features = {}
        for teacher, kind in self._tokens:
            name = f"{teacher}/{kind}"
            if name in self._bases:
                self._bases[name] = self._bases[name].to(device)
            features.setdefault(teacher, {})[kind] = decode(name, there, self._bases.get(name))
        return features, there[PATCHES].long() if PATCHES in there else None
