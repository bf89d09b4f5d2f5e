"""Insert calls into a post-grad graph, each with its fake value, so that later passes see shapes and strides."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree
from torch.utils._sympy.functions import FloorDiv, Min

from fx_fusion.graph.nodes import value_of
from fx_fusion.graph.operations import aten
from fx_fusion.graph.sizes import same

Size = int | torch.SymInt

#: How the expression of a size is computed by nodes.
_ARITHMETIC: dict[Any, Any] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    FloorDiv: operator.floordiv,
    Min: torch.sym_min,
}

#: Key in ``meta`` of every node that a rewrite put into the graph.
EMITTED = "fx_fusion"

#: Key in ``meta`` of a graph input that stands for a cache, or for slots, that the graph does not hold.
STAND_IN = "fx_fusion_stand_in"


class Emitter:
    """Appends nodes at one place of `graph`; new nodes carry the source line of `origin`."""

    def __init__(self, graph: Graph, origin: Node) -> None:
        self._graph = graph
        self._origin = origin
        self._symbols: dict[Any, Node] = {}

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new node, its ``meta["val"]`` computed on fake tensors."""
        node = self._insert(target, args, kwargs)
        node.meta["val"] = fake_run(node, self._origin.meta.get("val"))
        return node

    def call_with_value(self, value: Any, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new node whose fake value is already known."""
        node = self._insert(target, args, kwargs)
        node.meta["val"] = value
        return node

    def size(self, size: Size) -> int | Node:
        """`size` as an argument: a number, or the node that holds it."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression.is_number:
            return int(expression)
        return self._size_of(expression)

    def _size_of(self, expression: Any) -> Node:
        if expression not in self._symbols:
            self._symbols[expression] = self._find_size(expression)
        return self._symbols[expression]

    def _insert(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        def resolve(value: Any) -> Any:
            return self.size(value) if isinstance(value, torch.SymInt) else value

        resolved: Any = map_aggregate((args, kwargs), resolve)
        node = self._graph.call_function(target, *resolved)
        node.meta[EMITTED] = True
        for key in ("stack_trace", "nn_module_stack"):
            if key in self._origin.meta:
                node.meta[key] = self._origin.meta[key]
        return node

    def _find_size(self, expression: Any) -> Node:
        for node in self._graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and value.node.expr == expression:
                return node
        for node in self._graph.nodes:
            value = node.meta.get("val")
            if node.op != "placeholder" or not isinstance(value, torch.Tensor):
                continue
            for dim, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt) and size.node.expr == expression:
                    return self.call(aten.sym_size.int, node, dim)
        combine = next((function for kind, function in _ARITHMETIC.items() if isinstance(expression, kind)), None)
        if combine is not None:
            return functools.reduce(functools.partial(self.call, combine), map(self._operand, expression.args))
        raise LookupError(f"no node of the graph holds the size {expression}")

    def _operand(self, expression: Any) -> Any:
        return int(expression) if expression.is_number else self._size_of(expression)


def take(emit: Emitter, source: Node, grid: Sequence[Size], tail: Sequence[tuple[int, int, int, int]]) -> Node:
    """A view [*grid, *tail] of `source`, whose rows follow `grid` in order.

    Each entry of `tail` is (length, offset, step, extent): the elements ``offset + i * step``, i < length, of a
    dimension of `extent` elements; the extents together make up one row.
    """
    shape = [*grid, *(extent for *_, extent in tail)]
    view = source
    if not same(source.meta["val"].shape, shape):
        view = emit.call(aten.reshape.default, source, list(map(emit.size, shape)))
    for dim, (length, offset, step, extent) in enumerate(tail, start=len(grid)):
        if (offset, step, length) != (0, 1, extent):
            view = emit.call(aten.slice.Tensor, view, dim, offset, offset + step * (length - 1) + 1, step)
    return view


def fake_run(node: Node, beside: Any) -> Any:
    """What `node` makes of its arguments' fake values; `beside` knows the mode where no argument does."""
    args, kwargs = map_aggregate((node.args, node.kwargs), value_of)  # type: ignore[misc]
    with fake_mode_of((args, kwargs, beside)):
        return node.target(*args, **kwargs)  # type: ignore[operator]


def fake_mode_of(values: Any) -> contextlib.AbstractContextManager[Any]:
    """The mode of the first fake tensor among `values`."""
    for value in pytree.tree_leaves(values):
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return contextlib.nullcontext()
