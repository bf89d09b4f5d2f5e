"""A graph as the search sees it: its canonical steps, and where the rare ones are. Made once a graph."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

from torch.fx import Node

from fx_fusion.function_fusions.canonical import Steps
from fx_fusion.function_fusions.outline import Outline, is_candidate
from fx_fusion.function_fusions.steps import Step
from fx_fusion.graph.analysis import GraphAnalysis


class Ground:
    """
    Attributes:
        steps: of every node.
        aliases: the nodes that hold one value, by the first of them.
        places: live nodes by mark, in graph order.
    """

    def __init__(self, analysis: GraphAnalysis) -> None:
        self.analysis = analysis
        self.steps = Steps(analysis.nodes, analysis.canonical)
        self.aliases: dict[Node, list[Node]] = {}
        self.places: dict[object, list[Node]] = {}
        for node in analysis.nodes:
            self.aliases.setdefault(analysis.canonical(node), []).append(node)
            if node in analysis.live and node.op == "call_function":
                for mark in self.steps.marks(node):
                    self.places.setdefault(mark, []).append(node)

    @staticmethod
    def of(analysis: GraphAnalysis) -> Ground:
        """The one of `analysis`."""
        if analysis not in _KNOWN:
            _KNOWN[analysis] = Ground(analysis)
        return _KNOWN[analysis]

    def missing(self, outline: Outline) -> list[object]:
        """Marks that a region must have and the graph has not."""
        return sorted((mark for mark in outline.required if mark not in self.places), key=str)

    def anchors(self, outline: Outline) -> list[Node]:
        """The nodes near which to look: every occurrence of the rarest step."""
        if self.missing(outline):
            return []
        if outline.required:
            return min((self.places[mark] for mark in sorted(outline.required, key=str)), key=len)
        live = self.analysis.live
        return [node for node in self.analysis.nodes if node in live and is_candidate(node, outline.moves)]

    def inputs(self, tensors: Iterable[tuple[str, Node]]) -> dict[Step, str]:
        """The step of each tensor; one that is given for several parameters stands for the first."""
        found: dict[Step, str] = {}
        for name, node in tensors:
            found.setdefault(self.steps[node], name)
        return found

    def results(self, nodes: Sequence[Node]) -> list[Step]:
        return [self.steps[node] for node in nodes]

    def users(self, node: Node) -> list[Node]:
        """Live users of the value that `node` holds, in graph order."""
        found = {u: None for alias in self.aliases[self.analysis.canonical(node)] for u in alias.users}
        return sorted((user for user in found if user in self.analysis.live), key=self.analysis.order.__getitem__)


_KNOWN: weakref.WeakKeyDictionary[GraphAnalysis, Ground] = weakref.WeakKeyDictionary()
