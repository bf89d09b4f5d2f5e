"""Are two programs one function? Evaluated over random prime fields, where equality is exact.

There are as many fields as it takes to bring the chance of an error below ``2**-WANTED_BITS``, three at least.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import sympy
import torch
from torch import Tensor

from fx_fusion.proof.field.bounds import Polynomial
from fx_fusion.proof.field.chance import bits_of, log2_hidden
from fx_fusion.proof.field.literals import Meant, near_misses
from fx_fusion.proof.field.primes import ALWAYS_SQUARES, is_square, random_prime, unforeseeable
from fx_fusion.proof.field.rule import Relations, agree, check_places, constants, met_in, relate, unknown
from fx_fusion.proof.field.trial import Comparison, NoMeaningAt, Trial, Trials, run
from fx_fusion.proof.field.verdict import DegreeTooHigh, Differs, NotEvaluable, Proved, Refused, Verdict

#: Fields in which every element is compared, at least and at most.
FEWEST, MOST = 3, 12

#: The error bound to be reached, in bits.
WANTED_BITS = 32

#: With more input values than this, one field is computed in after the other, which takes less memory.
_LARGE = 1 << 20

#: Fields that are begun at most: one is given up where a constant of the region has no root.
_ATTEMPTS = 64

#: Independent roots of constants at most.
_MANY_RADICALS = 6


def compare(comparison: Comparison) -> Verdict:
    """Are region and reference one function, wherever the reference is defined?"""
    try:
        return _compare(comparison)
    except Refused as refused:
        return Differs(refused.found, tuple(site for site in refused.sites if site is not None))
    except DegreeTooHigh as error:
        return NotEvaluable(str(error), too_high=True)
    except NoMeaningAt as error:
        return NotEvaluable(str(error), error.sites)


def _compare(comparison: Comparison) -> Proved:
    """Literals are what they are, and only where that fails what they may stand for."""
    first = _Proof(comparison, {})
    try:
        return first.prove()
    except Refused as refused:
        meant = near_misses(first.literals, comparison.never)
        if not meant:
            raise
        try:
            return _Proof(comparison, meant).prove()
        except Refused:
            raise refused from None


@dataclass(frozen=True)
class _Claim:
    """What the first field shows, and how likely it is to be wrong.

    Attributes:
        degree: of a difference.
        hidden: the logarithm of the chance that a difference of the results stays hidden in one field.
        related: the same for each root and divisor, after the logarithm of how many relations it might have.
    """

    relations: Relations
    degree: int
    hidden: float
    related: tuple[tuple[float, float], ...]

    def bits(self, fields: int, *, placed: bool = True) -> int:
        """The error bound after so many fields; `placed` if each element had its place in all of them."""
        related = [choices * (1 if placed else fields) + fields * hidden for choices, hidden in self.related]
        return bits_of([fields * self.hidden, *related])

    @property
    def fields(self) -> int:
        """How many fields it takes. Raises DegreeTooHigh if too many."""
        for count in range(FEWEST, MOST + 1):
            if self.bits(count) >= WANTED_BITS:
                return count
        raise DegreeTooHigh(f"a degree of {self.degree}, for which {MOST} fields are not enough")


class _Proof:
    """One comparison, with one meaning of its literals."""

    def __init__(self, comparison: Comparison, meant: Meant) -> None:
        self.comparison, self.meant = comparison, meant
        self.literals: dict[float, None] = {}
        self._chance = unforeseeable(comparison.text)
        self._generator = torch.Generator().manual_seed(self._chance.getrandbits(63))
        self._roots = [number.value for number in meant.values() if number.is_root]
        self._squares = _primes_of(self._roots) | set(comparison.squares)

    def prove(self) -> Proved:
        """Raises Refused, NoMeaningAt or DegreeTooHigh unless the region is proved."""
        claim: _Claim | None = None
        kept: list[Trial] = []
        compared = torch.tensor(0)
        begun = 0
        while begun < _ATTEMPTS:
            missing = FEWEST if claim is None else max(1, claim.fields - int(compared.min()))
            count = 1 if self.comparison.size > _LARGE else missing
            begun += count
            trials = self._run(count)
            for trial in trials.each:
                relations = relate(trial)
                if self._learns(trial, relations) or (claim and unknown(relations) < unknown(claim.relations)):
                    claim, kept, compared = None, [], torch.tensor(0)
                if not self._admits(trial) or (claim and unknown(relations) > unknown(claim.relations)):
                    continue
                claim = claim or self._claim(trial, relations, trials.gap)
                if not agree(claim.relations, relations):
                    raise Refused("the constants by which the region's roots are multiples of the reference's vary")
                compared = compared + _compare_values(trial)
                kept.append(trial)
            if claim is not None and int(compared.min()) >= claim.fields:
                return self._proved(claim, kept)
        never = int((compared < FEWEST).sum())
        raise Refused(f"{never} of {compared.numel()} results are hardly ever defined in a finite field")

    def _run(self, count: int) -> Trials:
        primes = [random_prime(self._chance, self._squares) for _ in range(count)]
        trials = run(self.comparison, self.meant, primes, self._generator)
        self.literals.update(dict.fromkeys(trials.literals))
        return trials

    def _learns(self, trial: Trial, relations: Relations) -> bool:
        """Are there constants under roots that were not known? Primes are then drawn so that those have their roots."""
        further = _primes_of(constants(trial, relations)) - self._squares
        self._squares |= further
        return not further <= ALWAYS_SQUARES

    def _admits(self, trial: Trial) -> bool:
        """Has every constant under a root its principal root, hence its sign, modulo the trial's prime?"""
        return all(is_square(number, trial.p) for number in self._squares)

    def _claim(self, trial: Trial, relations: Relations, gap: Polynomial) -> _Claim:
        radicand = trial.radicands and trial.radicands.bound
        radicals = len(_odd_primes_of([*constants(trial, relations), *self._roots]))
        if radicals > _MANY_RADICALS:
            raise NoMeaningAt(f"{radicals} independent square roots of literals", None)

        def hidden(difference: Polynomial) -> float:
            return log2_hidden(difference, radicand, radicals, self._squares)

        related = tuple(
            (math.log2(relation.multiple.choices), hidden(relation.difference(met, trial)))
            for relation, met in zip(relations, met_in(trial), strict=True)
            if relation is not None
        )
        return _Claim(relations, gap.degree, hidden(gap), related)

    def _proved(self, claim: _Claim, kept: list[Trial]) -> Proved:
        placed = check_places(claim.relations, kept)
        literals = {literal: str(self.meant[literal]) for literal in self.literals if literal in self.meant}
        return Proved(claim.bits(claim.fields, placed=placed), claim.fields, claim.degree, literals)


