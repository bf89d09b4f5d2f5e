"""Cache store: at which address does each element land? Read exactly, from strides; the cache is never materialised."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.graph import operations
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.operations import aten
from fx_fusion.graph.sizes import Sizes, same
from fx_fusion.graph.store_site import Store
from fx_fusion.graph.torch_compat import OpOverload
from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import Size
from fx_fusion.patterns.qk_norm_rope_cache.branch.split import Heads
from fx_fusion.patterns.qk_norm_rope_cache.cache_store.addresses import Addresses, Index, index_forms
from fx_fusion.patterns.qk_norm_rope_cache.cache_store.mask import by_sign, read_flag
from fx_fusion.patterns.qk_norm_rope_cache.cache_store.region import Written, own_part, read_written, without_counting
from fx_fusion.patterns.qk_norm_rope_cache.cache_store.view import check_unchanged, check_view
from fx_fusion.proof.evaluate import Arithmetic, evaluate, schedule

#: Indices up to this are tried one by one.
_EVERY_INDEX = 1 << 22


def read_addresses(
    analysis: GraphAnalysis, store: Store, elements: torch.Tensor, heads: Heads, sizes: Sizes, grid: tuple[int, int]
) -> Addresses:
    """Where `store` puts what.

    Args:
        elements: of the stored value's shape; ``(token * num_heads + head) * head_dim + lane`` of each element, -1 for
            one of another value that is joined with it.
        grid: (batch, seq) at `sizes`.
    """
    _check_writer(store)
    check_view(store, sizes)
    check_unchanged(store, analysis.sizes)
    written = read_written(store, sizes)
    like = next(iter((*written.plain.values(), *(number for _, number in written.indexed.values()))))
    elements = _as_stored(store, elements, like)
    own = elements >= 0
    if store.join is not None:
        written, elements = own_part(store, written, own, sizes), elements[own]
    _check_complete(store, elements, heads, grid)
    token = elements // (heads.head_dim * heads.num_heads)
    written = without_counting(written, elements, heads, sizes, grid)
    places = _read_places(store, written, elements, heads, grid)
    found = _address(store, written, places, token, heads, grid)
    canonical = {name: _canonical(analysis, getattr(found, name)) for name in ("slots", "blocks", "in_group")}
    found = replace(found, **canonical)
    flag = read_flag(analysis, store, own, token, sizes, grid)
    return by_sign(analysis, found, flag) if flag is not None else found


def _check_writer(store: Store) -> None:
    writer = store.writer
    accumulate = writer.target is aten.index_put.default and (
        writer.kwargs.get("accumulate", writer.args[3] if len(writer.args) > 3 else False)
    )
    if accumulate:
        raise Decline("store.accumulates", f"{writer} adds to the cache; expected it to overwrite", [writer])


def _as_stored(store: Store, elements: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`elements` in the shape that the writer gives the value: dimensions of size one may be missing in front."""
    if elements.numel() != like.numel():
        symbols = [f"{size} in dimension {dim}" for dim, size in enumerate(store.view.meta["val"].shape[1:], 1)
                   if isinstance(size, torch.SymInt)]  # fmt: skip
        if symbols:
            found = (
                f"the cache {store.cache} has the symbolic sizes {', '.join(symbols)}, expected the numbers of heads "
                "and lanes that are stored; compile with dynamic=None, and name the sizes that vary with "
                "torch._dynamo.mark_dynamic"
            )
            raise Decline("region.sizes", found, [store.writer])
        found = f"a value of shape {list(elements.shape)} is broadcast into {list(like.shape)}"
        raise Decline("store.value_broadcast", found, [store.writer])
    return elements.expand(like.shape)


