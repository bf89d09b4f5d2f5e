"""Custom operations that stand for other people's kernels. Each computes its own plain meaning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("own_tests::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps).clone()


@rms_norm.register_fake
def _(x, weight, eps):
    return torch.empty_like(x)


@torch.library.custom_op("own_tests::add_rms_norm", mutates_args=())
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    added = x + residual
    return F.rms_norm(added, (added.shape[-1],), weight, eps).clone(), added


@add_rms_norm.register_fake
def _(x, residual, weight, eps):
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("own_tests::store", mutates_args={"cache"})
def store(cache: Tensor, slots: Tensor, value: Tensor, scale: float) -> None:
    """Somebody's opaque store: the mutable operation that a pattern contains."""
    cache[slots] = (value * scale).to(cache.dtype)


@store.register_fake
def _(cache, slots, value, scale):
    return None


@torch.library.custom_op("own_tests::silu_store", mutates_args={"cache"})
def silu_store(x: Tensor, cache: Tensor, slots: Tensor, scale: float, alpha: float) -> None:
    store(cache, slots, F.silu(x) * alpha, scale)


@silu_store.register_fake
def _(x, cache, slots, scale, alpha):
    return None


@torch.library.custom_op("own_tests::mark", mutates_args=())
def mark(x: Tensor) -> Tensor:
    """What a test finds in the graph."""
    return x.clone()


@mark.register_fake
def _(x):
    return torch.empty_like(x)


@torch.library.custom_op("own_tests::attend", mutates_args=())
def attend(q: Tensor, k: Tensor) -> Tensor:
    """What takes queries and keys: nobody looks into it."""
    return q + k.mean()


@attend.register_fake
def _(q, k):
    return torch.empty_like(q)
