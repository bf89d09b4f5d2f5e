"""How large is what an element is a residue of? From that follows how likely two different functions look equal.

Each element of a tensor is a fraction of two polynomials, in the region's inputs and in the roots, whose coefficients
are integers over powers of two (every literal is, and two divides no prime that is drawn). Their degree says how often
a difference vanishes at a random point; the size of their coefficients how many primes divide all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fx_fusion.proof.field.verdict import DegreeTooHigh

#: No region is compared whose elements have a higher degree.
LARGEST_DEGREE = 1 << 16


@dataclass(frozen=True)
class Polynomial:
    """Bounds on a polynomial.

    Attributes:
        degree: total degree; each root counts as one variable more.
        magnitude: the logarithm (to 2) of the sum of its coefficients' magnitudes.
        scale: its coefficients times ``2**scale`` are integers.
    """

    degree: int
    magnitude: float
    scale: int

    def __post_init__(self) -> None:
        if self.degree > LARGEST_DEGREE:
            raise DegreeTooHigh(f"a degree of {self.degree}, above {LARGEST_DEGREE}")

    @property
    def bits(self) -> float:
        """Of the sum of its coefficients' magnitudes, once they are integers."""
        return max(0.0, self.magnitude + self.scale)

    def __mul__(self, other: Polynomial) -> Polynomial:
        return Polynomial(
            self.degree + other.degree, self.magnitude + other.magnitude, self.scale + other.scale
        )  # fmt: skip

    def __pow__(self, exponent: int) -> Polynomial:
        return Polynomial(self.degree * exponent, self.magnitude * exponent, self.scale * exponent)

    def __add__(self, other: Polynomial) -> Polynomial:
        magnitude = max(self.magnitude, other.magnitude) + 1
        return Polynomial(max(self.degree, other.degree), magnitude, max(self.scale, other.scale))

    def times(self, bits: float) -> Polynomial:
        """Times a number of this magnitude."""
        return replace(self, magnitude=self.magnitude + bits) if bits else self

    def widest(self, other: Polynomial) -> Polynomial:
        """Bounds on either."""
        magnitude = max(self.magnitude, other.magnitude)
        return Polynomial(max(self.degree, other.degree), magnitude, max(self.scale, other.scale))


ONE = Polynomial(0, 0.0, 0)


@dataclass(frozen=True)
class Bound:
    """Bounds on each element of a tensor: it is ``above / (divisor * below)``.

    Attributes:
        above, below: each element has its own.
        divisor: bits of an integer that all elements have in common, so that sums over them do not multiply it.
    """

    above: Polynomial
    below: Polynomial = ONE
    divisor: float = 0.0

    @property
    def is_constant(self) -> bool:
        """Is it the same whatever the inputs are?"""
        return self.above.degree == 0 and self.below.degree == 0

    def __mul__(self, other: Bound) -> Bound:
        return Bound(self.above * other.above, self.below * other.below, self.divisor + other.divisor)

    def __add__(self, other: Bound) -> Bound:
        mine = (self.above * other.below).times(other.divisor)
        theirs = (other.above * self.below).times(self.divisor)
        return Bound(mine + theirs, self.below * other.below, self.divisor + other.divisor)

    def __pow__(self, exponent: int) -> Bound:
        return Bound(self.above**exponent, self.below**exponent, self.divisor * exponent)

    def inverse(self) -> Bound:
        return Bound(self.below.times(self.divisor), self.above)

    def total(self, count: int) -> Bound:
        """Of the sum of `count` elements."""
        above = (self.above * self.below ** (count - 1)).times(math.log2(count)) if count > 1 else self.above
        return Bound(above, self.below**count, self.divisor)

    def root(self) -> Bound:
        """Of the square root: a variable of its own times the root of a constant; or that of a constant alone."""
        if not self.is_constant:
            return Bound(Polynomial(1, _CONSTANT_BITS, 0), divisor=_CONSTANT_BITS)
        # The root of a / (q b) is that of a b q, an algebraic integer, over b q.
        magnitude = (self.above.magnitude + self.below.magnitude + self.divisor) / 2
        scale = (self.above.scale + self.below.scale + 1) // 2
        return Bound(Polynomial(0, magnitude, scale), self.below, self.divisor)

    def joined(self, other: Bound) -> Bound:
        """Of a tensor that holds elements of both."""
        if self == other:
            return self
        above = self.above.times(other.divisor).widest(other.above.times(self.divisor))
        return Bound(above, self.below.widest(other.below), self.divisor + other.divisor)

    def difference(self, other: Bound) -> Polynomial:
        """Of the polynomial that is zero exactly where both are equal."""
        return (self + other).above


#: Of each term of the constant by which the argument of a root is a multiple of the reference's.
LARGEST_TERM = 1 << 14
_CONSTANT_BITS = 14.0

#: An input.
VARIABLE = Bound(Polynomial(1, 0.0, 0))
