"""SwiGLU, ``silu(gate) * up``: the operation ``fx_fusion::swiglu``, its reference and its Triton kernel."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Elements of a row that one program handles, and its warps: reading two and writing one, enough to be in flight.
_BLOCK, _WARPS = 1024, 4


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` in float32 (float64 for float64), rounded once."""
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


@torch.library.custom_op("fx_fusion::swiglu", mutates_args=())
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, contiguous, in their dtype.

    Args:
        gate, up: [..., N] of one shape and dtype; any strides (halves of a packed projection will do). On a GPU, with
            a unit last stride and rows evenly apart, one launch; else the reference.
    """
    launch = _launch(gate, up)
    return reference(gate, up).contiguous() if launch is None else launch()


@swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _launch(gate: Tensor, up: Tensor) -> Any:
    """A launch of the Triton kernel, or None where it cannot serve."""
    if gate.device.type != "cuda" or importlib.util.find_spec("triton") is None or gate.numel() == 0:
        return None
    if gate.dtype not in (torch.float16, torch.bfloat16, torch.float32) or gate.dim() == 0:
        return None
    strides = _row_stride(gate), _row_stride(up)
    if None in strides:
        return None
    return functools.partial(_run, gate, up, strides)


def _row_stride(x: Tensor) -> int | None:
    """The distance of rows (all dimensions but the last, flattened), or None if it varies."""
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        return None
    dims = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
    if not dims:
        return x.shape[-1]
    row = dims[-1][1]
    extent = row
    for size, stride in reversed(dims):
        if stride != extent:
            return None
        extent = stride * size
    return row


def _run(gate: Tensor, up: Tensor, strides: tuple[int, int]) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    width = gate.shape[-1]
    rows = gate.numel() // width
    grid = (rows, -(-width // _BLOCK))
    with torch.cuda.device(gate.device):
        _kernel()[grid](gate, up, out, *strides, width, BLOCK=_BLOCK, num_warps=_WARPS)
    return out


@functools.cache
def _kernel() -> Any:
    from fx_fusion.kernels.swiglu.kernel import swiglu_kernel

    return swiglu_kernel
