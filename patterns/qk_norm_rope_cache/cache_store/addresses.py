"""A cache's addresses: the view that tokens are written into, and which integers say where each goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import CacheLayout, Size


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


def index_forms(token: torch.Tensor, grid: tuple[int, int]) -> Iterator[tuple[bool, bool, torch.Tensor]]:
    """What an index may have one element of, as :class:`Index` says (per batch, per token), and the element of each."""
    yield True, True, token
    yield grid[0] == 1, True, token % grid[1]
    yield True, False, token // grid[1]


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
    :class:`~fx_fusion.kernels.qk_norm_rope_cache.cache_layout.CacheLayout` says; then `in_group` is the place of
    `slots`, a group, in it.
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
