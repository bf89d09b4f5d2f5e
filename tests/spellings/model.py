"""An attention prologue put together from one alternative for each of its steps.

Heads are [T, H, D], or [B, S, H, D] with a batch; transposed, [H, T, D] and [B, H, S, D]. Cosine and sine have one
value a pair (or a lane) and broadcast over the heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

EPS = 1e-6
HIDDEN = 24
POSITIONS = 48
BLOCK = 8


@dataclass(frozen=True)
class Shape:
    """Sizes of one model and one call."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    batch: int = 0
    """0: tokens are [T]; else they are [batch, tokens]."""
    tokens: int = 5
    dtype: torch.dtype = torch.float32

    @property
    def grid(self) -> tuple[int, ...]:
        return (self.batch, self.tokens) if self.batch else (self.tokens,)

    @property
    def slots(self) -> int:
        """Places in a cache, a multiple of the block size."""
        return -(-2 * max(self.batch, 1) * self.tokens // BLOCK) * BLOCK

    @property
    def section(self) -> tuple[int, int, int]:
        """Pairs of each of the three axes, time first."""
        pairs = self.head_dim // 2
        return pairs - 2 * (pairs // 4), pairs // 4, pairs // 4


class Composed(nn.Module):
    """The skeleton: what the steps are called and in which order. Alternatives are mixed in before it."""

    cos_sin_cache: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        d = shape.head_dim
        self.q_weight, self.k_weight = (nn.Parameter(torch.rand(d) + 0.5) for _ in range(2))
        self.o_proj = nn.Linear(shape.num_heads * d, HIDDEN, bias=False)
        angles = torch.outer(torch.arange(POSITIONS).float(), 100.0 ** (-torch.arange(0, 1, 2 / d)))
        self.register_buffer("cos_sin_cache", torch.cat([angles.cos(), angles.sin()], -1))
        self.add()
        self.to(shape.dtype)

    def add(self) -> None:
        """Further parameters and buffers; each alternative adds its own and calls the next."""

    def forward(self, x: Tensor, positions: Tensor, slots: Tensor, *caches: Tensor) -> object:
        q, k, v = (self.arrange(part) for part in self.project(x))
        cos, sin = self.angles(positions)
        q = self.leave(self.rotate(self.norm(q, self.q_weight), cos, sin))
        k = self.leave(self.rotate(self.norm(k, self.k_weight), cos, sin))
        self.store_both(caches, slots, self.tokens_first(k), self.tokens_first(v))
        return self.consume(q, k, v, *self.caches(*caches))

    # --- what alternatives share --------------------------------------------------------------------------------------

    @property
    def sizes(self) -> list[int]:
        """Columns of query, key and value."""
        s = self.shape
        return [s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim, s.num_kv_heads * s.head_dim]

    @property
    def heads_dim(self) -> int:
        """Where the heads are, counted from the end."""
        return -2

    def heads(self, part: Tensor) -> Tensor:
        """[..., H * D] as [..., H, D]"""
        return part.view(*part.shape[:-1], -1, self.shape.head_dim)

    def arrange(self, heads: Tensor) -> Tensor:
        return heads

    def tokens_first(self, heads: Tensor) -> Tensor:
        return heads

    def over_heads(self, rows: Tensor) -> Tensor:
        """Rows [..., D / 2] as the heads see them."""
        return rows.unsqueeze(self.heads_dim)

    def store_both(self, caches: tuple[Tensor, ...], slots: Tensor, k: Tensor, v: Tensor) -> None:
        k_cache, v_cache = self.caches(*caches)
        self.store(k_cache, slots, k)
        self.store(v_cache, slots, v)

    def leave(self, heads: Tensor) -> Tensor:
        return heads.to(self.shape.dtype)

    def attention_input(self, heads: Tensor) -> Tensor:
        """[B, H, S, D]"""
        heads = self.tokens_first(heads)
        return (heads if heads.dim() == 4 else heads.unsqueeze(0)).transpose(1, 2)
