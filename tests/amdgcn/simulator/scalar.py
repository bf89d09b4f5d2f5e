"""The scalar unit: numbers that all lanes share, and control flow."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from amdgcn.simulator import operands
from amdgcn.simulator.assembly import Instruction
from amdgcn.simulator.wave import EXEC, MASK32, MASK64, VCC, Step, Wave

Number = Callable[[Wave], int]


def signed(value: int, width: int = 32) -> int:
    return value - (1 << width) if value >> width - 1 & 1 else value


def decode(instruction: Instruction, labels: dict[str, int]) -> Step:
    name = instruction.mnemonic
    if name in CONTROL:
        return CONTROL[name]
    if name == "s_branch" or name.startswith("s_cbranch_"):
        return _branch(instruction, labels)
    if name in COMPARISONS:
        return _comparison(instruction)
    if name in MOVES:
        return _move(instruction, *MOVES[name])
    if name in BINARY:
        return _binary(instruction, *BINARY[name])
    if name in SAVE_EXEC:
        return _save_exec(instruction, SAVE_EXEC[name])
    if name in IN_PLACE:
        return _in_place(instruction, *IN_PLACE[name])
    raise instruction.unsupported("unknown instruction")


# --- control flow -------------------------------------------------------------------------------------------------


def _end(wave: Wave) -> None:
    wave.done = True


def _barrier(wave: Wave) -> None:
    wave.at_barrier = True


def _nothing(wave: Wave) -> None:
    """Every access is complete at once, so there is nothing to wait for."""


CONTROL: dict[str, Step] = {"s_endpgm": _end, "s_barrier": _barrier, "s_waitcnt": _nothing, "s_nop": _nothing}

CONDITIONS: dict[str, Callable[[Wave], bool]] = {
    "scc0": lambda wave: not wave.scc,
    "scc1": lambda wave: bool(wave.scc),
    "vccz": lambda wave: not wave.read64(VCC),
    "vccnz": lambda wave: bool(wave.read64(VCC)),
    "execz": lambda wave: not wave.read64(EXEC),
    "execnz": lambda wave: bool(wave.read64(EXEC)),
}


def _branch(instruction: Instruction, labels: dict[str, int]) -> Step:
    instruction.expect_operands(1)
    condition = instruction.mnemonic.removeprefix("s_cbranch_")
    if instruction.operands[0] not in labels:
        raise instruction.unsupported("a branch to an unknown label")
    target = labels[instruction.operands[0]]
    if condition == "s_branch":
        return lambda wave: setattr(wave, "pc", target)
    if condition not in CONDITIONS:
        raise instruction.unsupported("unknown instruction")
    holds = CONDITIONS[condition]

    def step(wave: Wave) -> None:
        if holds(wave):
            wave.pc = target

    return step


# --- comparisons --------------------------------------------------------------------------------------------------

_COMPARE = {
    "eq": operator.eq, "lg": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip
COMPARISONS: dict[str, tuple[Callable[[int, int], bool], bool, int]] = {
    **{f"s_cmp_{name}_i32": (compare, True, 1) for name, compare in _COMPARE.items()},
    **{f"s_cmp_{name}_u32": (compare, False, 1) for name, compare in _COMPARE.items()},
    **{f"s_cmp_{name}_u64": (_COMPARE[name], False, 2) for name in ("eq", "lg")},
    "s_bitcmp0_b32": (lambda a, b: not a >> (b & 31) & 1, False, 1),
    "s_bitcmp1_b32": (lambda a, b: bool(a >> (b & 31) & 1), False, 1),
}


def _comparison(instruction: Instruction) -> Step:
    instruction.expect_operands(2)
    compare, is_signed, width = COMPARISONS[instruction.mnemonic]
    first, second = (_number(text, width, instruction) for text in instruction.operands)
    sign: Callable[[int], int] = signed if is_signed else int

    def step(wave: Wave) -> None:
        wave.scc = int(compare(sign(first(wave)), sign(second(wave))))

    return step


# --- arithmetic ---------------------------------------------------------------------------------------------------

# The width of the result and of the source in dwords; whether SCC tells that the result is not zero.
MOVES: dict[str, tuple[int, bool, Callable[[int], int]]] = {
    "s_mov_b32": (1, False, lambda a: a),
    "s_mov_b64": (2, False, lambda a: a),
    "s_not_b32": (1, True, lambda a: ~a),
    "s_not_b64": (2, True, lambda a: ~a),
    "s_abs_i32": (1, True, lambda a: abs(signed(a))),
    "s_brev_b32": (1, False, lambda a: int(f"{a:032b}"[::-1], 2)),
}


def _move(instruction: Instruction, width: int, sets_scc: bool, compute: Callable[[int], int]) -> Step:
    instruction.expect_operands(2)
    target = operands.register(instruction.operands[0], "s", width, instruction)
    source = _number(instruction.operands[1], width, instruction)

    def step(wave: Wave) -> None:
        result = compute(source(wave)) & (MASK32 if width == 1 else MASK64)
        wave.write(target, result) if width == 1 else wave.write64(target, result)
        if sets_scc:
            wave.scc = int(result != 0)

    return step


def _add_signed(a: int, b: int, wave: Wave) -> int:
    total = signed(a) + signed(b)
    wave.scc = int(not -(1 << 31) <= total < 1 << 31)
    return total


def _add(a: int, b: int, wave: Wave) -> int:
    wave.scc = int(a + b > MASK32)
    return a + b


def _add_carry(a: int, b: int, wave: Wave) -> int:
    return _add(a + wave.scc, b, wave)


def _subtract(a: int, b: int, wave: Wave) -> int:
    wave.scc = int(a < b)
    return a - b


def _subtract_borrow(a: int, b: int, wave: Wave) -> int:
    return _subtract(a, b + wave.scc, wave)


def _subtract_signed(a: int, b: int, wave: Wave) -> int:
    total = signed(a) - signed(b)
    wave.scc = int(not -(1 << 31) <= total < 1 << 31)
    return total


def _nonzero(width: int, compute: Callable[[int, int], int]) -> Callable[[int, int, Wave], int]:
    def compute_and_tell(a: int, b: int, wave: Wave) -> int:
        result = compute(a, b) & (1 << 32 * width) - 1
        wave.scc = int(result != 0)
        return result

    return compute_and_tell


def _choose(is_signed: bool, smaller: bool) -> Callable[[int, int, Wave], int]:
    """The smaller or the greater; SCC tells whether it is the first."""
    sign: Callable[[int], int] = signed if is_signed else int

    def compute(a: int, b: int, wave: Wave) -> int:
        wave.scc = int(sign(a) < sign(b) if smaller else sign(a) > sign(b))
        return a if wave.scc else b

    return compute


def _bit_field(a: int, b: int, is_signed: bool) -> int:
    offset, width = b & 31, b >> 16 & 0x7F
    field = (signed(a) if is_signed else a) >> offset & (1 << width) - 1
    return signed(field, width) if is_signed and width else field


def _logic() -> dict[str, tuple[int, int, Any]]:
    functions: dict[str, Callable[[int, int], int]] = {
        "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b, "andn2": lambda a, b: a & ~b,
    }  # fmt: skip
    return {
        f"s_{name}_b{32 * width}": (width, width, _nonzero(width, function))
        for name, function in functions.items()
        for width in (1, 2)
    }


# Width of the result and of the first source, width of the second source, and the function, which sets SCC.
BINARY: dict[str, tuple[int, int, Callable[[int, int, Wave], int]]] = {
    **_logic(),
    "s_add_i32": (1, 1, _add_signed),
    "s_add_u32": (1, 1, _add),
    "s_addc_u32": (1, 1, _add_carry),
    "s_sub_i32": (1, 1, _subtract_signed),
    "s_sub_u32": (1, 1, _subtract),
    "s_subb_u32": (1, 1, _subtract_borrow),
    "s_min_i32": (1, 1, _choose(True, True)),
    "s_min_u32": (1, 1, _choose(False, True)),
    "s_max_i32": (1, 1, _choose(True, False)),
    "s_max_u32": (1, 1, _choose(False, False)),
    "s_mul_i32": (1, 1, lambda a, b, wave: a * b),
    "s_mul_hi_u32": (1, 1, lambda a, b, wave: a * b >> 32),
    "s_mul_hi_i32": (1, 1, lambda a, b, wave: signed(a) * signed(b) >> 32),
    "s_lshl_b32": (1, 1, _nonzero(1, lambda a, b: a << (b & 31))),
    "s_lshr_b32": (1, 1, _nonzero(1, lambda a, b: a >> (b & 31))),
    "s_ashr_i32": (1, 1, _nonzero(1, lambda a, b: signed(a) >> (b & 31))),
    "s_lshl_b64": (2, 1, _nonzero(2, lambda a, b: a << (b & 63))),
    "s_lshr_b64": (2, 1, _nonzero(2, lambda a, b: a >> (b & 63))),
    "s_ashr_i64": (2, 1, _nonzero(2, lambda a, b: signed(a, 64) >> (b & 63))),
    "s_bfe_u32": (1, 1, _nonzero(1, lambda a, b: _bit_field(a, b, False))),
    "s_bfe_i32": (1, 1, _nonzero(1, lambda a, b: _bit_field(a, b, True))),
    "s_cselect_b32": (1, 1, lambda a, b, wave: a if wave.scc else b),
    "s_cselect_b64": (2, 2, lambda a, b, wave: a if wave.scc else b),
}


def _binary(instruction: Instruction, width: int, second_width: int, compute: Callable[[int, int, Wave], int]) -> Step:
    instruction.expect_operands(3)
    target = operands.register(instruction.operands[0], "s", width, instruction)
    first = _number(instruction.operands[1], width, instruction)
    second = _number(instruction.operands[2], second_width, instruction)
    if width == 1:
        return lambda wave: wave.write(target, compute(first(wave), second(wave), wave))
    return lambda wave: wave.write64(target, compute(first(wave), second(wave), wave))


# From the source and EXEC to the new EXEC.
SAVE_EXEC: dict[str, Callable[[int, int], int]] = {
    "s_and_saveexec_b64": lambda a, active: a & active,
    "s_or_saveexec_b64": lambda a, active: a | active,
    "s_andn2_saveexec_b64": lambda a, active: a & ~active,
}


def _save_exec(instruction: Instruction, compute: Callable[[int, int], int]) -> Step:
    instruction.expect_operands(2)
    target = operands.register(instruction.operands[0], "s", 2, instruction)
    source = _number(instruction.operands[1], 2, instruction)

    def step(wave: Wave) -> None:
        active = wave.read64(EXEC)
        changed = compute(source(wave), active) & MASK64
        wave.write64(target, active)
        wave.write64(EXEC, changed)
        wave.scc = int(changed != 0)

    return step


# The destination is the first source; whether the second is a literal of 16 bits, extended with its sign.
IN_PLACE: dict[str, tuple[bool, Callable[[int, int, Wave], int]]] = {
    "s_movk_i32": (True, lambda a, b, wave: b),
    "s_addk_i32": (True, _add_signed),
    "s_mulk_i32": (True, lambda a, b, wave: a * b),
    "s_bitset0_b32": (False, lambda a, b, wave: a & ~(1 << (b & 31))),
    "s_bitset1_b32": (False, lambda a, b, wave: a | 1 << (b & 31)),
}


def _in_place(instruction: Instruction, has_literal: bool, compute: Callable[[int, int, Wave], int]) -> Step:
    instruction.expect_operands(2)
    target = operands.register(instruction.operands[0], "s", 1, instruction)
    if has_literal:
        literal = _literal16(instruction.operands[1], instruction)
        return lambda wave: wave.write(target, compute(wave.s[target], literal, wave))
    source = _number(instruction.operands[1], 1, instruction)
    return lambda wave: wave.write(target, compute(wave.s[target], source(wave), wave))


def _literal16(text: str, instruction: Instruction) -> int:
    found = operands.parse(text, instruction)
    if not isinstance(found, operands.Constant) or not -(1 << 15) <= int(found.text, 0) < 1 << 16:
        raise instruction.unsupported(f"operand {text}: expected a literal of 16 bits")
    return signed(int(found.text, 0) & 0xFFFF, 16) & MASK32


def _number(text: str, width: int, instruction: Instruction) -> Number:
    found = operands.parse(text, instruction)
    if isinstance(found, operands.Constant):
        value = found.bits("u32" if width == 1 else "u64", instruction)
        return lambda wave: value
    if found.kind != "s" or found.count != width:
        raise instruction.unsupported(f"operand {text}: expected {width} scalar registers")
    first = found.first
    return (lambda wave: wave.s[first]) if width == 1 else (lambda wave: wave.read64(first))
