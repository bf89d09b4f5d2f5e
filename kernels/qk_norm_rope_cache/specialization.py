"""What may select other code in a kernel, told apart from mere sizes and values."""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import CacheLayout
from fx_fusion.kernels.qk_norm_rope_cache.call import Call


class Nesting(NamedTuple):
    """How a cache's dimensions lie in memory, whatever their sizes."""

    order: tuple[str, ...]
    """Outermost first; "slots" and "lanes" are the groups of slots and lanes, if they lie in groups."""
    gaps: tuple[bool, ...]
    """Of each, whether a step is longer than what it steps over."""
    slot_group: int
    lane_group: int

    @staticmethod
    @functools.cache
    def of(layout: CacheLayout) -> Nesting:
        size, stride = dict(_sizes(layout)), dict(_strides(layout))
        # The stride of the only block means nothing. Sorting is stable: equal strides keep the usual order.
        order = sorted(size, key=lambda dim: float("-inf") if dim == "block" and size[dim] == 1 else -stride[dim])
        gaps: list[bool] = []
        extent = 1
        for dim in reversed(order):
            gaps.append(size[dim] > 1 and stride[dim] != extent)
            extent = extent if size[dim] == 1 else stride[dim] * size[dim]
        return Nesting(tuple(order), tuple(reversed(gaps)), layout.slot_group, layout.lane_group)

    def layout(self, num_blocks: int, block_size: int, num_heads: int, head_dim: int, offset: int) -> CacheLayout:
        """A cache of these sizes that lies in memory like this."""
        layout = CacheLayout(
            num_blocks, block_size, num_heads, head_dim, 0, 0, 0, 0, offset,
            slot_group=self.slot_group, lane_group=self.lane_group,
        )  # fmt: skip
        size, stride, extent = dict(_sizes(layout)), dict.fromkeys(_STRIDES, 0), 1
        for dim, gap in zip(reversed(self.order), reversed(self.gaps), strict=True):
            stride[dim] = 2 * extent if gap else extent
            extent = stride[dim] * size[dim]
        return layout._replace(**{_STRIDES[dim]: value for dim, value in stride.items()})


_STRIDES = {
    "block": "block_stride", "slots": "slot_group_stride", "slot": "slot_stride", "head": "head_stride",
    "lanes": "lane_group_stride", "lane": "lane_stride",
}  # fmt: skip


def span(layout: CacheLayout) -> int:
    """How many elements it is from a cache's first to behind its last."""
    stride = dict(_strides(layout))
    return 1 + sum((size - 1) * stride[dim] for dim, size in _sizes(layout))


def _sizes(layout: CacheLayout) -> list[tuple[str, int]]:
    slot_group, lane_group = layout.slot_group, layout.lane_group
    slots = (
        {"slots": layout.block_size // slot_group, "slot": slot_group} if slot_group else {"slot": layout.block_size}
    )
    lanes = {"lanes": layout.head_dim // lane_group, "lane": lane_group} if lane_group else {"lane": layout.head_dim}
    sizes = {"block": layout.num_blocks, **slots, "head": layout.num_heads, **lanes}
    return [(dim, int(size)) for dim, size in sizes.items()]


def _strides(layout: CacheLayout) -> list[tuple[str, int]]:
    return [(dim, int(getattr(layout, name))) for dim, name in _STRIDES.items()]


#: Options of which only the kind matters, or the way in which they lie in memory.
_APART = ("k_layout", "v_layout", "k_scale_value", "v_scale_value")


class Specialization(NamedTuple):
    """What may select other code in a kernel."""

    device: torch.device
    dtype: torch.dtype
    cache_dtypes: tuple[torch.dtype, torch.dtype]
    weight_dtypes: tuple[torch.dtype | None, torch.dtype | None]
    angle_dtype: torch.dtype
    angle_per_lane: bool
    num_axes: int
    """0: cos and sin are rows, not tables."""
    index_dtypes: tuple[torch.dtype | None, ...]
    """Of positions, slots and blocks."""
    block_size: int | None
    """None without `blocks`."""
    per_sequence_cache: bool
    nestings: tuple[Nesting, Nesting]
    head_dim: int
    scales: tuple[type | None, type | None]
    options: tuple[tuple[str, Any], ...]
    """All that is told by value and is no scale and no layout."""

    @staticmethod
    def of(call: Call[Tensor]) -> Specialization:
        told = call.options
        by_value = {field.name: getattr(told, field.name) for field in fields(told) if field.name not in _APART}
        return Specialization(
            device=call.q.device,
            dtype=call.q.dtype,
            cache_dtypes=(call.k_cache.dtype, call.v_cache.dtype),
            weight_dtypes=(_dtype(call.q_weight), _dtype(call.k_weight)),
            angle_dtype=call.cos.dtype,
            angle_per_lane=call.cos.shape[-1] == told.rotary_dim,
            num_axes=0 if call.positions is None else call.positions.shape[0],
            index_dtypes=(_dtype(call.positions), call.slots.dtype, _dtype(call.blocks)),
            block_size=None if call.blocks is None else int(told.k_layout.block_size),
            per_sequence_cache=call.blocks is None and told.k_layout.num_blocks != 1,
            nestings=(Nesting.of(told.k_layout), Nesting.of(told.v_layout)),
            head_dim=call.q.shape[-1],
            scales=(_kind(call.k_scale, told.k_scale_value), _kind(call.v_scale, told.v_scale_value)),
            options=tuple(sorted(by_value.items())),
        )

    def __str__(self) -> str:
        words = [
            f"{_names(self.dtype)} heads of {self.head_dim}",
            f"caches {_names(*self.cache_dtypes)} laid out {' / '.join(' '.join(n.order) for n in self.nestings)}",
            f"{self.num_axes} axes",
            *(f"{name}={value}" for name, value in self.options if name != "axes"),
        ]
        return ", ".join(words)


def _dtype(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def _kind(scale: Tensor | None, number: float | None) -> type | None:
    return Tensor if scale is not None else None if number is None else float


def _names(*dtypes: torch.dtype) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes))