def _compare_values(trial: Trial) -> Tensor:
    """1 where both are equal, 0 where the reference is undefined. Raises Refused where they differ."""
    ours, theirs = trial.result, trial.expected
    if not theirs.numel():
        raise Refused("there is no result to be compared")
    if ours.shape != theirs.shape:
        raise Refused(f"the region gives {list(ours.shape)}, the fused operation {list(theirs.shape)}")
    defined = theirs >= 0
    differ = (ours != theirs) & defined
    if bool(differ.any()):
        lost = int((differ & (ours < 0)).sum())
        what = "are not defined where the fused operation is" if lost == int(differ.sum()) else "differ"
        raise Refused(f"{int(differ.sum())} of {int(defined.sum())} results {what}, computed exactly in a finite field")
    return defined.to(torch.int64)


def _primes_of(numbers: Iterable[Fraction]) -> set[int]:
    """All primes in numerators and denominators."""
    terms = {abs(term) for number in numbers for term in (number.numerator, number.denominator)}
    return {prime for term in terms if term > 1 for prime in sympy.primefactors(term)}


def _odd_primes_of(numbers: Iterable[Fraction]) -> set[int]:
    """The primes of which the square roots of `numbers` hold a root."""
    products = {abs(number.numerator * number.denominator) for number in numbers}
    return {
        prime for product in products if product > 1
        for prime, power in sympy.factorint(product).items() if power % 2
    }  # fmt: skip
