"""The Triton kernel of own_fusion.py; imported on a GPU only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(x, gate, weight, out, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    y = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    y = y * (1.0 / tl.sqrt(tl.sum(y * y) / width + eps)) * w / (1.0 + tl.exp(-g))
    tl.store(out + row + column, y.to(out.dtype.element_ty), mask=inside)


def launch(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x, gate: [..., N], N at most 64k; weight: [N]. Returns [..., N], contiguous, in x's dtype."""
    x, gate, weight = x.contiguous(), gate.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    _kernel[(x.numel() // width,)](x, gate, weight, out, width, eps, BLOCK=triton.next_power_of_2(width))
    return out
