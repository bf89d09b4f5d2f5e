"""What the libraries' operations have in common, in plain PyTorch: one rounding at each result, as in their kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fx_fusion.semantics.meaning import WITHOUT_STORE, Hidden

#: Of attention that finds its cache in a forward context.
STORES_UNSEEN = Hidden(
    "stores keys and values itself, in a cache from the forward context that is not in the graph, so the store cannot "
    f"be fused. {WITHOUT_STORE}",
    attention=True,
)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, gemma: bool = False) -> Tensor:
    """Over the last dimension, in float32, rounded once."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (1.0 + weight.float() if gemma else weight.float())
    return y.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int, *, is_neox: bool) -> Tensor:
    """`x` [..., H * D] or [..., H, D] with the first lanes of each head rotated, in float32, rounded once.

    Args:
        cos, sin: [T, rotary_dim / 2], a row for each token.
    """
    heads = x.reshape(cos.shape[0], -1, head_dim).float()
    cos, sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    rotary_dim = 2 * cos.shape[-1]
    turning, rest = heads[..., :rotary_dim], heads[..., rotary_dim:]
    a, b = turning.chunk(2, -1) if is_neox else (turning[..., ::2], turning[..., 1::2])
    turned = (a * cos - b * sin, b * cos + a * sin)
    joined = torch.cat(turned, -1) if is_neox else torch.stack(turned, -1).flatten(-2)
    if rest.shape[-1]:
        joined = torch.cat([joined, rest], -1)
    return joined.to(x.dtype).reshape(x.shape)


def table_rows(table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines at `positions`, of a table [P, rotary_dim] that holds the cosines first."""
    cos, sin = table[positions].chunk(2, -1)
    return cos, sin


def mix_axes(rows: Tensor, section: Sequence[int], *, interleaved: bool) -> Tensor:
    """[T, pairs] of [3, T, pairs]: which axis each pair takes."""
    if not interleaved:
        return torch.cat([part[i] for i, part in enumerate(rows.split(list(section), -1))], -1)
    pair = torch.arange(rows.shape[-1], device=rows.device)
    height = (pair % 3 == 1) & (pair < section[1] * 3)
    width = (pair % 3 == 2) & (pair < section[2] * 3)
    return torch.where(width, rows[2], torch.where(height, rows[1], rows[0]))


def store_kept_slots(cache: Tensor, slots: Tensor, value: Tensor) -> None:
    """Store the value of each token whose slot is not negative.

    Args:
        cache: [blocks, block_size, H, D]
        slots: [T], a slot is ``block * block_size + offset``
        value: [T, H, D]
    """
    block_size = cache.shape[1]
    if cache.stride(0) == block_size * cache.stride(1):
        store_where(slots >= 0, cache.view(-1, *cache.shape[2:]), (slots,), value)
    else:
        store_where(slots >= 0, cache, (slots // block_size, slots % block_size), value)


def store_where(kept: Tensor, cache: Tensor, index: tuple[Tensor | slice, ...], value: Tensor) -> None:
    """``cache[index] = value`` for the tokens that are `kept`, [T]; `value` [T, ...]"""
    kept = kept.reshape(-1, *[1] * (value.dim() - 1))
    cache[index] = torch.where(kept, value, cache[index])
