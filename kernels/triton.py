"""The Triton kernel: its contract, and a launch now."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fx_fusion.kernels.contract import Kernel, Problem, Target
from fx_fusion.kernels.tile import Tile
from fx_fusion.kernels.triton_launch import (
    ACTIVATIONS,
    FLOAT8,
    MAX_AXES,
    MAX_HEAD_DIM,
    Launch,
    dtype_names,
    plan,
)


def refuses(problem: Problem, target: Target) -> str | None:
    caches = (*ACTIVATIONS, *FLOAT8)
    weights = {dtype for dtype in problem.weight_dtypes if dtype is not None}
    if problem.dtype not in ACTIVATIONS:
        return f"argument q: expected one of {dtype_names(ACTIVATIONS)}, found {problem.dtype}"
    if problem.cache_dtype not in caches:
        return f"argument k_cache: expected one of {dtype_names(caches)}, found {problem.cache_dtype}"
    if not weights <= set(ACTIVATIONS):
        found = dtype_names(sorted(weights, key=str))
        return f"argument q_weight: expected one of {dtype_names(ACTIVATIONS)}, found {found}"
    if problem.weight_dtypes[0] != problem.weight_dtypes[1]:
        return f"arguments q_weight, k_weight: expected two of one dtype or none, found {problem.weight_dtypes}"
    if (problem.q_eps is None) != (problem.k_eps is None):
        return f"arguments q_eps, k_eps: expected two or none, found {problem.q_eps}, {problem.k_eps}"
    if problem.angle_dtype not in ACTIVATIONS:
        return f"argument cos: expected one of {dtype_names(ACTIVATIONS)}, found {problem.angle_dtype}"
    if problem.cache_dtype == torch.float8_e4m3fnuz and target.platform == "cuda":
        return f"argument k_cache: {problem.cache_dtype} is AMD's; Triton has no such pointers on {target.name}"
    if problem.head_dim > MAX_HEAD_DIM:
        return f"argument head_dim: expected at most {MAX_HEAD_DIM}, found {problem.head_dim}"
    if problem.num_axes > MAX_AXES:
        return f"argument positions: expected at most {MAX_AXES} axes, found {problem.num_axes}"
    return None


def unavailable(target: Target) -> str | None:
    if target.platform not in ("cuda", "hip"):
        return f"Triton kernels run on GPUs, the target is {target.name}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


KERNEL = Kernel("triton", unavailable, refuses)


def qk_norm_rope_cache(
    *operands: Tensor | None, return_k: bool, tile: Tile | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Launch the kernel now. See :func:`fx_fusion.op.qk_norm_rope_cache`."""
    q, k, *_ = operands
    assert q is not None and k is not None
    if q.device.type != "cuda":
        raise ValueError(
            f"argument q: expected a tensor on a CUDA or ROCm device for implementation='triton', found {q.device}"
        )
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device) if return_k else None
    launch = _plan_once(operands, options, tile)
    if launch.grid[0]:
        *inputs, k_cache, v_cache = operands
        with torch.cuda.device(q.device):
            kernel()[launch.grid](
                *inputs,
                *(as_bytes(cache) for cache in (k_cache, v_cache)),
                q_out,
                k_out,
                *launch.arguments.values(),
                *launch.constants.values(),
                **launch.options,
            )
    return q_out, k_out if k_out is not None else q_out.new_empty(0)


#: Plans of calls that ran: making one takes the host longer than a launch, and a model makes few kinds of calls.
_plans: dict[Any, Launch] = {}
_MOST_PLANS = 1024


def _plan_once(operands: Sequence[Tensor | None], options: dict[str, Any], tile: Tile | None) -> Launch:
    """The plan of this call; of calls that differ in the tensors' contents alone, made once. So is the look for a
    measured tile, which takes a file's date.
    """
    seen = [t if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in operands]
    asked = (*seen, tile, *{**options, "axes": tuple(options["axes"])}.items())
    found = _plans.get(asked)
    if found is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        found = _plans[asked] = plan(*operands, **options, tile=tile)  # pyright: ignore[reportArgumentType]
    return found


def as_bytes(cache: Any) -> Tensor:
    """A float8 cache as bytes: Triton has no pointers to some of the formats on some devices."""
    return cache.view(torch.uint8) if cache.dtype in FLOAT8 else cache


def kernel() -> Any:
    """The kernel itself; imported late, since Triton is not everywhere."""
    from fx_fusion.kernels.qk_norm_rope_cache import qk_norm_rope_cache

    return qk_norm_rope_cache


@functools.cache
def with_warps(num_warps: int) -> Any:
    """The kernel as a graph holds it, with one configuration, hence nothing to tune."""
    import triton

    return triton.autotune(configs=[triton.Config({}, num_warps=num_warps)], key=[])(kernel())
