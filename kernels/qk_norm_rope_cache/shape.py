"""The shape that measurements of a call are kept under."""

from __future__ import annotations

from torch import Tensor

from fx_fusion.kernels.measure.tuned_file import Shape
from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import Size
from fx_fusion.kernels.qk_norm_rope_cache.call import Call


def shape_of(call: Call[Tensor]) -> tuple[Shape, Size]:
    """The shape, and the number of tokens."""
    batch, seq, num_heads, head_dim = call.q.shape
    return Shape.of(num_heads, call.k.shape[2], head_dim, call.options.rotary_dim, call.q.dtype), batch * seq
