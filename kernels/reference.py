"""The reference: plain PyTorch, on any device. Its result *is* the meaning of the fused operation.

Everything is computed in float32 (float64 for float64 input) and rounded once, at each output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def qk_norm_rope_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    slots: Tensor,
    blocks: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    q_eps: float | None,
    k_eps: float | None,
    gemma_norm: bool,
    rotary_dim: int,
    is_neox: bool,
    axes: Sequence[int],
    skip_negative_slots: bool,
    return_k: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`fx_fusion.op.qk_norm_rope_cache` for shapes."""
    if positions is not None:
        cos = look_up(cos, positions, axes, rotary_dim, is_neox)
        sin = look_up(sin, positions, axes, rotary_dim, is_neox)
    rotated_q = norm_rope(q, q_weight, q_eps, gemma_norm, cos, sin, rotary_dim, is_neox)
    rotated_k = norm_rope(k, k_weight, k_eps, gemma_norm, cos, sin, rotary_dim, is_neox)
    q_out = rotated_q.to(q.dtype).contiguous()
    k_out = rotated_k.to(k.dtype).contiguous()
    store(k_out.to(k_cache.dtype), k_cache, slots, blocks, skip_negative_slots)
    store(v.to(v_cache.dtype), v_cache, slots, blocks, skip_negative_slots)
    return q_out, k_out if return_k else k_out.new_empty(0)


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


def store(value: Tensor, cache: Tensor, slots: Tensor, blocks: Tensor | None, skip_negative_slots: bool) -> None:
    """Write `value` [B, S, H, D] at ``cache[block, slot]``, `cache` being a [N0, N1, H, D] view.

    Without `blocks`, sequence b writes to block b, or to block 0 if there is only one.
    """
    batch, seq = value.shape[:2]
    slots = slots.expand(batch, seq)
    if blocks is not None:
        blocks = blocks.expand(batch, seq)
    else:
        blocks = torch.arange(batch, device=slots.device).unsqueeze(1) % cache.shape[0]
        blocks = blocks.expand(batch, seq)
    if skip_negative_slots:
        value, slots, blocks = _without_negative(value, cache, slots, blocks)
    cache.index_put_((blocks, slots), value)


def _without_negative(value: Tensor, cache: Tensor, slots: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Let every skipped token repeat the first kept one's write: no data-dependent size, so it can be captured."""
    flat_value, flat_slots, flat_blocks = value.flatten(0, 1), slots.flatten(), blocks.flatten()
    keep = flat_slots >= 0
    first = keep.int().argmax()
    source = torch.where(keep, torch.arange(keep.numel(), device=keep.device), first)
    flat_slots, flat_blocks, flat_value = flat_slots[source], flat_blocks[source], flat_value[source]
    none_kept = ~keep.any()
    flat_slots = torch.where(none_kept, 0, flat_slots)
    flat_blocks = torch.where(none_kept, 0, flat_blocks)
    flat_value = torch.where(none_kept, cache[0, 0], flat_value)
    return flat_value.view_as(value), flat_slots.view_as(slots), flat_blocks.view_as(blocks)
