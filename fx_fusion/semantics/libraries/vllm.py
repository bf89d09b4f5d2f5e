"""vLLM's operations. Sources, in vllm-project/vllm:

* ``vllm_ir::rms_norm``: ``vllm/ir/ops/layernorm.py`` (``x.float()``, mean square, cast to the weight's dtype, then
  times weight);
* ``_C::rms_norm``, ``_C::rotary_embedding``, ``_C_cache_ops::…``: schemas in ``csrc/torch_bindings.cpp``, since the
  stable ABI in ``csrc/libtorch_stable/torch_bindings.cpp`` (``rope_dim_offset``, ``inverse``);
* rotation in float32, one rounding: ``csrc/libtorch_stable/pos_encoding_kernels.cu``; older kernels multiply in the
  model's dtype;
* ``vllm::mrope``: ``vllm/model_executor/layers/rotary_embedding/mrope.py`` (``_triton_mrope_forward``,
  ``apply_interleaved_rope``), and the call in ``benchmarks/fused_kernels/fused_qk_norm_mrope_benchmark.py``;
* ``_C::fused_qk_norm_rope``: ``csrc/fused_qknorm_rope_kernel.cu``;
* negative slots are padding and store nothing, and only as many tokens are stored as there are slots:
  ``csrc/cache_kernels.cu``, and the layouts of both kinds of cache;
* ``vllm::unified_kv_cache_update``, ``vllm::unified_attention…``:
  ``vllm/model_executor/layers/attention/attention.py``.

A graph is functional where vLLM runs its own passes, and where a pass given as ``post_grad_custom_post_pass`` runs:
``fix_functionalization`` comes last (``vllm/compilation/passes/pass_manager.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fx_fusion.semantics.libraries.steps import (
    STORES_UNSEEN,
    mix_axes,
    rms_norm,
    rotate,
    store_kept_slots,
    store_where,
    table_rows,
)
from fx_fusion.semantics.meaning import WITHOUT_STORE, Hidden, Meaning

_FORWARD_CONTEXT = (
    "takes cache and slots from vLLM's forward context; they are not in the graph, so the store cannot be fused"
)

_OWN_FUSION = "is vLLM's own fusion of norm, rotation and store (pass_config.fuse_qk_norm_rope_kvcache)"

HIDDEN = {
    "vllm::unified_kv_cache_update": Hidden(f"{_FORWARD_CONTEXT}. {WITHOUT_STORE}"),
    "vllm::unified_mla_kv_cache_update": Hidden(_FORWARD_CONTEXT),
    "vllm::fused_rope_and_unified_kv_cache_update": Hidden(_FORWARD_CONTEXT),
    "vllm::fused_qk_norm_rope_and_unified_kv_cache_update": Hidden(_OWN_FUSION),
    "vllm::fused_qk_norm_mrope_and_unified_kv_cache_update": Hidden(_OWN_FUSION),
    "vllm::unified_attention_with_output": STORES_UNSEEN,
    "vllm::unified_attention": STORES_UNSEEN,
}


def ir_rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    """``vllm_ir::rms_norm(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor``"""
    if variance_size is not None:
        raise NotImplementedError(f"variance_size={variance_size}: only part of a head enters its mean square")
    if weight is None:
        return rms_norm(x, None, epsilon)
    return (rms_norm(x.float(), None, epsilon).to(weight.dtype) * weight).to(x.dtype)


def c_rms_norm(result: Tensor, input: Tensor, weight: Tensor, epsilon: float) -> None:
    """``_C::rms_norm(Tensor! result, Tensor input, Tensor weight, float epsilon) -> ()``; once, `result` was `out`."""
    result.copy_(rms_norm(input, weight, epsilon))


def c_fused_add_rms_norm(input: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> None:
    """``_C::fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor weight, float epsilon) -> ()``

    What is normalised is the sum before it is rounded to the residual's dtype.
    """
    total = input.float() + residual.float()
    residual.copy_(total)
    input.copy_(rms_norm(total, weight, epsilon))


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
    is_neox: bool = True,
) -> None:
    """``vllm::mrope(Tensor positions, Tensor! query, Tensor! key, Tensor cos_sin_cache, int head_size, int rotary_dim,
    int t, int h, int w, bool interleaved, bool is_neox) -> ()``, positions [3, T] or [T]; once without `is_neox`.
    """
    cos, sin = table_rows(cos_sin_cache, positions)
    if positions.dim() == 2:
        section = (mrope_section_t, mrope_section_h, mrope_section_w)
        cos, sin = (mix_axes(rows, section, interleaved=mrope_interleaved) for rows in (cos, sin))
    if 2 * cos.shape[-1] != rotary_dim:
        raise ValueError(f"rotary_dim={rotary_dim}, but the table's rows hold {cos.shape[-1]} cosines")
    for heads in (query, key):
        heads.copy_(rotate(heads, cos, sin, head_size, is_neox=is_neox))


def fused_qk_norm_rope(
    qkv: Tensor,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_dim: int,
    eps: float,
    q_weight: Tensor,
    k_weight: Tensor,
    cos_sin_cache: Tensor,
    is_neox: bool,
    position_ids: Tensor,
    forced_token_heads_per_warp: int = -1,
) -> None:
    """``_C::fused_qk_norm_rope(Tensor! qkv, int num_heads_q, int num_heads_k, int num_heads_v, int head_dim, float eps,
    Tensor q_weight, Tensor k_weight, Tensor cos_sin_cache, bool is_neox, Tensor position_ids,
    int forced_token_heads_per_warp=-1) -> ()``, qkv [T, (Hq + Hk + Hv) * D]; one rounding.
    """
    cos, sin = table_rows(cos_sin_cache, position_ids)
    q, k, _ = qkv.split([heads * head_dim for heads in (num_heads_q, num_heads_k, num_heads_v)], -1)
    rotated: list[Tensor] = []
    for part, weight in ((q, q_weight), (k, k_weight)):
        normed = rms_norm(part.reshape(part.shape[0], -1, head_dim).float(), weight, eps)
        rotated.append(rotate(normed, cos, sin, head_dim, is_neox=is_neox).reshape(part.shape))
    q.copy_(rotated[0])
    k.copy_(rotated[1])


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
    Tensor slot_mapping, str kv_cache_dtype, Tensor k_scale, Tensor v_scale) -> ()``; once the scales were floats.

    Caches [blocks, block_size, Hk, D]. There may be fewer slots than tokens: the first ones are stored.
    """
    _check_unquantised(key, key_cache, kv_cache_dtype)
    for source, cache in ((key, key_cache), (value, value_cache)):
        store_kept_slots(cache, slot_mapping, _with_slots(source, slot_mapping))


