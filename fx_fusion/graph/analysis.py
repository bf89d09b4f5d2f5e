"""An analysis of one graph that every stage asks for: order, liveness, and which nodes hold equal values."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

from fx_fusion.graph import operations
from fx_fusion.graph.operations import aten
from fx_fusion.graph.sizes import Sizes, admissible_sizes
from fx_fusion.graph.torch_compat import OpOverload


class GraphAnalysis:
    """Computed once for a graph; read-only afterwards.

    Inductor runs no common-subexpression elimination in inference, so the same lookup recurs for q, for k and in
    every layer. `value_number` makes such nodes equal: two nodes with one number (of `numbers`) hold the same value.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[Node] = list(graph.nodes)
        self.order: dict[Node, int] = {node: i for i, node in enumerate(self.nodes)}
        self.live: frozenset[Node] = frozenset(_live(self.nodes))
        self.sizes: list[Sizes] = admissible_sizes(self.nodes)
        self.numbers: dict[Node, int] = _value_numbers(self.nodes)
        self._first: dict[int, Node] = {}
        for node in self.nodes:
            self._first.setdefault(self.numbers[node], node)

    @functools.cached_property
    def draws(self) -> list[Node]:
        """What draws random numbers, in graph order."""
        return [node for node in self.nodes if operations.draws(node)]

    def value_number(self, node: Node) -> int:
        return self.numbers[node]

    def canonical(self, node: Node) -> Node:
        """The first node of the graph that holds the same value."""
        return self._first[self.numbers[node]]

    def users(self, node: Node) -> list[Node]:
        """Live users of `node`, in graph order."""
        return sorted((user for user in node.users if user in self.live), key=self.order.__getitem__)

    def latest_common_ancestors(self, node: Node, others: Iterable[Node]) -> dict[Node, Node]:
        """For each of `others`, the last node, in graph order, that both it and `node` depend on (or are).

        One walk towards the inputs, latest node first; each value on the way is told who depends on it.
        """
        dependents: dict[Node, set[Node]] = {}
        for start in (node, *others):
            dependents.setdefault(start, set()).add(start)
        missing = set(others)
        found: dict[Node, Node] = {}
        heap = [-self.order[start] for start in dependents]
        heapq.heapify(heap)
        while heap and missing:
            ancestor = self.nodes[-heapq.heappop(heap)]
            dependent = dependents.pop(ancestor)
            if node in dependent:
                found |= dict.fromkeys(dependent & missing, ancestor)
                missing -= dependent
            dependent &= missing | {node}
            for parent in ancestor.all_input_nodes if dependent else ():
                if parent.op == "get_attr" or operations.is_symbolic(parent):
                    continue
                if parent not in dependents:
                    dependents[parent] = set()
                    heapq.heappush(heap, -self.order[parent])
                dependents[parent] |= dependent
        return found

    def structure(self, nodes: Iterable[Node]) -> tuple[Hashable, tuple[Node, ...]]:
        """A description of `nodes`, given in graph order, and what feeds them, in order of use.

        Equal descriptions compute the same of what feeds them: same operations, literals, dtypes, shapes, strides and
        offsets, and the same arguments are equal values. What is made of literals alone is described by its value.
        """
        numbers: dict[int, int] = {}
        local: dict[Node, int] = {}
        feeding: list[Node] = []
        described: list[Hashable] = []
        for node in nodes:
            for parent in node.all_input_nodes:
                number = self.value_number(parent)
                if number not in numbers:
                    numbers[number] = len(numbers)
                    feeding.append(parent)
                    described.append(number if operations.is_literal(parent) else describe(parent))
                local[parent] = numbers[number]
            described.append((node.target, freeze(node.args, local), freeze(node.kwargs, local), describe(node)))
            numbers.setdefault(self.value_number(node), len(numbers))
        return tuple(described), tuple(feeding)

    def between(self, origin: Node, targets: Iterable[Node]) -> list[Node]:
        """The nodes on a path from `origin` to one of `targets`, both ends included, in graph order.

        Nodes before `origin` cannot depend on it, so the walk never leaves the neighbourhood of the layer. Sizes are on
        no path: they depend on the shape of `origin`, not on its values.
        """
        start = self.order[origin]
        ancestors: set[Node] = set()
        stack = list(targets)
        while stack:
            node = stack.pop()
            if node in ancestors or self.order[node] < start or operations.is_symbolic(node):
                continue
            ancestors.add(node)
            stack.extend(node.all_input_nodes)
        path: dict[Node, None] = {}
        for node in sorted(ancestors, key=self.order.__getitem__):
            if node is origin or any(parent in path for parent in node.all_input_nodes):
                path[node] = None
        return list(path)


def _live(nodes: list[Node]) -> set[Node]:
    live: set[Node] = set()
    stack = [node for node in nodes if node.op == "output" or _writes_an_input(node)]
    impure: dict[Any, bool] = {}
    for node in nodes:
        # Of an operation of PyTorch the answer is the same whatever its arguments, and torch takes long to give it.
        question = node.target if isinstance(node.target, OpOverload) else node
        if question not in impure:
            impure[question] = node.is_impure()
        if impure[question]:
            stack.append(node)
    while stack:
        node = stack.pop()
        if node in live:
            continue
        live.add(node)
        stack.extend(node.all_input_nodes)
    return live


def _writes_an_input(node: Node) -> bool:
    return node.op == "call_function" and node.target is aten.copy_.default


def _value_numbers(nodes: list[Node]) -> dict[Node, int]:
    numbers: dict[Node, int] = {}
    seen: dict[Hashable, int] = {}
    for node in nodes:
        key = _value_key(node, numbers)
        numbers[node] = seen.setdefault(key, len(seen))
    return numbers


def _value_key(node: Node, numbers: dict[Node, int]) -> Hashable:
    if node.op != "call_function" or not _is_pure(node):
        return node
    return (node.target, freeze(node.args, numbers), freeze(node.kwargs, numbers))


def _is_pure(node: Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return callable(node.target) and getattr(node.target, "__module__", "") == "_operator"
    return not node.target._schema.is_mutable and not operations.draws(node)


def freeze(value: Any, numbers: dict[Node, int]) -> Hashable:
    """A hashable image of an argument in which nodes are replaced by their numbers.

    The type takes part: in Python ``1 == 1.0 == True``, and ``0.0 == -0.0``, yet they are different arguments.
    """
    if isinstance(value, Node):
        return ("node", numbers[value])
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item, numbers) for item in value)
    if isinstance(value, dict):
        return tuple((key, freeze(item, numbers)) for key, item in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", freeze((value.start, value.stop, value.step), numbers))
    return (type(value).__name__, repr(value))


def describe(node: Node) -> tuple[str, ...]:
    """All that a node's value is known by without being read."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        place = (str(value.stride()), str(value.storage_offset()), str(value.device))
        return (str(value.dtype), str(tuple(value.shape)), *place)
    return (str(value),)
