"""What every operation's file shares: triton if there is one, registration with torch, guards, the layout of rows.

An operation is registered under `torch.ops.dune_fast` with a Triton implementation for CUDA (ROCm answers to the same
name), a plain reference for the CPU and a fake for tracing; its `autograd.Function` calls the registered forward and
backward from outside. So torch.compile keeps a call whole, checkpointing, autocast and CUDA graphs work, and no tracer
looks into Triton. A file follows this order: formula, reference, `@jit` kernels, launch table, implementation (checks
layouts, allocates, calls `launch`), registration, public function, `examples`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dune_fast.kernels.launching import is_recording

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the references serve every call
    triton = tl = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the Triton kernels read; any other type takes the reference."""
INTERPRETER = triton is not None and triton.knobs.runtime.interpret
"""Whether TRITON_INTERPRET=1 was set before triton was imported, so that kernels run on a CPU, in Python."""

_interpreted = False


def jit(fn: Callable | None = None, **options: Any) -> Any:
    """`triton.jit`, or nothing where there is no triton."""
    if fn is None:
        return functools.partial(jit, **options)
    return fn if triton is None else triton.jit(fn, **options)


def register(schema: str, fused: Callable, reference: Callable, fake: Callable) -> Any:
    """Registers an operation and returns it, callable.

    Args:
        schema: "name(Tensor x, float eps) -> (Tensor, Tensor)": a tensor first, no default values, `SymInt` for an
            integer that changes from call to call.
        fused: the Triton implementation, for CUDA; outputs never alias inputs unless the schema says so.
        reference: the same in plain torch, for the CPU.
        fake: shapes, dtypes and strides of the outputs.
    """
    name, brace, rest = schema.partition("(")
    qualified = f"dune_fast::{name}"

    def on_cuda(device_arg: Tensor, *args: Any) -> Any:
        if triton is None:
            return reference(device_arg, *args)
        with torch.cuda.device(device_arg.device):  # triton launches on the current one
            return fused(device_arg, *args)

    torch.library.define(qualified, brace + rest)
    torch.library.impl(qualified, "CUDA", on_cuda)
    torch.library.impl(qualified, "CPU", lambda *args: (fused if _interpreted else reference)(*args))
    torch.library.register_fake(qualified, lambda *args: (fused if is_recording() else fake)(*args))
    return getattr(torch.ops.dune_fast, name).default


def use_triton(*tensors: Tensor | None) -> bool:
    """Whether a kernel serves these tensors: all on CUDA, or in `interpreted()`, and of a type in DTYPES or integers.

    None is skipped. While launches are recorded, tensors without data count as being on CUDA.
    """
    anywhere = _interpreted or is_recording()
    if triton is None or (INTERPRETER and not anywhere):
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    return all((t.is_cuda or anywhere) and (t.dtype in DTYPES or not t.is_floating_point()) for t in given)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """For tests: inside, CPU tensors go through the Triton kernels in the interpreter, which is exact and slow."""
    if not INTERPRETER:
        raise ValueError("interpreted() needs TRITON_INTERPRET=1 in the environment before triton is imported")
    with traced():
        yield


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """For counting operations: inside, fake CPU tensors, which have no data, take the paths of a GPU."""
    global _interpreted
    before, _interpreted = _interpreted, True
    try:
        yield
    finally:
        _interpreted = before


def describe(**tensors: Tensor | None) -> str:
    """ "student bfloat16 [2, 3] on cuda:0, ..." for error messages."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return ", ".join(f"{name} {str(t.dtype)[6:]} {list(t.shape)} on {t.device}" for name, t in given.items())


def guard(condition: bool, rule: str, **tensors: Tensor | None) -> None:
    """Raises a ValueError that states the rule and what was given, unless the condition holds."""
    if not condition:
        raise ValueError(f"{rule}; got {describe(**tensors)}")


def guard_device(operation: str, **tensors: Tensor | None) -> None:
    """Raises a ValueError unless all tensors lie on one device."""
    devices = {tensor.device for tensor in tensors.values() if tensor is not None}
    guard(len(devices) < 2, f"{operation} takes tensors of one device", **tensors)


def followed(*tensors: Tensor | None) -> bool:
    """Whether autograd follows any of these tensors here."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def widen(x: Tensor) -> Tensor:
    """x in float32, in which references compute; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def contiguous(*parameters: Tensor | None) -> list[Tensor | None]:
    """Small tensors with adjacent elements; None stays None."""
    return [None if p is None else p.contiguous() for p in parameters]


def flat_rows(x: Tensor) -> Tensor:
    """x [..., C] as [rows, C] with adjacent channels, a view where one row stride describes it."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


class Rows(NamedTuple):
    """[..., C] seen as rows: row r begins (r // inner) * outer_stride + (r % inner) * inner_stride elements into x."""

    x: Tensor
    count: int
    inner: int
    outer_stride: int
    inner_stride: int

    @property
    def period(self) -> int:
        """`inner`, or 0 where one stride describes all rows; a constant of kernels, which then never really divide."""
        return 0 if self.inner == self.count else self.inner


@jit
def load_rows(x, row, channel, valid, PERIOD: tl.constexpr, outer_stride, inner_stride):
    """Rows and channels of `Rows`, float32 [R, C], 0 where not valid."""
    if PERIOD == 0:
        start = row.to(tl.int64) * inner_stride
    else:
        start = (row // PERIOD).to(tl.int64) * outer_stride + (row % PERIOD).to(tl.int64) * inner_stride
    at = start[:, None] + channel[None, :]
    return tl.load(x + at, mask=valid, other=0.0).to(tl.float32)


def as_rows(x: Tensor) -> Rows:
    """Rows of x [..., C] with adjacent channels: no copy where two strides describe them, else of a contiguous copy.

    Dimensions of size 1 and those that merge do not count, so [B, N, C], tokens[:, 1:] and tokens[:, 0] are all free.
    """
    merged: list[tuple[int, int]] = []  # (size, stride), outermost first
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if merged and size != 1 and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        elif size != 1:
            merged.append((size, stride))
    if len(merged) > 2 or (x.stride(-1) != 1 and x.shape[-1] != 1):
        return as_rows(x.contiguous())
    (outer, outer_stride), (inner, inner_stride) = ([(1, 0), (1, 0)] + merged)[-2:]
    return Rows(x, outer * inner, inner, outer_stride, inner_stride)
