"""What aiter is passed, recovered from the views that the operation gets. Nothing is copied but a few indices.

aiter reads most of its arguments by their address, unchecked: whatever does not lie as it expects is refused here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fx_fusion.graph.sizes import same
from fx_fusion.kernels.capture_guard import refuse_in_capture
from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import CacheLayout, Size
from fx_fusion.kernels.qk_norm_rope_cache.call import Call

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


class Violation(ValueError):
    """An operand that does not lie in memory as aiter reads it."""

    def __init__(self, argument: str, expected: object, found: object) -> None:
        self.words = f"argument {argument}: expected {expected}, found {found}"
        super().__init__(f"aiter: {self.words}; pass it like that, or call another kernel")


class Arguments(NamedTuple):
    """What aiter is passed of a call that keeps the contract: views of its operands."""

    qkv: Tensor
    q_weight: Tensor
    k_weight: Tensor
    table: Tensor
    positions: Tensor
    k_cache: Cache
    v_cache: Cache
    eps: float


def misplaced(call: Call[Tensor]) -> str | None:
    """What does not lie in memory as aiter reads it, of a call of real or fake tensors that keeps the contract."""
    try:
        prepare(call)
    except Violation as violation:
        return violation.words
    return None


def prepare(call: Call[Tensor]) -> Arguments:
    """Recover what aiter is passed; launches nothing.

    Raises:
        Violation: for operands that do not lie in memory as aiter reads them.
    """
    told, head_dim, in_blocks = call.options, call.q.shape[3], call.blocks is not None
    k_cache = cache("k_cache", call.k_cache, told.k_layout, in_blocks)
    v_cache = cache("v_cache", call.v_cache, told.v_layout, in_blocks)
    if call.v_cache.dtype != call.k_cache.dtype:
        raise Violation("v_cache", f"the dtype of k_cache, {call.k_cache.dtype}", call.v_cache.dtype)
    if not same(told.v_layout[:2], told.k_layout[:2]):
        raise Violation("v_cache", f"the blocks of k_cache, {told.k_layout[:2]}", told.v_layout[:2])
    if v_cache.shuffled != k_cache.shuffled:
        raise Violation("v_cache", f"the shuffle layout of k_cache, {k_cache.shuffled}", v_cache.shuffled)
    assert call.positions is not None and told.q_eps is not None, "the contract asks for both"
    return Arguments(
        qkv=packed_qkv(call.q, call.k, call.v),
        q_weight=weight("qw", call.q_weight, head_dim),
        k_weight=weight("kw", call.k_weight, head_dim),
        table=packed_table(call.cos, call.sin),
        positions=call.positions,
        k_cache=k_cache,
        v_cache=v_cache,
        eps=told.q_eps,
    )


# --- what must lie side by side ---------------------------------------------------------------------------------------


def is_packed_qkv(call: Call[Tensor]) -> bool:
    return _packed(_check_packed_qkv, call.q, call.k, call.v)


def is_in_halves(call: Call[Tensor]) -> bool:
    """Tables, of which each pair of lanes takes one angle."""
    return call.positions is not None and 2 * call.cos.shape[-1] == call.options.rotary_dim


def is_packed_table(call: Call[Tensor]) -> bool:
    return _packed(_check_packed_table, call.cos, call.sin)


def _packed(check: Callable[..., None], *parts: Tensor) -> bool:
    try:
        check(*parts)
    except Violation:
        return False
    return True


def packed_qkv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[T, (Hq + 2 Hk) D], of which `q`, `k` and `v` are views."""
    _check_packed_qkv(q, k, v)
    batch, seq, num_heads, head_dim = q.shape
    width = (num_heads + 2 * k.shape[2]) * head_dim
    return q.as_strided((batch * seq, width), (width, 1))


def _check_packed_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    _, seq, num_heads, head_dim = q.shape
    width = (num_heads + 2 * k.shape[2]) * head_dim
    offset = q.storage_offset()
    for name, part in (("q", q), ("k", k), ("v", v)):
        _check_place(f"qkv ({name})", part, q, (seq * width, width, head_dim, 1), offset)
        offset = offset + part.shape[2] * head_dim


def packed_table(cos: Tensor, sin: Tensor) -> Tensor:
    """[P, rotary_dim], of which `cos` is the first half and `sin` the second."""
    _check_packed_table(cos, sin)
    rows, half = cos.shape
    return cos.as_strided((rows, 2 * half), (2 * half, 1))


def _check_packed_table(cos: Tensor, sin: Tensor) -> None:
    half = cos.shape[1]
    for name, part, offset in (("cos", cos, 0), ("sin", sin, half)):
        _check_place(f"cos_sin ({name})", part, cos, (2 * half, 1), cos.storage_offset() + offset)


