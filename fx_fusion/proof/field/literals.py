"""Literals as the numbers that they are, and what they may stand for.

``1 / 3`` written into a program is a float beside a third. Where the exact comparison fails, a literal within one unit
in the last place of a simple fraction, or of the square root of one, may stand for that; the report says so. A float
that is such a fraction itself stands for itself alone: who writes 1 + 2**-52 does not mean 1.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

#: The largest terms of a fraction that a float64 literal may stand for. Of a hundred million random literals, hardly
#: one is that near such a fraction.
SIMPLE = 4096

#: The same for a literal that a float32 holds, of which any is near a fraction with terms up to 4096.
SIMPLE_FLOAT32 = 256


@dataclass(frozen=True)
class Number:
    """A rational number, or with `is_root` a square root times a sign: ``sign * sqrt(square)``."""

    value: Fraction
    is_root: bool = False
    sign: int = 1

    def __str__(self) -> str:
        return f"{'-' if self.sign < 0 else ''}sqrt({self.value})" if self.is_root else str(self.value)

    @property
    def reciprocal(self) -> Number:
        return Number(1 / self.value, self.is_root, self.sign)


Meant = Mapping[float, Number]
"""What literals stand for, where not for themselves."""


def exact(literal: float | int | Fraction, meant: Meant) -> Number:
    """The number that a finite `literal` is, or stands for."""
    if isinstance(literal, float) and literal in meant:
        return meant[literal]
    return Number(Fraction(literal))


def near_misses(literals: Iterable[float], never: Collection[float]) -> dict[float, Number]:
    """What each of `literals` may stand for, if for anything but itself; those in `never` stand for themselves.

    No two may stand for the same number: then the difference between them is meant.
    """
    found: dict[float, Number] = {}
    for literal in dict.fromkeys(literals):
        number = None if literal in never else _near(literal)
        if number is not None:
            found[literal] = number
    magnitudes = [(number.value if number.is_root else abs(number.value), number.is_root) for number in found.values()]
    return found if len(set(magnitudes)) == len(magnitudes) else {}


def _near(literal: float) -> Number | None:
    size = abs(literal)
    if not math.isfinite(literal) or literal == int(literal):
        return None
    single = _is_float32(size)
    unit, terms = (_ulp32(size), SIMPLE_FLOAT32) if single else (math.ulp(size), SIMPLE)
    for is_root in (False, True):
        value = Fraction(size) ** (2 if is_root else 1)
        simple = value.limit_denominator(terms)
        if not 0 < simple.numerator <= terms:
            continue
        nearest = math.sqrt(simple) if is_root else float(simple)
        is_float = Fraction(nearest) ** (2 if is_root else 1) == simple
        if is_float or abs(nearest - size) > unit:
            continue
        sign = 1 if literal > 0 else -1
        return Number(simple, True, sign) if is_root else Number(sign * simple)
    return None


def _is_float32(value: float) -> bool:
    try:
        return struct.unpack("f", struct.pack("f", value))[0] == value
    except OverflowError:
        return False


def _ulp32(value: float) -> float:
    """A unit in the last place of a float32."""
    _, exponent = math.frexp(value)
    return math.ldexp(1.0, max(exponent - 24, -149))
