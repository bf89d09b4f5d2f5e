"""The views of a cache that lead to a store, replayed on strides alone: nothing is materialised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.graph import operations
from fx_fusion.graph.operations import SCATTERS, aten
from fx_fusion.graph.paths import alias_steps
from fx_fusion.graph.sizes import Sizes
from fx_fusion.graph.store_site import Store
from fx_fusion.graph.strided import may_overlap
from fx_fusion.graph.torch_compat import pytree


def view_of(store: Store, sizes: Sizes) -> torch.Tensor:
    """What `store` writes into, on strides alone."""
    return _replay(_whole(store, sizes), store.views, sizes)


def slice_of(store: Store, sizes: Sizes) -> torch.Tensor:
    """The slice of that view which `store` fills, as PyTorch itself takes it."""
    return SCATTERS[store.writer.target](view_of(store, sizes), *_concrete(store.writer.args[2:], sizes))


def check_view(store: Store, sizes: Sizes) -> None:
    """Replay the views of the cache on strides alone: a reshape that would copy has no address to write to, and what a
    scatter puts back must be the part that was taken out.
    """
    base: torch.Tensor = store.base.meta["val"]
    whole = _whole(store, sizes)
    if any(node.target is aten.view.dtype and not operations.is_reinterpretation(node) for node in store.views):
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


def check_unchanged(store: Store, admissible: Sequence[Sizes]) -> None:
    """What was stored since the view was taken out of the cache must not be put back to what it was."""
    for sizes in admissible if store.since else ():
        view = view_of(store, sizes)
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
    except (RuntimeError, ValueError) as error:
        raise Decline("store.cache_not_viewable", f"{node} copies the cache: {error}", [node]) from error


def _replay(value: Any, steps: list[Node], sizes: Sizes) -> Any:
    for node in steps:
        target: Any = aten.view.default if node.target is aten.reshape.default else node.target
        try:
            value = target(value, *_concrete(node.args[1:], sizes))
        except (RuntimeError, ValueError) as error:
            raise Decline("store.cache_not_viewable", f"{node} copies the cache: {error}", [node]) from error
    return value


def _concrete(args: Any, sizes: Sizes) -> Any:
    return _unflat(args, [sizes.value(a) if isinstance(a, Node) else a for a in _flat(args)])


def _flat(args: Any) -> list[Any]:
    return pytree.tree_leaves(args, is_leaf=lambda a: isinstance(a, Node))


def _unflat(args: Any, values: list[Any]) -> Any:
    spec = pytree.tree_structure(args, is_leaf=lambda a: isinstance(a, Node))
    return pytree.tree_unflatten(values, spec)
