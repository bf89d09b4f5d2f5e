"""A graph after its rewrites: in order again, without what they made dead or twice."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from fx_fusion.graph import operations
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.edit import EMITTED, fake_run
from fx_fusion.graph.operations import aten, prims
from fx_fusion.graph.sizes import depends_on_data, same, steps
from fx_fusion.graph.torch_compat import pytree, sort_topologically

#: What a rewrite computes indices with where the graph does not hold them.
_INDEX_ARITHMETIC = (prims.iota.default, aten.add.Tensor, aten.lt.Scalar, aten.where.self, aten.full.default)


def sort(graph: Graph) -> None:
    """Restore the topological order, and have each fake value as its arguments make it."""
    sort_topologically(graph)
    _refresh(graph)


def finish(graph: Graph) -> None:
    """Restore the topological order, and drop what the calls made dead."""
    sort(graph)
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


def _refresh(graph: Graph) -> None:
    """What is computed from the results of a call may lie otherwise in memory than before: new fake values for it."""
    changed: set[Node] = set()
    for node in graph.nodes:
        if node.meta.get(EMITTED) or (not changed.isdisjoint(node.all_input_nodes) and _has_moved(node)):
            changed.add(node)


def _has_moved(node: Node) -> bool:
    """Give `node` its new fake value, if it has one."""
    before = node.meta.get("val")
    if node.op != "call_function" or node.target is aten.copy_.default or depends_on_data(before):
        return False
    try:
        now = fake_run(node, before)
    except Exception:  # an opaque operation without a fake implementation
        return False
    if all(map(_lies_alike, pytree.tree_leaves(before), pytree.tree_leaves(now))):
        return False
    node.meta["val"] = now
    return True


def _lies_alike(value: Any, other: Any) -> bool:
    return not isinstance(value, torch.Tensor) or (same(value.shape, other.shape) and same(steps(value), steps(other)))


def _share_views(graph: Graph) -> None:
    """Views that the calls of several layers need alike become one, so that what they view is computed once."""
    analysis = GraphAnalysis(graph)
    for node in analysis.nodes:
        shared = node.target in operations.VIEW or node.target in _INDEX_ARITHMETIC
        if node.meta.get(EMITTED) and shared and analysis.canonical(node) is not node:
            node.replace_all_uses_with(analysis.canonical(node))
