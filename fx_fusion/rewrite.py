"""Put one call in the place of a proved region.

The graph is functional: caches are values, and an epilogue copies the last one back into the input. The call enters
as ``auto_functionalized_v2``, from which Inductor makes the in-place call again, with no copy of a cache.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch.fx import Graph, Node

from fx_fusion import op as fused_op
from fx_fusion import opset
from fx_fusion.emit import EMITTED, Emitter, take
from fx_fusion.facts import Facts
from fx_fusion.opset import aten
from fx_fusion.patterns.cache_store import Index
from fx_fusion.patterns.mrope import Lanes
from fx_fusion.patterns.qk_norm_rope_cache import Match, Stored
from fx_fusion.patterns.rotated_heads import RotatedHeads
from fx_fusion.patterns.split import Heads

Grid = tuple[int | torch.SymInt, int | torch.SymInt]


def rewrite(graph: Graph, match: Match, kernel: str) -> None:
    """Replace what `match` found by one call of `kernel`. The graph is left unsorted: see :func:`finish`."""
    key, value = match.key_store, match.value_store
    with graph.inserting_before(match.key_store.store.writer):
        emit = Emitter(graph, match.key.out)
        call = _emit_call(emit, match, kernel)
        rotated_q = _as_result(emit, emit.call(operator.getitem, call, 0), match.query.out, match.query_heads)
        rotated_k = (
            _as_result(emit, emit.call(operator.getitem, call, 1), match.key.out, match.key_heads)
            if match.return_k
            else None
        )
        bases = _bases(key, value)
        caches = {base: emit.call(operator.getitem, call, 2 + i) for i, base in enumerate(bases)}
        written = [_replay_view(emit, stored, caches[stored.store.cache]) for stored in (key, value)]
    match.query.out.replace_all_uses_with(rotated_q)
    if rotated_k is not None:
        match.key.out.replace_all_uses_with(rotated_k)
    for stored, view in zip((key, value), written, strict=True):
        stored.store.writer.replace_all_uses_with(view)


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


def _emit_call(emit: Emitter, match: Match, kernel: str) -> Node:
    grid, lookup, rope = match.grid, match.lookup, match.rope
    query, key, value = match.query_heads, match.key_heads, match.value_store
    addresses = match.key_store.addresses
    q = _take_heads(emit, match.query.data, query.heads, grid)
    k = _take_heads(emit, match.key.data, key.heads, grid)
    if lookup is None:
        cos, sin = (_take_rows(emit, lanes, grid) for lanes in (rope.cos, rope.sin))
    else:
        cos, sin = (_take_columns(emit, c.table, c.offset, c.step, c.count) for c in (lookup.cos, lookup.sin))
    bases = _bases(match.key_store, value)
    arguments: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": _take_heads(emit, value.data, value.heads, grid),
        "q_weight": query.norm.weight,
        "k_weight": key.norm.weight,
        "cos": cos,
        "sin": sin,
        "positions": lookup
        and emit.call(aten.reshape.default, lookup.positions, [lookup.num_axes, *_rows(grid, lookup.per_batch)]),
        "slots": _take_index(emit, addresses.slots, grid),
        "blocks": addresses.blocks and _take_index(emit, addresses.blocks, grid),
        "q_eps": query.norm.eps,
        "k_eps": key.norm.eps,
        "gemma_norm": any(heads.norm.weight is not None and heads.norm.gemma for heads in (query, key)),
        "rotary_dim": rope.rotary_dim,
        "is_neox": rope.is_neox,
        "axes": list(lookup.axes) if lookup else [0] * (rope.rotary_dim // 2),
        "skip_negative_slots": False,
        "return_k": match.return_k,
        "implementation": kernel,
        "k_layout": _layout(emit, match.key_store),
        "v_layout": _layout(emit, value),
        "_k_cache_base_index": bases.index(match.key_store.store.cache),
        "_v_cache_base_index": bases.index(value.store.cache),
        "_all_bases": bases,
    }
    values = _values(q, k, bases, return_k=match.return_k)
    return emit.call_with_value(values, auto_functionalized_v2, fused_op.OVERLOAD, **arguments)


def _values(q: Node, k: Node, bases: list[Node], *, return_k: bool) -> tuple[torch.Tensor, ...]:
    """Fake results of the call.

    The caches after it get storage of their own: a fake value that shares the input's would make Inductor see the
    reader of the new cache as a reader of the old one, and copy the cache.
    """
    out_q, out_k = q.meta["val"], k.meta["val"]
    caches = [base.meta["val"] for base in bases]
    with out_q.fake_mode:
        return (
            out_q.new_empty(out_q.shape),
            out_k.new_empty(out_k.shape if return_k else (0,)),
            *(torch.empty_strided(c.shape, c.stride(), dtype=c.dtype, device=c.device) for c in caches),
        )


def _bases(*stored: Stored) -> list[Node]:
    return list(dict.fromkeys(one.store.cache for one in stored))


def _layout(emit: Emitter, stored: Stored) -> list[int | Node]:
    """Where the cache lies in its graph input."""
    addresses = stored.addresses
    size, stride = ([emit.size(n) for n in numbers] for numbers in (addresses.size, addresses.stride))
    return fused_op.layout(size, stride, emit.size(addresses.offset))


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


def _replay_view(emit: Emitter, stored: Stored, cache: Node) -> Node:
    """What the writer returned: the view that it wrote into, of the cache after the call."""
    for view in stored.store.views:
        cache = emit.call(view.target, cache, *view.args[1:], **view.kwargs)
    return cache
