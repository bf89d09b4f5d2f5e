"""Input on which a replacement is run beside what it replaces: ordinary, tiny, huge, infinite, equal, and at the edges.

Integers go wherever they are valid: over the whole of their dtype, or, where they index something, from the first row
to the last, and counted from the end where that runs too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fx_fusion.function_fusions.domain import random_integers, whole_range
from fx_fusion.function_fusions.reference import Reference

Likes = Mapping[str, torch.Tensor]
"""For each tensor parameter one that has its shape, dtype and strides; a tensor on the meta device will do."""

Range = tuple[int, int]

#: Where exponentials overflow float32, and where squares do.
_LARGE = (1e3, 1e20)

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Trial:
    """
    Attributes:
        name: what is particular, for a sentence.
        large: may something overflow?
        equal: are there equal values, of which an order may take any first?
    """

    name: str
    values: Mapping[str, torch.Tensor]
    large: bool = False
    equal: bool = False
    infinite: bool = False


class Trials:
    """
    Args:
        literals: numbers of the graph, around which values are drawn too.
        same: parameters that are given one tensor, by the parameter that it is drawn for.
    """

    def __init__(
        self, reference: Reference, likes: Likes, literals: Sequence[float], same: Mapping[str, str], seed: int = 3
    ) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._likes, self._same = likes, same
        self._centres = torch.tensor(sorted({0.0, 1.0, -1.0, *(float(x) for x in literals if abs(x) < 1e6)}))
        self.ranges: dict[str, Range] = {}
        for name, like in likes.items():
            if is_integer(like):
                self.ranges[name] = self._range(reference, name)

    @property
    def indexes(self) -> bool:
        """Are there integers that are not valid everywhere?"""
        return any(found != whole_range(self._likes[name].dtype) for name, found in self.ranges.items())

    def __iter__(self) -> Iterator[Trial]:
        for scale in (1.0, 1e-3, 30.0):
            yield Trial(f"input of scale {scale:g}", self._values(lambda x, s=scale: x * s))
        yield Trial("zeros", self._values(lambda x: x * 0.0), equal=True)
        yield Trial("rows of mixed scales", self._values(self._by_rows))
        yield Trial("input near the literals of the graph", self._values(self._centred), equal=True)
        for chosen, like in self._likes.items():
            if like.is_floating_point() and chosen not in self._same and _has_infinity(like.dtype):
                for scale in _LARGE:
                    values = self._with(chosen, lambda x, s=scale, d=like.dtype: _within(x * s, d))
                    yield Trial(f"{chosen} of scale {scale:g}", values, large=True)
                yield Trial(f"infinities in {chosen}", self._with(chosen, self._infinite), infinite=True)

    def _values(self, change: Any) -> dict[str, torch.Tensor]:
        found = {name: self._value(name, like, change) for name, like in self._likes.items()}
        return {name: found[self._same.get(name, name)] for name in found}

    def _value(self, name: str, like: torch.Tensor, change: Any) -> torch.Tensor:
        shape = [int(size) for size in like.shape]
        if like.is_floating_point() or like.is_complex():
            value = torch.randn(shape, generator=self._generator, dtype=torch.complex64 if like.is_complex() else None)
            value = change(value).to(like.dtype)
        elif like.dtype == torch.bool:
            value = torch.randint(0, 2, shape, generator=self._generator).bool()
        else:
            value = self._integers(shape, like.dtype, self.ranges.get(name, (0, 0)))
        return _laid_out(value, like)

    def _integers(self, shape: list[int], dtype: torch.dtype, valid: Range) -> torch.Tensor:
        if valid == whole_range(dtype):
            return random_integers(tuple(shape), dtype, self._generator)
        least, most = valid
        found = distinct(shape, most + 1, self._generator)
        if least < 0:
            back = torch.rand(shape, generator=self._generator) < 0.5
            found = torch.where(back & (found - most - 1 >= least), found - most - 1, found)
        return found.to(dtype)

    def _by_rows(self, x: torch.Tensor) -> torch.Tensor:
        scales = torch.tensor([1e-4, 1e-2, 1.0, 1e2])
        return x * scales[torch.randint(4, (*x.shape[:-1], 1)[-x.dim() :], generator=self._generator)] if x.dim() else x

    def _centred(self, x: torch.Tensor) -> torch.Tensor:
        pick = torch.randint(len(self._centres), x.shape, generator=self._generator)
        spread = torch.tensor([0.0, 1e-6, 1.0])[torch.randint(3, x.shape, generator=self._generator)]
        return self._centres.to(torch.float32)[pick] + x * spread

    def _infinite(self, x: torch.Tensor) -> torch.Tensor:
        """Minus infinity, as in a mask, for one value in sixteen, at least one."""
        flat = x.reshape(-1).clone()
        places = torch.randperm(max(flat.numel(), 1), generator=self._generator)[: max(1, flat.numel() // 16)]
        places = places[: flat.numel()]
        flat[places] = -float("inf")
        return flat.reshape(x.shape)

    def _with(self, chosen: str, change: Any) -> dict[str, torch.Tensor]:
        """Ordinary values, those of `chosen` changed."""
        values = self._values(lambda x: x)
        changed = self._value(chosen, self._likes[chosen], change)
        return {name: changed if self._same.get(name, name) == chosen else value for name, value in values.items()}

    # --- where integers are valid -----------------------------------------------------------------------------------

    def _range(self, reference: Reference, name: str) -> Range:
        """On the CPU, where an index that is not valid raises. Those that come before stay at their greatest."""
        whole = whole_range(self._likes[name].dtype)
        if all(self._runs(reference, name, number) for number in whole):
            return whole
        if not self._runs(reference, name, 0):
            return (0, self._rows_of(reference) - 1)
        sizes = sorted(_sizes(reference, self._likes), reverse=True)
        most = next((size - 1 for size in sizes if size - 1 <= whole[1] and self._runs(reference, name, size - 1)), 0)
        least = -most - 1
        return (least if least >= whole[0] and self._runs(reference, name, least) else 0, most)

    def _runs(self, reference: Reference, name: str, number: int) -> bool:
        values = self._values(lambda x: x)
        for known, (_, most) in self.ranges.items():
            values[known] = torch.full_like(values[known], most)
        values[name] = torch.full_like(values[name], number)
        try:
            reference.run(values, _CPU)
        except Exception:
            return False
        return True

    def _rows_of(self, reference: Reference) -> int:
        """Of a graph that cannot run on the CPU: the fewest rows of what it changes, or else of any tensor."""
        changed = [self._likes[name] for name in reference.mutated]
        rows = [int(like.shape[0]) for like in changed or self._likes.values() if like.dim() > 1]
        return max(1, min(rows, default=1))


def is_integer(like: torch.Tensor) -> bool:
    return not like.is_floating_point() and not like.is_complex() and like.dtype != torch.bool


def distinct(shape: Sequence[int], bound: int, generator: torch.Generator) -> torch.Tensor:
    """Integers below `bound`, the first and the last of them among several, none twice where there are enough."""
    count = torch.Size(shape).numel()
    if count > bound:
        return torch.randint(0, bound, tuple(shape), generator=generator)
    small = 2 < bound < 1 << 20
    inner = torch.randperm(bound - 2, generator=generator) if small else _spread(bound - 2, count, generator)
    pool = torch.cat([torch.tensor([0, bound - 1])[:bound], inner + 1])[: max(count, 4)]
    return pool[torch.randperm(len(pool), generator=generator)[:count]].reshape(tuple(shape))


def _spread(bound: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` different numbers below a large `bound`: one of each of as many equal parts."""
    count = max(0, min(count, bound))
    part = bound // max(count, 1)
    return torch.arange(count) * part + torch.randint(0, max(part, 1), (count,), generator=generator)


def _sizes(reference: Reference, likes: Likes) -> set[int]:
    values = [node.meta.get("val") for node in reference.nodes]
    found = {size for value in values if isinstance(value, torch.Tensor) for size in reference.sizes.shape(value)}
    return {size for size in {*found, *(int(size) for like in likes.values() for size in like.shape)} if size > 1}


def _within(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    most = torch.finfo(dtype).max / 4
    return x.clamp(-most, most)


def _has_infinity(dtype: torch.dtype) -> bool:
    return dtype.itemsize > 1


def _laid_out(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """With the strides of `like`."""
    stride = [int(step) for step in like.stride()]
    if not value.dim() or list(value.stride()) == stride:
        return value
    if 0 in stride:
        one = tuple(slice(0, 1) if step == 0 else slice(None) for step in stride)
        return value[one].expand(value.shape)
    return torch.empty_strided(value.shape, stride, dtype=value.dtype).copy_(value)
