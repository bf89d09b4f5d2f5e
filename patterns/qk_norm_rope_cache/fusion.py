"""The fusion that comes with the package: split → rmsnorm → mrope → cache-store."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from fx_fusion.decline import Decline
from fx_fusion.graph import operations as opset
from fx_fusion.graph.analysis import Facts
from fx_fusion.graph.custom_calls import operation
from fx_fusion.graph.edit import STAND_IN
from fx_fusion.graph.overlap import may_overlap
from fx_fusion.graph.paths import strip_views
from fx_fusion.graph.sizes import Sizes, same
from fx_fusion.kernels import dispatch
from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import Size
from fx_fusion.kernels.target import Problem, Target, mrope_section
from fx_fusion.patterns.qk_norm_rope_cache import lower as _rewrite
from fx_fusion.patterns.qk_norm_rope_cache import match as pattern
from fx_fusion.patterns.qk_norm_rope_cache.branch.split import Heads
from fx_fusion.patterns.qk_norm_rope_cache.cache_store.addresses import Addresses, layout
from fx_fusion.patterns.qk_norm_rope_cache.match import Candidate, Match, Stored
from fx_fusion.patterns.qk_norm_rope_cache.roles import Part, parts
from fx_fusion.placement import (
    check_cache_address,
    check_convex,
    check_devices,
    check_old_cache,
    check_order,
    check_scales,
    check_sources,
    check_storage,
)
from fx_fusion.semantics.declare import WITHOUT_STORE


class QkNormRopeCache:
    """The built-in fusion, as the registry knows it; ``match.py`` shows before and after."""

    name = "qk_norm_rope_cache"

    def find(self, facts: Facts) -> tuple[list[Candidate], list[Decline]]:
        candidates, declined = pattern.find(facts)
        if not candidates and not declined:
            declined = [_no_store(facts)]
        return candidates, declined

    def read(self, facts: Facts, candidate: Candidate, memo: dict[object, Any]) -> Match:
        return pattern.read(facts, candidate, memo)

    def describe(self, match: Match) -> tuple[str, dict[str, Any], float]:
        facts = _facts(match, _problem(match))
        return _words(facts), facts, match.error

    def eligible(self, match: Match) -> dict[str, str | None]:
        return dispatch.eligibility(_problem(match))

    def choose(self, match: Match, kernel: str, target: Target) -> str:
        return dispatch.choose(kernel, _problem(match), target)

    def check(self, facts: Facts, match: Match) -> None:
        stores = [match.key_store.store, match.value_store.store]
        caches = [store.cache for store in stores]
        check_scales(match.scales, caches[0])
        check_sources(match.operands, [match.query.data, match.key.data, match.value_store.data])
        check_devices([*match.operands, *caches])
        check_convex(facts, match.operands, match.results)
        for cache in dict.fromkeys(caches):
            check_cache_address(cache)
        check_storage(caches)
        check_order(stores)
        _check_apart(facts, match)
        check_old_cache(facts, stores, match.operands)

    def stores(self, match: Match) -> tuple[list[Node], set[Node]]:
        """What writes the caches, and all that a call replaces."""
        stores = [match.key_store.store, match.value_store.store]
        scatters = [scatter for store in stores for scatter in store.scatters]
        return [store.writer for store in stores], {*match.results, *scatters}

    def parts(self, facts: Facts, match: Match) -> dict[Node, Part]:
        """The part that each node plays, for ``explain``."""
        return parts(facts, match)

    def rewrite(self, graph: Graph, match: Match, kernel: str) -> None:
        _rewrite.rewrite(graph, match, kernel)


def _no_store(facts: Facts) -> Decline:
    found = "the graph writes no KV cache in place; "
    attention = next((node for node in facts.nodes if node in facts.live and _takes_three(node)), None)
    if attention is None:
        return Decline("store.missing", f"{found}a cache that grows by concatenation (DynamicCache) stores nothing")
    found += f"if the opaque operation {operation(attention)} stores keys and values itself, that cannot be fused. "
    found += WITHOUT_STORE
    return Decline("store.missing", found, [attention])


def _takes_three(node: Node) -> bool:
    """An opaque operation that may take query, key and value."""
    tensors = [each for each in node.all_input_nodes if opset.is_float_tensor(each) and each.meta["val"].dim() > 1]
    return operation(node) is not None and len(tensors) > 2


def _check_apart(facts: Facts, match: Match) -> None:
    """A call stores keys and values at once: in one tensor, they must not share an element."""
    key, value = match.key_store, match.value_store
    if key.store.cache is not value.store.cache:
        return
    for sizes in facts.sizes:
        regions = [_region(stored.addresses, sizes) for stored in (key, value)]
        if may_overlap(*regions[0], *regions[1]):
            found = (
                f"{key.store.writer} and {value.store.writer} store into parts of {key.store.cache} that share elements"
            )
            raise Decline("store.overlap", found, [key.store.writer, value.store.writer])


def _region(addresses: Addresses, sizes: Sizes) -> tuple[list[tuple[int, int]], int]:
    """Every element that a store may reach: (size, stride) of each dimension, and the first one's place."""
    dims = [(sizes.concrete(n), sizes.concrete(stride)) for n, stride in layout(addresses).dims]
    return dims, sizes.concrete(addresses.offset)


