"""What an exact comparison may find."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class NoMeaning(Exception):
    """There is no such operation in a finite field. The message says which."""


class DegreeTooHigh(NoMeaning):
    """The degree is beyond what a few random points can tell."""


class Refused(Exception):
    """The region is not the reference. `sites` are the steps that show it, as far as they are known."""

    def __init__(self, found: str, sites: tuple[Any, ...] = ()) -> None:
        super().__init__(found)
        self.found, self.sites = found, sites


@dataclass(frozen=True)
class Proved:
    """Region and reference are one function over the reals, wherever the reference is defined.

    Attributes:
        bits: a region that is another function gets this verdict with a chance below ``2**-bits``.
        trials: in how many random fields every element was compared.
        degree: a bound on the degree of what would be a difference.
        literals: literals of the region that stand for other numbers, and for which.
    """

    bits: int
    trials: int
    degree: int
    literals: Mapping[float, str] = field(default_factory=dict[float, str])


@dataclass(frozen=True)
class Differs:
    """They are two functions, or the region is not defined where the reference is.

    Attributes:
        sites: the steps of the region that show it, if any does.
    """

    found: str
    sites: tuple[Any, ...] = ()


@dataclass(frozen=True)
class NotEvaluable:
    """The region cannot be evaluated in a field.

    Attributes:
        what: an operation without a meaning there; or why evaluating would tell nothing, if `too_high`.
        sites: the step of the region that holds it, if it is known.
        too_high: the degree is too high for a comparison at random points.
    """

    what: str
    sites: tuple[Any, ...] = ()
    too_high: bool = False


Verdict = Proved | Differs | NotEvaluable
