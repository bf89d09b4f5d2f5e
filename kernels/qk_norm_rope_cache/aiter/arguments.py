"""What aiter is passed, recovered from the views that the operation gets. Nothing is copied but a few indices.

aiter reads most of its arguments by their address, unchecked: whatever does not lie as it expects is refused here.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fx_fusion.kernels.capture_guard import refuse_in_capture
from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import CacheLayout


def violation(argument: str, expected: object, found: object) -> ValueError:
    return ValueError(
        f"aiter: argument {argument}: expected {expected}, found {found}; pass it like that, or call another kernel"
    )


def packed_qkv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[T, (Hq + 2 Hk) D], of which `q`, `k` and `v` are views."""
    batch, seq, num_heads, head_dim = q.shape
    width = (num_heads + 2 * k.shape[2]) * head_dim
    offset = int(q.storage_offset())
    for name, part in (("q", q), ("k", k), ("v", v)):
        _check_place(f"qkv ({name})", part, q, (seq * width, width, head_dim, 1), offset)
        offset += part.shape[2] * head_dim
    return q.as_strided((batch * seq, width), (width, 1))


def packed_table(cos: Tensor, sin: Tensor) -> Tensor:
    """[P, rotary_dim], of which `cos` is the first half and `sin` the second."""
    rows, half = cos.shape
    offset = int(cos.storage_offset())
    _check_place("cos_sin (cos)", cos, cos, (2 * half, 1), offset)
    _check_place("cos_sin (sin)", sin, cos, (2 * half, 1), offset + half)
    return cos.as_strided((rows, 2 * half), (2 * half, 1))


def _check_place(argument: str, part: Tensor, first: Tensor, strides: tuple[int, ...], offset: int) -> None:
    """`part` lies in the memory of `first`, from element `offset` on."""
    if part.dtype != first.dtype:
        raise violation(argument, first.dtype, part.dtype)
    if not part.numel():
        return
    # The stride of a dimension of one element means nothing.
    if any(size != 1 and a != b for size, a, b in zip(part.shape, part.stride(), strides, strict=True)):
        raise violation(argument, f"strides {strides}, as in one contiguous tensor", part.stride())
    if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
        raise violation(argument, "memory shared with what precedes it", "memory of its own")
    if part.storage_offset() != offset:
        raise violation(argument, f"storage offset {offset}, next to what precedes it", part.storage_offset())


def weight(argument: str, value: Tensor | None, head_dim: int) -> Tensor:
    assert value is not None, "the contract asks for weights"
    if value.shape != (head_dim,) or not value.is_contiguous():
        raise violation(
            argument, f"[{head_dim}], contiguous", f"{list(value.shape)} with strides {list(value.stride())}"
        )
    return value


class Cache(NamedTuple):
    """A cache as aiter addresses it: slot ``block * block_size + offset``."""

    view: Tensor
    block_size: int
    """0: slots are not divided into blocks."""
    shuffled: bool


def cache(argument: str, tensor: Tensor, layout: CacheLayout, in_blocks: bool) -> Cache:
    """Strides of blocks, slots and heads are read from dimensions 0, 1 and 2; the shuffle layout has its own."""
    view = layout.view(tensor)
    if layout.lane_group or layout.slot_group:
        return _shuffled(argument, view, layout, in_blocks)
    if view.stride(3) != 1:
        raise violation(argument, "a unit lane stride", view.stride(3))
    if in_blocks:
        return Cache(view, int(layout.block_size), shuffled=False)
    # Blocks of one slot. Whether a version takes dimension 0 or 1 for the slots, it reads the same stride, and one that
    # reads none assumes a contiguous cache, which the self-check tells. A 3-D view is right in some versions only.
    slot_stride, head_stride = view.stride()[1:3]
    flat = view.as_strided(
        (view.shape[1], 1, *view.shape[2:]), (slot_stride, slot_stride, head_stride, 1), view.storage_offset()
    )
    return Cache(flat, 0, shuffled=False)


def _shuffled(argument: str, view: Tensor, layout: CacheLayout, in_blocks: bool) -> Cache:
    """As [N0, Hk, D / x, N1, x] of keys and [N0, Hk, N1 / x, D, x] of values."""
    keys = argument == "k_cache"
    group, other = layout.lane_group, layout.slot_group
    if not keys:
        group, other = other, group
    x = group_size(view.dtype)
    if (group, other) != (x, 0):
        what = "lanes" if keys else "slots"
        raise violation(argument, f"{what} in groups of {x}, and nothing else in groups", f"{group} and {other}")
    if not in_blocks:
        raise violation("slot_mapping", "a block and an offset in the shuffle layout", "a slot")
    shuffled = view.permute(0, 2, 3, 1, 4) if keys else view.permute(0, 3, 1, 4, 2)
    if not shuffled.is_contiguous():
        raise violation(argument, "the shuffle layout, contiguous", f"strides {list(shuffled.stride())}")
    return Cache(shuffled, int(layout.block_size), shuffled=True)


def group_size(cache_dtype: torch.dtype) -> int:
    """What aiter calls x: as many as fit in 16 bytes."""
    return 16 // cache_dtype.itemsize


def slot_mapping(slots: Tensor, blocks: Tensor | None, layout: CacheLayout, skip_negative: bool) -> Tensor:
    """[B or 1, S]. Negative slots are skipped by aiter; the operation may count them from the end.

    The remainder is one launch, where a comparison, a sum and a choice are three.
    """
    num_blocks, block_size = int(layout.num_blocks), int(layout.block_size)
    offsets = slots if skip_negative else torch.remainder(slots, block_size)
    if blocks is None:
        return offsets
    mapping = torch.add(offsets, torch.remainder(blocks, num_blocks), alpha=block_size)
    return torch.where(slots < 0, -1, mapping) if skip_negative else mapping


def table_rows(positions: Tensor, num_rows: int) -> Tensor:
    """At a negative position aiter reads before the table; the operation counts from the table's end."""
    return torch.remainder(positions, num_rows)


def host_scale(value: float | None) -> Tensor:
    """Read on the host, at the launch: a captured graph keeps the number, not this tensor."""
    return _host_scale(1.0 if value is None else value)


@functools.cache
def _host_scale(value: float) -> Tensor:
    refuse_in_capture(f"the scale {value} is used for the first time")
    # The device is named: models are built under torch.device("cuda"), which a plain constant would follow.
    return torch.tensor([value], dtype=torch.float32, device="cpu")
