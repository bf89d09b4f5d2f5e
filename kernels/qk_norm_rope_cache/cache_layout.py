"""Where a KV cache lies in the tensor that holds it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Size = int | torch.SymInt


class CacheLayout(NamedTuple):
    """The element of block b, slot s, head h and lane d lies ``offset`` elements after the tensor's first element, and
    further ``b * block_stride + s * slot_stride + h * head_stride + d * lane_stride``.

    Slots or lanes may lie in groups: slot s is then ``s // slot_group * slot_group_stride + s % slot_group *
    slot_stride`` elements on; no group is 0. Inductor passes whole graph inputs, never views of them: those would go
    through ``as_strided``, whose storage offset torch 2.11 counts twice where the input is a slice of a larger tensor.
    """

    num_blocks: Size
    block_size: Size
    num_heads: Size
    head_dim: Size
    block_stride: Size
    slot_stride: Size
    head_stride: Size
    lane_stride: Size
    offset: Size = 0
    slot_group: int = 0
    slot_group_stride: Size = 0
    lane_group: int = 0
    lane_group_stride: Size = 0

    @staticmethod
    def of(cache: Tensor, name: str = "cache") -> CacheLayout:
        """Of a cache [num_blocks, block_size, Hk, D], any strides, or in aiter's shuffle layout: k
        [num_blocks, Hk, D / x, block_size, x], v [num_blocks, Hk, block_size / x, D, x].

        Raises:
            ValueError: for any other rank, or if `name` does not tell k from v in the shuffle layout.
        """
        size, stride = cache.shape, cache.stride()
        if len(size) == 4:
            return CacheLayout(*size, *stride)
        if len(size) != 5 or name not in ("k_cache", "v_cache"):
            raise ValueError(
                f"{name}: expected [num_blocks, block_size, Hk, D], or five dimensions in aiter's shuffle layout, got "
                f"{list(size)}"
            )
        blocks, heads, groups, middle, group = size
        block_stride, head_stride, group_stride, middle_stride, inner_stride = stride
        if name == "k_cache":
            return CacheLayout(
                blocks, middle, heads, groups * group, block_stride, middle_stride, head_stride, inner_stride,
                lane_group=group, lane_group_stride=group_stride,
            )  # fmt: skip
        return CacheLayout(
            blocks, groups * group, heads, middle, block_stride, inner_stride, head_stride, middle_stride,
            slot_group=group, slot_group_stride=group_stride,
        )  # fmt: skip

    @property
    def dims(self) -> list[tuple[Size, Size]]:
        """(size, stride) of blocks, slots, heads and lanes; grouped slots and lanes are two dimensions each."""
        slots = _split(self.block_size, self.slot_stride, self.slot_group, self.slot_group_stride)
        lanes = _split(self.head_dim, self.lane_stride, self.lane_group, self.lane_group_stride)
        return [(self.num_blocks, self.block_stride), *slots, (self.num_heads, self.head_stride), *lanes]

    def view(self, cache: Tensor) -> Tensor:
        """[num_blocks, block_size, Hk, D] of `cache`; grouped slots and lanes are two dimensions each."""
        sizes, strides = zip(*self.dims, strict=True)
        return cache.as_strided(sizes, strides, cache.storage_offset() + self.offset)


def _split(size: Size, stride: Size, group: int, group_stride: Size) -> list[tuple[Size, Size]]:
    return [(size // group, group_stride), (group, stride)] if group else [(size, stride)]


def as_float8(cache: Tensor, name: str | None) -> Tensor:
    """`cache`, its bytes taken for the float8 of this name; unchanged where no name is given, or it holds no bytes.

    Raises:
        ValueError: PyTorch has no such float8.
    """
    if name is None or cache.dtype.itemsize != 1:
        return cache
    dtype = getattr(torch, name, None)
    if not name.startswith("float8") or not isinstance(dtype, torch.dtype):
        raise ValueError(f"float8: expected the name of a float8 of PyTorch's, such as 'float8_e4m3fn', got {name!r}")
    return cache.view(dtype)
