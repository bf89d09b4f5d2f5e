"""AMD's aiter: its contract, argument by argument, and the call.

One of its functions serves three axes, a sibling one. They check little themselves and read the rest as garbage, so
every line is checked here; and they change often, so their first use on a device is checked too (self_check.py). Read
from ROCm/aiter at e4048607a535 (2026-08-22). The PyPI project named ``aiter`` is an unrelated asyncio helper: importing
it proves nothing, so the function itself is looked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fx_fusion.kernels.qk_norm_rope_cache import reference, self_check
from fx_fusion.kernels.qk_norm_rope_cache.agreement import Launch
from fx_fusion.kernels.qk_norm_rope_cache.aiter.call import Call, Operands, Options, launch, prepare, problem
from fx_fusion.kernels.qk_norm_rope_cache.specialization import Signature
from fx_fusion.kernels.qk_norm_rope_cache.triton import implementation as triton
from fx_fusion.kernels.target import Kernel, Problem, Target, mrope_section

THREE_AXES = "fused_qk_norm_mrope_3d_cache_pts_quant_shuffle"
ONE_AXIS = "fused_qk_norm_rope_cache_pts_quant_shuffle"

HALF = (torch.bfloat16, torch.float16)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


# --- the contract -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Requirement:
    """What aiter expects of one argument."""

    argument: str
    expected: str
    holds: Callable[[Problem], bool]
    found: Callable[[Problem], object]


def _fills_k_out(p: Problem) -> bool:
    """The operation returns k in its own dtype for every token. What aiter returns has the cache's dtype, and rows of
    skipped slots are left unwritten: the same only where there is nothing to convert and nothing to skip.
    """
    return not p.return_k or (p.cache_dtype == p.dtype and not p.skip_negative_slots)


def _is_power_of_two(number: int | None) -> bool:
    return number is not None and number > 0 and number & (number - 1) == 0


CONTRACT: tuple[Requirement, ...] = (
    Requirement("qkv", "bfloat16 or float16", lambda p: p.dtype in HALF, lambda p: p.dtype),
    Requirement("qkv", "q, k, v in one contiguous tensor", lambda p: p.packed_qkv, lambda p: "other columns"),
    Requirement("qw", "the dtype of qkv", lambda p: p.weight_dtypes[0] == p.dtype, lambda p: p.weight_dtypes[0]),
    Requirement("kw", "the dtype of qkv", lambda p: p.weight_dtypes[1] == p.dtype, lambda p: p.weight_dtypes[1]),
    Requirement(
        "cos_sin", "one table, cos half, sin half", lambda p: p.packed_table, lambda p: "rows or another table"
    ),
    Requirement("cos_sin", "the dtype of qkv", lambda p: p.angle_dtype == p.dtype, lambda p: p.angle_dtype),
    Requirement("positions", "int64", lambda p: p.positions_dtype == torch.int64, lambda p: p.positions_dtype),
    Requirement("positions", "1 or 3 axes", lambda p: p.num_axes in (1, 3), lambda p: p.num_axes),
    Requirement(
        "mrope_section_",
        "sections",
        lambda p: p.num_axes == 1 or mrope_section(p.axes) is not None,
        lambda p: list(p.axes),
    ),
    Requirement("head_size", "64, 128 or 256", lambda p: p.head_dim in (64, 128, 256), lambda p: p.head_dim),
    Requirement("eps", "a norm on q and on k", lambda p: None not in (p.q_eps, p.k_eps), lambda p: (p.q_eps, p.k_eps)),
    Requirement("eps", "one value for q and k", lambda p: p.q_eps == p.k_eps, lambda p: (p.q_eps, p.k_eps)),
    Requirement("gemma_norm", "False with 1 axis", lambda p: p.num_axes == 3 or not p.gemma_norm, lambda p: True),
    Requirement("slot_mapping", "int64", lambda p: p.slots_dtype == torch.int64, lambda p: p.slots_dtype),
    Requirement("slot_mapping", "one cache", lambda p: not p.per_sequence_cache, lambda p: "a cache per sequence"),
    Requirement(
        "block_size",
        "a power of two",
        lambda p: not p.separate_blocks or _is_power_of_two(p.block_size),
        lambda p: p.block_size,
    ),
    Requirement(
        "k_cache", "the dtype of qkv or float8_e4m3", lambda p: p.cache_dtype in (p.dtype, *FLOAT8),
        lambda p: p.cache_dtype,
    ),
    Requirement("k_cache", "a unit lane stride", lambda p: p.cache_stride[3] == 1, lambda p: p.cache_stride[3]),
    # Read on the host: a tensor in a graph would lie on the GPU, or split the graph.
    Requirement("k_scale, v_scale", "a number", lambda p: not p.scale_on_device, lambda p: "a tensor"),
    Requirement(
        "k_scale, v_scale", "none, as aiter divides only what it converts",
        lambda p: not p.scaled or p.cache_dtype in FLOAT8, lambda p: "one",
    ),
    Requirement(
        "k_out", "no rotated k, or a cache of k's dtype where no slot is skipped", _fills_k_out,
        lambda p: "skipped slots" if p.skip_negative_slots else p.cache_dtype,
    ),
)  # fmt: skip


def refuses(problem: Problem, target: Target) -> str | None:
    return _broken_line(problem) or _refuses_float8(problem, target)


@functools.cache
def _broken_line(problem: Problem) -> str | None:
    for line in CONTRACT:
        if not line.holds(problem):
            return f"argument {line.argument}: expected {line.expected}, found {line.found(problem)}"
    return None


def _refuses_float8(problem: Problem, target: Target) -> str | None:
    """Whatever float8 the cache has, aiter writes the one that the device converts to."""
    if problem.cache_dtype not in FLOAT8:
        return None
    name = _architecture(target)
    fnuz, fn = name == "gfx942", name == "gfx950" or name.startswith("gfx12")
    if (problem.cache_dtype == torch.float8_e4m3fnuz and fnuz) or (problem.cache_dtype == torch.float8_e4m3fn and fn):
        return None
    expected = "float8_e4m3fnuz on gfx942, float8_e4m3fn on gfx950 and gfx12"
    return f"argument k_cache: expected {expected}, found {problem.cache_dtype} on {name}"


def _architecture(target: Target) -> str:
    if target.name != "hip" or torch.version.hip is None or not torch.cuda.is_available():
        return target.name
    return torch.cuda.get_device_properties().gcnArchName.split(":")[0]


# --- is it there? -------------------------------------------------------------------------------------------------


def unavailable(target: Target) -> str | None:
    if _is_unrelated():
        return installed()
    if target.platform != "hip":
        return f"aiter runs on AMD GPUs, the target is {target.name}"
    return installed()


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


def _module() -> Any:
    """Imported late: it is not everywhere, and takes seconds."""
    return importlib.import_module("aiter")


def _function(name: str) -> Callable[..., None]:
    function = getattr(_module(), name, None)
    if function is None:
        raise RuntimeError(installed() or f"the installed aiter has no function {name}; update it")
    return function


# --- the call -----------------------------------------------------------------------------------------------------


def qk_norm_rope_cache(*operands: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Call aiter now, or the next best kernel if aiter does not agree with the reference here.

    See :func:`fx_fusion.qk_norm_rope_cache`. An index outside its table or its cache counts modulo the size; but where
    negative slots are skipped, a slot beyond the end is written beyond the end.

    Raises:
        ValueError: for what aiter would read as garbage.
        FirstUseInCapture: if aiter was not used like this before, and a graph is being captured.
    """
    call = _checked(*operands, **options)
    verdict = self_check.verdict("aiter", _launch, Signature.of(*operands, **options))
    if verdict.reason is not None:
        return _next_best(call.qkv.device)(*operands, **options)
    return launch(call, _function_for(call))


def _launch(*operands: Any, **options: Any) -> tuple[Tensor, Tensor]:
    call = _checked(*operands, **options)
    return launch(call, _function_for(call))


def _checked(*operands: Any, **options: Any) -> Call:
    given = Operands(*operands), Options(**options)
    reason = _broken_line(problem(*given))
    if reason is not None:
        raise ValueError(f"aiter: {reason}; pass it like that, or call another kernel")
    return prepare(*given)


def _function_for(call: Call) -> Callable[..., None]:
    return _function(ONE_AXIS if call.positions.shape[0] == 1 else THREE_AXES)


def _next_best(device: torch.device) -> Launch:
    runs = triton.unavailable(Target.of(device)) is None
    return triton.qk_norm_rope_cache if runs else reference.qk_norm_rope_cache
