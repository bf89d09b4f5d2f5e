"""How a call of a custom operation stands in a post-grad graph: as it is, or functionalised in one of two ways.

An operation that writes its arguments arrives as ``auto_functionalized`` (copies of the written arguments go in, their
new values come out) or as ``auto_functionalized_v2`` (whole base tensors go in and come out, and each written argument
is described as a view of one of them).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate

from fx_fusion.decline import Decline
from fx_fusion.graph.operations import value_of
from fx_fusion.graph.strided import Box, box_of, cut, disjoint, whole
from fx_fusion.graph.torch_compat import (
    AliasViewInfo,
    AsStridedViewInfo,
    NotView,
    OpOverload,
    SliceViewInfo,
    auto_functionalized,
    auto_functionalized_v2,
    get_mutable_args,
    read_view_information_from_args,
)


@dataclass(frozen=True)
class WrittenView:
    """A written argument: the part `box` of `base`, in shape `size`.

    If its dimensions follow each other otherwise than in `base`, `order` holds them as they do there.
    """

    base: Node
    box: Box
    size: tuple[Any, ...]
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class OpaqueCall:
    """`node` calls `op` with `arguments`, by name; those in `parts` are written, and are views of a base.

    ``arguments`` holds nodes and literals; an argument in `parts` is missing there.
    """

    node: Node
    op: OpOverload
    arguments: Mapping[str, Any]
    written: tuple[str, ...]
    parts: Mapping[str, WrittenView]

    @property
    def bases(self) -> list[Node]:
        """What v2 hands in and out whole."""
        return list(self.node.kwargs["_all_bases"]) if self.node.target is auto_functionalized_v2 else []  # type: ignore[arg-type]

    @property
    def returns(self) -> int:
        return len(self.op._schema.returns)

    def result(self, i: int) -> list[Node]:
        """The nodes that hold result `i`."""
        if not self.written and self.returns == 1:
            return [self.node]
        return [user for user in self.node.users if user.target is operator.getitem and user.args[1] == i]

    @property
    def first_written(self) -> int:
        """Number of the first result that is a written argument, or base."""
        return max(1, self.returns)


@dataclass(frozen=True)
class FusedCall:
    """A call of a fused operation that stores keys and values, functionalised, as a rewrite put it into the graph.

    Attributes:
        tensors: its operands by their names in the schema, but for the caches; None for one that is absent.
        options: everything else, by name.
        q, k: what holds the rotated q and k; None where nothing uses it.
    """

    node: Node
    tensors: Mapping[str, Node | None]
    options: Mapping[str, Any]
    k_cache: Node
    v_cache: Node
    q: Node | None
    k: Node | None


def operation(node: Node) -> OpOverload | None:
    """The operation outside ATen that `node` calls, functionalised or not."""
    if node.op != "call_function":
        return None
    op = node.args[0] if node.target in (auto_functionalized, auto_functionalized_v2) and node.args else node.target
    if not isinstance(op, OpOverload) or op.namespace in ("aten", "prims"):
        return None
    return op


def read_call(node: Node, op: OpOverload) -> OpaqueCall:
    """Raises Decline ``meaning.in_place`` or ``meaning.views``."""
    names = [argument.name for argument in op._schema.arguments]
    if node.target is auto_functionalized:
        return OpaqueCall(node, op, dict(node.kwargs), tuple(get_mutable_args(op)[0]), {})
    if node.target is auto_functionalized_v2:
        return _read_v2(node, op)
    if op._schema.is_mutable:
        found = f"{op} writes its arguments in place here; expected a functionalised graph: run the pass earlier"
        raise Decline("meaning.in_place", found, [node])
    return OpaqueCall(node, op, {**dict(zip(names, node.args, strict=False)), **node.kwargs}, (), {})


def _read_v2(node: Node, op: OpOverload) -> OpaqueCall:
    names, types = get_mutable_args(op)
    given: dict[str, Any] = dict(node.kwargs)
    bases: list[Node] = given.pop("_all_bases")
    if not all(f"_{name}_base_index" in given for name in names):
        raise Decline("meaning.views", f"{op} writes to tensors that it is not given, or to lists of them", [node])
    views = read_view_information_from_args(names, types, given, bases)  # type: ignore[arg-type]
    parts: dict[str, WrittenView] = {}
    for name, view in views.items():
        if view is None:
            given[name] = None
            continue
        base = bases[view.base_index]
        parts[name] = _part(node, name, base, view)
    _check_disjoint(node, parts)
    return OpaqueCall(node, op, given, tuple(names), parts)


def _part(node: Node, name: str, base: Node, view: Any) -> WrittenView:
    value: torch.Tensor = base.meta["val"]
    if isinstance(view, (NotView, AliasViewInfo)):
        return WrittenView(base, whole(value), tuple(value.shape))
    if isinstance(view, SliceViewInfo):
        dim, start, end = (value_of(each) for each in (view.dim, view.start, view.end))
        box = cut(value, dim, start, end)
        return WrittenView(base, box, tuple(length for _, length in box))
    assert isinstance(view, AsStridedViewInfo), view
    size: Any = map_aggregate(tuple(view.size), value_of)
    stride: Any = map_aggregate(tuple(view.stride), value_of)
    offset = value_of(view.storage_offset)
    for order in ((), _widest_first(stride)):
        dims = order or range(len(size))
        found = box_of(value, [size[dim] for dim in dims], [stride[dim] for dim in dims], offset)
        if found is not None:
            return WrittenView(base, found, tuple(size), order)
    reason = f"{name} of {node} is no rectangular part of {base}: size {list(size)}, stride {list(stride)}"
    raise Decline("meaning.views", reason, [node])


def _widest_first(stride: Sequence[Any]) -> tuple[int, ...]:
    known = all(isinstance(step, int) for step in stride)
    return tuple(sorted(range(len(stride)), key=lambda dim: -stride[dim])) if known else ()


def _check_disjoint(node: Node, parts: Mapping[str, WrittenView]) -> None:
    items = list(parts.items())
    for i, (name, part) in enumerate(items):
        for other, its in items[:i]:
            if part.base is its.base and not disjoint(part.box, its.box):
                raise Decline("meaning.views", f"{name} and {other} of {node} may overlap in {part.base}", [node])
