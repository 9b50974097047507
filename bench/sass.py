"""A kernel's machine code (SASS) as instructions: what each reads, writes, loads and stores.

The names are those of NVIDIA's CUDA Binary Utilities.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

_NO_RESULT = ("BAR", "BSSY", "BSYNC", "WARPSYNC", "NOP", "DEPBAR", "LDGDEPBAR", "LDGSTS", "MEMBAR", "R2P", "UP2UR")
GLOBAL = ("LDG", "STG", "LDGSTS", "ATOMG", "RED", "ATOM")
"""What reads or writes global memory."""
JUMPS = ("EXIT", "BRA", "CALL", "RET", "JMP", "BRX")
MASK = 0xFFFFFFFF
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
_TEXT = re.compile(r"(?:@(!?)(U?P[T\d]) +)?([A-Z][\w.]*)\s*(.*)")
_REGISTER = re.compile(r"([-~!|]*)(U?[RP](?:\d+|Z|T))((?:\.\w+)*)\|?$")
_CONSTANT = re.compile(r"([-~|]*)cx?\[0x0\]\[(U?R\w+)?\+?(0x[0-9a-f]+)?\]")


@dataclass(frozen=True)
class Operand:
    """One operand; `kind` is r (register), p (predicate), i (immediate), c (constant bank 0), s (special) or m."""

    kind: str
    name: str = ""
    """Of the register, predicate or special register; for a constant the register that indexes it."""
    value: int = 0
    sign: str = ""
    """What stands before it: any of - ~ ! |."""
    registers: tuple[str, ...] = ()
    """That it reads as an address."""


@dataclass
class Instruction:
    """One line of the machine code."""

    address: int
    op: str
    """The first part of its name, "IMAD"."""
    modifiers: tuple[str, ...]
    """The others, ("WIDE", "U32")."""
    operands: tuple[Operand, ...]
    guard: tuple[bool, str] | None
    """(negated, predicate) that switches it on."""
    text: str

    @property
    def bits(self) -> int:
        """Width of a load, store or constant for each thread."""
        if {"U8", "S8"} & set(self.modifiers):
            return 8
        if {"U16", "S16"} & set(self.modifiers):
            return 16
        return next((int(m) for m in self.modifiers if m in ("64", "128", "256")), 32)

    @cached_property
    def _targets(self) -> int:
        """How many operands come first that it writes to."""
        if not self.operands or self.op in JUMPS or self.op in _NO_RESULT or self.operands[0].kind not in "rp":
            return 0
        count = 1
        while count < len(self.operands) - 1 and self.operands[count].kind == "p":
            count += 1
        # a predicate alone in front goes along with a register: whether a shuffle's source exists, a logical result
        if self.operands[0].kind == "p" and self.op in ("SHFL", "LOP3", "ULOP3", "R2UR", "ATOM", "ATOMG"):
            count = 2
        if self.op in ("PLOP3", "UPLOP3"):  # which reads predicates too
            count = 2
        return count

    @cached_property
    def writes(self) -> tuple[str, ...]:
        """Registers and predicates that it writes."""
        names = []
        for operand in self.operands[: self._targets]:
            names.append(operand.name)
            for _ in range(self._written - 1 if operand.kind == "r" else 0):
                names.append(next_register(names[-1]))
        return tuple(name for name in names if name[-1] not in "ZT")

    @property
    def _written(self) -> int:
        """Registers that a result takes."""
        if self.op == "LDSM":
            return int(self.modifiers[-1]) if self.modifiers[-1].isdigit() else 1
        if self.op in ("LDG", "LDS", "LDC", "LDCU", "LDL", "ULDC", "LD"):
            return max(1, self.bits // 32)
        double = self.op in ("DADD", "DMUL", "DFMA") or "F64" in self.modifiers[:1]
        return 2 if double or "WIDE" in self.modifiers or self.op == "CS2R" and "32" not in self.modifiers else 1

    @cached_property
    def reads(self) -> set[str]:
        """Registers and predicates that it reads."""
        names = {self.guard[1]} if self.guard else set()
        for operand in self.operands[self._targets :]:
            names |= set(operand.registers)
            if operand.kind in "rp" or (operand.kind == "c" and operand.name):
                names.add(operand.name)
                if operand.kind == "r" and operand.name[-1] != "Z":
                    names |= {name for name, _ in zip(following(operand.name), range(self._read_width), strict=False)}
        return {name for name in names if name[-1] not in "ZT"}

    @cached_property
    def pointer(self) -> tuple[str, ...]:
        """The pairs of registers that a global address is the sum of, halves in turn."""
        memory = [operand for operand in self.operands if operand.kind == "m"][-1]
        return tuple(half for name in memory.registers for half in (name, next_register(name)))

    @property
    def _read_width(self) -> int:
        """How many registers after a named one may belong to it."""
        if self.op.startswith("ST"):
            return max(1, self.bits // 32) - 1
        return 1 if {"WIDE", "HI", "F64"} & set(self.modifiers) or self.op[0] == "D" else 0


def parse(sass: str) -> list[Instruction]:
    """Instructions of the one function in the output of `cuobjdump -sass`."""
    found = []
    for address, line in _LINE.findall(sass):
        negated, guard, name, rest = _TEXT.match(line).groups()
        op, *modifiers = name.split(".")
        operands = tuple(_operand(part.strip()) for part in _split(rest)) if rest else ()
        found.append(
            Instruction(
                int(address, 16), op, tuple(modifiers), operands, (bool(negated), guard) if guard else None, line
            )
        )
    return found


def _split(text: str) -> list[str]:
    """At the commas."""
    return text.replace(".reuse", "").split(",")


def _operand(text: str) -> Operand:
    if match := _REGISTER.match(text):
        sign, name, _ = match.groups()
        return Operand("p" if "P" in name else "r", name, sign=sign)
    if match := _CONSTANT.match(text):
        sign, index, offset = match.groups()
        return Operand("c", index or "", int(offset or "0", 16), sign)
    if re.match(r"-?0x[0-9a-f]+$", text):
        return Operand("i", value=int(text, 16) & MASK)
    if re.match(r"[-+]?(\d|INF|QNAN|SNAN)", text):
        number = float(text.replace("QNAN", "nan").replace("SNAN", "nan"))
        return Operand("i", text, struct.unpack("<I", struct.pack("<f", _fit(number)))[0])
    if "[" in text:
        return Operand("m", registers=tuple(re.findall(r"U?R\d+", text.rpartition("[")[2])))
    return Operand("s", text.removeprefix("`"))


def _fit(number: float) -> float:
    """A double's immediate may be no float32; nobody computes with it here."""
    return number if abs(number) < 3e38 else 0.0


def following(name: str) -> Iterator[str]:
    """R4 -> R5, R6, ..."""
    while True:
        name = next_register(name)
        yield name


def next_register(name: str) -> str:
    """R4 -> R5."""
    letters = name.rstrip("0123456789")
    return name if name[-1] == "Z" else f"{letters}{int(name[len(letters):]) + 1}"
