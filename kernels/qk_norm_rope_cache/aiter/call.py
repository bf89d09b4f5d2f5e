"""One call of aiter: every argument in the form and the order that aiter expects, and the launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fx_fusion.kernels.qk_norm_rope_cache.aiter import arguments
from fx_fusion.kernels.qk_norm_rope_cache.aiter.arguments import Cache, violation
from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import CacheLayout
from fx_fusion.kernels.target import Problem, mrope_section


class Operands(NamedTuple):
    """Tensors of :func:`fx_fusion.qk_norm_rope_cache`, in the schema's order."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    cos: Tensor
    sin: Tensor
    positions: Tensor | None
    slots: Tensor
    blocks: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    k_cache: Tensor
    v_cache: Tensor


class Options(NamedTuple):
    """Everything else."""

    k_layout: CacheLayout
    v_layout: CacheLayout
    k_scale_value: float | None
    v_scale_value: float | None
    q_eps: float | None
    k_eps: float | None
    gemma_norm: bool
    rotary_dim: int
    is_neox: bool
    axes: Sequence[int]
    saturate: bool
    skip_negative_slots: bool
    return_k: bool


class Call(NamedTuple):
    """A call that keeps the contract. Its tensors are views of the operands."""

    operands: Operands
    options: Options
    qkv: Tensor
    q_weight: Tensor
    k_weight: Tensor
    table: Tensor
    positions: Tensor
    k_cache: Cache
    v_cache: Cache
    eps: float


def problem(operands: Operands, options: Options) -> Problem:
    """What the contract asks about; where tensors lie in memory is for :func:`prepare` to see."""
    q, k = operands.q, operands.k
    layout = options.k_layout
    in_blocks = operands.blocks is not None
    return Problem(
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        head_dim=q.shape[3],
        rotary_dim=options.rotary_dim,
        is_neox=options.is_neox,
        gemma_norm=options.gemma_norm,
        q_eps=options.q_eps,
        k_eps=options.k_eps,
        dtype=q.dtype,
        cache_dtype=operands.k_cache.dtype,
        weight_dtypes=(_dtype(operands.q_weight), _dtype(operands.k_weight)),
        angle_dtype=operands.cos.dtype,
        packed_qkv=True,
        packed_table=operands.positions is not None and 2 * operands.cos.shape[-1] == options.rotary_dim,
        positions_dtype=_dtype(operands.positions),
        num_axes=0 if operands.positions is None else operands.positions.shape[0],
        axes=tuple(options.axes),
        slots_dtype=operands.slots.dtype,
        separate_blocks=in_blocks,
        per_sequence_cache=not in_blocks and layout.num_blocks != 1,
        # The lanes of the shuffle layout are checked where it is recovered.
        cache_stride=(None, None, None, 1),
        return_k=options.return_k,
        skip_negative_slots=options.skip_negative_slots,
        block_size=int(layout.block_size),
        scaled=(options.k_scale_value, options.v_scale_value) != (None, None),
        scale_on_device=operands.k_scale is not None or operands.v_scale is not None,
    )


def _dtype(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def prepare(operands: Operands, options: Options) -> Call:
    """Recover what aiter is passed; launches nothing.

    Raises:
        ValueError: for operands that do not lie in memory as aiter reads them.
    """
    head_dim, in_blocks = operands.q.shape[3], operands.blocks is not None
    k_cache = arguments.cache("k_cache", operands.k_cache, options.k_layout, in_blocks)
    v_cache = arguments.cache("v_cache", operands.v_cache, options.v_layout, in_blocks)
    for name, ours, theirs in (
        ("dtype", v_cache.view.dtype, k_cache.view.dtype),
        ("blocks", options.v_layout[:2], options.k_layout[:2]),
        ("shuffle layout", v_cache.shuffled, k_cache.shuffled),
    ):
        if ours != theirs:
            raise violation("v_cache", f"the {name} of k_cache, {theirs}", ours)
    assert operands.positions is not None and options.q_eps is not None, "the contract asks for both"
    return Call(
        operands,
        options,
        qkv=arguments.packed_qkv(operands.q, operands.k, operands.v),
        q_weight=arguments.weight("qw", operands.q_weight, head_dim),
        k_weight=arguments.weight("kw", operands.k_weight, head_dim),
        table=arguments.packed_table(operands.cos, operands.sin),
        positions=operands.positions,
        k_cache=k_cache,
        v_cache=v_cache,
        eps=options.q_eps,
    )


def launch(call: Call, function: Callable[..., None]) -> tuple[Tensor, Tensor]:
    """Call `function`, the one for as many axes as `call` has."""
    q, k, options = call.operands.q, call.operands.k, call.options
    batch, seq, num_heads, head_dim = q.shape
    num_kv_heads, num_tokens = k.shape[2], batch * seq
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # aiter's signature has both or none: v_out is not read here.
    k_out, v_out = (torch.empty(k.shape, dtype=k.dtype, device=k.device) if options.return_k else None for _ in "kv")
    if not num_tokens:
        return q_out, k_out if k_out is not None else q_out.new_empty(0)
    positions, mrope = _positions(call, batch, seq)
    slots = arguments.slot_mapping(
        call.operands.slots, call.operands.blocks, options.k_layout, options.skip_negative_slots
    )
    # By position: names have changed more often than the order.
    with torch.cuda.device_of(q):
        function(
            call.qkv,
            call.q_weight,
            call.k_weight,
            call.table,
            positions,
            num_tokens,
            num_heads,
            num_kv_heads,
            num_kv_heads,
            head_dim,
            options.is_neox,
            *mrope,
            call.eps,
            q_out.view(num_tokens, num_heads, head_dim),
            call.k_cache.view,
            call.v_cache.view,
            slots.expand(batch, seq).reshape(num_tokens).contiguous(),
            arguments.host_scale(options.k_scale_value),
            arguments.host_scale(options.v_scale_value),
            None if k_out is None else k_out.view(num_tokens, num_kv_heads, head_dim),
            None if v_out is None else v_out.view(num_tokens, num_kv_heads, head_dim),
            options.return_k,
            call.k_cache.shuffled,
            call.k_cache.block_size,
            arguments.group_size(call.k_cache.view.dtype),
            options.rotary_dim,
            *((options.gemma_norm,) if mrope else ()),
        )
    return q_out, k_out if k_out is not None else q_out.new_empty(0)


def _positions(call: Call, batch: int, seq: int) -> tuple[Tensor, tuple[list[int], bool] | tuple[()]]:
    """[3, T], and how lanes choose among them; or [T] for one axis."""
    axes = call.positions.shape[0]
    rows = arguments.table_rows(call.positions, call.table.shape[0]).expand(axes, batch, seq).reshape(axes, -1)
    if axes == 1:
        return rows[0], ()
    sections = mrope_section(tuple(call.options.axes))
    assert sections is not None, "the contract asks for sections"
    return rows, (list(sections[0]), sections[1])
