"""Conversion: how is a value scaled, bounded and converted on its way into the cache?

``cache[slots] = (k / scale).clamp(-448, 448).to(torch.float8_e4m3fn)``: read backwards from the cache, whatever
movement stands between the steps. What is left is the value itself, rotated or copied.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.graph import operations
from fx_fusion.graph.operations import aten
from fx_fusion.graph.paths import strip_views, widens
from fx_fusion.graph.sizes import Sizes
from fx_fusion.graph.store_site import Store, stored_dtype
from fx_fusion.kernels.qk_norm_rope_cache import reference
from fx_fusion.proof.evaluate import Arithmetic, evaluate

FLOAT8 = frozenset(reference.FLOAT8_RANGE)
_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Step:
    """`node` changes, element by element, what moved to it from `operand`."""

    node: Node
    operand: Node


@dataclass(frozen=True)
class Scale:
    """What a value is divided by: a number, or a tensor of one element; None where it is multiplied by what has no
    exact inverse.
    """

    step: Step
    divisor: float | Node | None


@dataclass(frozen=True)
class Conversion:
    """The steps from a value to the cache, the last one first, and what they amount to.

    `wide` are casts to a wider dtype, before the scale or where there is none. `dtype` is what the cache's elements
    are, `source` what is converted to it.
    """

    dtype: torch.dtype
    source: torch.dtype
    reinterpreted: tuple[Step, ...]
    cast: Step | None
    clamps: tuple[Step, ...]
    narrow: Step | None
    scale: Scale | None
    wide: tuple[Step, ...]
    value: Node

    @property
    def steps(self) -> tuple[Step, ...]:
        found = [*self.reinterpreted, self.cast, *self.clamps, self.narrow, self.scale and self.scale.step, *self.wide]
        return tuple(step for step in found if step is not None)

    def steps_after(self, node: Node) -> tuple[Step, ...]:
        """The steps from `node`, one of them or the value, to the cache, the last one first."""
        places = [step.node for step in self.steps]
        return self.steps[: places.index(node)] if node in places else self.steps

    @property
    def values(self) -> list[Node]:
        """Where the value may end and its conversion begin, the nearest to the cache first."""
        whole = self.scale is None and not self.clamps and self.cast is not None and self.dtype.itemsize > 1
        cast = [self.cast.node] if self.cast is not None and whole else []
        return [*cast, *(step.node for step in self.wide), self.value]


def read_conversion(store: Store, *, keep_rows: bool = False) -> Conversion:
    """Back from what `store` writes to a value that is neither cast, clamped nor scaled.

    With `keep_rows`, no further back than where rows are dropped. Of what is joined, back through the store's own part.
    """

    def strip(node: Any) -> Node:
        node = strip_views(node, keep_rows=keep_rows)
        return strip(store.own) if store.join and node is store.join.node else node

    node, dtype = strip(store.value), stored_dtype(store)
    reinterpreted: list[Step] = []
    while operations.is_reinterpretation(node):
        reinterpreted.append(_step(node))
        node = strip(node.args[0])
    cast = _step(node) if operations.is_cast(node) and node.meta["val"].dtype == dtype else None
    node = strip(node.args[0]) if cast else node
    source = node.meta["val"].dtype
    clamps: list[Step] = []
    while dtype in FLOAT8 and source != dtype and _clamps_to(node, torch.finfo(dtype).max):
        clamps.append(_step(node))
        node = strip(node.args[0])
    narrow = None
    before = strip(node.args[0]) if operations.is_cast(node) else node
    if before is not node and _read_scale(before) and not widens(node):
        narrow, node = _step(node), before
    scale = _read_scale(node)
    node = strip(scale.step.operand) if scale else node
    wide: list[Step] = []
    while widens(node):
        wide.append(_step(node))
        node = strip(node.args[0])
    return Conversion(dtype, source, tuple(reinterpreted), cast, tuple(clamps), narrow, scale, tuple(wide), node)


def _step(node: Node) -> Step:
    operand = node.args[0]
    assert isinstance(operand, Node)
    return Step(node, operand)


def _clamps_to(node: Node, bound: float) -> bool:
    """Half a clamp, or a whole one, to ± `bound`."""
    if node.target is aten.clamp_min.default:
        return node.args[1] == -bound
    if node.target is aten.clamp_max.default:
        return node.args[1] == bound
    return node.target is aten.clamp.default and node.args[1:] == (-bound, bound) and not node.kwargs


def _read_scale(node: Node) -> Scale | None:
    if node.op != "call_function" or node.kwargs or node.target not in (
        aten.div.Tensor, aten.div.Scalar, aten.mul.Tensor, aten.mul.Scalar,
    ):  # fmt: skip
        return None
    value, factor = node.args
    multiplies = node.target in (aten.mul.Tensor, aten.mul.Scalar)
    if multiplies and _is_one_number(value) and isinstance(factor, Node):
        value, factor = factor, value
    if not isinstance(value, Node) or not operations.is_float_tensor(value) or not _is_one_number(factor):
        return None
    number = _read_number(factor)
    divisor = number if number is not None else factor
    if multiplies:
        divisor = _exact_inverse(number) if number is not None else None
    return Scale(Step(node, value), divisor)  # type: ignore[arg-type]


def _is_one_number(value: Any) -> bool:
    if isinstance(value, Node):
        held = value.meta.get("val")
        return isinstance(held, torch.Tensor) and all(isinstance(size, int) and size == 1 for size in held.shape)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _read_number(value: Any) -> float | None:
    """A number written in the code; never the value of a graph input."""
    if not isinstance(value, Node):
        return float(value)
    if value.op != "call_function" or not operations.is_literal(value):
        return None
    return float(evaluate([value], {}, Sizes(), Arithmetic.NATIVE)[0])


def _exact_inverse(number: float) -> float | None:
    """Multiplying by a power of two is dividing by another one; by any other number it rounds differently."""
    mantissa, exponent = math.frexp(number)
    return 1 / number if abs(mantissa) == 0.5 and abs(exponent) < 100 else None


def moved_elements(
    store: Store, steps: tuple[Step, ...], source: Node, numbers: torch.Tensor, sizes: Sizes
) -> torch.Tensor:
    """The element numbers of `source` as they arrive in the stored value, through movement and `steps` alone; -1 where
    what the store's own part is joined with arrives.
    """
    others = {other: torch.full(sizes.shape(other.meta["val"]), -1) for other in store.others}
    for step in reversed(steps):
        numbers = evaluate([step.operand], {**others, source: numbers}, sizes, Arithmetic.MOVE)[0]
        source = step.node
    return evaluate([store.value], {**others, source: numbers}, sizes, Arithmetic.MOVE)[0]


def check_scale(scale: Scale, dtype: torch.dtype) -> float | Node:
    """What a kernel divides by, in float32, a value of `dtype`.

    Raises:
        Decline: ``store.scale_inverted``, ``store.scale``.
    """
    node = scale.step.node
    if scale.divisor is None:
        found = f"{node} multiplies by the scale, the kernel divides by it: other roundings, or another scale"
        raise Decline("store.scale_inverted", found, [node])
    if isinstance(scale.divisor, Node) and scale.divisor.meta["val"].dtype not in _SCALE_DTYPES:
        found = f"{node} divides by {scale.divisor} of {scale.divisor.meta['val'].dtype}; the kernel reads a float32"
        raise Decline("store.scale", found, [node])
    if node.meta["val"].dtype not in (dtype, torch.float32):
        found = f"{node} divides in {node.meta['val'].dtype}, the kernel in float32"
        raise Decline("proof.rounding", found, [node])
    return scale.divisor


# --- what a conversion to float8 makes of what is beyond its range ----------------------------------------------------


def saturates(conversion: Conversion, device: torch.device) -> bool | None:
    """Does a value beyond the range of the cache's float8 become the largest number? None for a cache of another dtype.

    Raises:
        Decline: ``store.conversion`` if PyTorch converts otherwise than the kernels do.
    """
    if conversion.dtype not in FLOAT8:
        if conversion.dtype.itemsize == 1:
            raise Decline("store.conversion", f"no kernel converts to {conversion.dtype}", [conversion.value])
        return None
    source, target = conversion.source, conversion.dtype
    if not conversion.clamps:
        found = _native_saturation(source, target, device)
    elif _bounds(conversion.clamps) == {"min", "max"}:
        found = True if _agrees(source, target, device, clamped=True) else None
    else:
        step = conversion.clamps[0].node
        raise Decline("proof.not_analytic", f"{step} clamps only one side to the range of {target}", [step])
    if found is None:
        what = f"PyTorch {torch.__version__} on {device} converts {source} to {target} otherwise than the kernels do"
        raise Decline("store.conversion", what, [conversion.value])
    return found


def _bounds(clamps: tuple[Step, ...]) -> set[str]:
    sides = {aten.clamp_min.default: {"min"}, aten.clamp_max.default: {"max"}, aten.clamp.default: {"min", "max"}}
    return {side for step in clamps for side in sides[step.node.target]}  # type: ignore[index]


@functools.cache
def _native_saturation(source: torch.dtype, dtype: torch.dtype, device: torch.device) -> bool | None:
    """What ``Tensor.to`` does, which differs between versions of PyTorch; None if neither way describes it."""
    return next((way for way in (False, True) if _agrees(source, dtype, device, saturate=way)), None)


@functools.cache
def _agrees(
    source: torch.dtype, dtype: torch.dtype, device: torch.device, *, clamped: bool = False, saturate: bool = True
) -> bool:
    """Are the reference's bytes PyTorch's, at every number of 16 bits (and at every boundary of the rounding)?"""
    values = _every_value(source, dtype, device)
    bounded = values.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max) if clamped else values
    native = bounded.to(dtype).float()
    ours = reference.to_cache(values, dtype, None, saturate).float()
    return bool(((native == ours) & (native.signbit() == ours.signbit()) | (native.isnan() & ours.isnan())).all())


def _every_value(source: torch.dtype, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Every bfloat16 and every float16, as `source`; in wider ones where a float8 changes, and next to it.

    A conversion to nearest is monotone: it is known once it is known around each of its steps.
    """
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    halves = [patterns.view(half).to(source) for half in (torch.bfloat16, torch.float16)]
    if source.itemsize == 2:
        return torch.cat(halves).to(device)
    levels = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).to(source)
    levels = levels[levels.isfinite()].sort().values
    middles = (levels[1:] + levels[:-1]) / 2
    last = levels[-1:] + (levels[-1] - levels[-2]) / 2
    edges = torch.cat([levels, middles, last, -last])
    infinity = torch.full_like(edges, math.inf)
    return torch.cat([*halves, edges, edges.nextafter(infinity), edges.nextafter(-infinity)]).to(device)