def _problem(match: Match) -> Problem:
    query, key = match.query_heads, match.key_heads
    lookup, rope, addresses = match.lookup, match.rope, match.key_store.addresses
    angles = lookup.cos.table if lookup else rope.cos.leaf
    return Problem(
        num_heads=query.heads.num_heads,
        num_kv_heads=key.heads.num_heads,
        head_dim=key.heads.head_dim,
        rotary_dim=rope.rotary_dim,
        is_neox=rope.is_neox,
        gemma_norm=key.norm.gemma,
        q_eps=query.norm.eps,
        k_eps=key.norm.eps,
        dtype=_dtype(match.query.data),
        cache_dtype=match.key_store.dtype,
        weight_dtypes=(_weight_dtype(query.norm.weight), _weight_dtype(key.norm.weight)),
        angle_dtype=_dtype(angles).to_real(),
        packed_qkv=_is_packed(match),
        packed_table=_is_packed_table(match),
        positions_dtype=_dtype(lookup.positions) if lookup else None,
        num_axes=lookup.num_axes if lookup else 0,
        axes=lookup.axes if lookup else (),
        slots_dtype=_dtype(match.slots.node) if match.slots.node is not None else torch.int64,
        separate_blocks=addresses.blocks is not None,
        per_sequence_cache=addresses.blocks is None and not same(addresses.size[:1], [1]),
        cache_stride=tuple(map(_number, addresses.stride)),
        return_k=match.return_k,
        skip_negative_slots=addresses.stored is not None,
        block_size=_number(addresses.size[1]) if addresses.blocks is not None else None,
        scaled=any(stored.scale is not None for stored in (match.key_store, match.value_store)),
        scale_on_device=bool(match.scales),
        num_tokens=_number(match.grid[0] * match.grid[1]),
    )


def _number(size: Size) -> int | None:
    return size if isinstance(size, int) else None


def _dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype


def _weight_dtype(node: Node | None) -> torch.dtype | None:
    return None if node is None else _dtype(node)


def _is_packed(match: Match) -> bool:
    q, k, v = match.query_heads.heads, match.key_heads.heads, match.value_store.heads
    if not match.query.data is match.key.data is match.value_store.data:
        return False
    dense = all(heads.stride == heads.head_dim for heads in (q, k, v))
    first_k = q.num_heads * q.head_dim
    first_v = first_k + k.num_heads * k.head_dim
    ends = (first_k, first_v, first_v + v.num_heads * v.head_dim)
    return dense and (k.offset, v.offset, q.width) == ends and q.offset == 0 and _is_contiguous(match.query.data)


def _is_contiguous(node: Node) -> bool:
    """Without asking a symbolic size, which would guard on the answer."""
    value: torch.Tensor = node.meta["val"]
    extent: Size = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        # The stride of a dimension of one element means nothing.
        if not same([size], [1]) and not same([stride], [extent]):
            return False
        extent = extent * size
    return True


def _is_packed_table(match: Match) -> bool:
    lookup, half = match.lookup, match.rope.rotary_dim // 2
    if lookup is None or lookup.cos.table is not lookup.sin.table:
        return False
    places = [(c.offset, c.step, c.count) for c in (lookup.cos, lookup.sin)]
    return places == [(0, 1, half), (half, 1, half)] and same(
        lookup.cos.table.meta["val"].shape[1:], [match.rope.rotary_dim]
    )


