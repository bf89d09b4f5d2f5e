"""The same computation at fewer tokens: a prefill of 4096 tokens is read and proved at three of them.

An operation treats tokens alike along an *axis* of its arguments if it commutes with leaving some of them out: first
dropping tokens of every argument, then computing, gives what computing and then dropping them gives. If each step from
the inputs to the outputs does, the whole does. Then the small copy, with a shorter axis, computes of any few tokens
what the original computes of them, and what is proved of the copy holds for every choice of tokens, hence for all.

Two tokens at least remain, so that one can be told from the next: with a single one, a row per token and a row for all
tokens would look alike. Nothing here is sampled: a step without a rule below ends the attempt, and the region is
evaluated as it stands.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Graph, Node

from fx_fusion.graph import operations
from fx_fusion.graph.operations import aten, prims
from fx_fusion.proof.evaluate import schedule

#: Regions of no more tokens are evaluated as they stand.
ENOUGH = 16

#: How many tokens an axis may keep. The first is taken that is no size of the region: a layout that mixes two
#: dimensions up must not look right.
_FEW = (3, 5, 7, 11, 13)

_MANY_ATTEMPTS = 64


@dataclass(frozen=True)
class Axis:
    """Tokens lie in dimension `dim` of a tensor, which is [outer, tokens, inner], flattened."""

    dim: int
    outer: int = 1
    inner: int = 1

    def size(self, tokens: int) -> int:
        return self.outer * tokens * self.inner


class _TokensMix(Exception):
    """A step is not known to treat tokens alike."""


Axes = Mapping[Node, Axis | None]
"""Where the tokens lie in each value; None for a value that no token enters."""

Follow = Mapping[Node, tuple[Node, int]]
"""Steps whose tokens lie where those of another node do, so many dimensions further on, whatever else they read."""

_NOTHING: Follow = MappingProxyType({})


def fewer_tokens(inputs: Sequence[Node], outputs: Sequence[Node], carrier: Node, tokens: int) -> dict[Node, Node]:
    """A copy of the steps from `inputs` to `outputs` at fewer tokens, in a graph of its own; empty where there is none.

    Args:
        carrier: the input that holds `tokens` tokens; whether and where others hold them, is found.

    Returns:
        The copy of each node. The inputs become placeholders, and every node carries its new shape.
    """
    copies: dict[Node, Node] = {}
    size = tokens
    while size > ENOUGH:
        ends = [copies.get(node, node) for node in (carrier, *outputs)]
        sources = [copies.get(node, node) for node in inputs]
        found = _shorten(sources, ends[1:], ends[0], size)
        if found is None:
            break
        step, size = found
        copies = {node: step[copy] for node, copy in copies.items()} if copies else step
    return copies


def _shorten(
    inputs: Sequence[Node], outputs: Sequence[Node], carrier: Node, tokens: int
) -> tuple[dict[Node, Node], int] | None:
    """One axis made short, the longest that there is; and how many tokens are left."""
    steps = schedule(outputs, set(inputs))
    if any(node.op != "call_function" for node in steps) or not all(map(_is_static, (*inputs, *steps))):
        return None
    taken = {extent for node in (*inputs, *steps) for shape in _shapes(node) for extent in shape}
    few = next((few for few in _FEW if few not in taken), None)
    if few is None or 0 in taken:
        return None
    ends = {*_shapes(carrier)[0], *(size for node in outputs for size in _shapes(node)[0]), tokens}
    for size in sorted((size for size in ends if tokens % size == 0 and size > few), reverse=True):
        places = {
            node: list(places_of(node, size, always=node is carrier)) for node in (*inputs, *filter(is_free, steps))
        }
        for axes in assignments(places, steps, size):
            if not isinstance(axes, Node) and all(axes[node] for node in outputs):
                return _copy(inputs, steps, axes, size, few), tokens // size * few
    return None


def _shapes(node: Node) -> list[tuple[int, ...]]:
    value = node.meta["val"]
    return [tuple(each.shape) for each in (value if isinstance(value, (list, tuple)) else [value])]


def _is_static(node: Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(each, torch.Tensor) and all(type(n) is int for n in each.shape) for each in values)


def assignments(
    places: Mapping[Node, Sequence[Axis | None]], steps: Sequence[Node], size: int, follow: Follow = _NOTHING
) -> Iterator[dict[Node, Axis | None] | Node]:
    """Every way to lay an axis of `size` with which all `steps` treat tokens alike; of one that ends, where it does.

    Any of them will do. A size may occur twice (128 tokens, 128 lanes), so that there is more than one to try.

    Args:
        places: where it may lie in each input, and in each of `steps` that :func:`is_free`.
    """
    for chosen in itertools.islice(itertools.product(*places.values()), _MANY_ATTEMPTS):
        given = dict(zip(places, chosen, strict=True))
        axes: dict[Node, Axis | None] = {node: axis for node, axis in given.items() if node not in steps}
        node = None
        try:
            for node in steps:
                if node in follow:
                    axes[node] = _followed(node, *follow[node], axes, size)
                else:
                    axes[node] = _axis_after(node, axes, size, given.get(node))
        except _TokensMix:
            assert node is not None
            yield node
        else:
            yield axes


def is_free(node: Node) -> bool:
    """May `node` hold tokens though none enters it, each of them the same?"""
    return node.target in _REPEATERS


def places_of(node: Node, size: int, *, always: bool) -> Iterator[Axis | None]:
    """Where a value may hold the axis: in a dimension of that size, or outermost or innermost in a larger one."""
    for dim, extent in enumerate(_shapes(node)[0]):
        if extent == size:
            yield Axis(dim)
        elif extent % size == 0:
            yield from (Axis(dim, inner=extent // size), Axis(dim, outer=extent // size))
    if not always:
        yield None


# --- what each operation does to the axis -------------------------------------------------------------------------


def _axis_after(node: Node, axes: Axes, size: int, broadcast: Axis | None) -> Axis | None:
    """Where the tokens lie in the result of `node`. Raises _TokensMix unless it is known to treat them alike."""
    carried = {parent: axis for parent in node.all_input_nodes if (axis := axes[parent]) is not None}
    if not carried:
        return broadcast and _REPEATERS[node.target](node, broadcast, size)
    rule = _RULES.get(operations.row(node).tokens)
    if rule is None:
        raise _TokensMix
    axis = rule(node, carried, size)
    if any(shape[axis.dim] != axis.size(size) for shape in _shapes(node)):
        raise _TokensMix
    return axis


def _followed(node: Node, other: Node, further: int, axes: Axes, size: int) -> Axis | None:
    axis = axes[other]
    if axis is None:
        return None
    axis = replace(axis, dim=axis.dim + further)
    if any(shape[axis.dim] != axis.size(size) for shape in _shapes(node)):
        raise _TokensMix
    return axis


def _expanded(node: Node, axis: Axis, size: int) -> Axis:
    """A value without tokens, expanded to all of them, may count as holding them: the same for each."""
    shape = _shapes(node.all_input_nodes[0])[0]
    dim = axis.dim - len(_shapes(node)[0]) + len(shape)
    if dim >= 0 and shape[dim] != 1:
        raise _TokensMix
    return axis


def _repeated_whole(node: Node, axis: Axis, size: int) -> Axis:
    """So is one that is repeated once a token."""
    shape, times = _shapes(node.all_input_nodes[0])[0], node.args[1]
    assert isinstance(times, (list, tuple))
    dim = axis.dim - len(times) + len(shape)
    if times[axis.dim] != size or axis != Axis(axis.dim, inner=shape[dim] if dim >= 0 else 1):
        raise _TokensMix
    return axis


def _filled(node: Node, axis: Axis, size: int) -> Axis:
    """So is one that holds a single number."""
    return axis


#: What makes a value of one that no token enters, the same for each token: where the tokens may lie in it.
_REPEATERS: dict[Any, Callable[[Node, Axis, int], Axis]] = {
    aten.expand.default: _expanded,
    aten.repeat.default: _repeated_whole,
    aten.full.default: _filled,
}


Carried = Mapping[Node, Axis]
Rule = Callable[[Node, Carried, int], Axis]


def _one(axes: Iterable[Axis]) -> Axis:
    """The axis that all have in common."""
    found = set(axes)
    if len(found) != 1:
        raise _TokensMix
    return found.pop()


def _pointwise(node: Node, carried: Carried, size: int) -> Axis:
    """Arguments are aligned at their last dimensions; those without tokens are the same for each of them."""
    rank = len(_shapes(node)[0])
    axis = _one(
        replace(axis, dim=axis.dim + rank - len(_shapes(parent)[0])) for parent, axis in carried.items()
    )  # fmt: skip
    for parent in node.all_input_nodes:
        shape = _shapes(parent)[0]
        dim = axis.dim - rank + len(shape)
        if parent not in carried and dim >= 0 and shape[dim] != 1:
            raise _TokensMix
    return axis


def _view(node: Node, carried: Carried, size: int) -> Axis:
    """A view that keeps the dimension whole: only elements along the axis are apart, so it is found by its stride."""
    (source, axis) = next(iter(carried.items()))
    shape = _shapes(source)[0]
    strides = [int(dim == axis.dim) for dim in range(len(shape))]
    probe = torch.empty_strided(shape, strides, device="meta")
    result: Any = node.target(probe, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    first: torch.Tensor = result if isinstance(result, torch.Tensor) else result[0]
    for dim, (extent, stride) in enumerate(zip(first.shape, first.stride(), strict=True)):
        if stride == 1 and extent == shape[axis.dim]:
            return replace(axis, dim=dim)
    raise _TokensMix


def _reshape(node: Node, carried: Carried, size: int) -> Axis:
    """Elements keep their order: as many lie before the axis, and within one step of it, as did."""
    (source, axis) = next(iter(carried.items()))
    shape, new = _shapes(source)[0], _shapes(node)[0]
    before, after = math.prod(shape[: axis.dim]) * axis.outer, axis.inner * math.prod(shape[axis.dim + 1 :])
    for dim in range(len(new)):
        outer, cut_before = divmod(before, math.prod(new[:dim]))
        inner, cut_after = divmod(after, math.prod(new[dim + 1 :]))
        found = Axis(dim, outer, inner)
        if not cut_before and not cut_after and found.size(size) == new[dim]:
            return found
    raise _TokensMix


def _reduction(node: Node, carried: Carried, size: int) -> Axis:
    (source, axis) = next(iter(carried.items()))
    rank = len(_shapes(source)[0])
    dims = _dims(node.args[1] if len(node.args) > 1 else [], rank)
    if not dims or axis.dim in dims:
        raise _TokensMix
    keeps = len(_shapes(node)[0]) == rank
    return axis if keeps else replace(axis, dim=axis.dim - sum(dim < axis.dim for dim in dims))


def _along_others(node: Node, carried: Carried, size: int) -> Axis:
    """Reorders elements along the dimensions that its last argument names."""
    (source, axis) = next(iter(carried.items()))
    dims = _dims(node.args[-1], len(_shapes(source)[0]))
    if not dims or axis.dim in dims or len(node.args) != _ARGUMENTS[node.target]:
        raise _TokensMix
    return axis


#: How many arguments those have that name dimensions last.
_ARGUMENTS: dict[Any, int] = {aten.flip.default: 2, prims.rev.default: 2, aten.roll.default: 3}


def _cat(node: Node, carried: Carried, size: int) -> Axis:
    axis = _one(carried.values())
    if len(carried) != len(node.all_input_nodes) or _dim(node, 1, 0, node.all_input_nodes[0]) == axis.dim:
        raise _TokensMix
    return axis


def _stack(node: Node, carried: Carried, size: int) -> Axis:
    axis = _one(carried.values())
    if len(carried) != len(node.all_input_nodes):
        raise _TokensMix
    return replace(axis, dim=axis.dim + (_dim(node, 1, 0, node) <= axis.dim))


def _slice_scatter(node: Node, carried: Carried, size: int) -> Axis:
    axis = _one(carried.values())
    if len(carried) != len(node.all_input_nodes) or _dim(node, 2, 0, node) == axis.dim:
        raise _TokensMix
    return axis


def _select_scatter(node: Node, carried: Carried, size: int) -> Axis:
    target, source = node.args[0], node.args[1]
    if target not in carried or source not in carried:
        raise _TokensMix
    axis, part, dim = carried[target], carried[source], _dim(node, 2, 0, node)  # type: ignore[index]
    if dim == axis.dim or part != replace(axis, dim=axis.dim - (dim < axis.dim)):
        raise _TokensMix
    return axis


def _index_select(node: Node, carried: Carried, size: int) -> Axis:
    source = node.args[0]
    if list(carried) != [source] or _dim(node, 1, 0, node) == carried[source].dim:  # type: ignore[index]
        raise _TokensMix
    return carried[source]  # type: ignore[index]


def _gather(node: Node, carried: Carried, size: int) -> Axis:
    axis = _one(carried.values())
    if len(carried) != len(node.all_input_nodes) or _dim(node, 1, 0, node) == axis.dim:
        raise _TokensMix
    return axis


def _index(node: Node, carried: Carried, size: int) -> Axis:
    """``x[..., lanes]``: one index, the same for every token, of a dimension that holds no tokens."""
    source, indices = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    given = [dim for dim, index in enumerate(indices) if index is not None]
    if list(carried) != [source] or len(given) != 1 or not operations.is_int_tensor(indices[given[0]]):
        raise _TokensMix
    axis = carried[source]  # type: ignore[index]
    if given[0] == axis.dim:
        raise _TokensMix
    grown = len(_shapes(indices[given[0]])[0]) - 1
    return axis if axis.dim < given[0] else replace(axis, dim=axis.dim + grown)


def _repeat(node: Node, carried: Carried, size: int) -> Axis:
    """Repeating whole dimensions puts the repetitions outside of what they hold."""
    (source, axis) = next(iter(carried.items()))
    times: Any = node.args[1]
    dim = axis.dim + len(times) - len(_shapes(source)[0])
    return replace(axis, dim=dim, outer=axis.outer * times[dim])


def _pairs(node: Node, carried: Carried, size: int) -> Axis:
    """Between complex numbers and pairs of reals, which have a dimension more, the last one."""
    (source, axis) = next(iter(carried.items()))
    if axis.dim >= min(len(_shapes(source)[0]), len(_shapes(node)[0])):
        raise _TokensMix
    return axis


def _item(node: Node, carried: Carried, size: int) -> Axis:
    return _one(carried.values())


def _dim(node: Node, position: int, default: int, like: Node) -> int:
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    if not isinstance(dim, int):
        raise _TokensMix
    return dim % len(_shapes(like)[0])


def _dims(value: Any, rank: int) -> set[int]:
    dims = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(dim, int) for dim in dims):
        raise _TokensMix
    return {dim % rank for dim in dims}


#: By the name that the table of operations gives each rule.
_RULES: dict[str, Rule] = {
    "pointwise": _pointwise,
    "view": _view,
    "reshape": _reshape,
    "reduction": _reduction,
    "reorder": _along_others,
    "cat": _cat,
    "stack": _stack,
    "slice_scatter": _slice_scatter,
    "select_scatter": _select_scatter,
    "index_select": _index_select,
    "gather": _gather,
    "index": _index,
    "repeat": _repeat,
    "pairs": _pairs,
    "item": _item,
}


# --- the copy -----------------------------------------------------------------------------------------------------


def _copy(inputs: Sequence[Node], steps: Sequence[Node], axes: Axes, size: int, few: int) -> dict[Node, Node]:
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
    for node in steps:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        axis = axes[node]
        if axis is not None and (node.target in operations.RESHAPE or node.target is aten.expand.default):
            copies[node].args = (copies[node].args[0], _short(_shapes(node)[0], axis, few))
        elif axis is not None and node.target is aten.full.default:
            copies[node].args = (_short(_shapes(node)[0], axis, few), *copies[node].args[1:])
        elif axis is not None and node.target is aten.repeat.default:
            copies[node].args = (copies[node].args[0], _times(node.args[1], axis, size, few))
    for node, copy in copies.items():
        copy.meta = {**node.meta, "val": _short_value(node.meta["val"], axes[node], few)}
    return copies


def _short(shape: Sequence[int], axis: Axis | None, few: int) -> list[int]:
    return [axis.size(few) if axis and dim == axis.dim else extent for dim, extent in enumerate(shape)]


def _times(times: Any, axis: Axis, size: int, few: int) -> list[int]:
    """How often to repeat what: fewer times where that was once a token."""
    return [few if dim == axis.dim and count == size else count for dim, count in enumerate(times)]


def _short_value(value: Any, axis: Axis | None, few: int) -> Any:
    if isinstance(value, (list, tuple)):
        return [_short_value(each, axis, few) for each in value]
    return torch.empty(_short(value.shape, axis, few), dtype=value.dtype, device="meta")
