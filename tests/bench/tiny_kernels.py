"""Kernels whose limits are plain from their source; prints what `bench.predict` finds in them, as JSON.

Run as a program without TRITON_INTERPRET, for pytest's own process has the interpreter on.
"""

from __future__ import annotations

import json

import torch

from bench.predict import limits, study
from dune_fast.kernels.launching import launch, recording
from dune_fast.kernels.library import jit, tl

VALUES = 1 << 26
BLOCK = 2048
FMAS = 200
PROGRAMS = 528


@jit
def copy(x, y, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at))


@jit
def polynomial(x, y, BLOCK: tl.constexpr, FMAS: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at).to(tl.float32)
    total = value
    for _ in tl.static_range(FMAS):
        total = total * value + 0.5
    tl.store(y + at, total.to(tl.bfloat16))


@jit
def column_sums(x, y, rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):
    """Every program goes over its share of the rows, which the compiler cannot know, ROWS at a time."""
    columns = tl.arange(0, COLUMNS)
    share = tl.cdiv(rows, tl.num_programs(0))
    first = tl.program_id(0) * share
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(first, min(first + share, rows), ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (columns < COLUMNS)[None, :]
        total += tl.load(x + row[:, None].to(tl.int64) * COLUMNS + columns[None, :], mask=inside, other=0.0)
    tl.store(y + tl.program_id(0) * COLUMNS + columns, tl.sum(total, 0))


def _launches() -> dict[str, tuple]:
    x = torch.empty(VALUES, dtype=torch.bfloat16, device="meta")
    matrix, sums = torch.empty(VALUES // 512, 512, device="meta"), torch.empty(PROGRAMS, 512, device="meta")
    grid = (VALUES // BLOCK,)
    return {
        "copy": (copy, grid, x, x.clone(), {"BLOCK": BLOCK}),
        "fmas": (polynomial, grid, x, x.clone(), {"BLOCK": BLOCK, "FMAS": FMAS}),
        "alone": (copy, (8,), x[: 8 * BLOCK], x[: 8 * BLOCK].clone(), {"BLOCK": BLOCK}),
        **{
            f"loop {stages}": (
                column_sums, (PROGRAMS,), matrix, sums, len(matrix), {"COLUMNS": 512, "ROWS": 4, "STAGES": stages},
            )
            for stages in (1, 3)
        },
    }  # fmt: skip


def main() -> None:
    with recording("sm_90") as launches:
        for kernel, grid, *arguments, options in _launches().values():
            launch(kernel, grid, *arguments, num_warps=4, **options)
        works = dict(zip(_launches(), map(study, launches), strict=True))
    found = {name: {"work": vars(work), "limits": limits(work)} for name, work in works.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
