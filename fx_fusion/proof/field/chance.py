"""How likely is it that a difference stays hidden?"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from fx_fusion.proof.field.bounds import Bound, Polynomial
from fx_fusion.proof.field.primes import LOWER, count_with

#: Zeros of a polynomial at the points that are drawn: eliminating a root doubles its degree, and only the half of all
#: points where the root exists is drawn from (evenly, up to parts in 2**30).
_ZEROS = 4.01


def log2_hidden(gap: Polynomial, radicand: Bound | None, radicals: int, squares: Collection[int]) -> float:
    """The logarithm (to 2) of the chance that a difference vanishes in one random field at one random point.

    A prime hides it if it divides all coefficients: hence if it divides a certain one, an integer of so many bits, at
    most one prime for thirty of them. Else the point must be a zero (Schwartz and Zippel).

    Args:
        gap: bounds on the difference, with roots as variables.
        radicand: bounds on what the roots are of: each square of a root is replaced by that.
        radicals: independent roots of constants in the coefficients. Each doubles the size of the norm, which is the
            integer.
        squares: the numbers that are squares modulo the primes that are drawn.
    """
    degree, bits, own = gap.degree, gap.bits, 0.0
    if radicand is not None:
        own = radicand.above.bits + radicand.below.bits + radicand.divisor
        bits += degree / 2 * own
        degree = degree * max(1, -(-radicand.above.degree // 2)) + degree // 2 * radicand.below.degree
    dividing = (bits * 2**radicals + own) / (LOWER.bit_length() - 1) + 1
    return math.log2(min(1.0, _ZEROS * degree / LOWER + dividing / count_with(squares)))


def bits_of(logarithms: Sequence[float]) -> int:
    """Whole bits of the sum of chances, given their logarithms."""
    worst = max(logarithms)
    return math.floor(-worst - math.log2(sum(2.0 ** (each - worst) for each in logarithms)))
