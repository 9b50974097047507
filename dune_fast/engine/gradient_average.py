"""Averages gradients over ranks while the backward pass still computes others (ZeRO 0).

    backward    last layers | middle layers    | first layers     | step
    transfer                | bucket 0         | bucket 1         | bucket 2 | waits for the last one

Buckets hold parameters from the module's end to its beginning, the order in which the backward pass reaches them. Every
rank sends them in this order. The transfer has a stream (NCCL) or threads (gloo) of its own, so the host does not wait
for the device. DeepSpeed (0.19.8) starts the transfer only when the backward pass has ended.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

LARGEST = 25 * 2**20
"""Bytes of a bucket, at most: long enough for the link's full speed."""
FEWEST = 8
"""Buckets, about, of a small module: only the last bucket's transfer is not hidden."""


class _Bucket:
    """Some parameters, and the flat buffer in which their gradients travel."""

    def __init__(self, parameters: list[nn.Parameter], dtype: torch.dtype) -> None:
        self.parameters = parameters
        sizes = [p.numel() for p in parameters]
        self.flat = torch.zeros(sum(sizes), dtype=dtype, device=parameters[0].device)
        self.views = [x.view_as(p) for x, p in zip(self.flat.split(sizes), parameters, strict=True)]
        self.ready = 0
        self.work: dist.Work | None = None

    @property
    def complete(self) -> bool:
        """Whether this backward pass has reached all of the parameters."""
        return self.ready == len(self.parameters)

    @torch.no_grad()
    def send(self) -> None:
        """Starts the all-reduce."""
        torch._foreach_copy_(self.views, [p.grad for p in self.parameters])
        self.work = dist.all_reduce(self.flat, async_op=True)
        for view, p in zip(self.views, self.parameters, strict=True):
            if view.dtype == p.grad.dtype:
                p.grad = view  # the memory of the gradient itself is free again

    @torch.no_grad()
    def receive(self, world_size: int) -> None:
        """Puts the average in the gradients' place; on a GPU the stream waits, not the host."""
        self.work.wait()
        self.flat.div_(world_size)
        if self.views[0].dtype != self.parameters[0].grad.dtype:
            torch._foreach_copy_([p.grad for p in self.parameters], self.views)
        self.ready, self.work = 0, None


class GradientAverage:
    """Replaces the gradients of a module by their averages over ranks.

    Args:
        parameters: those that are trained, in the module's order, the same on every rank.
        dtype: in which they are summed.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        self._world_size = dist.get_world_size()
        self._active, self._sent = False, 0
        self._buckets = [_Bucket(part, dtype) for part in _parts(parameters, dtype.itemsize)]
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.parameters}
        for p in parameters:
            p.register_post_accumulate_grad_hook(self._known)

    def begin(self) -> None:
        """Before the backward pass whose end completes the gradients."""
        self._active = True

    def finish(self) -> None:
        """After that pass, which has reached every parameter: `grad` is the average."""
        assert self._sent == len(self._buckets), "a parameter got no gradient"
        for bucket in self._buckets:
            bucket.receive(self._world_size)
        self._active, self._sent = False, 0

    def _known(self, parameter: nn.Parameter) -> None:
        """Called by autograd when a gradient is complete."""
        if self._active:
            self._bucket_of[parameter].ready += 1
            while self._sent < len(self._buckets) and self._buckets[self._sent].complete:  # in order, on every rank
                self._buckets[self._sent].send()
                self._sent += 1


def _parts(parameters: Sequence[nn.Parameter], itemsize: int) -> list[list[nn.Parameter]]:
    """The parameters from the last to the first, in parts of about equal size, at most `LARGEST` where they can be."""
    limit = min(LARGEST // itemsize, sum(p.numel() for p in parameters) // FEWEST)
    parts: list[list[nn.Parameter]] = []
    size = 0
    for p in reversed(parameters):
        if not parts or size + p.numel() > limit:
            parts.append([])
            size = 0
        parts[-1].append(p)
        size += p.numel()
    return parts
