"""Predicts how long kernels take on a GPU that is not there, from their machine code: `--aot TARGET --predict`.

Every launch of an operation of `bench.kernel_cases` is recorded with its grid and arguments, compiled, and one thread
of a few of its programs is followed through the machine code (`bench.sass`), so that loops count as often as they run.
That gives instructions by kind and the bytes that go to each argument; an argument's traffic with memory is what is
executed, but no more than its size, for what is read again comes from a cache. The limits of the time:

    bytes     traffic / bandwidth of a copy
    issue     instructions of all warps / (4 schedulers * ISSUE_SHARE)
    alu, fma, xu, fp64, lsu     the same by execution unit; xu is special functions and most conversions
    latency   waves of programs * the time of one that has the multiprocessor to itself: each instruction waits for its
              operands, a load for memory (or the L2 cache, where its argument is small)

plus one memory latency to fill and one to drain; the last wave counts with the programs it has. Where limits are close
they slow each other: of bytes, the busiest unit and latency the time is the norm with exponent SHARPNESS, not the
maximum. Not modelled: bank conflicts, sectors that are read in part, threads that do uneven work, what torch launches
in between. What depends on data (whether an image is blurred) counts as done.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch

from bench.aot import Source, check_targets, compile_source, cuobjdump, resources, run_all, specialize
from bench.kernel_cases import Shape, draw_upstream, run_both, select
from bench.sass import GLOBAL, Instruction, parse
from bench.sass_thread import Thread
from dune_fast.kernels.launching import Recorded, recording

ISSUE_SHARE = 0.9
"""Of its issue slots that a scheduler with enough warps fills; the rest goes to branches and instruction fetches."""
SHARPNESS = 4.0
"""An assumption until measured: two equal limits take 19 % longer than one, a limit at half of another 2 %."""
MEMORY_NS, CACHE_NS = 700.0, 250.0
"""From a load to its value, under load: from memory, and from the L2 cache for arguments below SMALL bytes."""
LONG = 20_000
"""Instructions of a thread after which one program stands for all."""
SMALL = 4 << 20
CYCLES = {"xu": 20, "lsu": 30, "fp64": 12}
"""From an instruction to its result where nothing waits; others take 5."""


class Device(NamedTuple):
    """What the model needs to know of a GPU."""

    name: str
    """As it begins in the names that CUDA gives."""
    processors: int
    clock_ghz: float
    """That its published dense bf16 rate implies."""
    copy_gb_s: float
    """Read and written by a large copy: 90 % of the published peak, until measured."""
    shared: int
    """Bytes a multiprocessor; a program takes 1 KiB more than it asks for."""
    lanes: dict[str, int]
    """Results a clock and multiprocessor, by execution unit."""


def _lanes(fma: int, fp64: int) -> dict[str, int]:
    return {"fma": fma, "imad": 64, "alu": 64, "xu": 16, "fp64": fp64, "lsu": 32}


DEVICES = {
    "sm_80": Device("NVIDIA A100", 108, 1.41, 1835.0, 164 << 10, _lanes(64, 32)),
    "sm_90": Device("NVIDIA H100", 132, 1.83, 3000.0, 228 << 10, _lanes(128, 64)),
    "sm_100": Device("NVIDIA B200", 148, 1.85, 7200.0, 228 << 10, _lanes(128, 64)),
}
"""A100 SXM 80 GB, H100 SXM, B200. Multiprocessors, rates and peaks (2039, 3350, 8000 GB/s): NVIDIA's data sheets and
architecture white papers; shared memory, registers and lanes: CUDA C++ Programming Guide, "Compute Capabilities" and
"Arithmetic Instructions"."""
REGISTERS, WARPS, PROGRAMS = 65536, 64, 32
"""A multiprocessor's, of all three."""

_ALU = {
    "FMNMX", "FSEL", "FSETP", "FSET", "SEL", "LOP3", "PLOP3", "SHF", "PRMT", "ISETP", "IADD3", "IADD", "VIADD", "LEA",
    "VIMNMX", "VIMNMX3", "IMNMX", "VIADDMNMX", "IABS", "SGXT", "MOV", "F2FP", "FMNMX3", "BMSK", "VABSDIFF", "FCHK",
    "I2FP", "P2R", "R2P", "LOP", "CS2R",
}  # fmt: skip
_XU = {"MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV", "I2I"}
_FMA = {"FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2", "FSWZADD", "FFMA2", "FMUL2", "FADD2"}
_PAIRED = {"FFMA2", "FMUL2", "FADD2"}
"""Blackwell's, which do the work of two."""
_LSU = {"LDG", "STG", "LDS", "STS", "LDSM", "STSM", "SHFL", "LDGSTS", "ATOMG", "ATOMS", "RED", "LDL", "STL", "LDC"}


