"""The static model: machine code is followed rightly, and kernels with a plain limit come out at that limit."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys

import pytest
import torch

from bench.kernel_cases import OPERATIONS, draw_upstream, run_both
from bench.predict import DEVICES, Prediction, Work, limits, resident
from bench.predict_report import totals
from bench.records import Row, write_rows
from bench.sass import parse
from bench.sass_thread import Thread
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
    work, limit = found["sm_90 copy"].values()
    assert limit["limit"] == "bytes" and 90 <= limit["percent"] < 100
    assert work["bytes"] == 4 * VALUES and work["requested"] == 1 and work["widths"] == [128, 128]
    assert limit["us"] == pytest.approx(4 * VALUES / DEVICES["sm_90"].copy_gb_s / 1e3, rel=0.1)


def test_a_kernel_of_arithmetic_is_bound_by_issue(found):
    """200 multiply-adds for each of a thread's 16 values, and the time that they take to issue."""
    work, limit = found["sm_90 fmas"].values()
    expected = FMAS * BLOCK / 128
    assert work["executed"]["fma"] == pytest.approx(expected, rel=0.02)
    assert expected < work["executed"]["issue"] < 1.05 * expected
    assert limit["limit"] == "issue" and limit["percent"] < 25
    issued = VALUES * FMAS / 32 / (132 * 4 * DEVICES["sm_90"].clock_ghz * 1e3)
    assert issued < limit["us"] < 1.3 * issued


def test_narrow_loads_show_their_width(found):
    assert found["sm_90 narrow"]["work"]["widths"] == [16, 128]


@pytest.mark.parametrize("case", ["sm_80 loop 1", "sm_90 loop 1", "sm_100 loop 1", "sm_90 loop 3"])
def test_loops_count_as_often_as_they_run(found, case):
    """The bytes that all iterations load are the matrix, which the code alone does not tell."""
    work = found[case]["work"]
    assert work["unknown"] == 0 and work["programs"] == PROGRAMS
    assert work["load_bytes"] * 4 * PROGRAMS == pytest.approx(4 * VALUES, rel=0.05)
    assert work["bytes"] == 4 * VALUES + 4 * 512 * PROGRAMS


def test_loads_that_wait_for_each_other_are_bound_by_latency(found):
    """Asynchronous double buffering keeps more under way, so the same loop is bound by bytes."""
    plain, buffered = found["sm_90 loop 1"]["limits"], found["sm_90 loop 3"]["limits"]
    assert plain["limit"] == "latency" and buffered["limit"] == "bytes"
    assert plain["in_flight"] < plain["needed"] < buffered["in_flight"]


def test_few_programs_take_as_long_as_one(found):
    limit = found["sm_90 alone"]["limits"]
    assert limit["limit"] == "latency" and limit["waves"] < 0.05 and 1 < limit["us"] < 5


# ---------------------------------------------------------------- the thread


def follow(lines: list[str], parameters: bytes = b"", program: int = 0) -> Thread:
    """Runs a few lines of code; every one is 16 bytes long."""
    text = "\n".join(f"        /*{16 * i:04x}*/      {line} ;" for i, line in enumerate([*lines, "EXIT"]))
    thread = Thread(parse(text), (program,), (100,), parameters, "sm_90")
    thread.trace = thread.run()
    return thread


def test_a_division_is_followed():
    """Program 17 over 5 columns: the reciprocal in float32 and its correction, as compiled."""
    code = [
        "S2R R5, SR_CTAID.X", "MOV R11, c[0x0][0x210]", "I2F.RP R0, R11", "MUFU.RCP R0, R0",
        "IADD3 R2, R0, 0xffffffe, RZ", "F2I.FTZ.U32.TRUNC.NTZ R3, R2", "HFMA2.MMA R2, -RZ, RZ, 0, 0",
        "IADD3 R4, RZ, -R3, RZ", "IMAD R7, R4, R11, RZ", "IMAD.HI.U32 R4, R3, R7, R2", "IMAD.HI.U32 R2, R4, R5, RZ",
        "IADD3 R6, -R2, RZ, RZ", "IMAD R0, R11, R6, R5", "ISETP.GE.U32.AND P0, PT, R0, R11, PT",
        "@P0 IADD3 R0, R0, -R11, RZ", "@P0 IADD3 R2, R2, 0x1, RZ", "ISETP.GE.U32.AND P1, PT, R0, R11, PT",
        "@P1 IADD3 R2, R2, 0x1, RZ", "ISETP.NE.AND P2, PT, R2, RZ, PT", "@P2 EXIT",
    ]  # fmt: skip
    for columns in (1, 3, 5, 7, 17, 1000):
        for program in (0, 17, 99):
            thread = follow(code, struct.pack("<i", columns), program)
            assert thread.registers["R2"] == program // columns


