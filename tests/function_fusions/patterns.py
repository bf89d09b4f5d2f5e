"""Three patterns, as a user would write them, and their replacements."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from function_fusions import ops  # noqa: F401  (registers the operations)


def rms_norm(x, weight, eps: float):
    """A captured float."""
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def my_rms_norm(x, weight, eps):
    return torch.ops.own_tests.rms_norm(x, weight, eps)


def add_rms_norm(x, residual, weight, eps: float):
    """Several outputs."""
    added = x + residual
    return F.rms_norm(added, (added.shape[-1],), weight, eps), added


def my_add_rms_norm(x, residual, weight, eps):
    return torch.ops.own_tests.add_rms_norm(x, residual, weight, eps)


def silu_store(x, cache, slots, scale: float, alpha: float):
    """A mutable operation."""
    torch.ops.own_tests.store(cache, slots, F.silu(x) * alpha, scale)


def my_silu_store(x, cache, slots, scale, alpha):
    torch.ops.own_tests.silu_store(x, cache, slots, scale, alpha)


SILU_STORE_EXAMPLE = (torch.empty(5, 16), torch.empty(64, 16), torch.zeros(5, dtype=torch.int64), 0.5, 0.7)
