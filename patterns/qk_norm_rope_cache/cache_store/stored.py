"""What a layer stores where: the rotated key and the value, each read together with its store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.operations import aten
from fx_fusion.graph.paths import Branch
from fx_fusion.graph.sizes import Sizes, known_to_exceed_one, same
from fx_fusion.graph.store_site import Store
from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import Size
from fx_fusion.patterns.qk_norm_rope_cache.branch.rotated_heads import RotatedHeads
from fx_fusion.patterns.qk_norm_rope_cache.branch.split import Heads, expected_columns, read_heads
from fx_fusion.patterns.qk_norm_rope_cache.cache_store.addresses import Addresses, Index
from fx_fusion.patterns.qk_norm_rope_cache.cache_store.conversion import (
    FLOAT8,
    Conversion,
    check_scale,
    moved_elements,
    read_conversion,
    saturates,
    ways_to_copy,
)
from fx_fusion.patterns.qk_norm_rope_cache.cache_store.indices import read_addresses, same_slots
from fx_fusion.proof.all_sizes import check_all_sizes
from fx_fusion.proof.certificate import certify_copy
from fx_fusion.proof.evaluate import check_memory

#: By what it was measured on: a branch's reading, with its leaves, or why there is none; a store's heads and addresses.
Memo = dict[object, Any]

_PLAIN_WRITERS = (aten.index_put.default, aten.index_copy.default)


@dataclass(frozen=True)
class Stored:
    """What a store puts where: heads of `data`, at `addresses`, divided by `scale` and converted to `dtype`.

    `saturate` says what becomes of a value beyond the range of a float8: the largest number, or what is beyond; None
    where there is no such value.
    """

    store: Store
    data: Node
    heads: Heads
    addresses: Addresses
    dtype: torch.dtype
    scale: float | Node | None
    saturate: bool | None


def read_stored_key(
    analysis: GraphAnalysis,
    store: Store,
    conversion: Conversion,
    key: Branch,
    heads: RotatedHeads,
    grid: tuple[int, int],
    memo: Memo,
) -> Stored:
    """The rotated key's store: where each element of the branch's result lands."""
    layout, sizes = heads.heads, analysis.sizes[0]
    scale = conversion.scale and check_scale(conversion.scale, _dtype(key.out))

    def read() -> tuple[Heads, Addresses]:
        shape = sizes.shape(key.out.meta["val"])
        _check_memory(store, shape, sizes)
        numbers = torch.arange(torch.Size(shape).numel()).reshape(*grid, layout.num_heads, layout.head_dim)
        elements = _arriving(analysis, store, conversion, key.out, heads.arrange(numbers).reshape(shape), sizes)
        return layout, read_addresses(analysis, store, elements, layout, sizes, grid)

    asked = (layout, heads.token_dims, heads.heads_first, grid)
    addresses = _stored_once(analysis, store, conversion, key.out, asked, memo, read)[1]
    saturate = saturates(conversion, _device(store))
    return Stored(store, key.data, layout, addresses, conversion.dtype, scale, saturate)


def read_stored_value(analysis: GraphAnalysis, store: Store, key: Stored, grid: tuple[int, int], memo: Memo) -> Stored:
    """The value's store, in the first way that a kernel can copy it in, and that suits the key's store."""
    conversion = read_conversion(store, keep_rows=True)
    saturate = saturates(conversion, _device(store))
    ways = [
        way
        for way in ways_to_copy(conversion)
        if _dtype(way.data) == _dtype(key.data) and not is_joint(store, way.data)
    ]
    if not ways:
        scale = conversion.scale and check_scale(conversion.scale, _dtype(key.data))
        found = f"the key is rounded to the cache from {_dtype(key.data)}, "
        found += f"the value from {_dtype(conversion.value)}{f' and scaled by {scale}' if scale else ''}"
        raise Decline(
            "rope.output_dtype" if scale is None else "split.v_not_copied",
            f"{found}; a call rounds both from the projection's dtype",
            [key.data, conversion.value],
        )
    suited = [way for way in ways if way.in_range or None in (saturate, key.saturate) or saturate == key.saturate]
    if not suited or (conversion.dtype != key.dtype and {conversion.dtype, key.dtype} & FLOAT8):
        found = f"the key is converted to {_converted(key.dtype, key.saturate)}, "
        found += f"the value to {_converted(conversion.dtype, saturate)}; a call converts both alike"
        raise Decline("store.conversions_differ", found, [key.store.writer, store.writer])
    data = suited[0].data

    def read() -> tuple[Heads, Addresses]:
        return _read_copied(analysis, store, conversion, data, key.heads, grid)

    heads, addresses = _stored_once(analysis, store, conversion, data, (key.heads, grid), memo, read)
    return Stored(
        store, data, heads, addresses, conversion.dtype, suited[0].scale, None if suited[0].in_range else saturate
    )


def shared_slots(analysis: GraphAnalysis, key: Stored, value: Stored, sizes: Sizes) -> Index:
    """The slots of both stores, which a call takes once."""
    a, b = key.addresses, value.addresses
    slots = same_slots(analysis, a, b, sizes)
    if slots is None:
        masked = ["masked" if addresses.stored else "unmasked" for addresses in (a, b)]
        kinds = [f", {kind}" if masked[0] != masked[1] else "" for kind in masked]
        kinds[1] += "; where tokens are left out, a negative slot counts from one end" if masked[0] == "masked" else ""
        found = f"the key is stored at {a.slots} of {list(a.size)}{kinds[0]}, "
        found += f"the value at {b.slots} of {list(b.size)}{kinds[1]}"
        raise Decline("store.slots_differ", found, [key.store.writer, value.store.writer])
    return slots


def check_counts(grid: tuple[Size, Size], key: Stored, value: Stored) -> None:
    """There are as many values as keys, and one index for each, at all sizes.

    Two symbols for one number are two inputs' own: PyTorch refuses to store where they differ, unless one of them is
    one, which is then broadcast.
    """
    addresses, (batch, seq) = key.addresses, grid
    counted: list[tuple[Node, Size, Size]] = []
    for stored in (key, value):
        counted.append((stored.data, stored.data.meta["val"].numel(), batch * seq * stored.heads.width))
    for index in (addresses.slots, addresses.blocks, addresses.in_group, addresses.stored and addresses.stored.index):
        if index is not None and index.node is not None:
            rows = (batch if index.per_batch else 1) * (seq if index.per_token else 1)
            counted.append((index.node, index.node.meta["val"].numel(), rows))
    for node, actual, expected in counted:
        if not same([actual], [expected]) and not (known_to_exceed_one(actual) and known_to_exceed_one(expected)):
            found = f"{node} holds {actual} elements, {expected} are stored; whether that is one number is not known"
            raise Decline("region.sizes", found, [node])


def _read_copied(
    analysis: GraphAnalysis, store: Store, conversion: Conversion, data: Node, key: Heads, grid: tuple[int, int]
) -> tuple[Heads, Addresses]:
    """Which heads of `data` the store copies, and whereto."""
    sizes = analysis.sizes[0]
    shape = sizes.shape(data.meta["val"])
    width, rest = divmod(torch.Size(shape).numel(), grid[0] * grid[1])
    if rest:
        raise Decline("split.layout", f"{data} of shape {list(shape)} does not hold {grid[0] * grid[1]} tokens", [data])
    _check_memory(store, shape, sizes)
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    moved = _arriving(analysis, store, conversion, data, numbers, sizes)
    columns = (moved[moved >= 0] % width).unique()
    heads = read_heads(columns, key.head_dim, width, data)
    if heads.num_heads != key.num_heads:
        found = f"{heads.num_heads} heads of values are stored with {key.num_heads} heads of keys"
        raise Decline("split.v_not_copied", found, [store.value])
    lane = torch.zeros(width, dtype=torch.long)
    lane[expected_columns(heads).reshape(-1)] = torch.arange(heads.num_heads * heads.head_dim)
    elements = torch.where(moved < 0, -1, moved // width * len(columns) + lane[moved % width])
    return heads, read_addresses(analysis, store, elements, heads, sizes, grid)


def _check_memory(store: Store, source: Sequence[int], sizes: Sizes) -> None:
    """A number for each element of the source; for each one stored that, its coordinates, and both in order."""
    stored = torch.Size(sizes.shape(store.value.meta["val"])).numel()
    check_memory(torch.int64.itemsize * (torch.Size(source).numel() + 4 * stored), store.writer)


def _stored_once(
    analysis: GraphAnalysis,
    store: Store,
    conversion: Conversion,
    source: Node,
    asked: object,
    memo: Memo,
    read: Callable[[], tuple[Heads, Addresses]],
) -> tuple[Heads, Addresses]:
    """What `read` finds out about how `store` puts `source` into the cache; of equal stores, once.

    Where a part of a cache is put back, or a mask decides, more of the graph is read than is compared here.
    """
    if store.scatters or store.mask or store.writer.target not in _PLAIN_WRITERS:
        return read()
    steps = [*store.steps_from(analysis, source), *store.views, store.writer]
    structure, feeding = analysis.structure(steps)
    converting = [steps.index(step.node) for step in conversion.steps_after(source)]
    fed_by = [analysis.value_number(node) for node in feeding]
    places = [fed_by.index(analysis.value_number(node)) for node in (source, store.base)]
    position = store.join and store.join.position
    question = ("store", structure, tuple(converting), conversion.dtype, tuple(places), position, asked)
    indices = [analysis.canonical(node) for node in feeding]
    if question not in memo:
        memo[question] = (*read(), indices)
    heads, addresses, known = memo[question]
    return heads, addresses.on(dict(zip(known, indices, strict=True)))


def _arriving(
    analysis: GraphAnalysis, store: Store, conversion: Conversion, source: Node, numbers: torch.Tensor, sizes: Sizes
) -> torch.Tensor:
    """`numbers`, of the elements of `source`, as they arrive in the stored value."""
    steps = conversion.steps_after(source)
    allowed = {step.node for step in steps} | ({store.join.node} if store.join else set())
    certify_copy(store.steps_from(analysis, source), allowed, _dtype(source), conversion.dtype)
    check_all_sizes([source, *store.others], [store.value], {step.node: (step.operand, 0) for step in steps})
    return moved_elements(store, steps, source, numbers, sizes)


def is_joint(store: Store, node: Node) -> bool:
    """Does `node` hold keys and values, joined?"""
    return store.join is not None and (node is store.join.node or node in store.join.after)


def _converted(dtype: torch.dtype, saturate: bool | None) -> str:
    return f"{dtype}" if saturate is None else f"{dtype} {'with' if saturate else 'without'} saturation"


def _dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype


def _device(store: Store) -> torch.device:
    return store.cache.meta["val"].device
