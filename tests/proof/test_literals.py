"""What literals may stand for."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import pytest

from fx_fusion.proof.field.literals import exact, near_misses


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def meant(*literals, never=()):
    return {literal: str(number) for literal, number in near_misses(literals, never).items()}


SIMPLE = {
    1 / 3: "1/3", -1 / 3: "-1/3", 0.1: "1/10", 128**-0.5: "sqrt(1/128)", -(0.5**0.5): "-sqrt(1/2)",
    27.0**0.5: "sqrt(27)",
    math.nextafter(0.1, 1.0): "1/10", math.nextafter(0.1, 0.0): "1/10", 80.0**0.5: "sqrt(80)", 1 / 96: "1/96",
    float32(0.1): "1/10", float32(128**-0.5): "sqrt(1/128)", float32(1 / 96): "1/96",
}  # fmt: skip


@pytest.mark.parametrize("literal", SIMPLE)
def test_near_a_simple_number(literal):
    assert meant(literal) == {literal: SIMPLE[literal]}


#: Floats that are what they are: integers, dyadic fractions, neighbours of those, and numbers near nothing simple.
THEMSELVES = (
    1.0, 3.0, -2.0, 0.5, 0.375, 1 + 2**-52, 1 - 2**-53, 0.5 + 2**-53, 2.0 - 2**-52, 1 / 4097, math.pi, math.e, 1e-6,
    1e-20, 1e30, math.nextafter(math.nextafter(0.1, 1.0), 1.0), float32(math.pi), float32(1 / 257), float32(1 + 2**-23),
    math.inf, math.nan, 0.0,
)  # fmt: skip


@pytest.mark.parametrize("literal", THEMSELVES)
def test_stands_for_itself(literal):
    assert meant(literal) == {}


def test_no_two_for_the_same_number():
    assert meant(0.1, math.nextafter(0.1, 1.0)) == {}
    assert meant(0.1, -math.nextafter(0.1, 1.0)) == {}
    assert meant(0.1, float32(0.1)) == {}
    assert meant(0.1, 0.1, 0.2) == {0.1: "1/10", 0.2: "1/5"}


def test_never():
    assert meant(0.001, 0.1, never={0.001}) == {0.1: "1/10"}


def test_exact():
    assert exact(0.1, {}).value == Fraction(3602879701896397, 2**55)
    third = exact(1 / 3, near_misses([1 / 3], ()))
    assert third.value == Fraction(1, 3) and third.reciprocal.value == 3
    root = exact(-(0.5**0.5), near_misses([-(0.5**0.5)], ()))
    assert (root.value, root.is_root, root.sign) == (Fraction(1, 2), True, -1)
    assert str(root.reciprocal) == "-sqrt(2)"
