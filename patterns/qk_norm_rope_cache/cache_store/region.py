"""What a store changes: a strided region of the cache, and which of its dimensions an index addresses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.graph import operations
from fx_fusion.graph.operations import aten, value_of
from fx_fusion.graph.sizes import Sizes
from fx_fusion.graph.store_site import Store
from fx_fusion.graph.torch_compat import statically_known_true
from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import Size
from fx_fusion.patterns.qk_norm_rope_cache.branch.split import Heads
from fx_fusion.patterns.qk_norm_rope_cache.cache_store.view import slice_of
from fx_fusion.proof.index_maps import counts, moved_from


@dataclass(frozen=True)
class Written:
    """What a store changes, as a strided region: in which dimension is which coordinate, and which are indexed.

    Coordinates have the shape of the stored value, as the writer gives it; those of an indexed dimension number the
    elements of the index.
    """

    size: tuple[Size, ...]
    stride: tuple[Size, ...]
    offset: Size
    plain: dict[int, torch.Tensor]
    indexed: dict[int, tuple[Node, torch.Tensor]]


def read_written(store: Store, sizes: Sizes) -> Written:
    """Of any writer."""
    return _slice_written(store, sizes) if store.into_slice else _written_at_indices(store, sizes)


def _written_at_indices(store: Store, sizes: Sizes) -> Written:
    view: torch.Tensor = store.view.meta["val"]
    plain, indexed = _scattered(store, sizes) if store.writer.target is aten.scatter.src else _put(store, sizes)
    offset = view.storage_offset() - store.base.meta["val"].storage_offset()
    return Written(tuple(view.shape), tuple(view.stride()), offset, plain, indexed)


def _put(store: Store, sizes: Sizes) -> tuple[dict[int, torch.Tensor], dict[int, tuple[Node, torch.Tensor]]]:
    """Of ``index_put`` and ``index_copy``.

    Indexing an expanded arange with dummy indices follows PyTorch's own rules for where indexed dimensions go.
    """
    shape = sizes.shape(store.view.meta["val"])
    given: list[Any] = [None] * len(shape)
    if store.writer.target is aten.index_copy.default:
        given[store.writer.args[1]] = store.writer.args[2]  # type: ignore[index]
    else:
        indices: Any = store.writer.args[1]
        given[: len(indices)] = indices
    for index in given:
        if index is not None:
            _check_index(store, index)
    if not any(given):
        raise Decline("store.index", "the whole cache is overwritten", [store.writer])
    numbers = {
        d: torch.arange(torch.Size(sizes.shape(i.meta["val"])).numel()).reshape(sizes.shape(i.meta["val"]))
        for d, i in enumerate(given)
        if i is not None
    }

    def pick(dim: int) -> torch.Tensor:
        extent = [*shape]
        index = [None if d not in numbers else torch.zeros_like(numbers[d]) for d in range(len(shape))]
        if dim in numbers:
            extent[dim] = numbers[dim].numel()
            index[dim] = numbers[dim]
        ruler = torch.arange(extent[dim]).reshape([-1 if d == dim else 1 for d in range(len(shape))]).expand(extent)
        try:
            return aten.index.Tensor(ruler, index)
        except (IndexError, RuntimeError) as error:
            found = f"the indices of {store.writer} fit together at the sizes of the trace, not at others: {error}"
            raise Decline("region.sizes", found, [store.writer]) from error

    picked = {dim: pick(dim) for dim in range(len(shape))}
    return (
        {dim: value for dim, value in picked.items() if dim not in numbers},
        {dim: (given[dim], picked[dim]) for dim in numbers},
    )


def _check_index(store: Store, index: Node) -> None:
    dtype = index.meta["val"].dtype
    if dtype in (torch.uint8, torch.bool):
        found = f"{index} holds {dtype}: in PyTorch that is no index but a mask of what is stored"
        raise Decline("store.index", found, [store.writer, index])
    if not operations.is_int_tensor(index):
        raise Decline("store.index", f"{index} is not an integer index", [store.writer])


def _scattered(store: Store, sizes: Sizes) -> tuple[dict[int, torch.Tensor], dict[int, tuple[Node, torch.Tensor]]]:
    """Of ``scatter``: its index has an element for each one stored, expanded from one that has fewer."""
    shape = sizes.shape(store.view.meta["val"])
    _, where, index, *_ = store.writer.args
    assert isinstance(where, int) and isinstance(index, Node)
    extent = sizes.shape(index.meta["val"])
    if extent != sizes.shape(store.value.meta["val"]):
        found = f"{index} of {list(extent)} chooses a part of the value {store.value}"
        raise Decline("store.layout", found, [store.writer])
    root, expanded = moved_from(index, sizes)
    rulers = torch.meshgrid(*(torch.arange(size) for size in extent), indexing="ij")
    dim = where % len(shape)
    short = [d for d in range(len(shape)) if d != dim and extent[d] != shape[d]]
    if short:
        found = f"the value fills {extent[short[0]]} of {shape[short[0]]} elements of dimension {short[0]} of the cache"
        raise Decline("store.layout", found, [store.writer])
    return {d: ruler for d, ruler in enumerate(rulers) if d != dim}, {dim: (root, expanded)}


def _slice_written(store: Store, sizes: Sizes) -> Written:
    """A slice is a view like any other: where it begins is part of its offset."""
    writer, view = store.writer, store.view.meta["val"]
    size, stride = list(view.shape), list(view.stride())
    offset: Size = view.storage_offset() - store.base.meta["val"].storage_offset()
    given = dict(zip(("dim", "start", "end", "step"), map(value_of, writer.args[2:]), strict=False))
    given |= {name: value_of(value) for name, value in writer.kwargs.items()}
    if writer.target is aten.as_strided_scatter.default:
        size, stride = [value_of(n) for n in writer.args[2]], [value_of(n) for n in writer.args[3]]  # type: ignore[union-attr]
        offset = value_of(writer.args[4]) if len(writer.args) > 4 and writer.args[4] is not None else 0
    elif writer.target is aten.select_scatter.default:
        dim = given["dim"] % len(size)
        offset = offset + _from_start(writer, given["start"], size[dim]) * stride[dim]
        del size[dim], stride[dim]
    else:
        dim, step = (given.get("dim") or 0) % len(size), given.get("step") or 1
        offset = offset + _from_start(writer, given.get("start") or 0, size[dim]) * stride[dim]
        size[dim], stride[dim] = value_of(writer.args[1]).shape[dim], stride[dim] * step
    written = Written(tuple(size), tuple(stride), offset, {}, {})
    _check_slice(store, written, sizes)
    rulers = torch.meshgrid(*(torch.arange(sizes.concrete(n)) for n in size), indexing="ij")
    return replace(written, plain=dict(enumerate(rulers)))


def _check_slice(store: Store, written: Written, sizes: Sizes) -> None:
    """PyTorch's own slice of strides alone is where the arithmetic above says."""
    part = slice_of(store, sizes)
    expected = [[sizes.concrete(n) for n in each] for each in (written.size, written.stride, (written.offset,))]
    if expected != [list(part.shape), list(part.stride()), [part.storage_offset()]]:
        found = f"{store.writer} writes {list(part.shape)} at {part.storage_offset()}, expected {expected}"
        raise Decline("store.index", found, [store.writer])


