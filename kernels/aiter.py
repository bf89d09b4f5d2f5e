"""AMD's aiter: the contract of ``fused_qk_norm_mrope_3d_cache_pts_quant_shuffle``, argument by argument.

aiter checks little of this itself and reads the rest as garbage, so every line is checked here. Read from ROCm/aiter
at e4048607a535 (2026-08-22). The PyPI project named ``aiter`` is an unrelated asyncio helper: importing it proves
nothing, so the function itself is looked for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fx_fusion.kernels.contract import Kernel, Problem, Target, mrope_section

FUNCTION = "fused_qk_norm_mrope_3d_cache_pts_quant_shuffle"


@dataclass(frozen=True)
class Requirement:
    """What aiter expects of one argument."""

    argument: str
    expected: str
    holds: Callable[[Problem], bool]
    found: Callable[[Problem], object]


_HALF = (torch.bfloat16, torch.float16)

CONTRACT: tuple[Requirement, ...] = (
    Requirement("qkv", "bfloat16 or float16", lambda p: p.dtype in _HALF, lambda p: p.dtype),
    Requirement("qkv", "q, k, v in one contiguous tensor", lambda p: p.packed_qkv, lambda p: "other columns"),
    Requirement("qw", "the dtype of qkv", lambda p: p.weight_dtypes[0] == p.dtype, lambda p: p.weight_dtypes[0]),
    Requirement("kw", "the dtype of qkv", lambda p: p.weight_dtypes[1] == p.dtype, lambda p: p.weight_dtypes[1]),
    Requirement(
        "cos_sin", "one table, cos half, sin half", lambda p: p.packed_table, lambda p: "rows or another table"
    ),
    Requirement("cos_sin", "the dtype of qkv", lambda p: p.angle_dtype == p.dtype, lambda p: p.angle_dtype),
    Requirement("positions", "int64", lambda p: p.positions_dtype == torch.int64, lambda p: p.positions_dtype),
    Requirement("positions", "3 axes", lambda p: p.num_axes == 3, lambda p: p.num_axes),
    Requirement("mrope_section_", "sections", lambda p: mrope_section(p.axes) is not None, lambda p: list(p.axes)),
    Requirement("head_size", "64, 128 or 256", lambda p: p.head_dim in (64, 128, 256), lambda p: p.head_dim),
    Requirement("eps", "a norm on q and on k", lambda p: None not in (p.q_eps, p.k_eps), lambda p: (p.q_eps, p.k_eps)),
    Requirement("eps", "one value for q and k", lambda p: p.q_eps == p.k_eps, lambda p: (p.q_eps, p.k_eps)),
    Requirement("slot_mapping", "int64", lambda p: p.slots_dtype == torch.int64, lambda p: p.slots_dtype),
    Requirement("slot_mapping", "one cache", lambda p: not p.per_sequence_cache, lambda p: "a cache per sequence"),
    Requirement("slot_mapping", "one number", lambda p: not p.separate_blocks, lambda p: "a block and an offset"),
    Requirement("k_cache", "the dtype of qkv", lambda p: p.cache_dtype == p.dtype, lambda p: p.cache_dtype),
    Requirement("k_cache", "a unit lane stride", lambda p: p.cache_stride[3] == 1, lambda p: p.cache_stride[3]),
)


def refuses(problem: Problem, target: Target) -> str | None:
    for line in CONTRACT:
        if not line.holds(problem):
            return f"argument {line.argument}: expected {line.expected}, found {line.found(problem)}"
    return None


def unavailable(target: Target) -> str | None:
    if _is_unrelated():
        return installed()
    if target.platform != "hip":
        return f"aiter runs on AMD GPUs, the target is {target.name}"
    return installed() or "this version of fx_fusion knows aiter's contract but does not call it yet"


def installed() -> str | None:
    """None if AMD's aiter is installed, else what was found instead."""
    if importlib.util.find_spec("aiter") is None:
        return "aiter is not installed; build it from https://github.com/ROCm/aiter (it is not on PyPI)"
    if _is_unrelated():
        return (
            "the installed package 'aiter' is the unrelated asyncio helper from PyPI, not AMD's; "
            "uninstall it and build https://github.com/ROCm/aiter"
        )
    return None


def _is_unrelated() -> bool:
    """Told by metadata, so that asking imports nothing (AMD's distribution is named ``amd-aiter``)."""
    try:
        distribution = importlib.metadata.distribution("aiter")
    except importlib.metadata.PackageNotFoundError:
        return False
    return "async" in (distribution.metadata.get("Summary") or "").lower()


KERNEL = Kernel("aiter", unavailable, refuses)
