"""The places of a graph that compute a user's pattern: ``cuts.py`` proposes, ``congruence.py`` decides."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.function_fusions.cuts import Cut, Likeness, Locator, Outline, binding_orders
from fx_fusion.function_fusions.equivalence import Comparison, Side, coarsest
from fx_fusion.function_fusions.parameters import Kind, Variant, asked
from fx_fusion.function_fusions.pattern import Example, Pattern
from fx_fusion.function_fusions.samples import Sampler
from fx_fusion.graph import operations
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.paths import Branch, branch_key
from fx_fusion.graph.sizes import Sizes
from fx_fusion.graph.torch_compat import pytree
from fx_fusion.graph.tracing import Functional, NotTraceable, fakes_like, trace
from fx_fusion.proof.evaluate import schedule
from fx_fusion.proof.region_function import TOLERANCE

#: Values tried for the numbers of a pattern, all together, at one place.
_NUMBERS = 192

#: Attempts around one anchor.
_TRIES = 400

#: Of the users of a value that is known already, how many nearest ones may lead to another result.
_NEAREST = 8


@dataclass(frozen=True)
class Place:
    """Where a pattern stands.

    Attributes:
        variant: the choices, and the parts left out.
        tensors: the node of each tensor parameter.
        numbers: the value of each captured number.
        results: the node of each result of the pattern, in the pattern's order.
    """

    pattern: Pattern
    variant: Variant
    tensors: Mapping[str, Node]
    numbers: Mapping[str, int | float]
    results: tuple[Node, ...]

    @property
    def anchor(self) -> Node:
        return self.results[0]

    @property
    def others(self) -> dict[str, Any]:
        """What the functions are called with besides tensors."""
        return {**self.variant, **self.numbers}


Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

#: Stand for the floats of a pattern while it is traced: float32 holds them exactly, and no program contains them.
_STAND_INS = (0.37158203125, 0.41943359375, 0.29541015625, 0.45361328125)


@dataclass
class Tracer:
    """Patterns traced at the shapes of a graph, each once."""

    known: dict[Hashable, Functional | NotTraceable] = field(default_factory=dict[Hashable, Any])
    places: dict[Functional, list[tuple[Node, Any, Any]]] = field(default_factory=dict[Functional, Any])

    def trace(self, pattern: Pattern, shapes: Shapes, others: Mapping[str, Any]) -> Functional:
        key = (id(pattern), tuple(shapes.items()), repr(sorted(others.items(), key=str)))
        if key not in self.known:
            try:
                self.known[key] = trace(pattern.fn, fakes_like(shapes), others)
            except NotTraceable as error:
                self.known[key] = error
        found = self.known[key]
        if isinstance(found, NotTraceable):
            raise found
        return found

    def trace_with(
        self, pattern: Pattern, shapes: Shapes, variant: Variant, numbers: Mapping[str, int | float]
    ) -> Functional:
        """As `trace`; the floats of `numbers` are written into one graph, where that shows where they stand.

        That is a guess (a function may compute with them first): a place found so is traced again for the proof.
        """
        floats = [p.name for p in pattern.parameters if p.kind is Kind.FLOAT and p.name in numbers]
        stand_ins = dict(zip(floats, _STAND_INS, strict=False))
        traced = self.trace(pattern, shapes, {**variant, **numbers, **stand_ins})
        if traced not in self.places:
            self.places[traced] = _places_of(traced, set(stand_ins.values()))
        places = self.places[traced]
        if len({leaf for _, *written in places for leaf in _floats_of(written)} & {*stand_ins.values()}) < len(floats):
            return self.trace(pattern, shapes, {**variant, **numbers})
        values = {stand_in: numbers[name] for name, stand_in in stand_ins.items()}
        for node, args, kwargs in places:
            node.args, node.kwargs = pytree.tree_map(lambda leaf: _replaced(leaf, values), (args, kwargs))
        return traced


def _places_of(traced: Functional, stand_ins: set[float]) -> list[tuple[Node, Any, Any]]:
    return [
        (node, node.args, node.kwargs)
        for node in traced.nodes
        if stand_ins & {*_floats_of((list(node.args), dict(node.kwargs)))}
    ]


def _floats_of(written: Any) -> list[float]:
    return [leaf for leaf in pytree.tree_leaves(written) if type(leaf) is float]


def _replaced(leaf: Any, values: Mapping[float, Any]) -> Any:
    return values.get(leaf, leaf) if type(leaf) is float else leaf


@dataclass(frozen=True)
class _Plan:
    """How to look for one variant: which result first, and then the others."""

    variant: Variant
    example: Example
    order: tuple[int, ...]
    locators: tuple[Locator, ...]

    @staticmethod
    def of(analysis: GraphAnalysis, pattern: Pattern, variant: Variant) -> _Plan:
        example = pattern.example(variant)
        outlines = [Outline.of(example.traced, result) for result in example.traced.results]
        order = sorted(range(len(outlines)), key=lambda i: outlines[i].rarity, reverse=True)
        return _Plan(variant, example, tuple(order), tuple(Locator(analysis, outline) for outline in outlines))


@dataclass
class _Attempt:
    """One walk around one anchor. If `strict`, every tensor looks as in the example."""

    plan: _Plan
    strict: bool
    furthest: list[Decline]
    tries: int = 0

    def may_be(self, index: int, result: Node) -> bool:
        """Could `result` be the pattern's result number `index`?"""
        value, like = result.meta["val"], self.plan.example.traced.results[index].meta["val"]
        if value.is_floating_point() != like.is_floating_point():
            return False
        return not self.strict or value.dim() == like.dim()

    def likeness(self, results: Mapping[int, Node], tensors: Mapping[str, Node]) -> Likeness | None:
        if not self.strict:
            return None
        example = self.plan.example
        pairs = [(node.meta["val"], example.traced.results[i].meta["val"]) for i, node in results.items()]
        pairs += [(node.meta["val"], example.tensors[name]) for name, node in tensors.items()]
        return Likeness.of(example.tensors, pairs)

    def allowed(self, likeness: Likeness | None, names: Sequence[str]) -> Callable[[Node], bool]:
        """Could a node be one of these parameters?"""
        return lambda node: likeness is None or any(likeness.fits(name, node) for name in names)


