"""Symbolic sizes: what a region may do with them, and at which it is tried.

A region is proved at a few sizes, so a size may do no more than measure: say how long a dimension is, where a slice
ends, how many elements a literal has. One that reaches data, a literal or an index makes the region another function
at every size, and two sizes do not tell which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from fx_fusion.function_fusions.misses import Miss
from fx_fusion.graph import operations
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.operations import aten, prims
from fx_fusion.graph.sizes import Sizes, admissible_sizes
from fx_fusion.graph.torch_compat import FloorDiv, pytree

#: Which arguments of an operation only measure: all of movement, and the shapes of what is made.
_MEASURES: Mapping[Any, tuple[int, ...]] = {
    aten.full.default: (0,),
    aten.new_full.default: (1,),
    aten.empty.memory_format: (0,),
    aten.empty_strided.default: (0, 1),
    aten.new_empty.default: (1,),
    aten.new_empty_strided.default: (1, 2),
    aten.zeros.default: (0,),
    aten.ones.default: (0,),
    aten.as_strided.default: (1, 2),
    prims.iota.default: (0,),
}

#: Joins and what else moves whole values, with sizes that say where.
_MOVING = operations.MOVEMENT | operations.VIEW | {aten.slice_scatter.default, aten.constant_pad_nd.default}

#: Of these a size may be made without being another one from some size on.
_PLAIN = (sympy.Add, sympy.Mul, sympy.Symbol, sympy.Integer, FloorDiv)


#: Sizes at which a region is tried beside those of the graph's analysis: one or the least, and a great one.
_FURTHER = ((1, 2, 3, 5, 7, 11), (1030, 263, 131, 67, 2056, 37))

#: A region whose tensors have more elements at the great size is not tried there.
_ELEMENTS = 1 << 23


def all_sizes(analysis: GraphAnalysis, nodes: Sequence[Node]) -> list[Sizes]:
    """The sizes at which the region `nodes` is proved."""
    found = list(analysis.sizes)
    if not found[0].values:
        return found
    for candidates in _FURTHER:
        sizes = admissible_sizes(analysis.nodes, candidates, 1)[0]
        if sizes not in found and _elements(nodes, sizes) <= _ELEMENTS:
            found.append(sizes)
    return found


def _elements(nodes: Sequence[Node], sizes: Sizes) -> int:
    values = [node.meta.get("val") for node in nodes]
    return sum(torch.Size(sizes.shape(value)).numel() for value in values if isinstance(value, torch.Tensor))


def check_sizes(nodes: Iterable[Node]) -> None:
    """
    Raises:
        Decline: ``region.sizes``, naming the node that a symbolic size reaches.
    """
    for node in nodes:
        if node.op != "call_function" or operations.is_symbolic(node):
            continue
        for size in _measured(node):
            if not _is_plain(size):
                raise Miss("region.sizes", f"{{0}} is as long as {size} says, which is no sum of sizes", [node])
        reaching = [size for argument in _others(node) for size in _symbolic(argument)]
        if reaching:
            found = f"the size {reaching[0]} is an operand of {{0}} ({node.target}); expected it to be an extent only"
            raise Miss("region.sizes", found, [node])


def _others(node: Node) -> list[Any]:
    """The arguments that do more than measure."""
    if node.target in _MOVING:
        return []
    measures = _MEASURES.get(node.target, ())
    return [value for i, value in enumerate(node.args) if i not in measures] + list(node.kwargs.values())


def _measured(node: Node) -> list[Any]:
    value = node.meta.get("val")
    shapes = [leaf.shape for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    inside = _symbolic([list(node.args), dict(node.kwargs)]) if node.target in _MOVING else []
    return [*(expression for shape in shapes for expression in _symbolic(list(shape))), *inside]


def _symbolic(value: Any) -> list[Any]:
    """The expressions of the symbolic sizes among the leaves of an argument."""
    found: list[Any] = []
    for leaf in pytree.tree_leaves(value):
        size = leaf.meta["val"] if isinstance(leaf, Node) and operations.is_symbolic(leaf) else leaf
        if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) and size.node.expr.free_symbols:
            found.append(size.node.expr)
    return found


def _is_plain(expression: Any) -> bool:
    return all(isinstance(each, _PLAIN) for each in sympy.preorder_traversal(expression))
