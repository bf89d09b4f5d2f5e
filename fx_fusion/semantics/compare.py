"""An operation and its declared meaning, run once side by side on small random arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fx_fusion.graph.sizes import Sizes
from fx_fusion.graph.torch_compat import OpOverload, pytree
from fx_fusion.proof.floats import NATIVE_TOLERANCE
from fx_fusion.proof.region_function import relative_difference
from fx_fusion.semantics.meaning import Meaning, arrange, call_meaning, qualified_name

#: Leading sizes (tokens, rows of a table, blocks of a cache) above this are cut down, alike wherever they occur.
_LARGE = 64

#: Bytes that the arguments of one comparison may take.
_MEMORY_BOUND = 256 << 20

#: At the small scale a constant under a root shows.
_SCALES = (1.0, 1e-3)


@dataclass(frozen=True)
class Comparison:
    """`difference` is the largest one, relative to the largest value; None where the two were not run, and why not."""

    place: str
    difference: float | None = None
    why_not: str | None = None
    differs: bool = False

    def __str__(self) -> str:
        if self.why_not is not None:
            return f"not compared: {self.why_not}"
        return f"compared on {self.place}: {self.difference:.1e}"


class Comparisons:
    """Each use of an operation is compared once: a use is its dtypes, sizes, strides, literals and device."""

    def __init__(self) -> None:
        self._known: dict[Any, Comparison] = {}

    def of(
        self,
        meaning: Meaning,
        op: OpOverload,
        sample: Mapping[str, Any],
        written: Sequence[str],
        sizes: Sizes,
    ) -> Comparison:
        """Compare `op` with `meaning` on arguments like `sample` (fake tensors and literals, by name)."""
        key = (meaning, qualified_name(op), *(_use(value) for value in pytree.tree_leaves(dict(sample))))
        if key not in self._known:
            self._known[key] = _compare(meaning, op, sample, written, sizes)
        return self._known[key]


COMPARISONS = Comparisons()


def _use(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.dtype, *map(str, (*value.shape, *value.stride(), value.device)))
    return (type(value).__name__, str(value) if isinstance(value, (bool, int, float, str)) else "")


def _compare(
    meaning: Meaning,
    op: OpOverload,
    sample: Mapping[str, Any],
    written: Sequence[str],
    sizes: Sizes,
) -> Comparison:
    assert meaning.fn is not None
    device = next(value.device for value in pytree.tree_leaves(dict(sample)) if isinstance(value, torch.Tensor))
    place = str(device.type)
    if device.type == "cuda" and (not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing()):
        return Comparison(place, why_not="there is no such device here, or it is capturing a graph")
    worst = 0.0
    for seed, scale in enumerate(_SCALES):
        arguments = _random_arguments(sample, sizes, scale, seed)
        if isinstance(arguments, str):
            return Comparison(place, why_not=arguments)
        if meaning.example is not None:
            meaning.example(arguments)
        theirs, ours = _copies(arguments), _copies(arguments)
        try:
            results = _run(_calls(op), theirs, written)
        except Exception as error:
            return Comparison(place, why_not=f"the operation cannot run on {place} here ({_summary(error)})")
        expected = _run(functools.partial(call_meaning, meaning.fn, op), ours, written)
        for name in results:
            difference = _difference(results[name], expected[name])
            worst = max(worst, difference)
            if not difference <= _allowed(results[name]):
                reason = f"{name} differs by {difference:.1e} on input of scale {scale:g} (compared on {place})"
                return Comparison(place, worst, reason, differs=True)
    return Comparison(place, worst)


def _calls(op: OpOverload) -> Callable[[Mapping[str, Any]], Any]:
    def call(given: Mapping[str, Any]) -> Any:
        places, named = arrange(op, given, by_name=False)
        return op(*places, **named)

    return call


def _run(
    fn: Callable[[Mapping[str, Any]], Any], given: dict[str, Any], written: Sequence[str]
) -> dict[str, torch.Tensor]:
    """The results of ``fn(**given)`` and what `written` holds afterwards, by name."""
    with torch.no_grad():
        returned = fn(given)
    found = {f"result {i}": value for i, value in enumerate(pytree.tree_leaves(returned))}
    found |= {name: given[name] for name in written}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _random_arguments(sample: Mapping[str, Any], sizes: Sizes, scale: float, seed: int) -> dict[str, Any] | str:
    """Concrete arguments like `sample`, of small sizes; or why there are none."""
    shapes = _small_shapes(sample, sizes)
    leaves, spec = pytree.tree_flatten(dict(sample))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    total = sum(torch.Size(shapes[id(leaf)]).numel() * leaf.element_size() for leaf in tensors)
    if total > _MEMORY_BOUND:
        return f"its arguments take {total >> 20} MiB"
    strides = {id(leaf): _strides(leaf, shapes[id(leaf)], sizes) for leaf in tensors}
    below = _index_bound(tensors, shapes)
    generator = torch.Generator().manual_seed(seed)

    def concrete(leaf: Any) -> Any:
        if isinstance(leaf, torch.SymInt):
            return sizes.concrete(leaf)
        if not isinstance(leaf, torch.Tensor):
            return leaf
        value = _random(leaf, shapes[id(leaf)], scale, below, generator)
        return _laid_out(value, strides[id(leaf)])

    return pytree.tree_unflatten([concrete(leaf) for leaf in leaves], spec)


def _small_shapes(sample: Mapping[str, Any], sizes: Sizes) -> dict[int, tuple[int, ...]]:
    """For each tensor, its shape with large leading sizes cut down; by identity.

    A size that is also some other dimension's (the width of a weight) or an argument is left as it is.
    """
    leaves = pytree.tree_leaves(dict(sample))
    shapes = {id(leaf): sizes.shape(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)}
    leading: dict[int, None] = {}
    fixed: set[int] = {leaf for leaf in leaves if type(leaf) is int}
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            continue
        shape = shapes[id(leaf)]
        free = len(shape) if not leaf.is_floating_point() else min(1, len(shape) - 1)
        leading.update(dict.fromkeys(shape[:free]))
        fixed.update(shape[free:])
    large = [size for size in leading if size > _LARGE and size not in fixed]
    smaller = {size: _LARGE + i for i, size in enumerate(sorted(large))}
    return {place: tuple(smaller.get(size, size) for size in shape) for place, shape in shapes.items()}


def _strides(like: torch.Tensor, shape: tuple[int, ...], sizes: Sizes) -> tuple[int, ...] | None:
    """Those of the call: an operation may not ask for them. None where elements share a place, or lie too far apart."""
    strides = tuple(sizes.concrete(stride) for stride in like.stride())
    dims = sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1)
    reach = 1
    for stride, size in dims:
        if stride < reach:
            return None
        reach = (size - 1) * stride + reach
    return strides if reach * like.element_size() <= _MEMORY_BOUND else None


def _laid_out(value: torch.Tensor, strides: tuple[int, ...] | None) -> torch.Tensor:
    """`value`, with these strides."""
    if strides is None or value.stride() == strides:
        return value
    laid = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
    return laid.copy_(value)


def _index_bound(tensors: Sequence[torch.Tensor], shapes: Mapping[int, tuple[int, ...]]) -> int:
    """Below this, an integer is an index into the leading dimension of any float argument."""
    rows = [shapes[id(each)][0] for each in tensors if each.is_floating_point() and each.dim() > 1]
    return min(rows, default=1)


def _random(
    like: torch.Tensor, shape: tuple[int, ...], scale: float, below: int, generator: torch.Generator
) -> torch.Tensor:
    count = torch.Size(shape).numel()
    if like.is_floating_point() or like.is_complex():
        value = (torch.randn(shape, generator=generator) * scale).to(like.dtype)
    elif like.dtype == torch.bool:
        value = torch.rand(shape, generator=generator) < 0.5
    elif count <= below:  # distinct, so that no two stores meet
        value = torch.randperm(below, generator=generator)[:count].reshape(shape).to(like.dtype)
    else:
        value = torch.randint(0, below, shape, generator=generator).to(like.dtype)
    return value.to(like.device)


def _copies(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return pytree.tree_map_only(torch.Tensor, lambda each: _laid_out(each.clone(), each.stride()), dict(arguments))


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if not actual.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    return relative_difference(actual, expected)


def _allowed(result: torch.Tensor) -> float:
    return NATIVE_TOLERANCE.get(result.dtype, 2 * NATIVE_TOLERANCE[torch.bfloat16])


def _summary(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
