"""Random points at which roots exist."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from torch import Tensor

from fx_fusion.proof.field.residues import Residues


def needed_square(eps: float) -> int:
    """What must be a square modulo a prime for :func:`scaled_to_squares`."""
    return Fraction(eps).numerator


def scaled_to_squares(field: Residues, rows: Tensor, eps: float, fresh: Callable[..., Tensor]) -> Tensor:
    """`rows` [..., lanes], each multiplied by a random number s, so that its mean square m plus `eps` is a square.

    The points (s, r) with r² = m s² + eps are a conic: each but one lies on one line through (0, sqrt(eps)), whose
    slope is drawn. So the result is evenly distributed over all such rows, up to parts in 2**30.
    """
    p, exact = field.p, Fraction(eps)
    mean = field.sum(rows * rows % p, [-1], True) * field.fraction(1, rows.shape[-1]) % p
    start = field.root_of(exact.numerator, exact.denominator)
    slope = fresh(*mean.shape)
    scale = slope * (2 * start % p) % p * field.reciprocal((mean - slope * slope) % p) % p
    return rows * scale % p
