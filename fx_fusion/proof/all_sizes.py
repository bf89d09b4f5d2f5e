"""What holds at a few sizes holds at all of them: a symbol is an extent, along which each step treats tokens alike.

Regions are read and proved at small sizes. That is a proof for every size if a symbol does nothing but count: it may be
the extent of a shape; it may not be a factor, take part in a comparison or an index, or say where a slice begins. Then
each step commutes with leaving some tokens out (:mod:`fx_fusion.proof.token_reduction` has the rules), so what the
region computes of a token does not depend on how many others there are.

The rules are asked at sizes that are large, different primes, each larger than every number of the region: what then
divides or equals what, does so because the expressions do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from fx_fusion.decline import Decline
from fx_fusion.graph import operations
from fx_fusion.graph.operations import aten, prims, value_of
from fx_fusion.graph.sizes import Sizes, same
from fx_fusion.graph.torch_compat import pytree
from fx_fusion.proof.token_reduction import Axis, Follow, assignments, is_free, places_of

#: No extent of a model is a multiple of a prime beyond this, unless it is the symbol's own.
_LARGE = 10_000

#: Beyond this a number in a graph stands for "as far as it goes".
_ENDLESS = 1 << 31

#: Where an operation takes extents.
_EXTENTS: dict[Any, int] = {
    **dict.fromkeys(operations.RESHAPE, 1),
    aten.expand.default: 1,
    aten.repeat.default: 1,
    aten.full.default: 0,
}


def check_all_sizes(inputs: Iterable[Node], outputs: Iterable[Node], follow: Follow | None = None) -> None:
    """Raise Decline unless what is measured of the steps from `inputs` to `outputs` at some sizes holds at all.

    Raises:
        Decline: ``region.sizes``, with the symbol, and the step that it reaches or along which tokens are not alike.
    """
    follow = follow or {}
    given, ends = dict.fromkeys(inputs), list(dict.fromkeys(outputs))
    steps = _steps(ends, given, follow)
    given.update(dict.fromkeys(node for node in steps if node.op != "call_function"))
    steps = [node for node in steps if node not in given]
    for node in steps:
        if node not in follow:
            _check_arguments(node)
    nodes = [*given, *steps]
    symbols = sorted({symbol for node in nodes for shape in _shapes(node) for symbol in _symbols(*shape)}, key=str)
    if not symbols or not steps:
        return
    large = Sizes(dict(zip(symbols, _primes(nodes), strict=False)))
    copies = _at(large, given, steps, follow)
    followed = {copies[node]: (copies[other], further) for node, (other, further) in follow.items() if node in copies}
    for symbol in symbols:
        _check_symbol(symbol, large.values[symbol], steps, copies, followed)


def _steps(outputs: Iterable[Node], inputs: Mapping[Node, None], follow: Follow) -> list[Node]:
    """The nodes between, each after what it needs; of what follows another node, that one alone."""
    done: dict[Node, None] = {}
    stack = list(outputs)
    while stack:
        node = stack[-1]
        read = [follow[node][0]] if node in follow else node.all_input_nodes
        needs = [parent for parent in read if not operations.is_symbolic(parent)]
        missing = [] if node in inputs or node in done else [p for p in needs if p not in inputs and p not in done]
        if missing:
            stack.extend(missing)
            continue
        stack.pop()
        if node not in inputs:
            done[node] = None
    return list(done)


# --- what a symbol may be ---------------------------------------------------------------------------------------------


def _check_arguments(node: Node) -> None:
    """A symbol among the arguments of `node` is an extent: that of a shape, or of the dimension that is sliced."""
    counted = _symbols(*node.meta["val"].shape) if node.target is prims.iota.default else []
    if counted:
        raise _refused(counted[0], f"{node} counts up to it, and is then more than an extent", node)
    for place, argument in (*enumerate(node.args), *node.kwargs.items()):
        for leaf in _leaves(argument):
            found = _symbols(value_of(leaf))
            if found and place != _EXTENTS.get(node.target) and not _is_whole_slice(node, place, leaf):
                raise _refused(found[0], f"it reaches {node} ({node.target}) as a number", node)


def _is_whole_slice(node: Node, place: Any, end: Any) -> bool:
    """Is `end` where the sliced dimension ends?"""
    if node.target is not aten.slice.Tensor or place not in (3, "end"):
        return False
    shape = value_of(node.args[0]).shape
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return same([shape[dim]], [value_of(end)])


def _refused(symbol: sympy.Symbol, why: str, node: Node) -> Decline:
    found = f"the size {symbol} is a symbol, and {why}; expected it to be the extent of a dimension, and nothing else"
    return Decline("region.sizes", found, [node])


def _symbols(*sizes: Any) -> list[sympy.Symbol]:
    """The symbols in `sizes`; what is no number has none."""
    kinds = (torch.SymInt, torch.SymFloat, torch.SymBool)
    found = {symbol for size in sizes if isinstance(size, kinds) for symbol in size.node.expr.free_symbols}
    return sorted(found, key=str)


def _leaves(argument: Any) -> list[Any]:
    return pytree.tree_leaves(argument, is_leaf=lambda each: isinstance(each, Node))


# --- are tokens alike along it? ---------------------------------------------------------------------------------------


def _check_symbol(
    symbol: sympy.Symbol, size: int, steps: Sequence[Node], copies: Mapping[Node, Node], follow: Follow
) -> None:
    """Along `symbol`, here `size`, the steps commute with leaving tokens out; each value has one such dimension."""
    originals = {copies[node]: node for node in steps}
    places = {
        copy: list(places_of(copy, size, always=True)) if _has(node, symbol) else [None]
        for node, copy in copies.items()
        if copy not in originals or is_free(copy)
    }
    furthest = -1
    for axes in assignments(places, list(originals), size, follow):
        if isinstance(axes, Node):
            furthest = max(furthest, steps.index(originals[axes]))
            continue
        odd = [node for node, copy in copies.items() if not _lies_in(axes[copy], _dims(node, symbol))]
        if not odd:
            return
        furthest = max(furthest, *(steps.index(node) if node in steps else 0 for node in odd[:1]))
    node = steps[max(furthest, 0)]
    raise _refused(symbol, f"{node} ({node.target}) does not treat alike what lies along it", node)


def _lies_in(axis: Axis | None, dims: Iterable[set[int]]) -> bool:
    """Is the symbol part of the axis's dimension, and of no other?"""
    return all(each == (set() if axis is None else {axis.dim}) for each in dims)


