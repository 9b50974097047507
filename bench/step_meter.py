"""What a step is measured with: times, launches and gaps, waits of the host, memory, the matrix rate."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from unittest import mock

import torch


def time_calls(call: Callable[[int], object], numbers: Sequence[int], device: torch.device) -> list[float]:
    """Milliseconds of call(i) for every i of `numbers`: on a GPU by CUDA events, without waiting in between."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for i in numbers:
            call(i)
            marks.append(time.perf_counter())
        return [(end - start) * 1e3 for start, end in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(numbers) + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for i, event in zip(numbers, events[1:], strict=True):
        call(i)
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairwise(events)]


def merged_length(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of the union of (start, end) intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
"""How the names of calls that launch begin: "ExC", "Ex" and, depending on CUDA, a version follow."""


def profile(step: Callable[[], object]) -> tuple[int, float]:
    """(launches by the host, share of the time in which nothing ran on the device) of one step; CUDA only."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    torch.cuda.synchronize()
    with torch_profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    intervals, launches = [], 0
    for event in trace.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            launches += event.name.startswith(_LAUNCHES)
        elif not getattr(event, "is_user_annotation", False):
            intervals.append((event.time_range.start, event.time_range.end))
    span = max(end for _, end in intervals) - min(start for start, _ in intervals)
    return launches, 1 - merged_length(intervals) / span


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """Notes every call of a `synchronize`, which CUDA's sync debug mode does not see."""
    found: list[str] = []

    def counted(owner: object) -> Callable[..., object]:
        original = owner.synchronize

        def synchronize(*args: object, **kwargs: object) -> object:
            found.append(owner.__name__)
            return original(*args, **kwargs)

        return synchronize

    with ExitStack() as stack:
        for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
            stack.enter_context(mock.patch.object(owner, "synchronize", counted(owner)))
        yield found


def host_syncs(step: Callable[[], object]) -> int:
    """How often one step makes the host wait for the device: CUDA's sync debug mode, and `counted_waits`."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught, counted_waits() as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return len(waits) + sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def peak_memory(step: Callable[[], object]) -> int:
    """Bytes of all tensors at the peak of one step."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 8192, repetitions: int = 20) -> float:
    """TFLOP/s of a product of two size x size matrices, the median: the ceiling that steps are compared with."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = time_calls(lambda i: a @ b, range(3 + repetitions), device)[3:]
    return 2 * size**3 / statistics.median(times) / 1e9
