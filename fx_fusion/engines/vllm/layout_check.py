"""The first look at a kind of cache: does the backend store where we think it does? Once a process and kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fx_fusion.engines.vllm.cache_views import Views, compact_like, views
from fx_fusion.kernels.capture_guard import refuse_in_capture

#: Of the small cache. Tokens go to both ends of a block and to other blocks, and one goes nowhere.
_BLOCKS = 3

_known: dict[Any, str | None] = {}


def checked_views(layer: Any, kv_cache: Tensor, dtype: torch.dtype) -> Views | str:
    """The views of `kv_cache`, if what the backend stores of keys of `dtype` is found there; or why there are none."""
    found = views(layer, kv_cache)
    if isinstance(found, str):
        return found
    method = type(layer.impl).do_kv_cache_update
    order = tuple(sorted(range(4), key=lambda dim: -kv_cache.stride(dim)))
    kind = (method, kv_cache.shape[1:], order, kv_cache.dtype, kv_cache.device, layer.kv_cache_dtype, dtype)
    if kind not in _known:
        refuse_in_capture("the place where a backend stores keys is to be checked")
        _known[kind] = _difference(layer, kv_cache, dtype)
    problem = _known[kind]
    return found if problem is None else problem


def _difference(layer: Any, kv_cache: Tensor, dtype: torch.dtype) -> str | None:
    """What is wrong with the views: the backend stores into a small cache of the same kind."""
    small = compact_like(kv_cache, _BLOCKS)
    there = views(layer, small)
    if isinstance(there, str):
        return there
    size, device = there[0].shape[1], kv_cache.device
    slots = torch.tensor([size - 1, -1, size, 2 * size + size // 2, 0], device=device)
    shape = (len(slots), *there[0].shape[2:])
    generator = torch.Generator().manual_seed(0)
    # Quarters up to 4 in magnitude: exact in every format, but for a scale.
    key, value = (
        (torch.randint(1, 17, shape, generator=generator) / 4).to(device=device, dtype=dtype) for _ in range(2)
    )
    try:
        with torch.no_grad():
            layer.impl.do_kv_cache_update(layer, key, value, small, slots)
    except Exception as error:
        return f"what {layer.attn_backend.get_name()} stores cannot be checked ({type(error).__name__}: {error})"
    stored = slots >= 0
    place = slots[stored] // size, slots[stored] % size
    for name, view, source, scale in (("k", there[0], key, "_k_scale"), ("v", there[1], value, "_v_scale")):
        held = view.to(torch.float32)
        wanted = torch.zeros_like(held)
        wanted[place] = source[stored].float() / (getattr(layer, scale).float() if view.dtype.itemsize == 1 else 1.0)
        # A float8_e4m3 has three bits after its leading one: half a step is 1/16.
        if not torch.allclose(held, wanted, rtol=1 / 16 if view.dtype.itemsize == 1 else 0.0, atol=2**-9):
            return f"{layer.attn_backend.get_name()} stores {name} elsewhere than expected"
    return None
