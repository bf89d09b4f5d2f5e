"""The reference: plain PyTorch, on any device. Its result *is* the meaning of the fused operation.

Everything is computed in float32 (float64 for float64 input) and rounded once, at each output.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fx_fusion.kernels.operation import Implementation
from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import CacheLayout
from fx_fusion.kernels.qk_norm_rope_cache.call import Call, scale_of


def qk_norm_rope_cache(call: Call[Tensor]) -> tuple[Tensor, Tensor]:
    """Store k and v in the caches of `call`; see :func:`fx_fusion.qk_norm_rope_cache` for shapes.

    Returns:
        q rotated, and k rotated (empty without ``return_k``).
    """
    told, cos, sin = call.options, call.cos, call.sin
    if call.positions is not None:
        cos, sin = (look_up(rows, call.positions, told.axes, told.rotary_dim, told.is_neox) for rows in (cos, sin))
    rotation = (told.gemma_norm, cos, sin, told.rotary_dim, told.is_neox)
    q_out = norm_rope(call.q, call.q_weight, told.q_eps, *rotation).to(call.q.dtype).contiguous()
    k_out = norm_rope(call.k, call.k_weight, told.k_eps, *rotation).to(call.k.dtype).contiguous()
    k_stored = to_cache(k_out, call.k_cache.dtype, scale_of(call.k_scale, told.k_scale_value), told.saturate)
    v_stored = to_cache(call.v, call.v_cache.dtype, scale_of(call.v_scale, told.v_scale_value), told.saturate)
    store(k_stored, call.k_cache, told.k_layout, call.slots, call.blocks, told.skip_negative_slots)
    store(v_stored, call.v_cache, told.v_layout, call.slots, call.blocks, told.skip_negative_slots)
    return q_out, k_out if told.return_k else k_out.new_empty(0)


class Reference(Implementation[Call[Tensor]]):
    """Nothing about it is fast, so ``auto`` never chooses it."""

    name = "reference"
    fast = False

    def run(self, call: Call[Tensor], setting: Any = None) -> tuple[Tensor, ...]:
        return qk_norm_rope_cache(call)


def norm_rope(
    x: Tensor,
    weight: Tensor | None,
    eps: float | None,
    gemma_norm: bool,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    is_neox: bool,
) -> Tensor:
    """RMSNorm over the last dimension, then the rotation of its first `rotary_dim` lanes; unrounded.

    `x` is [B, S, H, D]; `cos` and `sin` are [B or 1, S or 1, rotary_dim or rotary_dim / 2].
    """
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if eps is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (1 + weight.to(y.dtype) if gemma_norm else weight.to(y.dtype))
    return torch.cat([rotate(y[..., :rotary_dim], cos, sin, is_neox), y[..., rotary_dim:]], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, is_neox: bool) -> Tensor:
    """Rotate pairs of lanes: half the width apart (neox) or adjacent (GPT-J). Shapes as in :func:`norm_rope`."""
    cos_a, cos_b = pair_angles(cos.to(x.dtype), x.shape[-1], is_neox)
    sin_a, sin_b = pair_angles(sin.to(x.dtype), x.shape[-1], is_neox)
    if is_neox:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos_a - b * sin_a, b * cos_b + a * sin_b], -1)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos_a - b * sin_a, b * cos_b + a * sin_b], -1).flatten(-2)


def pair_angles(rows: Tensor, rotary_dim: int, is_neox: bool) -> tuple[Tensor, Tensor]:
    """[B, S, 1, rotary_dim / 2] for the first and for the second lane of each pair."""
    rows = rows.unsqueeze(2)
    if rows.shape[-1] == rotary_dim // 2:
        return rows, rows
    if is_neox:
        first, second = rows.chunk(2, -1)
        return first, second
    return rows[..., 0::2], rows[..., 1::2]


def look_up(table: Tensor, positions: Tensor, axes: Sequence[int], rotary_dim: int, is_neox: bool) -> Tensor:
    """Rows [B or 1, S, width] of `table` [P, width]; pair i of lanes uses ``positions[axes[i]]``.

    Indexing is PyTorch's: -1 is the last row, and an index outside the table raises.
    """
    rows = {axis: table[positions[axis]] for axis in set(axes)}
    if len(rows) == 1:
        return rows[axes[0]]
    lanes = lane_axes(axes, table.shape[-1], rotary_dim, is_neox)
    # One slice a lane rather than an index tensor made from a list, which would be a copy from host memory: illegal
    # in a captured graph.
    return torch.stack([rows[axis][..., lane] for lane, axis in enumerate(lanes)], -1)


def lane_axes(axes: Sequence[int], width: int, rotary_dim: int, is_neox: bool) -> list[int]:
    """The axis of each element of a row: rows are one element a pair, or one a lane."""
    if width == rotary_dim // 2:
        return list(axes)
    return [*axes, *axes] if is_neox else [axis for axis in axes for _ in range(2)]


#: Each float8: which magnitudes are beyond its range, and their byte. Halfway to the next number, ties go to even: that
#: is the largest number of an e4m3fn, and none of the others.
FLOAT8_RANGE = {
    torch.float8_e4m3fn: (operator.gt, 464.0, 0x7F),
    torch.float8_e4m3fnuz: (operator.ge, 248.0, 0x80),
    torch.float8_e5m2: (operator.ge, 61440.0, 0x7C),
}


def to_cache(value: Tensor, dtype: torch.dtype, scale: Tensor | float | None, saturate: bool) -> Tensor:
    """`value`, divided by its scale in float32, as the cache holds it, rounded to nearest, ties to even.

    Beyond the range of a float8 it becomes NaN (e5m2: infinity), or with `saturate` the largest number.
    """
    if scale is not None:
        value = value.to(torch.promote_types(value.dtype, torch.float32)) / scale
    if dtype not in FLOAT8_RANGE:
        return value.to(dtype)
    largest = torch.finfo(dtype).max
    stored = value.clamp(-largest, largest).to(dtype)
    if saturate:
        return stored
    # Not left to ``Tensor.to``, which saturates in some versions of PyTorch and on some devices.
    is_beyond, bound, byte = FLOAT8_RANGE[dtype]
    sign = torch.where(value < 0, 0x80, 0).to(torch.uint8)
    return torch.where(is_beyond(value.abs(), bound), byte | sign, stored.view(torch.uint8)).view(dtype)


def store(
    value: Tensor,
    cache: Tensor,
    layout: CacheLayout,
    slots: Tensor,
    blocks: Tensor | None,
    skip_negative_slots: bool,
) -> None:
    """Write `value` [B, S, H, D] at block and slot of each token.

    Without `blocks`, sequence b writes to block b, or to block 0 if there is only one. Indexing is PyTorch's: -1 is the
    last slot, and a slot outside the block raises.
    """
    batch, seq = value.shape[:2]
    slots = slots.expand(batch, seq)
    if blocks is not None:
        blocks = blocks.expand(batch, seq)
    else:
        blocks = torch.arange(batch, device=slots.device).unsqueeze(1) % int(layout.num_blocks)
        blocks = blocks.expand(batch, seq)
    target = _as_integers(layout.view(cache))
    value = _as_integers(value)
    if layout.lane_group:
        value = value.unflatten(-1, (-1, layout.lane_group))
    if not skip_negative_slots:
        target.index_put_(_index(layout, slots, blocks), value)
        return
    # Every skipped token repeats the first kept one's write: no data-dependent size, so it can be captured.
    keep = slots.flatten() >= 0
    source = torch.where(keep, torch.arange(keep.numel(), device=keep.device), keep.int().argmax())
    slots, blocks = (torch.where(keep.any(), part.flatten()[source], 0) for part in (slots, blocks))
    index = _index(layout, slots, blocks)
    target.index_put_(index, torch.where(keep.any(), value.flatten(0, 1)[source], target[index]))


def _index(layout: CacheLayout, slots: Tensor, blocks: Tensor) -> tuple[Tensor, ...]:
    if layout.slot_group:
        return blocks, slots // layout.slot_group, slots % layout.slot_group
    return blocks, slots


def _as_integers(value: Tensor) -> Tensor:
    """float8 as bytes: PyTorch indexes no float8 on some devices."""
    return value.view(torch.uint8) if value.dtype.itemsize == 1 else value