class Search:
    """All places of one pattern in one graph."""

    def __init__(self, analysis: GraphAnalysis, pattern: Pattern, tracer: Tracer) -> None:
        self._analysis, self._pattern, self._tracer = analysis, pattern, tracer
        self._aliases: dict[Node, list[Node]] = {}
        for node in analysis.nodes:
            self._aliases.setdefault(analysis.canonical(node), []).append(node)
        self._known: dict[Hashable, Mapping[str, int | float] | Decline] = {}
        self.nearest: list[tuple[Node, Decline]] = []

    def places(self, covered: set[Node]) -> Iterator[Place]:
        """In graph order, none inside another. Nodes of `covered` belong to other places; it grows."""
        for variant in self._pattern.variants:
            yield from self._places(variant, covered)
        self.nearest = [(anchor, decline) for anchor, decline in self.nearest if anchor not in covered]

    def _places(self, variant: Variant, covered: set[Node]) -> Iterator[Place]:
        plan = _Plan.of(self._analysis, self._pattern, variant)
        for anchor in plan.locators[plan.order[0]].anchors():
            if anchor in covered:
                continue
            furthest: list[Decline] = []
            place = self._place(anchor, plan, covered, furthest)
            if place is not None:
                place = self._with_cast(place, plan)
                covered.update(schedule(place.results, self.inputs(place.tensors)))
                yield place
            elif furthest:
                self.nearest.append((anchor, max(furthest, key=lambda decline: decline.stage)))

    def _place(self, anchor: Node, plan: _Plan, covered: set[Node], furthest: list[Decline]) -> Place | None:
        """Tensors that look like the example's are tried first: there are far fewer of them."""
        for strict in (True, False):
            attempt = _Attempt(plan, strict, furthest)
            place = next(self._around(anchor, attempt, covered), None)
            if place is not None:
                return place
        return None

    def _with_cast(self, place: Place, plan: _Plan) -> Place:
        """The same place with the cast that follows its result, if the pattern gives that dtype too."""
        users = self._analysis.users(place.anchor)
        if len(plan.order) > 1 or len(users) != 1 or not operations.is_cast(users[0]):
            return place
        attempt = _Attempt(plan, False, [])
        for cut in plan.locators[0].cuts(users[0]):
            for tensors in self._orders(plan.locators[0], cut, {}, attempt, None):
                found = next(self._complete(attempt, {0: users[0]}, tensors), None)
                if found is not None:
                    return found
        return place

    def inputs(self, tensors: Mapping[str, Node]) -> dict[Node, str]:
        """Every node that holds the value of a parameter."""
        return {
            alias: name for name, node in tensors.items() for alias in self._aliases[self._analysis.canonical(node)]
        }

    def _around(self, anchor: Node, attempt: _Attempt, covered: set[Node]) -> Iterator[Place]:
        first = attempt.plan.order[0]
        locator = attempt.plan.locators[first]
        for result in locator.results_near([anchor]):
            if result in covered or not attempt.may_be(first, result):
                continue
            likeness = attempt.likeness({first: result}, {})
            allowed = attempt.allowed(likeness, locator.outline.takes)
            for cut in locator.cuts(result, (), allowed):
                for tensors in self._orders(locator, cut, {}, attempt, likeness):
                    yield from self._complete(attempt, {first: result}, tensors)

    def _complete(self, attempt: _Attempt, results: dict[int, Node], tensors: dict[str, Node]) -> Iterator[Place]:
        """Places that begin with these `results` and `tensors`, if what is known so far agrees."""
        plan = attempt.plan
        numbers = self._agree(attempt, results, tensors)
        if isinstance(numbers, Decline):
            attempt.furthest.append(numbers)
            return
        if len(results) == len(plan.order):
            ordered = tuple(results[i] for i in range(len(plan.order)))
            named = {name: tensors[name] for name in plan.example.tensors}
            yield Place(self._pattern, plan.variant, named, numbers, ordered)
            return
        index = plan.order[len(results)]
        locator = plan.locators[index]
        known = {self._analysis.canonical(tensors[name]) for name in locator.outline.takes if name in tensors}
        near = self._analysis.order[next(iter(results.values()))]
        for result in locator.results_near(self._users_near(known, near)):
            if result in results.values() or not attempt.may_be(index, result):
                continue
            likeness = attempt.likeness({**results, index: result}, tensors)
            unbound = [name for name in locator.outline.takes if name not in tensors]
            for cut in locator.cuts(result, known, attempt.allowed(likeness, unbound)):
                for more in self._orders(locator, cut, tensors, attempt, likeness):
                    yield from self._complete(attempt, {**results, index: result}, {**tensors, **more})

    def _users_near(self, known: set[Node], position: int) -> list[Node]:
        order = self._analysis.order
        users: dict[Node, None] = {}
        for node in known:
            of_it = [user for alias in self._aliases[node] for user in self._analysis.users(alias)]
            of_it.sort(key=lambda user: abs(order[user] - position))
            users.update(dict.fromkeys(of_it[:_NEAREST]))
        return list(users)

    def _orders(
        self,
        locator: Locator,
        cut: Cut,
        tensors: Mapping[str, Node],
        attempt: _Attempt,
        likeness: Likeness | None,
    ) -> Iterator[dict[str, Node]]:
        takes = locator.outline.takes
        known = {name: self._analysis.canonical(tensors[name]) for name in takes if name in tensors}
        rest = [node for node in cut.frontier if node not in known.values()]
        unbound = [name for name in takes if name not in known]
        if len(rest) == len(unbound):
            yield from binding_orders(unbound, rest, attempt.plan.example.tensors, likeness)

    def _agree(
        self, attempt: _Attempt, results: Mapping[int, Node], tensors: Mapping[str, Node]
    ) -> Mapping[str, int | float] | Decline:
        """The numbers with which the pattern agrees with these results at one sample; or why there are none.

        Where tensors are missing still, and the pattern cannot be traced without them, nothing is known: no numbers.
        """
        attempt.tries += 1
        if attempt.tries > _TRIES:
            return Decline(
                "fusion.no_match", f"more than {_TRIES} ways to cut the graph here: give an example that looks like it"
            )
        variant = attempt.plan.variant
        leaves = list(tensors.values())
        keys = [branch_key(Branch(leaves[0], leaves[0], node, (), ()), leaves[1:]) for node in results.values()]
        key = (repr(variant), attempt.strict, tuple(results), tuple(tensors), tuple(keys))
        if key not in self._known:
            try:
                self._known[key] = self._solve(variant, attempt.strict, results, tensors)
            except Decline as decline:
                self._known[key] = decline
        return self._known[key]

    def _solve(
        self, variant: Variant, strict: bool, results: Mapping[int, Node], tensors: Mapping[str, Node]
    ) -> Mapping[str, int | float]:
        sizes = self._analysis.sizes[0]
        shapes = self._shapes(variant, tensors, sizes)
        partial = len(tensors) < len(shapes)
        nodes = schedule(results.values(), self.inputs(tensors))
        furthest = Decline("fusion.no_match", f"{next(iter(results.values()))} takes tensors of other shapes")
        for numbers in self._numbers(variant, nodes, sizes):
            try:
                pattern = self._tracer.trace_with(self._pattern, shapes, variant, numbers)
            except NotTraceable as error:
                if partial and not strict:
                    return {}
                furthest = Decline(
                    "fusion.no_match", f"the pattern does not take these tensors: {error}", list(tensors.values())
                )
                continue
            theirs = [pattern.results[i] for i in results]
            if not _same_layouts(list(results.values()), theirs, sizes):
                continue
            comparison = compare(self.inputs(tensors), list(results.values()), pattern, theirs, sizes, nodes)
            sampler = Sampler(pattern, seed=2)
            try:
                difference, where = comparison.difference(sampler.values(1.0), sampler.generator)
            except Decline as decline:
                furthest = decline
                continue
            if difference < TOLERANCE:
                return numbers
            found = f"in float64 {where} and the pattern differ by {difference:.1e}"
            furthest = Decline("proof.mismatch", found, list(results.values()))
        raise furthest

    def _shapes(self, variant: Variant, tensors: Mapping[str, Node], sizes: Sizes) -> Shapes:
        """Of all tensor parameters. One that is not found yet is as in the example, sizes replaced as elsewhere."""
        example = self._pattern.example(variant).tensors
        known = {name: node.meta["val"] for name, node in tensors.items()}
        renamed: dict[int, int] = {}
        for name, value in known.items():
            if value.dim() == example[name].dim():
                renamed.update(zip(map(int, example[name].shape), sizes.shape(value), strict=True))
        dtype = coarsest(tensors.values())
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name in asked(self._pattern.parameters, variant, Kind.TENSOR):
            like = example[name]
            if name in known:
                shapes[name] = (sizes.shape(known[name]), known[name].dtype)
            else:
                shape = tuple(renamed.get(int(size), int(size)) for size in like.shape)
                shapes[name] = (shape, dtype if like.is_floating_point() else like.dtype)
        return shapes

    def _numbers(self, variant: Variant, nodes: Sequence[Node], sizes: Sizes) -> Iterator[dict[str, int | float]]:
        floats = asked(self._pattern.parameters, variant, Kind.FLOAT)
        ints = asked(self._pattern.parameters, variant, Kind.INT)
        literals = _literals(nodes)
        fractions = _fractions(literals) if floats else []
        whole = _whole(literals, nodes) if ints else []
        ways = itertools.product(*([fractions] * len(floats)), *([whole] * len(ints)))
        for values in itertools.islice(ways, _NUMBERS):
            yield dict(zip([*floats, *ints], values, strict=True))


