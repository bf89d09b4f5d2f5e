"""Cache store: at which address does each element land? Read exactly, from strides; the cache is never materialised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from fx_fusion import opset
from fx_fusion.decline import Decline
from fx_fusion.evaluate import Arithmetic, evaluate
from fx_fusion.facts import Facts
from fx_fusion.kernels.cache_layout import CacheLayout, Size
from fx_fusion.opset import aten, prims
from fx_fusion.overlap import may_overlap
from fx_fusion.patterns.split import Heads
from fx_fusion.region import alias_steps, strip_views
from fx_fusion.sizes import Sizes, same
from fx_fusion.stores import SCATTERS, Store

#: Indices up to this are tried one by one.
_EVERY_INDEX = 1 << 22


@dataclass(frozen=True)
class Index:
    """One integer a token: element (b, s) of the node seen as [B, S], or element s for every sequence; unless
    `per_token`, element b for every token of a sequence.

    Without a node it is the token's own number: b * S + s, or s.
    """

    node: Node | None
    per_batch: bool
    per_token: bool = True

    def __str__(self) -> str:
        return str(self.node) if self.node is not None else "consecutive slots"


@dataclass(frozen=True)
class Flag:
    """One truth value a token: is it stored? With `by_sign`, just if its slot is not negative."""

    index: Index
    inverted: bool
    by_sign: bool = False


@dataclass(frozen=True)
class Addresses:
    """The cache as a view [N0, N1, Hk, D] that tokens are written into at (block, slot).

    `offset` counts elements from the first one of the graph input. Slots or lanes may lie in groups, as
    :class:`~fx_fusion.kernels.cache_layout.CacheLayout` says; then `in_group` is the place of `slots`, a group, in it.
    """

    size: tuple[Size, Size, int, int]
    stride: tuple[Size, Size, Size, Size]
    offset: Size
    slots: Index
    blocks: Index | None
    stored: Flag | None = None
    in_group: Index | None = None
    slot_group: int = 0
    slot_group_stride: Size = 0
    lane_group: int = 0
    lane_group_stride: Size = 0

    def on(self, nodes: Mapping[Node, Node]) -> Addresses:
        """The same addresses, of an equal store with other indices."""

        def on(index: Index | None) -> Index | None:
            return index and replace(index, node=index.node and nodes[index.node])

        slots = replace(self.slots, node=self.slots.node and nodes[self.slots.node])
        return replace(self, slots=slots, blocks=on(self.blocks), in_group=on(self.in_group))


def layout(addresses: Addresses) -> CacheLayout:
    """Where the cache lies in its graph input, as a kernel is told."""
    groups = (addresses.slot_group, addresses.slot_group_stride, addresses.lane_group, addresses.lane_group_stride)
    return CacheLayout(*addresses.size, *addresses.stride, addresses.offset, *groups)


@dataclass(frozen=True)
class _Written:
    """What a store changes, as a strided region: in which dimension is which coordinate, and which are indexed.

    Coordinates have the shape of the stored value, as the writer gives it; those of an indexed dimension number the
    elements of the index.
    """

    size: tuple[Size, ...]
    stride: tuple[Size, ...]
    offset: Size
    plain: dict[int, torch.Tensor]
    indexed: dict[int, tuple[Node, torch.Tensor]]


def read_addresses(
    facts: Facts, store: Store, elements: torch.Tensor, heads: Heads, sizes: Sizes, grid: tuple[int, int]
) -> Addresses:
    """Where `store` puts what.

    Args:
        elements: of the stored value's shape; ``(token * num_heads + head) * head_dim + lane`` of each element, -1 for
            one of another value that is joined with it.
        grid: (batch, seq) at `sizes`.
    """
    _check_writer(store)
    _check_view(store, sizes)
    _check_unchanged(store, facts.sizes)
    written = _slice_written(store, sizes) if store.into_slice else _written_at_indices(store, sizes)
    like = next(iter((*written.plain.values(), *(number for _, number in written.indexed.values()))))
    elements = _as_stored(store, elements, like)
    own = elements >= 0
    if store.join is not None:
        written, elements = _own_part(store, written, own, sizes), elements[own]
    _check_complete(store, elements, heads, grid)
    token = elements // (heads.head_dim * heads.num_heads)
    written = _without_counting(written, elements, heads, grid)
    places = _read_places(store, written, elements, heads, grid)
    found = _address(store, written, places, token, heads, grid)
    canonical = {name: _canonical(facts, getattr(found, name)) for name in ("slots", "blocks", "in_group")}
    found = replace(found, **canonical)
    flag = _read_flag(facts, store, own, token, sizes, grid)
    return _by_sign(facts, found, flag) if flag is not None else found


def _own_part(store: Store, written: _Written, own: torch.Tensor, sizes: Sizes) -> _Written:
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
    return _Written(tuple(size), tuple(stride), offset, plain, indexed)


def _without_counting(written: _Written, elements: torch.Tensor, heads: Heads, grid: tuple[int, int]) -> _Written:
    """The same region, with no index where that only counts sequences or heads: ``cache[arange(B)[:, None], …]``."""
    head = elements // heads.head_dim % heads.num_heads
    sequence = elements // (heads.head_dim * heads.num_heads) // grid[1]
    counting = {
        dim: number
        for dim, (node, number) in written.indexed.items()
        if _counts(node) and any(bool((number == each).all()) for each in (sequence, head))
    }
    if len(counting) == len(written.indexed):
        return written
    indexed = {dim: index for dim, index in written.indexed.items() if dim not in counting}
    return replace(written, plain={**written.plain, **counting}, indexed=indexed)


def _counts(index: Node) -> bool:
    """Does `index` hold 0, 1, 2, … in this order? (An expanded one would have its elements numbered otherwise.)"""
    root = strip_views(index)
    given = {"start": 0, "step": 1, **root.kwargs}
    return (
        root.target is prims.iota.default
        and (given["start"], given["step"]) == (0, 1)
        and same([root.meta["val"].numel()], [index.meta["val"].numel()])
    )


def _canonical(facts: Facts, index: Index | None) -> Index | None:
    return index and replace(index, node=index.node and facts.canonical(index.node))


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
    store: Store, written: _Written, elements: torch.Tensor, heads: Heads, grid: tuple[int, int]
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
    store: Store, written: _Written, places: _Places, token: torch.Tensor, heads: Heads, grid: tuple[int, int]
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
        slots, slot_size, slot_stride = _index(written, slot_dim, token, grid, store), written.size[slot_dim], 0
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


def _read_flag(
    facts: Facts, store: Store, own: torch.Tensor, token: torch.Tensor, sizes: Sizes, grid: tuple[int, int]
) -> Flag | None:
    if store.mask is None:
        return None
    root = strip_views(store.mask.flag)
    shape = sizes.shape(root.meta["val"])
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    moved = evaluate([store.mask.flag], {root: numbers}, sizes, Arithmetic.MOVE)[0]
    if root.meta["val"].dtype == torch.bool and torch.broadcast_shapes(moved.shape, own.shape) == own.shape:
        for per_batch, per_token, number in _index_forms(token, grid):
            if bool((moved.expand(own.shape)[own] == number.reshape(-1)).all()):
                return Flag(Index(facts.canonical(root), per_batch, per_token), store.mask.inverted)
    found = f"{store.mask.flag} does not hold one truth value per token: parts of a token would be stored"
    raise Decline("store.mask", found, [store.mask.where])


def _above(*nodes: Node) -> list[Node]:
    """The nearest of what `nodes` are computed from, themselves included."""
    found = list(dict.fromkeys(nodes))
    for node in found:
        found += [parent for parent in node.all_input_nodes if parent not in found and len(found) < 64]
    return found


#: Whether a slot is negative, or is not: an operation and the number it compares with.
_NEGATIVE: tuple[tuple[Any, int], ...] = ((aten.lt.Scalar, 0), (aten.le.Scalar, -1))
_NOT_NEGATIVE: tuple[tuple[Any, int], ...] = ((aten.ge.Scalar, 0), (aten.gt.Scalar, -1))


def _by_sign(facts: Facts, addresses: Addresses, flag: Flag) -> Addresses:
    """Of a mask ``slots >= 0``, the slots themselves: then nothing is computed outside the call."""
    test, index = flag.index.node, addresses.slots.node
    assert test is not None
    kinds = _NEGATIVE if flag.inverted else _NOT_NEGATIVE
    if index is None or not any((test.target, *test.args[1:]) == kind for kind in kinds):
        return replace(addresses, stored=flag)
    slots = _node(test.args[0])
    same_tokens = replace(flag.index, node=index) == addresses.slots
    if not same_tokens or facts.value_number(slots) not in _without_sign(facts, index, flag):
        return replace(addresses, stored=flag)
    return replace(
        addresses, slots=replace(addresses.slots, node=facts.canonical(slots)), stored=replace(flag, by_sign=True)
    )


def _without_sign(facts: Facts, index: Node, flag: Flag) -> list[int]:
    """What `index` equals wherever that is not negative: itself, and what it was clamped or selected from."""
    found = [index]
    if index.target is aten.relu.default or _clamps_at_zero(index):
        found.append(_node(index.args[0]))
    elif index.target is aten.where.self and facts.canonical(_node(index.args[0])) is flag.index.node:
        found.append(_node(index.args[2 if flag.inverted else 1]))
    return [facts.value_number(node) for node in found]


def _clamps_at_zero(node: Node) -> bool:
    return node.target in (aten.clamp_min.default, aten.clamp.default) and node.args[1:] in ((0,), (0, None))


def same_slots(facts: Facts, key: Addresses, value: Addresses, sizes: Sizes) -> Index | None:
    """The slots that both are stored at, or None if that cannot be shown.

    Blocks and slots are shared; how many there are may be two symbols for what is one number.
    """
    sized = [[sizes.concrete(size) for size in addresses.size[:2]] for addresses in (key, value)]
    if (key.blocks, key.stored) != (value.blocks, value.stored) or sized[0][0] != sized[1][0]:
        return None
    if key.in_group is None and value.in_group is None:
        return key.slots if key.slots == value.slots else None
    plain, grouped = (key, value) if key.in_group is None else (value, key)
    if plain.in_group is not None or sized[0] != sized[1]:
        return None
    return plain.slots if _splits(facts, plain.slots, grouped, sized[0][1], sizes) else None


def _splits(facts: Facts, slots: Index, grouped: Addresses, block_size: int, sizes: Sizes) -> bool:
    """Do the two indices of `grouped` spell the slot, at every slot that a block has, counted from either end?"""
    group, place = grouped.slots, grouped.in_group
    assert place is not None
    if slots.node is None or group.node is None or place.node is None or 2 * block_size > _EVERY_INDEX:
        return False
    if len({replace(each, node=None) for each in (slots, group, place)}) > 1:
        return False
    every = torch.arange(-block_size, block_size)
    # The same slots may be computed once more for the value.
    alike = (each for each in _above(group.node, place.node) if facts.canonical(each) is slots.node)
    try:
        found = evaluate([group.node, place.node], dict.fromkeys(alike, every), sizes, Arithmetic.NATIVE)
    except Decline:
        return False
    if any(each.shape != every.shape for each in found):
        return False
    groups, places = block_size // grouped.slot_group, grouped.slot_group
    return torch.equal(found[0] % groups * places + found[1] % places, every % block_size)


def _check_writer(store: Store) -> None:
    writer = store.writer
    accumulate = writer.target is aten.index_put.default and (
        writer.kwargs.get("accumulate", writer.args[3] if len(writer.args) > 3 else False)
    )
    if accumulate:
        raise Decline("store.accumulates", f"{writer} adds to the cache; expected it to overwrite", [writer])


def _check_view(store: Store, sizes: Sizes) -> None:
    """Replay the views of the cache on strides alone: a reshape that would copy has no address to write to, and what a
    scatter puts back must be the part that was taken out.
    """
    base: torch.Tensor = store.base.meta["val"]
    whole = _whole(store, sizes)
    if any(node.target is aten.view.dtype and not opset.is_reinterpretation(node) for node in store.views):
        raise Decline("store.cache_not_viewable", f"{store.view} has elements of another size", [store.view])
    if base.storage_offset() and any(node.target is aten.as_strided.default for node in store.views):
        found = f"{store.view} is given by its place in memory, and {store.base} does not begin where its storage does"
        raise Decline("store.cache_not_viewable", found, [store.view])
    view = _replay(whole, store.views, sizes)
    expected = [sizes.concrete(stride) for stride in store.view.meta["val"].stride()]
    if list(view.stride()) != expected:
        raise Decline(
            "store.cache_not_viewable",
            f"{store.view} has strides {expected} but the cache gives {list(view.stride())}",
            [store.view],
        )
    if any(stride == 0 and size > 1 for size, stride in zip(view.shape, expected, strict=True)):
        found = f"{store.view} holds elements of the cache more than once: its strides are {expected}"
        raise Decline("store.cache_not_viewable", found, [store.view])
    part, node = view, store.writer
    for scatter in store.scatters:
        put_back = _replay(part, alias_steps(node, scatter.args[1]), sizes)
        part, node = _replay(whole, store.part(scatter), sizes), scatter
        taken: torch.Tensor = SCATTERS[scatter.target](part, *_concrete(scatter.args[2:], sizes))
        if _place(taken) != _place(put_back):
            found = f"{scatter} puts back another part of the cache than {store.view} is"
            raise Decline("store.cache_not_viewable", found, [scatter])


def _place(value: torch.Tensor) -> tuple[Any, ...]:
    """Which elements, in which order: where there is but one in a dimension, its stride says nothing."""
    steps = [stride for size, stride in zip(value.shape, value.stride(), strict=True) if size != 1]
    return value.shape, steps, value.storage_offset()


def _check_unchanged(store: Store, admissible: Sequence[Sizes]) -> None:
    """What was stored since the view was taken out of the cache must not be put back to what it was."""
    for sizes in admissible if store.since else ():
        view = _replay(_whole(store, sizes), store.views, sizes)
        for other in store.since:
            changed = _changed(other, sizes)
            if may_overlap(_dims(view), view.storage_offset(), _dims(changed), changed.storage_offset()):
                found = f"{store.writer} writes into {store.view}, which {other.writer} may have stored into since"
                raise Decline("store.overlap", found, [store.writer, other.writer])


def _changed(store: Store, sizes: Sizes) -> torch.Tensor:
    """All that `store` may change of its cache, on strides alone."""
    scatter = store.scatters[0] if store.scatters else store.writer
    steps = store.part(scatter) if store.scatters else store.views
    part = _replay(_whole(store, sizes), steps, sizes)
    return SCATTERS[scatter.target](part, *_concrete(scatter.args[2:], sizes)) if scatter.target in SCATTERS else part


def _dims(value: torch.Tensor) -> list[tuple[int, int]]:
    """(size, stride), the widest stride first; neighbours that are one dimension in memory are one here."""
    found: list[tuple[int, int]] = []
    for size, stride in sorted(zip(value.shape, value.stride(), strict=True), key=lambda dim: -dim[1]):
        if found and found[-1][1] == size * stride:
            size *= found.pop()[0]
        found.append((size, stride))
    return found


def _whole(store: Store, sizes: Sizes) -> torch.Tensor:
    """The cache on strides alone, in the shape of the value before `store`."""
    cache: torch.Tensor = store.cache.meta["val"]
    strides = [sizes.concrete(stride) for stride in cache.stride()]
    whole = torch.empty_strided(sizes.shape(cache), strides, dtype=cache.dtype, device="meta")
    return _viewed(whole, store.base, sizes.shape(store.base.meta["val"]))


def _viewed(whole: Any, node: Node, shape: tuple[int, ...]) -> Any:
    if whole.shape == shape:
        return whole
    try:
        return whole.view(shape)
    except RuntimeError as error:
        raise Decline("store.cache_not_viewable", f"{node} copies the cache: {error}", [node]) from error


def _replay(value: Any, steps: list[Node], sizes: Sizes) -> Any:
    for node in steps:
        target: Any = aten.view.default if node.target is aten.reshape.default else node.target
        try:
            value = target(value, *_concrete(node.args[1:], sizes))
        except RuntimeError as error:
            raise Decline("store.cache_not_viewable", f"{node} copies the cache: {error}", [node]) from error
    return value


def _concrete(args: Any, sizes: Sizes) -> Any:
    return _unflat(args, [sizes.value(a) if isinstance(a, Node) else a for a in _flat(args)])


def _flat(args: Any) -> list[Any]:
    return pytree.tree_leaves(args, is_leaf=lambda a: isinstance(a, Node))


def _unflat(args: Any, values: list[Any]) -> Any:
    spec = pytree.tree_structure(args, is_leaf=lambda a: isinstance(a, Node))
    return pytree.tree_unflatten(values, spec)


def _check_complete(store: Store, elements: torch.Tensor, heads: Heads, grid: tuple[int, int]) -> None:
    total = grid[0] * grid[1] * heads.num_heads * heads.head_dim
    if elements.numel() != total or not torch.equal(elements.reshape(-1).sort().values, torch.arange(total)):
        tokens = f"{grid[0] * grid[1]} tokens of {heads.num_heads} x {heads.head_dim}"
        found = f"{elements.numel()} values are stored from {tokens}, each expected once"
        raise Decline("store.layout", found, [store.writer])


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


def _written_at_indices(store: Store, sizes: Sizes) -> _Written:
    view: torch.Tensor = store.view.meta["val"]
    plain, indexed = _scattered(store, sizes) if store.writer.target is aten.scatter.src else _put(store, sizes)
    offset = view.storage_offset() - store.base.meta["val"].storage_offset()
    return _Written(tuple(view.shape), tuple(view.stride()), offset, plain, indexed)


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
        if index is not None and not opset.is_int_tensor(index):
            raise Decline("store.index", f"{index} is not an integer index", [store.writer])
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


def _scattered(store: Store, sizes: Sizes) -> tuple[dict[int, torch.Tensor], dict[int, tuple[Node, torch.Tensor]]]:
    """Of ``scatter``: its index has an element for each one stored, expanded from one that has fewer."""
    shape = sizes.shape(store.view.meta["val"])
    _, where, index, *_ = store.writer.args
    assert isinstance(where, int) and isinstance(index, Node)
    root, extent = strip_views(index), sizes.shape(index.meta["val"])
    if extent != sizes.shape(store.value.meta["val"]):
        found = f"{index} of {list(extent)} chooses a part of the value {store.value}"
        raise Decline("store.layout", found, [store.writer])
    given = sizes.shape(root.meta["val"])
    numbers = torch.arange(torch.Size(given).numel()).reshape(given)
    expanded = evaluate([index], {root: numbers}, sizes, Arithmetic.MOVE)[0]
    rulers = torch.meshgrid(*(torch.arange(size) for size in extent), indexing="ij")
    dim = where % len(shape)
    short = [d for d in range(len(shape)) if d != dim and extent[d] != shape[d]]
    if short:
        found = f"the value fills {extent[short[0]]} of {shape[short[0]]} elements of dimension {short[0]} of the cache"
        raise Decline("store.layout", found, [store.writer])
    return {d: ruler for d, ruler in enumerate(rulers) if d != dim}, {dim: (root, expanded)}


def _slice_written(store: Store, sizes: Sizes) -> _Written:
    """A slice is a view like any other: where it begins is part of its offset."""
    writer, view = store.writer, store.view.meta["val"]
    size, stride = list(view.shape), list(view.stride())
    offset: Size = view.storage_offset() - store.base.meta["val"].storage_offset()
    given = dict(zip(("dim", "start", "end", "step"), map(_number, writer.args[2:]), strict=False))
    given |= {name: _number(value) for name, value in writer.kwargs.items()}
    if writer.target is aten.as_strided_scatter.default:
        size, stride = [_number(n) for n in writer.args[2]], [_number(n) for n in writer.args[3]]  # type: ignore[union-attr]
        offset = _number(writer.args[4]) if len(writer.args) > 4 and writer.args[4] is not None else 0
    elif writer.target is aten.select_scatter.default:
        dim = given["dim"] % len(size)
        offset = offset + _from_start(writer, given["start"], size[dim]) * stride[dim]
        del size[dim], stride[dim]
    else:
        dim, step = (given.get("dim") or 0) % len(size), given.get("step") or 1
        offset = offset + _from_start(writer, given.get("start") or 0, size[dim]) * stride[dim]
        size[dim], stride[dim] = _node(writer.args[1]).meta["val"].shape[dim], stride[dim] * step
    written = _Written(tuple(size), tuple(stride), offset, {}, {})
    _check_slice(store, written, sizes)
    rulers = torch.meshgrid(*(torch.arange(sizes.concrete(n)) for n in size), indexing="ij")
    return replace(written, plain=dict(enumerate(rulers)))


def _check_slice(store: Store, written: _Written, sizes: Sizes) -> None:
    """PyTorch's own slice of strides alone is where the arithmetic above says."""
    view = _replay(_whole(store, sizes), store.views, sizes)
    part = SCATTERS[store.writer.target](view, *_concrete(store.writer.args[2:], sizes))
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


def _number(value: Any) -> Any:
    return value.meta["val"] if isinstance(value, Node) else value


def _node(value: Any) -> Node:
    assert isinstance(value, Node), value
    return value


def _index_forms(token: torch.Tensor, grid: tuple[int, int]) -> Iterator[tuple[bool, bool, torch.Tensor]]:
    """What an index may have one element of, as :class:`Index` says (per batch, per token), and the element of each."""
    yield True, True, token
    yield grid[0] == 1, True, token % grid[1]
    yield True, False, token // grid[1]


def _index(written: _Written, dim: int, token: torch.Tensor, grid: tuple[int, int], store: Store) -> Index:
    node, number = written.indexed[dim]
    for per_batch, per_token, expected in _index_forms(token, grid):
        if bool((number == expected).all()):
            return Index(node, per_batch, per_token)
    raise Decline("store.index", f"{node} does not hold one index per token, in order", [store.writer])
