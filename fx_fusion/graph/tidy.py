"""A graph after its rewrites: in order again, without what they made dead or twice."""

from __future__ import annotations

from torch.fx import Graph

from fx_fusion.graph import operations
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.edit import EMITTED
from fx_fusion.graph.operations import aten, prims
from fx_fusion.graph.torch_compat import sort_topologically

#: What a rewrite computes indices with where the graph does not hold them.
_INDEX_ARITHMETIC = (prims.iota.default, aten.add.Tensor, aten.lt.Scalar, aten.where.self, aten.full.default)


def finish(graph: Graph) -> None:
    """Restore the topological order, and drop what the calls made dead."""
    sort_topologically(graph)
    _share_views(graph)
    for node in reversed(list(graph.nodes)):
        if (
            node.op == "call_function"
            and not node.users
            and not node.is_impure()
            and node.target is not aten.copy_.default
        ):
            graph.erase_node(node)
    graph.lint()


def _share_views(graph: Graph) -> None:
    """Views that the calls of several layers need alike become one, so that what they view is computed once."""
    analysis = GraphAnalysis(graph)
    for node in analysis.nodes:
        shared = node.target in operations.VIEW or node.target in _INDEX_ARITHMETIC
        if node.meta.get(EMITTED) and shared and analysis.canonical(node) is not node:
            node.replace_all_uses_with(analysis.canonical(node))
