"""Run a few instructions alone, on registers that a test fills; numbers rounded by definition."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from amdgcn.simulator.assembly import parse_instruction
from amdgcn.simulator.machine import decode_instruction
from amdgcn.simulator.memory import Arena, Lds
from amdgcn.simulator.transfers import Memories
from amdgcn.simulator.wave import EXEC, WAVE_SIZE, Wave

MASK32 = (1 << 32) - 1
EDGES = [
    0,
    1,
    2,
    15,
    31,
    32,
    63,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x10000,
    0x7FFFFFFF,
    0x80000000,
    0x80000001,
    MASK32 - 1,
    MASK32,
]
FLOAT_EDGES = [
    0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x33800000, 0x3F800000, 0x3F800001,
    0xBF800000, 0x4B800001, 0x477FF000, 0x477FE000, 0x387FC000, 0x38000000, 0x33000001, 0x7F7FFFFF, 0xFF7FFFFF,
    0x7F800000, 0xFF800000, 0x7FC00000,
]  # fmt: skip


def run(
    *lines: str,
    v: dict[int, Any] | None = None,
    s: dict[int, int] | None = None,
    exec_mask: int = (1 << WAVE_SIZE) - 1,
    scc: int = 0,
    memories: Memories | None = None,
    nearest: bool = False,
) -> Wave:
    wave = Wave()
    for index, value in (v or {}).items():
        wave.v[index] = np.asarray(value).astype(np.uint32)
    for index, number in (s or {}).items():
        wave.write(index, number)
    wave.write64(EXEC, exec_mask)
    wave.scc = scc
    memories = memories or Memories(Arena(), Lds(0))
    with np.errstate(all="ignore"):
        for number, line in enumerate(lines, 1):
            decode_instruction(parse_instruction(number, line), {}, memories, nearest)(wave)
    return wave


def integers(seed: int) -> np.ndarray:
    """One number a lane: edge cases, few bits, many bits."""
    generator = np.random.default_rng(seed)
    few = generator.integers(0, 64, 24)
    many = generator.integers(0, 1 << 32, WAVE_SIZE)
    return generator.permutation(np.concatenate([EDGES, few, many])[:WAVE_SIZE]).astype(np.uint32)


def floats(seed: int) -> np.ndarray:
    """One float32 a lane, as bits: edge cases, ordinary sizes, all sizes."""
    generator = np.random.default_rng(seed)
    ordinary = generator.standard_normal(24).astype(np.float32).view(np.uint32)
    every = generator.integers(0, 1 << 32, WAVE_SIZE).astype(np.uint32)
    return generator.permutation(np.concatenate([FLOAT_EDGES, ordinary, every])[:WAVE_SIZE]).astype(np.uint32)


def number(bits: int) -> float:
    """The value of a float32, exact in a Python float."""
    return float(np.uint32(bits).view(np.float32))


def rounded(value: Fraction, mantissa: int, min_exponent: int, max_exponent: int) -> float:
    """The nearest binary float with so many bits after the point, ties to even; beyond the range, infinity."""
    if value == 0:
        return 0.0
    magnitude, exponent = abs(value), min_exponent
    while magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    unit = Fraction(2) ** (exponent - mantissa)
    quotient = round(magnitude / unit)  # Fraction rounds ties to even.
    result = quotient * unit
    if result >= Fraction(2) ** (max_exponent + 1):
        return float("inf") if value > 0 else float("-inf")
    return float(result if value > 0 else -result)


def float32(value: Fraction) -> float:
    return rounded(value, 23, -126, 127)


def same(found: np.ndarray, expected: list[float]) -> None:
    """Equal as float32, a NaN equal to any, zeros of either sign equal."""
    np.testing.assert_array_equal(found.view(np.float32), np.array(expected, np.float32))