def _from_start(writer: Node, index: Size, size: Size) -> Size:
    """`index`, counted from the end if it is negative; a symbolic one must be known not to be."""
    if isinstance(index, int):
        return index if index >= 0 else size + index
    if statically_known_true(index >= 0):
        return index
    raise Decline("store.index", f"{writer} writes from {index} on, which may count from the end", [writer])


def own_part(store: Store, written: Written, own: torch.Tensor, sizes: Sizes) -> Written:
    """The part of the region that takes the elements marked in `own`, numbered from its own beginning."""
    size, stride, offset, plain = list(written.size), list(written.stride), written.offset, dict[int, torch.Tensor]()
    for dim, coordinate in written.plain.items():
        places = coordinate[own].unique()
        first, step = int(places[0]), int(places[1] - places[0]) if len(places) > 1 else 1
        plain[dim] = (coordinate[own] - first).div(step, rounding_mode="floor")
        even = bool((places.diff() == step).all())
        if even and (first, step) == (0, 1) and (len(places) > 1 or not isinstance(size[dim], int)):
            continue
        if not even or not isinstance(size[dim], int):
            found = f"{store.join and store.join.node} takes turns in dimension {dim} of {store.view}"
            raise Decline("store.layout", f"{found}; expected keys and values at constant distances", [store.writer])
        offset, size[dim], stride[dim] = offset + first * stride[dim], len(places), stride[dim] * step
    for node, number in written.indexed.values():
        if len(number[own].unique()) != torch.Size(sizes.shape(node.meta["val"])).numel():
            found = f"{node} holds the places of keys and of values, one after the other; expected one index a token"
            raise Decline("store.index", found, [store.writer])
    indexed = {dim: (node, number[own]) for dim, (node, number) in written.indexed.items()}
    return Written(tuple(size), tuple(stride), offset, plain, indexed)


def without_counting(
    written: Written, elements: torch.Tensor, heads: Heads, sizes: Sizes, grid: tuple[int, int]
) -> Written:
    """The same region, with no index where that only counts sequences or heads: ``cache[arange(B)[:, None], …]``."""
    head = elements // heads.head_dim % heads.num_heads
    sequence = elements // (heads.head_dim * heads.num_heads) // grid[1]
    counting = {
        dim: number
        for dim, (node, number) in written.indexed.items()
        if counts(node, sizes) and any(bool((number == each).all()) for each in (sequence, head))
    }
    if len(counting) == len(written.indexed):
        return written
    indexed = {dim: index for dim, index in written.indexed.items() if dim not in counting}
    return replace(written, plain={**written.plain, **counting}, indexed=indexed)
