"""A small call that leads a kernel through the same code as the calls of one :class:`Specialization` do.

It is as unforgiving as it can be: several sequences, more than one KV head, another position on every axis, indices
that count from the end, values of every magnitude, caches that lie inside larger tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import CacheLayout
from fx_fusion.kernels.qk_norm_rope_cache.call import Call, Options
from fx_fusion.kernels.qk_norm_rope_cache.specialization import Specialization, span

BATCH, SEQ, HEADS, KV_HEADS = 2, 4, 4, 2
TABLE_ROWS = 37
#: Slots of a cache that is one block. Not a power of two: such a cache promises none.
SLOTS = 13
#: Elements of something else, before and after a cache.
MARGIN = 64
K_SCALE, V_SCALE = 0.37, 1.9


def small_call(specialization: Specialization) -> Call[Tensor]:
    """The same numbers at every call, whatever the global random state, which is left alone.

    Caches are flat tensors; their layouts say where in them they lie.
    """
    return _Maker(specialization).make()


class _Maker:
    def __init__(self, specialization: Specialization) -> None:
        self.specialization = specialization
        self.options: dict[str, Any] = dict(specialization.options)
        self.random = torch.Generator().manual_seed(0)

    def make(self) -> Call[Tensor]:
        specialization = self.specialization
        q, k, v = self._heads()
        q_weight, k_weight = (self._weight(dtype) for dtype in specialization.weight_dtypes)
        cos, sin = self._angles()
        slots, blocks, num_blocks, block_size = self._addresses()
        k_layout, v_layout = (
            nesting.layout(num_blocks, block_size, KV_HEADS, specialization.head_dim, MARGIN)
            for nesting in specialization.nestings
        )
        k_cache, v_cache = (
            self._cache(layout, dtype)
            for layout, dtype in zip((k_layout, v_layout), specialization.cache_dtypes, strict=True)
        )
        k_tensor, k_number = self._scale(specialization.scales[0], K_SCALE)
        v_tensor, v_number = self._scale(specialization.scales[1], V_SCALE)
        options = Options(
            k_layout=k_layout, v_layout=v_layout, k_scale_value=k_number, v_scale_value=v_number, **self.options
        )
        return Call(
            q, k, v, q_weight, k_weight, cos, sin, self._positions(), slots, blocks, k_tensor, v_tensor,
            k_cache, v_cache, options,
        )  # fmt: skip

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.random, device="cpu")

    def _place(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.to(dtype).to(self.specialization.device)

    def _heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views of one packed tensor."""
        head_dim = self.specialization.head_dim
        packed = self._normal(BATCH, SEQ, HEADS + 2 * KV_HEADS, head_dim)
        # Tokens as small as the square root of each eps, where it matters, and one that is large.
        for token, eps in enumerate((self.options["q_eps"], self.options["k_eps"])):
            packed[0, token, :-KV_HEADS] *= 1.0 if eps is None else eps**0.5
        packed[1, 0] *= 30
        cache_dtype = self.specialization.cache_dtypes[1]
        if cache_dtype.itemsize == 1:
            # Values that no float8 holds.
            largest = min(3 * V_SCALE * torch.finfo(cache_dtype).max, torch.finfo(self.specialization.dtype).max)
            packed[1, 1, -KV_HEADS:, :2] = torch.tensor([largest, -largest], device="cpu")
        packed = self._place(packed, self.specialization.dtype)
        q, k, v = packed.split([HEADS, KV_HEADS, KV_HEADS], 2)
        return q, k, v

    def _weight(self, dtype: torch.dtype | None) -> Tensor | None:
        if dtype is None:
            return None
        middle = 0.0 if self.options["gemma_norm"] else 1.0
        return self._place(middle + 0.3 * self._normal(self.specialization.head_dim), dtype)

    def _angles(self) -> tuple[Tensor, Tensor]:
        rotary_dim = self.options["rotary_dim"]
        width = rotary_dim if self.specialization.angle_per_lane else rotary_dim // 2
        rows = (TABLE_ROWS,) if self.specialization.num_axes else (BATCH, SEQ)
        angles = 3 * self._normal(*rows, width)
        both = self._place(torch.cat([angles.cos(), angles.sin()], -1), self.specialization.angle_dtype)
        cos, sin = both.chunk(2, -1)
        return cos, sin

    def _positions(self) -> Tensor | None:
        """No two alike, and one that counts from the table's end."""
        axes = self.specialization.num_axes
        if not axes:
            return None
        rows = torch.randperm(TABLE_ROWS, generator=self.random, device="cpu")[: axes * BATCH * SEQ]
        rows[-1] -= TABLE_ROWS
        dtype = self.specialization.index_dtypes[0]
        assert dtype is not None
        return self._place(rows.view(BATCH, SEQ, axes), dtype).permute(2, 0, 1)

    def _addresses(self) -> tuple[Tensor, Tensor | None, int, int]:
        """Slots and blocks of each token, no two alike, and how many blocks of what size there are.

        One slot is negative: skipped, or counting from the end.
        """
        block_size = self.specialization.block_size
        if block_size is None:
            return self._slots()
        block_size = min(block_size, 64)
        num_blocks = max(3, -(-2 * BATCH * SEQ // block_size))
        places = torch.randperm(num_blocks * block_size, generator=self.random, device="cpu")[: BATCH * SEQ]
        blocks, slots = places.view(BATCH, SEQ) // block_size, places.view(BATCH, SEQ) % block_size
        slots[0, 1] = self._negative(slots[0, 1], block_size)
        _, slots_dtype, blocks_dtype = self.specialization.index_dtypes
        assert slots_dtype is not None and blocks_dtype is not None
        return self._place(slots, slots_dtype), self._place(blocks, blocks_dtype), num_blocks, block_size

    def _slots(self) -> tuple[Tensor, None, int, int]:
        """Without `blocks`: slots of one cache, or of one for each sequence."""
        slots = torch.randperm(SLOTS, generator=self.random, device="cpu")[: BATCH * SEQ].view(BATCH, SEQ)
        slots[0, 1] = self._negative(slots[0, 1], SLOTS)
        dtype = self.specialization.index_dtypes[1]
        assert dtype is not None
        return self._place(slots, dtype), None, BATCH if self.specialization.per_sequence_cache else 1, SLOTS

    def _negative(self, slot: Tensor, block_size: int) -> Tensor:
        return torch.full_like(slot, -1) if self.options["skip_negative_slots"] else slot - block_size

    def _scale(self, kind: type | None, value: float) -> tuple[Tensor | None, float | None]:
        if kind is Tensor:
            return torch.tensor([value], device=self.specialization.device), None
        return None, None if kind is None else value

    def _cache(self, layout: CacheLayout, dtype: torch.dtype) -> Tensor:
        """The tensor that holds a cache, filled with what is to stay wherever no token is stored."""
        return self._place(self._normal(MARGIN + span(layout) + MARGIN), dtype)
