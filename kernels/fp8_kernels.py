"""Triton kernels of `kernels.fp8`, and `quantize_kernel`'s launch table; formulas and minimal bytes are there.

    layer_norm_kernel   x, y, gamma, weight, bias -> x', values, scale    a row is padded to a power of two
    quantize_kernel     x, bias -> values, scale                          a row is two tiles, so ViTs' need no padding

A program holds ROWS whole rows in registers, for their amax. A pointer that is None leaves its part out at compile
time. Arithmetic is float32.
"""

from __future__ import annotations

from dune_fast.kernels.gelu import gelu
from dune_fast.kernels.launching import Launch
from dune_fast.kernels.layer_norm_kernels import normed_rows
from dune_fast.kernels.library import jit, tl


@jit
def _scales(amax):
    """What to multiply values by, and the scale of their row."""
    amax = tl.maximum(amax, 1e-12)
    return 448.0 / amax, amax / 448.0


@jit
def _store_scaled(x, factor, values, row, col, rows, C: tl.constexpr, INSIDE: tl.constexpr):
    """Stores float32 [ROWS, BLOCK] times factor; at most 448 and two roundings, which e4m3 rounds to 448: no clamp."""
    inside = (row < rows)[:, None] & ((col < C) | INSIDE)[None, :]
    tl.store(values + row[:, None] * C + col[None, :], (x * factor[:, None]).to(tl.float8e4nv), mask=inside)


@jit
def layer_norm_kernel(
    x, y, gamma, weight, bias, out, values, scale, rows, stride_x, stride_y, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (col < C)[None, :]
    h, _, _ = normed_rows(x, y, gamma, None, weight, bias, out, row, col, inside, stride_x, stride_y, eps, C)
    factor, row_scale = _scales(tl.max(tl.abs(h), 1))
    _store_scaled(h, factor, values, row, col, rows, C, False)
    tl.store(scale + row, row_scale, mask=row < rows)


@jit
def _activation(x, bias, row, col, rows, stride_x, C: tl.constexpr, INSIDE: tl.constexpr):
    """float32 [ROWS, BLOCK] of x, or of gelu(x + bias) where there is a bias; 0 in channels past C."""
    keep = (col < C) | INSIDE
    inside = (row < rows)[:, None] & keep[None, :]
    value = tl.load(x + row[:, None] * stride_x + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + col, mask=keep, other=0.0).to(tl.float32)[None, :]
        value = gelu(value, tl.float8e4nv)
    return value


@jit
def quantize_kernel(
    x, bias, values, scale, rows, stride_x, C: tl.constexpr, BLOCK_C: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Quantizes x, or gelu(x + bias) where there is a bias: the first BLOCK_C channels of a row, then the REST."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_C)
    value = _activation(x, bias, row, col, rows, stride_x, C, True)
    amax = tl.max(tl.abs(value), 1)
    if REST > 0:
        rest_col = BLOCK_C + tl.arange(0, REST)
        rest = _activation(x, bias, row, rest_col, rows, stride_x, C, C == BLOCK_C + REST)
        amax = tl.maximum(amax, tl.max(tl.abs(rest), 1))
    factor, row_scale = _scales(amax)
    _store_scaled(value, factor, values, row, col, rows, C, True)
    if REST > 0:
        _store_scaled(rest, factor, values, row, rest_col, rows, C, C == BLOCK_C + REST)
    tl.store(scale + row, row_scale, mask=row < rows)


QUANTIZE = {
    "default": [
        Launch(256, {"ROWS": 16, "num_warps": 4}),
        Launch(512, {"ROWS": 8, "num_warps": 4}),
        Launch(1024, {"ROWS": 4, "num_warps": 4}),
        Launch(2048, {"ROWS": 2, "num_warps": 4}),
        Launch(4096, {"ROWS": 1, "num_warps": 4}),
        Launch(16384, {"ROWS": 1, "num_warps": 16}),
    ]
}
"""By channels; ROWS a program. Not yet measured: a whole row in the registers of one program for its amax. 32 elements
a thread share the cost of sums and addresses (22 instructions an element with GELU, 25 with 16 elements). 48 registers
let 40 warps be resident, with 64 bytes a thread on their way."""
