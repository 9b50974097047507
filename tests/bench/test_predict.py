"""The static model: PTX is followed rightly, and kernels with a plain limit come out at that limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import ptx
from bench.kernel_cases import OPERATIONS, draw_upstream, run_both
from bench.predict import CLOCK_GHZ, COPY_GB_S, Work, limits, resident, totals
from dune_fast.kernels.launching import recording
from tests.bench.tiny_kernels import BLOCK, FMAS, PROGRAMS, VALUES


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    """What the model finds in the tiny kernels, compiled in a process without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.bench.tiny_kernels"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_copy_is_bound_by_bytes(found):
    work, limit = found["copy"].values()
    assert limit["limit"] == "bytes" and 90 <= limit["percent_of_copy"] < 100
    assert work["bytes"] == 4 * VALUES and work["requested"] == 1
    assert limit["us"] == pytest.approx(4 * VALUES / COPY_GB_S / 1e3, rel=0.1)


def test_a_kernel_of_arithmetic_is_bound_by_issue(found):
    """200 multiply-adds for each of a thread's 16 values, and the time that they take to issue."""
    work, limit = found["fmas"].values()
    expected = FMAS * BLOCK / 128
    assert work["executed"]["fma"] == pytest.approx(expected, rel=0.02)
    assert expected < work["executed"]["issue"] < 1.05 * expected
    assert limit["limit"] == "issue" and limit["percent_of_copy"] < 25
    issued = VALUES * FMAS / 32 / (132 * 4 * CLOCK_GHZ * 1e3)
    assert issued < limit["us"] < 1.3 * issued


@pytest.mark.parametrize("case", ["loop 1", "loop 3"])
def test_loops_count_as_often_as_they_run(found, case):
    """The bytes that all iterations load are the matrix, which the code alone does not tell."""
    work = found[case]["work"]
    assert work["unknown"] == 0 and work["programs"] == PROGRAMS
    assert work["bytes"] == 4 * VALUES + 4 * 512 * PROGRAMS
    assert work["requested"] == pytest.approx(1, rel=0.05)


def test_a_loop_waits_for_its_loads_unless_they_are_copied_ahead(found):
    """Each iteration waits 700 ns for memory; asynchronous double buffering keeps more under way."""
    plain, ahead = (found[f"loop {stages}"]["limits"]["us_latency"] for stages in (1, 3))
    iterations = VALUES / 512 / PROGRAMS / 4
    assert 0.7 * iterations < plain < 0.9 * iterations and ahead < 0.6 * plain


def test_few_programs_take_as_long_as_one(found):
    limit = found["alone"]["limits"]
    assert limit["limit"] == "latency" and limit["waves"] < 0.05 and 1 < limit["us"] < 5


def follow(*lines: str, argument: int = 0, program: int = 0):
    """Trace, addresses and unknown branches of a few lines of PTX whose first register is the argument."""
    code = "\n".join(["ld.param.b32 %r1, [k_param_0];", "mov.u32 %r2, %ctaid.x;", *lines, "ret;"])
    return ptx.Program(code).follow((program, 0, 0), (100, 1, 1), [argument])


@pytest.mark.parametrize("trips", [1, 2, 7])
def test_a_loop_ends_where_its_bound_says(trips):
    loop = "mov.b32 %r3, 0;", "$L_a:", "add.s32 %r3, %r3, 8;", "setp.lt.s32 %p1, %r3, %r1;", "@%p1 bra $L_a;"
    trace, _, unknown = follow(*loop, argument=8 * trips)
    assert len(trace) == 3 + 3 * trips + 1 and not unknown


