"""Does a user's replacement do what the pattern does? Both run for real, in the dtypes of the match."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fx_fusion.decline import Decline
from fx_fusion.function_fusions.samples import distinct, is_index
from fx_fusion.graph.torch_compat import pytree

Function = Callable[..., Any]
Tensors = Mapping[str, torch.Tensor]

#: Input scales: ordinary, where a small constant rules, large, and none at all.
SCALES = (1.0, 1e-3, 30.0, 0.0)

#: How far a replacement may be off, of the largest value: this many units in the last place of the result's dtype, and
#: this many times as far as the pattern itself is off from the pattern on float64 input (it may round as often as
#: that). Where the pattern does not take float64, its own error is not known.
UNITS, FACTOR, UNITS_ALONE = 2, 4, 8

#: Dimensions longer than this are shortened, the same everywhere, where the tensors together take more than _BYTES.
_LONG, _BYTES = 1024, 1 << 28


def compare_replacement(
    pattern: Function, replacement: Function, shapes: Tensors, others: Mapping[str, Any], device: torch.device
) -> float:
    """The largest difference found, relative to the largest value.

    Args:
        shapes: tensors (fake ones will do) that give the shape, dtype and strides of each tensor argument.
        others: the other arguments.

    Raises:
        Decline: ``fusion.replacement_differs``, ``fusion.replacement_fails``, or ``fusion.unverified`` where the
            pattern itself cannot run on `device`.
    """
    generator = torch.Generator().manual_seed(3)
    shapes = _shortened(shapes)
    bounds = _bounds(pattern, shapes, others)
    worst = 0.0
    for scale in SCALES:
        values = {name: _value(like, scale, bounds.get(name), generator) for name, like in shapes.items()}
        worst = max(worst, _compare(pattern, replacement, values, others, device, scale))
    return worst


def _compare(
    pattern: Function,
    replacement: Function,
    values: Tensors,
    others: Mapping[str, Any],
    device: torch.device,
    scale: float,
) -> float:
    try:
        expected = _run(pattern, values, others, device)
    except Exception as error:
        raise Decline("fusion.unverified", f"the pattern cannot run on {device}: {_first_line(error)}") from error
    try:
        actual = _run(replacement, values, others, device)
    except Exception as error:
        raise Decline("fusion.replacement_fails", f"on {device} the replacement raises {_first_line(error)}") from error
    exact = _exact(pattern, values, others, device)
    if len(actual) != len(expected):
        found = (
            f"the replacement returns {len(actual) - len(values)} tensors, the pattern {len(expected) - len(values)}"
        )
        raise Decline("fusion.replacement_differs", found)
    worst = 0.0
    for place, (a, e) in enumerate(zip(actual, expected, strict=True)):
        first = len(expected) - len(values)
        name = f"result {place}" if place < first else f"argument {list(values)[place - first]} afterwards"
        worst = max(worst, _distance(name, a, e, exact[place] if exact else None, scale))
    return worst


def _distance(name: str, a: torch.Tensor, e: torch.Tensor, x: torch.Tensor | None, scale: float) -> float:
    if (a.shape, a.dtype) != (e.shape, e.dtype):
        found = f"{name} of the replacement is {a.dtype} {list(a.shape)}, of the pattern {e.dtype} {list(e.shape)}"
        raise Decline("fusion.replacement_differs", found)
    if not e.is_floating_point():
        if torch.equal(a, e):
            return 0.0
        raise Decline("fusion.replacement_differs", f"{name} differs from the pattern's (integers)")
    unit = torch.finfo(e.dtype).eps
    a, e = a.double(), e.double()
    known = x is not None and x.shape == e.shape
    x = e if x is None or x.shape != e.shape else torch.where(x.isfinite(), x.double(), e)
    finite = e.isfinite()
    # Where the pattern overflows the replacement may be the better one, never the reverse.
    size = float(torch.where(finite, e.abs(), 0.0).max()) if e.numel() else 0.0
    own = float(torch.where(finite, (e - x).abs(), 0.0).max()) if e.numel() else 0.0
    error = torch.where(finite, (a - e).abs().nan_to_num(nan=torch.inf), 0.0)
    largest = float(error.max()) if e.numel() else 0.0
    allowed = (UNITS if known else UNITS_ALONE) * unit * size + FACTOR * own
    if largest <= allowed:
        return largest / size if size else 0.0
    found = (
        f"{name} differs by {largest:.1e} where the largest value is {size:.1e}, on input of scale {scale:g}; "
        f"{allowed:.1e} is allowed for rounding"
    )
    raise Decline("fusion.replacement_differs", found)


def _run(fn: Function, values: Tensors, others: Mapping[str, Any], device: torch.device) -> list[torch.Tensor]:
    """What `fn` returns, then every argument as it is afterwards, on the CPU."""
    here = {name: _copied(value, device) for name, value in values.items()}
    with torch.no_grad():
        returned = fn(**here, **others)
    results = [leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, torch.Tensor)]
    return [leaf.cpu() for leaf in [*results, *here.values()]]


def _exact(
    pattern: Function, values: Tensors, others: Mapping[str, Any], device: torch.device
) -> list[torch.Tensor] | None:
    """The pattern on float64 input; None if it does not take that."""
    wide = {n: value.double() if value.is_floating_point() else value for n, value in values.items()}
    try:
        return _run(pattern, wide, others, device)
    except Exception:
        return None


def _copied(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On `device`, with the same strides."""
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return copy.copy_(value)


def _value(like: torch.Tensor, scale: float, bound: int | None, generator: torch.Generator) -> torch.Tensor:
    shape, stride = [int(s) for s in like.shape], [int(s) for s in like.stride()]
    if bound is not None:
        value = distinct(like, bound, generator)
    elif like.is_floating_point():
        value = (scale * torch.randn(shape, generator=generator)).to(like.dtype)
    else:
        value = torch.randint(0, 2, shape, generator=generator).to(like.dtype)
    if 0 in stride or not shape:
        return value
    return torch.empty_strided(shape, stride, dtype=like.dtype).copy_(value)


def _bounds(pattern: Function, shapes: Tensors, others: Mapping[str, Any]) -> dict[str, int]:
    """For each integer argument, the largest size of a dimension below which any number is a valid index.

    Tried on the CPU, where an index that is not valid raises.
    """
    whole = [name for name, like in shapes.items() if is_index(like)]
    sizes = sorted({int(size) for like in shapes.values() for size in like.shape}, reverse=True)
    bounds = dict.fromkeys(whole, 1)
    generator = torch.Generator().manual_seed(0)
    for name in whole:
        for size in sizes:
            values = {n: _value(like, 1.0, bounds.get(n), generator) for n, like in shapes.items()}
            values[name] = torch.full_like(values[name], size - 1)
            try:
                _run(pattern, values, others, torch.device("cpu"))
            except Exception:
                continue
            bounds[name] = size
            break
    return bounds


def _shortened(shapes: Tensors) -> dict[str, torch.Tensor]:
    """Contiguous, with long leading dimensions (tokens, rows of a cache) cut, where the whole would take too much."""
    total = sum(like.numel() * like.element_size() for like in shapes.values())
    if total <= _BYTES:
        return dict(shapes)
    found: dict[str, torch.Tensor] = {}
    for name, like in shapes.items():
        shape = [int(size) for size in like.shape]
        if shape and shape[0] > _LONG:
            shape[0] = _LONG + shape[0] % 7
        found[name] = torch.empty(shape, dtype=like.dtype, device="meta")
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