def compare(
    inputs: Mapping[Node, str],
    results: Sequence[Node],
    pattern: Functional,
    theirs: Sequence[Node],
    sizes: Sizes,
    nodes: Sequence[Node],
) -> Comparison:
    """The region between `inputs` and `results` beside these results of the pattern."""
    respell(pattern, _literals(nodes))
    floor = coarsest([*inputs, *results])
    region = Side.of(inputs, results, sizes, floor)
    return Comparison(region, Side.of({node: name for name, node in pattern.inputs.items()}, theirs, Sizes(), floor))


def respell(pattern: Functional, literals: Sequence[int | float]) -> None:
    """A number that one spelling of an operation rounds to float32 and another does not becomes the region's.

    Kernels round it to float32 either way; in float64 it would make a difference.
    """
    known = {_float32(literal): literal for literal in literals if isinstance(literal, float)}

    def spelled(value: Any) -> Any:
        return known.get(_float32(value), value) if type(value) is float else value

    for node in pattern.nodes:
        node.args, node.kwargs = pytree.tree_map(spelled, (node.args, node.kwargs))


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def _same_layouts(mine: Sequence[Node], theirs: Sequence[Node], sizes: Sizes) -> bool:
    pairs = [(a.meta["val"], b.meta["val"]) for a, b in zip(mine, theirs, strict=True)]
    return all(a.dtype == b.dtype and sizes.shape(a) == tuple(b.shape) for a, b in pairs)


