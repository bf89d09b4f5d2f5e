"""A small problem that leads a kernel through the same code as a given call does.

What may select other code in a kernel is in the :class:`Signature`; sizes and values are not. The problem made from it
is as unforgiving as it can be: several sequences, more than one KV head, other positions on every axis, indices that
count from the end, values of every magnitude, caches that lie inside larger tensors.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fx_fusion.kernels.cache_layout import CacheLayout

BATCH, SEQ, HEADS, KV_HEADS = 2, 4, 4, 2
TABLE_ROWS = 37
#: Slots of a cache that is one block. Not a power of two: such a cache promises none.
SLOTS = 13
#: Elements of other people before and after a cache.
MARGIN = 64
K_SCALE, V_SCALE = 0.37, 1.9


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

    def layout(self, num_blocks: int, block_size: int, num_heads: int, head_dim: int) -> CacheLayout:
        """A cache of these sizes that lies in memory like this."""
        layout = CacheLayout(
            num_blocks, block_size, num_heads, head_dim, 0, 0, 0, 0, MARGIN,
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


class Signature(NamedTuple):
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
    def of(*operands: Tensor | None, k_layout: CacheLayout, v_layout: CacheLayout, **options: Any) -> Signature:
        """Of a call of :func:`fx_fusion.kernels.reference.qk_norm_rope_cache`."""
        q, _, _, q_weight, k_weight, cos, _, positions, slots, blocks, k_scale, v_scale, k_cache, v_cache = operands
        assert q is not None and cos is not None and slots is not None and k_cache is not None and v_cache is not None
        numbers = options.pop("k_scale_value"), options.pop("v_scale_value")
        options["axes"] = tuple(options["axes"])
        return Signature(
            device=q.device,
            dtype=q.dtype,
            cache_dtypes=(k_cache.dtype, v_cache.dtype),
            weight_dtypes=(_dtype(q_weight), _dtype(k_weight)),
            angle_dtype=cos.dtype,
            angle_per_lane=cos.shape[-1] == options["rotary_dim"],
            num_axes=0 if positions is None else positions.shape[0],
            index_dtypes=(_dtype(positions), slots.dtype, _dtype(blocks)),
            block_size=None if blocks is None else int(k_layout.block_size),
            per_sequence_cache=blocks is None and k_layout.num_blocks != 1,
            nestings=(Nesting.of(k_layout), Nesting.of(v_layout)),
            head_dim=q.shape[-1],
            scales=(_kind(k_scale, numbers[0]), _kind(v_scale, numbers[1])),
            options=tuple(sorted(options.items())),
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


class SmallProblem(NamedTuple):
    """Operands and options of one call. Caches are flat tensors; their layouts say where in them they lie."""

    operands: tuple[Tensor | None, ...]
    options: dict[str, Any]


def small_problem(signature: Signature) -> SmallProblem:
    """The same numbers at every call, whatever the global random state, which is left alone."""
    return _Maker(signature).make()


class _Maker:
    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self.options = dict(signature.options)
        self.random = torch.Generator().manual_seed(0)

    def make(self) -> SmallProblem:
        signature = self.signature
        q, k, v = self._heads()
        q_weight, k_weight = (self._weight(dtype) for dtype in signature.weight_dtypes)
        cos, sin = self._angles()
        slots, blocks, num_blocks, block_size = self._addresses()
        k_layout, v_layout = (
            nesting.layout(num_blocks, block_size, KV_HEADS, signature.head_dim) for nesting in signature.nestings
        )
        k_cache, v_cache = (
            self._cache(layout, dtype)
            for layout, dtype in zip((k_layout, v_layout), signature.cache_dtypes, strict=True)
        )
        k_tensor, v_tensor = (
            torch.tensor([value], device=signature.device) if kind is Tensor else None
            for kind, value in zip(signature.scales, (K_SCALE, V_SCALE), strict=True)
        )
        k_number, v_number = (
            value if kind is float else None for kind, value in zip(signature.scales, (K_SCALE, V_SCALE), strict=True)
        )
        operands = (
            q, k, v, q_weight, k_weight, cos, sin, self._positions(), slots, blocks, k_tensor, v_tensor,
            k_cache, v_cache,
        )  # fmt: skip
        told = {"k_layout": k_layout, "v_layout": v_layout, "k_scale_value": k_number, "v_scale_value": v_number}
        return SmallProblem(operands, {**self.options, **told})

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.random, device="cpu")

    def _place(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.to(dtype).to(self.signature.device)

    def _heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views of one packed tensor."""
        head_dim = self.signature.head_dim
        packed = self._normal(BATCH, SEQ, HEADS + 2 * KV_HEADS, head_dim)
        # Tokens as small as the square root of each eps, where it matters, and one that is large.
        for token, eps in enumerate((self.options["q_eps"], self.options["k_eps"])):
            packed[0, token, :-KV_HEADS] *= 1.0 if eps is None else eps**0.5
        packed[1, 0] *= 30
        cache_dtype = self.signature.cache_dtypes[1]
        if cache_dtype.itemsize == 1:
            # Values that no float8 holds.
            largest = min(3 * V_SCALE * torch.finfo(cache_dtype).max, torch.finfo(self.signature.dtype).max)
            packed[1, 1, -KV_HEADS:, :2] = torch.tensor([largest, -largest])
        packed = self._place(packed, self.signature.dtype)
        q, k, v = packed.split([HEADS, KV_HEADS, KV_HEADS], 2)
        return q, k, v

    def _weight(self, dtype: torch.dtype | None) -> Tensor | None:
        if dtype is None:
            return None
        middle = 0.0 if self.options["gemma_norm"] else 1.0
        return self._place(middle + 0.3 * self._normal(self.signature.head_dim), dtype)

    def _angles(self) -> tuple[Tensor, Tensor]:
        rotary_dim = self.options["rotary_dim"]
        width = rotary_dim if self.signature.angle_per_lane else rotary_dim // 2
        rows = (TABLE_ROWS,) if self.signature.num_axes else (BATCH, SEQ)
        angles = 3 * self._normal(*rows, width)
        both = self._place(torch.cat([angles.cos(), angles.sin()], -1), self.signature.angle_dtype)
        cos, sin = both.chunk(2, -1)
        return cos, sin

    def _positions(self) -> Tensor | None:
        """No two alike, and one that counts from the table's end."""
        axes = self.signature.num_axes
        if not axes:
            return None
        rows = torch.randperm(TABLE_ROWS, generator=self.random, device="cpu")[: axes * BATCH * SEQ]
        rows[-1] -= TABLE_ROWS
        dtype = self.signature.index_dtypes[0]
        assert dtype is not None
        return self._place(rows.view(BATCH, SEQ, axes), dtype).permute(2, 0, 1)

    def _addresses(self) -> tuple[Tensor, Tensor | None, int, int]:
        """Slots and blocks of each token, no two alike, and how many blocks of what size there are.

        One slot is negative: skipped, or counting from the end.
        """
        block_size = self.signature.block_size
        if block_size is None:
            return self._slots()
        block_size = min(block_size, 64)
        num_blocks = max(3, -(-2 * BATCH * SEQ // block_size))
        places = torch.randperm(num_blocks * block_size, generator=self.random, device="cpu")[: BATCH * SEQ]
        blocks, slots = places.view(BATCH, SEQ) // block_size, places.view(BATCH, SEQ) % block_size
        slots[0, 1] = self._negative(slots[0, 1], block_size)
        _, slots_dtype, blocks_dtype = self.signature.index_dtypes
        assert slots_dtype is not None and blocks_dtype is not None
        return self._place(slots, slots_dtype), self._place(blocks, blocks_dtype), num_blocks, block_size

    def _slots(self) -> tuple[Tensor, None, int, int]:
        """Without `blocks`: slots of one cache, or of one for each sequence."""
        slots = torch.randperm(SLOTS, generator=self.random, device="cpu")[: BATCH * SEQ].view(BATCH, SEQ)
        slots[0, 1] = self._negative(slots[0, 1], SLOTS)
        dtype = self.signature.index_dtypes[1]
        assert dtype is not None
        return self._place(slots, dtype), None, BATCH if self.signature.per_sequence_cache else 1, SLOTS

    def _negative(self, slot: Tensor, block_size: int) -> Tensor:
        return torch.full_like(slot, -1) if self.options["skip_negative_slots"] else slot - block_size

    def _cache(self, layout: CacheLayout, dtype: torch.dtype) -> Tensor:
        """The tensor that holds a cache, filled with what is to stay wherever no token is stored."""
        last = sum((size - 1) * dict(_strides(layout))[dim] for dim, size in _sizes(layout))
        return self._place(self._normal(MARGIN + last + 1 + MARGIN), dtype)
