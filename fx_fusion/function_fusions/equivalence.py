"""Do a region of a graph and a user's pattern compute the same function?

Samples prove identity between analytic functions only. A pattern may hold steps that are not analytic, or that nobody
outside can look into: a clamp, a maximum, a store, a custom operation. Such a step is *free*: all that is assumed of it
is that equal arguments give equal results. What a free step gives is a fresh random value, the same on both sides where
the operation is the same and its arguments are equal. So a clamp that random data never reaches does not slip through,
on neither side; and a step that one side has alone does no harm where the result does not depend on it, as on the
maximum that a softmax subtracts.

Between free steps, four rules make agreement on samples agreement everywhere: the arguments of roots are those of the
other side's roots up to one constant factor (``sqrt(x * x)`` can spell a clamp); so is whatever is divided by, factor
by factor, unless it is positive as a sum of exponentials is (``s / s`` and ``s / (s + 1e-30)`` are 1 almost
everywhere); a logarithm is of something positive in this sense, or a free step; and nothing turns so steeply that no
sample lies where it does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.function_fusions.domain import TOLERANCE, Domain, Values
from fx_fusion.function_fusions.equivalences import COMMUTES
from fx_fusion.function_fusions.misses import Miss
from fx_fusion.function_fusions.steps import Kind, Step, arguments_of, divisors, factors, is_free, radicand, schedule
from fx_fusion.graph.sizes import Sizes
from fx_fusion.graph.torch_compat import pytree

#: Kinds of steps that may turn from one value to another within a little of their argument, and how far the argument
#: may move where ordinary input moves by a thousandth.
_TURNING = frozenset({"exponential", "error function", "trigonometric"})
_STEEP = 100.0


@dataclass
class Side:
    """A graph between `inputs` and `results`: the region, or the pattern.

    Attributes:
        inputs: which parameters a step is; several where one tensor is given for several.
        steps: all steps between, each after what it needs.
        free: those of them that are free.
        roots: what roots are taken of, unless it is positive as a sum of exponentials is.
        zeros: what is divided by, factor by factor.
        numbers: what stands for a number that is written in the graph.
    """

    inputs: Mapping[Step, str]
    results: Sequence[Step]
    sizes: Sizes
    steps: list[Step]
    free: list[Step]
    roots: list[Step] = field(default_factory=list[Step])
    zeros: list[Step] = field(default_factory=list[Step])
    numbers: Mapping[float, float] = field(default_factory=dict[float, float])

    def number(self, value: Any) -> Any:
        """`value`, or what stands for it."""
        return self.numbers.get(value, value) if type(value) is float else value

    @staticmethod
    def of(inputs: Mapping[Step, str], results: Sequence[Step], sizes: Sizes, floor: torch.dtype) -> Side:
        """
        Raises:
            Decline: ``proof.not_analytic`` for a step that is no function of values.
        """
        steps = schedule(results, inputs)
        for step in steps:
            if step.kind in (Kind.BY_STRIDES, Kind.RANDOM):
                what = "reads memory by strides" if step.kind is Kind.BY_STRIDES else "draws random numbers"
                raise Miss("proof.not_analytic", f"{{0}} ({step.target}) {what}", [step.node])
        free = [step for step in steps if is_free(step, floor)]
        kept = set(free)
        computed = [step for step in steps if step not in kept and step.kind is not Kind.LITERAL]
        roots = [radicand(step) for step in computed if step.kind is Kind.ROOT and factors(step.args[0])]
        zeros = [factor for step in computed for factor in divisors(step)]
        return Side(inputs, results, sizes, steps, free, list(dict.fromkeys(roots)), list(dict.fromkeys(zeros)))


class Comparison:
    """One region beside one pattern. What of the region is what of the pattern is settled at the first sample, and must
    hold at all others.
    """

    def __init__(self, region: Side, pattern: Side) -> None:
        self.region, self.pattern = region, pattern
        self._names = [step.name for step in pattern.free]
        self._counterparts: dict[Step, Step | None] = {}
        self._constants: dict[tuple[Step, str], tuple[Step, float]] = {}
        #: Results of which some sample gave a value on both sides.
        self.told: set[int] = set()

    def difference(self, values: Values, domain: Domain) -> tuple[float, Node]:
        """The largest relative difference between results, for `values` of the inputs, and which result shows it.

        Raises:
            Decline: ``proof.not_analytic`` where the results differ and a free step has no counterpart, or where they
                do not and a root or a divisor has none; ``region.evaluation``, ``region.too_large``.
        """
        region, pattern = _Run(self.region, values, domain), _Run(self.pattern, values, domain)
        self._run(region, pattern)
        worst, where = 0.0, self.region.results[0].node
        for i, (mine, theirs) in enumerate(zip(self.region.results, self.pattern.results, strict=True)):
            actual, expected = region.known[mine], pattern.known[theirs]
            if domain.tells(actual, expected):
                self.told.add(i)
            found = domain.differ(actual, expected)
            if not found <= worst:
                worst, where = found, mine.node
        if not worst < TOLERANCE:
            self._blame(region)
            return worst, where
        self._match(region, pattern, "root", self.region.roots, self.pattern.roots)
        self._match(pattern, region, "root", self.pattern.roots, self.region.roots)
        self._match(region, pattern, "zero", self.region.zeros, self.pattern.zeros)
        self._match(pattern, region, "zero", self.pattern.zeros, self.region.zeros)
        return worst, where

    def check_steepness(self, values: Values, moved: Values, domain: Domain) -> None:
        """Between `values` and `moved`, nearby, no exponential, sine or the like may turn: samples would miss where.

        Raises:
            Decline: ``proof.not_analytic``.
        """
        region, pattern = _Run(self.region, values, domain), _Run(self.pattern, values, domain)
        self._run(region, pattern)
        for run in (region, pattern):
            again = _Run(run.side, moved, domain)
            again.known.update((step, run.known[step]) for step in run.side.free if step in run.known)
            for step in run.side.steps:
                again.value(step)
                if step.rare not in _TURNING or step in run.side.free:
                    continue
                argument = next(parent for parent in step.parents)
                if domain.distance(run.known[argument], again.known[argument]) > _STEEP:
                    found = f"({step.target}) turns where ordinary input moves by a thousandth: samples cannot prove it"
                    mine = run is region
                    node, name = (step.node, "{0}") if mine else (self.region.results[0].node, "a step of the pattern")
                    raise Miss("proof.not_analytic", f"{name} {found}", [node])

    def _run(self, region: _Run, pattern: _Run) -> None:
        free = set(self.region.free)
        for step in self.region.steps:
            if step in free:
                self._settle(step, region, pattern)
            else:
                region.compute(step)
        for result in self.pattern.results:
            pattern.value(result)

    def _settle(self, step: Step, region: _Run, pattern: _Run) -> None:
        if step not in self._counterparts:
            self._counterparts[step] = self._find(step, region, pattern)
        theirs = self._counterparts[step]
        if theirs is None:
            region.known[step] = region.fresh(step)
            return
        if not _same_arguments(step, theirs, region, pattern):
            raise self._alone(step, same=True)
        region.known[step] = pattern.value(theirs)

    def _find(self, step: Step, region: _Run, pattern: _Run) -> Step | None:
        same = [theirs for theirs, name in zip(self.pattern.free, self._names, strict=True) if name == step.name]
        for settled in (True, False):
            for theirs in same:
                ready = all(pattern.is_ready(parent) for parent in theirs.parents)
                if ready is settled and _same_arguments(step, theirs, region, pattern):
                    return theirs
        return None

    def _blame(self, region: _Run) -> None:
        """Where results differ, a step without a counterpart tells more than the difference."""
        alone = [step for step in self.region.free if self._counterparts[step] is None]
        if alone:
            names = [step.name for step in self.pattern.free]
            raise self._alone(alone[0], same=alone[0].name in names)

    def _alone(self, step: Step, same: bool) -> Decline:
        target = step.node.target if isinstance(step.target, str) else step.target
        found = f"{{0}} ({target}) is a step that samples cannot prove, and the pattern has no such step"
        return Miss("proof.not_analytic", found + (" on equal arguments" if same else ""), [step.node])

    def _match(self, mine: _Run, other: _Run, what: str, steps: Sequence[Step], theirs: Sequence[Step]) -> None:
        """Each of `steps` is one constant times one of `theirs`, always the same where a sample tells."""
        for step in steps:
            key = (step, what)
            if key in self._constants:
                known, constant = self._constants[key]
                ratio = mine.domain.ratio(mine.known[step], other.known[known])
                if ratio is not None and abs(ratio - constant) > 1e-6 * abs(constant):
                    raise self._unlike(step, what, mine)
                continue
            for each in theirs:
                ratio = mine.domain.ratio(mine.known[step], other.known[each])
                if ratio is not None and (what == "zero" or ratio > 0):
                    self._constants[key] = (each, ratio)
                    break
            else:
                raise self._unlike(step, what, mine)

    def _unlike(self, step: Step, what: str, mine: _Run) -> Decline:
        does = "takes a root of" if what == "root" else "divides by"
        if mine.side is self.region:
            found = f"the region {does} {{0}}, the pattern {does} nothing that is a constant times it"
            return Miss("proof.not_analytic", found, [step.node])
        found = f"the pattern {does} {step.node.target}, and {{0}} does not"
        return Miss("proof.not_analytic", found, [self.region.results[0].node])


class _Run:
    """Values of one side for one sample."""

    def __init__(self, side: Side, values: Values, domain: Domain) -> None:
        self.side, self.domain = side, domain
        self.known: dict[Step, Any] = {step: values[name] for step, name in side.inputs.items()}
        self._free = set(side.free)

    def fresh(self, step: Step) -> Any:
        return self.domain.fresh(step.value, self.side.sizes)

    def compute(self, step: Step) -> None:
        self.known[step] = self.domain.run(step, self.known.__getitem__, self.side.sizes, self.side.number)

    def is_ready(self, step: Step) -> bool:
        """Are all free steps that it depends on settled?"""
        return not any(each in self._free for each in schedule([step], self.known))

    def value(self, step: Step) -> Any:
        """Free steps that are not settled yet are given a value of their own."""
        for each in schedule([step], self.known):
            if each in self._free:
                self.known[each] = self.fresh(each)
            else:
                self.compute(each)
        return self.known[step]


def _same_arguments(mine: Step, theirs: Step, region: _Run, pattern: _Run) -> bool:
    ours, others = arguments_of(mine), arguments_of(theirs)
    if mine.target in COMMUTES and _same_trees(mine.args, theirs.args[::-1], region, pattern):
        return True
    return _same_trees(ours, others, region, pattern)


def _same_trees(ours: Any, others: Any, region: _Run, pattern: _Run) -> bool:
    a, spec = pytree.tree_flatten(ours)
    b, other_spec = pytree.tree_flatten(others)
    return spec == other_spec and all(_same(x, y, region, pattern) for x, y in zip(a, b, strict=True))


def _same(a: Any, b: Any, region: _Run, pattern: _Run) -> bool:
    a, b = _size(a, region.side), _size(b, pattern.side)
    if isinstance(a, torch.device) or isinstance(b, torch.device):
        return type(a) is type(b)
    if not isinstance(a, Step) or not isinstance(b, Step):
        same_type = isinstance(a, bool) is isinstance(b, bool) and isinstance(a, Step) is isinstance(b, Step)
        return same_type and bool(a == b)
    if not _same_layout(a.value, b.value, region.side.sizes, pattern.side.sizes):
        return False
    if a.kind is Kind.UNDEFINED and b.kind is Kind.UNDEFINED:
        return True
    return _near(region.known[a], pattern.value(b), region.domain)


def _near(a: Any, b: Any, domain: Domain) -> bool:
    ours, others = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(ours) == len(others) and all(domain.differ(x, y) < TOLERANCE for x, y in zip(ours, others, strict=True))


def _same_layout(a: Any, b: Any, sizes: Sizes, other: Sizes) -> bool:
    ours, others = pytree.tree_leaves(a), pytree.tree_leaves(b)
    if len(ours) != len(others):
        return False
    pairs = [(x, y) for x, y in zip(ours, others, strict=True) if isinstance(x, torch.Tensor)]
    return all(
        isinstance(y, torch.Tensor) and x.dtype == y.dtype and sizes.shape(x) == other.shape(y) for x, y in pairs
    )


def _size(value: Any, side: Side) -> Any:
    """A number in the place of what holds one."""
    if isinstance(value, torch.SymInt):
        return side.sizes.concrete(value)
    return side.sizes.value(value.node) if isinstance(value, Step) and value.kind is Kind.SIZE else side.number(value)
