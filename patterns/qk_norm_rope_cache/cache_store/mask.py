"""Masked stores: which tokens are stored, as one truth value each, or by the sign of their slots."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.operations import aten, node_of
from fx_fusion.graph.sizes import Sizes
from fx_fusion.graph.store_site import Store
from fx_fusion.patterns.qk_norm_rope_cache.cache_store.addresses import Addresses, Flag, Index, index_forms
from fx_fusion.proof.index_maps import moved_from

#: Whether a slot is negative, or is not: an operation and the number it compares with.
_NEGATIVE: tuple[tuple[Any, int], ...] = ((aten.lt.Scalar, 0), (aten.le.Scalar, -1))
_NOT_NEGATIVE: tuple[tuple[Any, int], ...] = ((aten.ge.Scalar, 0), (aten.gt.Scalar, -1))


def read_flag(
    analysis: GraphAnalysis, store: Store, own: torch.Tensor, token: torch.Tensor, sizes: Sizes, grid: tuple[int, int]
) -> Flag | None:
    if store.mask is None:
        return None
    root, moved = moved_from(store.mask.flag, sizes)
    if root.meta["val"].dtype == torch.bool and torch.broadcast_shapes(moved.shape, own.shape) == own.shape:
        for per_batch, per_token, number in index_forms(token, grid):
            if bool((moved.expand(own.shape)[own] == number.reshape(-1)).all()):
                return Flag(Index(analysis.canonical(root), per_batch, per_token), store.mask.inverted)
    found = f"{store.mask.flag} does not hold one truth value per token: parts of a token would be stored"
    raise Decline("store.mask", found, [store.mask.where])


def by_sign(analysis: GraphAnalysis, addresses: Addresses, flag: Flag) -> Addresses:
    """Of a mask ``slots >= 0``, the slots themselves: then nothing is computed outside the call."""
    test, index = flag.index.node, addresses.slots.node
    assert test is not None
    kinds = _NEGATIVE if flag.inverted else _NOT_NEGATIVE
    if index is None or not any((test.target, *test.args[1:]) == kind for kind in kinds):
        return replace(addresses, stored=flag)
    slots = node_of(test.args[0])
    same_tokens = replace(flag.index, node=index) == addresses.slots
    same_tokens = same_tokens and slots.meta["val"].dtype == index.meta["val"].dtype
    if not same_tokens or analysis.value_number(slots) not in _without_sign(analysis, index, flag):
        return replace(addresses, stored=flag)
    return replace(
        addresses, slots=replace(addresses.slots, node=analysis.canonical(slots)), stored=replace(flag, by_sign=True)
    )


def _without_sign(analysis: GraphAnalysis, index: Node, flag: Flag) -> list[int]:
    """What `index` equals wherever that is not negative: itself, and what it was clamped or selected from."""
    found = [index]
    if index.target is aten.relu.default or _clamps_at_zero(index):
        found.append(node_of(index.args[0]))
    elif index.target is aten.where.self and analysis.canonical(node_of(index.args[0])) is flag.index.node:
        found.append(node_of(index.args[2 if flag.inverted else 1]))
    return [analysis.value_number(node) for node in found]


def _clamps_at_zero(node: Node) -> bool:
    return node.target in (aten.clamp_min.default, aten.clamp.default) and node.args[1:] in ((0,), (0, None))
