"""Operands: registers and constants, and how an instruction reads and writes them as values of a type.

Types are u32, i32, f32, u16, f16, u64, i64 and mask (a pair of scalar registers, one bit a lane). Vector registers are
read as arrays of one value a lane, everything else as one numpy value.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from amdgcn.simulator.assembly import Instruction
from amdgcn.simulator.wave import EXEC, M0, MASK32, MASK64, NUM_SGPRS, NUM_VGPRS, VCC, Wave

SPECIAL = {
    "vcc": (VCC, 2), "vcc_lo": (VCC, 1), "vcc_hi": (VCC + 1, 1),
    "exec": (EXEC, 2), "exec_lo": (EXEC, 1), "exec_hi": (EXEC + 1, 1), "m0": (M0, 1),
}  # fmt: skip
FLOATS = ("0.5", "-0.5", "1.0", "-1.0", "2.0", "-2.0", "4.0", "-4.0", "0.15915494")
WIDTHS = {"u64": 2, "i64": 2, "mask": 2}
NUMPY = {
    "u32": np.uint32, "i32": np.int32, "f32": np.float32, "u16": np.uint16, "f16": np.float16,
    "u64": np.uint64, "i64": np.int64,
}  # fmt: skip

Read = Callable[[Wave], Any]
Write = Callable[[Wave, Any], None]


@dataclass(frozen=True)
class Register:
    """`count` registers from `first` on; `kind` is v or s."""

    kind: str
    first: int
    count: int


@dataclass(frozen=True)
class Constant:
    """A number in the instruction: its bits in an operand of 32 bits, or of 64."""

    text: str

    def bits(self, kind: str, instruction: Instruction) -> int:
        if self.text in FLOATS:
            if kind not in ("f32", "f16", "u32", "i32"):
                raise instruction.unsupported(f"{self.text} as {kind}")
            if kind == "f16":
                return int(np.float16(self.text).view(np.uint16))
            return int(np.float32(self.text).view(np.uint32))
        value = int(self.text, 0)
        if WIDTHS.get(kind) == 2:
            # A literal has 32 bits; unsigned operations extend it with zeros, signed ones with its sign.
            unsigned = instruction.mnemonic.removesuffix("_e32").endswith(("_b64", "_u64"))
            if not -16 <= value < 1 << (32 if unsigned else 31):
                raise instruction.unsupported(f"{self.text} as a number of 64 bits")
            return value & MASK64
        if not -(1 << 31) <= value <= MASK32:
            raise instruction.unsupported(f"{self.text} does not fit into 32 bits")
        return value & MASK32


def parse(text: str, instruction: Instruction) -> Register | Constant:
    if text in SPECIAL:
        return Register("s", *SPECIAL[text])
    if text in FLOATS or re.fullmatch(r"-?(\d+|0x[0-9a-f]+)", text):
        return Constant(text)
    match = re.fullmatch(r"([vs])(?:(\d+)|\[(\d+):(\d+)\])", text)
    if match is None:
        raise instruction.unsupported(f"operand {text}")
    kind, single, first, last = match.groups()
    register = Register(kind, int(single), 1) if single else Register(kind, int(first), int(last) - int(first) + 1)
    if register.first + register.count > (NUM_VGPRS if kind == "v" else NUM_SGPRS) or register.count < 1:
        raise instruction.unsupported(f"operand {text}: no such register")
    return register


def register(text: str, kind: str, count: int, instruction: Instruction) -> int:
    """The number of the first of `count` registers."""
    found = parse(text, instruction)
    if not isinstance(found, Register) or (found.kind, found.count) != (kind, count):
        raise instruction.unsupported(f"operand {text}: expected {count} registers {kind}")
    return found.first


def bits(text: str, width: int, instruction: Instruction) -> Read:
    """Read `width` dwords of any register or constant as u32 or u64, lane by lane from vector registers."""
    kind = "u32" if width == 1 else "u64"
    found = parse(text, instruction)
    if isinstance(found, Constant):
        value = NUMPY[kind](found.bits(kind, instruction))
        return lambda wave: value
    if found.count != width:
        raise instruction.unsupported(f"operand {text}: expected {width} registers")
    first = found.first
    if found.kind == "s":
        if width == 1:
            return lambda wave: np.uint32(wave.s[first])
        return lambda wave: np.uint64(wave.read64(first))
    if width == 1:
        return lambda wave: wave.v[first]
    return lambda wave: wave.v[first].astype(np.uint64) | wave.v[first + 1].astype(np.uint64) << np.uint64(32)


def reader(text: str, kind: str, instruction: Instruction, change: Callable[[Read], Read] | None = None) -> Read:
    """Read an operand as `kind`; `change` stands between the register and its interpretation (SDWA, DPP)."""
    if kind == "mask":
        first = register(text, "s", 2, instruction)
        return lambda wave: wave.mask(first)
    text, negate, absolute = _signs(text, kind, instruction)
    found = parse(text, instruction)
    if isinstance(found, Constant) and kind == "f16":
        value = np.uint32(found.bits(kind, instruction))
        raw: Read = lambda wave: value  # noqa: E731
    else:
        raw = bits(text, WIDTHS.get(kind, 1), instruction)
    if change is not None:
        raw = change(raw)
    return _interpret(raw, kind, negate, absolute)


def _signs(text: str, kind: str, instruction: Instruction) -> tuple[str, bool, bool]:
    negate = text.startswith("-") and not re.match(r"-[\d.]", text)
    text = text[1:] if negate else text
    absolute = text.startswith("|") and text.endswith("|")
    text = text[1:-1] if absolute else text
    if (negate or absolute) and kind not in ("f32", "f16"):
        raise instruction.unsupported(f"a sign modifier on a {kind}")
    return text, negate, absolute


def _interpret(raw: Read, kind: str, negate: bool, absolute: bool) -> Read:
    numpy = NUMPY[kind]
    if kind in ("u32", "u64"):
        return raw
    if kind in ("i32", "i64"):
        return lambda wave: raw(wave).view(numpy)
    if kind == "u16":
        return lambda wave: raw(wave).astype(np.uint16)
    narrow, sign = (np.uint32, 0x80000000) if kind == "f32" else (np.uint16, 0x8000)
    keep, flip = (sign - 1 if absolute else 2 * sign - 1), (sign if negate else 0)
    if not (negate or absolute):
        return lambda wave: raw(wave).astype(narrow).view(numpy)
    return lambda wave: (raw(wave).astype(narrow) & narrow(keep) ^ narrow(flip)).view(numpy)


def writer(text: str, kind: str, instruction: Instruction) -> Write:
    """Write a vector register in the active lanes; a mask is zero in the others."""
    if kind == "mask":
        first = register(text, "s", 2, instruction)
        return lambda wave, value: wave.write_mask(first, np.broadcast_to(value, wave.exec.shape) & wave.exec)
    first = register(text, "v", WIDTHS.get(kind, 1), instruction)
    if WIDTHS.get(kind) == 2:
        return lambda wave, value: write_pair(wave, first, value)
    narrow = np.uint16 if kind in ("u16", "f16") else np.uint32

    def write(wave: Wave, value: Any) -> None:
        # A result of 16 bits clears the upper half on these GPUs.
        np.copyto(wave.v[first], value.view(narrow), where=wave.exec)

    return write


def write_pair(wave: Wave, first: int, value: Any) -> None:
    value = value.view(np.uint64)
    np.copyto(wave.v[first], (value & np.uint64(MASK32)).astype(np.uint32), where=wave.exec)
    np.copyto(wave.v[first + 1], (value >> np.uint64(32)).astype(np.uint32), where=wave.exec)
