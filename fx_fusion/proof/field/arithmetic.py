"""Arithmetic on elements of several fields at once, which know how large they are; roots and divisions are recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from fx_fusion.proof.field.bounds import ONE, VARIABLE, Bound, Polynomial
from fx_fusion.proof.field.literals import Meant, Number, exact
from fx_fusion.proof.field.residues import Residues
from fx_fusion.proof.field.verdict import NoMeaning

#: The largest exponent of a power.
LARGEST_EXPONENT = 64

_EXACT_INTEGER = 2**62


@dataclass(frozen=True)
class Elements:
    """A tensor of numbers: their residues in each field (int64, all of one shape), and bounds on what they are."""

    residues: tuple[Tensor, ...]
    bound: Bound = VARIABLE

    def moved(self, move: Callable[[Tensor], Tensor]) -> Elements:
        return Elements(tuple(map(move, self.residues)), self.bound)


@dataclass(frozen=True)
class Record:
    """What a root was taken of, or what was divided by, and the step of the program that did."""

    elements: Elements
    site: Any


class FieldArithmetic:
    """Arithmetic modulo each of `primes`; `meant` says what literals stand for.

    Of a tensor that holds more than `radicands` (one flat tensor a field), only those have roots: a norm may be taken
    of more heads at once than the result depends on. What does depend on the others is then undefined, and shows.

    Attributes:
        roots: what roots were taken of, in order.
        divisors: what was divided by and depends on an input, in order.
        literals: every float literal that was met.
        site: the step that is being computed, as far as the program tells.
    """

    def __init__(self, primes: Sequence[int], meant: Meant, radicands: Sequence[Tensor] = ()) -> None:
        self._radicands = tuple(radicands)
        self.fields = tuple(map(Residues, primes))
        self.roots: list[Record] = []
        self.divisors: list[Record] = []
        self.literals: dict[float, None] = {}
        self.site: Any = None
        self._meant = meant

    def at(self, site: Any) -> None:
        """What is computed next belongs to this step."""
        self.site = site

    # --- literals -----------------------------------------------------------------------------------------------------

    def number(self, literal: float | int) -> Elements:
        """A scalar. NaN is undefined. Raises NoMeaning for an infinity."""
        if literal != literal:
            return self.undefined()
        if isinstance(literal, float):
            if math.isinf(literal):
                raise NoMeaning("an infinite literal")
            self.literals[literal] = None
        return self._constant(exact(literal, self._meant))

    def reciprocal(self, literal: float | int) -> Elements:
        """One over a literal. Raises NoMeaning for zero."""
        if literal == 0:
            raise NoMeaning("a division by zero")
        self.number(literal)
        return self._constant(exact(literal, self._meant).reciprocal)

    def tensor(self, values: Tensor) -> Elements:
        """A tensor of literals: of floats, integers or truth values."""
        if _is_whole(values):
            whole = values.to(torch.int64)
            largest = int(whole.abs().max()) if whole.numel() else 0
            bound = Bound(Polynomial(0, _log2(largest), 0))
            return Elements(tuple(whole % field.p for field in self.fields), bound)
        distinct, places = values.to(torch.float64).unique(return_inverse=True)
        numbers = [self.number(value) for value in distinct.tolist()]
        residues = zip(*(each.residues for each in numbers), strict=True)
        return Elements(tuple(torch.stack(each)[places] for each in residues), joined([each.bound for each in numbers]))

    def undefined(self, *shape: int) -> Elements:
        return Elements(tuple(field.undefined(*shape) for field in self.fields), Bound(ONE))

    def _constant(self, number: Number) -> Elements:
        above, below = number.value.numerator, number.value.denominator
        residues = tuple(torch.tensor(field.fraction(above, below)) for field in self.fields)
        two = (below & -below).bit_length() - 1
        bound = Bound(Polynomial(0, _log2(above) - two, two), divisor=_log2(below >> two))
        if not number.is_root:
            return Elements(residues, bound)
        roots = tuple(field.root(each) for field, each in zip(self.fields, residues, strict=True))
        root = Elements(roots, bound.root())
        return root if number.sign > 0 else self.neg(root)

    # --- arithmetic ---------------------------------------------------------------------------------------------------

    def add(self, a: Elements, b: Elements) -> Elements:
        return Elements(
            tuple(field.add(x, y) for field, x, y in zip(self.fields, a.residues, b.residues, strict=True)),
            a.bound + b.bound,
        )

    def sub(self, a: Elements, b: Elements) -> Elements:
        return self.add(a, self.neg(b))

    def neg(self, a: Elements) -> Elements:
        return replace(a, residues=tuple(field.neg(x) for field, x in zip(self.fields, a.residues, strict=True)))

    def mul(self, a: Elements, b: Elements) -> Elements:
        return Elements(
            tuple(field.mul(x, y) for field, x, y in zip(self.fields, a.residues, b.residues, strict=True)),
            a.bound * b.bound,
        )

    def inverse(self, a: Elements) -> Elements:
        if not a.bound.is_constant:
            self.divisors.append(Record(a, self.site))
        residues = tuple(field.inverse(x) for field, x in zip(self.fields, a.residues, strict=True))
        return Elements(residues, a.bound.inverse())

    def root(self, a: Elements) -> Elements:
        a = self._among_radicands(a)
        self.roots.append(Record(a, self.site))
        residues = tuple(field.root(x) for field, x in zip(self.fields, a.residues, strict=True))
        return Elements(residues, a.bound.root())

    def _among_radicands(self, a: Elements) -> Elements:
        if not self._radicands or a.bound.is_constant:
            return a
        kept = [field.only_some(x, of) for field, x, of in zip(self.fields, a.residues, self._radicands, strict=True)]
        return replace(a, residues=tuple(kept))

    def power(self, a: Elements, exponent: float | int) -> Elements:
        """`a` to a power that is a multiple of one half."""
        halves = 2 * exponent
        if halves != int(halves) or abs(exponent) > LARGEST_EXPONENT:
            raise NoMeaning(f"a power of {exponent}")
        count = abs(int(halves))
        base, count = (a, count // 2) if count % 2 == 0 else (self.root(a), count)
        base = self.inverse(base) if exponent < 0 else base
        residues = tuple(field.power(x, count) for field, x in zip(self.fields, base.residues, strict=True))
        return Elements(residues, base.bound**count)

    def sum(self, a: Elements, dims: list[int], keepdim: bool) -> Elements:
        residues = tuple(field.sum(x, dims, keepdim) for field, x in zip(self.fields, a.residues, strict=True))
        return Elements(residues, a.bound.total(_summed(a.residues[0], residues[0])))

    def mean(self, a: Elements, dims: list[int], keepdim: bool) -> Elements:
        result = self.sum(a, dims, keepdim)
        count = _summed(a.residues[0], result.residues[0])
        if count == 0:
            raise NoMeaning("a mean of nothing")
        return self.mul(result, self._constant(Number(Fraction(1, count))))


def joined(bounds: Sequence[Bound]) -> Bound:
    """One bound for all of several."""
    bound = bounds[0]
    for each in bounds[1:]:
        bound = bound.joined(each)
    return bound


def _is_whole(values: Tensor) -> bool:
    if not values.is_floating_point():
        return True
    return bool(((values == values.trunc()) & (values.abs() < _EXACT_INTEGER)).all())


def _summed(before: Tensor, after: Tensor) -> int:
    """How many elements went into each."""
    return before.numel() // after.numel() if after.numel() else 0


def _log2(number: int) -> float:
    return math.log2(abs(number)) if number else 0.0
