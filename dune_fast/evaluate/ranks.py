"""The processes that share an evaluation, as torchrun, DeepSpeed's launcher or srun has started them; mostly one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from dune_fast.engine.launch import place
from dune_fast.engine.rendezvous import join
from dune_fast.teachers.progress import Progress

_MEET_MINUTES = 10.0
_PATIENCE = timedelta(hours=2)  # of a collective: rank 0 may fit a classifier while the others wait


class _Silent(contextlib.nullcontext):
    """In place of a progress bar."""

    def __enter__(self) -> _Silent:
        return self

    def advance(self, units: int) -> None:
        """Says nothing."""


@dataclass(frozen=True)
class Ranks:
    """This process among them."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    def progress(self, title: str, total: int, unit: str = "images", done: int = 0) -> Progress | _Silent:
        """A progress bar of rank 0's; see `Progress`."""
        return _Silent() if self.rank else Progress(title, total, unit, done)

    def share(self, title: str, count: int) -> Iterator[int]:
        """This rank's of `count` images, by their indices, with a progress bar. All ranks call it."""
        mine = range(self.rank, count, self.size)
        with self.progress(title, len(mine)) as progress:
            for index in mine:
                yield index
                progress.advance(1)

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def add(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def same(self, x: Tensor) -> Tensor:
        """Rank 0's, in place."""
        if self.size > 1:
            dist.broadcast(x, 0)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """The ranks' tensors, of one shape, one after the other: [B, ...] -> [size * B, ...]."""
        if self.size == 1:
            return x
        out = x.new_empty(self.size * len(x), *x.shape[1:])
        dist.all_gather(list(out.chunk(self.size)), x.contiguous())
        return out


@contextlib.contextmanager
def open_ranks(device: str | None = None) -> Iterator[Ranks]:
    """Joins the other processes, if a launcher has started some.

    Args:
        device: "cpu", "cuda", "cuda:1"; None for the rank's own GPU where there is one.

    Raises:
        LaunchError: the launcher's environment is incomplete, or not all processes came.
        ValueError: a device that is not there.
    """
    here = place(os.environ)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        own = torch.device(device or ("cuda" if gpus else "cpu"))
    except RuntimeError:
        own = None
    if own is None or own.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: give cpu, cuda or cuda:1")
    if own.type == "cuda":
        if not gpus or (own.index or 0) >= gpus:
            raise ValueError(f"--device {own}: this machine has {gpus} GPUs that torch can use")
        own = torch.device("cuda", here.local_rank % gpus) if own.index is None else own
        torch.cuda.set_device(own)
    if here.world_size == 1:
        yield Ranks(device=own)
        return
    join(here, own, _MEET_MINUTES, _PATIENCE)
    try:
        yield Ranks(here.rank, here.world_size, own)
    finally:
        dist.destroy_process_group()
