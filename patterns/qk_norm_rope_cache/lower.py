"""Put one call in the place of a proved region.

The graph is functional: caches are values, and an epilogue copies the last one back into the input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from fx_fusion.graph import operations as opset
from fx_fusion.graph.edit import Emitter, take
from fx_fusion.graph.operations import aten, prims
from fx_fusion.graph.sizes import same
from fx_fusion.graph.store_site import Store
from fx_fusion.kernels.qk_norm_rope_cache.insert import insert
from fx_fusion.patterns.qk_norm_rope_cache.branch.rope import Lanes
from fx_fusion.patterns.qk_norm_rope_cache.branch.rotated_heads import RotatedHeads
from fx_fusion.patterns.qk_norm_rope_cache.branch.split import Heads
from fx_fusion.patterns.qk_norm_rope_cache.cache_store.addresses import Addresses, Index, layout
from fx_fusion.patterns.qk_norm_rope_cache.match import Match

Grid = tuple[int | torch.SymInt, int | torch.SymInt]


def rewrite(graph: Graph, match: Match, kernel: str) -> None:
    """Replace what `match` found by one call of `kernel`. The graph is left unsorted: see
    :func:`fx_fusion.graph.tidy.finish`.
    """
    stores = (match.key_store, match.value_store)
    with graph.inserting_before(match.key_store.store.writer):
        emit = Emitter(graph, match.key.out)
        k_cache, v_cache = _caches_before(emit, *(stored.store for stored in stores))
        operands = _operands(emit, match)
        results = insert(emit, kernel, operands, k_cache, v_cache, _options(match), return_k=match.return_k)
        rotated_q = _as_result(emit, results.q, match.query.out, match.query_heads)
        rotated_k = results.k and _as_result(emit, results.k, match.key.out, match.key_heads)
        after = [results.caches[cache] for cache in (k_cache, v_cache)]
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


def _caches_before(emit: Emitter, key: Store, value: Store) -> tuple[Node, Node]:
    """The caches as they are before the call: of two stores into one cache, what the first one finds."""
    if key.cache is not value.cache:
        return _in_shape_of(emit, key.base, key.cache), _in_shape_of(emit, value.base, value.cache)
    base = _in_shape_of(emit, value.base if key.base is value.after else key.base, key.cache)
    return base, base


def _in_shape_of(emit: Emitter, cache: Node, other: Node) -> Node:
    """`cache` in the shape of `other`, another value of it."""
    shape = other.meta["val"].shape
    return cache if same(cache.meta["val"].shape, shape) else emit.call(aten.reshape.default, cache, list(shape))


def _operands(emit: Emitter, match: Match) -> dict[str, Node | None]:
    """The tensors of the call but for its caches, in the order of the operation's schema."""
    grid, lookup, rope = match.grid, match.lookup, match.rope
    query, key, value = match.query_heads, match.key_heads, match.value_store
    addresses = match.key_store.addresses
    q = _take_heads(emit, match.query.data, query.heads, grid)
    k = _take_heads(emit, match.key.data, key.heads, grid)
    v = _take_heads(emit, value.data, value.heads, grid)
    if lookup is None:
        positions = None
        cos, sin = (_take_rows(emit, lanes, grid) for lanes in (rope.cos, rope.sin))
    else:
        rows = [lookup.num_axes, *_rows(grid, lookup.per_batch)]
        positions = emit.call(aten.reshape.default, lookup.positions, rows)
        cos, sin = (_take_columns(emit, c.table, c.offset, c.step, c.count) for c in (lookup.cos, lookup.sin))
    return {
        "q": q,
        "k": k,
        "v": v,
        "q_weight": query.norm.weight,
        "k_weight": key.norm.weight,
        "cos": cos,
        "sin": sin,
        "positions": positions,
        "slots": _take_slots(emit, match.slots, addresses, grid, value.data.meta["val"].device),
        "blocks": addresses.blocks and _take_index(emit, addresses.blocks, grid),
        "k_scale": _tensor(match.key_store.scale),
        "v_scale": _tensor(value.scale),
    }