def unit(instruction: Instruction) -> str:
    """Which execution unit an instruction occupies; "" for those that only take an issue slot."""
    op = instruction.op
    if op in _ALU:
        return "alu"
    if op in _FMA:
        return "fma"
    if op == "IMAD":
        return "imad"
    if op in _LSU:
        return "lsu"
    if op in _XU:
        return "xu"
    return "fp64" if op.startswith("D") and op != "DEPBAR" else ""


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
    load_bytes: float
    """Of one warp."""
    widths: tuple[int, int]
    """Bits a thread of most bytes loaded and stored."""
    unknown: int
    """Branches that depend on data."""
    unknown_loops: int = 0
    """Those of them that would repeat something, which counted once."""


class Limits(NamedTuple):
    """Predicted microseconds of one launch, by what would set them."""

    us: float
    percent: float
    """Of a copy of the same bytes."""
    limit: str
    by: dict[str, float]
    occupancy: float
    """Share of the warps that a multiprocessor can hold."""
    waves: float
    in_flight: float
    """Bytes that a multiprocessor's warps would have under way if memory kept up."""
    needed: float
    """Bytes under way that the copy's bandwidth takes: Little's law, for the share that is loaded."""


def resident(work: Work, device: Device) -> int:
    """Programs that share a multiprocessor."""
    per_warp = -(-work.registers * 32 // 256) * 256
    warps = min(WARPS, REGISTERS // 4 // per_warp * 4)  # each of the four schedulers has a quarter
    return max(1, min(PROGRAMS, warps // work.warps, device.shared // (work.shared + 1024)))


def limits(work: Work, device: Device) -> Limits:
    """What bounds a launch, and for how long."""
    slots = resident(work, device)
    clock, width = device.clock_ghz * 1e3, device.processors * slots  # clocks a microsecond

    def busy(programs: float) -> dict[str, float]:
        """Microseconds of a wave with so many programs, by limit; the fullest multiprocessor counts."""
        warps = work.warps * math.ceil(programs / device.processors)
        times = {"bytes": work.bytes * programs / work.programs / device.copy_gb_s / 1e3}
        times["issue"] = warps * work.executed["issue"] / 4 / ISSUE_SHARE / clock
        for name, lanes in device.lanes.items():
            times[name] = warps * work.executed[name] * 32 / lanes / clock
        times["lsu"] = max(times["lsu"], warps * work.wavefronts / clock)
        return times | {"latency": work.alone / clock}

    full, rest = divmod(work.programs, width)
    waves = [(full, busy(width)), (1 if rest else 0, busy(rest))]
    total = sum(count * _together(times) for count, times in waves if count) + 2 * MEMORY_NS / 1e3
    by = {name: sum(count * times[name] for count, times in waves) for name in waves[0][1]}
    in_flight = min(work.programs / device.processors, slots) * work.warps * work.load_bytes
    in_flight *= MEMORY_NS / 1e3 * clock / work.alone
    loaded = min(1.0, work.load_bytes * work.warps * work.programs / max(1, work.bytes))
    return Limits(
        total,
        100 * by["bytes"] / total,
        max(by, key=by.get),
        by,
        slots * work.warps / WARPS,
        work.programs / width,
        in_flight,
        loaded * device.copy_gb_s * MEMORY_NS / device.processors,
    )


def _together(times: dict[str, float]) -> float:
    """How long a wave takes that has these limits."""
    units = max(value for name, value in times.items() if name not in ("bytes", "latency"))
    return sum(value**SHARPNESS for value in (times["bytes"], units, times["latency"])) ** (1 / SHARPNESS)


def pack(recorded: Recorded, source: Source) -> tuple[bytes, list[torch.Tensor]]:
    """A launch's arguments as the machine code finds them; tensor i begins at address (i + 1) << 40."""
    named = dict(zip((p.name for p in recorded.kernel.params), recorded.args, strict=False)) | recorded.options
    out, tensors = b"", []
    for name, kind in source.signature.items():
        if kind == "constexpr":
            continue
        size, code = {"i32": (4, "i"), "i64": (8, "q"), "fp32": (4, "f"), "i1": (1, "?")}.get(kind, (8, "Q"))
        value = named[name]
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            value = len(tensors) << 40
        out += b"\0" * (-len(out) % size) + struct.pack("<" + code, value)
    return out, tensors


def _samples(programs: int) -> list[int]:
    """Programs to follow, evenly spread."""
    count = min(programs, 5)
    return [programs * (2 * i + 1) // (2 * count) for i in range(count)]


def study(recorded: Recorded, target: str) -> Work:
    """Compiles a recorded launch and follows it."""
    source = specialize(recorded)
    compiled = compile_source(recorded.kernel, source, target)
    used = resources(compiled)
    code = parse(cuobjdump("-sass", compiled.asm["cubin"]))
    parameters, tensors = pack(recorded, source)
    grid = (*recorded.grid, 1, 1)[:3]
    programs = math.prod(grid)
    traces, owner, unknown = [], {}, set()
    for index in _samples(programs):
        if traces and len(traces[0]) > LONG:
            break  # a program that runs long does what all of them do
        place = index % grid[0], index // grid[0] % grid[1], index // grid[0] // grid[1]
        thread = Thread(code, place, grid, parameters, target)
        traces.append(thread.run())
        owner |= {i: (address >> 40) - 1 for i, address in thread.addresses.items()}
        unknown |= thread.unknown
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    times = {i: n / len(traces) for i, n in Counter(chain(*traces)).items()}
    alone = sum(lone_time(code, trace, owner, sizes, DEVICES[target]) for trace in traces) / len(traces)

    executed: Counter[str] = Counter()
    moved: Counter[tuple[int, bool]] = Counter()
    widths: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
    warps, wavefronts, load_bytes = used["threads"] // 32, 0.0, 0.0
    for i, count in times.items():
        instruction = code[i]
        executed["issue"] += count
        executed[unit(instruction)] += count * (2 if instruction.op in _PAIRED else 1)
        if unit(instruction) == "lsu":
            wavefronts += count * max(1.0, instruction.bits * 4 / 128)
        if instruction.op in GLOBAL:
            size, writes = count * instruction.bits * 4, instruction.op in ("STG", "RED")
            moved[owner.get(i, -1), writes] += size * warps * programs
            widths[writes][instruction.bits] += size
            load_bytes += 0 if writes else size
    traffic = sum(
        min(amount, sizes[argument]) if 0 <= argument < len(sizes) else amount
        for (argument, _), amount in moved.items()
    )
    most = tuple(kind.most_common(1)[0][0] if kind else 0 for kind in widths)
    return Work(
        programs, warps, used["registers"], used["shared"], executed, wavefronts, alone, round(traffic),
        sum(moved.values()) / max(1.0, traffic), load_bytes, most, len(unknown),
        sum(b.operands[-1].value < b.address for b in code if b.address in unknown and b.op != "EXIT"),
    )  # fmt: skip


def lone_time(
    code: Sequence[Instruction], trace: Sequence[int], owner: dict[int, int], sizes: Sequence[int], device: Device
) -> float:
    """Clocks from a warp's first instruction to its last result, in order, each waiting for its operands."""
    memory, cache = (ns * device.clock_ghz for ns in (MEMORY_NS, CACHE_NS))
    facts: dict[int, tuple] = {}
    for i in set(trace):
        instruction = code[i]
        kind = unit(instruction)
        latency = CYCLES.get(kind, 5.0)
        if instruction.op in ("LDG", "LDGSTS", "ATOMG"):
            of = owner.get(i, -1)
            latency = cache if 0 <= of < len(sizes) and sizes[of] < SMALL else memory
        asynchronous = {"LDGSTS": 1, "LDGDEPBAR": 2, "DEPBAR": 3}.get(instruction.op, 0)
        left = instruction.operands[-1].value if instruction.op == "DEPBAR" and len(instruction.operands) > 1 else 0
        facts[i] = tuple(instruction.reads), instruction.writes, latency, asynchronous, left
    now, end = 0.0, 0.0
    ready: dict[str, float] = {}
    group, groups = 0.0, []  # asynchronous copies: the open group's end, and the closed ones'
    for i in trace:
        reads, writes, latency, asynchronous, left = facts[i]
        now += 1
        for name in reads:
            if name in ready and ready[name] > now:
                now = ready[name]
        if asynchronous == 1:
            group = max(group, now + latency)
        elif asynchronous == 2:
            groups.append(group)
        elif asynchronous == 3 and len(groups) > left:
            now = max(now, groups[len(groups) - left - 1])
        for name in writes:
            ready[name] = now + latency
        end = max(end, now + latency) if writes else max(end, now)
    return end


# ---------------------------------------------------------------- operations


class Prediction(NamedTuple):
    """One launch of an operation on one shape."""

    operation: str
    file: str
    passes: str
    """ "forward" or "backward"."""
    dtype: str
    shape: str
    kernel: str
    target: str
    work: Work | None
    limits: Limits | None
    error: str = ""


def predict_case(name: str, shape: Shape, dtype: torch.dtype, target: str) -> list[Prediction]:
    """Predictions for every launch of an operation, forward and backward."""
    (operation,) = [operation for operation in select(name) if operation.name == name]
    inputs = operation.make(shape, dtype, torch.device("meta"))
    upstream = draw_upstream(operation, inputs)
    with recording(target) as launches:
        operation.ours(*inputs)
        forward = len(launches)
        if upstream:
            launches.clear()
            run_both(operation.ours, inputs, upstream)
        launches = list(launches)
    out = []
    for i, recorded in enumerate(launches):
        passes = "forward" if i < forward else "backward"
        label = (
            operation.name, operation.file, passes, str(dtype)[6:], "x".join(map(str, shape)),
            recorded.kernel.__name__, target,
        )  # fmt: skip
        try:
            work = study(recorded, target)
            out.append(Prediction(*label, work, limits(work, DEVICES[target])))
        except Exception as error:  # one that does not compile is a line of the report, the others still count
            out.append(Prediction(*label, None, None, f"{type(error).__name__}: {str(error).splitlines()[-1]}"))
    return out


def predict_all(tasks: Sequence[tuple[str, Shape, torch.dtype]], target: str) -> list[Prediction]:
    """`predict_case` of every (operation, shape, dtype), on all processors.

    Raises:
        ValueError: an unknown target, or triton is absent or its interpreter is on.
    """
    check_targets([target])
    return run_all(predict_case, [(*task, target) for task in tasks])
