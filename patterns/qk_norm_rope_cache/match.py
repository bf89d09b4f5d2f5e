"""split → rmsnorm → mrope → cache-store, in one call.

Before, for every layer::

    q, k, v = split(projection)                    # or three projections
    q, k = rope(rms_norm(q), cos, sin), rope(rms_norm(k), cos, sin)
    k_cache[slots] = k
    v_cache[slots] = v

After::

    q, k = fx_fusion.qk_norm_rope_cache(q, k, v, …, cos, sin, slots, k_cache, v_cache)   # views, no copy
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from fx_fusion.decline import Decline, reaching
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.paths import (
    Branch,
    Rotations,
    branch_between,
    data_cuts,
    is_moved_from,
    numbered_branch,
    rows_of_tokens,
)
from fx_fusion.graph.store_site import Store, find_stores, pair_stores, tell_key_from_value
from fx_fusion.patterns.qk_norm_rope_cache.branch.rope import Rope
from fx_fusion.patterns.qk_norm_rope_cache.branch.rotated_heads import RotatedHeads, read_rotated_heads
from fx_fusion.patterns.qk_norm_rope_cache.branch.table_lookup import Lookup, trace_lookup
from fx_fusion.patterns.qk_norm_rope_cache.cache_store.addresses import Index
from fx_fusion.patterns.qk_norm_rope_cache.cache_store.conversion import Conversion, read_conversion
from fx_fusion.patterns.qk_norm_rope_cache.cache_store.join import take_apart
from fx_fusion.patterns.qk_norm_rope_cache.cache_store.stored import (
    Memo,
    Stored,
    check_counts,
    is_joint,
    read_stored_key,
    read_stored_value,
    shared_slots,
)
from fx_fusion.proof.certificate import CODES as CERTIFICATE_CODES
from fx_fusion.proof.evidence import Evidence, Sampled, weakest
from fx_fusion.proof.region_function import Frontier, find_leaves

#: Where the data of a branch may begin is tried at this many places, the earliest first.
_CUTS = 4


@dataclass(frozen=True)
class Candidate:
    """Two stores whose values come from `origin`: perhaps the key and the value of one layer."""

    stores: tuple[Store, Store]
    origin: Node
    rotations: Rotations

    @property
    def anchor(self) -> Node:
        return self.stores[0].writer


@dataclass(frozen=True)
class Match:
    """Everything that the call needs, read off and proved. Nodes are values of the graph, none is a result of it."""

    query: Branch
    query_heads: RotatedHeads
    key: Branch
    key_heads: RotatedHeads
    rope: Rope
    lookup: Lookup | None
    key_store: Stored
    value_store: Stored
    slots: Index
    saturate: bool
    grid: tuple[int | torch.SymInt, int | torch.SymInt]
    return_k: bool
    evidence: Evidence

    @property
    def scales(self) -> list[Node]:
        """Scales that are read at every call."""
        scales = (stored.scale for stored in (self.key_store, self.value_store))
        return [scale for scale in scales if isinstance(scale, Node)]

    @property
    def operands(self) -> list[Node]:
        """The values that the call reads."""
        weights = [h.norm.weight for h in (self.query_heads, self.key_heads)]
        angles = (
            (self.lookup.cos.table, self.lookup.sin.table, self.lookup.positions)
            if self.lookup
            else (self.rope.cos.leaf, self.rope.sin.leaf)
        )
        addresses = self.key_store.addresses
        indices = (self.slots, addresses.blocks, addresses.stored and addresses.stored.index)
        nodes = [
            self.query.data,
            self.key.data,
            self.value_store.data,
            *weights,
            *angles,
            *(i and i.node for i in indices),
            *self.scales,
        ]
        return list(dict.fromkeys(node for node in nodes if node is not None))

    @property
    def results(self) -> list[Node]:
        """The values that the call replaces."""
        rotated_k = [self.key.out] if self.return_k else []
        return [self.query.out, *rotated_k, self.key_store.store.writer, self.value_store.store.writer]


def find(analysis: GraphAnalysis) -> tuple[list[Candidate], list[Decline]]:
    """Candidates in graph order, and what can be no candidate."""
    stores, declined = find_stores(analysis)
    pairs, unpaired = take_apart(analysis, *pair_stores(analysis, stores))
    declined += unpaired
    rotations = Rotations(analysis)
    return [Candidate((a, b), origin, rotations) for a, b, origin in pairs], declined


def read(analysis: GraphAnalysis, candidate: Candidate, memo: Memo) -> Match:
    """Read and prove one candidate. Raises Decline with the reason why not."""
    with reaching("stores"):
        key_store, value_store = tell_key_from_value(analysis, *candidate.stores, candidate.origin)
        conversion = read_conversion(key_store)
    with reaching("key"):
        key, key_heads = _read_key(analysis, key_store, conversion, candidate.origin, memo)
    with reaching("query"):
        query, query_heads = _read_query(analysis, candidate.rotations, key, value_store, memo)
        rope = _same_rotation(analysis, query_heads, key_heads)
    sizes = analysis.sizes[0]
    grid = key_heads.grid(sizes.shape(key.out.meta["val"]), key.tokens(sizes))
    if grid != query_heads.grid(sizes.shape(query.out.meta["val"]), query.tokens(sizes)):
        raise Decline("split.layout", "query and key hold their tokens in different grids", [query.out, key.out])
    with reaching("key's store"):
        stored_key = read_stored_key(analysis, key_store, conversion, key, key_heads, grid, memo)
    with reaching("value's store"):
        stored_value = read_stored_value(analysis, value_store, stored_key, grid, memo)
        slots = shared_slots(analysis, stored_key, stored_value, sizes)
        symbolic_grid = _symbolic_grid(key, key_heads)
        check_counts(symbolic_grid, stored_key, stored_value)
    return Match(
        query=query,
        query_heads=query_heads,
        key=key,
        key_heads=key_heads,
        rope=rope,
        lookup=_lookup_once(analysis, rope, grid, memo),
        key_store=stored_key,
        value_store=stored_value,
        slots=slots,
        saturate=bool(stored_key.saturate or stored_value.saturate),
        grid=symbolic_grid,
        return_k=_used_fresh(analysis, key.out, key_store),
        evidence=weakest([each.evidence for each in (query_heads, key_heads) if each.evidence is not None]),
    )


def _read_key(
    analysis: GraphAnalysis, store: Store, conversion: Conversion, origin: Node, memo: Memo
) -> tuple[Branch, RotatedHeads]:
    """The rotated key: what is stored, before it is moved, scaled and converted for the store.

    A cache may be narrower or wider than the model; the key leaves the rotation in the projection's dtype.
    """
    values = [node for node in conversion.values if node is not origin and not is_joint(store, node)]
    values = values or [conversion.value]
    values.sort(key=lambda value: value.meta["val"].dtype != origin.meta["val"].dtype)
    return _read_one_of(analysis, origin, values, memo)


def _read_query(
    analysis: GraphAnalysis, rotations: Rotations, key: Branch, value_store: Store, memo: Memo
) -> tuple[Branch, RotatedHeads]:
    outs, origin = rotations.find_query(key, value_store.own)
    return _read_one_of(analysis, origin, outs, memo)


Attempt = tuple[Branch, RotatedHeads] | Decline


def _read_one_of(
    analysis: GraphAnalysis, origin: Node, outs: Sequence[Node], memo: Memo
) -> tuple[Branch, RotatedHeads]:
    """The first of `outs` that is rotated heads.

    Raises:
        Decline: of the one that got furthest. One between which and the projection something stands that no reading
            gets past tells nothing, where another was read.
    """
    declines: list[Decline] = []
    for out in outs:
        try:
            return _furthest(_attempts(analysis, origin, out, memo))
        except Decline as decline:
            declines.append(decline)
    measured = [decline for decline in declines if decline.code not in CERTIFICATE_CODES]
    raise max(measured, key=lambda decline: decline.stage) if measured else declines[0]


def _attempts(analysis: GraphAnalysis, origin: Node, out: Node, memo: Memo) -> Iterator[Attempt]:
    cuts = data_cuts(analysis, origin, out)
    projection = rows_of_tokens(analysis, origin, cuts[0])
    for data in cuts[:_CUTS]:
        yield _attempt(analysis, branch_between(analysis, projection, data, out), memo)


def _attempt(analysis: GraphAnalysis, branch: Branch, memo: Memo) -> Attempt:
    try:
        heads = _memoised(analysis, branch, memo)
        _check_escapes(analysis, branch)
    except Decline as decline:
        return decline
    return branch, heads


def _furthest(attempts: Iterator[Attempt]) -> tuple[Branch, RotatedHeads]:
    """The first attempt that succeeds.

    Raises:
        Decline: of the attempt that got furthest, or of the certificate: what it objects to where the data begins first
            is why later beginnings were tried at all.
    """
    declines: list[Decline] = []
    for attempt in attempts:
        if not isinstance(attempt, Decline):
            return attempt
        declines.append(attempt)
    measured = [decline for decline in declines if decline.code not in CERTIFICATE_CODES]
    raise declines[0] if declines[0].code in CERTIFICATE_CODES else max(measured, key=lambda decline: decline.stage)


def _memoised(analysis: GraphAnalysis, branch: Branch, memo: Memo) -> RotatedHeads:
    """Equal branches are measured once: the key holds all that reading and proof depend on.

    That includes the way from the origins of the frontier, the furthest that any reading looks back, to the branch;
    what the key numbers alike corresponds.
    """
    with reaching("operands"):
        taken = find_leaves(branch)
    key, nodes = numbered_branch(branch, taken[Frontier.PARTS])
    if key not in memo:
        try:
            memo[key] = (read_rotated_heads(branch, analysis.sizes), nodes)
        except Decline as decline:
            memo[key] = decline
    known = memo[key]
    if isinstance(known, Decline):
        at = [branch.out] if known.nodes and known.nodes[0] not in branch.nodes else known.nodes
        raise Decline(known.code, known.found, at, known.reached)
    heads, its_nodes = known
    heads = heads.on(dict(zip(its_nodes, nodes, strict=True)))
    return replace(heads, evidence=_in(branch, heads.evidence))


def _in(branch: Branch, evidence: Evidence | None) -> Evidence | None:
    """Of an equal branch, pointing into this one."""
    if isinstance(evidence, Sampled) and not set(evidence.nodes) <= set(branch.nodes):
        return replace(evidence, nodes=(branch.out,))
    return evidence


def _check_escapes(analysis: GraphAnalysis, branch: Branch) -> None:
    """A value that only the rewritten computation made must not be needed elsewhere."""
    inside = set(branch.nodes)
    for node in branch.nodes:
        if node is branch.out or is_moved_from(node, branch.data):
            continue
        outside = [user for user in analysis.users(node) if user not in inside]
        if outside:
            found = f"{node} lies between the projection and {branch.out}, and {outside[0]} uses it too"
            raise Decline("region.escapes", found, [node, outside[0]])


def _same_rotation(analysis: GraphAnalysis, query: RotatedHeads, key: RotatedHeads) -> Rope:
    """The key's rotation, if it is the query's too."""
    ropes = [heads.rope for heads in (query, key)]
    seen = [
        (
            rope.rotary_dim,
            rope.is_neox,
            *(
                (analysis.value_number(a.leaf), a.width, a.offset, a.step, a.count, a.per_batch)
                for a in (rope.cos, rope.sin)
            ),
        )
        for rope in ropes
    ]
    if seen[0] != seen[1]:
        turns = [f"{'neox' if r.is_neox else 'gpt-j'} over {r.rotary_dim} lanes by {r.cos} and {r.sin}" for r in ropes]
        found = f"the query is rotated {turns[0]}, the key {turns[1]}; expected one and the same rotation"
        leaves = {rope.cos.leaf: None for rope in ropes} | {rope.sin.leaf: None for rope in ropes}
        raise Decline("rope.differs", found, list(leaves))
    if query.heads.head_dim != key.heads.head_dim:
        found = f"query heads have {query.heads.head_dim} lanes, key heads {key.heads.head_dim}"
        raise Decline("split.heads", found, [ropes[0].cos.leaf])
    if query.norm.weight and key.norm.weight and query.norm.gemma != key.norm.gemma:
        raise Decline(
            "norm.differs", "one of query and key is multiplied by weight, the other by 1 + weight", [key.norm.weight]
        )
    return ropes[1]


def _lookup_once(analysis: GraphAnalysis, rope: Rope, grid: tuple[int, int], memo: Memo) -> Lookup | None:
    """The lookup behind the rows of `rope`; layers that share the rows share it."""
    cos, sin = (replace(lanes, leaf=analysis.canonical(lanes.leaf)) for lanes in (rope.cos, rope.sin))
    question = ("lookup", replace(rope, cos=cos, sin=sin), grid)
    if question not in memo:
        memo[question] = trace_lookup(analysis, rope, analysis.sizes[0], grid)
    return memo[question]


def _symbolic_grid(key: Branch, heads: RotatedHeads) -> tuple[int | torch.SymInt, int | torch.SymInt]:
    if heads.token_dims:
        shape = key.out.meta["val"].shape
        return shape[heads.token_dims[0]], shape[heads.token_dims[1]]
    tokens = 1
    for size in key.projection.meta["val"].shape[:-1]:
        tokens = tokens * size
    return 1, tokens


def _used_fresh(analysis: GraphAnalysis, out: Node, store: Store) -> bool:
    """Is the rotated key used by anything but its store (prefill attention, an output)?"""
    tail = {*analysis.between(out, [store.value]), *store.last_steps}
    return any(user not in tail for node in tail - {store.writer} for user in analysis.users(node))
