"""Does a kernel agree with the reference? As far as the roundings that it is allowed let it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fx_fusion.kernels.qk_norm_rope_cache import reference
from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import CacheLayout
from fx_fusion.kernels.qk_norm_rope_cache.call import Call, Options, scale_of

Run = Callable[[Call[Tensor]], tuple[Tensor, ...]]
"""Does a call now: :meth:`fx_fusion.kernels.operation.Implementation.run`."""


class Difference(NamedTuple):
    """The element of one result that is furthest from the reference, measured by what is allowed there."""

    result: str
    error: float
    allowed: float
    where: tuple[int, ...]
    """Its index; of a cache, its number in the tensor that holds the cache."""

    def __str__(self) -> str:
        return f"{self.result} differs by {self.error:.3g} at {list(self.where)}, where {self.allowed:.3g} is allowed"


def compare(run: Run, call: Call[Tensor]) -> tuple[Difference, ...]:
    """Do `call` by `run` and by the reference, each on caches of its own, and find how far apart their results are."""
    given, expected = _with_own_caches(call), call.map(Tensor.clone)
    before = call.map(Tensor.clone)
    q_out, k_out = run(given)
    changed = [
        Difference(f"the operand {name}", float("inf"), 0.0, ())
        for name, old in before.tensors.items()
        if old is not None and name not in _CACHES and not torch.equal(old, given.tensors[name])  # pyright: ignore[reportArgumentType]
    ]
    expected_q, expected_k = reference.qk_norm_rope_cache(expected)
    allowed = _allowed(before)
    results = (
        ("q_out", q_out, expected_q, allowed.q),
        *((("k_out", k_out, expected_k, allowed.k),) if call.options.return_k else ()),
        ("k_cache", given.k_cache, expected.k_cache, allowed.k_cache),
        ("v_cache", given.v_cache, expected.v_cache, allowed.v_cache),
    )
    return (*changed, *(_furthest(*result) for result in results))


_CACHES = ("k_cache", "v_cache")


def _with_own_caches(call: Call[Tensor]) -> Call[Tensor]:
    """The other operands stay where they are: views of one tensor must remain views of it."""
    return replace(call, k_cache=call.k_cache.clone(), v_cache=call.v_cache.clone())


def _furthest(name: str, actual: Tensor, expected: Tensor, allowed: Tensor) -> Difference:
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        return Difference(f"{name} of shape {list(actual.shape)}, {actual.dtype},", float("inf"), 0.0, ())
    actual, expected = actual.float(), expected.float()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    error = torch.where(same, 0.0, (actual - expected).abs()).nan_to_num(float("inf"), float("inf"))
    index = int(torch.argmax(error - allowed))
    where = torch.unravel_index(torch.tensor(index, device="cpu"), error.shape)
    return Difference(name, float(error.flatten()[index]), float(allowed.flatten()[index]), tuple(map(int, where)))


class _Allowed(NamedTuple):
    """How far each element of each result may be from the reference's."""

    q: Tensor
    k: Tensor
    k_cache: Tensor
    v_cache: Tensor


#: float32 sums in another order, and approximate roots and quotients.
_ARITHMETIC = 2.0**-18


def _allowed(call: Call[Tensor]) -> _Allowed:
    """From the roundings. The reference rounds q and k once. A kernel may round the normalised value before it rotates,
    half a unit in the last place of each lane of the pair, and it rounds the result. No cosine is above one, so each of
    the three is at most half a unit of the sum of the pair. A cache of another dtype may add one unit of its own, where
    two values fall on two sides of a tie; v gets there unrounded, so it may differ only if it is divided.
    """
    told, k, v = call.options, call.k, call.v
    q_allowed = _allowed_rotated(call.q, call.q_weight, told.q_eps, told)
    k_allowed = _allowed_rotated(k, call.k_weight, told.k_eps, told)
    k_scale, v_scale = scale_of(call.k_scale, told.k_scale_value), scale_of(call.v_scale, told.v_scale_value)
    k_size = _normalised(k, call.k_weight, told.k_eps, told)
    k_stored = _allowed_stored(_pair_sums(k_size, told), k_allowed, k.dtype, call.k_cache.dtype, k_scale)
    v_exact = torch.zeros_like(v, dtype=torch.float32)
    v_stored = _allowed_stored(v.float().abs(), v_exact, v.dtype, call.v_cache.dtype, v_scale)
    if v_scale is None:
        v_stored = v_exact

    def spread(stored: Tensor, cache: Tensor, layout: CacheLayout) -> Tensor:
        """To where the tokens are stored; nothing may change elsewhere."""
        target = torch.zeros_like(cache, dtype=torch.float32)
        reference.store(stored, target, layout, call.slots, call.blocks, told.skip_negative_slots)
        return target

    return _Allowed(
        q_allowed,
        k_allowed,
        spread(k_stored, call.k_cache, told.k_layout),
        spread(v_stored, call.v_cache, told.v_layout),
    )


def _allowed_rotated(x: Tensor, weight: Tensor | None, eps: float | None, told: Options) -> Tensor:
    info = torch.finfo(x.dtype)
    sums = _pair_sums(_normalised(x, weight, eps, told), told)
    return sums * (3 * info.eps / 2 + _ARITHMETIC) + info.smallest_normal * info.eps


def _normalised(x: Tensor, weight: Tensor | None, eps: float | None, told: Options) -> Tensor:
    """Magnitudes before the rotation."""
    one, zero = (torch.full((1, 1, told.rotary_dim // 2), value, device=x.device) for value in (1.0, 0.0))
    y = reference.norm_rope(x, weight, eps, told.gemma_norm, one, zero, told.rotary_dim, told.is_neox)
    return y.abs().float()


def _pair_sums(y: Tensor, told: Options) -> Tensor:
    """In each lane that rotates, the sum of its pair."""
    turned, rest = y[..., : told.rotary_dim], y[..., told.rotary_dim :]
    dim = -2 if told.is_neox else -1
    pairs = turned.unflatten(-1, (2, -1) if told.is_neox else (-1, 2))
    sums = pairs.sum(dim, keepdim=True).expand_as(pairs).flatten(-2)
    return torch.cat([sums, rest], -1)


def _allowed_stored(
    size: Tensor, allowed: Tensor, dtype: torch.dtype, cache_dtype: torch.dtype, scale: Tensor | float | None
) -> Tensor:
    if scale is None and cache_dtype == dtype:
        return allowed
    info = torch.finfo(cache_dtype)
    scale = 1.0 if scale is None else scale
    size, allowed = size / scale, allowed / scale
    return allowed + (size + allowed) * (info.eps + _ARITHMETIC) + info.smallest_normal * info.eps
