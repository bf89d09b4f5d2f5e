"""Where in a graph could a user's pattern be? Structure only proposes; ``congruence.py`` decides.

The pattern is traced once on small example tensors. Its *rare* steps (the free ones, else roots, exponentials, …) say
near which nodes of the graph to look. From there, forward, come candidates for the result; backward from a candidate,
the *cuts*: sets of as many tensors as the pattern takes, such that what lies between holds the same kinds of rare
steps. How the steps between are spelled does not matter.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from fx_fusion.function_fusions.equivalence import free_key, is_free, is_product, is_undefined
from fx_fusion.graph import operations
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.tracing import Functional
from fx_fusion.proof.evaluate import schedule

#: How many nodes after a rare step may be the result, how many cuts of one result are tried, and how many steps a walk
#: towards the inputs takes before it gives up.
_RESULTS, _CUTS, _STEPS = 48, 96, 4000


def kind_of(node: Node) -> str | None:
    """Which kind of rare analytic step `node` is; None for those that occur everywhere."""
    if is_product(node):
        return "product"
    kind = operations.row(node).rare or None
    return kind if kind != "root" or operations.takes_root(node) else None


@dataclass(frozen=True)
class Outline:
    """What one result of a pattern is made of, as far as spelling cannot change it.

    Attributes:
        takes: the tensor parameters that it depends on.
        free: keys of its free steps.
        kinds: kinds of its rare analytic steps.
        depth: steps of the pattern; a region may take several times as many.
    """

    takes: tuple[str, ...]
    free: frozenset[tuple[object, ...]]
    kinds: frozenset[str]
    depth: int

    @staticmethod
    def of(pattern: Functional, result: Node) -> Outline:
        nodes = schedule([result], set(pattern.inputs.values()))
        used = {parent for node in [*nodes, result] for parent in node.all_input_nodes}
        return Outline(
            tuple(name for name, node in pattern.inputs.items() if node in used),
            frozenset(free_key(node) for node in nodes if is_free(node, None)),
            frozenset(kind for node in nodes if (kind := kind_of(node)) is not None),
            len(nodes),
        )

    @property
    def rarity(self) -> tuple[int, int, int]:
        """The greater, the better a result to look for first."""
        return (len(self.free), len(self.kinds), len(self.takes))


@dataclass(frozen=True)
class Cut:
    """``result`` as a function of ``frontier``, the earliest node first."""

    result: Node
    frontier: tuple[Node, ...]


class Locator:
    """Candidates for one outline in one graph."""

    def __init__(self, analysis: GraphAnalysis, outline: Outline) -> None:
        self._analysis = analysis
        self.outline = outline
        self._passable: dict[Node, bool] = {}
        self._sources_of: dict[Node, set[Node]] = {}

    def anchors(self) -> list[Node]:
        """The nodes near which to look: every occurrence of the pattern's rarest step."""
        counts: Counter[object] = Counter()
        places: dict[object, list[Node]] = {}
        for node in self._analysis.nodes:
            if node not in self._analysis.live or node.op != "call_function":
                continue
            mark: object = free_key(node) if free_key(node) in self.outline.free else kind_of(node)
            if mark is not None:
                counts[mark] += 1
                places.setdefault(mark, []).append(node)
        wanted: list[object] = [*self.outline.free, *self.outline.kinds]
        if any(counts[mark] == 0 for mark in wanted):
            return []
        if wanted:
            return places[min(wanted, key=lambda mark: (mark not in self.outline.free, counts[mark], str(mark)))]
        return [node for node in self._analysis.nodes if node in self._analysis.live and operations.is_arithmetic(node)]

    def is_passable(self, node: Node) -> bool:
        """May `node` be a step of the region?"""
        if node not in self._passable:
            self._passable[node] = self._may_pass(node)
        return self._passable[node]

    def _may_pass(self, node: Node) -> bool:
        if node.op != "call_function":
            return False
        kind = kind_of(node)
        if kind is not None:
            return kind in self.outline.kinds
        if (
            operations.is_movement(node)
            or operations.is_cast(node)
            or is_undefined(node)
            or operations.is_symbolic(node)
        ):
            return True
        # Whether rounding makes a step free depends on the region; the comparison sees to that.
        return not is_free(node, None) or free_key(node) in self.outline.free

    def results_near(self, starts: Sequence[Node]) -> list[Node]:
        """Nodes that the region may end in: `starts` and what follows them through passable steps, nearest first."""
        found: dict[Node, None] = {}
        layer = list(starts)
        while layer and len(found) < _RESULTS:
            after: dict[Node, None] = {}
            for node in layer:
                if node not in found and self.is_passable(node):
                    found[node] = None
                    after.update(dict.fromkeys(self._analysis.users(node)))
            layer = list(after)
        order = self._analysis.order
        return sorted((node for node in found if _is_tensor(node)), key=order.__getitem__)

    def cuts(
        self, result: Node, known: Collection[Node] = (), allowed: Callable[[Node], bool] = lambda _: True
    ) -> Iterator[Cut]:
        """Cuts before `result`, those furthest back first. What is `known` belongs to the frontier wherever it is met.

        Other tensors of the frontier are `allowed`. A value that several nodes hold is one tensor of it.
        """
        wanted = len(self.outline.takes)
        limit = 4 * self.outline.depth + 64
        steps = 0
        found = 0
        # (what the frontier holds so far, what is still to be decided, how many steps are inside)
        stack: list[tuple[tuple[Node, ...], frozenset[Node], tuple[Node, ...]]] = [((), frozenset([result]), ())]
        seen: set[frozenset[Node]] = set()
        order = self._analysis.order
        opens = self._openings(result, known, allowed, limit)
        while stack and steps < _STEPS and found < _CUTS:
            steps += 1
            frontier, open_, inside = stack.pop()
            if len(set(map(self._analysis.canonical, frontier))) > wanted or len(inside) > limit:
                continue
            if not open_:
                key = frozenset(map(self._analysis.canonical, frontier))
                if key not in seen and len(key) == wanted and self._fits(inside):
                    seen.add(key)
                    found += 1
                    yield Cut(result, tuple(sorted(key, key=order.__getitem__)))
                continue
            node = max(open_, key=order.__getitem__)
            rest = open_ - {node}
            is_known = self._analysis.canonical(node) in known
            if is_known or (node is not result and self._may_be_input(node, frontier) and allowed(node)):
                stack.append(((*frontier, node), rest, inside))
            if not is_known and self.is_passable(node) and opens(node):
                parents = [p for p in node.all_input_nodes if not operations.is_symbolic(p)]
                stack.append((frontier, rest | frozenset(parents), (*inside, node)))

    def _openings(
        self, result: Node, known: Collection[Node], allowed: Callable[[Node], bool], limit: int
    ) -> Callable[[Node], bool]:
        """Tells of a node before `result` whether, as a step of the region, it leads back to a frontier at all.

        It does not if a graph input or an opaque operation that cannot be an input of the pattern feeds it. Without
        asking that first, a walk would find out last, again and again.
        """
        viable: dict[Node, bool] = {}

        def is_end(node: Node) -> bool:
            if self._analysis.canonical(node) in known or operations.is_symbolic(node):
                return True
            return self._is_constant(node) or (_is_tensor(node) and allowed(node))

        stack, entered = [result], set[Node]()
        while stack:
            node = stack[-1]
            if node in viable:
                stack.pop()
                continue
            if not self.is_passable(node) or self._analysis.canonical(node) in known or len(entered) > 8 * limit:
                viable[node] = is_end(node) or len(entered) > 8 * limit
                continue
            missing = [p for p in node.all_input_nodes if p not in viable]
            if missing and node not in entered:
                entered.add(node)
                stack.extend(missing)
                continue
            steps = all(viable.get(parent, True) for parent in node.all_input_nodes)
            viable[node] = steps or is_end(node)
        return lambda node: all(viable.get(parent, True) for parent in node.all_input_nodes)

    def _may_be_input(self, node: Node, frontier: Sequence[Node]) -> bool:
        return _is_tensor(node) and not self._is_constant(node) and not self._feeds(node, frontier)

    def _is_constant(self, node: Node) -> bool:
        return is_undefined(node) or (node.op == "call_function" and operations.is_literal(node))

    def _feeds(self, node: Node, frontier: Sequence[Node]) -> bool:
        """Is one of `frontier` computed from `node` by steps that could all be the region's? Then it is no input."""
        return any(node in self._sources(other) for other in frontier)

    def _sources(self, node: Node) -> set[Node]:
        if node not in self._sources_of:
            self._sources_of[node] = self._walk_back(node)
        return self._sources_of[node]

    def _walk_back(self, node: Node) -> set[Node]:
        found: set[Node] = set()
        stack = [node]
        while stack and len(found) < 4 * self.outline.depth + 64:
            top = stack.pop()
            if not self.is_passable(top):
                continue
            fresh = [parent for parent in top.all_input_nodes if parent not in found]
            found.update(fresh)
            stack.extend(fresh)
        return found

    def _fits(self, inside: Sequence[Node]) -> bool:
        kinds = frozenset(kind for node in inside if (kind := kind_of(node)) is not None)
        free: frozenset[tuple[object, ...]] = frozenset(
            key for node in inside if (key := free_key(node)) in self.outline.free
        )
        return kinds == self.outline.kinds and free == self.outline.free


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _expression(size: int | torch.SymInt) -> object:
    return size if isinstance(size, int) else size.node.expr


