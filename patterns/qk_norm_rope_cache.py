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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from fx_fusion.certificate import CODES as CERTIFICATE_CODES
from fx_fusion.certificate import certify_copy
from fx_fusion.decline import Decline, reaching
from fx_fusion.evaluate import check_memory
from fx_fusion.facts import Facts
from fx_fusion.opset import aten
from fx_fusion.patterns.cache_store import Addresses, Index, read_addresses, same_slots
from fx_fusion.patterns.conversion import (
    FLOAT8,
    Conversion,
    check_scale,
    moved_elements,
    read_conversion,
    saturates,
    ways_to_copy,
)
from fx_fusion.patterns.cos_sin_table import Lookup, trace_lookup
from fx_fusion.patterns.joint_store import take_apart
from fx_fusion.patterns.mrope import Rope
from fx_fusion.patterns.rotated_heads import RotatedHeads, read_rotated_heads
from fx_fusion.patterns.split import Heads, expected_columns, read_heads
from fx_fusion.probe import Frontier, find_leaves
from fx_fusion.region import (
    Branch,
    Rotations,
    branch_between,
    branch_key,
    data_cuts,
    is_moved_from,
    rows_of_tokens,
)
from fx_fusion.sizes import Sizes
from fx_fusion.stores import Store, find_stores, pair_stores, tell_key_from_value

#: Where the data of a branch may begin is tried at this many places, the earliest first.
_CUTS = 4

#: By what it was measured on: a branch's reading, with its leaves, or why there is none; a store's heads and addresses.
Memo = dict[object, Any]


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
    error: float

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


def find(facts: Facts) -> tuple[list[Candidate], list[Decline]]:
    """Candidates in graph order, and what can be no candidate."""
    stores, declined = find_stores(facts)
    pairs, unpaired = take_apart(facts, *pair_stores(facts, stores))
    declined += unpaired
    rotations = Rotations(facts)
    return [Candidate((a, b), origin, rotations) for a, b, origin in pairs], declined


def read(facts: Facts, candidate: Candidate, memo: Memo) -> Match:
    """Read and prove one candidate. Raises Decline with the reason why not."""
    with reaching("stores"):
        key_store, value_store = tell_key_from_value(facts, *candidate.stores, candidate.origin)
        conversion = read_conversion(key_store)
    with reaching("key"):
        key, key_heads = _read_key(facts, key_store, conversion, candidate.origin, memo)
    with reaching("query"):
        query, query_heads = _read_query(facts, candidate.rotations, key, value_store, memo)
        rope = _same_rotation(facts, query_heads, key_heads)
    sizes = facts.sizes[0]
    grid = key_heads.grid(sizes.shape(key.out.meta["val"]), key.tokens(sizes))
    if grid != query_heads.grid(sizes.shape(query.out.meta["val"]), query.tokens(sizes)):
        raise Decline("split.layout", "query and key hold their tokens in different grids", [query.out, key.out])
    with reaching("key's store"):
        stored_key = _stored_key(facts, key_store, conversion, key, key_heads, grid, memo)
    with reaching("value's store"):
        stored_value = _stored_value(facts, value_store, stored_key, grid, memo)
        slots = _same_slots(facts, stored_key, stored_value, sizes)
    return Match(
        query=query,
        query_heads=query_heads,
        key=key,
        key_heads=key_heads,
        rope=rope,
        lookup=_lookup_once(facts, rope, grid, memo),
        key_store=stored_key,
        value_store=stored_value,
        slots=slots,
        saturate=bool(stored_key.saturate or stored_value.saturate),
        grid=_symbolic_grid(key, key_heads),
        return_k=_used_fresh(facts, key.out, key_store),
        error=max(query_heads.error, key_heads.error),
    )


def _read_key(
    facts: Facts, store: Store, conversion: Conversion, origin: Node, memo: Memo
) -> tuple[Branch, RotatedHeads]:
    """The rotated key: what is stored, before it is moved, scaled and converted for the store.

    A cache may be narrower or wider than the model; the key leaves the rotation in the projection's dtype.
    """
    values = [node for node in conversion.values if node is not origin and not _is_joint(store, node)]
    values = values or [conversion.value]
    values.sort(key=lambda value: value.meta["val"].dtype != origin.meta["val"].dtype)
    return _read_one_of(facts, origin, values, memo)


def _read_query(
    facts: Facts, rotations: Rotations, key: Branch, value_store: Store, memo: Memo
) -> tuple[Branch, RotatedHeads]:
    outs, origin = rotations.find_query(key, value_store.own)
    return _read_one_of(facts, origin, outs, memo)


_PLAIN_WRITERS = (aten.index_put.default, aten.index_copy.default)

Attempt = tuple[Branch, RotatedHeads] | Decline


