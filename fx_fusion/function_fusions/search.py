"""The places of a graph that compute a user's pattern: ``cuts.py`` proposes, ``equivalence.py`` decides.

The pattern's rarest step says near which nodes, the *anchors*, to look. Around an anchor everything is decided by the
nodes of its window, so windows that are equal are searched once, whether they hold the pattern or not: of a model's
equal layers, one. A further result with tensors of its own has an anchor of its own, near the first: one that the first
neither feeds nor is fed by through a step that cannot be the pattern's, else no call could compute both.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.function_fusions.agreement import Agreement
from fx_fusion.function_fusions.cuts import Cut, Locator
from fx_fusion.function_fusions.ground import Ground
from fx_fusion.function_fusions.misses import Miss, relocated
from fx_fusion.function_fusions.numbers import Numbers
from fx_fusion.function_fusions.outline import Likeness, Outline, bindings, is_candidate, same_family
from fx_fusion.function_fusions.parameters import Variant
from fx_fusion.function_fusions.pattern import Example, Pattern
from fx_fusion.function_fusions.place import Place, region
from fx_fusion.function_fusions.tracer import Tracer
from fx_fusion.graph import operations
from fx_fusion.graph.analysis import GraphAnalysis

#: Evaluations around one anchor.
_TRIES = 400

#: Of the anchors of a further result, how many nearest ones are looked at, and how many are tried.
_NEAR, _TRIED = 24, 8

#: How many ways to find a first result are kept where a further one has tensors of its own.
_WAYS = 6


@dataclass(frozen=True)
class Mode:
    """How strictly tensors are chosen: those that look like the example's first, as there are far fewer of them.

    Attributes:
        strict: ranks, and sizes that are equal in the example, are as there.
        shared: one tensor may be given for several parameters.
    """

    strict: bool
    shared: bool


_MODES = (Mode(True, False), Mode(False, False), Mode(True, True), Mode(False, True))


@dataclass(frozen=True)
class _Plan:
    """How to look for one variant: which result first, and then the others."""

    variant: Variant
    example: Example
    order: tuple[int, ...]
    locators: tuple[Locator, ...]
    analysis: GraphAnalysis

    @staticmethod
    def of(ground: Ground, pattern: Pattern, variant: Variant) -> _Plan:
        example = pattern.example(variant)
        outlines = [Outline.of(example.traced, result) for result in example.traced.results]
        order = sorted(range(len(outlines)), key=lambda i: outlines[i].rarity, reverse=True)
        locators = tuple(Locator(ground, outline) for outline in outlines)
        return _Plan(variant, example, tuple(order), locators, ground.analysis)

    @property
    def first(self) -> Locator:
        return self.locators[self.order[0]]

    def is_passable(self, node: Node) -> bool:
        """May it be a step of the region?"""
        return any(locator.is_passable(node) for locator in self.locators)

    @functools.cached_property
    def levels(self) -> dict[Node, int]:
        """How many steps that cannot be the pattern's a value needs, one after the other. Two values of one level do
        not need each other by way of any.
        """
        found: dict[Node, int] = {}
        for node in self.analysis.nodes:
            found[node] = max((found[p] for p in node.all_input_nodes), default=0) + (not self.is_passable(node))
        return found


@dataclass(frozen=True)
class _Found:
    """Some of the results, and the tensors that they take."""

    results: Mapping[int, Node]
    tensors: Mapping[str, Node]
    numbers: Numbers

    def moved(self, to: Callable[[Node], Node]) -> _Found:
        return replace(
            self,
            results={i: to(node) for i, node in self.results.items()},
            tensors={name: to(node) for name, node in self.tensors.items()},
        )


@dataclass(frozen=True)
class _Outcome:
    """Of one window: what was found in it, and what came nearest. Holds nodes of the window that was searched."""

    found: tuple[_Found, ...]
    nearest: Decline | None
    window: tuple[Node, ...]


@dataclass
class _Attempt:
    """One walk around anchors."""

    plan: _Plan
    mode: Mode
    window: frozenset[Node]
    furthest: list[Decline] = field(default_factory=list[Decline])
    tries: int = 0

    def may_be(self, index: int, result: Node) -> bool:
        """Could `result` be the pattern's result number `index`?"""
        value, like = result.meta["val"], self.plan.example.traced.results[index].meta["val"]
        return same_family(value.dtype, like.dtype) and (not self.mode.strict or value.dim() == like.dim())

    def likeness(self, results: Mapping[int, Node], tensors: Mapping[str, Node]) -> Likeness | None:
        if not self.mode.strict:
            return None
        example = self.plan.example
        pairs = [(node.meta["val"], example.traced.results[i].meta["val"]) for i, node in results.items()]
        pairs += [(node.meta["val"], example.tensors[name]) for name, node in tensors.items()]
        return Likeness.of(example.tensors, pairs)


