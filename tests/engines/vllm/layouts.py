"""Every physical layout of vLLM's caches, and what a fused call stores there: ``python layouts.py``.

Run in the engine's environment. Prints ``RESULT`` with, for each layout and kind of cache, what is wrong.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from unittest import mock

import torch
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl
from vllm.v1.kv_cache_layout import KVCacheLayout

from fx_fusion.engines.vllm import cache_views, operation

LAYERS, BLOCKS, HQ, HK, SIZE, D, T = 2, 5, 8, 2, 16, 64, 11


def caches(layout: KVCacheLayout, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The memory of all layers, and its logical view [L, B, H, N, 2 D]."""
    shape, order = (LAYERS, BLOCKS, HK, SIZE, 2 * D), layout.stride_order
    memory = torch.zeros([shape[dim] for dim in order], dtype=dtype)
    return memory, memory.permute([order.index(dim) for dim in range(5)])


def layer_of(kv_cache: torch.Tensor, kind: str, impl: object) -> SimpleNamespace:
    return SimpleNamespace(
        head_size=D, head_size_v=D, attn_type="decoder", kv_cache_dtype=kind, kv_cache=kv_cache, impl=impl,
        attn_backend=SimpleNamespace(get_name=lambda: "TRITON_ATTN"),
        _k_scale=torch.tensor(0.5), _v_scale=torch.tensor(2.0),
    )  # fmt: skip


class Layer(SimpleNamespace):
    """Can be a weak key."""

    __hash__ = object.__hash__


def problem(layout: KVCacheLayout, kind: str) -> str | None:
    memory, logical = caches(layout, torch.bfloat16 if kind == "auto" else torch.uint8)
    impl = TritonAttentionImpl.__new__(TritonAttentionImpl)
    impl._is_per_token_head_quant = False
    for kv_cache in logical:
        layer = Layer(**vars(layer_of(kv_cache, kind, impl)))
        slots = torch.randperm(BLOCKS * SIZE)[:T]
        slots[3] = -1
        qkv = torch.randn(T, (HQ + 2 * HK) * D, dtype=torch.bfloat16)
        q, k, v = (part.view(1, T, -1, D) for part in qkv.split([HQ * D, HK * D, HK * D], -1))
        table = torch.randn(100, D, dtype=torch.bfloat16)
        positions = torch.randint(0, 100, (3, 1, T))
        weights = (torch.rand(D, dtype=torch.bfloat16) for _ in range(2))
        before = memory.clone()
        context = mock.patch.object(operation, "get_attention_context", return_value=(None, layer, kv_cache, slots))
        # There is no Triton here, with which this backend would store for the check.
        with context, mock.patch.object(operation, "checked_views", lambda *args: cache_views.views(*args[:2])):
            _, k_out, _ = operation._qk_norm_rope_store(
                q, k, v, *weights, table[:, : D // 2], table[:, D // 2 :], positions, "layer", 1e-6, 1e-6, False, D,
                True, [0, 1, 2] * 10 + [0, 0], True, "reference",
            )  # fmt: skip
        kept = slots >= 0
        place = slots[kept] // SIZE, slots[kept] % SIZE
        k_cache, v_cache = kv_cache.transpose(1, 2).split(D, -1)
        wanted = [k_out[0], v[0]]
        if kind != "auto":
            scaled = ((x.float() / s).clamp(-448, 448) for x, s in zip(wanted, (0.5, 2.0), strict=True))
            wanted = [x.to(torch.float8_e4m3fn).view(torch.uint8) for x in scaled]
        for name, cache, value in (("k", k_cache, wanted[0]), ("v", v_cache, wanted[1])):
            if not torch.equal(cache[place], value[kept]):
                return f"{name} is stored elsewhere"
        if int((memory != before).sum()) > int(kept.sum()) * HK * D * 2:
            return "something else was written"
    return None


if __name__ == "__main__":
    torch.manual_seed(0)
    found = {f"{layout.name} {kind}": problem(layout, kind) for layout in KVCacheLayout for kind in ("auto", "fp8")}
    print("RESULT " + json.dumps(found))
