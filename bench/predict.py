"""Predicts how long kernels take on an H100 that is not there: `python -m bench.kernels --aot sm_90 --predict`.

Every launch of an operation of `bench.kernel_cases` is recorded with its grid and arguments and compiled, and one
thread of a few of its programs is followed through the PTX (`bench.ptx`). That gives instructions by kind and the bytes
that go to each argument; an argument's traffic with memory is what is executed, but no more than its size, for what is
read again comes from a cache. The limits of the time:

    bytes     traffic / bandwidth of a copy
    issue     instructions of all warps / (4 schedulers * ISSUE_SHARE)
    alu, fma, xu, fp64, lsu     the same by execution unit; xu is special functions and most conversions
    latency   waves of programs * the time of one that has the multiprocessor to itself: each instruction waits for its
              operands, a load for memory (or the L2 cache, where its argument is small)

plus one memory latency to fill and one to drain; the last wave counts with the programs it has. Where limits are close
they slow each other: of bytes, the busiest unit and latency the time is the norm with exponent SHARPNESS, not the
maximum.

PTX is not yet machine code: `cost` says what becomes of an instruction. For sm_90 the sums are within 15 % of the
machine code's instructions (24 % in one kernel), and the times of the feature kernels within 4 % of those that a model
of the machine code gave (15 % in one). Not modelled: bank conflicts, sectors that are read in part, threads that do
uneven work, what torch launches in between. What depends on data (whether an image is blurred) counts as done.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from bench.aot import check_targets, compile_source, resources, run_all, specialize
from bench.kernel_cases import OPERATIONS, Shape, draw_upstream, moved_bytes, run_both, select
from bench.ptx import Instruction, Program
from bench.records import write_csv
from dune_fast.kernels.launching import Recorded, recording

TARGET = "sm_90"
ISSUE_SHARE = 0.9
"""Of its issue slots that a scheduler with enough warps fills; the rest goes to branches and instruction fetches."""
SHARPNESS = 4.0
"""An assumption until measured: two equal limits take 19 % longer than one, a limit at half of another 2 %."""
MEMORY_NS, CACHE_NS = 700.0, 250.0
"""From a load to its value, under load: from memory, and from the L2 cache for arguments below SMALL bytes."""
LONG = 20_000
"""Instructions of a thread after which one program stands for all."""
SMALL = 4 << 20
CYCLES = {"xu": 20, "lsu": 30, "fp64": 12, "": 0}
"""From an instruction to its result where nothing waits; others take 5."""


PROCESSORS, CLOCK_GHZ, COPY_GB_S, SHARED = 132, 1.83, 3000.0, 228 << 10
"""Multiprocessors; the clock that the published dense bf16 rate implies; read and written by a large copy, 90 % of the
published peak (3350) until measured; bytes of shared memory of a multiprocessor."""
REGISTERS, WARPS, PROGRAMS = 65536, 64, 32
"""A multiprocessor's."""
LANES = {"fma": 128, "alu": 64, "xu": 16, "fp64": 64, "lsu": 32}
"""Results a clock and multiprocessor, by execution unit. From NVIDIA's data sheet and white paper, and the CUDA C++
Programming Guide, "Compute Capabilities" and "Arithmetic Instructions"."""
_FLOAT = ("f32", "f16", "bf16", "f32x2", "f16x2", "bf16x2", "e4m3x2")
_MOVES = ("ld", "st", "cp")
_SPECIAL = ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh")
_ONE_UNIT = {"shfl": "lsu", "atom": "lsu", "red": "lsu", "bra": "issue", "bar": "issue", "ret": "issue"}


