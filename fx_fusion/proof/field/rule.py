"""The rule on roots and divisors: the region takes roots of, and divides by, what the reference does, up to constants.

Evaluation alone is not enough. ``sqrt(y * y) / y`` is a sign, and twenty of them multiplied are 1 at nearly every
random point; ``S / (S + 1e-35)`` is 1 up to what no float64 shows, and nothing where S is zero. So each root of the
region must be of a positive constant times what the reference takes a root of, and each divisor a constant times that,
or times its root, or times a divisor of the reference. Then the region is defined wherever the reference is, and both
lie in one field extension, where a difference is a polynomial.

Elements are compared by value: to which of the reference's an element belongs is found in the first field, and must be
so in all.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from fx_fusion.proof.field.bounds import LARGEST_TERM, ONE, Bound, Polynomial
from fx_fusion.proof.field.multiples import Multiple, belong, find_multiple
from fx_fusion.proof.field.residues import UNDEFINED
from fx_fusion.proof.field.trial import Met, Trial
from fx_fusion.proof.field.verdict import Refused


class Of(enum.Enum):
    """What a root is taken of, or a divisor is, up to a constant."""

    DIVISOR = "a divisor of the reference"
    RADICAND = "what the reference takes a root of"
    ROOT = "a root of the reference: the square is what it takes a root of"
    ONE = "one"


_UNIT = Met(torch.ones(1, dtype=torch.int64), Bound(ONE), None)
_CONSTANT = Bound(Polynomial(0, LARGEST_TERM.bit_length() - 1.0, 0), divisor=LARGEST_TERM.bit_length() - 1.0)


@dataclass(frozen=True)
class Relation:
    """What a root or a divisor of the region is to the reference."""

    of: Of
    multiple: Multiple

    def difference(self, met: Met, trial: Trial) -> Polynomial:
        """Of what vanishes if the relation holds."""
        mine = met.bound * met.bound if self.of is Of.ROOT else met.bound
        return mine.difference(_base(trial, self.of).bound * _CONSTANT)


Relations = tuple["Relation | None", ...]
"""Of all roots, then all divisors; None for what is undefined altogether, and so is what comes of it."""


def met_in(trial: Trial) -> tuple[Met, ...]:
    return (*trial.roots, *trial.divisors)


def constants(trial: Trial, relations: Relations) -> list[Fraction]:
    """The positive numbers whose square roots the region holds."""
    return [relation.multiple.constant for relation in relations[: len(trial.roots)] if relation is not None]


def unknown(relations: Relations) -> int:
    """How many roots and divisors are undefined."""
    return sum(relation is None for relation in relations)


def agree(one: Relations, other: Relations) -> bool:
    """Are these the same relations? (How many members a base has is chance.)"""
    return [_said(relation) for relation in one] == [_said(relation) for relation in other]


def _said(relation: Relation | None) -> tuple[Of, Fraction] | None:
    return None if relation is None else (relation.of, relation.multiple.constant)


def relate(trial: Trial) -> Relations:
    """The relations that hold in one field. Raises Refused for a root or a divisor that has none."""
    return (*map(_root, trial.roots, [trial] * len(trial.roots)), *(_divisor(met, trial) for met in trial.divisors))


def _root(met: Met, trial: Trial) -> Relation | None:
    if _is_undefined(met):
        return None
    relation = _relation(met, trial, [Of.ONE if met.bound.is_constant else Of.RADICAND])
    if relation is None:
        found = "the region takes a root of what is no constant times anything that the fused operation takes a root of"
        raise Refused(found, (met.site,))
    if relation.multiple.constant < 0:
        raise Refused("the region takes a root of what is negative", (met.site,))
    return relation


def _divisor(met: Met, trial: Trial) -> Relation | None:
    if _is_undefined(met):
        return None
    relation = _relation(met, trial, [Of.DIVISOR, Of.RADICAND, Of.ROOT])
    if relation is None:
        found = "the region divides by what is no constant times anything that the fused operation divides by"
        raise Refused(found, (met.site,))
    return relation


def _is_undefined(met: Met) -> bool:
    return bool((met.residues < 0).all())


def _relation(met: Met, trial: Trial, kinds: Sequence[Of]) -> Relation | None:
    """The simplest: modulo one prime the root of 27 may look like a fraction too, if hardly ever like a simple one."""
    found: list[Relation] = []
    for of in kinds:
        multiple = find_multiple(_values(met, of, trial.p), _base(trial, of).residues, trial.p)
        if multiple is not None:
            found.append(Relation(of, multiple))
            if multiple.constant == 1:
                break
    return min(found, key=lambda relation: relation.multiple.term, default=None)


def _values(met: Met, of: Of, p: int) -> Tensor:
    """The residues that are multiples of the base."""
    residues = met.residues
    return torch.where(residues < 0, UNDEFINED, residues * residues % p) if of is Of.ROOT else residues


def _base(trial: Trial, of: Of) -> Met:
    held = {Of.DIVISOR: trial.reference_divisors, Of.RADICAND: trial.radicands, Of.ROOT: trial.radicands}.get(of)
    if held is not None:
        return held
    return _UNIT if of is Of.ONE else _NOTHING


_NOTHING = Met(torch.empty(0, dtype=torch.int64), Bound(ONE), None)


def check_places(relations: Relations, trials: Sequence[Trial]) -> bool:
    """Does each element belong to the same one of the reference's in all fields? Raises Refused if not.

    False if some elements are undefined in some of the fields: of those only each field by itself was asked.
    """
    whole = True
    primes = [trial.p for trial in trials]
    for relation, *met in zip(relations, *map(met_in, trials), strict=True):
        if relation is None:
            continue
        values = torch.stack([_values(each, relation.of, p) for each, p in zip(met, primes, strict=True)])
        defined = values >= 0
        everywhere = defined.all(0)
        whole = whole and bool((defined.any(0) == everywhere).all())
        bases = [_base(trial, relation.of).residues for trial in trials]
        if not belong(list(values[:, everywhere]), bases, relation.multiple.constant, primes):
            raise Refused("a root or a divisor of the region belongs now to one head, now to another", (met[0].site,))
    return whole
