"""Bounds hold: of polynomials that are worked out; and of the chance that a difference hides."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import sympy

from fx_fusion.proof.field.bounds import ONE, VARIABLE, Bound, Polynomial
from fx_fusion.proof.field.chance import bits_of, log2_hidden
from fx_fusion.proof.field.primes import COUNT, LOWER, UPPER, count_with, is_square, random_prime, unforeseeable

X = sympy.symbols("x0:3")


def literal(value: Fraction):
    two = (value.denominator & -value.denominator).bit_length() - 1
    above = Polynomial(0, math.log2(abs(value.numerator)) - two, two)
    return sympy.Rational(value), Bound(above, divisor=math.log2(value.denominator >> two))


def grown(chance: random.Random, depth: int):
    """A random expression, and the bound on it."""
    if depth == 0:
        if chance.random() < 0.5:
            return chance.choice(X), VARIABLE
        return literal(Fraction(chance.choice([-3, 1, 5, 1000]), chance.choice([1, 3, 8, 10])))
    (a, bound_a), (b, bound_b) = grown(chance, depth - 1), grown(chance, depth - 1)
    kind = chance.choice(["add", "mul", "div", "sum", "pow"])
    if kind == "add":
        return a + b, bound_a + bound_b
    if kind == "mul":
        return a * b, bound_a * bound_b
    if kind == "div" and sympy.cancel(b) != 0:
        return a / b, bound_a * bound_b.inverse()
    if kind == "sum":
        moved = a.subs(dict(zip(X, (*X[1:], X[0]), strict=True)), simultaneous=True)
        return a + moved, bound_a.total(2)
    return a**3, bound_a**3


def size(polynomial) -> tuple[int, int]:
    """Degree, and sum of the coefficients' magnitudes, which have nothing in common."""
    _, poly = sympy.Poly(polynomial, *X, domain="QQ").primitive()
    return poly.total_degree(), int(sum(map(abs, poly.coeffs())))


@pytest.mark.parametrize("seed", range(40))
def test_a_bound_holds(seed):
    """In lowest terms, numerator and denominator are no larger than bound."""
    chance = random.Random(seed)
    value, bound = grown(chance, 3)
    above, below = sympy.fraction(sympy.cancel(sympy.together(value)))
    if above == 0:
        return
    for polynomial, limit, more in ((above, bound.above, 0.0), (below, bound.below, bound.divisor)):
        degree, total = size(polynomial)
        scale = max(bound.above.scale, bound.below.scale, 0)
        assert degree <= limit.degree
        assert math.log2(total) <= max(limit.magnitude, 0) + more + scale + bound.divisor + 1e-6


def test_a_difference_is_bounded():
    for seed in range(20):
        chance = random.Random(seed)
        (a, bound_a), (b, bound_b) = grown(chance, 2), grown(chance, 2)
        above = sympy.fraction(sympy.cancel(sympy.together(a - b)))[0]
        gap = bound_a.difference(bound_b)
        if above != 0:
            degree, total = size(above)
            assert degree <= gap.degree and math.log2(total) <= gap.bits + bound_a.divisor + bound_b.divisor + 1e-6


def test_roots():
    root = VARIABLE.root()
    assert root.above.degree == 1 and not root.is_constant
    two = Bound(Polynomial(0, 1.0, 0)).root()
    assert two.is_constant and two.above.magnitude == 0.5


def test_joined_holds_for_both():
    one, other = Bound(Polynomial(2, 3.0, 1), Polynomial(1, 0.0, 0), 5.0), Bound(Polynomial(1, 9.0, 0), ONE, 2.0)
    joined = one.joined(other)
    assert joined.above == Polynomial(2, 14.0, 1) and joined.below.degree == 1 and joined.divisor == 7.0
    assert one.joined(one) is one


def test_the_chance_grows_with_degree_and_size():
    def hidden(degree, bits, radicals=0, squares=()):
        return log2_hidden(Polynomial(degree, bits, 0), None, radicals, set(squares))

    assert hidden(6, 100) < hidden(12, 100) < hidden(12, 10_000)
    assert hidden(6, 100) < hidden(6, 100, radicals=2) and hidden(6, 100) < hidden(6, 100, squares={11})
    assert hidden(6, 100, squares={2, 3, 5, 7}) == hidden(6, 100)
    # What is known to be so: a polynomial of this degree, with coefficients that no prime divides.
    assert 2.0 ** hidden(64, 0.0) >= 64 / LOWER
    # Ten thousand bits hold a third of a thousand primes.
    assert 2.0 ** hidden(1, 10_000.0) >= 10_000 / 31 / COUNT


def test_a_root_doubles_the_degree():
    radicand = Bound(Polynomial(2, 0.0, 72))
    gap = Polynomial(6, 10.0, 0)
    assert log2_hidden(gap, radicand, 0, set()) > log2_hidden(gap, None, 0, set())


def test_bits():
    assert bits_of([-10.0]) == 10 and bits_of([-10.0, -10.0]) == 9 and bits_of([-10.0, -12.0]) == 9


def test_measured_in_small_fields():
    """A polynomial that is no zero vanishes at a random point no more often than its degree says."""
    p, degree = 1009, 8
    chance = random.Random(3)
    roots = [chance.randrange(p) for _ in range(degree)]
    vanish = sum(math.prod((x - r) % p for r in roots) % p == 0 for x in range(p))
    assert vanish <= degree


def test_primes():
    chance = unforeseeable("a region")
    for squares in ((), (11, 13)):
        for _ in range(20):
            p = random_prime(chance, squares)
            assert LOWER < p < UPPER and sympy.isprime(p)
            assert not is_square(p - 1, p) and all(is_square(n, p) for n in (2, 3, 5, 7, *squares))
    assert count_with(()) == COUNT and count_with({2, 3}) == COUNT and count_with({11, 13}) < COUNT / 4


def test_the_number_of_primes():
    """In a hundredth of the range, as many as there should be."""
    width = (UPPER - LOWER) // 100
    start = LOWER + 37 * width
    classes = [r for r in range(840) if all(is_square_class(r, n) for n in (2, 3, 5, 7)) and r % 4 == 3]
    found = sum(
        sympy.isprime(n) for r in classes for n in range(start + (r - start) % 840, start + width, 840)
    )  # fmt: skip
    assert abs(found - COUNT / 100) < 0.03 * COUNT / 100


def is_square_class(r: int, n: int) -> bool:
    """Is n a square modulo primes of this class? By the first such prime."""
    p = next(p for p in range(r + 840, 10**6, 840) if sympy.isprime(p)) if math.gcd(r, 840) == 1 else None
    return p is not None and pow(n, (p - 1) // 2, p) == 1


def test_nobody_knows_the_primes():
    """Of one region the primes differ between processes; of two regions within one."""
    import subprocess
    import sys

    code = "from fx_fusion.proof.field.primes import *; print(random_prime(unforeseeable('a')))"
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(2)}
    assert len(runs) == 2
    assert random_prime(unforeseeable("a")) == random_prime(unforeseeable("a")) != random_prime(unforeseeable("b"))