def cost(instruction: Instruction) -> tuple[str, int]:
    """The execution unit that it occupies and how many machine instructions become of it; ("", 0) for none.

    "issue" takes an issue slot alone. Copies between registers, signs and conversions between integers are folded into
    others.
    """
    name, kind = instruction.op[0], instruction.op[-1]
    if name in _ONE_UNIT or name in _SPECIAL:
        return _ONE_UNIT.get(name, "xu"), 1
    if name in _MOVES:
        return ("", 0) if instruction.op[1] == "param" else ("lsu" if len(instruction.operands) > 1 else "issue", 1)
    if name == "mov":  # packing two halves into a register is one
        return ("alu", 1) if any(operand[0] == "{" for operand in instruction.operands[1:]) else ("", 0)
    if "f64" in instruction.op:
        return "fp64", 1
    if name == "cvt":
        floats = [part in _FLOAT for part in instruction.op[-2:]]
        return ("alu", 1) if all(floats) else ("xu", 1) if any(floats) else ("", 0)
    if kind in _FLOAT:
        if name in ("neg", "abs"):
            return "", 0
        if name in ("fma", "add", "sub", "mul", "div"):
            return "fma", 8 if name == "div" else 1
    return "alu", 20 if name == "div" else 2 if kind.endswith("64") else 1


# ---------------------------------------------------------------- one launch


@dataclass(frozen=True)
class Work:
    """What the warps of a launch do."""

    programs: int
    warps: int
    """A program's."""
    registers: int
    shared: int
    executed: Counter[str]
    """Unit -> instructions of one warp, the mean over programs; "issue" counts all."""
    wavefronts: float
    """Clocks of one warp's loads and stores: 128 bytes each."""
    alone: float
    """Clocks of a program that has the multiprocessor to itself."""
    bytes: int
    """Between memory and multiprocessors, all programs."""
    requested: float
    """Bytes of all global loads and stores as executed, over `bytes`: about 1, or a cache serves the rest."""
    unknown: int
    """Branches that depend on data."""