@pytest.mark.parametrize(
    ("lines", "argument", "expected"),
    [
        (["div.s32 %r3, %r2, %r1;", "rem.s32 %r4, %r2, %r1;", "mad.lo.s32 %r5, %r3, 10, %r4;"], 5, 32),
        (["sub.s32 %r3, %r1, %r2;", "shr.s32 %r5, %r3, 1;"], 4, -7),
        (["sub.s32 %r3, %r1, %r2;", "shr.u32 %r5, %r3, 28;"], 4, 15),
        (["mul.hi.s32 %r5, %r1, %r2;"], 1 << 30, 4),
        (["mul.wide.s32 %rd1, %r1, %r2;", "cvt.u32.u64 %r5, %rd1;"], -1, -17),
        (["setp.gt.u32 %p1, %r1, %r2;", "setp.gt.s32 %p2, %r1, %r2;", "selp.b32 %r3, 10, 20, %p1;",
          "selp.b32 %r4, 1, 2, %p2;", "add.s32 %r5, %r3, %r4;"], -3, 12),
        (["bfe.u32 %r3, %r2, 4, 3;", "xor.b32 %r4, %r3, 0x6;", "not.b32 %r5, %r4;"], 0, -8),
        (["setp.lt.s32 %p1, %r1, 0;", "mov.b32 %r5, 3;", "@!%p1 min.s32 %r5, %r1, %r2;"], 9, 9),
        (["ld.global.b32 %r3, [%r9];", "mul.lo.s32 %r4, %r3, 0;", "add.s32 %r5, %r4, 6;"], 0, 6),
    ],
)  # fmt: skip
def test_integers_are_computed(lines, argument, expected):
    """In program 17; the result is the address of a load."""
    load = "cvt.s64.s32 %rd9, %r5;", "ld.global.b32 { %r6 }, [ %rd9 + 0 ];"
    trace, addresses, unknown = follow(*lines, *load, argument=argument, program=17)
    assert addresses[trace[-2]] == expected and not unknown


def test_what_depends_on_memory_is_done_once_and_said():
    loaded = "ld.global.b32 %r3, [%r1+4];", "setp.lt.s32 %p1, %r3, 5;"
    trace, addresses, unknown = follow(*loaded, "@%p1 bra $L_a;", "add.f32 %r4, %r4, %r4;", "$L_a:", argument=96)
    assert trace == [0, 1, 2, 3, 4, 5, 6] and unknown == {4} and addresses == {2: 100}
    trace, _, unknown = follow("$L_a:", *loaded, "@%p1 bra $L_a;")
    assert trace == [0, 1, 2, 3, 4, 5] and unknown == {4}


def test_an_endless_loop_is_an_error(monkeypatch):
    monkeypatch.setattr(ptx, "LIMIT", 1000)
    with pytest.raises(RuntimeError, match="more than 1000 instructions"):
        follow("$L_a:", "bra.uni $L_a;")


WORK = Work(1320, 4, 64, 0, {"issue": 100, "alu": 50, "fma": 0, "xu": 0, "fp64": 0, "lsu": 0}, 8.0, 2000.0,
            3_000_000, 1.0, 0)  # fmt: skip


def test_occupancy_is_registers_shared_memory_and_threads():
    changes = {8: {}, 16: {"registers": 32}, 7: {"registers": 72}, 5: {"shared": 40 << 10}}
    changes[32] = {"warps": 1, "registers": 16}
    for programs, change in changes.items():  # with 72 registers, 28 warps of 2304
        assert resident(Work(**vars(WORK) | change)) == programs


def test_a_last_wave_of_few_programs_costs_a_whole_one():
    long = Work(**vars(WORK) | {"programs": 132 * 8, "alone": 1e6})
    more = Work(**vars(long) | {"programs": 132 * 8 + 12})
    assert limits(long)["limit"] == "latency"
    assert limits(more)["us"] > 1.9 * limits(long)["us"]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_operation_records_its_launches_with_their_grid(operation):
    inputs = operation.make((2, 3, 28) if operation.on_images else (2, 5, 64), torch.bfloat16, torch.device("meta"))
    upstream = draw_upstream(operation, inputs)
    with recording("sm_90") as launches:
        operation.ours(*inputs)
        forward = len(launches)
        if upstream:
            run_both(operation.ours, inputs, upstream)
        assert forward and len(launches) > 2 * forward * bool(upstream)
        assert all(len(recorded.grid) and min(recorded.grid) > 0 for recorded in launches)


def test_launches_add_up_by_pass():
    us = limits(WORK)["us"]
    line = {"operation": "distill_loss", "dtype": "bfloat16", "shape": "128x577x1024", "error": ""} | limits(WORK)
    lines = [line | {"passes": passes} for passes in ("forward", "forward", "backward")]
    forward, backward, both = totals([*lines, line | {"passes": "forward", "error": "no"}])
    assert (forward[1], backward[1], both[1]) == ("forward", "backward", "forward+backward")
    assert (forward[4], both[4]) == pytest.approx((2 * us, 3 * us))
    assert both[5] == pytest.approx(100 * 10 * 128 * 577 * 1024 / both[4] / 3e6)