def _has(node: Node, symbol: sympy.Symbol) -> bool:
    return any(_dims(node, symbol))


def _dims(node: Node, symbol: sympy.Symbol) -> list[set[int]]:
    """The dimensions that `symbol` is part of, for each tensor that `node` gives."""
    return [{dim for dim, size in enumerate(shape) if symbol in _symbols(size)} for shape in _shapes(node)]


def _shapes(node: Node) -> list[tuple[Any, ...]]:
    value = node.meta["val"]
    return [tuple(each.shape) for each in (value if isinstance(value, (list, tuple)) else [value])]


def _primes(nodes: Sequence[Node]) -> Iterator[int]:
    """Different ones, larger than every number among shapes and arguments."""
    numbers = [size for node in nodes for shape in _shapes(node) for size in shape]
    numbers += [leaf for node in nodes for leaf in _leaves((node.args, node.kwargs))]
    prime = max([_LARGE, *(abs(number) for number in numbers if type(number) is int and abs(number) < _ENDLESS)])
    while True:
        prime = int(sympy.nextprime(prime))
        yield prime


def _at(sizes: Sizes, inputs: Iterable[Node], steps: Sequence[Node], follow: Follow) -> dict[Node, Node]:
    """A copy of each node, in a graph of its own, whose shapes and arguments are numbers."""
    graph = Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}

    def concrete(argument: Any) -> Any:
        if isinstance(argument, Node):
            return sizes.value(argument) if operations.is_symbolic(argument) else copies[argument]
        return sizes.concrete(argument) if isinstance(argument, torch.SymInt) else argument

    for node in steps:
        args, kwargs = map_aggregate((node.args, node.kwargs), concrete) if node not in follow else ((), {})
        copies[node] = graph.create_node("call_function", node.target, args, kwargs, node.name)
    for node, copy in copies.items():
        copy.meta = {"val": pytree.tree_map_only(torch.Tensor, lambda each: _empty(each, sizes), node.meta["val"])}
    return copies


def _empty(value: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    return torch.empty(sizes.shape(value), dtype=value.dtype, device="meta")
