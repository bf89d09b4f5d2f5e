"""The fused operation, ``torch.ops.fx_fusion.qk_norm_rope_cache``: schema, fake, and dispatch to a kernel.

Registered with ``Library.define`` and ``impl``: a ``torch.library.custom_op`` adds about twice as much to a
call (docs/verification.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fx_fusion.graph.torch_compat import OpOverload
from fx_fusion.kernels.capture_guard import only_warm
from fx_fusion.kernels.qk_norm_rope_cache import reference
from fx_fusion.kernels.qk_norm_rope_cache.aiter import implementation as aiter
from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import CacheLayout, as_float8
from fx_fusion.kernels.qk_norm_rope_cache.triton import implementation as triton

_LIBRARY = torch.library.Library("fx_fusion", "DEF")

SCHEMA = (
    "qk_norm_rope_cache(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, "
    "Tensor? positions, Tensor slots, Tensor? blocks, Tensor? k_scale, Tensor? v_scale, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, *, SymInt[] k_layout, SymInt[] v_layout, float? k_scale_value, float? v_scale_value, "
    "float? q_eps, float? k_eps, bool gemma_norm, int rotary_dim, bool is_neox, int[] axes, bool saturate, "
    "bool skip_negative_slots, bool return_k, str implementation, str? float8=None) -> (Tensor, Tensor)"
)

_LIBRARY.define(SCHEMA, tags=(torch.Tag.needs_exact_strides,))

_KERNELS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": reference.qk_norm_rope_cache,
    "triton": triton.qk_norm_rope_cache,
    "aiter": aiter.qk_norm_rope_cache,
}


def qk_norm_rope_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    slots: Tensor,
    blocks: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    q_eps: float | None,
    k_eps: float | None,
    gemma_norm: bool = False,
    rotary_dim: int,
    is_neox: bool = True,
    axes: Sequence[int],
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    saturate: bool = False,
    skip_negative_slots: bool = False,
    return_k: bool = False,
    implementation: str = "reference",
    float8: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise and rotate every head of q and k, and store k and v in their caches, in one call.

    Tokens form a [batch, seq] grid; a flat batch of T tokens is [1, T].

    Args:
        q: [B, S, Hq, D]; any batch, token and head stride, unit lane stride (a view of a packed projection will do).
        k, v: [B, S, Hk, D], likewise.
        q_weight, k_weight: [D], any float dtype, or None.
        cos, sin: rows [B or 1, S, W], or with `positions` tables [P, W]. W is rotary_dim / 2 (one angle a pair of
            lanes) or rotary_dim (one a lane). Any strides.
        positions: [A, B or 1, S] integer rows of the tables, A axes (1 for rope, 3 for mRoPE); negative ones count
            from the end, as in PyTorch.
        slots: [B or 1, S] integer. The cache row, or the offset in its block if `blocks` is given.
        blocks: [B or 1, S] integer, or None: then sequence b writes to ``cache[b]`` (``cache[0]`` if there is one).
        k_cache, v_cache: [N0, N1, Hk, D] views of any strides, or aiter's shuffle layout, k [N0, Hk, D / x, N1, x] and
            v [N0, Hk, N1 / x, D, x]; written in place at ``[block, slot]``. A cache of another dtype gets the value
            rounded to k's dtype, then divided by its scale and converted. Duplicate slots are undefined.
        q_eps, k_eps: added to the mean square under the root; None for no norm.
        gemma_norm: multiply by ``1 + weight`` instead of ``weight``.
        rotary_dim: lanes that rotate, counted from lane 0; the others are copied.
        is_neox: pairs are rotary_dim / 2 apart; else adjacent (GPT-J).
        axes: for each pair of lanes, the row of `positions` that it takes its angle from.
        k_scale, v_scale: a number, fixed for good in a captured graph, or a tensor of one element on the device,
            read at every call.
        saturate: a float8 cache gets its largest number where the value is beyond its range, instead of NaN (e5m2:
            infinity), which is what ``Tensor.to`` gives.
        skip_negative_slots: a negative slot stores nothing; else it counts from the end, as in PyTorch.
        return_k: also return the rotated k, for every token.
        implementation: which kernel runs: ``"reference"`` or ``"triton"``.
        float8: what the bytes of caches are, ``"float8_e4m3fn"`` for example, if their dtype does not say so (uint8).

    An index outside its table or cache: the reference raises ``IndexError`` (on a GPU, a device-side assertion). The
    Triton kernel reads and writes nothing there: such a slot stores nothing, such a position gives NaN in the lanes
    that it turns.

    Raises:
        FirstUseInCapture: while a graph is being captured, of a kernel that is not compiled for such a call yet.

    Returns:
        q rotated, [B, S, Hq, D] contiguous in q's dtype, and k rotated, [B, S, Hk, D] (empty without `return_k`).
        Both are rounded once, from float32.
    """
    k_tensor, k_number = _scale(k_scale)
    v_tensor, v_number = _scale(v_scale)
    return OVERLOAD(
        q, k, v, q_weight, k_weight, cos, sin, positions, slots, blocks, k_tensor, v_tensor, k_cache, v_cache,
        k_layout=CacheLayout.of(k_cache, "k_cache"), v_layout=CacheLayout.of(v_cache, "v_cache"),
        k_scale_value=k_number, v_scale_value=v_number, q_eps=q_eps, k_eps=k_eps, gemma_norm=gemma_norm,
        rotary_dim=rotary_dim, is_neox=is_neox, axes=axes, saturate=saturate, skip_negative_slots=skip_negative_slots,
        return_k=return_k, implementation=implementation, float8=float8,
    )  # fmt: skip


def _scale(scale: Tensor | float | None) -> tuple[Tensor | None, float | None]:
    return (scale, None) if isinstance(scale, Tensor) else (None, scale)


def run(
    *operands: Any,
    k_layout: Sequence[int],
    v_layout: Sequence[int],
    implementation: str,
    float8: str | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    if implementation not in _KERNELS:
        raise ValueError(
            f"qk_norm_rope_cache: implementation must be one of {sorted(_KERNELS)}, got {implementation!r}"
        )
    layouts = {"k_layout": CacheLayout(*k_layout), "v_layout": CacheLayout(*v_layout)}
    *rest, k_cache, v_cache = operands
    caches = (as_float8(k_cache, float8), as_float8(v_cache, float8))
    with only_warm(f"the kernel {implementation}"):
        return _KERNELS[implementation](*rest, *caches, **layouts, **options)


def _fake(q: Tensor, k: Tensor, *_: Tensor | None, return_k: bool, **__: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape if return_k else (0,))


_LIBRARY.impl("qk_norm_rope_cache", run, "CompositeExplicitAutograd")
torch.library.register_fake("fx_fusion::qk_norm_rope_cache", _fake, lib=_LIBRARY)

OVERLOAD: OpOverload = torch.ops.fx_fusion.qk_norm_rope_cache.default
