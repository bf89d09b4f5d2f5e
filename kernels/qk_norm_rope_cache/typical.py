"""Calls to measure: what a serving engine's decode or prefill step asks of one layer.

A packed projection, one table of cosines and sines, interleaved mRoPE, a flat slot mapping into a cache of q's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fx_fusion.kernels.measure.tuned_file import Shape
from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import CacheLayout
from fx_fusion.kernels.qk_norm_rope_cache.call import Call, Options

TABLE_ROWS = 4096
#: A cache is written in blocks that are not all full.
BLOCK = 16


def typical_call(shape: Shape, num_tokens: int, device: torch.device) -> Call[Tensor]:
    """One call for `num_tokens` tokens, on tensors of its own. Values are random."""
    dtype: torch.dtype = getattr(torch, shape.dtype)
    sizes = [heads * shape.head_dim for heads in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)]
    projection = torch.randn(1, num_tokens, sum(sizes), dtype=dtype, device=device)
    q, k, v = (part.unflatten(-1, (-1, shape.head_dim)) for part in projection.split(sizes, -1))
    weight = torch.rand(shape.head_dim, device=device).add(0.5).to(dtype)
    cos, sin = _table(shape.rotary_dim, dtype, device)
    positions = torch.randint(TABLE_ROWS, (3, 1, num_tokens), device=device)
    num_slots = (num_tokens // BLOCK + 1) * BLOCK
    slots = torch.randperm(num_slots, device=device)[None, :num_tokens]
    cache_size = (1, num_slots, shape.num_kv_heads, shape.head_dim)
    k_cache, v_cache = (torch.zeros(cache_size, dtype=dtype, device=device) for _ in "kv")
    options = _options(shape, k_cache, v_cache)
    return Call(q, k, v, weight, weight, cos, sin, positions, slots, None, None, None, k_cache, v_cache, options)


def _table(rotary_dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """[TABLE_ROWS, rotary_dim / 2] each, halves of one table."""
    angles = 6 * torch.rand(TABLE_ROWS, rotary_dim // 2, device=device)
    cos, sin = torch.cat([angles.cos(), angles.sin()], -1).to(dtype).chunk(2, -1)
    return cos, sin


def _options(shape: Shape, k_cache: Tensor, v_cache: Tensor) -> Options:
    pairs = shape.rotary_dim // 2
    # Qwen3-VL's sections, [24, 20, 20] of 64 pairs, in proportion.
    section = 20 * pairs // 64
    return Options(
        k_layout=CacheLayout.of(k_cache, "k_cache"),
        v_layout=CacheLayout.of(v_cache, "v_cache"),
        k_scale_value=None,
        v_scale_value=None,
        q_eps=1e-6,
        k_eps=1e-6,
        gemma_norm=False,
        rotary_dim=shape.rotary_dim,
        is_neox=True,
        axes=tuple(pair % 3 if pair < 3 * section else 0 for pair in range(pairs)),
        saturate=False,
        skip_negative_slots=False,
        return_k=False,
    )


def bytes_moved(shape: Shape, num_tokens: int) -> int:
    """What one call must read and write."""
    size = getattr(torch, shape.dtype).itemsize
    heads = 2 * (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    angles = 3 * shape.rotary_dim
    indices = 4 * torch.int64.itemsize
    return num_tokens * ((heads + angles) * size + indices)
