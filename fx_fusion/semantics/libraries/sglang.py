"""SGLang's operations. Sources, in sgl-project/sglang:

* schemas: ``sgl-kernel/csrc/common_extension.cc`` (``apply_rope_pos_ids_cos_sin_cache`` with and without
  ``cuda_stream``);
* what they compute: the docstrings of ``sgl-kernel/python/sgl_kernel/elementwise.py``. The float32 table holds the
  cosines first; q and q_rope are one tensor when the rotation is in place;
* ``sglang::store_cache``: ``python/sglang/jit_kernel/kvcache.py``, since then ``kernels/ops/kvcache/kvcache.py``
  (``reserved_skip_index``: the slot of padding, 0 unless told otherwise);
* ``sglang::unified_attention_with_output``: ``python/sglang/srt/layers/radix_attention.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fx_fusion.semantics.libraries.steps import STORES_UNSEEN, rms_norm, rotate, store_where, table_rows
from fx_fusion.semantics.meaning import Meaning

HIDDEN = {"sglang::unified_attention_with_output": STORES_UNSEEN}


def rmsnorm(output: Tensor, input: Tensor, weight: Tensor, eps: float, enable_pdl: bool = False) -> None:
    """``sgl_kernel::rmsnorm(Tensor! output, Tensor input, Tensor weight, float eps, bool enable_pdl) -> ()``"""
    output.copy_(rms_norm(input, weight, eps))


def gemma_rmsnorm(output: Tensor, input: Tensor, weight: Tensor, eps: float, enable_pdl: bool = False) -> None:
    """``sgl_kernel::gemma_rmsnorm``: as `rmsnorm`, but times ``1 + weight``."""
    output.copy_(rms_norm(input, weight, eps, gemma=True))


def fused_add_rmsnorm(input: Tensor, residual: Tensor, weight: Tensor, eps: float, enable_pdl: bool = False) -> None:
    """``sgl_kernel::fused_add_rmsnorm(Tensor! input, Tensor! residual, Tensor weight, float eps, bool enable_pdl)``"""
    _add_and_norm(input, residual, weight, eps)


def gemma_fused_add_rmsnorm(
    input: Tensor, residual: Tensor, weight: Tensor, eps: float, enable_pdl: bool = False
) -> None:
    """``sgl_kernel::gemma_fused_add_rmsnorm``: as `fused_add_rmsnorm`, but times ``1 + weight``."""
    _add_and_norm(input, residual, weight, eps, gemma=True)


def _add_and_norm(input: Tensor, residual: Tensor, weight: Tensor, eps: float, *, gemma: bool = False) -> None:
    total = input.float() + residual.float()
    residual.copy_(total)
    input.copy_(rms_norm(total, weight, eps, gemma=gemma))


def apply_rope_pos_ids_cos_sin_cache(
    q: Tensor,
    k: Tensor,
    q_rope: Tensor,
    k_rope: Tensor,
    cos_sin_cache: Tensor,
    pos_ids: Tensor,
    interleave: bool,
    enable_pdl: bool = False,
    cuda_stream: int = 0,
    v: Tensor | None = None,
    k_buffer: Tensor | None = None,
    v_buffer: Tensor | None = None,
    kv_cache_loc: Tensor | None = None,
) -> None:
    """``sgl_kernel::apply_rope_pos_ids_cos_sin_cache(Tensor q, Tensor k, Tensor! q_rope, Tensor! k_rope,
    Tensor cos_sin_cache, Tensor pos_ids, bool interleave, bool enable_pdl, Tensor? v, Tensor!? k_buffer,
    Tensor!? v_buffer, Tensor? kv_cache_loc) -> ()``, heads [T, H, D]; with buffers it stores k and v too.
    """
    cos, sin = table_rows(cos_sin_cache, pos_ids)
    rotated_q, rotated_k = (rotate(heads, cos, sin, heads.shape[-1], is_neox=not interleave) for heads in (q, k))
    q_rope.copy_(rotated_q)
    k_rope.copy_(rotated_k)
    if k_buffer is not None and v_buffer is not None and v is not None and kv_cache_loc is not None:
        k_buffer[kv_cache_loc] = rotated_k.to(k_buffer.dtype)
        v_buffer[kv_cache_loc] = v.to(v_buffer.dtype)


def store_cache(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    indices: Tensor,
    *,
    row_bytes: int = 0,
    v_row_bytes: int = 0,
    num_split: int = 0,
    size_limit: int = 0,
    reserved_skip_index: int = -1,
) -> None:
    """``sglang::store_cache(Tensor k, Tensor v, Tensor! k_cache, Tensor! v_cache, Tensor indices, *, …) -> ()``, all
    [N, H * D]; nothing is stored at `reserved_skip_index`, which only later versions have.
    """
    for source, cache in ((k, k_cache), (v, v_cache)):
        if reserved_skip_index >= 0:
            store_where(indices != reserved_skip_index, cache, (indices,), source)
        else:
            cache[indices] = source


def _in_table(given: dict[str, Any]) -> None:
    given["pos_ids"].random_(0, given["cos_sin_cache"].shape[0])


def _in_cache(given: dict[str, Any]) -> None:
    indices, slots = given["indices"], torch.randperm(given["k_cache"].shape[0])
    reserved = given.get("reserved_skip_index", -1)
    indices.copy_(slots[slots != reserved][: indices.numel()])
    if reserved >= 0:
        indices[-1] = reserved


MEANINGS = (
    Meaning("sgl_kernel::rmsnorm.default", rmsnorm),
    Meaning("sgl_kernel::gemma_rmsnorm.default", gemma_rmsnorm),
    Meaning("sgl_kernel::fused_add_rmsnorm.default", fused_add_rmsnorm),
    Meaning("sgl_kernel::gemma_fused_add_rmsnorm.default", gemma_fused_add_rmsnorm),
    Meaning("sgl_kernel::apply_rope_pos_ids_cos_sin_cache.default", apply_rope_pos_ids_cos_sin_cache, _in_table),
    Meaning("sglang::store_cache.default", store_cache, _in_cache),
)
