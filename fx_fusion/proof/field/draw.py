"""Random points at which roots exist."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from fx_fusion.proof.field.residues import Residues

#: One of two candidates will do: nothing is found once in 2**24.
_CANDIDATES = 24


def scaled_to_squares(field: Residues, rows: Tensor, eps: float, fresh: Callable[..., Tensor]) -> Tensor:
    """`rows` [..., lanes], each multiplied by a random number, so that its mean square plus `eps` is a square.

    Evenly distributed over all such rows, up to parts in 2**30.
    """
    p, exact = field.p, Fraction(eps)
    mean = field.sum(rows * rows % p, [-1], False) * field.fraction(1, rows.shape[-1]) % p
    mean, added = mean.reshape(-1), field.fraction(exact.numerator, exact.denominator)
    scales = fresh(len(mean))
    missing = torch.arange(len(mean))
    for _ in range(_CANDIDATES):
        squares = scales[missing] * scales[missing] % p * mean[missing] % p + added
        missing = missing[field.power(squares % p, (p - 1) // 2) != 1]
        if not len(missing):
            break
        scales[missing] = fresh(len(missing))
    return rows * scales.reshape(*rows.shape[:-1], 1) % p
