"""vLLM's operations. Sources, in vllm-project/vllm:

* ``vllm_ir::rms_norm``: ``vllm/ir/ops/layernorm.py`` (``x.float()``, mean square, cast, then times weight);
* ``_C::rms_norm``, ``_C::rotary_embedding``, ``_C_cache_ops::…``: schemas in ``csrc/torch_bindings.cpp``, since the
  stable ABI in ``csrc/libtorch_stable/torch_bindings.cpp`` (``rope_dim_offset``, ``inverse``);
* rotation in float32, one rounding: ``csrc/libtorch_stable/pos_encoding_kernels.cu``; older kernels multiply in the
  model's dtype;
* ``vllm::mrope``: ``vllm/model_executor/layers/rotary_embedding/mrope.py`` (``_triton_mrope_forward``,
  ``apply_interleaved_rope``), and the call in ``benchmarks/fused_kernels/fused_qk_norm_mrope_benchmark.py``;
* negative slots are padding and store nothing: ``csrc/cache_kernels.cu``;
* ``vllm::unified_kv_cache_update``: ``vllm/model_executor/layers/attention/attention.py``.

A graph is functional where vLLM runs its own passes, and where a pass given as ``post_grad_custom_post_pass`` runs:
``fix_functionalization`` comes last (``vllm/compilation/passes/pass_manager.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fx_fusion.meaning import Meaning
from fx_fusion.meanings.steps import mix_axes, rms_norm, rotate, store_kept_slots, table_rows

_FORWARD_CONTEXT = "takes cache and slots from vLLM's forward context; they are not in the graph, so it cannot be fused"

HIDDEN = {
    "vllm::unified_kv_cache_update": _FORWARD_CONTEXT,
    "vllm::unified_mla_kv_cache_update": _FORWARD_CONTEXT,
    "vllm::fused_rope_and_unified_kv_cache_update": _FORWARD_CONTEXT,
}


def ir_rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    """``vllm_ir::rms_norm(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor``"""
    if variance_size is not None:
        raise NotImplementedError(f"variance_size={variance_size}: only part of a head enters its mean square")
    y = rms_norm(x, None, epsilon)
    return y if weight is None else y * weight


def c_rms_norm(result: Tensor, input: Tensor, weight: Tensor, epsilon: float) -> None:
    """``_C::rms_norm(Tensor! result, Tensor input, Tensor weight, float epsilon) -> ()``; once, `result` was `out`."""
    result.copy_(rms_norm(input, weight, epsilon))


def c_fused_add_rms_norm(input: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> None:
    """``_C::fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor weight, float epsilon) -> ()``"""
    residual.copy_(input + residual)
    input.copy_(rms_norm(residual, weight, epsilon))


def c_rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> None:
    """``_C::rotary_embedding(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache,
    bool is_neox, int rope_dim_offset=0, bool inverse=False) -> ()``
    """
    if rope_dim_offset:
        raise NotImplementedError(f"rope_dim_offset={rope_dim_offset}: the rotated lanes are not the first ones")
    cos, sin = table_rows(cos_sin_cache, positions.reshape(-1))
    sin = -sin if inverse else sin
    for heads in (query, key):
        if heads is not None:
            heads.copy_(rotate(heads, cos, sin, head_size, is_neox=is_neox))


def mrope(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    cos_sin_cache: Tensor,
    head_size: int,
    rotary_dim: int,
    mrope_section_t: int,
    mrope_section_h: int,
    mrope_section_w: int,
    mrope_interleaved: bool,
    is_neox: bool,
) -> None:
    """``vllm::mrope(Tensor positions, Tensor! query, Tensor! key, Tensor cos_sin_cache, int head_size, int rotary_dim,
    int t, int h, int w, bool interleaved, bool is_neox) -> ()``, positions [3, T] or [T]
    """
    cos, sin = table_rows(cos_sin_cache, positions)
    if positions.dim() == 2:
        section = (mrope_section_t, mrope_section_h, mrope_section_w)
        cos, sin = (mix_axes(rows, section, interleaved=mrope_interleaved) for rows in (cos, sin))
    if 2 * cos.shape[-1] != rotary_dim:
        raise ValueError(f"rotary_dim={rotary_dim}, but the table's rows hold {cos.shape[-1]} cosines")
    for heads in (query, key):
        heads.copy_(rotate(heads, cos, sin, head_size, is_neox=is_neox))


def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Any,
    v_scale: Any,
) -> None:
    """``_C_cache_ops::reshape_and_cache_flash(Tensor key, Tensor value, Tensor! key_cache, Tensor! value_cache,
    Tensor slot_mapping, str kv_cache_dtype, Tensor k_scale, Tensor v_scale) -> ()``

    Caches [blocks, block_size, Hk, D]. There may be fewer slots than tokens: the first ones are stored.
    """
    if kv_cache_dtype != "auto" or key_cache.dtype != key.dtype:
        raise NotImplementedError(f"kv_cache_dtype={kv_cache_dtype!r} into a cache of {key_cache.dtype}: quantised")
    for source, cache in ((key, key_cache), (value, value_cache)):
        stored = source[: slot_mapping.shape[0]] if source.shape[0] != slot_mapping.shape[0] else source
        store_kept_slots(cache, slot_mapping, stored)


def _in_table(given: dict[str, Any]) -> None:
    given["positions"].random_(0, given["cos_sin_cache"].shape[0])


def _in_cache(given: dict[str, Any]) -> None:
    slots, cache = given["slot_mapping"], given["key_cache"]
    slots.copy_(torch.randperm(cache.shape[0] * cache.shape[1] - 1)[: slots.numel()])
    slots[-1] = -1  # padding; the last slot of all stays free, for PyTorch takes -1 for it


MEANINGS = (
    Meaning("vllm_ir::rms_norm.default", ir_rms_norm),
    Meaning("_C::rms_norm.default", c_rms_norm),
    Meaning("_C::fused_add_rms_norm.default", c_fused_add_rms_norm),
    Meaning("_C::rotary_embedding.default", c_rotary_embedding, _in_table),
    Meaning("vllm::mrope.default", mrope, _in_table),
    Meaning("_C_cache_ops::reshape_and_cache_flash.default", reshape_and_cache_flash, _in_cache),
)