def _read_one_of(facts: Facts, origin: Node, outs: Sequence[Node], memo: Memo) -> tuple[Branch, RotatedHeads]:
    """The first of `outs` that is rotated heads.

    Raises:
        Decline: of the one that got furthest. One between which and the projection something stands that no reading
            gets past tells nothing, where another was read.
    """
    declines: list[Decline] = []
    for out in outs:
        try:
            return _furthest(_attempts(facts, origin, out, memo))
        except Decline as decline:
            declines.append(decline)
    measured = [decline for decline in declines if decline.code not in CERTIFICATE_CODES]
    raise max(measured, key=lambda decline: decline.stage) if measured else declines[0]


def _attempts(facts: Facts, origin: Node, out: Node, memo: Memo) -> Iterator[Attempt]:
    cuts = data_cuts(facts, origin, out)
    projection = rows_of_tokens(facts, origin, cuts[0])
    for data in cuts[:_CUTS]:
        yield _attempt(facts, branch_between(facts, projection, data, out), memo)


def _attempt(facts: Facts, branch: Branch, memo: Memo) -> Attempt:
    try:
        heads = _memoised(facts, branch, memo)
        _check_escapes(facts, branch)
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


def _memoised(facts: Facts, branch: Branch, memo: Memo) -> RotatedHeads:
    """Equal branches are measured once: the key holds all that reading and proof depend on.

    That includes the way from the origins of the frontier, the furthest that any reading looks back, to the branch.
    """
    with reaching("operands"):
        taken = find_leaves(branch)
    leaves = tuple(dict.fromkeys(leaf for each in taken.values() for leaf in each))
    key = branch_key(branch, taken[Frontier.PARTS])
    if key not in memo:
        try:
            memo[key] = (read_rotated_heads(branch, facts.sizes), leaves)
        except Decline as decline:
            memo[key] = decline
    known = memo[key]
    if isinstance(known, Decline):
        nodes = [branch.out] if known.nodes and known.nodes[0] not in branch.nodes else known.nodes
        raise Decline(known.code, known.found, nodes, known.reached)
    heads, its_leaves = known
    return heads.on(dict(zip(its_leaves, leaves, strict=True)))


def _check_escapes(facts: Facts, branch: Branch) -> None:
    """A value that only the rewritten computation made must not be needed elsewhere."""
    inside = set(branch.nodes)
    for node in branch.nodes:
        if node is branch.out or is_moved_from(node, branch.data):
            continue
        outside = [user for user in facts.users(node) if user not in inside]
        if outside:
            found = f"{node} lies between the projection and {branch.out}, and {outside[0]} uses it too"
            raise Decline("region.escapes", found, [node, outside[0]])


