"""The numbers that a comparison computes with: float64 here; a finite field can take its place.

A domain draws values, runs steps on them and tells values apart. What lies between two free steps is computed by
nothing else, so a domain whose arithmetic is exact makes the comparison of what lies between exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch.fx.node import map_aggregate

from fx_fusion.decline import Decline
from fx_fusion.function_fusions.steps import Kind, Step
from fx_fusion.graph.sizes import Sizes
from fx_fusion.graph.torch_compat import pytree
from fx_fusion.proof.evaluate import check_memory

#: Two float64 evaluations of the same analytic function differ by less, relative to the largest value of a row.
TOLERANCE = 1e-9


class Domain(Protocol):
    """One sample's arithmetic: made anew for each."""

    def fresh(self, value: Any, sizes: Sizes) -> Any:
        """Random values in the place of the fake `value`, a tensor or a tree of them."""
        ...

    def run(self, step: Step, value_of: Callable[[Step], Any], sizes: Sizes, number: Callable[[Any], Any]) -> Any:
        """The value of `step`, which is not free. `number` tells what a written number stands for."""
        ...

    def differ(self, actual: Any, expected: Any) -> float:
        """How far apart two values of one shape are, relative to the larger; 0 only if they may be equal."""
        ...

    def distance(self, a: Any, b: Any) -> float:
        """How far apart two values lie at most, where both are finite."""
        ...

    def tells(self, actual: Any, expected: Any) -> bool:
        """Is there an element that has a value on both sides?"""
        ...

    def ratio(self, a: Any, b: Any) -> float | None:
        """The one number that `a` is `b` times, by value and not by place; None if there is none."""
        ...