def _literals(nodes: Sequence[Node]) -> list[int | float]:
    """Numbers written in the region, each once, in order."""
    found: dict[Any, None] = {}
    for node in nodes:
        if operations.is_symbolic(node):
            continue
        for leaf in pytree.tree_leaves((list(node.args), dict(node.kwargs))):
            if type(leaf) in (int, float):
                found[leaf] = None
    return list(found)


def _fractions(literals: Sequence[int | float]) -> list[float]:
    """What a float of the pattern may be: a literal; of ``x / 8``, an eighth; a whole number; its opposite."""
    written = [literal for literal in literals if isinstance(literal, float)]
    inverse = [1 / literal for literal in literals if literal and abs(literal) < 1e15]
    whole = [float(literal) for literal in literals if isinstance(literal, int) and abs(literal) < 1e15]
    return list(dict.fromkeys([*written, *inverse, *whole, *(-literal for literal in written), 0.0, 1.0]))


def _whole(literals: Sequence[int | float], nodes: Sequence[Node]) -> list[int]:
    """What an int of the pattern may be: a literal, or the size of a dimension."""
    written = [literal for literal in literals if isinstance(literal, int) and abs(literal) < 1 << 40]
    shapes = [node.meta["val"].shape for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    return list(dict.fromkeys([*written, *(size for shape in shapes for size in shape if isinstance(size, int))]))
