"""From a match to one call: the only place where that arithmetic stands.

:func:`lower` writes the views that the call reads, by whatever emitter it is given: on fake values, so that contracts
see the very call before anything changes; into the graph; or as source text. The graph is functional: caches are
values, and an epilogue copies the last one back into the input.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch.fx import Graph, Node

from fx_fusion.graph import operations
from fx_fusion.graph.edit import Emit, Emitter, take
from fx_fusion.graph.operations import aten, prims
from fx_fusion.graph.store_site import Store
from fx_fusion.kernels.qk_norm_rope_cache.call import Call, Options
from fx_fusion.kernels.qk_norm_rope_cache.operation import OPERATION
from fx_fusion.patterns.qk_norm_rope_cache.branch.rope import Lanes
from fx_fusion.patterns.qk_norm_rope_cache.branch.rotated_heads import RotatedHeads
from fx_fusion.patterns.qk_norm_rope_cache.branch.split import Heads
from fx_fusion.patterns.qk_norm_rope_cache.branch.table_lookup import Columns
from fx_fusion.patterns.qk_norm_rope_cache.cache_store.addresses import Addresses, Index, layout
from fx_fusion.patterns.qk_norm_rope_cache.match import Match

T = TypeVar("T")


def lower(match: Match, emit: Emit[T], grid: tuple[Any, Any] | None = None) -> Call[T]:
    """The call that `match` amounts to.

    Args:
        grid: how `emit` writes the numbers of sequences and of tokens in each; by default as the sizes that they are.
    """
    grid = grid or match.grid
    lookup, rope = match.lookup, match.rope
    query, key, value = match.query_heads, match.key_heads, match.value_store
    addresses = match.key_store.addresses
    k_cache, v_cache = _caches_before(emit, match.key_store.store, value.store)
    q = _heads(emit, match.query.data, query.heads, grid)
    k = _heads(emit, match.key.data, key.heads, grid)
    v = _heads(emit, value.data, value.heads, grid)
    if lookup is None:
        positions = None
        cos, sin = (_angle_rows(emit, lanes, grid) for lanes in (rope.cos, rope.sin))
    else:
        rows = [lookup.num_axes, *_rows(grid, lookup.per_batch)]
        positions = emit.call(aten.reshape.default, emit.of(lookup.positions), rows)
        cos, sin = (_angle_columns(emit, columns) for columns in (lookup.cos, lookup.sin))
    return Call(
        q=q,
        k=k,
        v=v,
        q_weight=_optional(emit, query.norm.weight),
        k_weight=_optional(emit, key.norm.weight),
        cos=cos,
        sin=sin,
        positions=positions,
        slots=_slots(emit, match.slots, addresses, grid, value.data.meta["val"].device),
        blocks=None if addresses.blocks is None else _index(emit, addresses.blocks, grid),
        k_scale=_optional(emit, match.key_store.scale),
        v_scale=_optional(emit, value.scale),
        k_cache=k_cache,
        v_cache=v_cache,
        options=_options(match),
    )


def rewrite(graph: Graph, match: Match, kernel: str, made: tuple[Any, ...] = ()) -> None:
    """Replace what `match` found by one call of `kernel`. The graph is left unsorted: see
    :func:`fx_fusion.graph.tidy.finish`.

    Args:
        made: the fake values of the steps of :func:`lower`, where it was run on fake values before.
    """
    stores = (match.key_store, match.value_store)
    with graph.inserting_before(match.key_store.store.writer):
        emit = Emitter(graph, match.key.out, made)
        call = lower(match, emit)
        inserted = OPERATION.implementation(kernel).insert(emit, OPERATION, call)
        q_out, k_out = inserted.results
        assert q_out is not None, "a call always returns the rotated queries"
        rotated_q = _as_result(emit, q_out, match.query.out, match.query_heads)
        rotated_k = None if k_out is None else _as_result(emit, k_out, match.key.out, match.key_heads)
        after = [inserted.written[cache] for cache in (call.k_cache, call.v_cache)]
        written: dict[Node, Node] = {}
        for stored, cache in zip(stores, after, strict=True):
            store = stored.store
            cache = _in_shape_of(emit, cache, store.base)
            written[store.writer] = _replay(emit, store.views, cache)
            written |= {scatter: _replay(emit, store.part(scatter), cache) for scatter in store.scatters}
    match.query.out.replace_all_uses_with(rotated_q)
    if rotated_k is not None:
        match.key.out.replace_all_uses_with(rotated_k)
    for old, new in written.items():
        old.replace_all_uses_with(new)


# --- what the call is told ------------------------------------------------------------------------------------------


def _options(match: Match) -> Options:
    query, key, lookup, rope = match.query_heads, match.key_heads, match.lookup, match.rope
    return Options(
        k_layout=layout(match.key_store.addresses),
        v_layout=layout(match.value_store.addresses),
        k_scale_value=_number(match.key_store.scale),
        v_scale_value=_number(match.value_store.scale),
        q_eps=query.norm.eps,
        k_eps=key.norm.eps,
        gemma_norm=any(heads.norm.weight is not None and heads.norm.gemma for heads in (query, key)),
        rotary_dim=rope.rotary_dim,
        is_neox=rope.is_neox,
        axes=lookup.axes if lookup else (0,) * (rope.rotary_dim // 2),
        saturate=match.saturate,
        skip_negative_slots=match.key_store.addresses.stored is not None,
        return_k=match.return_k,
        float8=_float8(match),
    )


def _number(scale: float | Node | None) -> float | None:
    return None if isinstance(scale, Node) else scale


def _float8(match: Match) -> str | None:
    """The float8 that the caches hold, where their dtype does not say so."""
    for stored in (match.key_store, match.value_store):
        if stored.dtype != stored.store.cache.meta["val"].dtype:
            return str(stored.dtype).removeprefix("torch.")
    return None


# --- what the call reads --------------------------------------------------------------------------------------------


def _optional(emit: Emit[T], node: Any) -> T | None:
    return emit.of(node) if isinstance(node, Node) else None


def _caches_before(emit: Emit[T], key: Store, value: Store) -> tuple[T, T]:
    """The caches as they are before the call: of two stores into one cache, what the first one finds."""
    if key.cache is not value.cache:
        return tuple(_in_shape_of(emit, emit.of(each.base), each.cache) for each in (key, value))  # type: ignore[return-value]
    base = _in_shape_of(emit, emit.of(value.base if key.base is value.after else key.base), key.cache)
    return base, base


def _in_shape_of(emit: Emit[T], cache: T, other: Node) -> T:
    """`cache` in the shape of `other`, another value of it."""
    shape = list(other.meta["val"].shape)
    return cache if emit.has_shape(cache, shape) else emit.call(aten.reshape.default, cache, shape)


def _heads(emit: Emit[T], data: Node, heads: Heads, grid: tuple[Any, Any]) -> T:
    """[B, S, H, D], a view of the projection's output."""
    source = emit.of(data)
    first, offset = divmod(heads.offset, heads.stride)
    if heads.width % heads.stride == 0 and offset + heads.head_dim <= heads.stride:
        tail = [(heads.num_heads, first, 1, heads.width // heads.stride), (heads.head_dim, offset, 1, heads.stride)]
        return take(emit, source, grid, tail)
    span = heads.num_heads * heads.stride
    rows = take(emit, source, grid, [(span, heads.offset, 1, heads.width)])
    return take(emit, rows, grid, [(heads.num_heads, 0, 1, heads.num_heads), (heads.head_dim, 0, 1, heads.stride)])


def _angle_rows(emit: Emit[T], lanes: Lanes, grid: tuple[Any, Any]) -> T:
    """[B or 1, S, count]"""
    rows = _as_reals(emit, lanes.leaf)
    return take(emit, rows, _rows(grid, lanes.per_batch), [(lanes.count, lanes.offset, lanes.step, lanes.width)])


def _angle_columns(emit: Emit[T], columns: Columns) -> T:
    """[P, count]"""
    table = _as_reals(emit, columns.table)
    if operations.is_complex_tensor(columns.table):
        table = emit.call(aten.reshape.default, table, [columns.table.meta["val"].shape[0], -1])
    first, last = columns.offset, columns.offset + columns.step * (columns.count - 1)
    return emit.call(aten.slice.Tensor, table, 1, first, last + 1, columns.step)


def _as_reals(emit: Emit[T], node: Node) -> T:
    values = emit.of(node)
    if not operations.is_complex_tensor(node):
        return values
    if node.meta["val"].is_conj():  # lazily: the numbers in memory are those of the original
        values = emit.call(aten.resolve_conj.default, values)
    return emit.call(aten.view_as_real.default, values)


def _slots(emit: Emit[T], index: Index, addresses: Addresses, grid: tuple[Any, Any], device: torch.device) -> T:
    """[B or 1, S]: where each token goes; -1 for one that is not stored."""
    if index.node is None:
        batch, seq = _rows(grid, index.per_batch)
        numbers = emit.call(
            prims.iota.default, batch * seq, start=0, step=1, dtype=torch.int64, device=device, requires_grad=False
        )
        slots = emit.call(aten.reshape.default, numbers, [batch, seq])
    else:
        slots = _index(emit, index, grid)
    stored = addresses.stored
    if stored is None or stored.by_sign:
        return slots
    flag = _index(emit, stored.index, grid)
    # A slot may count from the end; what is negative after this is not stored.
    from_end = emit.call(aten.add.Tensor, slots, emit.size(addresses.size[1]))
    slots = emit.call(aten.where.self, emit.call(aten.lt.Scalar, slots, 0), from_end, slots)
    dtype = torch.int64 if index.node is None else index.node.meta["val"].dtype
    nowhere = emit.call(aten.full.default, [], -1, dtype=dtype, device=device, pin_memory=False)
    return emit.call(aten.where.self, flag, *((nowhere, slots) if stored.inverted else (slots, nowhere)))


def _index(emit: Emit[T], index: Index, grid: tuple[Any, Any]) -> T:
    """[B or 1, S]"""
    assert index.node is not None
    if not index.per_token:
        one_each = emit.call(aten.reshape.default, emit.of(index.node), [grid[0], 1])
        return emit.call(aten.expand.default, one_each, list(grid))
    return emit.call(aten.reshape.default, emit.of(index.node), list(_rows(grid, index.per_batch)))


def _rows(grid: tuple[Any, Any], per_batch: bool) -> tuple[Any, Any]:
    return grid if per_batch else (1, grid[1])


# --- what the call leaves -------------------------------------------------------------------------------------------


def _as_result(emit: Emitter, heads: Node, old: Node, layout: RotatedHeads) -> Node:
    """[B, S, H, D] as the value that it replaces: in its order, with its shape."""
    if layout.heads_first:
        heads = emit.call(aten.permute.default, heads, [0, 2, 1, 3])
    shape = old.meta["val"].shape
    if len(layout.token_dims) == 2 and len(shape) == 4:
        return heads
    return emit.call(aten.reshape.default, heads, list(shape))


def _replay(emit: Emitter, steps: list[Node], cache: Node) -> Node:
    """The same view of the cache after the call."""
    for view in steps:
        cache = emit.call(view.target, cache, *view.args[1:], **view.kwargs)
    return cache