def _same_rotation(facts: Facts, query: RotatedHeads, key: RotatedHeads) -> Rope:
    """The key's rotation, if it is the query's too."""
    ropes = [heads.rope for heads in (query, key)]
    seen = [
        (
            rope.rotary_dim,
            rope.is_neox,
            *(
                (facts.value_number(a.leaf), a.width, a.offset, a.step, a.count, a.per_batch)
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


def _stored_key(
    facts: Facts,
    store: Store,
    conversion: Conversion,
    key: Branch,
    heads: RotatedHeads,
    grid: tuple[int, int],
    memo: Memo,
) -> Stored:
    layout, sizes = heads.heads, facts.sizes[0]
    scale = conversion.scale and check_scale(conversion.scale, _dtype(key.out))

    def read() -> tuple[Heads, Addresses]:
        shape = sizes.shape(key.out.meta["val"])
        _check_memory(store, shape, sizes)
        numbers = torch.arange(torch.Size(shape).numel()).reshape(*grid, layout.num_heads, layout.head_dim)
        elements = _arriving(facts, store, conversion, key.out, heads.arrange(numbers).reshape(shape), sizes)
        return layout, read_addresses(facts, store, elements, layout, sizes, grid)

    asked = (layout, heads.token_dims, heads.heads_first, grid)
    addresses = _stored_once(facts, store, conversion, key.out, asked, memo, read)[1]
    saturate = saturates(conversion, _device(store))
    return Stored(store, key.data, layout, addresses, conversion.dtype, scale, saturate)


def _stored_value(facts: Facts, store: Store, key: Stored, grid: tuple[int, int], memo: Memo) -> Stored:
    """The value's store, in the first way that a kernel can copy it in, and that suits the key's store."""
    conversion = read_conversion(store, keep_rows=True)
    saturate = saturates(conversion, _device(store))
    ways = [
        way
        for way in ways_to_copy(conversion)
        if _dtype(way.data) == _dtype(key.data) and not _is_joint(store, way.data)
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
        return _read_copied(facts, store, conversion, data, key.heads, grid)

    heads, addresses = _stored_once(facts, store, conversion, data, (key.heads, grid), memo, read)
    return Stored(
        store, data, heads, addresses, conversion.dtype, suited[0].scale, None if suited[0].in_range else saturate
    )


def _read_copied(
    facts: Facts, store: Store, conversion: Conversion, data: Node, key: Heads, grid: tuple[int, int]
) -> tuple[Heads, Addresses]:
    """Which heads of `data` the store copies, and whereto."""
    sizes = facts.sizes[0]
    shape = sizes.shape(data.meta["val"])
    width, rest = divmod(torch.Size(shape).numel(), grid[0] * grid[1])
    if rest:
        raise Decline("split.layout", f"{data} of shape {list(shape)} does not hold {grid[0] * grid[1]} tokens", [data])
    _check_memory(store, shape, sizes)
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    moved = _arriving(facts, store, conversion, data, numbers, sizes)
    columns = (moved[moved >= 0] % width).unique()
    heads = read_heads(columns, key.head_dim, width, data)
    if heads.num_heads != key.num_heads:
        found = f"{heads.num_heads} heads of values are stored with {key.num_heads} heads of keys"
        raise Decline("split.v_not_copied", found, [store.value])
    lane = torch.zeros(width, dtype=torch.long)
    lane[expected_columns(heads).reshape(-1)] = torch.arange(heads.num_heads * heads.head_dim)
    elements = torch.where(moved < 0, -1, moved // width * len(columns) + lane[moved % width])
    return heads, read_addresses(facts, store, elements, heads, sizes, grid)


def _check_memory(store: Store, source: Sequence[int], sizes: Sizes) -> None:
    """A number for each element of the source; for each one stored that, its coordinates, and both in order."""
    stored = torch.Size(sizes.shape(store.value.meta["val"])).numel()
    check_memory(torch.int64.itemsize * (torch.Size(source).numel() + 4 * stored), store.writer)


def _stored_once(
    facts: Facts,
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
    steps = [*store.steps_from(facts, source), *store.views, store.writer]
    structure, feeding = facts.structure(steps)
    converting = [steps.index(step.node) for step in conversion.steps_after(source)]
    fed_by = [facts.value_number(node) for node in feeding]
    places = [fed_by.index(facts.value_number(node)) for node in (source, store.base)]
    position = store.join and store.join.position
    question = ("store", structure, tuple(converting), conversion.dtype, tuple(places), position, asked)
    indices = [facts.canonical(node) for node in feeding]
    if question not in memo:
        memo[question] = (*read(), indices)
    heads, addresses, known = memo[question]
    return heads, addresses.on(dict(zip(known, indices, strict=True)))


def _arriving(
    facts: Facts, store: Store, conversion: Conversion, source: Node, numbers: torch.Tensor, sizes: Sizes
) -> torch.Tensor:
    """`numbers`, of the elements of `source`, as they arrive in the stored value."""
    steps = conversion.steps_after(source)
    allowed = {step.node for step in steps} | ({store.join.node} if store.join else set())
    certify_copy(store.steps_from(facts, source), allowed, _dtype(source), conversion.dtype)
    return moved_elements(store, steps, source, numbers, sizes)


def _is_joint(store: Store, node: Node) -> bool:
    """Does `node` hold keys and values, joined?"""
    return store.join is not None and (node is store.join.node or node in store.join.after)


def _converted(dtype: torch.dtype, saturate: bool | None) -> str:
    return f"{dtype}" if saturate is None else f"{dtype} {'with' if saturate else 'without'} saturation"


def _dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype


def _device(store: Store) -> torch.device:
    return store.cache.meta["val"].device


def _same_slots(facts: Facts, key: Stored, value: Stored, sizes: Sizes) -> Index:
    a, b = key.addresses, value.addresses
    slots = same_slots(facts, a, b, sizes)
    if slots is None:
        masked = ["masked" if addresses.stored else "unmasked" for addresses in (a, b)]
        kinds = [f", {kind}" if masked[0] != masked[1] else "" for kind in masked]
        found = f"the key is stored at {a.slots} of {list(a.size)}{kinds[0]}, "
        found += f"the value at {b.slots} of {list(b.size)}{kinds[1]}"
        raise Decline("store.slots_differ", found, [key.store.writer, value.store.writer])
    return slots


def _lookup_once(facts: Facts, rope: Rope, grid: tuple[int, int], memo: Memo) -> Lookup | None:
    """The lookup behind the rows of `rope`; layers that share the rows share it."""
    cos, sin = (replace(lanes, leaf=facts.canonical(lanes.leaf)) for lanes in (rope.cos, rope.sin))
    question = ("lookup", replace(rope, cos=cos, sin=sin), grid)
    if question not in memo:
        memo[question] = trace_lookup(facts, rope, facts.sizes[0], grid)
    return memo[question]


def _symbolic_grid(key: Branch, heads: RotatedHeads) -> tuple[int | torch.SymInt, int | torch.SymInt]:
    if heads.token_dims:
        shape = key.out.meta["val"].shape
        return shape[heads.token_dims[0]], shape[heads.token_dims[1]]
    tokens = 1
    for size in key.projection.meta["val"].shape[:-1]:
        tokens = tokens * size
    return 1, tokens


def _used_fresh(facts: Facts, out: Node, store: Store) -> bool:
    """Is the rotated key used by anything but its store (prefill attention, an output)?"""
    tail = {*facts.between(out, [store.value]), *store.last_steps}
    return any(user not in tail for node in tail - {store.writer} for user in facts.users(node))
