"""What a launch of the Triton kernel is told besides its tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fx_fusion.kernels import tuned
from fx_fusion.kernels.cache_layout import CacheLayout, Size
from fx_fusion.kernels.tile import Tile, choose_tile
from fx_fusion.kernels.tuned_file import Shape

FLOAT8 = {torch.float8_e4m3fn: "e4m3fn", torch.float8_e4m3fnuz: "e4m3fnuz", torch.float8_e5m2: "e5m2"}
ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 512
MAX_AXES = 4


@dataclass(frozen=True)
class Launch:
    """One launch: sizes may be symbolic. The grid is (tiles of tokens, groups of heads)."""

    grid: tuple[Size, Size]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    tile: Tile

    @property
    def options(self) -> dict[str, Any]:
        """How the kernel is launched. Without early launch `launch_pdl` is left out: AMD's compiler knows no such."""
        early = {"launch_pdl": True} if self.constants["WAITS_FOR_PREDECESSOR"] else {}
        return {"num_warps": self.tile.num_warps, **early}


@functools.cache
def wave_size_of(device: torch.device) -> int:
    """Threads of a warp: 64 on AMD's CDNA, else 32."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


@functools.cache
def converts_float8(device: torch.device) -> bool:
    """Whether float8 is rounded by the GPU's converter (NVIDIA's, from compute capability 8.9 on), not in integers."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


@functools.cache
def launches_early(device: torch.device) -> bool:
    """Whether a launch may begin before the kernel ahead of it has ended, which it then waits for itself (programmatic
    dependent launch): on NVIDIA GPUs from compute capability 9.0 on.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def plan(
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
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    k_layout: CacheLayout,
    v_layout: CacheLayout,
    k_scale_value: float | None,
    v_scale_value: float | None,
    q_eps: float | None,
    k_eps: float | None,
    gemma_norm: bool,
    rotary_dim: int,
    is_neox: bool,
    axes: Sequence[int],
    saturate: bool,
    skip_negative_slots: bool,
    tile: Tile | None = None,
) -> Launch:
    """All that a launch is told besides its tensors; also of fake tensors. For the arguments see
    :func:`fx_fusion.op.qk_norm_rope_cache`.
    """
    _check(q, k, v, q_weight, k_weight, q_eps, k_eps)
    batch, seq, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    num_tokens = batch * seq
    tile = tile or _tuned_tile(q, num_kv_heads, rotary_dim)
    tile = tile or choose_tile(num_tokens, num_heads, num_kv_heads, head_dim, wave_size_of(q.device))
    heads = tile.heads if tile.heads_per_program is None else tile.heads_per_program
    cos_strides, sin_strides = (_angle_strides(rows, positions) for rows in (cos, sin))
    _check_lanes("cos", head_dim, cos_strides[-1])
    _check_lanes("sin", head_dim, sin_strides[-1])
    _check_lanes("k_cache", head_dim, k_layout.lane_stride, k_layout.lane_group_stride)
    _check_lanes("v_cache", head_dim, v_layout.lane_stride, v_layout.lane_group_stride)
    arguments = {
        "num_tokens": num_tokens,
        "seq_len": seq,
        "heads_per_program": heads,
        **_named(("q_batch_stride", "q_token_stride", "q_head_stride"), q.stride()[:3]),
        **_named(("k_batch_stride", "k_token_stride", "k_head_stride"), k.stride()[:3]),
        **_named(("v_batch_stride", "v_token_stride", "v_head_stride"), v.stride()[:3]),
        **_named(("cos_batch_stride", "cos_row_stride", "cos_lane_stride"), cos_strides),
        **_named(("sin_batch_stride", "sin_row_stride", "sin_lane_stride"), sin_strides),
        "cos_table_rows": 0 if positions is None else cos.shape[0],
        "sin_table_rows": 0 if positions is None else sin.shape[0],
        "positions_axis_stride": 0 if positions is None else positions.stride(0),
        **_named(
            ("positions_batch_stride", "positions_token_stride"),
            (0, 0) if positions is None else _grid_strides(positions, 1),
        ),
        **_named(("slots_batch_stride", "slots_token_stride"), _grid_strides(slots)),
        **_named(
            ("blocks_batch_stride", "blocks_token_stride"), (0, 0) if blocks is None else _grid_strides(blocks)
        ),
        **_cache_arguments("k", k_layout),
        **_cache_arguments("v", v_layout),
    }  # fmt: skip
    constants = {
        "ONE_SEQUENCE": _is_one(batch),
        "HEADS_ALIKE": _are_same(q.stride()[:3], k.stride()[:3]) and _are_same(q.stride()[:3], v.stride()[:3]),
        "ANGLES_ALIKE": _are_same((cos.shape[0], *cos_strides), (sin.shape[0], *sin_strides)),
        "NARROW": _is_narrow(q, k, v, cos, sin, positions, slots, blocks),
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "ROTARY_DIM": rotary_dim,
        "REST_WIDTH": _rest_width(head_dim, rotary_dim),
        "IS_NEOX": is_neox,
        "Q_EPS": q_eps,
        "K_EPS": k_eps,
        "GEMMA_NORM": gemma_norm,
        "ANGLE_PER_LANE": cos.shape[-1] == rotary_dim,
        "NUM_AXES": 0 if positions is None else max(axes) + 1,
        "AXES": _pack(tuple(axes)),
        "SKIP_NEGATIVE_SLOTS": skip_negative_slots,
        "SATURATE": saturate,
        "K_SCALE": k_scale_value,
        "V_SCALE": v_scale_value,
        "K_SLOT_GROUP": k_layout.slot_group,
        "K_LANE_GROUP": k_layout.lane_group,
        "V_SLOT_GROUP": v_layout.slot_group,
        "V_LANE_GROUP": v_layout.lane_group,
        "K_FLOAT8": FLOAT8.get(k_cache.dtype),
        "V_FLOAT8": FLOAT8.get(v_cache.dtype),
        "CONVERTS_FLOAT8": converts_float8(q.device),
        "TOKENS": tile.tokens,
        "HEADS": tile.heads,
        "ALL_HEADS": tile.heads_per_program is None,
        "WAITS_FOR_PREDECESSOR": launches_early(q.device),
    }
    groups = _cdiv(num_heads, heads) + 2 * _cdiv(num_kv_heads, heads)
    return Launch((_cdiv(num_tokens, tile.tokens), groups), arguments, constants, tile)


def _tuned_tile(q: Tensor, num_kv_heads: int, rotary_dim: int) -> Tile | None:
    batch, seq, num_heads, head_dim = q.shape
    shape = Shape.of(num_heads, num_kv_heads, head_dim, rotary_dim, q.dtype)
    measured = tuned.timing(shape, batch * seq, q.device)
    return measured and measured.tile


def _rest_width(head_dim: int, rotary_dim: int) -> int:
    """How many of the lanes that do not rotate the kernel takes at a time: as many as form the halves that do, if
    that makes a few even parts, else all of them.
    """
    rest, half = head_dim - rotary_dim, rotary_dim // 2
    return half if rest % half == 0 and rest <= 8 * half else rest


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_eps: float | None,
    k_eps: float | None,
) -> None:
    """What the kernel would not notice itself. The rest of a wrong call, Triton refuses to compile."""
    if q.dtype not in ACTIVATIONS or not q.dtype == k.dtype == v.dtype:
        found = dtype_names([q.dtype, k.dtype, v.dtype])
        raise ValueError(f"arguments q, k, v: expected one dtype of {dtype_names(ACTIVATIONS)}, found {found}")
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"argument q: expected a head_dim of at most {MAX_HEAD_DIM}, found {q.shape[-1]}")
    dtypes = [None if weight is None else weight.dtype for weight in (q_weight, k_weight)]
    if dtypes[0] != dtypes[1]:
        raise ValueError(f"arguments q_weight, k_weight: expected two of one dtype or none, found {dtypes}")
    if (q_eps is None) != (k_eps is None):
        raise ValueError(f"arguments q_eps, k_eps: expected two or none, found {q_eps}, {k_eps}")


def _check_lanes(name: str, head_dim: int, *strides: Size) -> None:
    """The kernel counts from the first lane of a row to its last in 31 bits."""
    for stride in strides:
        if not isinstance(stride, torch.SymInt) and head_dim * stride >= 1 << 31:
            raise ValueError(
                f"argument {name}: expected the lanes of a row within 2^31 elements, found them {stride} apart"
            )


def _is_same(a: Size, b: Size) -> bool:
    """Without comparing symbolic sizes, which would guard on the answer."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return not isinstance(a, torch.SymInt) and not isinstance(b, torch.SymInt) and a == b


