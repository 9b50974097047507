"""Which images of a batch a teacher gets, where it does not get all of them.

The indices are known on the host, so that every shape is: nothing is read from the device. A copy of them goes to the
device with the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


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