def _check_place(argument: str, part: Tensor, first: Tensor, strides: Sequence[Size], offset: Size) -> None:
    """`part` lies in the memory of `first`, from element `offset` on."""
    if part.dtype != first.dtype:
        raise Violation(argument, first.dtype, part.dtype)
    if any(same([size], [0]) for size in part.shape):
        return
    # The stride of a dimension of one element means nothing.
    dims = zip(part.shape, part.stride(), strides, strict=True)
    if not all(same([size], [1]) or same([found], [stride]) for size, found, stride in dims):
        raise Violation(argument, f"strides {strides}, as in one contiguous tensor", part.stride())
    if StorageWeakRef(part.untyped_storage()) != StorageWeakRef(first.untyped_storage()):
        raise Violation(argument, "memory shared with what precedes it", "memory of its own")
    if not same([part.storage_offset()], [offset]):
        raise Violation(argument, f"storage offset {offset}, next to what precedes it", part.storage_offset())


def weight(argument: str, value: Tensor | None, head_dim: int) -> Tensor:
    assert value is not None, "the contract asks for weights"
    if not same(value.shape, [head_dim]) or not same(value.stride(), [1]):
        raise Violation(
            argument, f"[{head_dim}], contiguous", f"{list(value.shape)} with strides {list(value.stride())}"
        )
    return value


class Cache(NamedTuple):
    """A cache as aiter addresses it: slot ``block * block_size + offset``."""

    view: Tensor
    block_size: Size
    """0: slots are not divided into blocks."""
    shuffled: bool


def cache(argument: str, tensor: Tensor, layout: CacheLayout, in_blocks: bool) -> Cache:
    """Strides of blocks, slots and heads are read from dimensions 0, 1 and 2; the shuffle layout has its own."""
    view = layout.view(tensor)
    if layout.lane_group or layout.slot_group:
        return _shuffled(argument, view, layout, in_blocks)
    if not same([layout.lane_stride], [1]):
        raise Violation(argument, "a unit lane stride", layout.lane_stride)
    if in_blocks:
        return Cache(view, layout.block_size, shuffled=False)
    # Blocks of one slot. Whether a version takes dimension 0 or 1 for the slots, it reads the same stride, and one that
    # reads none assumes a contiguous cache, which the self-check tells. A 3-D view is right in some versions only.
    slot_stride, head_stride = view.stride()[1:3]
    flat = view.as_strided(
        (view.shape[1], 1, *view.shape[2:]), (slot_stride, slot_stride, head_stride, 1), view.storage_offset()
    )
    return Cache(flat, 0, shuffled=False)


def _shuffled(argument: str, view: Tensor, layout: CacheLayout, in_blocks: bool) -> Cache:
    """As [N0, Hk, D / x, N1, x] of keys and [N0, Hk, N1 / x, D, x] of values."""
    keys = argument == "k_cache"
    group, other = layout.lane_group, layout.slot_group
    if not keys:
        group, other = other, group
    x = group_size(view.dtype)
    if (group, other) != (x, 0):
        what = "lanes" if keys else "slots"
        raise Violation(argument, f"{what} in groups of {x}, and nothing else in groups", f"{group} and {other}")
    if not in_blocks:
        raise Violation("slot_mapping", "a block and an offset in the shuffle layout", "a slot")
    shuffled = view.permute(0, 2, 3, 1, 4) if keys else view.permute(0, 3, 1, 4, 2)
    if not is_contiguous(shuffled):
        raise Violation(argument, "the shuffle layout, contiguous", f"strides {list(shuffled.stride())}")
    return Cache(shuffled, layout.block_size, shuffled=True)


def is_contiguous(value: Tensor) -> bool:
    """Without asking a symbolic size, which would guard on the answer."""
    extent: Size = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        # The stride of a dimension of one element means nothing.
        if not same([size], [1]) and not same([stride], [extent]):
            return False
        extent = extent * size
    return True


def group_size(cache_dtype: torch.dtype) -> int:
    """What aiter calls x: as many as fit in 16 bytes."""
    return 16 // cache_dtype.itemsize


def slot_mapping(slots: Tensor, blocks: Tensor | None, layout: CacheLayout, skip_negative: bool) -> Tensor:
    """[B or 1, S]. Negative slots are skipped by aiter; the operation may count them from the end.

    The remainder is one launch, where a comparison, a sum and a choice are three.
    """
    num_blocks, block_size = int(layout.num_blocks), int(layout.block_size)
    offsets = slots if skip_negative else torch.remainder(slots, block_size)
    if blocks is None:
        return offsets
    mapping = torch.add(offsets, torch.remainder(blocks, num_blocks), alpha=block_size)
    return torch.where(slots < 0, -1, mapping) if skip_negative else mapping


def table_rows(positions: Tensor, num_rows: int) -> Tensor:
    """At a negative position aiter reads before the table; the operation counts from the table's end."""
    return torch.remainder(positions, num_rows)


def host_scale(value: float | None) -> Tensor:
    """Read on the host, at the launch: a captured graph keeps the number, not this tensor."""
    return _host_scale(1.0 if value is None else value)


@functools.cache
def _host_scale(value: float) -> Tensor:
    refuse_in_capture(f"the scale {value} is used for the first time")
    # The device is named: models are built under torch.device("cuda"), which a plain constant would follow.
    return torch.tensor([value], dtype=torch.float32, device="cpu")
