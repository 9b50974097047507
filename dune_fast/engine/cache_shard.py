"""Rows of one shard of a cache, as they come: encoded features, their moments, how close they are."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dune_fast.cache.formats import Basis, decode, encode
from dune_fast.cache.store import IMAGES, PATCHES, Features
from dune_fast.engine.config import RunConfig
from dune_fast.kernels.moments import moments
from dune_fast.kernels.nn.routing import PatchSubset, patches_of_views, select
from dune_fast.teachers.config import given_patches


def bytes_per_view(cfg: RunConfig) -> int:
    """What the features of one view take on the disk."""
    grid, share, wanted = cfg.image_size // cfg.student.patch_size, cfg.cache.patch_share, cfg.cache.components
    total = 4 * PatchSubset(share, 0, 0).count(grid**2) if share < 1 else 0  # their indices
    for teacher in cfg.teachers.values():
        patches = PatchSubset(share, 0, 0).count(given_patches(teacher, grid))
        channels = min(wanted, teacher.num_features) if wanted else teacher.num_features
        for shape in [(1, patches, channels) if kind == "patch" else (1, teacher.num_features)
                      for kind in teacher.token_types]:  # fmt: skip
            stored = encode("x", torch.empty(shape, device="meta"), cfg.cache.format)
            total += sum(x.numel() * x.element_size() for x in stored.values())
    return total


class ShardRows:
    """Rows of one shard.

    Args:
        cfg: of the build.
        rows: how many.
        bases: `<teacher>/patch` -> basis, of teachers that have one.
    """

    def __init__(self, cfg: RunConfig, rows: int, bases: Mapping[str, Basis]) -> None:
        self._cache, self._seed, self._rows, self._bases = cfg.cache, cfg.train.seed, rows, bases
        self.tensors: dict[str, Tensor] = {}
        self.present = torch.zeros(rows, dtype=torch.bool)
        self.moments: dict[str, Tensor] = {}
        self._closeness: dict[str, np.ndarray] = {}

    def add(self, first: int, views: np.ndarray, images: np.ndarray, features: Features) -> None:
        """Features of some views.

        Args:
            first: the shard's first view.
            views, images: int64 [B], numbers of the views and checksums of their images.
            features: of these, live.
        """
        rows = torch.from_numpy(views - first)
        self._put(rows, {IMAGES: torch.from_numpy(images)})
        self.present[rows] = True
        kept = self._kept(views, features)
        if kept is not None:
            self._put(rows, {PATCHES: kept.int()})
        for teacher, kinds in features.items():
            for kind, x in kinds.items():
                name = f"{teacher}/{kind}"
                self._add_moments(name, x)
                x = select(x, kept) if kind == "patch" else x
                basis = self._bases.get(name)
                stored = encode(name, x, self._cache.format, basis)
                self._compare(name, decode(name, stored, basis).float(), x.float())
                self._put(rows, stored)

    def _kept(self, views: np.ndarray, features: Features) -> Tensor | None:
        """The patches that are stored, int64 [B, n]; None for all."""
        patches = next((kinds["patch"] for kinds in features.values() if "patch" in kinds), None)
        if patches is None or self._cache.patch_share == 1:
            return None
        numbers = torch.from_numpy(views).to(patches.device)
        return patches_of_views(self._cache.patch_share, self._seed, numbers, patches.shape[1])

    def _put(self, rows: Tensor, stored: Mapping[str, Tensor]) -> None:
        for key, value in stored.items():
            if key not in self.tensors:
                self.tensors[key] = torch.zeros(self._rows, *value.shape[1:], dtype=value.dtype)
            self.tensors[key][rows] = value.cpu()

    def _add_moments(self, name: str, x: Tensor) -> None:
        """See `cache.store.MOMENTS`; of all patches."""
        mean, squares = (values.double().cpu() for values in moments(x))
        count = x.numel() // x.shape[-1]
        sums = torch.cat([torch.tensor([count]).double(), count * mean, squares + count * mean.square()])
        self.moments[name] = self.moments.get(name, 0) + sums

    def _compare(self, name: str, stored: Tensor, live: Tensor) -> None:
        """Tokens, sum of their cosines, of squared errors."""
        tokens = live.numel() // live.shape[-1]
        cosine, error = torch.cosine_similarity(stored, live, dim=-1).sum(), (stored - live).square().sum()
        self._closeness[name] = self._closeness.get(name, 0) + np.array([tokens, float(cosine), float(error)])

    def about(self, seconds: float, basis: str) -> dict[str, str]:
        """Of the shard: views, how close features are, seconds, the SHA-256 of the basis."""
        closeness = {name: values.tolist() for name, values in self._closeness.items()}
        about = {"present": int(self.present.sum()), "closeness": closeness, "seconds": seconds, "basis": basis}
        return {"about": json.dumps(about)}
