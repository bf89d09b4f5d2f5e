"""Where a pattern stands in a graph."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from fx_fusion.function_fusions.ground import Ground
from fx_fusion.function_fusions.parameters import Variant
from fx_fusion.function_fusions.pattern import Pattern
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.proof.evaluate import schedule


@dataclass(frozen=True)
class Place:
    """
    Attributes:
        variant: the choices, and the parts left out.
        tensors: the node of each tensor parameter.
        numbers: the value of each captured number.
        results: the node of each result of the pattern, in the pattern's order.
        nodes: the region: the nodes between, in graph order.
    """

    pattern: Pattern
    variant: Variant
    tensors: Mapping[str, Node]
    numbers: Mapping[str, int | float]
    results: tuple[Node, ...]
    nodes: tuple[Node, ...]

    @staticmethod
    def of(
        analysis: GraphAnalysis,
        pattern: Pattern,
        variant: Variant,
        tensors: Mapping[str, Node],
        numbers: Mapping[str, int | float],
        results: tuple[Node, ...],
    ) -> Place:
        nodes = region(analysis, tensors, results)
        return Place(pattern, variant, tensors, numbers, results, tuple(nodes))

    @property
    def anchor(self) -> Node:
        return self.results[0]

    @property
    def others(self) -> dict[str, Any]:
        """What the functions are called with besides tensors."""
        return {**self.variant, **self.numbers}

    def key(self, analysis: GraphAnalysis) -> Hashable:
        """Equal for places that compute the same function of their tensors, laid out alike, spelled alike."""
        described, feeding = analysis.structure(self.nodes)
        numbers = {analysis.value_number(node): i for i, node in enumerate((*self.nodes, *feeding))}
        places = [numbers.get(analysis.value_number(node)) for node in (*self.results, *self.tensors.values())]
        names = tuple(self.tensors)
        return (id(self.pattern), repr(sorted(self.others.items(), key=str)), names, tuple(places), described)


def region(analysis: GraphAnalysis, tensors: Mapping[str, Node], results: tuple[Node, ...]) -> list[Node]:
    """The nodes between `tensors` and `results`, both in graph order; what holds the value of a tensor is none."""
    ground = Ground.of(analysis)
    inputs = {alias for node in tensors.values() for alias in ground.aliases[analysis.canonical(node)]}
    return sorted(schedule(results, inputs), key=analysis.order.__getitem__)