class Copied(NamedTuple):
    """A way in which a kernel stores the very bytes of a copied value: it reads `data` and divides by `scale`."""

    data: Node
    scale: float | Node | None = None
    in_range: bool = False
    """No value is beyond the range of the cache's float8, so that saturation does not matter."""


def ways_to_copy(conversion: Conversion) -> Iterator[Copied]:
    """The best first. A division in float32 is the kernel's own; any other rounds on its way, and stays outside."""
    scale, narrow = conversion.scale, conversion.narrow
    if scale is None:
        yield Copied(conversion.value)
        yield from (Copied(step.node) for step in conversion.wide[::-1])
    else:
        exact = narrow is None and scale.step.node.meta["val"].dtype == torch.float32
        inside = [Copied(conversion.value, scale.divisor)] if exact and scale.divisor is not None else []
        outside = [Copied(narrow.node if narrow else scale.step.node)]
        # A kernel that converts divides for nothing; one that does not had better not be told of a scale.
        yield from (*inside, *outside) if conversion.dtype in FLOAT8 else (*outside, *inside)
    if conversion.clamps:
        yield Copied(conversion.clamps[0].node, in_range=_bounds(conversion.clamps) == {"min", "max"})
    elif conversion.cast is not None and conversion.dtype.itemsize > 1:
        yield Copied(conversion.cast.node)
