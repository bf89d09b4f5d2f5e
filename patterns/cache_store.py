"""Cache store: at which address does each element land? Read exactly, from strides; the cache is never materialised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from fx_fusion import opset
from fx_fusion.decline import Decline
from fx_fusion.evaluate import Arithmetic, evaluate
from fx_fusion.facts import Facts
from fx_fusion.patterns.split import Heads
from fx_fusion.region import SCATTERS, Store, alias_steps
from fx_fusion.sizes import Sizes, same

Size = int | torch.SymInt


@dataclass(frozen=True)
class Index:
    """One integer a token: element (b, s) of the node seen as [B, S], or element s for every sequence."""

    node: Node
    per_batch: bool


@dataclass(frozen=True)
class Addresses:
    """The cache as a view [N0, N1, Hk, D] that tokens are written into at (block, slot).

    `offset` counts elements from the first one of the graph input.
    """

    size: tuple[Size, Size, int, int]
    stride: tuple[Size, Size, Size, Size]
    offset: Size
    slots: Index
    blocks: Index | None


def read_addresses(
    facts: Facts, store: Store, elements: torch.Tensor, heads: Heads, sizes: Sizes, grid: tuple[int, int]
) -> Addresses:
    """Where `store` puts what.

    Args:
        elements: of the stored value's shape; ``(token * num_heads + head) * head_dim + lane`` of each element.
        grid: (batch, seq) at `sizes`.
    """
    _check_writer(store)
    _check_view(store, sizes)
    view: torch.Tensor = store.view.meta["val"]
    coordinates, indices = _coordinates(store, sizes)
    elements = _as_stored(
        store, elements, next(iter((*coordinates.values(), *(number for _, number in indices.values()))))
    )
    _check_complete(store, elements, heads, grid)
    lane = elements % heads.head_dim
    head = elements // heads.head_dim % heads.num_heads
    token = elements // (heads.head_dim * heads.num_heads)
    batch = token // grid[1]

    strides: dict[str, Size] = {}
    batch_size: Size = 1
    for dim, coordinate in coordinates.items():
        if same([view.shape[dim]], [1]):
            continue
        if bool((coordinate == lane).all()):
            strides["lane"] = view.stride(dim)
        elif bool((coordinate == head).all()):
            strides["head"] = view.stride(dim)
        elif bool((coordinate == head * heads.head_dim + lane).all()):
            strides["lane"], strides["head"] = view.stride(dim), view.stride(dim) * heads.head_dim
        elif bool((coordinate == batch).all()):
            strides["batch"], batch_size = view.stride(dim), view.shape[dim]
        else:
            found = (
                f"dimension {dim} of the cache view {store.view} is filled neither by heads, nor lanes, nor sequences"
            )
            raise Decline("store.layout", found, [store.writer])
    slot_dim, *block_dims = reversed(list(indices))
    if len(block_dims) > 1 or (block_dims and "batch" in strides):
        raise Decline(
            "store.index",
            f"{len(indices)} indices address the cache; expected a slot, or a block and an offset",
            [store.writer],
        )
    slots = _index(indices[slot_dim], token, grid, store)
    blocks = _index(indices[block_dims[0]], token, grid, store) if block_dims else None
    block_size, block_stride = (
        (view.shape[block_dims[0]], view.stride(block_dims[0])) if block_dims else (batch_size, strides.get("batch", 0))
    )
    lane_stride = strides.get("lane", 1)
    return Addresses(
        size=(block_size, view.shape[slot_dim], heads.num_heads, heads.head_dim),
        stride=(block_stride, view.stride(slot_dim), strides.get("head", heads.head_dim * lane_stride), lane_stride),
        offset=view.storage_offset() - store.base.meta["val"].storage_offset(),
        slots=Index(facts.canonical(slots.node), slots.per_batch),
        blocks=blocks and Index(facts.canonical(blocks.node), blocks.per_batch),
    )


def _check_writer(store: Store) -> None:
    accumulate = store.writer.kwargs.get("accumulate", store.writer.args[3] if len(store.writer.args) > 3 else False)
    if accumulate:
        raise Decline(
            "store.accumulates", f"{store.writer} adds to the cache; expected it to overwrite", [store.writer]
        )


def _check_view(store: Store, sizes: Sizes) -> None:
    """Replay the views of the cache on strides alone: a reshape that would copy has no address to write to, and what a
    scatter puts back must be the part that was taken out.
    """
    base: torch.Tensor = store.base.meta["val"]
    strides = [sizes.concrete(stride) for stride in base.stride()]
    whole = torch.empty_strided(sizes.shape(base), strides, device="meta")
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
        places = [(each.shape, each.stride(), each.storage_offset()) for each in (taken, put_back)]
        if places[0] != places[1]:
            found = f"{scatter} puts back another part of the cache than {store.view} is"
            raise Decline("store.cache_not_viewable", found, [scatter])


def _replay(value: Any, steps: list[Node], sizes: Sizes) -> Any:
    for node in steps:
        target: Any = opset.aten.view.default if node.target is opset.aten.reshape.default else node.target
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
        found = f"a value of shape {list(elements.shape)} is broadcast into {list(like.shape)}"
        raise Decline("store.value_broadcast", found, [store.writer])
    return elements.expand(like.shape)


def _coordinates(store: Store, sizes: Sizes) -> tuple[dict[int, torch.Tensor], dict[int, tuple[Node, torch.Tensor]]]:
    """For each element stored: its coordinate in every plain dimension of the cache view, and in every indexed one
    the number of the index element that chose it.

    Indexing an expanded arange with dummy indices follows PyTorch's own rules for where indexed dimensions go.
    """
    shape = sizes.shape(store.view.meta["val"])
    given: list[Any] = list(store.writer.args[1])  # type: ignore[arg-type]
    given += [None] * (len(shape) - len(given))
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
        return opset.aten.index.Tensor(ruler, index)

    picked = {dim: pick(dim) for dim in range(len(shape))}
    return (
        {dim: value for dim, value in picked.items() if dim not in numbers},
        {dim: (given[dim], picked[dim]) for dim in numbers},
    )


def _index(index: tuple[Node, torch.Tensor], token: torch.Tensor, grid: tuple[int, int], store: Store) -> Index:
    node, number = index
    if bool((number == token).all()) and grid[0] > 1:
        return Index(node, per_batch=True)
    if bool((number == token % grid[1]).all()):
        return Index(node, per_batch=grid[0] == 1)
    raise Decline("store.index", f"{node} does not hold one index per token, in order", [store.writer])


def moved_elements(store_value: Node, source: Node, numbers: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """The element numbers of `source` as they arrive in the stored value, through movement and casts alone."""
    return evaluate([store_value], {source: numbers}, sizes, Arithmetic.MOVE)[0]
