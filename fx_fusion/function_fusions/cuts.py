"""Where in a graph could one result of a user's pattern be? Structure only proposes; ``equivalence.py`` decides.

From a rare step, forward, come candidates for the result; backward from a candidate, the *cuts*: sets of as many
tensors as the pattern takes, such that what lies between holds the same rare steps. How the steps between are spelled
does not matter. All of it stays within a *window* around the rare step, so that equal windows need one search.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from torch.fx import Node

from fx_fusion.function_fusions.equivalences import OPTIONAL
from fx_fusion.function_fusions.ground import Ground
from fx_fusion.function_fusions.outline import Outline, is_tensor
from fx_fusion.function_fusions.steps import Kind
from fx_fusion.graph import operations

#: How many nodes after a rare step may be the result, how many cuts of one result are tried, and how many steps a walk
#: towards the inputs takes before it gives up.
_RESULTS, _CUTS, _STEPS = 48, 96, 4000

_BARRED = (Kind.LEAF, Kind.RANDOM, Kind.BY_STRIDES)


@dataclass(frozen=True)
class Cut:
    """``result`` as a function of ``frontier``, the earliest node first."""

    result: Node
    frontier: tuple[Node, ...]


class Locator:
    """Candidates for one outline in one graph."""

    def __init__(self, ground: Ground, outline: Outline) -> None:
        self._ground, self._analysis = ground, ground.analysis
        self.outline = outline
        self._limit = 4 * outline.depth + 64
        self._passable: dict[Node, bool] = {}
        self._tensors: dict[Node, frozenset[Node]] = {}

    def is_passable(self, node: Node) -> bool:
        """May `node` be a step of the region?"""
        if node not in self._passable:
            self._passable[node] = self._may_pass(node)
        return self._passable[node]

    def _may_pass(self, node: Node) -> bool:
        if node.op != "call_function" or self._ground.steps[node].kind in _BARRED:
            return False
        return self._ground.steps.marks(node) <= self.outline.allowed

    def window(self, anchor: Node) -> list[Node]:
        """The nodes around `anchor` that may be steps of one region with it, nearest first.

        With a step inside, whatever feeds it and cannot be inside is one of the region's tensors, and those are only so
        many. Where residual layers follow each other, each would add one: the window ends there.
        """
        needs = self._after([anchor])
        queue = list(needs)
        for node in queue:
            for parent in node.all_input_nodes:
                if (
                    operations.is_symbolic(parent)
                    or not self.is_passable(parent)
                    or len(needs) > self._limit + _RESULTS
                ):
                    continue
                needed = needs[node] | self._tensors_of(parent)
                if len(needed) > len(self.outline.takes) or len(needs.get(parent, needed)) < len(needed):
                    continue
                if parent not in needs or len(needs[parent]) > len(needed):
                    needs[parent] = needed
                    queue.append(parent)
        return list(needs)

    def _tensors_of(self, node: Node) -> frozenset[Node]:
        """What feeds `node`, maybe by way of steps with one operand, and cannot be a step of the region."""
        if node not in self._tensors:
            sources = (self._source(parent) for parent in node.all_input_nodes if is_tensor(parent))
            self._tensors[node] = frozenset(
                self._analysis.canonical(s) for s in sources if not self.is_passable(s) and not self.is_constant(s)
            )
        return self._tensors[node]

    def _source(self, node: Node) -> Node:
        while self.is_passable(node):
            operands = [p for p in node.all_input_nodes if not operations.is_symbolic(p) and not self.is_constant(p)]
            if len(operands) != 1:
                break
            node = operands[0]
        return node

    def _after(self, starts: Sequence[Node]) -> dict[Node, frozenset[Node]]:
        """What follows `starts` through passable steps, and the tensors that a region with it has at least."""
        found: dict[Node, frozenset[Node]] = {}
        layer = {node: frozenset[Node]() for node in starts}
        while layer and len(found) < _RESULTS:
            after: dict[Node, frozenset[Node]] = {}
            for node, before in layer.items():
                needed = before | self._tensors_of(node) if self.is_passable(node) else before
                if node in found or not self.is_passable(node) or len(needed) > len(self.outline.takes):
                    continue
                found[node] = needed
                after.update((user, needed) for user in self._analysis.users(node) if user not in after)
            layer = after
        return found

    def results_near(self, anchor: Node) -> list[Node]:
        """Nodes that the region may end in: `anchor` and what follows it through passable steps, nearest first."""
        return sorted(filter(is_tensor, self._after([anchor])), key=self._analysis.order.__getitem__)

    def cuts(
        self,
        result: Node,
        window: Collection[Node],
        known: Collection[Node] = (),
        allowed: Callable[[Node], bool] = lambda _: True,
        sizes: Collection[int] = (),
    ) -> Iterator[Cut]:
        """Cuts before `result`, those furthest back first. What is `known` belongs to the frontier wherever it is met.

        Other tensors of the frontier are `allowed`. A value that several nodes hold is one tensor of it. The frontier
        has as many tensors as the outline takes, or as many as one of `sizes` says.
        """
        wanted = set(sizes) or {len(self.outline.takes)}
        most = max(wanted)
        steps = found = 0
        # (what the frontier holds so far, what is still to be decided, how many steps are inside)
        stack: list[tuple[tuple[Node, ...], frozenset[Node], tuple[Node, ...]]] = [((), frozenset([result]), ())]
        seen: set[frozenset[Node]] = set()
        order = self._analysis.order
        walk = _Walk(self, result, window, known, allowed)
        while stack and steps < _STEPS and found < _CUTS:
            steps += 1
            frontier, open_, inside = stack.pop()
            if len(set(map(self._analysis.canonical, frontier))) > most or len(inside) > self._limit:
                continue
            if not open_:
                key = frozenset(map(self._analysis.canonical, frontier))
                if key not in seen and len(key) in wanted and self._fits(inside):
                    seen.add(key)
                    found += 1
                    yield Cut(result, tuple(sorted(key, key=order.__getitem__)))
                continue
            node = max(open_, key=order.__getitem__)
            rest = open_ - {node}
            is_known = self._analysis.canonical(node) in known
            if is_known or (node is not result and walk.may_be_input(node, frontier) and allowed(node)):
                stack.append(((*frontier, node), rest, inside))
            if not is_known and walk.is_inside(node) and walk.opens(node):
                parents = [p for p in node.all_input_nodes if not operations.is_symbolic(p)]
                stack.append((frontier, rest | frozenset(parents), (*inside, node)))

    def _fits(self, inside: Sequence[Node]) -> bool:
        marks = frozenset(mark for node in inside for mark in self._ground.steps.marks(node))
        return marks - OPTIONAL == self.outline.required

    def is_constant(self, node: Node) -> bool:
        return self._ground.steps[node].kind in (Kind.LITERAL, Kind.UNDEFINED)


class _Walk:
    """What is asked of nodes on the way from one result towards the inputs."""

    def __init__(
        self,
        locator: Locator,
        result: Node,
        window: Collection[Node],
        known: Collection[Node],
        allowed: Callable[[Node], bool],
    ) -> None:
        self._locator, self._analysis, self._window = locator, locator._analysis, window
        self._known, self._allowed = known, allowed
        self._sources_of: dict[Node, set[Node]] = {}
        self._viable = self._leading_back(result)

    def is_inside(self, node: Node) -> bool:
        """May `node` be a step of the region?"""
        return (node in self._window or self._locator.is_constant(node)) and self._locator.is_passable(node)

    def opens(self, node: Node) -> bool:
        """Does `node`, as a step of the region, lead back to a frontier at all?

        It does not if a graph input or an opaque operation that cannot be an input of the pattern feeds it. Without
        asking that first, a walk would find out last, again and again.
        """
        return all(self._viable.get(parent, True) for parent in node.all_input_nodes)

    def _leading_back(self, result: Node) -> dict[Node, bool]:
        viable: dict[Node, bool] = {}
        stack, entered = [result], set[Node]()
        while stack:
            node = stack[-1]
            if node in viable:
                stack.pop()
                continue
            if not self.is_inside(node) or self._analysis.canonical(node) in self._known:
                viable[node] = self._is_end(node)
                continue
            missing = [p for p in node.all_input_nodes if p not in viable]
            if missing and node not in entered:
                entered.add(node)
                stack.extend(missing)
                continue
            viable[node] = all(viable.get(p, True) for p in node.all_input_nodes) or self._is_end(node)
        return viable

    def _is_end(self, node: Node) -> bool:
        if (
            self._analysis.canonical(node) in self._known
            or operations.is_symbolic(node)
            or self._locator.is_constant(node)
        ):
            return True
        return is_tensor(node) and self._allowed(node)

    def may_be_input(self, node: Node, frontier: Sequence[Node]) -> bool:
        return is_tensor(node) and not self._locator.is_constant(node) and not self._feeds(node, frontier)

    def _feeds(self, node: Node, frontier: Sequence[Node]) -> bool:
        """Is one of `frontier` computed from `node` by steps that could all be the region's? Then it is no input."""
        return any(node in self._sources(other) for other in frontier)

    def _sources(self, node: Node) -> set[Node]:
        if node not in self._sources_of:
            found: set[Node] = set()
            stack = [node]
            while stack:
                top = stack.pop()
                if not self.is_inside(top):
                    continue
                fresh = [parent for parent in top.all_input_nodes if parent not in found]
                found.update(fresh)
                stack.extend(fresh)
            self._sources_of[node] = found
        return self._sources_of[node]
