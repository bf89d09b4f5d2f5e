"""Stand-ins for the opaque operations of serving engines: their schemas, written independently of any meaning."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import torch
from torch import Tensor

SCHEMAS = {
    "ir_rms_norm": "(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor",
    "rms_norm": "(Tensor! result, Tensor input, Tensor weight, float epsilon) -> ()",
    "fused_add_rms_norm": "(Tensor! input, Tensor! residual, Tensor weight, float epsilon) -> ()",
    "rotary_embedding": (
        "(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache, bool is_neox, "
        "int rope_dim_offset=0, bool inverse=False) -> ()"
    ),
    "mrope": (
        "(Tensor positions, Tensor! q, Tensor! k, Tensor cos_sin_cache, int head_size, int rotary_dim, int t, int h, "
        "int w, bool interleaved, bool is_neox) -> ()"
    ),
    "fused_qk_norm_rope": (
        "(Tensor! qkv, int num_heads_q, int num_heads_k, int num_heads_v, int head_dim, float eps, Tensor q_weight, "
        "Tensor k_weight, Tensor cos_sin_cache, bool is_neox, Tensor position_ids, int forced_token_heads_per_warp=-1) "
        "-> ()"
    ),
    "reshape_and_cache": (
        "(Tensor key, Tensor value, Tensor! key_cache, Tensor! value_cache, Tensor slot_mapping, str kv_cache_dtype, "
        "Tensor k_scale, Tensor v_scale) -> ()"
    ),
    "reshape_and_cache_flash": (
        "(Tensor key, Tensor value, Tensor! key_cache, Tensor! value_cache, Tensor slot_mapping, str kv_cache_dtype, "
        "Tensor k_scale, Tensor v_scale) -> ()"
    ),
    "unified_kv_cache_update": "(Tensor key, Tensor value, str layer_name) -> Tensor",
    "unified_attention_with_output": "(Tensor query, Tensor key, Tensor value, Tensor! output, str layer_name) -> ()",
    "store": "(Tensor k, Tensor v, Tensor! k_cache, Tensor! v_cache, Tensor slots) -> ()",
    "rope_out": "(Tensor q, Tensor k, Tensor! q_rope, Tensor! k_rope, Tensor table, Tensor pos_ids) -> ()",
    "rmsnorm": "(Tensor! output, Tensor input, Tensor weight, float eps, bool enable_pdl) -> ()",
    "gemma_rmsnorm": "(Tensor! output, Tensor input, Tensor weight, float eps, bool enable_pdl) -> ()",
    "fused_add_rmsnorm": "(Tensor! input, Tensor! residual, Tensor weight, float eps, bool enable_pdl) -> ()",
    "gemma_fused_add_rmsnorm": "(Tensor! input, Tensor! residual, Tensor weight, float eps, bool enable_pdl) -> ()",
    "apply_rope_pos_ids_cos_sin_cache": (
        "(Tensor q, Tensor k, Tensor! q_rope, Tensor! k_rope, Tensor cos_sin_cache, Tensor pos_ids, bool interleave, "
        "bool enable_pdl, Tensor? v, Tensor!? k_buffer, Tensor!? v_buffer, Tensor? kv_cache_loc) -> ()"
    ),
    "store_cache": (
        "(Tensor k, Tensor v, Tensor! k_cache, Tensor! v_cache, Tensor indices, *, int row_bytes=0, int num_split=0) "
        "-> ()"
    ),
    "store_cache_reserving": (
        "(Tensor k, Tensor v, Tensor! k_cache, Tensor! v_cache, Tensor indices, *, int row_bytes=0, int v_row_bytes=0, "
        "int num_split=0, int size_limit=0, int reserved_skip_index=0) -> ()"
    ),
}

#: Where the libraries register them.
VLLM = {
    "vllm_ir": {"rms_norm": "ir_rms_norm"},
    "_C": {name: name for name in ("rms_norm", "fused_add_rms_norm", "rotary_embedding", "fused_qk_norm_rope")},
    "vllm": {name: name for name in ("mrope", "unified_kv_cache_update", "unified_attention_with_output")},
    "_C_cache_ops": {name: name for name in ("reshape_and_cache", "reshape_and_cache_flash")},
}
SGLANG = {
    "sgl_kernel": {
        "apply_rope_pos_ids_cos_sin_cache": "apply_rope_pos_ids_cos_sin_cache",
        **{name: name for name in ("rmsnorm", "gemma_rmsnorm", "fused_add_rmsnorm", "gemma_fused_add_rmsnorm")},
    },
    "sglang": {"store_cache": "store_cache"},
}
#: Later versions skip a slot.
SGLANG_LATER = {"sglang": {"store_cache": "store_cache_reserving"}}


def _normed(x: Tensor, epsilon: float) -> Tensor:
    mean_square = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True).square() / x.shape[-1]
    return x.float() / (mean_square + epsilon).sqrt()


def ir_rms_norm(x, weight, epsilon, variance_size=None):
    normed = _normed(x, epsilon)
    return (normed if weight is None else weight * normed.to(weight.dtype)).to(x.dtype)


def rms_norm(result, input, weight, epsilon):
    result.copy_(_normed(input, epsilon) * weight.float())


def rmsnorm(output, input, weight, eps, enable_pdl):
    rms_norm(output, input, weight, eps)


def gemma_rmsnorm(output, input, weight, eps, enable_pdl):
    rms_norm(output, input, weight + 1, eps)


def fused_add_rms_norm(input, residual, weight, epsilon):
    fused_add_rmsnorm(input, residual, weight, epsilon, False)


def fused_add_rmsnorm(input, residual, weight, eps, enable_pdl):
    total = torch.stack([input.float(), residual.float()]).sum(0)
    residual.copy_(total)
    input.copy_(_normed(total, eps) * weight.float())


def gemma_fused_add_rmsnorm(input, residual, weight, eps, enable_pdl):
    fused_add_rmsnorm(input, residual, weight + 1, eps, enable_pdl)


def fused_qk_norm_rope(
    qkv, num_heads_q, num_heads_k, num_heads_v, head_dim, eps, q_weight, k_weight, cos_sin_cache, is_neox, position_ids,
    forced_token_heads_per_warp=-1,
):  # fmt: skip
    heads = qkv.view(qkv.shape[0], num_heads_q + num_heads_k + num_heads_v, head_dim)
    weights = [q_weight] * num_heads_q + [k_weight] * num_heads_k
    for head, weight in enumerate(weights):
        normed = (_normed(heads[:, head], eps) * weight.float()).unsqueeze(1)
        _rotate_in_place(normed, cos_sin_cache[position_ids], head_dim, is_neox)
        heads[:, head] = normed[:, 0].to(qkv.dtype)


def rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox, rope_dim_offset=0, inverse=False):
    rows = cos_sin_cache[positions.flatten()]
    for tensor in (query, key):
        if tensor is not None:
            _rotate_in_place(tensor, rows, head_size, is_neox)


def mrope(positions, q, k, cos_sin_cache, head_size, rotary_dim, t, h, w, interleaved, is_neox):
    axes = [0] * t + [1] * h + [2] * w
    positions = positions.expand(3, -1) if positions.dim() == 1 else positions
    if interleaved:
        axes = [pair % 3 if pair // 3 < (t, h, w)[pair % 3] else 0 for pair in range(rotary_dim // 2)]
    cos, sin = cos_sin_cache[positions].chunk(2, -1)
    rows = torch.cat([torch.stack([part[a, :, i] for i, a in enumerate(axes)], -1) for part in (cos, sin)], -1)
    for tensor in (q, k):
        _rotate_in_place(tensor, rows, head_size, is_neox)


def rope_out(q, k, q_rope, k_rope, table, pos_ids):
    for source, target in ((q, q_rope), (k, k_rope)):
        rotated = source.clone()
        _rotate_in_place(rotated, table[pos_ids], source.shape[-1], True)
        target.copy_(rotated)


def apply_rope_pos_ids_cos_sin_cache(
    q, k, q_rope, k_rope, cos_sin_cache, pos_ids, interleave, enable_pdl, v, k_buffer, v_buffer, kv_cache_loc
):
    for source, target in ((q, q_rope), (k, k_rope)):
        rotated = source.clone()
        _rotate_in_place(rotated, cos_sin_cache[pos_ids], source.shape[-1], not interleave)
        target.copy_(rotated)
    if k_buffer is not None:
        store(k_rope, v, k_buffer, v_buffer, kv_cache_loc)


def _rotate_in_place(tensor: Tensor, rows: Tensor, head_dim: int, is_neox: bool) -> None:
    """By complex multiplication."""
    turn = torch.complex(*rows.float().chunk(2, -1))[:, None]
    pairs = turn.shape[-1]
    first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    if not is_neox:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    heads = tensor.view(rows.shape[0], -1, head_dim)
    turned = torch.complex(heads[..., first].float(), heads[..., second].float()) * turn
    heads[..., first], heads[..., second] = turned.real.to(tensor.dtype), turned.imag.to(tensor.dtype)


def store(k, v, k_cache, v_cache, slots):
    for row, slot in enumerate(slots.tolist()):
        k_cache[slot], v_cache[slot] = k[row], v[row]


def store_cache(k, v, k_cache, v_cache, indices, *, row_bytes=0, num_split=0):
    store(k, v, k_cache, v_cache, indices)


def reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale):
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, key_cache.shape[1])
            key_cache[block, offset], value_cache[block, offset] = key[token], value[token]


def store_cache_reserving(
    k, v, k_cache, v_cache, indices, *, row_bytes=0, v_row_bytes=0, num_split=0, size_limit=0, reserved_skip_index=0
):
    for row, slot in enumerate(indices.tolist()):
        if slot != reserved_skip_index:
            k_cache[slot], v_cache[slot] = k[row], v[row]


def reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale):
    heads, groups, block_size, x = key_cache.shape[1:]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        block, offset = divmod(slot, block_size)
        for head in range(heads):
            value_cache[block, head, :, offset] = value[token, head]
            for lane in range(groups * x):
                key_cache[block, head, lane // x, offset, lane % x] = key[token, head, lane]


def unified_kv_cache_update(key, value, layer_name):
    return key.new_empty(0)


def unified_attention_with_output(query, key, value, output, layer_name):
    output.copy_(query)


_FAKES = {
    "ir_rms_norm": lambda x, *_, **__: torch.empty_like(x),
    "unified_kv_cache_update": lambda key, *_: key.new_empty(0),
}


def register(namespace: str, names: dict[str, str], device: str = "CPU") -> torch.library.Library:
    """A library `namespace` that calls the stand-in `names[name]` `name`; it lives as long as what is returned."""
    library = torch.library.Library(namespace, "FRAGMENT")
    for name, stand_in in names.items():
        library.define(name + SCHEMAS[stand_in])
        library.impl(name, globals()[stand_in], device)
        if stand_in in _FAKES:
            torch.library.register_fake(f"{namespace}::{name}", _FAKES[stand_in], lib=library)
    return library


@contextlib.contextmanager
def registered(libraries: dict[str, dict[str, str]], device: str = "CPU") -> Generator[None]:
    """While it lasts, these `libraries` are there: the stand-ins by their names, by namespace."""
    held = [register(*each, device=device) for each in libraries.items()]
    try:
        yield
    finally:
        for library in held:
            library._destroy()