@pytest.mark.parametrize("trips", [1, 2, 7])
def test_a_loop_ends_where_its_bound_says(trips):
    code = ["MOV R0, RZ", "IADD3 R0, R0, 0x8, RZ", "ISETP.GE.AND P0, PT, R0, c[0x0][0x210], PT", "@!P0 BRA 0x10"]
    thread = follow(code, struct.pack("<i", 8 * trips))
    assert len(thread.trace) == 1 + 3 * trips + 1 and not thread.unknown


def test_what_depends_on_memory_is_done_once_and_said():
    loaded = ["LDG.E R0, desc[UR4][R2.64]", "ISETP.NE.AND P0, PT, R0, RZ, PT"]
    skipping = follow([*loaded, "@P0 BRA 0x40", "FADD R1, R1, R1"])
    assert skipping.trace == [0, 1, 2, 3, 4] and skipping.unknown == {0x20}
    again = follow([*loaded, "@P0 BRA 0x0"])
    assert again.trace == [0, 1, 2, 3] and again.unknown == {0x20}
    slow = follow([*loaded, "@P0 BRA 0x40", "CALL.REL.NOINC 0x0"])  # the slow path of a division
    assert slow.trace == [0, 1, 2, 4]


def test_a_bound_in_a_uniform_predicate_is_followed():
    """A logical operation reads predicates; taken for results, they cut a loop short after one iteration."""
    code = [
        "UMOV UR9, URZ", "UIADD3 UR9, UR9, 0x1, URZ", "UISETP.GE.AND UP0, UPT, UR9, 0x5, UPT",
        "PLOP3.LUT P5, PT, PT, PT, UP0, 0x80, 0x0", "@!P5 BRA 0x10",
    ]  # fmt: skip
    thread = follow(code)
    assert len(thread.trace) == 1 + 4 * 5 + 1 and not thread.unknown


def test_comparisons_of_64_bits_take_both_halves():
    code = [
        "MOV R2, c[0x0][0x210]", "MOV R3, c[0x0][0x214]", "ISETP.GE.U32.AND P1, PT, R2, 0x5, PT",
        "ISETP.GE.AND.EX P0, PT, R3, RZ, PT, P1", "@P0 EXIT", "NOP",
    ]  # fmt: skip
    for value, taken in ((5, True), (4, False), (1 << 32, True), (-1, False), (-(1 << 40) + 7, False)):
        assert (len(follow(code, struct.pack("<q", value)).trace) == 5) == taken


def test_an_endless_loop_is_an_error(monkeypatch):
    monkeypatch.setattr("bench.sass_thread.LIMIT", 1000)
    with pytest.raises(RuntimeError, match="more than 1000 instructions"):
        follow(["BRA 0x0"])


# ---------------------------------------------------------------- limits and totals

WORK = Work(1320, 4, 64, 0, {"issue": 100, "alu": 50, "fma": 0, "imad": 0, "xu": 0, "fp64": 0, "lsu": 0}, 8.0, 2000.0,
            3_000_000, 1.0, 512.0, (128, 128), 0)  # fmt: skip


def test_occupancy_is_registers_shared_memory_and_threads():
    device = DEVICES["sm_90"]
    assert resident(WORK, device) == 8
    assert resident(Work(**vars(WORK) | {"registers": 32}), device) == 16
    assert resident(Work(**vars(WORK) | {"registers": 72}), device) == 7  # 28 warps of 2304 registers
    assert resident(Work(**vars(WORK) | {"shared": 40 << 10}), device) == 5
    assert resident(Work(**vars(WORK) | {"warps": 1, "registers": 16}), device) == 32


def test_a_last_wave_of_few_programs_costs_a_whole_one():
    device = DEVICES["sm_90"]
    long = Work(**vars(WORK) | {"programs": 132 * 8, "alone": 1e6})
    more = Work(**vars(long) | {"programs": 132 * 8 + 12})
    assert limits(long, device).limit == "latency"
    assert limits(more, device).us > 1.9 * limits(long, device).us


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


def test_totals_stand_beside_what_was_measured(tmp_path):
    label = "moments", "moments", "forward", "bfloat16", "128x577x1024"
    shape = (128, 577, 1024)
    lines = [
        Prediction(*label, kernel, "sm_90", WORK, limits(WORK, DEVICES["sm_90"]))
        for kernel in ("split", "merge")
    ]
    name = "NVIDIA H100 80GB HBM3"
    row = Row("moments", *label[2:], "ours", 60.0, 59.0, 61.0, 151_257_088, 1, 2950.0, name, "")
    write_rows(tmp_path / "h100" / "kernels.csv", [row])
    (total,) = totals([*lines, lines[0]._replace(limits=None, error="no")], tmp_path)
    assert total.us == pytest.approx(2 * lines[0].limits.us) and total.measured_us == 60.0
    assert total.percent == pytest.approx(100 * 2 * torch.Size(shape).numel() / total.us / 3e6)
    assert total.below == (total.percent < 85)
    assert totals(lines, tmp_path / "none")[0].measured_us is None
