"""Triton kernels of `kernels.layer_norm` and `kernels.residual`, their launch tables and launches.

    forward_kernel    x, y, gamma, ... -> x', h, mean, rstd    ROWS whole rows a program, in registers
    backward_kernel   dh, dx', x', y, ... -> dx, dy, sums      every program walks its share of the rows

Formulas and minimal bytes are in those files. A pointer that is None leaves its part of a kernel out at compile time;
without h and dh there is no norm. All arithmetic is float32. A program loads all that it needs before its first
reduction, so that it waits for memory once; the backward loads the next rows meanwhile. partials float32
[sums, programs, C]: dweight and dbias if there is a weight, dgamma if there is a y, the gradient of the branch's bias
if it has one; their sum over the programs, in a fixed order, is the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dune_fast.kernels.launching import Launch, choose, launch, processors
from dune_fast.kernels.library import contiguous, flat_rows, jit, tl, triton


@jit
def channels(parameter, col, C: tl.constexpr):
    """A parameter [C] as float32 [1, BLOCK_C]."""
    return tl.load(parameter + col, mask=col < C, other=0.0).to(tl.float32)[None, :]


@jit
def residual_rows(x, y, gamma, branch_bias, out, row, col, inside, stride_x, stride_y, C: tl.constexpr):
    """x' = x + gamma * (y + branch_bias), stored, and as it is then, float32 [ROWS, BLOCK_C]; x itself without y."""
    value = tl.load(x + row[:, None] * stride_x + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if y is not None:
        branch = tl.load(y + row[:, None] * stride_y + col[None, :], mask=inside, other=0.0).to(tl.float32)
        if branch_bias is not None:
            branch += channels(branch_bias, col, C)
        if gamma is not None:
            branch *= channels(gamma, col, C)
        stored = (value + branch).to(out.dtype.element_ty)
        tl.store(out + row[:, None] * C + col[None, :], stored, mask=inside)
        value = stored.to(tl.float32)
    return value


@jit
def normed_rows(
    x, y, gamma, branch_bias, weight, bias, out, row, col, inside, stride_x, stride_y, eps, C: tl.constexpr
):  # fmt: skip
    """LN(x') of `residual_rows`, float32 [ROWS, BLOCK_C] (0 in channels past C), with its mean and rstd [ROWS]."""
    if weight is not None:  # loads come before the reductions, which wait for them together
        w = channels(weight, col, C)
    if bias is not None:
        b = channels(bias, col, C)
    value = residual_rows(x, y, gamma, branch_bias, out, row, col, inside, stride_x, stride_y, C)
    mean = tl.sum(value, 1) / C
    # two passes over registers: E[x^2] - E[x]^2 would lose the variance of rows far from zero
    centred = tl.where(col[None, :] < C, value - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    h = centred * rstd[:, None]
    if weight is not None:
        h *= w
    if bias is not None:
        h += b
    return h, mean, rstd


@jit
def forward_kernel(
    x, y, gamma, branch_bias, weight, bias, out, h, mean, rstd, rows, stride_x, stride_y, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # 64 bits: rows * C passes 2^31
    col = tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (col < C)[None, :]
    if h is None:
        residual_rows(x, y, gamma, branch_bias, out, row, col, inside, stride_x, stride_y, C)
    else:
        normed, row_mean, row_rstd = normed_rows(
            x, y, gamma, branch_bias, weight, bias, out, row, col, inside, stride_x, stride_y, eps, C
        )
        tl.store(h + row[:, None] * C + col[None, :], normed.to(h.dtype.element_ty), mask=inside)
        tl.store(mean + row, row_mean, mask=row < rows)
        tl.store(rstd + row, row_rstd, mask=row < rows)


@jit
def backward_kernel(
    dh, dout, x, y, gamma, branch_bias, weight, mean, rstd, dx, dy, partials,
    rows, stride_dh, stride_dout, stride_x, stride_y,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    col = tl.arange(0, BLOCK_C)
    keep = col < C
    if weight is not None:
        w = channels(weight, col, C)
    if gamma is not None:
        scale = channels(gamma, col, C)
    dweight = tl.zeros([ROWS, BLOCK_C], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_C], tl.float32)
    dgamma = tl.zeros([ROWS, BLOCK_C], tl.float32)
    total = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in tl.range(program * ROWS, rows, programs * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        real = row < rows
        inside = real[:, None] & keep[None, :]
        to = row[:, None] * C + col[None, :]
        # all loads before the first reduction, which waits for them together
        if dh is not None:
            up = tl.load(dh + row[:, None] * stride_dh + col[None, :], mask=inside, other=0.0)
            value = tl.load(x + row[:, None] * stride_x + col[None, :], mask=inside, other=0.0)
            row_mean = tl.load(mean + row, mask=real, other=0.0)[:, None]
            row_rstd = tl.load(rstd + row, mask=real, other=0.0)[:, None]
        if dout is not None:
            past = tl.load(dout + row[:, None] * stride_dout + col[None, :], mask=inside, other=0.0)
        if y is not None:
            branch = tl.load(y + row[:, None] * stride_y + col[None, :], mask=inside, other=0.0)
        if dh is None:
            grad = past.to(tl.float32)
        else:
            up = up.to(tl.float32)
            normed = (value.to(tl.float32) - row_mean) * row_rstd
            if weight is not None:
                dweight += up * normed
                dbias += up
                up *= w
            # up is 0 in channels past C, so neither sum needs a mask
            along, mean_up = tl.split(tl.sum(tl.join(up * normed, up), 1) / C)
            grad = (up - mean_up[:, None] - normed * along[:, None]) * row_rstd
            if dout is not None:
                grad += past.to(tl.float32)
        if dx is not None:
            tl.store(dx + to, grad.to(dx.dtype.element_ty), mask=inside)
        if y is not None:
            dgamma += grad * branch.to(tl.float32)
        if branch_bias is not None:
            total += grad
        if dy is not None:
            if gamma is not None:
                grad *= scale
            tl.store(dy + to, grad.to(dy.dtype.element_ty), mask=inside)
    sums = partials + program * C + col  # partials [sum, program, C]
    if weight is not None:
        tl.store(sums, tl.sum(dweight, 0), mask=keep)
        tl.store(sums + programs * C, tl.sum(dbias, 0), mask=keep)
        sums += 2 * programs * C
    if y is not None:
        if branch_bias is not None:  # sum grad * (y + b) = sum grad * y + b * sum grad
            dgamma += total * channels(branch_bias, col, C)
        tl.store(sums, tl.sum(dgamma, 0), mask=keep)
        sums += programs * C
    if branch_bias is not None:
        if gamma is not None:
            total *= scale
        tl.store(sums, tl.sum(total, 0), mask=keep)


FORWARD = {
    "default": [
        Launch(512, {"ROWS": 8, "num_warps": 4}),
        Launch(1024, {"ROWS": 4, "num_warps": 4}),
        Launch(2048, {"ROWS": 2, "num_warps": 4}),
        Launch(4096, {"ROWS": 2, "num_warps": 8}),
    ],
    "interpreter": [Launch(4096, {"ROWS": 8, "num_warps": 4})],
}
"""By channels; ROWS a program. Not yet measured: 32 elements a thread, so that four rows share a load of each parameter
and the barriers (by `bench.kernels --aot sm_90 --predict` with one row a program loads of parameters bind: 57 % of a
copy at 768). The interpreter's cost is per program and iteration."""
BACKWARD = {
    "default": [
        Launch(256, {"ROWS": 4, "STAGES": 3, "num_warps": 4, "per_processor": 4, "maxnreg": 128}),
        Launch(512, {"ROWS": 2, "STAGES": 3, "num_warps": 4, "per_processor": 4, "maxnreg": 128}),
        Launch(1024, {"ROWS": 1, "STAGES": 3, "num_warps": 4, "per_processor": 4, "maxnreg": 128}),
        Launch(2048, {"ROWS": 1, "STAGES": 3, "num_warps": 8, "per_processor": 2, "maxnreg": 128}),
        Launch(4096, {"ROWS": 1, "STAGES": 3, "num_warps": 16, "per_processor": 1, "maxnreg": 128}),
    ],
    "interpreter": [Launch(4096, {"ROWS": 4, "STAGES": 1, "num_warps": 4, "per_processor": 2, "maxnreg": 64})],
}
"""By channels; ROWS an iteration, how many of them are in shared memory or on the way there, how many programs share a
multiprocessor (which the shared memory of an A100 allows too), and the registers that this leaves. Not yet measured: 8
elements a thread keep four sums in about 100 registers. Two stages are copied ahead of the one in use (with one ahead
the wait for memory binds: 71 % of a copy at 768)."""


def forward_options(x: Tensor) -> dict[str, int]:
    """Constants and warps of a forward kernel over rows x [rows, C]."""
    channels = x.shape[1]
    return choose(FORWARD, x.device, channels) | {"C": channels, "BLOCK_C": triton.next_power_of_2(channels)}


def launch_forward(x, y, gamma, branch_bias, weight, bias, out, h, mean, rstd, eps):
    """`forward_kernel` on inputs [..., C]; out, h, mean and rstd are contiguous."""
    x, y = flat_rows(x), None if y is None else flat_rows(y)
    parameters = contiguous(gamma, branch_bias, weight, bias)
    options = forward_options(x)
    launch(
        forward_kernel, (triton.cdiv(len(x), options["ROWS"]),), x, y, *parameters, out, h, mean, rstd,
        len(x), x.stride(0), 0 if y is None else y.stride(0), eps, **options,
    )  # fmt: skip


def launch_backward(dh, dout, x, y, gamma, branch_bias, weight, mean, rstd, dx, dy):
    """`backward_kernel` on inputs [..., C]; the sums over rows, float32 [sums, C], see the head of this file."""
    inputs = [None if t is None else flat_rows(t) for t in (dh, dout, x, y)]
    some = next(t for t in inputs if t is not None)
    rows, channels = some.shape
    options = choose(BACKWARD, some.device, channels)
    if torch.version.hip:  # the limit is one of NVIDIA's compiler
        del options["maxnreg"]
    programs = min(triton.cdiv(rows, options["ROWS"]), options.pop("per_processor") * processors(some.device))
    sums = 2 * (weight is not None) + (y is not None) + (branch_bias is not None)
    partials = some.new_empty(sums, programs, channels, dtype=torch.float32)
    launch(
        backward_kernel, (programs,), *inputs, *contiguous(gamma, branch_bias, weight), mean, rstd, dx, dy, partials,
        rows, *(0 if t is None else t.stride(0) for t in inputs),
        C=channels, BLOCK_C=triton.next_power_of_2(channels), **options,
    )  # fmt: skip
    return partials.sum(1)
