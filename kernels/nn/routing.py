"""Which images of a batch a teacher gets, and which patches of them, where it does not get all.

The indices of images are known on the host, so that every shape is: nothing is read from the device. A copy of them
goes to the device with the batch. Of patches the host knows the number alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dune_fast.kernels import philox


@dataclass(frozen=True)
class Route:
    """One teacher's images of a batch of `batch` images."""

    host: np.ndarray
    """int64 [n], ascending, each once."""
    device: Tensor
    """The same, int64 [n]."""
    batch: int
    """Images of the whole batch."""

    def __len__(self) -> int:
        return len(self.host)

    def take(self, x: Tensor) -> Tensor:
        """The teacher's rows of x [B, ...], a copy [n, ...]."""
        return x.index_select(0, self.device)

    def spread(self, values: Tensor) -> Tensor:
        """values [n] of the teacher's images at their places in the batch, [B], 0 elsewhere; keeps the gradient."""
        return values.new_zeros(self.batch).index_copy(0, self.device, values)


Routes = Mapping[str, Route]
"""teacher -> its images"""


@dataclass(frozen=True)
class PatchSubset:
    """The same random patches of all images of one step, for all teachers: a function of seed and step alone."""

    share: float
    """Of an image's patches, above 0, up to 1."""
    seed: int
    step: int

    def count(self, patches: int) -> int:
        """How many of an image's patches: the nearest to the share, at least one."""
        return max(1, round(self.share * patches))

    def index(self, patches: int, device: torch.device) -> Tensor | None:
        """int64 [n], ascending, each once; None where all are taken."""
        count = self.count(patches)
        if count == patches:
            return None
        drawn = philox.words(self.seed, philox.PATCHES, torch.arange(patches, device=device), self.step)[:, 0]
        return drawn.argsort(stable=True)[:count].sort().values

    def with_cls(self, patches: int, device: torch.device) -> Tensor | None:
        """The same among tokens of which the first is the cls token, which stays: int64 [1 + n], or None."""
        index = self.index(patches, device)
        return None if index is None else F.pad(index + 1, (1, 0))


@dataclass(frozen=True)
class OwnPatches:
    """Patches of every image's own, which a cache has features of; read as a `PatchSubset` is."""

    indices: Tensor
    """int64 [B, n], ascending in each row, each once."""

    def index(self, patches: int, device: torch.device) -> Tensor:
        """int64 [B, n]."""
        return self.indices

    def with_cls(self, patches: int, device: torch.device) -> Tensor:
        """The same among tokens of which the first is the cls token, which stays: int64 [B, 1 + n]."""
        return F.pad(self.indices + 1, (1, 0))


def patches_of_views(share: float, seed: int, views: Tensor, patches: int) -> Tensor:
    """Random patches of fixed views, a share of them (see `PatchSubset.count`): int64 [B, n], ascending.

    Args:
        views: int64 [B], their numbers, which with the seed decide.
        patches: of an image.
    """
    drawn = philox.words(seed, philox.VIEW_PATCHES, views[:, None], torch.arange(patches, device=views.device))[..., 0]
    return drawn.argsort(stable=True)[:, : PatchSubset(share, seed, 0).count(patches)].sort(-1).values


def select(x: Tensor, index: Tensor | None) -> Tensor:
    """The tokens [B, n, C] of x [B, N, C], a copy, by an index [n] for all images or [B, n]; x itself without one."""
    if index is None:
        return x
    return x.index_select(1, index) if index.ndim == 1 else x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def make_routes(indices: Mapping[str, np.ndarray], batch: int, device: torch.device) -> dict[str, Route]:
    """Routes from ascending int64 indices by teacher, in one transfer that the host does not wait for."""
    parts = upload(np.concatenate(list(indices.values())), device).split([len(index) for index in indices.values()])
    return {name: Route(index, part, batch) for (name, index), part in zip(indices.items(), parts, strict=True)}


def union(routes: Sequence[Route]) -> Route:
    """The images that any of several teachers gets."""
    first, *others = routes
    if all(np.array_equal(first.host, other.host) for other in others):
        return first
    host = np.unique(np.concatenate([route.host for route in routes]))
    return Route(host, upload(host, first.device.device), first.batch)


def within(route: Route, whole: Route) -> Route:
    """A teacher's places among the images of `whole`, which has them all."""
    host = np.searchsorted(whole.host, route.host)
    return Route(host, upload(host, route.device.device), len(whole))


def upload(index: np.ndarray, device: torch.device) -> Tensor:
    """int64 indices on the device; the host does not wait."""
    index = torch.from_numpy(index.astype(np.int64))
    return (index.pin_memory() if device.type == "cuda" else index).to(device, non_blocking=True)
