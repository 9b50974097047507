"""Follows one thread through a kernel's machine code (SASS), without a GPU: how often each instruction is executed.

The integer instructions that a compiled loop counts and indexes with are executed on the launch's own arguments and
program index; what depends on memory is unknown. A branch on something unknown falls through into the code that it
would skip, unless that is a call (the slow path of a division); an unknown loop ends after one iteration. The
effect of an instruction is that which it has where compiled code uses it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

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
            elif on:
                run(instruction, list(instruction.operands), set(instruction.modifiers))
            elif on is None:
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
                more = self._predicate(operand.name, "!" in operand.sign)
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

    def _read(self, operand: Operand, wide: bool = False) -> Value:
        """32 bits of an operand, or 64 of a pair; its sign applied, complement in two's complement."""
        if operand.kind == "i":
            return operand.value if not wide else _signed(operand.value) & ((1 << 64) - 1)
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
        mask = (1 << 64) - 1 if wide else MASK
        if "|" in operand.sign:
            value = abs(_signed(value)) & mask
        if "~" in operand.sign:
            value = ~value & mask
        return -value & mask if "-" in operand.sign else value

    def _register(self, name: str) -> Value:
        return 0 if name[-1] == "Z" else self.registers.get(name)

    def _constant(self, operand: Operand, size: int) -> Value:
        offset = operand.value
        if operand.name:
            index = self._register(operand.name)
            if index is None:
                return None
            offset += index
        for base, values in self.constants.items():
            if base <= offset < base + len(values):
                return int.from_bytes(values[offset - base : offset - base + size], "little")
        return None

    def _write(self, name: str, value: Value, registers: int = 1) -> None:
        for i in range(registers):
            self.registers[name] = None if value is None else value >> 32 * i & MASK
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
            name = "_" + {"ULDC": "LDC"}.get(instruction.op, instruction.op.removeprefix("U")).lower()
            if instruction.op in JUMPS or needed & set(instruction.writes):
                steps.append(getattr(self, name, self._forget))
            else:
                steps.append(None)
        return steps

    def _forget(self, instruction: Instruction, *_: object) -> None:
        """What the instruction writes becomes unknown."""
        for name in instruction.writes:
            (self.predicates if "P" in name else self.registers)[name] = None

    def _known(self, *operands: Operand) -> list[int] | None:
        values = [self._read(operand) for operand in operands]
        return None if None in values else values

    def _mov(self, instruction, operands, modifiers):
        self._write(operands[0].name, self._read(operands[1]))

    def _r2ur(self, instruction, operands, modifiers):
        self._write(operands[-2].name, self._read(operands[-1]))

    def _s2r(self, instruction, operands, modifiers):
        name = operands[1].name
        self._write(operands[0].name, self.special.get(name, 0 if name.startswith(("SR_TID", "SR_LANE")) else None))

    _s2ur = _s2r

    def _cs2r(self, instruction, operands, modifiers):
        known = operands[1].name == "SRZ"
        self._write(operands[0].name, 0 if known else None, 1 if "32" in modifiers else 2)

    def _ldc(self, instruction, operands, modifiers):
        size = instruction.bits // 8
        self._write(operands[0].name, self._constant(operands[1], size), max(1, size // 4))

    _ldcu = _ldc

    def _hfma2(self, instruction, operands, modifiers):
        """A constant in two halves is all that it is followed for."""
        *factors, high, low = operands[1:]
        value = None
        if all(o.name == "RZ" for o in factors) and high.kind == low.kind == "i":
            value = _half(high) << 16 | _half(low)
        self._write(operands[0].name, value)

    def _imad(self, instruction, operands, modifiers):
        target, *rest = operands
        carry_out = rest.pop(0) if rest[0].kind == "p" else None
        a, b, c, *carries = rest
        wide = "WIDE" in modifiers or "HI" in modifiers
        first, second, third = self._read(a), self._read(b), self._read(c, wide)
        # a shift or a product with 0 needs only one factor
        value = None
        if third is not None and (0 in (first, second) or None not in (first, second)):
            if "U32" not in modifiers and wide and None not in (first, second):
                first, second = _signed(first), _signed(second)
            value = (first or 0) * (second or 0) + third
            if "X" in modifiers:
                carry = self._predicate(carries[0].name, "!" in carries[0].sign)
                value = None if carry is None else value + carry
        if value is not None and "HI" in modifiers:
            value >>= 32
        bits = 64 if "WIDE" in modifiers else 32
        if carry_out:
            self.predicates[carry_out.name] = None if value is None else value >> bits > 0
        self._write(target.name, None if value is None else value & ((1 << bits) - 1), bits // 32)

    def _iadd3(self, instruction, operands, modifiers):
        target, *rest = operands
        outs = []
        while rest[0].kind == "p":
            outs.append(rest.pop(0))
        values = self._known(*rest[:3])
        carries = [self._predicate(o.name, "!" in o.sign) for o in rest[3:] if o.kind == "p"]
        total = None
        if values is not None and None not in carries:
            # -0 carries: it is ~0 + 1
            borrow = sum(1 << 32 for o, v in zip(rest[:3], values, strict=True) if "-" in o.sign and v == 0)
            total = sum(values) + borrow + sum(carries)
        for i, out in enumerate(outs):
            self.predicates[out.name] = None if total is None else total >> 32 > i
        self._write(target.name, total)

    def _iadd(self, instruction, operands, modifiers):
        values = self._known(*operands[1:3])
        self._write(operands[0].name, None if values is None else sum(values))

    _viadd = _iadd

    def _viaddmnmx(self, instruction, operands, modifiers):
        values = self._known(*operands[1:4])
        keep = self._predicate(operands[-1].name, "!" in operands[-1].sign)
        if values is not None:
            values = [(values[0] + values[1]) & MASK, values[2]]
        self._write(operands[0].name, _extreme(values, keep, modifiers))

    def _vimnmx(self, instruction, operands, modifiers):
        keep = self._predicate(operands[-1].name, "!" in operands[-1].sign)
        self._write(operands[0].name, _extreme(self._known(*operands[1:3]), keep, modifiers))

    _imnmx = _vimnmx

    def _lea(self, instruction, operands, modifiers):
        target, *rest = operands
        carry_out = rest.pop(0) if rest[0].kind == "p" else None
        carry = 0
        if rest[-1].kind == "p":
            last = rest.pop()
            carry = self._predicate(last.name, "!" in last.sign) if "X" in modifiers else 0
        shift = self._read(rest.pop())
        a, b = self._read(rest[0]), self._read(rest[1])
        high = self._read(rest[2]) if len(rest) > 2 else 0
        value = None
        if None not in (a, b, high, carry, shift):
            a = _signed(a) if "SX32" in modifiers else high << 32 | a
            value = ((a << shift) >> 32 if "HI" in modifiers else (a << shift) & MASK) & MASK
            value += b + carry
        if carry_out:
            self.predicates[carry_out.name] = None if value is None else value >> 32 > 0
        self._write(target.name, value)

    def _shf(self, instruction, operands, modifiers):
        low, shift, high = (self._read(o) for o in operands[1:4])
        left, value = "L" in modifiers, None
        if None not in (low, shift, high):
            shift = min(shift, 63) if "W" not in modifiers else shift & 31
            pair = (_signed(high) if modifiers & {"S32", "S64"} else high) << 32 | low
            pair = pair << shift if left else pair >> shift
            value = pair >> 32 if "HI" in modifiers else pair
        self._write(operands[0].name, value)

    def _sgxt(self, instruction, operands, modifiers):
        values = self._known(*operands[1:3])
        if values is not None:
            value, bits = values
            value &= (1 << bits) - 1
            values = value if "U32" in modifiers or not bits else _signed(value, bits)
        self._write(operands[0].name, values)

    def _lop3(self, instruction, operands, modifiers):
        *targets, a, b, c, table, _ = operands
        values, table = self._known(a, b, c), table.value
        if values is None:  # an operand that the table does not look at need not be known
            read = [self._read(o) for o in (a, b, c)]
            guesses = {_lut(table, *(g if v is None else v for v in read)) for g in (0, MASK)}
            result = guesses.pop() if len(guesses) == 1 and sum(v is None for v in read) == 1 else None
        else:
            result = _lut(table, *values)
        for target in targets:
            if target.kind == "p":
                self.predicates[target.name] = None if result is None else result != 0
            else:
                self._write(target.name, result)

    def _plop3(self, instruction, operands, modifiers):
        first, second, *inputs, table, other = operands
        values = [self._predicate(o.name, "!" in o.sign) for o in inputs]
        for target, lut in ((first, table.value), (second, other.value)):
            guesses = {bool(lut >> (4 * a + 2 * b + c) & 1) for a, b, c in _completions(values)}
            self.predicates[target.name] = guesses.pop() if len(guesses) == 1 else None

    def _isetp(self, instruction, operands, modifiers):
        first, second, a, b, join, *rest = operands
        kind, how = instruction.modifiers[0], next(m for m in instruction.modifiers if m in _JOIN)
        values = self._known(a, b)
        joined = self._predicate(join.name, "!" in join.sign)
        result = None
        if values is not None:
            if "U32" not in modifiers:
                values = [_signed(v) for v in values]
            result = _COMPARE[kind](*values)
            if "EX" in modifiers:  # the high halves of 64 bits; where they agree the low ones decide
                low = self._predicate(rest[0].name, "!" in rest[0].sign)
                if values[0] == values[1]:
                    result = low
        for target, own in ((first, result), (second, None if result is None else not result)):
            if own is not None and joined is not None:
                self.predicates[target.name] = _JOIN[how](own, joined)
            else:
                decisive = {"AND": False, "OR": True}.get(how, "neither")
                self.predicates[target.name] = decisive if decisive in (own, joined) else None

    def _sel(self, instruction, operands, modifiers):
        chosen = self._predicate(operands[3].name, "!" in operands[3].sign)
        value = None if chosen is None else self._read(operands[1] if chosen else operands[2])
        self._write(operands[0].name, value)

    def _iabs(self, instruction, operands, modifiers):
        value = self._read(operands[1])
        self._write(operands[0].name, None if value is None else abs(_signed(value)))

    def _prmt(self, instruction, operands, modifiers):
        low, selector, high = (self._read(o) for o in operands[1:4])
        value = None
        if None not in (low, selector, high):
            pair = high << 32 | low
            value = 0
            for i in range(4):
                pick = selector >> 4 * i & 0xF
                byte = pair >> 8 * (pick & 7) & 0xFF
                value |= (byte if pick < 8 else 0xFF * (byte >> 7)) << 8 * i
        self._write(operands[0].name, value)

    # the reciprocal of an integer division, whose result the code corrects

    def _i2f(self, instruction, operands, modifiers):
        value = self._read(operands[-1])
        if "F64" in modifiers or value is None:
            self._write(operands[0].name, None, 2 if "F64" in modifiers else 1)
        else:
            number = value if modifiers & {"U32", "U16"} else _signed(value)
            self._write(operands[0].name, _bits(float(number), up=True))

    def _mufu(self, instruction, operands, modifiers):
        value = self._read(operands[1])
        usable = "RCP" in modifiers and value is not None and _float(value) != 0
        self._write(operands[0].name, _bits(1 / _float(value)) if usable else None)

    def _f2i(self, instruction, operands, modifiers):
        value = self._read(operands[1])
        finite = value is not None and abs(_float(value)) < 2**32
        self._write(operands[0].name, int(_float(value)) if finite else None)


def _half(operand: Operand) -> int:
    return int.from_bytes(struct.pack("<e", _float(operand.value)), "little")


def _extreme(values: list[int] | None, least: bool | None, modifiers: set[str]) -> Value:
    if values is None or least is None:
        return None
    return (min if least else max)(values, key=(lambda v: v) if "U32" in modifiers else _signed)


def _completions(values: Sequence[bool | None]) -> list[tuple[bool, ...]]:
    out: list[tuple[bool, ...]] = [()]
    for value in values:
        out = [(*known, v) for known in out for v in ((False, True) if value is None else (value,))]
    return out


def _bits(x: float, up: bool = False) -> int:
    """The float32 nearest to x, or for `up` the next one above where that is below."""
    bits = struct.unpack("<I", struct.pack("<f", x))[0]
    return bits + 1 if up and _float(bits) < x else bits
