"""The fused operation, ``torch.ops.fx_fusion.qk_norm_rope_cache``, and its entry for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fx_fusion.kernels.call import to_arguments
from fx_fusion.kernels.measure import tuned
from fx_fusion.kernels.operation import Operation
from fx_fusion.kernels.qk_norm_rope_cache.aiter.implementation import Aiter
from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import CacheLayout
from fx_fusion.kernels.qk_norm_rope_cache.call import Call, Options, empty_results, with_typed_caches
from fx_fusion.kernels.qk_norm_rope_cache.reference import Reference
from fx_fusion.kernels.qk_norm_rope_cache.shape import shape_of
from fx_fusion.kernels.qk_norm_rope_cache.triton.implementation import Triton
from fx_fusion.kernels.target import Target


def _measured(call: Call[Tensor], target: Target) -> Mapping[str, float]:
    """Microseconds of a call like this, of the kernels that were measured on the device that is `target`."""
    device = torch.device("cuda")
    here = tuned.machine(device)
    if here is None or target.name not in (here.architecture, Target.of(device).name):
        return {}
    found = tuned.timing(*shape_of(call), device)
    return found.microseconds if found else {}


OPERATION: Operation[Call[Tensor]] = Operation(
    "qk_norm_rope_cache",
    Call,
    Options,
    "(Tensor, Tensor)",
    empty=empty_results,
    decode=with_typed_caches,
    measured=_measured,
)

# In the order in which `auto` prefers them where nothing was measured. Triton comes first: on an H200, aiter's
# geometry, ported, took 1.3 to 4 times as long at every number of tokens from 1 to 16384; and our call of aiter
# launches more kernels, for indices that count from the end. On AMD nothing was measured: ``python -m fx_fusion tune``
# does, and what it finds goes before this order.
for _implementation in (Triton(), Aiter(), Reference()):
    OPERATION.register(_implementation)


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
    **others: Any,
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
        implementation: which kernel runs: ``"reference"``, ``"triton"``, ``"aiter"``, or one that was registered.
        others: options that have a default: see :class:`fx_fusion.kernels.qk_norm_rope_cache.call.Options`.

    An index outside its table or cache: the reference raises ``IndexError`` (on a GPU, a device-side assertion). The
    Triton kernel reads and writes nothing there: such a slot stores nothing, such a position gives NaN in the lanes
    that it turns.

    Raises:
        FirstUseInCapture: while a graph is being captured, of a kernel that is not compiled for such a call yet.

    Returns:
        q rotated, [B, S, Hq, D] contiguous in q's dtype, and k rotated, [B, S, Hk, D] (empty without `return_k`).
        Both are rounded once, from float32.
    """
    (k_tensor, k_number), (v_tensor, v_number) = map(_scale, (k_scale, v_scale))
    options = Options(
        CacheLayout.of(k_cache, "k_cache"), CacheLayout.of(v_cache, "v_cache"), k_number, v_number, q_eps, k_eps,
        gemma_norm, rotary_dim, is_neox, tuple(axes), saturate, skip_negative_slots, return_k, **others,
    )  # fmt: skip
    return OPERATION.overload(
        q, k, v, q_weight, k_weight, cos, sin, positions, slots, blocks, k_tensor, v_tensor, k_cache, v_cache,
        **to_arguments(options), implementation=implementation,
    )  # fmt: skip


def _scale(scale: Tensor | float | None) -> tuple[Tensor | None, float | None]:
    return (scale, None) if isinstance(scale, Tensor) else (None, scale)
