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
    """What aiter expects of one argument, and what was found instead (None if it holds)."""

    argument: str
    expected: str
    found: Callable[[Problem], str | None]


def _unless(holds: bool, found: object) -> str | None:
    return None if holds else str(found)


CONTRACT: tuple[Requirement, ...] = (
    Requirement("qkv", "bfloat16 or float16", lambda p: _unless(p.dtype in (torch.bfloat16, torch.float16), p.dtype)),
    Requirement("qkv", "one contiguous tensor in the order q, k, v", lambda p: _unless(p.packed_qkv, "separate or gated projections")),
    Requirement("qw", "the dtype of qkv", lambda p: _unless(p.weight_dtypes[0] == p.dtype, p.weight_dtypes[0] or "no weight")),
    Requirement("kw", "the dtype of qkv", lambda p: _unless(p.weight_dtypes[1] == p.dtype, p.weight_dtypes[1] or "no weight")),
    Requirement("cos_sin", "one contiguous table, cos half then sin half, with positions", lambda p: _unless(p.packed_table, "rows of angles, or another table")),
    Requirement("cos_sin", "the dtype of qkv", lambda p: _unless(p.angle_dtype == p.dtype, p.angle_dtype)),
    Requirement("positions", "int64", lambda p: _unless(p.positions_dtype == torch.int64, p.positions_dtype)),
    Requirement("positions", "3 axes", lambda p: _unless(p.num_axes == 3, f"{p.num_axes}")),
    Requirement("mrope_section_", "sections, consecutive or interleaved", lambda p: _unless(mrope_section(p.axes) is not None, "another order of axes")),
    Requirement("head_size", "64, 128 or 256", lambda p: _unless(p.head_dim in (64, 128, 256), p.head_dim)),
    Requirement("eps", "one value for q and k", lambda p: _unless(p.q_eps is not None and p.q_eps == p.k_eps, f"{p.q_eps} and {p.k_eps}")),
    Requirement("slot_mapping", "int64", lambda p: _unless(p.slots_dtype == torch.int64, p.slots_dtype)),
    Requirement("slot_mapping", "one slot a token in one cache for all sequences", lambda p: _unless(not p.per_sequence_cache, "a cache per sequence")),
    Requirement("slot_mapping", "block * block_size + offset in one number", lambda p: _unless(not p.separate_blocks, "separate blocks and offsets")),
    Requirement("k_cache", "the dtype of qkv", lambda p: _unless(p.cache_dtype == p.dtype, p.cache_dtype)),
    Requirement("k_cache", "a unit lane stride", lambda p: _unless(p.cache_stride[3] == 1, p.cache_stride[3])),
)  # fmt: skip


def refuses(problem: Problem, target: Target) -> str | None:
    for requirement in CONTRACT:
        found = requirement.found(problem)
        if found is not None:
            return f"argument {requirement.argument}: expected {requirement.expected}, found {found}"
    return None


def unavailable(target: Target) -> str | None:
    if target.platform != "hip":
        return f"aiter runs on AMD GPUs, the target is {target.name}"
    return installed() or "this version of fx_fusion knows aiter's contract but does not call it yet"


def installed() -> str | None:
    """None if AMD's aiter is installed, else what was found instead."""
    if importlib.util.find_spec("aiter") is None:
        return "aiter is not installed; build it from https://github.com/ROCm/aiter (it is not on PyPI)"
    if not _is_amd():
        return (
            "the installed package 'aiter' is the unrelated asyncio helper from PyPI, not AMD's; "
            "uninstall it and build https://github.com/ROCm/aiter"
        )
    return None


def _is_amd() -> bool:
    """Told apart by metadata, so that asking imports nothing (AMD's distribution is named ``amd-aiter``)."""
    try:
        distribution = importlib.metadata.distribution("aiter")
    except importlib.metadata.PackageNotFoundError:
        return True
    summary = (distribution.metadata.get("Summary") or "").lower()
    return "async" not in summary


KERNEL = Kernel("aiter", unavailable, refuses)