def _allowed(likeness: Likeness | None, names: Sequence[str]) -> Callable[[Node], bool]:
    """Could a node be one of these parameters?"""
    return lambda node: likeness is None or any(likeness.fits(name, node) for name in names)


class Search:
    """All places of one pattern in one graph."""

    def __init__(self, analysis: GraphAnalysis, pattern: Pattern, tracer: Tracer) -> None:
        self._analysis, self._pattern = analysis, pattern
        self._ground = Ground.of(analysis)
        self._agreement = Agreement(analysis, pattern, tracer)
        self._known: dict[Hashable, _Outcome] = {}
        #: What came near, by anchor.
        self.nearest: list[tuple[Node, Decline]] = []
        #: For each variant that cannot be there, marks of rare steps that the graph has not.
        self.missing: list[list[object]] = []
        #: How many anchors were looked at.
        self.anchors = 0

    def places(self, covered: set[Node]) -> Iterator[Place]:
        """In graph order, none inside another. Nodes of `covered` belong to other places; it grows."""
        for variant in self._pattern.variants:
            yield from self._places(variant, covered)
        self.nearest = [(anchor, decline) for anchor, decline in self.nearest if anchor not in covered]

    def _places(self, variant: Variant, covered: set[Node]) -> Iterator[Place]:
        plan = _Plan.of(self._ground, self._pattern, variant)
        missing = [mark for locator in plan.locators for mark in self._ground.missing(locator.outline)]
        if missing:
            self.missing.append(missing)
            return
        for anchor in self._ground.anchors(plan.first.outline):
            if anchor in covered:
                continue
            self.anchors += 1
            furthest: list[Decline] = []
            found = next((f for mode in _MODES for f in self._whole(plan, mode, (anchor,), covered, furthest)), None)
            if found is not None:
                place = self._place(plan, found)
                covered.update(place.nodes)
                yield place
            elif furthest:
                self.nearest.append((anchor, max(furthest, key=lambda decline: decline.stage)))

    def _place(self, plan: _Plan, found: _Found) -> Place:
        results = tuple(found.results[i] for i in range(len(plan.order)))
        tensors = {name: found.tensors[name] for name in plan.example.tensors}
        return Place.of(self._analysis, self._pattern, plan.variant, tensors, found.numbers, results)

    # --- from anchors to all results ----------------------------------------------------------------------------------

    def _whole(
        self, plan: _Plan, mode: Mode, anchors: tuple[Node, ...], covered: set[Node], furthest: list[Decline]
    ) -> Iterator[_Found]:
        """All results, the first of them near the first of `anchors`, and so on."""
        outcome = self._outcome(plan, mode, anchors, covered)
        if outcome.nearest is not None:
            furthest.append(outcome.nearest)
        for found in outcome.found:
            if len(found.results) == len(plan.order):
                yield found
                continue
            for further in self._further_anchors(plan, found, anchors, covered):
                yield from self._whole(plan, mode, (*anchors, further), covered, furthest)

    def _outcome(self, plan: _Plan, mode: Mode, anchors: tuple[Node, ...], covered: set[Node]) -> _Outcome:
        """What the window of `anchors` holds; found in the memo where an equal one was searched."""
        analysis = self._analysis
        nodes = self._window(plan, anchors)
        described, feeding = analysis.structure(nodes)
        places = {node: i for i, node in enumerate(nodes)}
        taken = tuple(node in covered for node in nodes)
        users = tuple(len(node.users) for node in nodes)
        key = (repr(plan.variant), mode, tuple(places[anchor] for anchor in anchors), taken, users, described)
        window = (*nodes, *feeding)
        if key not in self._known:
            before = self._before(plan, mode, anchors, covered)
            self._known[key] = self._searched(plan, mode, anchors, before, nodes, window, covered)
        known = self._known[key]
        here = {analysis.canonical(old): analysis.canonical(new) for old, new in zip(known.window, window, strict=True)}
        at = dict(zip(known.window, window, strict=True))
        found = tuple(each.moved(lambda node: at.get(node) or here[analysis.canonical(node)]) for each in known.found)
        return replace(known, found=found, nearest=known.nearest and relocated(known.nearest, at), window=window)

    def _window(self, plan: _Plan, anchors: tuple[Node, ...]) -> list[Node]:
        nodes = {node for anchor, i in zip(anchors, self._own(plan), strict=False) for node in
                 plan.locators[i].window(anchor)}  # fmt: skip
        return sorted({*nodes, *anchors}, key=self._analysis.order.__getitem__)

    def _own(self, plan: _Plan) -> list[int]:
        """Results that have tensors of their own, in the order in which they are looked for."""
        taken: set[str] = set()
        found: list[int] = []
        for i in plan.order:
            if not found or not set(plan.locators[i].outline.takes) <= taken:
                found.append(i)
            taken.update(plan.locators[i].outline.takes)
        return found

    def _before(self, plan: _Plan, mode: Mode, anchors: tuple[Node, ...], covered: set[Node]) -> tuple[_Found, ...]:
        """What the anchors but the last gave."""
        return self._outcome(plan, mode, anchors[:-1], covered).found if len(anchors) > 1 else ()

    def _searched(
        self,
        plan: _Plan,
        mode: Mode,
        anchors: tuple[Node, ...],
        before: tuple[_Found, ...],
        nodes: Sequence[Node],
        window: tuple[Node, ...],
        covered: set[Node],
    ) -> _Outcome:
        attempt = _Attempt(plan, mode, frozenset(nodes))
        starts = before or (_Found({}, {}, {}),)
        index = self._own(plan)[len(anchors) - 1]
        ways = (
            whole
            for start in starts
            for one in self._near(anchors[-1], index, start, attempt, covered)
            for whole in self._with_bound(one, attempt, covered)
        )
        found: list[_Found] = []
        for way in ways:
            found.append(way)
            if len(way.results) == len(plan.order) or len(found) == _WAYS:
                break
        found.sort(key=lambda each: -len(each.results))
        if found and len(found[0].results) == len(plan.order):
            found = [self._with_cast(found[0], attempt)]
        nearest = max(attempt.furthest, key=lambda decline: decline.stage, default=None)
        return _Outcome(tuple(found), nearest, window)

    def _near(self, anchor: Node, index: int, start: _Found, attempt: _Attempt, covered: set[Node]) -> Iterator[_Found]:
        """`start` and result number `index`, near `anchor`."""
        locator = attempt.plan.locators[index]
        known = {
            self._analysis.canonical(start.tensors[name]) for name in locator.outline.takes if name in start.tensors
        }
        unbound = [name for name in locator.outline.takes if name not in start.tensors]
        for result in locator.results_near(anchor):
            if result in covered or result in start.results.values() or not attempt.may_be(index, result):
                continue
            results = {**start.results, index: result}
            likeness = attempt.likeness(results, start.tensors)
            sizes = self._sizes(attempt.mode, len(known), len(unbound))
            for cut in locator.cuts(result, attempt.window, known, _allowed(likeness, unbound), sizes):
                for tensors in self._orders(locator, cut, start.tensors, attempt, likeness):
                    yield from self._agreed(attempt, results, {**start.tensors, **tensors})

    def _sizes(self, mode: Mode, known: int, unbound: int) -> list[int]:
        """How many tensors a cut may have."""
        return list(range(known + 1, known + unbound)) if mode.shared else [known + unbound]

    def _agreed(self, attempt: _Attempt, results: Mapping[int, Node], tensors: Mapping[str, Node]) -> Iterator[_Found]:
        """These results and tensors, if they agree with the pattern at one sample."""
        attempt.tries += 1
        if attempt.tries > _TRIES:
            many = f"more than {_TRIES} ways to cut the graph here: give an example that looks like it"
            attempt.furthest.append(Miss("fusion.no_match", many))
            return
        if self._is_circular(results, tensors):
            return
        try:
            numbers = self._agreement.numbers(attempt.plan.variant, attempt.mode.strict, results, tensors)
        except Decline as decline:
            attempt.furthest.append(decline)
            return
        yield _Found(results, tensors, numbers)

    def _is_circular(self, results: Mapping[int, Node], tensors: Mapping[str, Node]) -> bool:
        """Would the call have to run before one of its own operands?"""
        order = self._analysis.order
        latest = max(map(order.__getitem__, tensors.values()))
        early = [result for result in results.values() if order[result] <= latest]
        return any(self._analysis.between(result, tensors.values()) for result in early)

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
        if attempt.mode.shared:
            rest = [*rest, *dict.fromkeys(known.values())]
            every = bindings(unbound, rest, attempt.plan.example.tensors, likeness) if rest else iter(())
            yield from every
        elif len(rest) == len(unbound):
            yield from bindings(unbound, rest, attempt.plan.example.tensors, likeness)

    # --- results that take no further tensors -------------------------------------------------------------------------

    def _with_bound(self, found: _Found, attempt: _Attempt, covered: set[Node]) -> Iterator[_Found]:
        """`found`, and the results that follow from its tensors alone."""
        plan = attempt.plan
        index = next((i for i in plan.order if i not in found.results), None)
        if index is None or not set(plan.locators[index].outline.takes) <= set(found.tensors):
            yield found
            return
        for result in self._computed_from(found.tensors, attempt.window):
            if result in covered or result in found.results.values() or not attempt.may_be(index, result):
                continue
            for more in self._agreed(attempt, {**found.results, index: result}, found.tensors):
                yield from self._with_bound(more, attempt, covered)

    def _computed_from(self, tensors: Mapping[str, Node], window: frozenset[Node]) -> list[Node]:
        """Tensors of the window that depend on `tensors` and on nothing else, in graph order."""
        known = {self._analysis.canonical(node) for node in tensors.values()}
        found: dict[Node, None] = {}
        for node in sorted(window, key=self._analysis.order.__getitem__):
            if self._analysis.canonical(node) in known:
                continue
            parents = [p for p in node.all_input_nodes if not operations.is_symbolic(p)]
            if all(self._analysis.canonical(p) in known or p in found or operations.is_literal(p) for p in parents):
                found[node] = None
        return [node for node in found if hasattr(node.meta.get("val"), "dim") and not operations.is_literal(node)]

    def _with_cast(self, found: _Found, attempt: _Attempt) -> _Found:
        """The same with the cast that follows its only result, if the pattern gives that dtype too."""
        result = found.results[0]
        users = self._analysis.users(result)
        if len(found.results) > 1 or len(users) != 1 or not operations.is_cast(users[0]):
            return found
        return next(self._agreed(attempt, {0: users[0]}, found.tensors), found)

    # --- anchors of further results -----------------------------------------------------------------------------------

    def _further_anchors(
        self, plan: _Plan, found: _Found, anchors: tuple[Node, ...], covered: set[Node]
    ) -> Iterator[Node]:
        """Where the next result with tensors of its own may be: nearest first, those of the same origin before all."""
        own = self._own(plan)
        if len(anchors) >= len(own):
            return
        outline = plan.locators[own[len(anchors)]].outline
        pool = self._ground.anchors(outline) if outline.required else self._users_of(found, outline)
        inside = set(region(self._analysis, found.tensors, tuple(found.results.values())))
        near = [node for node in self._nearest(pool, anchors[0]) if node not in covered and node not in anchors]
        yield from (node for node in near if node in inside)
        near = [node for node in near if node not in inside]
        level = plan.levels[anchors[0]]
        beside = [node for node in near if plan.levels[node] == level][:_TRIED]
        yield from self._by_origin(anchors[0], beside)
        others = [node for node in near if plan.levels[node] != level][:_TRIED]
        yield from (node for node in others if not self._is_separated(plan, anchors[0], node))

    def _users_of(self, found: _Found, outline: Outline) -> list[Node]:
        """Users of the tensors that the result shares with those found; of none, wherever something is computed."""
        shared = [found.tensors[name] for name in outline.takes if name in found.tensors]
        if not shared:
            return [n for n in self._analysis.nodes if n in self._analysis.live and is_candidate(n, outline.moves)]
        users = {user: None for node in shared for user in self._ground.users(node)}
        return sorted(users, key=self._analysis.order.__getitem__)

    def _nearest(self, pool: Sequence[Node], anchor: Node) -> list[Node]:
        order = self._analysis.order
        place = bisect.bisect(pool, order[anchor], key=order.__getitem__)
        around = pool[max(0, place - _NEAR) : place + _NEAR]
        return sorted(around, key=lambda node: abs(order[node] - order[anchor]))

    def _is_separated(self, plan: _Plan, a: Node, b: Node) -> bool:
        """Does one need the other by way of a step that cannot be the pattern's?"""
        first, last = sorted((a, b), key=self._analysis.order.__getitem__)
        return not all(map(plan.is_passable, self._analysis.between(first, [last])))

    def _by_origin(self, anchor: Node, nodes: Sequence[Node]) -> list[Node]:
        """Those that have the latest ancestor in common with `anchor` first."""
        if len(nodes) < 2:
            return list(nodes)
        origins = self._analysis.latest_common_ancestors(anchor, nodes)
        order = self._analysis.order
        return sorted(nodes, key=lambda node: -order[origins[node]] if node in origins else 1)
