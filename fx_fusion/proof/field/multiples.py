"""Residues that are a constant times others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from fx_fusion.proof.field.bounds import LARGEST_TERM

#: Members of a base that a single value is tried against.
_MANY = 4096


@dataclass(frozen=True)
class Multiple:
    """Each value is `constant` times a member of a base of `size` members."""

    constant: Fraction
    size: int

    @property
    def choices(self) -> float:
        """How many statements of this kind, no more complicated, could be made of one value: that many might hold by
        chance.
        """
        return self.size * (1.0 if self.constant == 1 else 8.0 * self.term**2)

    @property
    def term(self) -> int:
        """The larger term of the constant."""
        return _larger_term(self.constant)


def _larger_term(fraction: Fraction) -> int:
    return max(abs(fraction.numerator), fraction.denominator)


def find_multiple(values: Tensor, base: Tensor, p: int) -> Multiple | None:
    """The simplest constant by which all `values` are multiples of members of `base`, modulo `p`.

    The constant is a fraction with terms up to LARGEST_TERM, or there is none. The order and the number of values do
    not matter. Undefined residues are left out.
    """
    values, base = values[values >= 0], base[base > 0]
    if not len(values) or not len(base):
        return None
    if bool(torch.isin(values, base).all()):
        return Multiple(Fraction(1), len(base))
    size, values, base = len(base), values.unique(), base.unique()
    for constant in _constants(values, base, p):
        if bool(torch.isin(_divided(values, constant, p), base).all()):
            return Multiple(constant, size)
    return None


def small_fraction(residue: int, p: int) -> Fraction | None:
    """The fraction with terms up to LARGEST_TERM of this residue: there is one at most."""
    a, b, u, v = p, residue, 0, 1
    while b > LARGEST_TERM:
        quotient = a // b
        a, b, u, v = b, a - quotient * b, v, u - quotient * v
    return Fraction(b, v) if v and abs(v) <= LARGEST_TERM else None


def belong(values: Sequence[Tensor], bases: Sequence[Tensor], constant: Fraction, primes: Sequence[int]) -> bool:
    """Is each element of `values` the same multiple of the same member of `bases` in every field?

    One tensor of residues a field, of as many elements each. Members are told apart by all their residues together.
    """
    here = torch.zeros(values[0].numel(), dtype=torch.int64)
    there = torch.zeros(bases[0].numel(), dtype=torch.int64)
    for residues, base, p in zip(values, bases, primes, strict=True):
        mine = (here << 31) + _divided(residues.reshape(-1), constant, p)
        names = torch.cat([mine, (there << 31) + base.reshape(-1)]).unique(return_inverse=True)[1]
        here, there = names[: len(here)], names[len(here) :]
    return bool(torch.isin(here, there).all())


def _divided(values: Tensor, constant: Fraction, p: int) -> Tensor:
    if constant == 1:
        return values
    return values * (pow(constant.numerator, -1, p) * constant.denominator % p) % p


def _constants(values: Tensor, base: Tensor, p: int) -> list[Fraction]:
    """What may be the constant, the simplest first: by which the first value is a multiple of a member of which, by the
    same constant, the last value has one too.
    """
    ratio = int(values[-1]) * pow(int(values[0]), -1, p) % p if int(values[0]) else 0
    partners = base[torch.isin(base * ratio % p, base)][:_MANY]
    inverses = [pow(each, -1, p) for each in partners.tolist()]
    found = {constant for each in inverses if (constant := small_fraction(int(values[0]) * each % p, p))}
    return sorted(found, key=_larger_term)
