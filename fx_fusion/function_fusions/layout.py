"""Where a result lies in memory: whoever takes the region's result may see its strides."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from fx_fusion.function_fusions.misses import Miss
from fx_fusion.graph import operations
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.edit import Emitter
from fx_fusion.graph.operations import aten
from fx_fusion.graph.sizes import same

_LARGE = sympy.Integer(1 << 20)


def check_layout(analysis: GraphAnalysis, old: Node, new: torch.Tensor) -> None:
    """
    Raises:
        Decline: ``region.strides``: what the replacement gives cannot be laid out as the region's result is.
    """
    value: torch.Tensor = old.meta["val"]
    if lies_alike(value, new) and not _is_restrided(analysis, old):
        return
    found = f"{{0}} has strides {_shown(value)}, the replacement gives {_shown(new)}"
    if _order(value) is None:
        raise Miss("region.strides", f"{found}; no copy can be laid out like that", [old])
    if _is_restrided(analysis, old) and (value.storage_offset() != 0 or _is_view(old)):
        raise Miss("region.strides", "{0} is a part of a tensor, and as_strided may read past it", [old])


def lies_alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Have they the same strides, dimensions of one element apart?"""
    pairs = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(same([step], [other]) for size, step, other in pairs if not same([size], [1]))


def laid_out_like(emit: Emitter, new: Node, value: torch.Tensor) -> Node:
    """`new`, copied if need be to where its elements lie as those of `value` do."""
    if lies_alike(value, new.meta["val"]):
        return new
    order = _order(value)
    assert order is not None
    back = [order.index(dim) for dim in range(len(order))]
    moved = emit.call(aten.permute.default, new, order)
    copied = emit.call(aten.clone.default, moved, memory_format=torch.contiguous_format)
    return emit.call(aten.permute.default, copied, back)


def _order(value: torch.Tensor) -> list[int] | None:
    """The dimensions, the outermost in memory first; None if elements overlap or leave gaps."""
    at = [_at_large(step) for step in value.stride()]
    order = sorted(range(value.dim()), key=lambda dim: (-at[dim], dim))
    expected: Any = 1
    for dim in reversed(order):
        if same([value.shape[dim]], [1]):
            continue
        if not same([value.stride()[dim]], [expected]):
            return None
        expected = expected * value.shape[dim]
    return order


def _at_large(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    return int(size.node.expr.xreplace(dict.fromkeys(size.node.expr.free_symbols, _LARGE)))


def _shown(value: torch.Tensor) -> str:
    return f"({', '.join(map(str, value.stride()))})"


def _is_view(node: Node) -> bool:
    return node.op == "call_function" and node.target in operations.VIEW


def _is_restrided(analysis: GraphAnalysis, node: Node) -> bool:
    """Does anybody read its memory by strides, maybe through views?"""
    stack, seen = [node], set[Node]()
    while stack:
        for user in analysis.users(stack.pop()):
            if user in seen:
                continue
            if user.target is aten.as_strided.default:
                return True
            seen.add(user)
            if user.target in operations.VIEW:
                stack.append(user)
    return False
