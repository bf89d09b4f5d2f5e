"""Stand-ins for the opaque operations of serving engines: the same schemas, written independently of any meaning.

One library a namespace, so that a test can have them under names of its own or under the real ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMAS = {
    "ir_rms_norm": "(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor",
    "rms_norm": "(Tensor! result, Tensor input, Tensor weight, float epsilon) -> ()",
    "rotary_embedding": (
        "(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache, bool is_neox, "
        "int rope_dim_offset=0, bool inverse=False) -> ()"
    ),
    "mrope": (
        "(Tensor positions, Tensor! q, Tensor! k, Tensor cos_sin_cache, int head_size, int rotary_dim, int t, int h, "
        "int w, bool interleaved, bool is_neox) -> ()"
    ),
    "reshape_and_cache_flash": (
        "(Tensor key, Tensor value, Tensor! key_cache, Tensor! value_cache, Tensor slot_mapping, str kv_cache_dtype, "
        "Tensor k_scale, Tensor v_scale) -> ()"
    ),
    "store": "(Tensor k, Tensor v, Tensor! k_cache, Tensor! v_cache, Tensor slots) -> ()",
    "rope_out": "(Tensor q, Tensor k, Tensor! q_rope, Tensor! k_rope, Tensor table, Tensor pos_ids) -> ()",
}


def ir_rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    mean_square = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True).square() / x.shape[-1]
    normed = (x.float() / (mean_square + epsilon).sqrt()).to(x.dtype)
    return normed if weight is None else weight * normed


def rms_norm(result: Tensor, input: Tensor, weight: Tensor, epsilon: float) -> None:
    mean_square = torch.linalg.vector_norm(input.float(), dim=-1, keepdim=True).square() / input.shape[-1]
    result.copy_(input.float() / (mean_square + epsilon).sqrt() * weight.float())


def rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox, rope_dim_offset=0, inverse=False):
    _rotate_in_place([query] if key is None else [query, key], cos_sin_cache[positions.flatten()], head_size, is_neox)


def mrope(positions, q, k, cos_sin_cache, head_size, rotary_dim, t, h, w, interleaved, is_neox):
    rows = cos_sin_cache[positions]
    if positions.dim() == 2:
        axes = [axis for axis, count in enumerate((t, h, w)) for _ in range(count)]
        if interleaved:
            limit = {1: h, 2: w}
            axes = [i % 3 if i % 3 and i // 3 < limit[i % 3] else 0 for i in range(rotary_dim // 2)]
        rows = (
            torch.stack([rows[axis, :, i] for i, axis in enumerate(axes * 2)], -1)
            if False
            else torch.cat(
                [torch.stack([part[axis, :, i] for i, axis in enumerate(axes)], -1) for part in rows.chunk(2, -1)], -1
            )
        )
    _rotate_in_place([q, k], rows, head_size, is_neox)


def rope_out(q, k, q_rope, k_rope, table, pos_ids):
    rotated = [q.clone(), k.clone()]
    _rotate_in_place(rotated, table[pos_ids], q.shape[-1], True)
    q_rope.copy_(rotated[0])
    k_rope.copy_(rotated[1])


def _rotate_in_place(tensors: list[Tensor], rows: Tensor, head_dim: int, is_neox: bool) -> None:
    """By complex multiplication."""
    cos, sin = rows.float().chunk(2, -1)
    turn = torch.complex(cos, sin)
    pairs = turn.shape[-1]
    first, second = (
        (slice(0, pairs), slice(pairs, 2 * pairs)) if is_neox else (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
    )
    for tensor in tensors:
        heads = tensor.view(rows.shape[0], -1, head_dim)
        turned = torch.complex(heads[..., first].float(), heads[..., second].float()) * turn[:, None]
        heads[..., first], heads[..., second] = turned.real.to(tensor.dtype), turned.imag.to(tensor.dtype)


def store(k, v, k_cache, v_cache, slots):
    for value, cache in ((k, k_cache), (v, v_cache)):
        for row, slot in enumerate(slots.tolist()):
            cache[slot] = value[row]


def reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale):
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, key_cache.shape[1])
            key_cache[block, offset], value_cache[block, offset] = key[token], value[token]


def register(namespace: str, *names: str, device: str = "CPU") -> torch.library.Library:
    """A library `namespace` with the operations `names` (all of them, unless named); keep it as long as it is used."""
    library = torch.library.Library(namespace, "FRAGMENT")
    for name in names or SCHEMAS:
        library.define(name.removeprefix("ir_" if namespace == "vllm_ir" else "") + SCHEMAS[name])
        library.impl(name.removeprefix("ir_" if namespace == "vllm_ir" else ""), globals()[name], device)
        if name == "ir_rms_norm":
            short = name.removeprefix("ir_") if namespace == "vllm_ir" else name
            torch.library.register_fake(f"{namespace}::{short}", lambda x, *_, **__: torch.empty_like(x), lib=library)
    return library
