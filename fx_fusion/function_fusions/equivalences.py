"""Spellings of steps that samples cannot prove to be one: declared here, each with its reason.

A step that is not analytic must be the same operation on both sides (``equivalence.py``). Where PyTorch has several
spellings of one operation, each is brought to one form here. The forms, and what they mean:

====================  ==========================================================================================
``maximum``           of two values, NaN if one is
``minimum``           likewise
``amax``              of a dimension or several, which stay with one element
``less``              is the first less than the second?
``less_equal``
``finite_or_zero``    zero in the place of infinities
``all_finite``        is no element along some dimensions infinite or NaN?
``attention``         softmax(q @ k.T * scale + mask) @ v, causal or not
====================  ==========================================================================================

Every rule is tried on numbers, infinities, NaN and equal values by the tests, against :data:`MEANING`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from fx_fusion.function_fusions.steps import Kind, Step
from fx_fusion.graph import operations
from fx_fusion.graph.operations import aten

Rule = Callable[[Step], "Step | None"]

RULES: dict[Any, list[Rule]] = {}
"""For each operation, what may bring a step of it to another form; None leaves it."""

#: Free steps that one spelling has and another has not: the result must then be the same whatever they give. The
#: maximum that a softmax subtracts cancels, and so does whatever else is subtracted in its place.
OPTIONAL = frozenset({"amax", "finite_or_zero", "all_finite"})

#: Forms whose operands may change places.
COMMUTES = frozenset({"maximum", "minimum"})

#: Operations of attention, whose first result is the form ``attention``.
ATTENTION = frozenset(
    getattr(aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    if hasattr(aten, name)
)


def spelled(step: Step) -> Step | None:
    """`step` in its one form, or None where it has none."""
    return next((found for rule in RULES.get(step.target, ()) if (found := rule(step)) is not None), None)


def _spells(*targets: Any) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        for target in targets:
            RULES.setdefault(target, []).append(rule)
        return rule

    return add


def _form(name: Any, like: Step, *operands: Any, value: Any = None, kind: Kind = Kind.FREE) -> Step:
    parents = tuple(dict.fromkeys(each for each in operands if isinstance(each, Step)))
    return Step(name, operands, {}, like.node, like.value if value is None else value, kind, parents)


def _given(step: Step, place: int, name: str, default: Any = None) -> Any:
    """An argument, by its place or by its name."""
    return step.args[place] if place < len(step.args) else step.kwargs.get(name, default)


def _number(value: Any) -> Any:
    """The number that a literal tensor holds everywhere; anything else as it is."""
    if isinstance(value, Step) and value.kind is Kind.LITERAL:
        if value.target in (aten.full.default, aten.full_like.default) and type(value.args[1]) in (int, float):
            return value.args[1]
        if value.target is aten.scalar_tensor.default:
            return value.args[0]
        if value.kind is Kind.LITERAL and value.target in operations.MOVEMENT | operations.CAST and value.parents:
            return _number(value.parents[0])
    return value


# --- the larger and the smaller ---------------------------------------------------------------------------------------


@_spells(aten.clamp_min.default, aten.clamp_min.Tensor, aten.maximum.default)
def _larger(step: Step) -> Step | None:
    """Two names of one operation. Of a value that was bounded from above, at no less, the order does not matter."""
    x, low = _bounded(step)
    if isinstance(x, Step) and x.target == "minimum" and type(low) in (int, float) and type(x.args[1]) in (int, float):
        inner, high = x.args
        if low <= high:
            return _form("minimum", step, _form("maximum", step, inner, low), high)
    return _form("maximum", step, x, low)


@_spells(aten.clamp_max.default, aten.clamp_max.Tensor, aten.minimum.default)
def _smaller(step: Step) -> Step | None:
    return _form("minimum", step, *_bounded(step))


def _bounded(step: Step) -> tuple[Any, Any]:
    a, b = map(_number, step.args)
    return (a, b) if isinstance(a, Step) else (b, a)


@_spells(aten.relu.default)
def _relu(step: Step) -> Step | None:
    """max(x, 0), of NaN too."""
    return _form("maximum", step, step.args[0], 0)


@_spells(aten.clamp.default, aten.clamp.Tensor, aten.hardtanh.default)
def _clamp(step: Step) -> Step | None:
    """PyTorch defines clamp as min(max(x, low), high), also where low > high."""
    names = ("min_val", "max_val") if step.target is aten.hardtanh.default else ("min", "max")
    default = (-1.0, 1.0) if step.target is aten.hardtanh.default else (None, None)
    low, high = (_given(step, i + 1, name, default[i]) for i, name in enumerate(names))
    found: Any = step.args[0]
    if low is not None:
        found = _form("maximum", step, found, _number(low))
    return found if high is None else _form("minimum", step, found, _number(high))


@_spells(aten.where.self)
def _where(step: Step) -> Step | None:
    """``where(x < c, c, x)``, with a number for c: where x is NaN the comparison fails, and x stays, as in maximum.
    ``where(x > c, c, x)`` likewise; ``where(x > c, x, c)`` gives c where x is NaN, and is nothing but itself.
    """
    condition, bound, other = step.args[0], _number(step.args[1]), step.args[2]
    if not isinstance(condition, Step) or condition.target not in ("less", "less_equal"):
        return None
    a, b = condition.args
    if isinstance(bound, Step) or not isinstance(other, Step):
        return None
    if a is other and _same_number(b, bound):
        return _form("maximum", step, other, bound)
    if b is other and _same_number(a, bound):
        return _form("minimum", step, other, bound)
    return None


def _same_number(a: Any, b: Any) -> bool:
    return type(a) in (int, float) and type(b) in (int, float) and a == b


@_spells(aten.where.self)
def _where_not(step: Step) -> Step | None:
    """The other way round."""
    condition, a, b = step.args
    if not isinstance(condition, Step) or condition.value.dtype != torch.bool:
        return None
    if condition.target not in (aten.logical_not.default, aten.bitwise_not.default):
        return None
    return Step(step.target, (condition.args[0], b, a), {}, step.node, step.value, step.kind, step.parents)


@_spells(aten.round.default)
def _round(step: Step) -> Step | None:
    """Rounding keeps order and whole numbers, so whole bounds may be applied before or after it."""
    inner = step.args[0]
    if not isinstance(inner, Step) or inner.target not in ("maximum", "minimum"):
        return None
    x, bound = inner.args
    if type(bound) not in (int, float) or not float(bound).is_integer():
        return None
    rounded = Step(step.target, (x,), {}, step.node, step.value, Kind.FREE, (x,))
    return _form(inner.target, step, _round(rounded) or rounded, bound)


# --- over a dimension -------------------------------------------------------------------------------------------------


@_spells(aten.amax.default, aten.amin.default)
def _largest_of(step: Step) -> Step | None:
    dims, keep = _given(step, 1, "dim", []), _given(step, 2, "keepdim", False)
    return _over(step, "amax" if step.target is aten.amax.default else "amin", step.args[0], dims, keep)


@_spells(aten.max.default, aten.min.default)
def _largest_of_all(step: Step) -> Step | None:
    """Of one argument: amax over every dimension."""
    return _over(step, "amax" if step.target is aten.max.default else "amin", step.args[0], [], False)


@_spells(operator.getitem)
def _largest_with_place(step: Step) -> Step | None:
    """The first result of max along a dimension is amax; its second, where it stands, is another matter."""
    both = step.args[0]
    if not isinstance(both, Step) or both.target not in (aten.max.dim, aten.min.dim) or step.args[1] != 0:
        return None
    dim, keep = _given(both, 1, "dim"), _given(both, 2, "keepdim", False)
    return _over(step, "amax" if both.target is aten.max.dim else "amin", both.args[0], [dim], keep)


def _over(step: Step, name: str, x: Step, dims: Any, keep: bool) -> Step:
    rank = x.value.dim()
    places = tuple(sorted({dim % rank for dim in dims} or range(rank))) if rank else ()
    if keep or not places:
        return _form(name, step, x, places)
    kept = step.value
    for place in places:
        kept = kept.unsqueeze(place)
    found = _form(name, step, x, places, value=kept)
    return Step(aten.squeeze.dims, (found, list(places)), {}, step.node, step.value, Kind.MOVEMENT, (found,))


@_spells(aten.where.self)
def _finite_or_zero(step: Step) -> Step | None:
    """How ``logsumexp`` avoids subtracting infinity from itself."""
    condition, zero, x = step.args[0], _number(step.args[1]), step.args[2]
    if zero != 0 or not isinstance(condition, Step) or condition.target is not aten.eq.Scalar:
        return None
    size, infinity = condition.args
    is_size = isinstance(size, Step) and size.target is aten.abs.default and size.args[0] is x
    return _form("finite_or_zero", step, x) if is_size and infinity == math.inf else None


@_spells(aten.logical_not.default)
def _all_finite(step: Step) -> Step | None:
    """How Inductor asks whether it may scale after it subtracted the maximum: ``~any(~((x == x) * (|x| != inf)))``."""
    found = _operand(step.args[0], aten.any.dims, aten.any.dim)
    finite = _operand(_operand(found and found.args[0], aten.logical_not.default), None)
    both = _operand(finite and finite.args[0], aten.mul.Tensor)
    if found is None or both is None:
        return None
    is_number, is_small = (_operand(each, aten.eq.Tensor, aten.ne.Scalar) for each in both.args[:2])
    if is_number is None or is_small is None or is_number.args[0] is not is_number.args[1]:
        return None
    x = is_number.args[0]
    size = _operand(is_small.args[0], aten.abs.default)
    if size is None or size.args[0] is not x or is_small.args[1] != math.inf:
        return None
    return _form("all_finite", step, x, *_plain(found.args[1:]))


def _operand(value: Any, *targets: Any) -> Step | None:
    return value if isinstance(value, Step) and (value.target in targets or targets == (None,)) else None


def _plain(args: Any) -> tuple[Any, ...]:
    return tuple(tuple(arg) if isinstance(arg, (list, tuple)) else arg for arg in args)


# --- comparisons ------------------------------------------------------------------------------------------------------


@_spells(aten.lt.Scalar, aten.lt.Tensor, aten.gt.Scalar, aten.gt.Tensor)
def _less(step: Step) -> Step | None:
    """A > b is b < a, of NaN too."""
    return _compared("less", step, step.target in (aten.gt.Scalar, aten.gt.Tensor))


@_spells(aten.le.Scalar, aten.le.Tensor, aten.ge.Scalar, aten.ge.Tensor)
def _less_equal(step: Step) -> Step | None:
    return _compared("less_equal", step, step.target in (aten.ge.Scalar, aten.ge.Tensor))


def _compared(name: str, step: Step, mirrored: bool) -> Step:
    a, b = step.args[0], _number(step.args[1])
    return _form(name, step, b, a) if mirrored else _form(name, step, a, b)


# --- rows of a table --------------------------------------------------------------------------------------------------


@_spells(aten.index.Tensor, aten.embedding.default, aten.index_select.default)
def _rows(step: Step) -> Step | None:
    """Rows of a table of floats by whole numbers, which are not bytes: those are a mask. ``index`` counts negative ones
    from the end, the others refuse them; where a region runs, all mean the same.
    """
    if step.target is aten.index_select.default:
        table, dim, index = step.args
        if dim % max(table.value.dim(), 1) != 0:
            return None
    elif step.target is aten.embedding.default:
        table, index = step.args[:2]
    else:
        table, places = step.args
        if len(places) != 1:
            return None
        (index,) = places
    if not isinstance(index, Step) or index.value.dtype not in (torch.int64, torch.int32):
        return None
    if not table.value.is_floating_point() or table.value.dim() == 0:
        return None
    return _form(step.target, step, table, index, kind=Kind.LOOKUP)


# --- attention --------------------------------------------------------------------------------------------------------


@_spells(operator.getitem)
def _attention(step: Step) -> Step | None:
    """Each backend has an operation of its own for ``scaled_dot_product_attention``; all compute the same."""
    both = step.args[0]
    if not isinstance(both, Step) or both.target not in ATTENTION or step.args[1] != 0:
        return None
    schema = enumerate(both.target._schema.arguments)
    given = {argument.name: _given(both, i, argument.name, argument.default_value) for i, argument in schema}
    q, k, v = (given[name] for name in ("query", "key", "value"))
    mask = given.get("attn_mask", given.get("attn_bias"))
    scale = given.get("scale")
    width = q.value.shape[-1]
    if scale is None and not isinstance(width, int):
        return None
    return _form("attention", step, q, k, v, mask, bool(given["is_causal"]), scale or 1 / math.sqrt(width))


# --- layout -----------------------------------------------------------------------------------------------------------


def restride(x: torch.Tensor, size: Any, stride: Any, offset: int | None = None) -> torch.Tensor:
    """``as_strided`` of a tensor that the graph lays evenly."""
    return x.contiguous().as_strided(size, stride, offset or 0)


@_spells(aten.as_strided.default)
def _restrided(step: Step) -> Step | None:
    """Of what a step of the graph computed and laid evenly, ``as_strided`` moves elements, like any other view."""
    x = step.args[0]
    if not isinstance(x, Step) or x.kind in (Kind.LEAF, Kind.MOVEMENT, Kind.UNDEFINED):
        return None
    if not x.value.is_contiguous() or x.value.storage_offset() != 0 or len(step.kwargs) > 0:
        return None
    return Step(restride, step.args, {}, step.node, step.value, Kind.MOVEMENT, step.parents)


# --- what the forms mean ----------------------------------------------------------------------------------------------


def _finite(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isinf(), torch.zeros_like(x), x)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float
) -> torch.Tensor:
    scores = q @ k.mT * scale
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    return torch.softmax(scores if mask is None else scores + mask, -1) @ v


def _as_tensor(value: Any, like: torch.Tensor) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=like.dtype)


MEANING: dict[Any, Callable[..., torch.Tensor]] = {
    "maximum": lambda a, b: torch.maximum(a, _as_tensor(b, a)),
    "minimum": lambda a, b: torch.minimum(a, _as_tensor(b, a)),
    "amax": lambda x, dims: torch.amax(x, dims, keepdim=True),
    "amin": lambda x, dims: torch.amin(x, dims, keepdim=True),
    "less": lambda a, b: torch.lt(*torch.broadcast_tensors(*_pair(a, b))),
    "less_equal": lambda a, b: torch.le(*torch.broadcast_tensors(*_pair(a, b))),
    "finite_or_zero": _finite,
    "all_finite": lambda x, dims, keep=False: x.isfinite().all(dims[0] if len(dims) == 1 else dims, keepdim=keep),
    "attention": _attend,
}
"""In eager PyTorch. The comparison never runs them: it takes a free step for an unknown function."""


def _pair(a: Any, b: Any) -> tuple[torch.Tensor, torch.Tensor]:
    like = a if isinstance(a, torch.Tensor) else b
    return _as_tensor(a, like), _as_tensor(b, like)
