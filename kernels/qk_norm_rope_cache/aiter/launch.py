"""One call of aiter: every argument in the form and the order that aiter expects."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fx_fusion.kernels.qk_norm_rope_cache.aiter import arguments
from fx_fusion.kernels.qk_norm_rope_cache.aiter.arguments import Arguments
from fx_fusion.kernels.qk_norm_rope_cache.call import Call, empty_results
from fx_fusion.kernels.qk_norm_rope_cache.mrope import mrope_section


def launch(call: Call[Tensor], prepared: Arguments, function: Callable[..., None]) -> tuple[Tensor, Tensor]:
    """Call `function`, the one for as many axes as `call` has, with what :func:`arguments.prepare` made of `call`."""
    q, k, options = call.q, call.k, call.options
    batch, seq, num_heads, head_dim = q.shape
    num_kv_heads, num_tokens = k.shape[2], batch * seq
    q_out, k_out = empty_results(call)
    if not num_tokens:
        return q_out, k_out
    # aiter's signature has both or none: v_out is not read here.
    fresh_k = k_out.view(num_tokens, num_kv_heads, head_dim) if options.return_k else None
    fresh_v = None if fresh_k is None else torch.empty_like(fresh_k)
    positions, mrope = _positions(call, prepared, batch, seq)
    slots = arguments.slot_mapping(call.slots, call.blocks, options.k_layout, options.skip_negative_slots)
    # By position: names have changed more often than the order.
    with torch.cuda.device_of(q):
        function(
            prepared.qkv,
            prepared.q_weight,
            prepared.k_weight,
            prepared.table,
            positions,
            num_tokens,
            num_heads,
            num_kv_heads,
            num_kv_heads,
            head_dim,
            options.is_neox,
            *mrope,
            prepared.eps,
            q_out.view(num_tokens, num_heads, head_dim),
            prepared.k_cache.view,
            prepared.v_cache.view,
            slots.expand(batch, seq).reshape(num_tokens).contiguous(),
            arguments.host_scale(options.k_scale_value),
            arguments.host_scale(options.v_scale_value),
            fresh_k,
            fresh_v,
            options.return_k,
            prepared.k_cache.shuffled,
            int(prepared.k_cache.block_size),
            arguments.group_size(prepared.k_cache.view.dtype),
            options.rotary_dim,
            *((options.gemma_norm,) if mrope else ()),
        )
    return q_out, k_out


def _positions(
    call: Call[Tensor], prepared: Arguments, batch: int, seq: int
) -> tuple[Tensor, tuple[list[int], bool] | tuple[()]]:
    """[3, T], and how lanes choose among them; or [T] for one axis."""
    axes = prepared.positions.shape[0]
    rows = arguments.table_rows(prepared.positions, prepared.table.shape[0]).expand(axes, batch, seq).reshape(axes, -1)
    if axes == 1:
        return rows[0], ()
    sections = mrope_section(call.options.axes)
    assert sections is not None, "the contract asks for sections"
    return rows, (list(sections[0]), sections[1])
