"""Where vLLM's attention backends keep keys and values: one function for each way of theirs to store.

A layer's cache is ``[blocks, Hk, block_size, 2 * D]``, in any physical order. A function here is found by the method
that the backend stores with, so a subclass that stores otherwise is not taken for its base.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fx_fusion.engines.vllm.names import current_platform

Views = tuple[Tensor, Tensor]
"""Of keys and of values, each [blocks, block_size, Hk, D], in the cache's own memory."""

_PLAIN = ("auto", "float16", "bfloat16", "float32")
_FLOAT8 = ("fp8", "fp8_e4m3")


def views(layer: Any, kv_cache: Tensor) -> Views | str:
    """The views, or why there are none: then the backend itself must store."""
    method = getattr(type(layer.impl), "do_kv_cache_update", None)
    name = f"{getattr(method, '__module__', '')}.{getattr(method, '__qualname__', '')}"
    known = _LAYOUTS.get(name.removeprefix("vllm.v1.attention.backends."))
    if known is None:
        return f"{layer.attn_backend.get_name()} stores with {name}, which is not known"
    if str(getattr(layer.attn_type, "value", layer.attn_type)) != "decoder":
        return f"it is {layer.attn_type} attention"
    if kv_cache.dim() != 4 or layer.head_size != layer.head_size_v or kv_cache.shape[-1] != 2 * layer.head_size:
        return f"its cache {list(kv_cache.shape)} does not hold keys and values of {layer.head_size} lanes"
    return known(layer, kv_cache)


def _last_dimension(layer: Any, kv_cache: Tensor) -> Views | str:
    """Of each token and head first k, then v, in the last dimension."""
    kind = layer.kv_cache_dtype
    if getattr(layer.impl, "_is_per_token_head_quant", False) or kind not in (*_PLAIN, *_FLOAT8):
        return f"its cache is quantised as {kind}"
    k, v = kv_cache.transpose(1, 2).split(layer.head_size, -1)
    if kind in _FLOAT8:
        k, v = (part.view(current_platform.fp8_dtype()) for part in (k, v))
    return (k, v) if k.dtype.is_floating_point else f"its cache holds {kv_cache.dtype} for {kind}"


def _cpu(layer: Any, kv_cache: Tensor) -> Views | str:
    """Of each block and head k as [D, block_size], then v as [block_size, D]; with AMX tiles otherwise."""
    if layer.isa not in ("vec", "vec16") or layer.kv_cache_dtype not in _PLAIN:
        return f"it stores {layer.kv_cache_dtype} for the instruction set {layer.isa}"
    if not kv_cache.is_contiguous():
        return "its cache is not contiguous"
    blocks, heads, size, width = kv_cache.shape
    d, block, start = width // 2, heads * size * width, kv_cache.storage_offset()
    shape = (blocks, size, heads, d)
    k = kv_cache.as_strided(shape, (block, 1, size * width, size), start)
    v = kv_cache.as_strided(shape, (block, d, size * width, 1), start + size * d)
    return k, v


_LAYOUTS: dict[str, Callable[[Any, Tensor], Views | str]] = {
    "flash_attn.FlashAttentionImpl.do_kv_cache_update": _last_dimension,
    "triton_attn.TritonAttentionImpl.do_kv_cache_update": _last_dimension,
    "flashinfer.FlashInferImpl.do_kv_cache_update": _last_dimension,
    "flex_attention.FlexAttentionImpl.do_kv_cache_update": _last_dimension,
    "cpu_attn.CPUAttentionBackendImpl.do_kv_cache_update": _cpu,
}

#: Attention that, where it is a decoder's and no context is spread over ranks, takes keys from the cache alone, in
#: prefill as in decode: what it is given as `key` is looked at for encoders (all of these), and where each rank holds
#: a part of a sequence's context (FLASH_ATTN, FLASHINFER).
_READS_CACHE_ONLY = (
    "flash_attn.FlashAttentionImpl.forward",
    "triton_attn.TritonAttentionImpl.forward",
    "flashinfer.FlashInferImpl.forward",
    "flex_attention.FlexAttentionImpl.forward",
    "cpu_attn.CPUAttentionBackendImpl.forward",
)


def reads_cache_only(layer: Any) -> bool:
    """Whether the attention of `layer` never looks at the fresh key."""
    method = type(layer.impl).forward
    name = f"{method.__module__}.{method.__qualname__}".removeprefix("vllm.v1.attention.backends.")
    alone = getattr(layer.impl, "dcp_world_size", 1) <= 1
    return alone and name in _READS_CACHE_ONLY and str(getattr(layer.attn_type, "value", layer.attn_type)) == "decoder"


def stores_here(layer: Any) -> bool:
    """Whether the operation that stores is called for `layer` at all."""
    return (
        not layer.attn_backend.forward_includes_kv_cache_update
        and layer.kv_sharing_target_layer_name is None
        and str(getattr(layer.attn_type, "value", layer.attn_type)) == "decoder"
    )


def is_float8(cache: Tensor) -> bool:
    return cache.dtype.itemsize == 1 and cache.dtype.is_floating_point


def compact_like(kv_cache: Tensor, blocks: int) -> Tensor:
    """Zeros, a small cache whose dimensions lie in memory in the order of those of `kv_cache`."""
    order = sorted(range(kv_cache.dim()), key=lambda dim: -kv_cache.stride(dim))
    shape = [blocks, *kv_cache.shape[1:]]
    flat = torch.zeros([shape[dim] for dim in order], dtype=kv_cache.dtype, device=kv_cache.device)
    return flat.permute([order.index(dim) for dim in range(kv_cache.dim())])
