"""Triton kernels of `kernels.layer_norm`, and their launch tables; formulas and minimal bytes are there.

    forward_kernel    x, y, gamma, weight, bias -> x', h, mean, rstd    ROWS whole rows a program, in registers
    backward_kernel   dh, dx', x', y, ...       -> dx, dy, partials     every program walks its share of the rows

The two functions before them serve the float8 forms too. A pointer that is None leaves its part of a kernel out at
compile time. All arithmetic is float32. partials float32 [sums, programs, C]: dweight and dbias if there is a weight,
then dgamma if there is a y; their sum over the programs, in a fixed order, is the gradient.
"""

from __future__ import annotations

from kernels.launching import Launch
from kernels.library import jit, tl


@jit
def residual_rows(x, y, gamma, row, col, inside, stride_x, stride_y, C: tl.constexpr):
    """x + gamma * y of some rows, float32 [ROWS, BLOCK_C]; y or gamma may be None."""
    value = tl.load(x + row[:, None] * stride_x + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if y is not None:
        branch = tl.load(y + row[:, None] * stride_y + col[None, :], mask=inside, other=0.0).to(tl.float32)
        if gamma is not None:
            branch *= tl.load(gamma + col, mask=col < C, other=0.0).to(tl.float32)[None, :]
        value += branch
    return value


@jit
def normalize_rows(value, weight, bias, col, eps, C: tl.constexpr):
    """LN of float32 [ROWS, BLOCK_C] (0 in channels past C), with its mean and rstd [ROWS]."""
    mean = tl.sum(value, 1) / C
    # two passes over registers: E[x^2] - E[x]^2 would lose the variance of rows far from zero
    centred = tl.where(col[None, :] < C, value - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    h = centred * rstd[:, None]
    if weight is not None:
        h *= tl.load(weight + col, mask=col < C, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        h += tl.load(bias + col, mask=col < C, other=0.0).to(tl.float32)[None, :]
    return h, mean, rstd


@jit
def forward_kernel(
    x, y, gamma, weight, bias, out, h, mean, rstd, rows, stride_x, stride_y, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # 64 bits: rows * C passes 2^31
    col = tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (col < C)[None, :]
    value = residual_rows(x, y, gamma, row, col, inside, stride_x, stride_y, C)
    to = row[:, None] * C + col[None, :]
    if y is not None:
        stored = value.to(out.dtype.element_ty)
        tl.store(out + to, stored, mask=inside)
        value = stored.to(tl.float32)
    normed, row_mean, row_rstd = normalize_rows(value, weight, bias, col, eps, C)
    tl.store(h + to, normed.to(h.dtype.element_ty), mask=inside)
    tl.store(mean + row, row_mean, mask=row < rows)
    tl.store(rstd + row, row_rstd, mask=row < rows)


@jit
def backward_kernel(
    dh, dout, x, y, gamma, weight, mean, rstd, dx, dy, partials, rows, stride_dh, stride_dout, stride_x, stride_y,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    col = tl.arange(0, BLOCK_C)
    keep = col < C
    if weight is not None:
        w = tl.load(weight + col, mask=keep, other=0.0).to(tl.float32)[None, :]
    if gamma is not None:
        scale = tl.load(gamma + col, mask=keep, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([ROWS, BLOCK_C], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_C], tl.float32)
    dgamma = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in range(program * ROWS, rows, programs * ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        real = row < rows
        inside = real[:, None] & keep[None, :]
        to = row[:, None] * C + col[None, :]
        up = tl.load(dh + row[:, None] * stride_dh + col[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + row[:, None] * stride_x + col[None, :], mask=inside, other=0.0).to(tl.float32)
        row_rstd = tl.load(rstd + row, mask=real, other=0.0)[:, None]
        normed = (value - tl.load(mean + row, mask=real, other=0.0)[:, None]) * row_rstd
        if weight is not None:
            dweight += up * normed
            dbias += up
            up *= w
        # up is 0 in channels past C, so neither sum needs a mask
        along = tl.sum(up * normed, 1)[:, None] / C
        grad = (up - tl.sum(up, 1)[:, None] / C - normed * along) * row_rstd
        if dout is not None:
            grad += tl.load(dout + row[:, None] * stride_dout + col[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + to, grad.to(dx.dtype.element_ty), mask=inside)
        if y is not None:
            branch = tl.load(y + row[:, None] * stride_y + col[None, :], mask=inside, other=0.0).to(tl.float32)
            dgamma += grad * branch
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
        tl.store(sums, tl.sum(dgamma, 0), mask=keep)


_FORWARD = "not yet measured: 16 elements a thread, 2 to 4 loads of 16 bytes of each tensor; 40 to 56 registers"
_BACKWARD = "not yet measured: 8 elements a thread keep three sums in registers, 96 of which let 5 programs be resident"

FORWARD = {
    "default": [
        Launch(256, {"ROWS": 8, "num_warps": 4}, _FORWARD),
        Launch(512, {"ROWS": 4, "num_warps": 4}, _FORWARD),
        Launch(1024, {"ROWS": 2, "num_warps": 4}, _FORWARD),
        Launch(2048, {"ROWS": 1, "num_warps": 4}, _FORWARD),
        Launch(4096, {"ROWS": 1, "num_warps": 8}, _FORWARD),
    ]
}
"""By channels; ROWS a program."""
BACKWARD = {
    "default": [
        Launch(256, {"ROWS": 4, "num_warps": 4, "per_processor": 5, "maxnreg": 96}, _BACKWARD),
        Launch(512, {"ROWS": 2, "num_warps": 4, "per_processor": 5, "maxnreg": 96}, _BACKWARD),
        Launch(1024, {"ROWS": 1, "num_warps": 4, "per_processor": 5, "maxnreg": 96}, _BACKWARD),
        Launch(2048, {"ROWS": 1, "num_warps": 8, "per_processor": 2, "maxnreg": 128}, _BACKWARD),
        Launch(4096, {"ROWS": 1, "num_warps": 16, "per_processor": 1, "maxnreg": 128}, _BACKWARD),
    ]
}
"""By channels; ROWS an iteration, how many programs share a multiprocessor, and the registers that this allows."""
