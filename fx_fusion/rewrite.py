"""Put one call in the place of a proved region.

The graph is functional: caches are values, and an epilogue copies the last one back into the input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from fx_fusion import opset
from fx_fusion.call import insert
from fx_fusion.emit import EMITTED, Emitter, take
from fx_fusion.facts import Facts
from fx_fusion.kernels.cache_layout import CacheLayout
from fx_fusion.opset import aten
from fx_fusion.patterns.cache_store import Index
from fx_fusion.patterns.mrope import Lanes
from fx_fusion.patterns.qk_norm_rope_cache import Match, Stored
from fx_fusion.patterns.rotated_heads import RotatedHeads
from fx_fusion.patterns.split import Heads
from fx_fusion.region import Store

Grid = tuple[int | torch.SymInt, int | torch.SymInt]


def rewrite(graph: Graph, match: Match, kernel: str) -> None:
    """Replace what `match` found by one call of `kernel`. The graph is left unsorted: see :func:`finish`."""
    stores = (match.key_store, match.value_store)
    k_cache, v_cache = _caches_before(*(stored.store for stored in stores))
    with graph.inserting_before(match.key_store.store.writer):
        emit = Emitter(graph, match.key.out)
        operands = _operands(emit, match)
        results = insert(emit, kernel, operands, k_cache, v_cache, _options(match), return_k=match.return_k)
        rotated_q = _as_result(emit, results.q, match.query.out, match.query_heads)
        rotated_k = results.k and _as_result(emit, results.k, match.key.out, match.key_heads)
        after = [results.caches[cache] for cache in (k_cache, v_cache)]
        written: dict[Node, Node] = {}
        for stored, cache in zip(stores, after, strict=True):
            store = stored.store
            written[store.writer] = _replay(emit, store.views, cache)
            written |= {scatter: _replay(emit, store.part(scatter), cache) for scatter in store.scatters}
    match.query.out.replace_all_uses_with(rotated_q)
    if rotated_k is not None:
        match.key.out.replace_all_uses_with(rotated_k)
    for old, new in written.items():
        old.replace_all_uses_with(new)


def _caches_before(key: Store, value: Store) -> tuple[Node, Node]:
    """The caches as they are before the call: of two stores into one cache, what the first one finds."""
    if key.cache is not value.cache:
        return key.base, value.base
    base = value.base if key.base is value.after else key.base
    return base, base


def finish(graph: Graph) -> None:
    """Restore the topological order, and drop what the calls made dead."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)
    _share_views(graph)
    for node in reversed(list(graph.nodes)):
        if (
            node.op == "call_function"
            and not node.users
            and not node.is_impure()
            and node.target is not aten.copy_.default
        ):
            graph.erase_node(node)
    graph.lint()


def _share_views(graph: Graph) -> None:
    """Views that the calls of several layers need alike become one, so that what they view is computed once."""
    facts = Facts(graph)
    for node in facts.nodes:
        if node.meta.get(EMITTED) and node.target in opset.VIEW and facts.canonical(node) is not node:
            node.replace_all_uses_with(facts.canonical(node))


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
        "slots": _take_index(emit, addresses.slots, grid),
        "blocks": addresses.blocks and _take_index(emit, addresses.blocks, grid),
        "k_scale": None,
        "v_scale": None,
    }


def _options(match: Match) -> dict[str, Any]:
    """What the call is told besides its tensors, named as in the operation's schema."""
    query, key, lookup, rope = match.query_heads, match.key_heads, match.lookup, match.rope
    return {
        "k_layout": _layout(match.key_store),
        "v_layout": _layout(match.value_store),
        "k_scale_value": None,
        "v_scale_value": None,
        "q_eps": query.norm.eps,
        "k_eps": key.norm.eps,
        "gemma_norm": any(heads.norm.weight is not None and heads.norm.gemma for heads in (query, key)),
        "rotary_dim": rope.rotary_dim,
        "is_neox": rope.is_neox,
        "axes": list(lookup.axes) if lookup else [0] * (rope.rotary_dim // 2),
        "saturate": False,
        "skip_negative_slots": False,
    }


def _layout(stored: Stored) -> CacheLayout:
    """Where the cache lies in its graph input."""
    addresses = stored.addresses
    return CacheLayout(*addresses.size, *addresses.stride, addresses.offset)


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
    return take(emit, lanes.leaf, _rows(grid, lanes.per_batch), [(lanes.count, lanes.offset, lanes.step, lanes.width)])


def _take_columns(emit: Emitter, table: Node, offset: int, step: int, count: int) -> Node:
    """[P, count]"""
    return emit.call(aten.slice.Tensor, table, 1, offset, offset + step * (count - 1) + 1, step)


def _take_index(emit: Emitter, index: Index, grid: Grid) -> Node:
    """[B or 1, S]"""
    return emit.call(aten.reshape.default, index.node, list(_rows(grid, index.per_batch)))


def _rows(grid: Grid, per_batch: bool) -> Grid:
    return grid if per_batch else (1, grid[1])


def _as_result(emit: Emitter, heads: Node, old: Node, layout: RotatedHeads) -> Node:
    """[B, S, H, D] as the value that it replaces: in its order, with its shape."""
    if layout.heads_first:
        heads = emit.call(aten.permute.default, heads, [0, 2, 1, 3])
    shape = old.meta["val"].shape
    if len(layout.token_dims) == 2:
        return heads
    return emit.call(aten.reshape.default, heads, list(shape))


def _replay(emit: Emitter, steps: list[Node], cache: Node) -> Node:
    """The same view of the cache after the call."""
    for view in steps:
        cache = emit.call(view.target, cache, *view.args[1:], **view.kwargs)
    return cache