def _are_same(these: Sequence[Size], those: Sequence[Size]) -> bool:
    return all(_is_same(a, b) for a, b in zip(these, those, strict=True))


def _cdiv(count: Size, size: Size) -> Size:
    return (count + size - 1) // size


def _named(names: Sequence[str], values: Sequence[Size]) -> dict[str, Size]:
    return dict(zip(names, values, strict=True))


def _grid_strides(index: Tensor, dim: int = 0) -> tuple[Size, Size]:
    """Strides along batch and sequence, [B or 1, S] from `dim` on; 0 along a batch of one, which all share."""
    return (0 if _is_one(index.shape[dim]) else index.stride(dim)), index.stride(dim + 1)


def _is_narrow(*tensors: Tensor | None) -> bool:
    """Whether 31 bits are known to be enough for an offset into each, and into a contiguous result of its shape."""
    return all(tensor is None or _reach(tensor) < 1 << 31 for tensor in tensors)


def _reach(tensor: Tensor) -> float:
    """The furthest element from the first, or how many there are; infinity where a size is symbolic."""
    if any(isinstance(size, torch.SymInt) for size in (*tensor.shape, *tensor.stride())):
        return math.inf
    furthest = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return max(furthest, tensor.numel())


def _is_one(size: Size) -> bool:
    """Without asking a symbolic size, which would guard on the answer."""
    return not isinstance(size, torch.SymInt) and size == 1


def _angle_strides(angles: Tensor, positions: Tensor | None) -> tuple[Size, Size, Size]:
    if positions is not None:
        return 0, angles.stride(0), angles.stride(1)
    return (*_grid_strides(angles), angles.stride(2))


def _cache_arguments(name: str, layout: CacheLayout) -> dict[str, Size]:
    return {
        f"{name}_cache_offset": layout.offset,
        f"{name}_num_blocks": layout.num_blocks,
        f"{name}_block_size": layout.block_size,
        f"{name}_block_stride": layout.block_stride,
        f"{name}_slot_stride": layout.slot_stride,
        f"{name}_cache_head_stride": layout.head_stride,
        f"{name}_lane_stride": layout.lane_stride,
        f"{name}_slot_group_stride": layout.slot_group_stride,
        f"{name}_lane_group_stride": layout.lane_group_stride,
    }


@functools.cache
def _pack(axes: tuple[int, ...]) -> int:
    """One bit a pair for each axis but the first, in whole words of 32 bits an axis, as the kernel reads them."""
    bits_of_an_axis = 32 * _cdiv(len(axes), 32)
    return sum(1 << (bits_of_an_axis * (axis - 1) + pair) for pair, axis in enumerate(axes) if axis)


def dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