def _facts(match: Match, problem: Problem) -> dict[str, Any]:
    key, lookup, addresses = match.key_heads, match.lookup, match.key_store.addresses
    section = mrope_section(lookup.axes) if lookup and lookup.num_axes == 3 else None
    return {
        "num_heads": problem.num_heads,
        "num_kv_heads": problem.num_kv_heads,
        "head_dim": problem.head_dim,
        "projection": "packed"
        if problem.packed_qkv
        else "separate"
        if match.query.data is not match.key.data
        else "shared",
        "columns": {
            name: _columns(heads)
            for name, heads in (("q", match.query_heads.heads), ("k", key.heads), ("v", match.value_store.heads))
        },
        "norm": None
        if problem.q_eps is None and problem.k_eps is None
        else {"q_eps": problem.q_eps, "k_eps": problem.k_eps, "gemma": key.norm.gemma or match.query_heads.norm.gemma},
        "rope": "neox" if match.rope.is_neox else "gpt-j",
        "rotary_dim": problem.rotary_dim,
        "angles": "table" if lookup else "rows",
        "mrope_section": list(section[0]) if section else None,
        "mrope_interleaved": section[1] if section else None,
        "axes": list(lookup.axes) if lookup else None,
        "dtype": str(problem.dtype),
        "cache_dtype": str(problem.cache_dtype),
        "cache_size": [str(size) for size in match.key_store.addresses.size],
        "cache_stride": [str(stride) for stride in match.key_store.addresses.stride],
        "k_scale": _scale(match.key_store),
        "v_scale": _scale(match.value_store),
        "saturate": match.saturate,
        "masked": addresses.stored is not None,
        "index_arithmetic": _computes_indices(match),
        "addressed_by": "a layer's name"
        if _is_stand_in(match)
        else "block and offset"
        if problem.separate_blocks
        else "slice"
        if match.slots.node is None
        else "slot in each sequence's cache"
        if problem.per_sequence_cache
        else "slot",
        "return_k": match.return_k,
    }


def _is_stand_in(match: Match) -> bool:
    """Does the cache only stand for one that an operation finds when it runs?"""
    return STAND_IN in match.key_store.store.cache.meta


def _computes_indices(match: Match) -> bool:
    """Are slots computed in the graph? That arithmetic stays outside the call, as a small kernel of its own."""
    addresses = match.key_store.addresses
    indices = [index for index in (match.slots, addresses.blocks) if index is not None]
    return any(index.node is not None and strip_views(index.node).op != "placeholder" for index in indices)


def _scale(stored: Stored) -> float | str | None:
    return str(stored.scale) if isinstance(stored.scale, Node) else stored.scale


def _columns(heads: Heads) -> str:
    return f"{heads.num_heads} x {heads.head_dim} from {heads.offset}, {heads.stride} apart"


def _norm_words(norm: dict[str, Any] | None) -> str:
    if norm is None:
        return "no norm"
    q_eps, k_eps = (None if eps is None else f"eps {eps:g}" for eps in (norm["q_eps"], norm["k_eps"]))
    weight = " (1 + weight)" if norm["gemma"] else ""
    if q_eps == k_eps:
        return f"RMSNorm {q_eps}{weight}"
    return f"RMSNorm of q {q_eps or 'none'}, of k {k_eps or 'none'}{weight}"


def _conversion_words(facts: dict[str, Any]) -> list[str]:
    """What the cache gets if not the very values."""
    scaled = [f"{name} / {facts[f'{name}_scale']}" for name in ("k", "v") if facts[f"{name}_scale"] is not None]
    words = [" and ".join(scaled)] if scaled else []
    if facts["cache_dtype"] != facts["dtype"]:
        words.append(
            f"as {facts['cache_dtype'].removeprefix('torch.')}" + (", saturating" if facts["saturate"] else "")
        )
    return [" ".join(words)] if words else []


def _cache_words(facts: dict[str, Any]) -> str:
    size = "" if facts["addressed_by"] == "a layer's name" else f" [{', '.join(facts['cache_size'])}]"
    computed = " (computed in the graph)" if facts["index_arithmetic"] else ""
    masked = ", some tokens masked" if facts["masked"] else ""
    return f"cache{size} by {facts['addressed_by']}{computed}{masked}"


def _words(facts: dict[str, Any]) -> str:
    norm = facts["norm"]
    mrope = facts["mrope_section"]
    parts = [
        f"heads {facts['num_heads']}/{facts['num_kv_heads']}x{facts['head_dim']} {facts['projection']}",
        _norm_words(norm),
        f"rope {facts['rope']} {facts['rotary_dim']}",
        (
            f"mRoPE {mrope} {'interleaved' if facts['mrope_interleaved'] else 'sectioned'}"
            if mrope
            else f"angles by {facts['angles']}"
        ),
        _cache_words(facts),
        *_conversion_words(facts),
    ]
    return ", ".join(parts)