def resident(work: Work) -> int:
    """Programs that share a multiprocessor; each takes 1 KiB of shared memory more than it asks for."""
    per_warp = -(-work.registers * 32 // 256) * 256
    warps = min(WARPS, REGISTERS // 4 // per_warp * 4)  # each of the four schedulers has a quarter
    return max(1, min(PROGRAMS, warps // work.warps, SHARED // (work.shared + 1024)))


def limits(work: Work) -> dict[str, float | str]:
    """Microseconds of one launch, "us", by what would set them, "us_bytes" and so on, and which does, "limit".

    "percent_of_copy" is of a copy of the same bytes; "occupancy" the share of the warps that a multiprocessor can hold.
    """
    slots = resident(work)
    clock, width = CLOCK_GHZ * 1e3, PROCESSORS * slots  # clocks a microsecond

    def busy(programs: float) -> dict[str, float]:
        """Microseconds of a wave with so many programs, by limit; the fullest multiprocessor counts."""
        warps = work.warps * math.ceil(programs / PROCESSORS)
        times = {"bytes": work.bytes * programs / work.programs / COPY_GB_S / 1e3}
        times["issue"] = warps * work.executed["issue"] / 4 / ISSUE_SHARE / clock
        for name, lanes in LANES.items():
            times[name] = warps * work.executed[name] * 32 / lanes / clock
        times["lsu"] = max(times["lsu"], warps * work.wavefronts / clock)
        return times | {"latency": work.alone / clock}

    full, rest = divmod(work.programs, width)
    waves = [(full, busy(width)), (1 if rest else 0, busy(rest))]
    total = sum(count * _together(times) for count, times in waves if count) + 2 * MEMORY_NS / 1e3
    by = {name: sum(count * times[name] for count, times in waves) for name in waves[0][1]}
    found: dict[str, float | str] = {"occupancy": slots * work.warps / WARPS, "waves": work.programs / width}
    found |= {f"us_{name}": us for name, us in by.items()}
    return found | {"us": total, "percent_of_copy": 100 * by["bytes"] / total, "limit": max(by, key=by.get)}


def _together(times: dict[str, float]) -> float:
    """How long a wave takes that has these limits."""
    units = max(value for name, value in times.items() if name not in ("bytes", "latency"))
    return sum(value**SHARPNESS for value in (times["bytes"], units, times["latency"])) ** (1 / SHARPNESS)


def _samples(programs: int) -> list[int]:
    """Programs to follow, evenly spread."""
    count = min(programs, 5)
    return [programs * (2 * i + 1) // (2 * count) for i in range(count)]


def study(recorded: Recorded) -> Work:
    """Compiles a recorded launch and follows it."""
    source = specialize(recorded)
    compiled = compile_source(recorded.kernel, source, TARGET)
    used, program = resources(compiled), Program(compiled.asm["ptx"])
    named = dict(zip((p.name for p in recorded.kernel.params), recorded.args, strict=False)) | recorded.options
    given = [named[name] for name, kind in source.signature.items() if kind != "constexpr"]
    sizes = [x.numel() * x.element_size() if isinstance(x, torch.Tensor) else 0 for x in given]
    # argument i begins at address (i + 1) << 40; no branch depends on floating-point numbers
    arguments = [i << 40 if isinstance(x, torch.Tensor) else x for i, x in enumerate(given, 1)]
    arguments = [None if isinstance(x, float) else x for x in arguments]
    grid = (*recorded.grid, 1, 1)[:3]
    programs, warps = math.prod(grid), used["threads"] // 32
    traces, owner, unknown = [], {}, set()
    for index in _samples(programs):
        if traces and len(traces[0]) > LONG:
            break  # a program that runs long does what all of them do
        place = index % grid[0], index // grid[0] % grid[1], index // grid[0] // grid[1]
        trace, addresses, branches = program.follow(place, grid, arguments)
        traces.append(trace)
        owner |= {i: (address >> 40) - 1 for i, address in addresses.items()}
        unknown |= branches
    executed: Counter[str] = Counter()
    moved: Counter[tuple[int, bool]] = Counter()
    wavefronts = 0.0
    for i, count in Counter(chain(*traces)).items():
        instruction, count = program.code[i], count / len(traces)
        unit, times = cost(instruction)
        executed["issue"] += count * times
        executed[unit] += count * times * (unit != "issue")
        if unit == "lsu":
            wavefronts += count * (max(1.0, instruction.bits * 4 / 128) if instruction.op[0] in _MOVES else 1.0)
        if instruction.is_global:
            moved[owner.get(i, -1), instruction.op[0] == "st"] += count * instruction.bits * 4 * warps * programs
    traffic = sum(min(n, sizes[i]) if 0 <= i < len(sizes) else n for (i, _), n in moved.items())
    alone = sum(lone_time(program.code, trace, owner, sizes) for trace in traces) / len(traces)
    return Work(
        programs, warps, used["registers"], used["shared"], executed, wavefronts, alone, round(traffic),
        sum(moved.values()) / max(1.0, traffic), len(unknown),
    )  # fmt: skip


def lone_time(
    code: Sequence[Instruction], trace: Sequence[int], owner: dict[int, int], sizes: Sequence[int]
) -> float:
    """Clocks from a warp's first instruction to its last result, in order, each waiting for its operands.

    The compiler moves loads from global memory up, to where their addresses are known, but past no branch.
    """
    memory, cache = (ns * CLOCK_GHZ for ns in (MEMORY_NS, CACHE_NS))
    facts = {}
    for i in set(trace):
        unit, times = cost(code[i])
        latency = CYCLES.get(unit, 5)
        if code[i].is_global and code[i].op[0] != "st":
            of = owner.get(i, -1)
            latency = cache if 0 <= of < len(sizes) and sizes[of] < SMALL else memory
        facts[i] = code[i], times, latency
    now, end, branched = 0.0, 0.0, 0.0
    ready: dict[str, float] = {}
    group, groups = 0.0, []  # asynchronous copies: the open group's end, and the closed ones'
    for i in trace:
        instruction, times, latency = facts[i]
        operands = max([branched, *(ready[name] for name in instruction.reads if name in ready)])
        if instruction.op[:2] == ("ld", "global"):
            now += times
            ready |= dict.fromkeys(instruction.writes, operands + latency)
            continue
        now = max(now + times, operands)
        if instruction.op[0] == "bra":
            branched = now
        elif instruction.op[0] == "cp":
            if len(instruction.operands) > 1:
                group = max(group, now + latency)
            elif instruction.op[2] == "commit_group":
                groups.append(group)
            elif len(groups) > (left := int(instruction.operands[0])):
                now = max(now, groups[len(groups) - left - 1])
        for name in instruction.writes:
            ready[name] = now + latency
        end = max(end, now + latency if instruction.writes else now)
    return end


# ---------------------------------------------------------------- operations


def predict_case(name: str, shape: Shape, dtype: torch.dtype) -> list[dict]:
    """A line for every launch of an operation, forward and backward: what it is, `Work`, `limits`, "error"."""
    (operation,) = [operation for operation in select(name) if operation.name == name]
    inputs = operation.make(shape, dtype, torch.device("meta"))
    upstream = draw_upstream(operation, inputs)
    with recording(TARGET) as launches:
        operation.ours(*inputs)
        forward = len(launches)
        if upstream:
            launches.clear()
            run_both(operation.ours, inputs, upstream)
        launches = list(launches)
    lines = []
    for i, recorded in enumerate(launches):
        line = {"target": TARGET, "operation": name, "passes": "forward" if i < forward else "backward"}
        line |= {"dtype": str(dtype)[6:], "shape": "x".join(map(str, shape)), "kernel": recorded.kernel.__name__}
        try:
            work = study(recorded)
            about = {field: getattr(work, field) for field in ("programs", "warps", "registers", "shared", "bytes")}
            about |= {"read_again": work.requested, "instructions_a_warp": round(work.executed["issue"])}
            lines.append(line | {"error": ""} | about | limits(work))
        except Exception as error:  # one that does not compile is a line of the report, the others still count
            text = (str(error).strip() or repr(error)).splitlines()[-1]
            lines.append(line | {"error": f"{type(error).__name__}: {text}"})
    return lines


def predict_all(tasks: Sequence[tuple[str, Shape, torch.dtype]]) -> list[dict]:
    """`predict_case` of every (operation, shape, dtype), on all processors; ValueError without triton's compiler."""
    check_targets([TARGET])
    return run_all(predict_case, tasks)


def totals(lines: Sequence[dict]) -> Iterator[tuple[str, str, str, str, float, float, str]]:
    """(operation, passes, dtype, shape, us, percent of a copy of the minimal bytes, what limits the longest launch)."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for line in lines:
        if not line["error"]:
            groups.setdefault((line["operation"], line["dtype"], line["shape"]), []).append(line)
    for (name, dtype, shape), found in groups.items():
        (operation,) = [operation for operation in OPERATIONS if operation.name == name]
        case = operation, tuple(map(int, shape.split("x"))), getattr(torch, dtype)
        forward, both = (moved_bytes(*case, backward) for backward in (False, True))
        for passes, size in (("forward", forward), ("backward", both - forward), ("forward+backward", both)):
            part = [line for line in found if line["passes"] in passes]
            if part and size and (passes == "forward" or both > forward):
                us, longest = sum(line["us"] for line in part), max(part, key=lambda line: line["us"])
                yield name, passes, dtype, shape, us, 100 * size / us / 1e3 / COPY_GB_S, longest["limit"]


def write_predictions(path: Path, lines: Sequence[dict]) -> None:
    """Everything that is known of each launch, as a CSV."""
    header = max(map(list, lines), key=len)  # a line with an error lacks the numbers
    values = ((line.get(name, "") for name in header) for line in lines)
    write_csv(path, header, [[f"{v:.3f}" if isinstance(v, float) else v for v in line] for line in values])