def _options(match: Match) -> dict[str, Any]:
    """What the call is told besides its tensors, named as in the operation's schema."""
    query, key, lookup, rope = match.query_heads, match.key_heads, match.lookup, match.rope
    return {
        "k_layout": layout(match.key_store.addresses),
        "v_layout": layout(match.value_store.addresses),
        "k_scale_value": _number(match.key_store.scale),
        "v_scale_value": _number(match.value_store.scale),
        "q_eps": query.norm.eps,
        "k_eps": key.norm.eps,
        "gemma_norm": any(heads.norm.weight is not None and heads.norm.gemma for heads in (query, key)),
        "rotary_dim": rope.rotary_dim,
        "is_neox": rope.is_neox,
        "axes": list(lookup.axes) if lookup else [0] * (rope.rotary_dim // 2),
        "saturate": match.saturate,
        "skip_negative_slots": match.key_store.addresses.stored is not None,
        **_format(match),
    }


def _tensor(scale: float | Node | None) -> Node | None:
    return scale if isinstance(scale, Node) else None


def _number(scale: float | Node | None) -> float | None:
    return None if isinstance(scale, Node) else scale


def _format(match: Match) -> dict[str, str]:
    """The float8 that the caches hold, where their dtype does not say so."""
    for stored in (match.key_store, match.value_store):
        if stored.dtype != stored.store.cache.meta["val"].dtype:
            return {"float8": str(stored.dtype).removeprefix("torch.")}
    return {}


def _take_heads(emit: Emitter, data: Node, heads: Heads, grid: Grid) -> Node:
    """[B, S, H, D], a view of the projection's output."""
    first, offset = divmod(heads.offset, heads.stride)
    if heads.width % heads.stride == 0 and offset + heads.head_dim <= heads.stride:
        tail = [(heads.num_heads, first, 1, heads.width // heads.stride), (heads.head_dim, offset, 1, heads.stride)]
        return take(emit, data, grid, tail)
    span = heads.num_heads * heads.stride
    rows = take(emit, data, grid, [(span, heads.offset, 1, heads.width)])
    return take(emit, rows, grid, [(heads.num_heads, 0, 1, heads.num_heads), (heads.head_dim, 0, 1, heads.stride)])


def _take_rows(emit: Emitter, lanes: Lanes, grid: Grid) -> Node:
    """[B or 1, S, count]"""
    return take(
        emit,
        _as_reals(emit, lanes.leaf),
        _rows(grid, lanes.per_batch),
        [(lanes.count, lanes.offset, lanes.step, lanes.width)],
    )


def _as_reals(emit: Emitter, values: Node) -> Node:
    if not opset.is_complex_tensor(values):
        return values
    if values.meta["val"].is_conj():  # lazily: the numbers in memory are those of the original
        values = emit.call(aten.resolve_conj.default, values)
    return emit.call(aten.view_as_real.default, values)


def _take_columns(emit: Emitter, table: Node, offset: int, step: int, count: int) -> Node:
    """[P, count]"""
    if opset.is_complex_tensor(table):
        table = emit.call(aten.reshape.default, _as_reals(emit, table), [table.meta["val"].shape[0], -1])
    return emit.call(aten.slice.Tensor, table, 1, offset, offset + step * (count - 1) + 1, step)


def _take_slots(emit: Emitter, index: Index, addresses: Addresses, grid: Grid, device: torch.device) -> Node:
    """[B or 1, S]: where each token goes; -1 for one that is not stored."""
    if index.node is None:
        batch, seq = _rows(grid, index.per_batch)
        numbers = emit.call(
            prims.iota.default, batch * seq, start=0, step=1, dtype=torch.int64, device=device, requires_grad=False
        )
        slots = emit.call(aten.reshape.default, numbers, [batch, seq])
    else:
        slots = _take_index(emit, index, grid)
    stored = addresses.stored
    if stored is None or stored.by_sign:
        return slots
    flag = _take_index(emit, stored.index, grid)
    # A slot may count from the end; what is negative after this is not stored.
    from_end = emit.call(aten.add.Tensor, slots, emit.size(addresses.size[1]))
    slots = emit.call(aten.where.self, emit.call(aten.lt.Scalar, slots, 0), from_end, slots)
    dtype = slots.meta["val"].dtype
    nowhere = emit.call(aten.full.default, [], -1, dtype=dtype, device=device, pin_memory=False)
    return emit.call(aten.where.self, flag, *((nowhere, slots) if stored.inverted else (slots, nowhere)))


def _take_index(emit: Emitter, index: Index, grid: Grid) -> Node:
    """[B or 1, S]"""
    assert index.node is not None
    if not index.per_token:
        one_each = emit.call(aten.reshape.default, index.node, [grid[0], 1])
        return emit.call(aten.expand.default, one_each, list(grid))
    return emit.call(aten.reshape.default, index.node, list(_rows(grid, index.per_batch)))


def _rows(grid: Grid, per_batch: bool) -> Grid:
    return grid if per_batch else (1, grid[1])


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
