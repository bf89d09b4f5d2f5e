"""What a replacement is compared with: a graph, run as it stands, in its own dtypes and where it would run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate

from fx_fusion.function_fusions.domain import widest
from fx_fusion.function_fusions.place import Place
from fx_fusion.graph import operations
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.operations import aten
from fx_fusion.graph.sizes import Sizes
from fx_fusion.graph.tracing import Functional
from fx_fusion.proof.evaluate import check_memory, schedule

_ORDERING = frozenset(
    {
        aten.topk.default, aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argmax.default,
        aten.argmin.default, aten.max.dim, aten.min.dim, aten.kthvalue.default,
    }
)  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """
    Attributes:
        what: in a sentence: ``the pattern``, ``the graph``.
        inputs: which parameter a node holds the value of.
        results: as of a traced pattern, with `returned` and `mutated`.
        nodes: what lies between.
    """

    what: str
    inputs: Mapping[Node, str]
    results: tuple[Node, ...]
    returned: tuple[int, ...]
    mutated: Mapping[str, int]
    sizes: Sizes
    nodes: tuple[Node, ...]

    @staticmethod
    def of_pattern(traced: Functional) -> Reference:
        inputs = {node: name for name, node in traced.inputs.items()}
        nodes = tuple(schedule(traced.results, inputs))
        return Reference("the pattern", inputs, traced.results, traced.returned, traced.mutated, Sizes(), nodes)

    @staticmethod
    def of_place(analysis: GraphAnalysis, place: Place, sizes: Sizes) -> Reference:
        from fx_fusion.function_fusions.ground import Ground

        ground, pattern = Ground.of(analysis), place.pattern.example(place.variant).traced
        inputs: dict[Node, str] = {}
        for name, node in place.tensors.items():
            for alias in ground.aliases[analysis.canonical(node)]:
                inputs.setdefault(alias, name)
        nodes = tuple(schedule(place.results, inputs))
        return Reference("the graph", inputs, place.results, pattern.returned, pattern.mutated, sizes, nodes)

    @property
    def rounds(self) -> bool:
        """May what it gives as integers have been rounded?"""
        return any(node.target is aten.round.default or operations.is_opaque(node) for node in self.nodes)

    @property
    def orders(self) -> bool:
        """Is there a step that puts values in order? Of equal ones it may give any."""
        return any(node.target in _ORDERING for node in self.nodes)

    def run(self, values: Mapping[str, torch.Tensor], device: torch.device, wide: bool = False) -> list[torch.Tensor]:
        """Its results; with `wide`, every float of the graph raised to float64.

        Raises:
            Exception: whatever an operation raises there.
        """
        known: dict[Node, Any] = {
            node: values[name].double() if wide and values[name].is_floating_point() else values[name]
            for node, name in self.inputs.items()
        }
        remaining = Counter(parent for node in self.nodes for parent in node.all_input_nodes)
        remaining.update(self.results)
        for node in self.nodes:
            known[node] = self._run(node, known, device, wide)
            for parent in node.all_input_nodes:
                remaining[parent] -= 1
                if not remaining[parent] and parent not in self.inputs:
                    known.pop(parent, None)
        return [known[node] for node in self.results]

    def _run(self, node: Node, known: Mapping[Node, Any], device: torch.device, wide: bool) -> Any:
        if operations.is_symbolic(node):
            return self.sizes.value(node)
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and node.target not in operations.VIEW:
            check_memory(torch.Size(self.sizes.shape(value)).numel() * value.element_size(), node)

        def argument(leaf: Any) -> Any:
            if isinstance(leaf, Node):
                return known[leaf] if leaf in known else self.sizes.value(leaf)
            if isinstance(leaf, torch.SymInt):
                return self.sizes.concrete(leaf)
            if isinstance(leaf, torch.device):
                return device
            return widest(leaf) if wide and isinstance(leaf, torch.dtype) else leaf

        mapped: Any = map_aggregate((node.args, node.kwargs), argument)
        args, kwargs = mapped
        if node.target is aten.as_strided.default and args[0].shape and _is_even(node.args[0]):
            args = (args[0].contiguous(), *args[1:])
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _is_even(node: Any) -> bool:
    return isinstance(node, Node) and bool(node.meta["val"].is_contiguous())
