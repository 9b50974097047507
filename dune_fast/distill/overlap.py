"""A second CUDA stream, so that the frozen teachers run while the student does.

    main     ... | images ready          student forward            | losses, backward
    second       waits, teachers' forward ......................... waits |

The host waits for nothing. Both streams run the kernels that one stream would, so the numbers are the same.

Memory: the caching allocator keeps a pool for each stream. What the teachers allocate, their features too, goes back to
the second stream's pool as soon as Python drops it, perhaps while the main stream still reads it. That is safe as the
pool is used within `fork` alone, which begins by waiting for everything that the main stream has been given. What the
teachers only read (images, routes) must be kept until `join`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """A second stream of a CUDA device; ValueError for a device without streams."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(
                f"train.overlap_teachers is true, but the run is on {device}, which has no streams; set it to false"
            )
        self._device = device
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def fork(self) -> Iterator[None]:
        """Inside, work goes to the second stream, behind all that the current one has been given."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """The current stream waits for what `fork` has enqueued."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
