"""Parts of a tensor, told by sizes and strides alone: without looking at values, what reads what another one wrote.

A *box* is a rectangular part: for each dimension of the tensor, where the part starts and how long it is. A view of a
projection (the query's columns, as heads) is such a part. What is no box is the set of elements that *dims* reach.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from fx_fusion.graph.edit import Emitter
from fx_fusion.graph.operations import aten
from fx_fusion.graph.sizes import quotient, same

Size = int | torch.SymInt
Box = tuple[tuple[Size, Size], ...]
"""(start, length) for each dimension."""
Dims = Sequence[tuple[int, int]]
"""(size, stride) of each dimension; strides are not negative."""

#: Steps of the search for an element that two parts share, beyond which the answer is that there may be one.
_PATIENCE = 10_000


def _known(*sizes: Any) -> bool:
    return all(isinstance(size, int) for size in sizes)


def whole(value: torch.Tensor) -> Box:
    return tuple((0, size) for size in value.shape)


def cut(value: torch.Tensor, dim: int, start: int, end: int) -> Box:
    """The box of ``value[..., start:end, ...]``; `start` and `end` as ``aten.slice`` takes them."""
    dim %= value.dim()
    size = value.shape[dim]
    if _known(size):
        start, end, _ = slice(start, end).indices(size)
    elif start == 0 and end >= 1 << 62:
        end = size  # type: ignore[assignment]
    return tuple((start, end - start) if d == dim else (0, extent) for d, extent in enumerate(value.shape))


def box_of(base: torch.Tensor, size: Sequence[Size], stride: Sequence[Size], offset: Size) -> Box | None:
    """The part of `base` that ``as_strided(size, stride, offset)`` reads, in order; None if it is no box."""
    starts = _starts(base, offset - base.storage_offset())
    if starts is None:
        return None
    if same(size, base.shape) and same(stride, base.stride()):
        return tuple(zip(starts, base.shape, strict=True)) if not any(starts) else None
    pending = [(n, s) for n, s in zip(size, stride, strict=True) if not same([n], [1])]
    box: list[tuple[Size, Size]] = []
    for extent, step, start in zip(reversed(base.shape), reversed(base.stride()), reversed(starts), strict=True):
        length: Size = 1
        while pending and not same([length], [extent]) and same([pending[-1][1]], [step * length]):
            n, s = pending.pop()
            if length == 1 and _known(n, extent) and n > extent and n % extent == 0:
                pending.append((n // extent, s * extent))
                length = extent
                break
            length = length * n
        if not _fits(start, length, extent):
            return None
        box.append((start, length))
    return None if pending else tuple(box[::-1])


def _starts(base: torch.Tensor, distance: Size) -> list[Size] | None:
    """The index of the element that lies `distance` after the first one of `base`."""
    starts: list[Size] = [0] * base.dim()
    steps = list(enumerate(base.stride()))
    if _known(*base.stride()):
        steps.sort(key=lambda step: -step[1])
    for dim, step in steps:
        if same([distance], [0]):
            break
        times = quotient(distance, step)
        if times is None:
            return None
        starts[dim], distance = times, distance - times * step
    return starts if same([distance], [0]) else None


def _fits(start: Size, length: Size, extent: Size) -> bool:
    if _known(start, length, extent):
        return bool(start + length <= extent)
    return (start == 0 and same([length], [extent])) or (start == 0 and length == 1)


def disjoint(a: Box, b: Box) -> bool:
    """Do `a` and `b`, boxes in one tensor, surely have no element in common?"""
    return any(_before(*x, *y) or _before(*y, *x) for x, y in zip(a, b, strict=True))


def _before(start: Size, length: Size, other: Size, _: Size) -> bool:
    return _known(start, length, other) and bool(start + length <= other)


def within(inner: Box, outer: Box) -> Box | None:
    """`inner` as a box in the part `outer`; None if it does not surely lie there."""
    relative: list[tuple[Size, Size]] = []
    for (start, length), (origin, extent) in zip(inner, outer, strict=True):
        if same([start, length], [origin, extent]):
            relative.append((0, length))
        elif _known(start, length, origin, extent):
            if not (origin <= start and start + length <= origin + extent):
                return None
            relative.append((start - origin, length))
        else:
            return None
    return tuple(relative)


def views(value: torch.Tensor, box: Box, size: Sequence[Size], order: Sequence[int] = ()) -> Iterator[tuple[Any, ...]]:
    """The operations, each with its further arguments, that make the part `box` of `value`, in shape `size`; at least
    one.

    Args:
        order: the dimensions of `size` as they follow each other in `value`, if not as they come.
    """
    for dim, (start, length) in enumerate(box):
        if not same([start, length], [0, value.shape[dim]]):
            yield aten.slice.Tensor, dim, start, start + length
    yield aten.reshape.default, [size[dim] for dim in order or range(len(size))]
    if order:
        yield aten.permute.default, [order.index(dim) for dim in range(len(order))]


def take(emit: Emitter, source: Node, box: Box, size: Sequence[Size], order: Sequence[int] = ()) -> Node:
    """The part `box` of `source`: see :func:`views`. Always a node of its own."""
    for target, *args in views(source.meta["val"], box, size, order):
        source = emit.call(target, source, *args)
    return source


def put(emit: Emitter, target: Node, box: Box, value: Node, order: Sequence[int] = ()) -> Node:
    """`target` with `value`, of any shape, in the place of its part `box`; the reverse of `take`."""
    if order:
        value = emit.call(aten.permute.default, value, list(order))
    cuts = [
        (dim, start, start + length)
        for dim, (start, length) in enumerate(box)
        if not same([start, length], [0, target.meta["val"].shape[dim]])
    ]
    wholes: list[Node] = [target]
    for dim, start, end in cuts[:-1]:
        wholes.append(emit.call(aten.slice.Tensor, wholes[-1], dim, start, end))
    value = emit.call(aten.reshape.default, value, [emit.size(length) for _, length in box])
    for (dim, start, end), into in zip(reversed(cuts), reversed(wholes), strict=True) if cuts else ():
        value = emit.call(aten.slice_scatter.default, into, value, dim, start, end)
    return value


def chain(node: Any) -> tuple[list[tuple[Box, Node, Node]], Node]:
    """What was put into a tensor, the latest first, as (box, value, scatter); and the tensor before."""
    found: list[tuple[Box, Node, Node]] = []
    while isinstance(node, Node) and node.target is aten.slice_scatter.default:
        base, value, dim, start, end, step = [*node.args, *(0, None, None, 1)[len(node.args) - 2 :]]
        extent = base.meta["val"].shape[dim]  # type: ignore[union-attr]
        if step != 1 or not all(isinstance(each, (int, type(None))) for each in (dim, start, end)):
            break
        box = cut(base.meta["val"], dim, start or 0, extent if end is None else end)  # type: ignore[union-attr,arg-type]
        found.append((box, value, node))  # type: ignore[arg-type]
        node = base
    return found, node


# --- parts that are no boxes -----------------------------------------------------------------------------------------


def may_overlap(first: Dims, first_offset: int, second: Dims, second_offset: int) -> bool:
    """False if no element lies in both regions; True if one does, or if that is not found out soon.

    Dimensions that both have, such as blocks and slots, differ by a whole number of steps from one region to the
    other; of the others only how far they reach counts.
    """
    ours, theirs = (Counter((size, stride) for size, stride in dims if size > 1) for dims in (first, second))
    common = sorted((ours & theirs).elements(), key=lambda dim: -dim[1])
    reach = [
        sum((size - 1) * stride for size, stride in (dims - (ours & theirs)).elements()) for dims in (ours, theirs)
    ]
    return _meets(second_offset - first_offset, common, -reach[1], reach[0])


def _meets(distance: int, steps: Dims, low: int, high: int) -> bool:
    """Is there an n within ± (size - 1) for each (size, stride) such that distance + Σ n · stride is within bounds?"""
    patience = _PATIENCE
    stack = [(distance, 0)]
    while stack:
        distance, depth = stack.pop()
        patience -= 1
        if patience < 0:
            return True
        if depth == len(steps):
            if low <= distance <= high:
                return True
            continue
        size, stride = steps[depth]
        rest = sum((n - 1) * s for n, s in steps[depth + 1 :])
        # distance + n · stride must come within `rest` of the bounds.
        fewest = max(1 - size, -((distance + rest - low) // stride)) if stride else 0
        most = min(size - 1, (high + rest - distance) // stride) if stride else 0
        stack.extend((distance + n * stride, depth + 1) for n in range(fewest, min(most, fewest + _PATIENCE) + 1))
    return False
