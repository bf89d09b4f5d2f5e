"""Insert calls into a post-grad graph, each with its fake value, so that later passes see shapes and strides."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

import sympy
import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from fx_fusion.graph.operations import aten, value_of
from fx_fusion.graph.sizes import same
from fx_fusion.graph.torch_compat import FakeTensor, FloorDiv, Min, pytree

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


T = TypeVar("T")


class Emit(Protocol[T]):
    """Writes one computation, step by step: into a graph, on fake values, as source text."""

    def of(self, node: Node) -> T:
        """The value of a node of the graph."""
        ...

    def call(self, target: Any, *args: Any, **kwargs: Any) -> T:
        """One step: an operation of values, sizes and literals."""
        ...

    def size(self, size: Size) -> Any:
        """`size` as an argument of a step."""
        ...

    def has_shape(self, value: T, shape: Sequence[Any]) -> bool:
        """Is it known that `value` has this shape, so that no reshape is needed?"""
        ...


class FakeEmitter:
    """Runs each step on fake values, and keeps in `made` what each gives. Adds no guard."""

    def __init__(self, origin: Node) -> None:
        self.made: list[Any] = []
        self._origin = origin.meta["val"]

    def of(self, node: Node) -> torch.Tensor:
        return node.meta["val"]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        with fake_mode_of((args, kwargs, self._origin)) as mode, _without_guards(mode):
            value = target(*args, **kwargs)
        self.made.append(value)
        return value

    def size(self, size: Size) -> Size:
        return size

    def has_shape(self, value: torch.Tensor, shape: Sequence[Size]) -> bool:
        return same(value.shape, shape)


def _without_guards(mode: Any) -> contextlib.AbstractContextManager[Any]:
    env = getattr(mode, "shape_env", None)
    return contextlib.nullcontext() if env is None else env.suppress_guards()


class Emitter:
    """Appends nodes at one place of `graph`; new nodes carry the source line of `origin`.

    Args:
        made: the fake values of the first steps, where the same steps were run by :class:`FakeEmitter` before.
    """

    def __init__(self, graph: Graph, origin: Node, made: Iterable[Any] = ()) -> None:
        self._graph = graph
        self._origin = origin
        self._made = iter(made)
        self._symbols: dict[Any, Node] = {}

    def of(self, node: Node) -> Node:
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new node, its ``meta["val"]`` computed on fake tensors."""
        node = self._insert(target, args, kwargs)
        known = next(self._made, None)
        node.meta["val"] = self._run(node) if known is None else known
        return node

    def _run(self, node: Node) -> Any:
        return fake_run(node, self._origin.meta.get("val"))

    def has_shape(self, value: Node, shape: Sequence[Size]) -> bool:
        return same(value.meta["val"].shape, shape)

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
                    return self._compute(aten.sym_size.int, node, dim)
        combine = next((function for kind, function in _ARITHMETIC.items() if isinstance(expression, kind)), None)
        if combine is not None:
            return functools.reduce(functools.partial(self._compute, combine), map(self._operand, expression.args))
        raise LookupError(f"no node of the graph holds the size {expression}")

    def _compute(self, target: Any, *args: Any) -> Node:
        """A size: no step of those that were run before."""
        node = self._insert(target, args, {})
        node.meta["val"] = self._run(node)
        return node

    def _operand(self, expression: Any) -> Any:
        return int(expression) if expression.is_number else self._size_of(expression)


def take(emit: Emit[T], source: T, rows: Sequence[Any], tail: Sequence[tuple[int, int, int, int]]) -> T:
    """A view [*rows, *tail] of `source`, whose rows follow each other in order.

    Each entry of `tail` is (length, offset, step, extent): the elements ``offset + i * step``, i < length, of a
    dimension of `extent` elements; the extents together make up one row.
    """
    shape = [*rows, *(extent for *_, extent in tail)]
    view = source
    if not emit.has_shape(source, shape):
        view = emit.call(aten.reshape.default, source, [emit.size(size) for size in shape])
    for dim, (length, offset, step, extent) in enumerate(tail, start=len(rows)):
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
