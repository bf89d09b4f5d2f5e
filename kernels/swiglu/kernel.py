"""The Triton kernel of SwiGLU: program (row, block) reads gate and up once and writes the result once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def swiglu_kernel(gate, up, out, gate_row, up_row, width, BLOCK: tl.constexpr):
    """Row r of gate begins at r * gate_row; of up at r * up_row; out is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    y = g / (1.0 + tl.exp(-g)) * u
    tl.store(out + row * width + column, y.to(out.dtype.element_ty), mask=inside)
