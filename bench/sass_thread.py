"""Follows one thread through a kernel's machine code (SASS), without a GPU: how often each instruction is executed.

The integer instructions that a compiled loop counts and indexes with are executed on the launch's own arguments and
program index; what depends on memory is unknown. A branch on something unknown falls through into the code that it
would skip, unless that is a call (the slow path of a division); an unknown loop ends after one iteration. The
effect of an instruction is that which it has where compiled code uses it. One method executes one instruction, which is
why the file is longer than others: `_lop3` is LOP3's and ULOP3's.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from bench.sass import GLOBAL, JUMPS, MASK, Instruction, Operand, next_register

Value = int | None
"""32 bits, or unknown."""
PARAMETERS = {"sm_80": 0x160, "sm_90": 0x210, "sm_100": 0x380}
"""Where a kernel's arguments begin in constant bank 0."""
GRID = {"sm_80": 0xC, "sm_90": 0xC, "sm_100": 0x370}
"""Where the three sizes of the grid lie there."""
LIMIT = 4_000_000
"""Instructions of one thread, far above what a launch takes; a loop that does not end is a fault of this file."""


def _signed(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> (bits - 1) & 1 else x


def _float(x: int) -> float:
    return struct.unpack("<f", struct.pack("<I", x & MASK))[0]


def _lut(table: int, a: int, b: int, c: int) -> int:
    out = 0
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out & MASK


_COMPARE = {
    "LT": lambda a, b: a < b, "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b, "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b, "F": lambda a, b: False, "T": lambda a, b: True,
}  # fmt: skip
_JOIN = {"AND": lambda a, b: a and b, "OR": lambda a, b: a or b, "XOR": lambda a, b: a != b}


class Unknown(Exception):
    """An operand depends on memory: so does everything that the instruction writes."""


class Thread:
    """Thread 0 of one program.

    Args:
        code: from `parse`.
        program: its index, three numbers.
        grid: how many there are.
        parameters: the bytes of the kernel's arguments.
        target: "sm_90", for where they lie.
    """

    def __init__(
        self, code: Sequence[Instruction], program: Sequence[int], grid: Sequence[int], parameters: bytes, target: str
    ) -> None:
        self.code = code
        self.constants = {PARAMETERS[target]: parameters, GRID[target]: struct.pack("<3I", *(*grid, 1, 1)[:3])}
        self.steps = self._steps()
        self.at = {instruction.address: i for i, instruction in enumerate(code)}
        self.special = {f"SR_CTAID.{axis}": index for axis, index in zip("XYZ", (*program, 0, 0), strict=False)}
        self.registers: dict[str, Value] = {}
        self.predicates: dict[str, bool | None] = {}
        self.addresses: dict[int, int] = {}
        """Index of a global access -> the first address that it went to, as far as it is known."""
        self.unknown: set[int] = set()
        """Addresses of branches whose condition is unknown."""

    def run(self) -> list[int]:
        """Indices of the instructions in the order of execution.

        Raises:
            RuntimeError: more than LIMIT of them.
        """
        trace, calls, position = [], [], 0
        while len(trace) < LIMIT:
            instruction, run = self.code[position], self.steps[position]
            trace.append(position)
            if instruction.op in GLOBAL and position not in self.addresses:
                self._note_address(position)
            position += 1
            if run is None:
                continue
            on = self._guard(instruction)
            if instruction.op in JUMPS:
                taken = self._taken(instruction, on)
                if not taken:
                    continue
                if instruction.op == "EXIT":
                    return trace
                if instruction.op == "RET":
                    position = calls.pop()
                    continue
                if instruction.op == "CALL":
                    calls.append(position)
                position = self.at[instruction.operands[-1].value]
            elif on is None:
                self._forget(instruction)
            elif on:
                try:
                    run(instruction, list(instruction.operands), set(instruction.modifiers))
                except Unknown:
                    self._forget(instruction)
        raise RuntimeError(f"a thread executes more than {LIMIT} instructions; last: {instruction.text}")

    def _guard(self, instruction: Instruction) -> bool | None:
        return True if instruction.guard is None else self._predicate(instruction.guard[1], instruction.guard[0])

    def _predicate(self, name: str, negated: bool) -> bool | None:
        value = True if name in ("PT", "UPT") else self.predicates.get(name)
        return None if value is None else value != negated

    def _taken(self, instruction: Instruction, on: bool | None) -> bool:
        if "DIV" in instruction.modifiers:  # a warp whose threads part ways
            return False
        for operand in instruction.operands[:-1]:
            if operand.kind == "p":
                more = self._test(operand)
                on = False if on is False or more is False else None if on is None or more is None else True
        if on is not None:
            return on
        self.unknown.add(instruction.address)
        if instruction.op != "BRA":
            return instruction.op == "RET"
        target = instruction.operands[-1].value
        between = self.code[self.at[instruction.address] + 1 : self.at.get(target, 0)]
        return any(skipped.op == "CALL" for skipped in between)

    # ------------------------------------------------------------ values

    def _look(self, operand: Operand, wide: bool = False) -> Value:
        """32 bits of an operand, or 64 of a pair; its sign applied, complement in two's complement."""
        mask = (1 << 64) - 1 if wide else MASK
        if operand.kind == "i":
            return _signed(operand.value) & mask
        if operand.kind == "c":
            value = self._constant(operand, 8 if wide else 4)
        elif operand.kind == "r":
            value = self._register(operand.name)
            if wide and value is not None and operand.name[-1] != "Z":
                high = self._register(next_register(operand.name))
                value = None if high is None else high << 32 | value
        else:
            return None
        if value is None:
            return None
        if "|" in operand.sign:
            value = abs(_signed(value)) & mask
        if "~" in operand.sign:
            value = ~value & mask
        return -value & mask if "-" in operand.sign else value

    def _read(self, operand: Operand, wide: bool = False) -> int:
        """`_look`, of what must be known."""
        return _known(self._look(operand, wide))

    def _test(self, operand: Operand) -> bool | None:
        return self._predicate(operand.name, "!" in operand.sign)

    def _register(self, name: str) -> Value:
        return 0 if name[-1] == "Z" else self.registers.get(name)

    def _constant(self, operand: Operand, size: int) -> Value:
        index = self._register(operand.name) if operand.name else 0
        if index is None:
            return None
        offset = operand.value + index
        for base, values in self.constants.items():
            if base <= offset < base + len(values):
                return int.from_bytes(values[offset - base : offset - base + size], "little")
        return None

    def _write(self, target: Operand, value: int, registers: int = 1) -> None:
        name = target.name
        for i in range(registers):
            self.registers[name] = value >> 32 * i & MASK
            name = next_register(name)

    # ------------------------------------------------------------ execution

    def _note_address(self, position: int) -> None:
        halves = [self._register(name) for name in self.code[position].pointer]
        if None not in halves:
            self.addresses[position] = sum(half << 32 * (i % 2) for i, half in enumerate(halves))

    def _steps(self) -> list[Callable | None]:
        """What executes each instruction; None where no branch can depend on it."""
        needed: set[str] = set()
        before = -1
        while len(needed) > before:
            before = len(needed)
            for instruction in self.code:
                if instruction.op in JUMPS or needed & set(instruction.writes):
                    needed |= instruction.reads
                if instruction.op in GLOBAL:
                    needed |= set(instruction.pointer)
        steps = []
        for instruction in self.code:
            name = "_" + instruction.op.removeprefix("U").lower()
            if instruction.op in JUMPS or needed & set(instruction.writes):
                steps.append(getattr(self, name, self._forget))
            else:
                steps.append(None)
        return steps

    def _forget(self, instruction: Instruction, *_: object) -> None:
        """What the instruction writes becomes unknown."""
        for name in instruction.writes:
            (self.predicates if "P" in name else self.registers)[name] = None

    def _mov(self, instruction, operands, modifiers):
        self._write(operands[0], self._read(operands[1]))

    def _r2ur(self, instruction, operands, modifiers):
        self._write(operands[-2], self._read(operands[-1]))

    def _s2r(self, instruction, operands, modifiers):
        name = operands[1].name
        self._write(operands[0], _known(self.special.get(name, 0 if name.startswith(("SR_TID", "SR_LANE")) else None)))

    _s2ur = _s2r

    def _cs2r(self, instruction, operands, modifiers):
        self._write(operands[0], _known(0 if operands[1].name == "SRZ" else None), 1 if "32" in modifiers else 2)

    def _ldc(self, instruction, operands, modifiers):
        size = instruction.bits // 8
        self._write(operands[0], _known(self._constant(operands[1], size)), max(1, size // 4))

    _ldcu = _ldc

    def _hfma2(self, instruction, operands, modifiers):
        """A constant in two halves is all that it is followed for."""
        *factors, high, low = operands[1:]
        if not (all(o.name == "RZ" for o in factors) and high.kind == low.kind == "i"):
            raise Unknown
        self._write(operands[0], _half(high) << 16 | _half(low))

    def _imad(self, instruction, operands, modifiers):
        target, *rest = operands
        carry_out = rest.pop(0) if rest[0].kind == "p" else None
        a, b, c, *carries = rest
        wide = bool(modifiers & {"WIDE", "HI"})
        first, second, third = self._look(a), self._look(b), self._read(c, wide)
        if 0 in (first, second):  # a shift or a product with 0 needs only one factor
            first = second = 0
        first, second = _known(first), _known(second)
        if wide and "U32" not in modifiers:
            first, second = _signed(first), _signed(second)
        value = first * second + third
        if "X" in modifiers:
            value += _known(self._test(carries[0]))
        if "HI" in modifiers:
            value >>= 32
        bits = 64 if "WIDE" in modifiers else 32
        if carry_out:
            self.predicates[carry_out.name] = value >> bits > 0
        self._write(target, value & ((1 << bits) - 1), bits // 32)

    def _iadd3(self, instruction, operands, modifiers):
        target, *rest = operands
        outs = []
        while rest[0].kind == "p":
            outs.append(rest.pop(0))
        values = [self._read(o) for o in rest[:3]]
        carries = sum(_known(self._test(o)) for o in rest[3:] if o.kind == "p")
        # -0 carries: it is ~0 + 1
        borrow = sum(1 << 32 for o, v in zip(rest[:3], values, strict=True) if "-" in o.sign and v == 0)
        total = sum(values) + borrow + carries
        for i, out in enumerate(outs):
            self.predicates[out.name] = total >> 32 > i
        self._write(target, total)

    def _iadd(self, instruction, operands, modifiers):
        self._write(operands[0], self._read(operands[1]) + self._read(operands[2]))

    _viadd = _iadd

    def _vimnmx(self, instruction, operands, modifiers):
        a, b, least = self._read(operands[1]), self._read(operands[2]), _known(self._test(operands[-1]))
        self._write(operands[0], _extreme(a, b, least, modifiers))

    _imnmx = _vimnmx

    def _viaddmnmx(self, instruction, operands, modifiers):
        a, b, c = (self._read(o) for o in operands[1:4])
        least = _known(self._test(operands[-1]))
        self._write(operands[0], _extreme((a + b) & MASK, c, least, modifiers))

    def _lea(self, instruction, operands, modifiers):
        target, *rest = operands
        carry_out = rest.pop(0) if rest[0].kind == "p" else None
        carry = 0
        if rest[-1].kind == "p":
            last = rest.pop()
            carry = _known(self._test(last)) if "X" in modifiers else 0
        shift = self._read(rest.pop())
        a, b = self._read(rest[0]), self._read(rest[1])
        high = self._read(rest[2]) if len(rest) > 2 else 0
        a = _signed(a) if "SX32" in modifiers else high << 32 | a
        value = ((a << shift) >> 32 if "HI" in modifiers else a << shift) & MASK
        value += b + carry
        if carry_out:
            self.predicates[carry_out.name] = value >> 32 > 0
        self._write(target, value)

    def _shf(self, instruction, operands, modifiers):
        low, shift, high = (self._read(o) for o in operands[1:4])
        shift = min(shift, 63) if "W" not in modifiers else shift & 31
        pair = (_signed(high) if modifiers & {"S32", "S64"} else high) << 32 | low
        pair = pair << shift if "L" in modifiers else pair >> shift
        self._write(operands[0], pair >> 32 if "HI" in modifiers else pair)

    def _sgxt(self, instruction, operands, modifiers):
        value, bits = (self._read(o) for o in operands[1:3])
        value &= (1 << bits) - 1
        self._write(operands[0], value if "U32" in modifiers or not bits else _signed(value, bits))

    def _lop3(self, instruction, operands, modifiers):
        *targets, a, b, c, table, _ = operands
        read = [self._look(o) for o in (a, b, c)]
        if sum(value is None for value in read) > 1:
            raise Unknown
        # an operand that the table does not look at need not be known
        guesses = {_lut(table.value, *(g if v is None else v for v in read)) for g in (0, MASK)}
        result = _only(guesses)
        for target in targets:
            if target.kind == "p":
                self.predicates[target.name] = result != 0
            else:
                self._write(target, result)

    def _plop3(self, instruction, operands, modifiers):
        first, second, *inputs, table, other = operands
        known = [(False, True) if value is None else (value,) for value in map(self._test, inputs)]
        for target, lut in ((first, table.value), (second, other.value)):
            guesses = {bool(lut >> (4 * a + 2 * b + c) & 1) for a, b, c in product(*known)}
            self.predicates[target.name] = guesses.pop() if len(guesses) == 1 else None

    def _isetp(self, instruction, operands, modifiers):
        first, second, a, b, join, *rest = operands
        kind, how = instruction.modifiers[0], next(m for m in instruction.modifiers if m in _JOIN)
        values, joined, result = [self._look(a), self._look(b)], self._test(join), None
        if None not in values:
            if "U32" not in modifiers:
                values = [_signed(v) for v in values]
            result = _COMPARE[kind](*values)
            if "EX" in modifiers and values[0] == values[1]:  # the high halves of 64 bits agree: the low ones decide
                result = self._test(rest[0])
        for target, own in ((first, result), (second, None if result is None else not result)):
            if own is not None and joined is not None:
                self.predicates[target.name] = _JOIN[how](own, joined)
            else:
                decisive = {"AND": False, "OR": True}.get(how, "neither")
                self.predicates[target.name] = decisive if decisive in (own, joined) else None

    def _sel(self, instruction, operands, modifiers):
        self._write(operands[0], self._read(operands[1 if _known(self._test(operands[3])) else 2]))

    def _iabs(self, instruction, operands, modifiers):
        self._write(operands[0], abs(_signed(self._read(operands[1]))))

    def _prmt(self, instruction, operands, modifiers):
        low, selector, high = (self._read(o) for o in operands[1:4])
        pair, value = high << 32 | low, 0
        for i in range(4):
            pick = selector >> 4 * i & 0xF
            byte = pair >> 8 * (pick & 7) & 0xFF
            value |= (byte if pick < 8 else 0xFF * (byte >> 7)) << 8 * i
        self._write(operands[0], value)

    # the reciprocal of an integer division, whose result the code corrects

    def _i2f(self, instruction, operands, modifiers):
        value = self._read(operands[-1])
        if "F64" in modifiers:
            raise Unknown
        number = value if modifiers & {"U32", "U16"} else _signed(value)
        self._write(operands[0], _bits(float(number), up=True))

    def _mufu(self, instruction, operands, modifiers):
        value = _float(self._read(operands[1]))
        if "RCP" not in modifiers or value == 0:
            raise Unknown
        self._write(operands[0], _bits(1 / value))

    def _f2i(self, instruction, operands, modifiers):
        value = _float(self._read(operands[1]))
        if not abs(value) < 2**32:
            raise Unknown
        self._write(operands[0], int(value))


def _known(value: Any) -> Any:
    """The value; Unknown for None."""
    if value is None:
        raise Unknown
    return value


def _only(guesses: set[int]) -> int:
    """The one result that all guesses give; Unknown if there are more."""
    if len(guesses) > 1:
        raise Unknown
    return guesses.pop()


def _half(operand: Operand) -> int:
    return int.from_bytes(struct.pack("<e", _float(operand.value)), "little")


def _extreme(a: int, b: int, least: bool, modifiers: set[str]) -> int:
    return (min if least else max)(a, b, key=None if "U32" in modifiers else _signed)


def _bits(x: float, up: bool = False) -> int:
    """The float32 nearest to x, or for `up` the next one above where that is below."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    return bits + 1 if up and _float(bits) < x else bits
