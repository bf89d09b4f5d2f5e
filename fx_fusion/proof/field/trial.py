"""Two programs run in several fields, at one random point of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fx_fusion.proof.field.arithmetic import Elements, FieldArithmetic, joined
from fx_fusion.proof.field.bounds import Bound, Polynomial
from fx_fusion.proof.field.interpreter import Over
from fx_fusion.proof.field.literals import Meant
from fx_fusion.proof.field.residues import Residues, random_residues
from fx_fusion.proof.field.tensor import FieldTensor
from fx_fusion.proof.field.verdict import DegreeTooHigh, NoMeaning

Inputs = Mapping[Any, Tensor]

At = Callable[[Any], None]
"""Told of each step of the region before it is computed."""

Fresh = Callable[..., Tensor]
"""Random residues of a shape."""


class NoMeaningAt(NoMeaning):
    """An operation without a meaning, and the step that holds it."""

    def __init__(self, what: str, site: Any) -> None:
        super().__init__(what)
        self.sites = () if site is None else (site,)


@dataclass(frozen=True)
class Comparison:
    """What is to be compared.

    Attributes:
        region: computes a float tensor from the inputs; calls its second argument with each step.
        reference: computes one of the same shape. Each element that it takes a root of depends on inputs of its own
            (the lanes of one head): the error bound rests on that.
        shapes: of each input.
        prepare: may replace random inputs, so that the reference has its roots; or None.
        squares: positive integers that must be squares modulo every prime, for `prepare`.
        never: literals that stand for nothing but themselves.
        text: tells the region from others; the primes depend on it.
    """

    region: Callable[[Inputs, At], Tensor]
    reference: Callable[[Inputs], Tensor]
    shapes: Mapping[Any, Sequence[int]]
    prepare: Callable[[Residues, dict[Any, Tensor], Fresh], None] | None = None
    squares: Collection[int] = ()
    never: Collection[float] = ()
    text: str = ""

    @property
    def size(self) -> int:
        """Values of all inputs together."""
        return sum(math.prod(shape) for shape in self.shapes.values())


@dataclass(frozen=True)
class Met:
    """What a program takes a root of, or divides by, at one step: residues, flat, in one field."""

    residues: Tensor
    bound: Bound
    site: Any


@dataclass(frozen=True)
class Trial:
    """Both programs in the field of `p` elements, and what they met on the way."""

    p: int
    roots: tuple[Met, ...]
    divisors: tuple[Met, ...]
    radicands: Met | None
    """All that the reference takes roots of."""
    reference_divisors: Met | None
    result: Tensor
    expected: Tensor


@dataclass(frozen=True)
class Trials:
    """
    Attributes:
        each: one a prime.
        gap: bounds on the difference of the results.
        literals: the literals that the region holds.
    """

    each: list[Trial]
    gap: Polynomial
    literals: tuple[float, ...]


def run(comparison: Comparison, meant: Meant, primes: Sequence[int], generator: torch.Generator) -> Trials:
    """Run both programs modulo each of `primes`, on the same random inputs.

    Raises:
        NoMeaningAt: the region holds an operation without a meaning.
        DegreeTooHigh: it is of too high a degree.
    """
    inputs = _draw(comparison, primes, generator)
    reference = FieldArithmetic(primes, {})
    with torch.no_grad():
        with Over(reference):
            expected = comparison.reference(inputs)
        region = FieldArithmetic(primes, meant, _radicands(reference))
        try:
            with Over(region):
                result = comparison.region(inputs, region.at)
        except DegreeTooHigh:
            raise
        except NoMeaning as error:
            raise NoMeaningAt(str(error), region.site) from error
    ours, theirs = _elements(region, result), _elements(reference, expected)
    trials = [_trial(i, region, reference, ours, theirs) for i in range(len(primes))]
    return Trials(trials, ours.bound.difference(theirs.bound), tuple(region.literals))


def _draw(comparison: Comparison, primes: Sequence[int], generator: torch.Generator) -> dict[Any, Tensor]:
    drawn: list[dict[Any, Tensor]] = []
    for p in primes:

        def fresh(*shape: int, p: int = p) -> Tensor:
            return random_residues(p, shape, generator)

        values = {name: fresh(*shape) for name, shape in comparison.shapes.items()}
        if comparison.prepare is not None:
            comparison.prepare(Residues(p), values, fresh)
        drawn.append(values)
    return {name: FieldTensor(Elements(tuple(values[name] for values in drawn))) for name in comparison.shapes}


def _radicands(reference: FieldArithmetic) -> list[Tensor]:
    """All that the reference takes roots of, in each field."""
    if not reference.roots:
        return []
    held = zip(*(record.elements.residues for record in reference.roots), strict=True)
    return [torch.cat([residues.reshape(-1) for residues in each]) for each in held]


def _elements(field: FieldArithmetic, value: Tensor) -> Elements:
    return value.parts[0] if isinstance(value, FieldTensor) else field.tensor(value)


def _trial(i: int, region: FieldArithmetic, reference: FieldArithmetic, ours: Elements, theirs: Elements) -> Trial:
    def met(records: Sequence[Any]) -> tuple[Met, ...]:
        return tuple(Met(r.elements.residues[i].reshape(-1), r.elements.bound, r.site) for r in records)

    return Trial(
        region.fields[i].p,
        met(region.roots),
        met(region.divisors),
        _all_of(met(reference.roots)),
        _all_of(met(reference.divisors)),
        ours.residues[i],
        theirs.residues[i],
    )


def _all_of(met: Sequence[Met]) -> Met | None:
    if not met:
        return None
    return Met(torch.cat([each.residues for each in met]), joined([each.bound for each in met]), None)
