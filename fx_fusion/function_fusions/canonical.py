"""A graph as steps in their one spelling."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.fx import Node
from torch.fx.node import map_aggregate

from fx_fusion.function_fusions.equivalences import spelled
from fx_fusion.function_fusions.steps import Kind, Step, is_free, plain


class Steps:
    """The step that each node ends in. Nodes that `canonical` makes one share theirs."""

    def __init__(self, nodes: Iterable[Node], canonical: Callable[[Node], Node] = lambda node: node) -> None:
        self._canonical = canonical
        self._of: dict[Node, Step] = {}
        self._marks: dict[Node, frozenset[object]] = {}
        for node in nodes:
            if canonical(node) is node:
                self._of[node] = self._made(node)

    def __getitem__(self, node: Node) -> Step:
        return self._of[self._canonical(node)]

    def _argument(self, value: Any) -> Any:
        step: Any = lambda leaf: self[leaf] if isinstance(leaf, Node) else leaf  # noqa: E731
        return map_aggregate(value, step)

    def _made(self, node: Node) -> Step:
        own = plain(node, self._argument)
        if own.kind in (Kind.LEAF, Kind.SIZE, Kind.LITERAL, Kind.RANDOM):
            return own
        return spelled(own) or own

    def marks(self, node: Node) -> frozenset[object]:
        """What is rare about `node`: names of its free steps, and kinds of its rare analytic ones.

        A node that only forms of others need, which take what it takes instead, bears their marks.
        """
        if not self._marks:
            self._mark_all()
        return self._marks[self._canonical(node)]

    def _mark_all(self) -> None:
        takers: dict[Node, set[Node]] = {node: set() for node in self._of}
        for node, step in self._of.items():
            taken = {parent.node for each in own_steps(step) for parent in each.parents} - {node}
            for parent in {*map(self._canonical, node.all_input_nodes), *taken}:
                takers[parent].add(node)
        absorbed: set[Node] = set()
        for node in reversed(list(self._of)):
            step = self._of[node]
            if takers[node] and all(t in absorbed or not _takes(self._of[t], step) for t in takers[node]):
                absorbed.add(node)
                self._marks[node] = frozenset().union(*(self._marks[taker] for taker in takers[node]))
            else:
                self._marks[node] = frozenset(mark for s in own_steps(step) if (mark := mark_of(s)) is not None)


def _takes(taker: Step, step: Step) -> bool:
    return taker.node.op != "call_function" or any(step in each.parents for each in own_steps(taker))


def own_steps(step: Step) -> list[Step]:
    """The steps that the node of `step` is."""
    found = [step]
    for each in found:
        found.extend(parent for parent in each.parents if parent.node is step.node and parent not in found)
    return found


def mark_of(step: Step) -> object | None:
    """The name of a free step, the kind of a rare analytic one, None for those that occur everywhere."""
    return step.name if is_free(step, None) else step.rare
