"""Follows one thread through a kernel's PTX, without a GPU: how often each instruction is executed, and where it reads.

Integer instructions are executed on the launch's own arguments and program index, so loops run as often as on a GPU.
What depends on memory or on floating-point numbers is unknown: a branch on it is not taken, so code that it would skip
counts as done, and a loop that it would repeat counts once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LIMIT = 4_000_000
"""Instructions of one thread, far above what a launch takes."""
_LINE = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*);")
_OPERAND = re.compile(r"\[[^]]*]|\{[^}]*}|[^,\s]+")
_REGISTER = re.compile(r"%[a-z]+\d+")
_WITHOUT_RESULT = ("st", "bra", "bar", "ret", "cp", "red", "membar", "fence")
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "lt": int.__lt__, "le": int.__le__, "gt": int.__gt__, "ge": int.__ge__, "eq": int.__eq__, "ne": int.__ne__,
}  # fmt: skip
_COMPUTE: dict[str, Callable[..., int]] = {
    "mov": lambda a: a, "cvt": lambda a: a, "not": lambda a: ~a, "neg": lambda a: -a, "abs": abs,
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "mad": lambda a, b, c: a * b + c,
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b, "min": min, "max": max,
    "shl": lambda a, b: a << b, "shr": lambda a, b: a >> b, "selp": lambda a, b, p: a if p else b,
    "div": lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
    "rem": lambda a, b: abs(a) % abs(b) * (-1 if a < 0 else 1),
    "bfe": lambda a, at, count: a >> at & (1 << count) - 1,
}  # fmt: skip
_DECIDES = {"and": 0, "mul": 0, "or": 1}
"""The operand that makes the others irrelevant; 1 for predicates alone."""


@dataclass(frozen=True)
class Instruction:
    """One line of PTX."""

    op: tuple[str, ...]
    """("ld", "global", "v4", "b32")."""
    operands: tuple[str, ...]
    guard: tuple[str, bool] | None
    """(predicate, value with which it is executed)."""
    writes: tuple[str, ...]
    reads: tuple[str, ...]

    @property
    def bits(self) -> int:
        """Bits that a load, store or copy moves for a thread."""
        if self.op[0] == "cp":
            return 8 * int(self.operands[2], 0)
        width = next((int(part[1:]) for part in self.op if re.fullmatch(r"v\d", part)), 1)
        return width * int(re.sub(r"\D", "", self.op[-1]))

    @property
    def is_global(self) -> bool:
        """Whether it reads or writes global memory."""
        return "global" in self.op and (self.op[0] != "cp" or len(self.operands) > 2)

    @property
    def address(self) -> str:
        """The operand that is an address in global memory."""
        return [operand for operand in self.operands if operand[0] == "["][-1]


class Program:
    """The instructions of a kernel; `labels` are positions of branches' targets."""

    def __init__(self, ptx: str) -> None:
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for line in ptx.splitlines():
            if match := re.match(r"(\$\w+):", line):
                self.labels[match[1]] = len(self.code)
            elif match := _LINE.match(line.split("//")[0].strip()):
                self.code.append(_instruction(*match.groups()))

    def follow(
        self, index: Sequence[int], grid: Sequence[int], arguments: Sequence[int | None]
    ) -> tuple[list[int], dict[int, int], set[int]]:
        """Executes thread 0 of a program.

        Args:
            index: of the program, three numbers.
            grid: how many programs there are.
            arguments: of the kernel; None is unknown.

        Returns:
            Positions in the order of execution; position of a global access -> its first address, where it is known;
            positions of branches on something unknown.

        Raises:
            RuntimeError: more than LIMIT instructions.
        """
        known: dict[str, int | None] = {"%tid.x": 0, "%laneid": 0}
        known |= {f"%ctaid.{axis}": value for axis, value in zip("xyz", index, strict=True)}
        known |= {f"%nctaid.{axis}": value for axis, value in zip("xyz", grid, strict=True)}
        trace, addresses, unknown, position = [], {}, set(), 0
        while len(trace) < LIMIT:
            instruction = self.code[position]
            trace.append(position)
            on: bool | None = True
            if instruction.guard is not None:
                value = known.get(instruction.guard[0])
                on = None if value is None else bool(value) == instruction.guard[1]
            name = instruction.op[0]
            if name == "ret" and on:
                return trace, addresses, unknown
            if instruction.is_global and position not in addresses:
                register, offset = re.match(r"\[\s*(%\w+)\s*(?:\+\s*(-?\d+))?", instruction.address).groups()
                if (base := known.get(register)) is not None:
                    addresses[position] = base + int(offset or 0)
            if name == "bra" and on is None:
                unknown.add(position)
            if name == "bra" and on:
                position = self.labels[instruction.operands[0]]
                continue
            if on is None:
                known |= dict.fromkeys(instruction.writes)
            elif on and instruction.writes:
                known |= dict.fromkeys(instruction.writes) | _execute(instruction, known, arguments)
            position += 1
        raise RuntimeError(f"a thread executes more than {LIMIT} instructions; last: {instruction}")


def _instruction(negated: str | None, predicate: str | None, name: str, rest: str) -> Instruction:
    op, operands = tuple(name.split(".")), tuple(_OPERAND.findall(rest))
    count = 0 if op[0] in _WITHOUT_RESULT or not operands else 1
    writes = tuple(_REGISTER.findall(" ".join(operands[:count])))
    reads = tuple(_REGISTER.findall(" ".join([*operands[count:], predicate or ""])))
    return Instruction(op, operands, (predicate, not negated) if predicate else None, writes, reads)


def _execute(instruction: Instruction, known: dict, arguments: Sequence[int | None]) -> dict[str, int | None]:
    """Register -> value of what an integer instruction computes; empty where that is not known."""
    name, *how = instruction.op
    if how[:1] == ["param"]:
        at = int(re.search(r"_param_(\d+)", instruction.operands[1])[1])
        return {instruction.writes[0]: arguments[at] if at < len(arguments) else None}
    kind = how[-1]
    if kind[0] == "f" or "bf" in kind or (name not in _COMPUTE and name != "setp") or len(instruction.writes) != 1:
        return {}
    values = [_value(operand, known, kind) for operand in instruction.operands[1:]]
    if name == "selp":
        values[2] = _value(instruction.operands[3], known, "pred")
    if name == "mad" and how[0] == "wide":
        values[2] = _value(instruction.operands[3], known, kind[0] + "64")
    decides = _DECIDES.get(name)
    if decides is not None and decides in values and (decides == 0 or kind == "pred"):
        return {instruction.writes[0]: decides}
    if None in values:
        return {}
    if name == "setp":
        return {instruction.writes[0]: int(_COMPARE[how[0]](*values))} if len(values) == 2 else {}
    if name == "cvt":
        return {instruction.writes[0]: _fit(values[0], how[-2])} if how[-2][0] in "sub" else {}
    result = _COMPUTE[name](*values)
    if how[0] == "hi":
        result >>= int(kind[1:])
    return {instruction.writes[0]: _fit(result, kind[0] + "64" if how[0] == "wide" else kind)}


def _value(operand: str, known: dict, kind: str) -> int | None:
    if operand[0] == "%":
        value = known.get(operand)
        return None if value is None else _fit(value, kind)
    return _fit(int(operand, 0), kind) if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", operand) else None


def _fit(value: int, kind: str) -> int:
    """An integer in the bits of a type, "s32", "u64", "b16" or "pred"."""
    bits = 1 if kind == "pred" else int(kind[1:])
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value