def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Any,
    v_scale: Any,
) -> None:
    """``_C_cache_ops::reshape_and_cache``, with the arguments of ``reshape_and_cache_flash``.

    key_cache [blocks, Hk, D / x, block_size, x], value_cache [blocks, Hk, D, block_size].
    """
    _check_unquantised(key, key_cache, kv_cache_dtype)
    tokens, block_size = slot_mapping.shape[0], value_cache.shape[3]
    place = (slot_mapping // block_size, slice(None), slice(None), slot_mapping % block_size)
    in_groups = _with_slots(key, slot_mapping).reshape(tokens, *key_cache.shape[1:3], key_cache.shape[4])
    store_where(slot_mapping >= 0, key_cache, place, in_groups)
    store_where(slot_mapping >= 0, value_cache, place, _with_slots(value, slot_mapping))


def _check_unquantised(key: Tensor, cache: Tensor, kv_cache_dtype: str) -> None:
    if kv_cache_dtype != "auto" or cache.dtype != key.dtype:
        raise NotImplementedError(f"kv_cache_dtype={kv_cache_dtype!r} into a cache of {cache.dtype}: quantised")


def _with_slots(source: Tensor, slots: Tensor) -> Tensor:
    return source[: slots.shape[0]] if source.shape[0] != slots.shape[0] else source


def _in_table(given: dict[str, Any]) -> None:
    positions = given["positions"] if "positions" in given else given["position_ids"]
    positions.random_(0, given["cos_sin_cache"].shape[0])


def _in_cache(given: dict[str, Any]) -> None:
    _fill_slots(given["slot_mapping"], given["key_cache"].shape[:2].numel())


def _in_grouped_cache(given: dict[str, Any]) -> None:
    blocks, *_, block_size = given["value_cache"].shape
    _fill_slots(given["slot_mapping"], blocks * block_size)


def _fill_slots(slots: Tensor, count: int) -> None:
    slots.copy_(torch.randperm(count - 1)[: slots.numel()])
    slots[-1] = -1  # padding; the last slot of all stays free, for PyTorch takes -1 for it


MEANINGS = (
    Meaning("vllm_ir::rms_norm.default", ir_rms_norm),
    Meaning("_C::rms_norm.default", c_rms_norm),
    Meaning("_C::fused_add_rms_norm.default", c_fused_add_rms_norm),
    Meaning("_C::rotary_embedding.default", c_rotary_embedding, _in_table),
    Meaning("vllm::mrope.default", mrope, _in_table),
    Meaning("_C::fused_qk_norm_rope.default", fused_qk_norm_rope, _in_table),
    Meaning("_C_cache_ops::reshape_and_cache_flash.default", reshape_and_cache_flash, _in_cache),
    Meaning("_C_cache_ops::reshape_and_cache.default", reshape_and_cache, _in_grouped_cache),
)