def _check_complete(store: Store, elements: torch.Tensor, heads: Heads, grid: tuple[int, int]) -> None:
    total = grid[0] * grid[1] * heads.num_heads * heads.head_dim
    if elements.numel() != total or not torch.equal(elements.reshape(-1).sort().values, torch.arange(total)):
        tokens = f"{grid[0] * grid[1]} tokens of {heads.num_heads} x {heads.head_dim}"
        found = f"{elements.numel()} values are stored from {tokens}, each expected once"
        raise Decline("store.layout", found, [store.writer])


@dataclass(frozen=True)
class _Places:
    """The dimensions in which a token's sequence, slot (if it has no index), head and lanes differ."""

    batch: int | None = None
    slot: int | None = None
    slot_per_batch: bool = False
    head: int | None = None
    lane: int | None = None
    lanes: int | None = None
    joined: bool = False
    """Head and lane are one dimension."""
    lane_group: int = 0


def _read_places(
    store: Store, written: Written, elements: torch.Tensor, heads: Heads, grid: tuple[int, int]
) -> _Places:
    lane = elements % heads.head_dim
    head = elements // heads.head_dim % heads.num_heads
    token = elements // (heads.head_dim * heads.num_heads)
    found = _Places()
    for dim, coordinate in written.plain.items():
        if same([written.size[dim]], [1]):
            continue
        extent = int(coordinate.max()) + 1
        group = heads.head_dim // extent
        if bool((coordinate == lane).all()):
            found = replace(found, lane=dim)
        elif bool((coordinate == head).all()):
            found = replace(found, head=dim)
        elif bool((coordinate == head * heads.head_dim + lane).all()):
            found = replace(found, lane=dim, head=dim, joined=True)
        elif bool((coordinate == token // grid[1]).all()):
            found = replace(found, batch=dim)
        elif store.into_slice and bool((coordinate == token % grid[1]).all()):
            found = replace(found, slot=dim)
        elif store.into_slice and bool((coordinate == token).all()):
            found = replace(found, slot=dim, slot_per_batch=True)
        elif bool((coordinate == lane % extent).all()):
            found = replace(found, lane=dim, lane_group=extent)
        elif group * extent == heads.head_dim and bool((coordinate == lane // group).all()):
            found = replace(found, lanes=dim)
        else:
            found_there = (
                f"dimension {dim} of the cache view {store.view} is filled neither by heads, nor lanes, nor sequences"
            )
            raise Decline("store.layout", found_there, [store.writer])
    if bool(found.lane_group) != (found.lanes is not None):
        raise Decline("store.layout", f"the lanes of a head lie in groups only in part of {store.view}", [store.writer])
    return found


def _address(
    store: Store, written: Written, places: _Places, token: torch.Tensor, heads: Heads, grid: tuple[int, int]
) -> Addresses:
    def stride(dim: int | None, otherwise: Size) -> Size:
        return otherwise if dim is None else written.stride[dim]

    dims = list(written.indexed)
    if store.into_slice:
        slot_size = 1 if places.slot is None else written.size[places.slot]
        slots, slot_stride = Index(None, places.slot_per_batch or grid[0] == 1), stride(places.slot, 0)
        in_group, block_dims, group = None, [], 0
    else:
        *block_dims, slot_dim = dims
        slots, slot_size = _index(written, slot_dim, token, grid, store), written.size[slot_dim]
        slot_stride, in_group, group = written.stride[slot_dim], None, 0
        if len(dims) == 3 and isinstance(slot_size, int):
            group, in_group = slot_size, slots
            *block_dims, group_dim = block_dims
            slots, slot_size = _index(written, group_dim, token, grid, store), written.size[group_dim] * group
    if len(block_dims) > 1 or (block_dims and places.batch is not None):
        found = f"{len(dims)} indices address the cache; expected a slot, or a block and an offset"
        raise Decline("store.index", found, [store.writer])
    block_dim = block_dims[0] if block_dims else places.batch
    lane_stride = stride(places.lane, 1)
    dense = heads.head_dim * lane_stride
    return Addresses(
        size=(1 if block_dim is None else written.size[block_dim], slot_size, heads.num_heads, heads.head_dim),
        stride=(stride(block_dim, 0), slot_stride, dense if places.joined else stride(places.head, dense), lane_stride),
        offset=written.offset,
        slots=slots,
        blocks=_index(written, block_dims[0], token, grid, store) if block_dims else None,
        in_group=in_group,
        slot_group=group,
        slot_group_stride=written.stride[dims[-2]] if group else 0,
        lane_group=places.lane_group,
        lane_group_stride=stride(places.lanes, 0),
    )


def _index(written: Written, dim: int, token: torch.Tensor, grid: tuple[int, int], store: Store) -> Index:
    node, number = written.indexed[dim]
    for per_batch, per_token, expected in index_forms(token, grid):
        if bool((number == expected).all()):
            return Index(node, per_batch, per_token)
    raise Decline("store.index", f"{node} does not hold one index per token, in order", [store.writer])


def _canonical(analysis: GraphAnalysis, index: Index | None) -> Index | None:
    return index and replace(index, node=index.node and analysis.canonical(index.node))


def same_slots(analysis: GraphAnalysis, key: Addresses, value: Addresses, sizes: Sizes) -> Index | None:
    """The slots that both are stored at, or None if that cannot be shown.

    Blocks and slots are shared; how many there are may be two symbols for what is one number. Where a flag leaves
    tokens out, a negative slot is counted from the end once for both: they must have as many.
    """
    sized = [[sizes.concrete(size) for size in addresses.size[:2]] for addresses in (key, value)]
    if (key.blocks, key.stored) != (value.blocks, value.stored) or sized[0][0] != sized[1][0]:
        return None
    if key.stored and not key.stored.by_sign and not same(key.size[1:2], value.size[1:2]):
        return None
    if key.in_group is None and value.in_group is None:
        return key.slots if key.slots == value.slots else None
    plain, grouped = (key, value) if key.in_group is None else (value, key)
    if plain.in_group is not None or sized[0] != sized[1]:
        return None
    return plain.slots if _splits(analysis, plain.slots, grouped, sized[0][1]) else None


def _splits(analysis: GraphAnalysis, slots: Index, grouped: Addresses, block_size: int) -> bool:
    """Do the two indices of `grouped` spell the slot, at every slot that a block has, counted from either end?

    Each must be a function of one slot: what sorts them, or adds them up, looks like one where they happen to be in
    order.
    """
    group, place = grouped.slots, grouped.in_group
    assert place is not None
    if slots.node is None or group.node is None or place.node is None or 2 * block_size > _EVERY_INDEX:
        return False
    if len({replace(each, node=None) for each in (slots, group, place)}) > 1:
        return False
    every = torch.arange(-block_size, block_size)
    # The same slots may be computed once more for the value.
    alike = [each for each in _above(group.node, place.node) if analysis.canonical(each) is slots.node]
    try:
        steps = schedule([group.node, place.node], alike)
        if not all(_acts_on_each(node, slots.node) for node in steps):
            return False
        found = evaluate([group.node, place.node], dict.fromkeys(alike, every), Sizes(), Arithmetic.NATIVE)
    except Decline:
        return False
    if any(each.shape != every.shape for each in found):
        return False
    groups, places = block_size // grouped.slot_group, grouped.slot_group
    return torch.equal(found[0] % groups * places + found[1] % places, every % block_size)


def _acts_on_each(node: Node, slots: Node) -> bool:
    """Does `node` make one integer of each slot, or is it a single number?"""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor) or node.op != "call_function":
        return False
    if operations.is_literal(node):
        return same([value.numel()], [1])
    pointwise = isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags
    return (pointwise or operations.is_cast(node)) and same(value.shape, slots.meta["val"].shape)


def _above(*nodes: Node) -> list[Node]:
    """The nearest of what `nodes` are computed from, themselves included."""
    found = list(dict.fromkeys(nodes))
    for node in found:
        found += [parent for parent in node.all_input_nodes if parent not in found and len(found) < 64]
    return found
