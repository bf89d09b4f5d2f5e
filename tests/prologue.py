"""One attention prologue in plain PyTorch, every step of it a method: a test overrides the step that it is about."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HIDDEN = 4, 2, 16, 32
POSITIONS, SLOTS = 40, 64
SECTION = (4, 2, 2)
EPS = 1e-6


class Prologue(nn.Module):
    """x [T, hidden], positions [3, T], slots [T], caches [SLOTS, Hk, D]; returns a projection of the rotated query."""

    cos_sin_cache: Tensor

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(HIDDEN, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM, bias=False)
        self.q_weight = nn.Parameter(torch.rand(HEAD_DIM) + 0.5)
        self.k_weight = nn.Parameter(torch.rand(HEAD_DIM) + 0.5)
        self.o_proj = nn.Linear(NUM_HEADS * HEAD_DIM, HIDDEN, bias=False)
        angles = torch.outer(torch.arange(POSITIONS).float(), 100.0 ** (-torch.arange(0, 1, 2 / HEAD_DIM)))
        self.register_buffer("cos_sin_cache", torch.cat([angles.cos(), angles.sin()], -1))
        self.to(dtype)

    def forward(self, x: Tensor, positions: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        q, k, v = self.split(self.project(x))
        cos, sin = self.angles(positions)
        q = self.rotate(self.norm(q, self.q_weight), cos, sin)
        k = self.rotate(self.norm(k, self.k_weight), cos, sin)
        self.store(k_cache, slots, k)
        self.store(v_cache, slots, v)
        return self.consume(q, k, v, k_cache, v_cache)

    def project(self, x: Tensor) -> Tensor:
        return self.qkv_proj(x)

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        sizes = [NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM]
        return tuple(part.view(part.shape[0], -1, HEAD_DIM) for part in qkv.split(sizes, -1))

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS)
        return y.to(x.dtype) * weight

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.cos_sin_cache[positions].chunk(2, -1)
        return self.interleave(cos).unsqueeze(1), self.interleave(sin).unsqueeze(1)

    def interleave(self, x: Tensor) -> Tensor:
        mixed = x[0].clone()
        mixed[..., 1 : SECTION[1] * 3 : 3] = x[1, ..., 1 : SECTION[1] * 3 : 3]
        mixed[..., 2 : SECTION[2] * 3 : 3] = x[2, ..., 2 : SECTION[2] * 3 : 3]
        return mixed

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def store(self, cache: Tensor, slots: Tensor, value: Tensor) -> None:
        cache[slots] = value.to(cache.dtype)

    def consume(self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return self.o_proj(q.flatten(1))


class Joint(Prologue):
    """One input holds both; the stacked key and value are stored at once. kv_cache [SLOTS, 2, Hk, D]"""

    shape: tuple[int, ...] = (SLOTS, 2, NUM_KV_HEADS, HEAD_DIM)

    def forward(self, x: Tensor, positions: Tensor, slots: Tensor, kv_cache: Tensor) -> Tensor:
        q, k, v = self.split(self.project(x))
        cos, sin = self.angles(positions)
        q = self.rotate(self.norm(q, self.q_weight), cos, sin)
        k = self.rotate(self.norm(k, self.k_weight), cos, sin)
        self.store(kv_cache, slots, self.join(k, v))
        return self.consume(q, k, v, kv_cache, kv_cache)

    def join(self, k: Tensor, v: Tensor) -> Tensor:
        return torch.stack([k, v], 1)


def arguments(
    tokens: int = 5, dtype: torch.dtype = torch.float32, cache: tuple[int, ...] | None = None
) -> tuple[Tensor, ...]:
    """Inputs for a Prologue; time, height and width positions are distinct."""
    shape = cache or (SLOTS, NUM_KV_HEADS, HEAD_DIM)
    return (
        torch.randn(tokens, HIDDEN, dtype=dtype),
        torch.randperm(POSITIONS)[: 3 * tokens].view(3, tokens),
        torch.randperm(SLOTS)[:tokens],
        torch.randn(shape, dtype=dtype),
        torch.randn(shape, dtype=dtype),
    )