class Float64:
    """Every float is float64: rounding disappears. On `ordinary` input nothing overflows, so what is not finite must be
    the same on both sides.
    """

    def __init__(self, generator: torch.Generator, ordinary: bool = True) -> None:
        self.generator, self.ordinary = generator, ordinary
        self._weights: dict[int, torch.Tensor] = {}
        self._shares: dict[int, float] = {}

    def fresh(self, value: Any, sizes: Sizes) -> Any:
        return pytree.tree_map(lambda leaf: self._drawn(leaf, sizes), value)

    def _drawn(self, leaf: Any, sizes: Sizes) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return random_like(sizes.shape(leaf), leaf.dtype, self.generator)

    def run(self, step: Step, value_of: Callable[[Step], Any], sizes: Sizes, number: Callable[[Any], Any]) -> Any:
        if step.kind is Kind.SIZE:
            return sizes.value(step.node)
        if step.kind is Kind.LEAF:
            raise Decline("region.evaluation", f"{step} is a graph input whose value must not be read", [step.node])
        if step.kind is Kind.UNDEFINED:
            return torch.zeros(sizes.shape(step.value), dtype=widest(step.value.dtype))
        if step.kind is Kind.CAST:
            return value_of(step.parents[0]).to(widest(step.value.dtype))
        _check_size(step, sizes)
        args, kwargs = map_aggregate((step.args, step.kwargs), lambda leaf: _argument(leaf, value_of, sizes, number))
        if _is_from_integers(step):
            args = map_aggregate(args, lambda leaf: leaf.double() if isinstance(leaf, torch.Tensor) else leaf)
        try:
            result = self._rows(*args) if step.kind is Kind.LOOKUP else step.target(*args, **kwargs)
        except Exception as error:
            raise Decline("region.evaluation", f"{step.target} cannot run on the CPU: {error}", [step.node]) from error
        return pytree.tree_map(_widened, result)

    def _rows(self, table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """What stands for the rows `index` of `table`: a random mean of all rows, another for each number.

        A lookup is linear in its table, and takes what stands in each column from the same row. So what holds for any
        such mean of rows holds for a single row, whichever it is and however many there are: no index is ever out of
        the table, and a table of other rows gives something else.
        """
        rows = table.shape[0]
        if rows not in self._weights:
            self._weights[rows] = torch.randn(rows, generator=self.generator, dtype=torch.float64)
        weights = self._weights[rows]
        flat, places = torch.unique(index.reshape(-1), return_inverse=True)
        shares = torch.tensor([self._share(int(number)) for number in flat], dtype=torch.float64)[places]
        spread = torch.tensordot(weights, table, dims=1)
        single = table[_scattered(index.reshape(-1), rows)]
        one = (1,) * (table.dim() - 1)
        found = shares.reshape(-1, *one) * spread + (1 - shares * weights.sum()).reshape(-1, *one) * single
        return found.reshape(*index.shape, *table.shape[1:])

    def _share(self, number: int) -> float:
        if number not in self._shares:
            self._shares[number] = float(torch.randn((), generator=self.generator, dtype=torch.float64))
        return self._shares[number]

    def differ(self, actual: Any, expected: Any) -> float:
        if actual is expected:
            return 0.0
        if not isinstance(actual, torch.Tensor) or not isinstance(expected, torch.Tensor):
            return 0.0 if actual == expected else float("inf")
        if actual.shape != expected.shape:
            return float("inf")
        if actual.is_complex() and expected.is_complex():
            actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
        if not actual.is_floating_point() or not expected.is_floating_point():
            return 0.0 if torch.equal(actual, expected) else float("inf")
        return self._differ(actual, expected)

    def _differ(self, actual: torch.Tensor, expected: torch.Tensor) -> float:
        if not actual.numel():
            return 0.0
        finite = actual.isfinite() & expected.isfinite()
        same = finite | (actual == expected) | (actual.isnan() & expected.isnan())
        if self.ordinary and not same.all():
            return float("inf")
        size = torch.where(finite, expected.abs(), 0.0)
        size = size.amax(-1, keepdim=True) if size.dim() else size
        error = torch.where(finite, (actual - expected).abs(), 0.0)
        return float((error / size.clamp_min(1e-300)).max())

    def distance(self, a: Any, b: Any) -> float:
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or not a.numel():
            return 0.0
        return float(torch.where(a.isfinite() & b.isfinite(), (a - b).abs(), 0.0).max())

    def tells(self, actual: Any, expected: Any) -> bool:
        if not isinstance(actual, torch.Tensor) or not isinstance(expected, torch.Tensor) or not actual.numel():
            return True
        return actual.shape == expected.shape and bool((actual.isfinite() & expected.isfinite()).any())

    def ratio(self, a: Any, b: Any) -> float | None:
        a, b = _values(a), _values(b)
        if a.numel() != b.numel() or not a.numel():
            return None
        large = b.abs() > 0
        if not large.any():
            return 1.0 if not a.any() else None
        for x in (a, a.flip(0)):
            found = float((x / b)[large][-1])
            if found and bool(((x - found * b).abs() <= 10 * TOLERANCE * x.abs()).all()):
                return found
        return None


def _values(value: torch.Tensor) -> torch.Tensor:
    """The finite values that occur, each once, in order."""
    return torch.unique(value[value.isfinite()].double())


def _scattered(index: torch.Tensor, rows: int) -> torch.Tensor:
    """For each number some row: always the same, and others for its neighbours."""
    return (index.long() * 2654435761 + 97) % rows


def _argument(leaf: Any, value_of: Callable[[Step], Any], sizes: Sizes, number: Callable[[Any], Any]) -> Any:
    if isinstance(leaf, Step):
        return sizes.value(leaf.node) if leaf.kind is Kind.SIZE else value_of(leaf)
    if isinstance(leaf, torch.SymInt):
        return sizes.concrete(leaf)
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    return widest(leaf) if isinstance(leaf, torch.dtype) else number(leaf)


def _is_from_integers(step: Step) -> bool:
    """Does it make floats of integers? It would do so in float32."""
    if not isinstance(step.value, torch.Tensor) or not step.value.is_floating_point():
        return False
    tensors = [p.value for p in step.parents if isinstance(p.value, torch.Tensor)]
    return bool(tensors) and not any(t.is_floating_point() or t.is_complex() or t.dtype == torch.bool for t in tensors)


def _check_size(step: Step, sizes: Sizes) -> None:
    if isinstance(step.value, torch.Tensor) and step.kind is not Kind.MOVEMENT:
        check_memory(torch.Size(sizes.shape(step.value)).numel() * torch.float64.itemsize, step.node)


def _widened(leaf: Any) -> Any:
    return leaf.to(widest(leaf.dtype)) if isinstance(leaf, torch.Tensor) else leaf


def widest(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


#: Integers of 32 bits and more are drawn up to here: sums and products of a few do not wrap round, as indices do not.
_LARGE = 1 << 31


def random_like(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Floats of both signs around one (as float64), integers over the dtype's whole range, both truth values."""
    if dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=torch.complex128)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    return random_integers(shape, dtype, generator)


def random_integers(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Half of them small, half of them over the whole range."""
    least, most = whole_range(dtype)
    small = torch.randint(max(least, -8), 9, shape, generator=generator)
    large = torch.randint(least, most + 1, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, small, large).to(dtype)


def whole_range(dtype: torch.dtype) -> tuple[int, int]:
    info = torch.iinfo(dtype)
    return max(info.min, -_LARGE), min(info.max, _LARGE - 1)


Values = Mapping[str, Any]
"""A value for each tensor parameter."""
