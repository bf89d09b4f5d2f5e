"""An engine whose attention prologue is made of custom operations, fused: ``python examples/opaque_ops.py``.

The operations stand for compiled kernels that torch.compile cannot look into: a norm, a rotation in place on views of
the packed projection, and a store that skips padding. Without a declaration nothing can be said of them. With one, each
is compared with its meaning once, and the three become one call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fx_fusion

HEADS, KV_HEADS, HEAD_DIM, BLOCKS, BLOCK_SIZE, POSITIONS = 8, 2, 64, 16, 16, 128


# --- the engine's library: what its compiled kernels do -------------------------------------------------------------


@torch.library.custom_op("engine::head_norm", mutates_args=())
def head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return nn.functional.rms_norm(x, (x.shape[-1],), weight, eps)


@head_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("engine::rope_", mutates_args=("q", "k"))
def rope_(positions: Tensor, q: Tensor, k: Tensor, table: Tensor) -> None:
    turn = torch.complex(*table[positions].chunk(2, -1)).unsqueeze(1)
    for heads in (q, k):
        first, second = heads.chunk(2, -1)
        turned = torch.complex(first.contiguous(), second.contiguous()) * turn
        first.copy_(turned.real), second.copy_(turned.imag)


@torch.library.custom_op("engine::store_", mutates_args=("k_cache", "v_cache"))
def store_(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            place = divmod(slot, BLOCK_SIZE)
            k_cache[place], v_cache[place] = k[token], v[token]


class Attention(nn.Module):
    """x [T, hidden]; returns the rotated query."""

    table: Tensor

    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.q_weight = nn.Parameter(torch.rand(HEAD_DIM) + 0.5)
        self.k_weight = nn.Parameter(torch.rand(HEAD_DIM) + 0.5)
        angles = torch.outer(torch.arange(POSITIONS).float(), 1e4 ** -torch.arange(0, 1, 2 / HEAD_DIM))
        self.register_buffer("table", torch.cat([angles.cos(), angles.sin()], -1))

    def forward(self, x: Tensor, positions: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        heads = self.qkv(x).view(x.shape[0], -1, HEAD_DIM)
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], 1)
        q, k = head_norm(q, self.q_weight, 1e-6), head_norm(k, self.k_weight, 1e-6)
        rope_(positions, q, k, self.table)
        store_(k, v, k_cache, v_cache, slots)
        return q


# --- what they compute, declared in plain PyTorch -------------------------------------------------------------------


@fx_fusion.declare_meaning(head_norm)
def head_norm_meaning(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def in_table(given: dict[str, Tensor]) -> None:
    given["positions"].random_(0, len(given["table"]))


@fx_fusion.declare_meaning(rope_, example=in_table)
def rope_meaning(positions: Tensor, q: Tensor, k: Tensor, table: Tensor) -> None:
    cos, sin = (part.unsqueeze(1) for part in table[positions].chunk(2, -1))
    for heads in (q, k):
        a, b = heads.chunk(2, -1)
        heads.copy_(torch.cat([a * cos - b * sin, b * cos + a * sin], -1))


def in_cache(given: dict[str, Tensor]) -> None:
    last = BLOCK_SIZE * len(given["k_cache"]) - 1  # stays free: PyTorch takes -1 for it
    given["slots"].copy_(torch.randperm(last)[: len(given["slots"])])
    given["slots"][0] = -1


@fx_fusion.declare_meaning(store_, example=in_cache)
def store_meaning(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    kept = (slots >= 0)[:, None, None]
    for value, cache in ((k, k_cache), (v, v_cache)):
        rows = cache.view(-1, KV_HEADS, HEAD_DIM)
        rows[slots] = torch.where(kept, value, rows[slots])


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    tokens = 6
    model, x = Attention(), torch.randn(tokens, 256)
    positions, slots = torch.randint(0, POSITIONS, (tokens,)), torch.randperm(BLOCKS * BLOCK_SIZE)[:tokens]
    slots[-1] = -1  # a padding token
    caches = torch.zeros(2, 2, BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    expected = model(x, positions, slots, *caches[0])
    options = {"fx_fusion.kernel": "reference", "fx_fusion.inner": "eager", "fx_fusion.require": 1}
    actual = torch.compile(model, backend="fx_fusion", options=options)(x, positions, slots, *caches[1])
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(caches[1], caches[0])
    print(fx_fusion.last_report())
    print("query and caches equal eager's")


if __name__ == "__main__":
    main()
