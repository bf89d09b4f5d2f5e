"""Does the pattern agree with results and tensors of a graph at one sample, and with which numbers?"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.function_fusions.domain import TOLERANCE
from fx_fusion.function_fusions.equivalence import Comparison, Side
from fx_fusion.function_fusions.ground import Ground
from fx_fusion.function_fusions.misses import Miss
from fx_fusion.function_fusions.numbers import Numbers, candidates, literals_of
from fx_fusion.function_fusions.parameters import Kind, Variant, asked
from fx_fusion.function_fusions.pattern import Pattern
from fx_fusion.function_fusions.place import region
from fx_fusion.function_fusions.samples import Sampler
from fx_fusion.function_fusions.steps import coarsest
from fx_fusion.function_fusions.tracer import Shapes, Spelled, Tracer
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.operations import aten
from fx_fusion.graph.sizes import Sizes
from fx_fusion.graph.tracing import Functional, NotTraceable


class Agreement:
    """Answers for one pattern and one graph, each question once."""

    def __init__(self, analysis: GraphAnalysis, pattern: Pattern, tracer: Tracer) -> None:
        self._analysis, self._pattern, self._tracer = analysis, pattern, tracer
        self._ground = Ground.of(analysis)
        self._known: dict[Hashable, Numbers | Decline] = {}

    def numbers(
        self, variant: Variant, strict: bool, results: Mapping[int, Node], tensors: Mapping[str, Node]
    ) -> Numbers:
        """The numbers with which the pattern agrees with these results at one sample.

        Where tensors are missing still, and the pattern cannot be traced without them, nothing is known: no numbers.

        Raises:
            Decline: there are none, and why.
        """
        key = (repr(variant), strict, tuple(results.items()), tuple(tensors.items()))
        if key not in self._known:
            try:
                self._known[key] = self._solve(variant, strict, results, tensors)
            except Decline as decline:
                self._known[key] = decline
        found = self._known[key]
        if isinstance(found, Decline):
            raise found
        return found

    def _solve(
        self, variant: Variant, strict: bool, results: Mapping[int, Node], tensors: Mapping[str, Node]
    ) -> Numbers:
        sizes = self._analysis.sizes[0]
        shapes = self._shapes(variant, tensors, sizes)
        partial = len(tensors) < len(shapes)
        ordered = list(results.values())
        nodes = region(self._analysis, tensors, tuple(ordered))
        literals = literals_of(nodes)
        furthest: Decline = Miss("fusion.no_match", "{0} takes tensors of other shapes", ordered[:1])
        side: Side | None = None
        for numbers in self._candidates(variant, nodes):
            try:
                pattern = self._tracer.trace_with(self._pattern, shapes, variant, numbers, literals)
            except NotTraceable as error:
                if partial and not strict:
                    return {}
                found = f"the pattern does not take these tensors: {error}"
                furthest = Miss("fusion.no_match", found, list(tensors.values()))
                continue
            theirs = [pattern.traced.results[i] for i in results]
            if not _same_layouts(ordered, theirs, sizes):
                continue
            try:
                side = side or region_side(self._ground, tensors, ordered, sizes)
                comparison = Comparison(side, pattern_side(pattern, theirs, side))
                difference, where = _first_difference(comparison, pattern.traced, tensors)
            except Decline as decline:
                furthest = decline
                continue
            if not difference < TOLERANCE:
                found = f"in float64 {{0}} and the pattern differ by {difference:.1e}"
                furthest = Miss("proof.mismatch", found, [where])
                continue
            try:
                sample(comparison, pattern.traced, nodes, tensors)
            except Decline as decline:
                furthest = decline
                continue
            return numbers
        raise furthest

    def _shapes(self, variant: Variant, tensors: Mapping[str, Node], sizes: Sizes) -> Shapes:
        """Of all tensor parameters. One that is not found yet is as in the example, sizes replaced as elsewhere."""
        example = self._pattern.example(variant).tensors
        known = {name: node.meta["val"] for name, node in tensors.items()}
        renamed: dict[int, int] = {}
        for name, value in known.items():
            if value.dim() == example[name].dim():
                renamed.update(zip(map(int, example[name].shape), sizes.shape(value), strict=True))
        dtype = coarsest(self._ground.steps[node] for node in tensors.values())
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name in asked(self._pattern.parameters, variant, Kind.TENSOR):
            like = example[name]
            if name in known:
                shapes[name] = (sizes.shape(known[name]), known[name].dtype)
            else:
                shape = tuple(renamed.get(int(size), int(size)) for size in like.shape)
                shapes[name] = (shape, dtype if like.is_floating_point() else like.dtype)
        return shapes

    def _candidates(self, variant: Variant, nodes: Sequence[Node]) -> Iterator[dict[str, int | float]]:
        floats = asked(self._pattern.parameters, variant, Kind.FLOAT)
        ints = asked(self._pattern.parameters, variant, Kind.INT)
        return candidates(floats, ints, nodes)


def _first_difference(comparison: Comparison, pattern: Functional, tensors: Mapping[str, Node]) -> tuple[float, Node]:
    sampler = Sampler(pattern, seed=2, same=same(tensors))
    difference, where = comparison.difference(*sampler.first())
    if difference < TOLERANCE and len(comparison.told) < len(comparison.region.results):
        return float("inf"), where
    return difference, where


def sample(
    comparison: Comparison, pattern: Functional, nodes: Sequence[Node], tensors: Mapping[str, Node], seed: int = 3
) -> float:
    """The largest relative difference over all samples.

    Raises:
        Decline: ``proof.mismatch`` with the difference and the sample, ``proof.not_analytic``.
    """
    literals = [float(x) for x in literals_of([*nodes, *pattern.nodes])]
    sampler = Sampler(pattern, seed, literals, _turns(comparison), same(tensors))
    worst = 0.0
    for name, values, domain in sampler:
        difference, where = comparison.difference(values, domain)
        if not difference < TOLERANCE:
            found = f"in float64 {{0}} and the pattern differ by {difference:.1e} on {name}"
            raise Miss("proof.mismatch", found, [where])
        worst = max(worst, difference)
    untold = set(range(len(comparison.region.results))) - comparison.told
    if untold:
        step = comparison.region.results[min(untold)]
        raise Miss("proof.mismatch", "{0} has on no sample a value to compare", [step.node])
    comparison.check_steepness(*sampler.nearby())
    return worst


def _turns(comparison: Comparison) -> bool:
    """Is there a sine or cosine?"""
    turning = (aten.sin.default, aten.cos.default)
    return any(step.target in turning for side in (comparison.region, comparison.pattern) for step in side.steps)


def same(tensors: Mapping[str, Node]) -> dict[str, str]:
    """Parameters that are given a tensor which another one before them is given too, by that one."""
    first: dict[Node, str] = {}
    return {name: first[node] for name, node in tensors.items() if first.setdefault(node, name) != name}


def region_side(ground: Ground, tensors: Mapping[str, Node], results: Sequence[Node], sizes: Sizes) -> Side:
    """The region between `tensors` and `results`."""
    inputs, ends = ground.inputs(tensors.items()), ground.results(results)
    return Side.of(inputs, ends, sizes, coarsest([*inputs, *ends]))


def pattern_side(pattern: Spelled, theirs: Sequence[Node], region: Side) -> Side:
    """The pattern up to the results `theirs`, to be compared with `region`."""
    steps = pattern.steps
    inputs = {steps[node]: name for name, node in pattern.traced.inputs.items()}
    floor = coarsest([*region.inputs, *region.results])
    return replace(Side.of(inputs, [steps[node] for node in theirs], Sizes(), floor), numbers=pattern.numbers)


def _same_layouts(mine: Sequence[Node], theirs: Sequence[Node], sizes: Sizes) -> bool:
    pairs = [(a.meta["val"], b.meta["val"]) for a, b in zip(mine, theirs, strict=True)]
    return all(a.dtype == b.dtype and sizes.shape(a) == tuple(b.shape) for a, b in pairs)
