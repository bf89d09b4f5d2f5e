"""Arithmetic modulo a prime, on int64 tensors of residues. What is undefined stays undefined.

The prime p is 3 modulo 4, so that -1 is no square: of a number and its negative at most one is a square. A square takes
the place of a positive number. Its *principal* root is the one that is a square itself. As over the positive reals,
the root of a product is the product of the roots; and the root of x * x is x or -x, each for half of all x. What is no
square has no root, as -1.0 has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Powers of no more numbers are taken one by one, which is then faster; and so are this many times as many inverses.
_FEW, _TIMES = 32, 4

#: The residue of what has no value: 1 / 0, the root of what is no square, memory that nobody wrote.
UNDEFINED = -1


class Residues:
    """The field of `p` elements. Every method takes and returns int64 tensors of residues, or UNDEFINED."""

    def __init__(self, p: int) -> None:
        self.p = p
        # While everything is defined, which is nearly always, nothing has to be masked.
        self._all_defined = True

    def undefined(self, *shape: int) -> Tensor:
        self._all_defined = False
        return torch.full(shape, UNDEFINED)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return self._masked((a + b) % self.p, a, b)

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        return self._masked(a * b % self.p, a, b)

    def neg(self, a: Tensor) -> Tensor:
        return self._masked(-a % self.p, a)

    def power(self, a: Tensor, exponent: int) -> Tensor:
        """`a` to a natural power."""
        if exponent == 1:
            return a
        if a.numel() <= _FEW:
            powers = [pow(each, exponent, self.p) for each in a.flatten().tolist()]
            return self._masked(torch.tensor(powers, dtype=torch.int64).reshape(a.shape), a)
        result: Tensor | None = None
        square = a
        while exponent:
            if exponent & 1:
                result = square if result is None else result * square % self.p
            exponent >>= 1
            if exponent:
                square = square * square % self.p
        return self._masked(torch.ones_like(a) if result is None else result, a)

    def inverse(self, a: Tensor) -> Tensor:
        return self._only(a > 0, self.reciprocal(a))

    def reciprocal(self, a: Tensor) -> Tensor:
        """The inverse of defined residues, and zero for zero."""
        if a.numel() > _FEW * _TIMES:
            return self.power(a, self.p - 2)
        inverses = [pow(each, -1, self.p) if each > 0 else 0 for each in a.flatten().tolist()]
        return torch.tensor(inverses, dtype=torch.int64).reshape(a.shape)

    def root(self, a: Tensor) -> Tensor:
        """The principal root."""
        root = self.power(a, (self.p + 1) // 4)
        return self._only((root * root % self.p == a) & (a >= 0), root)

    def only_some(self, a: Tensor, members: Tensor) -> Tensor:
        """`a`, in which what is no member is undefined; all of it, if it does not hold most of `members` and more."""
        if a.numel() <= len(members):
            return a
        found = torch.isin(a, members)
        return a if int(found.sum()) * 2 < len(members) else self._only(found, a)

    def sum(self, a: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
        over = list(dims) or list(range(a.dim()))
        result = a.sum(over, keepdim) % self.p
        if self._all_defined:
            return result
        return torch.where((a < 0).sum(over, keepdim) > 0, UNDEFINED, result)

    def root_of(self, numerator: int, denominator: int) -> int:
        """The principal root of a rational number that has one."""
        return pow(self.fraction(numerator, denominator), (self.p + 1) // 4, self.p)

    def fraction(self, numerator: int, denominator: int) -> int:
        """The residue of a rational number."""
        return numerator * pow(denominator, -1, self.p) % self.p

    def _masked(self, result: Tensor, *operands: Tensor) -> Tensor:
        if self._all_defined:
            return result
        for operand in operands:
            result = torch.where(operand < 0, UNDEFINED, result)
        return result

    def _only(self, condition: Tensor, result: Tensor) -> Tensor:
        if self._all_defined and bool(condition.all()):
            return result
        self._all_defined = False
        return torch.where(condition, result, UNDEFINED)


def random_residues(p: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Uniform up to a part in 2**31: drawn from 62 bits, because 32 of them would favour some residues by half."""
    return torch.randint(0, 1 << 62, tuple(shape), generator=generator) % p
