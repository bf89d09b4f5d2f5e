"""AMD's aiter: its contract, argument by argument.

aiter checks little itself and reads the rest as garbage, so every line is checked here. Read from ROCm/aiter at
e4048607a535 (2026-08-22).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fx_fusion.graph.sizes import same
from fx_fusion.kernels.qk_norm_rope_cache.aiter import arguments
from fx_fusion.kernels.qk_norm_rope_cache.aiter.arguments import FLOAT8
from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import Size
from fx_fusion.kernels.qk_norm_rope_cache.call import Call
from fx_fusion.kernels.qk_norm_rope_cache.mrope import mrope_section
from fx_fusion.kernels.target import Target

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Requirement:
    """What aiter expects of one argument."""

    argument: str
    expected: str
    holds: Callable[[Call[Tensor]], bool]
    found: Callable[[Call[Tensor]], object]
    of_memory: bool = False
    """What :func:`~fx_fusion.kernels.qk_norm_rope_cache.aiter.arguments.prepare` says of a real call in more detail."""


def _dtype(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def _num_axes(call: Call[Tensor]) -> int:
    return 0 if call.positions is None else call.positions.shape[0]


def _fills_k_out(call: Call[Tensor]) -> bool:
    """The operation returns k in its own dtype for every token. What aiter returns has the cache's dtype, and rows of
    skipped slots are left unwritten: the same only where there is nothing to convert and nothing to skip.
    """
    told = call.options
    return not told.return_k or (call.k_cache.dtype == call.q.dtype and not told.skip_negative_slots)


def _is_power_of_two(size: Size) -> bool:
    return isinstance(size, int) and size > 0 and size & (size - 1) == 0


def _in_blocks(call: Call[Tensor]) -> bool:
    return call.blocks is not None


def _has_scale(call: Call[Tensor]) -> bool:
    told = call.options
    return (call.k_scale, call.v_scale, told.k_scale_value, told.v_scale_value) != (None,) * 4


CONTRACT: tuple[Requirement, ...] = (
    Requirement("qkv", "bfloat16 or float16", lambda c: c.q.dtype in HALF, lambda c: c.q.dtype),
    Requirement("qkv", "q, k, v in one contiguous tensor", arguments.is_packed_qkv, lambda c: "other columns", True),
    Requirement("qw", "the dtype of qkv", lambda c: _dtype(c.q_weight) == c.q.dtype, lambda c: _dtype(c.q_weight)),
    Requirement("kw", "the dtype of qkv", lambda c: _dtype(c.k_weight) == c.q.dtype, lambda c: _dtype(c.k_weight)),
    Requirement("cos_sin", "one table, cos half, sin half", arguments.is_in_halves, lambda c: "rows or another table"),
    Requirement(
        "cos_sin", "one table, cos half, sin half", arguments.is_packed_table, lambda c: "rows or another table", True
    ),
    Requirement("cos_sin", "the dtype of qkv", lambda c: c.cos.dtype == c.q.dtype, lambda c: c.cos.dtype),
    Requirement(
        "positions", "int64", lambda c: _dtype(c.positions) == torch.int64, lambda c: _dtype(c.positions)
    ),
    Requirement("positions", "1 or 3 axes", lambda c: _num_axes(c) in (1, 3), _num_axes),
    Requirement(
        "mrope_section_", "sections", lambda c: _num_axes(c) == 1 or mrope_section(c.options.axes) is not None,
        lambda c: list(c.options.axes),
    ),
    Requirement("head_size", "64, 128 or 256", lambda c: c.q.shape[3] in (64, 128, 256), lambda c: c.q.shape[3]),
    Requirement(
        "eps", "a norm on q and on k", lambda c: None not in (c.options.q_eps, c.options.k_eps),
        lambda c: (c.options.q_eps, c.options.k_eps),
    ),
    Requirement(
        "eps", "one value for q and k", lambda c: c.options.q_eps == c.options.k_eps,
        lambda c: (c.options.q_eps, c.options.k_eps),
    ),
    Requirement(
        "gemma_norm", "False with 1 axis", lambda c: _num_axes(c) == 3 or not c.options.gemma_norm, lambda c: True
    ),
    Requirement("slot_mapping", "int64", lambda c: c.slots.dtype == torch.int64, lambda c: c.slots.dtype),
    Requirement(
        "slot_mapping", "one cache", lambda c: _in_blocks(c) or same([c.options.k_layout.num_blocks], [1]),
        lambda c: "a cache per sequence",
    ),
    Requirement(
        "block_size", "a power of two", lambda c: not _in_blocks(c) or _is_power_of_two(c.options.k_layout.block_size),
        lambda c: c.options.k_layout.block_size,
    ),
    Requirement(
        "k_cache", "the dtype of qkv or float8_e4m3", lambda c: c.k_cache.dtype in (c.q.dtype, *FLOAT8),
        lambda c: c.k_cache.dtype,
    ),
    Requirement(
        "k_cache", "a unit lane stride", lambda c: same([c.options.k_layout.lane_stride], [1]),
        lambda c: c.options.k_layout.lane_stride,
    ),
    Requirement(
        "v_cache", "the dtype of k_cache", lambda c: c.v_cache.dtype == c.k_cache.dtype, lambda c: c.v_cache.dtype
    ),
    # Read on the host: a tensor in a graph would lie on the GPU, or split the graph.
    Requirement(
        "k_scale, v_scale", "a number", lambda c: c.k_scale is None and c.v_scale is None, lambda c: "a tensor"
    ),
    Requirement(
        "k_scale, v_scale", "none, as aiter divides only what it converts",
        lambda c: not _has_scale(c) or c.k_cache.dtype in FLOAT8, lambda c: "one",
    ),
    Requirement(
        "k_out", "no rotated k, or a cache of k's dtype where no slot is skipped", _fills_k_out,
        lambda c: "skipped slots" if c.options.skip_negative_slots else c.k_cache.dtype,
    ),
)  # fmt: skip


def broken_line(call: Call[Tensor], *, of_memory: bool = True) -> str | None:
    """The first requirement that `call` does not meet, wherever it runs; without `of_memory`, of the others."""
    for line in CONTRACT:
        if (of_memory or not line.of_memory) and not line.holds(call):
            return f"argument {line.argument}: expected {line.expected}, found {line.found(call)}"
    return None


def refuses(call: Call[Tensor], target: Target) -> str | None:
    """What aiter would read as garbage, or write otherwise than the operation does."""
    return broken_line(call) or arguments.misplaced(call) or _refuses_float8(call, target)


def _refuses_float8(call: Call[Tensor], target: Target) -> str | None:
    """Whatever float8 the cache has, aiter writes the one that the device converts to."""
    dtype = call.k_cache.dtype
    if dtype not in FLOAT8:
        return None
    name = _architecture(target)
    fnuz, fn = name == "gfx942", name == "gfx950" or name.startswith("gfx12")
    if (dtype == torch.float8_e4m3fnuz and fnuz) or (dtype == torch.float8_e4m3fn and fn):
        return None
    expected = "float8_e4m3fnuz on gfx942, float8_e4m3fn on gfx950 and gfx12"
    return f"argument k_cache: expected {expected}, found {dtype} on {name}"


def _architecture(target: Target) -> str:
    if target.name != "hip" or torch.version.hip is None or not torch.cuda.is_available():
        return target.name
    return torch.cuda.get_device_properties().gcnArchName.split(":")[0]