@dataclass(frozen=True)
class Likeness:
    """What is expected of tensors, from an example and from those that are known already.

    Sizes of the example that mean different things differ, so a size that is known somewhere is known wherever it
    occurs in the example.
    """

    example: Mapping[str, torch.Tensor]
    sizes: Mapping[int, object]

    @staticmethod
    def of(example: Mapping[str, torch.Tensor], pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Likeness:
        """`pairs` of a known tensor and what stands for it in the example, of the same number of dimensions."""
        found: dict[int, object] = {}
        contradictory: set[int] = set()
        for value, like in pairs:
            for size, of_example in zip(value.shape, map(int, like.shape), strict=True):
                expression = _expression(size)
                if found.setdefault(of_example, expression) != expression:
                    contradictory.add(of_example)
        return Likeness(example, {size: real for size, real in found.items() if size not in contradictory})

    def fits(self, name: str, node: Node) -> bool:
        """Has `node` the dimensions expected of the parameter `name`, as far as they are known?"""
        value, like = node.meta["val"], self.example[name]
        if value.dim() != like.dim() or value.is_floating_point() != like.is_floating_point():
            return False
        for size, of_example in zip(value.shape, map(int, like.shape), strict=True):
            expression = _expression(size)
            if of_example in self.sizes and self.sizes[of_example] != expression:
                return False
        return True


def binding_orders(
    takes: Sequence[str], frontier: Sequence[Node], example: Mapping[str, torch.Tensor], likeness: Likeness | None
) -> Iterator[dict[str, Node]]:
    """Ways to give the nodes of a cut to the parameters, those that look most like the example first.

    Floats go to floats. If there is a `likeness`, every tensor must fit it.
    """
    found: list[tuple[int, dict[str, Node]]] = []
    for order in itertools.permutations(frontier):
        if likeness is not None and not all(map(likeness.fits, takes, order)):
            continue
        pairs = [(node.meta["val"], example[name]) for name, node in zip(takes, order, strict=True)]
        if any(value.is_floating_point() != like.is_floating_point() for value, like in pairs):
            continue
        unlikeness = sum(abs(value.dim() - like.dim()) for value, like in pairs)
        found.append((unlikeness, dict(zip(takes, order, strict=True))))
    found.sort(key=lambda each: each[0])
    yield from (binding for _, binding in found)
