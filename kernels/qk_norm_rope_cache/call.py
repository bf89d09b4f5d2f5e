"""The call of ``qk_norm_rope_cache``: its tensors and its options. Everything else is derived from this declaration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, TypeVar

from torch import Tensor

from fx_fusion.kernels.call import WRITTEN, AnyCall, T
from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import CacheLayout, as_float8

U = TypeVar("U")


@dataclass(frozen=True)
class Options:
    """What the operation is told by value.

    An option with a default is one that an implementation may not know: see
    :attr:`fx_fusion.kernels.operation.Implementation.serves`.

    Attributes:
        k_layout, v_layout: where the caches lie in `k_cache` and `v_cache`.
        k_scale_value, v_scale_value: what keys and values are divided by, where that is a number.
        q_eps, k_eps: added to the mean square under the root; None for no norm.
        gemma_norm: multiply by ``1 + weight`` instead of ``weight``.
        rotary_dim: lanes that rotate, counted from lane 0; the others are copied.
        is_neox: pairs are rotary_dim / 2 apart; else adjacent (GPT-J).
        axes: for each pair of lanes, the row of `positions` that it takes its angle from.
        saturate: a float8 cache gets its largest number where the value is beyond its range.
        skip_negative_slots: a negative slot stores nothing; else it counts from the end.
        return_k: also return the rotated k, for every token.
        float8: what the bytes of caches are, if their dtype (uint8) does not say so.
    """

    k_layout: CacheLayout
    v_layout: CacheLayout
    k_scale_value: float | None
    v_scale_value: float | None
    q_eps: float | None
    k_eps: float | None
    gemma_norm: bool
    rotary_dim: int
    is_neox: bool
    axes: tuple[int, ...]
    saturate: bool
    skip_negative_slots: bool
    return_k: bool
    float8: str | None = None

    @classmethod
    def of(cls, *, k_layout: Sequence[Any], v_layout: Sequence[Any], axes: Sequence[int], **others: Any) -> Options:
        """From the arguments of the operation, whose sequences are lists."""
        return cls(CacheLayout(*k_layout), CacheLayout(*v_layout), axes=tuple(axes), **others)


@dataclass(frozen=True)
class Call(AnyCall[T], Generic[T]):
    """One call. Tokens form a [batch, seq] grid. For the shapes see :func:`fx_fusion.qk_norm_rope_cache`."""

    q: T
    k: T
    v: T
    q_weight: T | None
    k_weight: T | None
    cos: T
    sin: T
    positions: T | None
    slots: T
    blocks: T | None
    k_scale: T | None
    v_scale: T | None
    k_cache: T = field(metadata=WRITTEN)
    v_cache: T = field(metadata=WRITTEN)
    options: Options

    @staticmethod
    def of(tensors: Mapping[str, U | None], options: Options) -> Call[U]:
        return Call(**tensors, options=options)  # pyright: ignore[reportArgumentType]

    def map(self, fn: Callable[[T], U]) -> Call[U]:
        """The same call of other values: fake tensors instead of nodes, copies instead of tensors."""
        mapped = {name: None if value is None else fn(value) for name, value in self.tensors.items()}
        return Call.of(mapped, self.options)


def with_typed_caches(call: Call[Tensor]) -> Call[Tensor]:
    """`call` with its caches in the dtype of what they hold, where the option ``float8`` says what their bytes are."""
    name = call.options.float8
    if name is None:
        return call
    caches = {"k_cache": as_float8(call.k_cache, name), "v_cache": as_float8(call.v_cache, name)}
    return replace(call, **caches, options=replace(call.options, float8=None))


def empty_results(call: Call[Tensor]) -> tuple[Tensor, Tensor]:
    """The results, not yet computed: q rotated, and k rotated (empty without ``return_k``); contiguous."""
    q, k = call.q, call.k
    return q.new_empty(q.shape), k.new_empty(k.shape if call.options.return_k else (0,))


def values(options: Options) -> tuple[Any, ...]:
    """All that `options` holds, in order: part of the keys of caches that are asked at every call."""
    return tuple(getattr(options, name) for name in _OPTIONS)


_OPTIONS = tuple(each.name for each in fields(Options))


def scale_of(tensor: T | None, number: float | None) -> T | float | None:
    """A scale is a tensor, a number, or none."""
    return number if tensor is None else tensor
