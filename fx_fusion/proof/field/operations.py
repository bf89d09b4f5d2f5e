"""What each ATen operation is over a finite field: the table of the interpreter.

A rule takes the arithmetic, the operation, its positional and its named arguments. What has no row has no meaning
there: an exponential, a comparison, a rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fx_fusion.graph.operations import CAST, MOVEMENT, SELECTION, UNDEFINED, aten, prims
from fx_fusion.graph.torch_compat import OpOverload, pytree
from fx_fusion.proof.field.arithmetic import Elements, FieldArithmetic, joined
from fx_fusion.proof.field.tensor import FieldTensor
from fx_fusion.proof.field.verdict import NoMeaning

Args = Sequence[Any]
Named = Mapping[str, Any]
Rule = Callable[[FieldArithmetic, Any, Args, Named], Any]
Parts = tuple[Elements, ...]

RULES: dict[Any, Rule] = {}


def without_floats(field: FieldArithmetic, func: Any, args: Args, named: Named) -> Any:
    """An operation on integers and truth values is what it always is."""
    if any(isinstance(each, FieldTensor) for each in pytree.tree_leaves((args, named))):
        raise NoMeaning(str(func))
    result = func(*args, **named)
    if any(isinstance(each, Tensor) and _is_inexact(each) for each in pytree.tree_leaves(result)):
        raise NoMeaning(str(func))
    return result


def _is_inexact(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _parts(field: FieldArithmetic, value: Any) -> Parts:
    """The elements that an operand holds: two parts of a complex one."""
    if isinstance(value, FieldTensor):
        return value.parts
    if isinstance(value, Tensor) and not value.is_complex():
        return (field.tensor(value),)
    if isinstance(value, (int, float)):
        return (field.number(value),)
    raise NoMeaning("a complex literal")


def _real(field: FieldArithmetic, value: Any) -> Elements:
    first, *imaginary = _parts(field, value)
    if imaginary:
        raise NoMeaning("an operation on complex numbers other than a sum, a difference or a product")
    return first


# --- arithmetic -----------------------------------------------------------------------------------------------------


def _arithmetic(*overloads: Any, keeps_integers: bool = True) -> Callable[[Callable[..., Parts]], Callable[..., Parts]]:
    """Registers a function of operands for `overloads`. Of integers alone, it is the operation itself."""

    def register(compute: Callable[..., Parts]) -> Callable[..., Parts]:
        def rule(field: FieldArithmetic, func: Any, args: Args, named: Named) -> Any:
            if keeps_integers and not any(_is_float(each) for each in (*args, *named.values())):
                return func(*args, **named)
            return _tensor(compute(field, *args, **named))

        RULES.update(dict.fromkeys(overloads, rule))
        return compute

    return register


def _is_float(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, Tensor) and _is_inexact(value))


def _tensor(parts: Parts) -> FieldTensor:
    if len(parts) == 1:
        return FieldTensor(*parts)
    shape = torch.broadcast_shapes(*(part.residues[0].shape for part in parts))
    return FieldTensor(*(part.moved(lambda x: x.expand(shape)) for part in parts))


def _scaled(field: FieldArithmetic, parts: Parts, factor: float | int) -> Parts:
    return parts if factor == 1 else tuple(field.mul(part, field.number(factor)) for part in parts)


def _sum(field: FieldArithmetic, a: Parts, b: Parts) -> Parts:
    """The parts that only one of them has are the other's."""
    both = tuple(field.add(x, y) for x, y in zip(a, b, strict=False))
    return both + a[len(b) :] + b[len(a) :]


def _negative(field: FieldArithmetic, a: Parts) -> Parts:
    return tuple(field.neg(part) for part in a)


@_arithmetic(aten.add.Tensor, aten.add.Scalar)
def _add(field: FieldArithmetic, a: Any, b: Any, alpha: float | int = 1) -> Parts:
    return _sum(field, _parts(field, a), _scaled(field, _parts(field, b), alpha))


@_arithmetic(aten.sub.Tensor, aten.sub.Scalar)
def _sub(field: FieldArithmetic, a: Any, b: Any, alpha: float | int = 1) -> Parts:
    return _sum(field, _parts(field, a), _negative(field, _scaled(field, _parts(field, b), alpha)))


@_arithmetic(aten.rsub.Tensor, aten.rsub.Scalar)
def _rsub(field: FieldArithmetic, a: Any, b: Any, alpha: float | int = 1) -> Parts:
    return _sub(field, b, a, alpha)


@_arithmetic(aten.neg.default)
def _neg(field: FieldArithmetic, a: Any) -> Parts:
    return _negative(field, _parts(field, a))


@_arithmetic(aten.mul.Tensor, aten.mul.Scalar)
def _mul(field: FieldArithmetic, a: Any, b: Any) -> Parts:
    x, y = _parts(field, a), _parts(field, b)
    if len(x) == len(y) == 2:
        real = field.sub(field.mul(x[0], y[0]), field.mul(x[1], y[1]))
        return real, field.add(field.mul(x[0], y[1]), field.mul(x[1], y[0]))
    return tuple(field.mul(p, q) for p in x for q in y)


@_arithmetic(aten.div.Tensor, aten.div.Scalar, keeps_integers=False)
def _div(field: FieldArithmetic, a: Any, b: Any) -> Parts:
    divisor = field.inverse(_real(field, b)) if isinstance(b, Tensor) else field.reciprocal(b)
    return tuple(field.mul(part, divisor) for part in _parts(field, a))


@_arithmetic(aten.square.default)
def _square(field: FieldArithmetic, a: Any) -> Parts:
    return _mul(field, a, a)


@_arithmetic(aten.pow.Tensor_Scalar)
def _pow(field: FieldArithmetic, a: Any, exponent: float | int) -> Parts:
    return (field.power(_real(field, a), exponent),)


@_arithmetic(aten.reciprocal.default, keeps_integers=False)
def _reciprocal(field: FieldArithmetic, a: Any) -> Parts:
    return (field.power(_real(field, a), -1),)


@_arithmetic(aten.sqrt.default, keeps_integers=False)
def _sqrt(field: FieldArithmetic, a: Any) -> Parts:
    return (field.power(_real(field, a), 0.5),)


@_arithmetic(aten.rsqrt.default, keeps_integers=False)
def _rsqrt(field: FieldArithmetic, a: Any) -> Parts:
    return (field.power(_real(field, a), -0.5),)


@_arithmetic(aten.addcmul.default)
def _addcmul(field: FieldArithmetic, a: Any, b: Any, c: Any, value: float | int = 1) -> Parts:
    return _sum(field, _parts(field, a), _scaled(field, _mul(field, b, c), value))


@_arithmetic(aten.addcdiv.default, keeps_integers=False)
def _addcdiv(field: FieldArithmetic, a: Any, b: Any, c: Any, value: float | int = 1) -> Parts:
    return _sum(field, _parts(field, a), _scaled(field, _div(field, b, c), value))


@_arithmetic(aten.sum.default, aten.sum.dim_IntList)
def _total(field: FieldArithmetic, a: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Parts:
    return tuple(field.sum(part, _dims(dim), keepdim) for part in _parts(field, a))


@_arithmetic(aten.mean.default, aten.mean.dim)
def _mean(field: FieldArithmetic, a: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Parts:
    return tuple(field.mean(part, _dims(dim), keepdim) for part in _parts(field, a))


def _dims(dim: Any) -> list[int]:
    return [dim] if isinstance(dim, int) else list(dim or ())


def _fma(field: FieldArithmetic, a: Any, b: Any, c: Any) -> Parts:
    return _sum(field, _mul(field, a, b), _parts(field, c))


if hasattr(prims, "fma"):
    _arithmetic(prims.fma.default)(_fma)


# --- complex numbers, dtypes ------------------------------------------------------------------------------------------


@_arithmetic(aten.complex.default)
def _complex(field: FieldArithmetic, real: Any, imaginary: Any) -> Parts:
    return _real(field, real), _real(field, imaginary)


@_arithmetic(aten.view_as_complex.default)
def _view_as_complex(field: FieldArithmetic, a: Any) -> Parts:
    pairs = _real(field, a)
    return pairs.moved(lambda x: x[..., 0]), pairs.moved(lambda x: x[..., 1])


@_arithmetic(aten.view_as_real.default)
def _view_as_real(field: FieldArithmetic, a: Any) -> Parts:
    return (_together(_parts(field, a), lambda parts: torch.stack(parts, -1)),)


def _cast(field: FieldArithmetic, func: Any, args: Args, named: Named) -> Any:
    """Rounding is no business of the field: a float stays what it is, an integer becomes one."""
    value = args[0]
    dtype: torch.dtype = named.get("dtype") or (args[1] if len(args) > 1 else value.dtype)
    if not (dtype.is_floating_point or dtype.is_complex):
        return without_floats(field, func, args, named)
    parts = _parts(field, value)
    if len(parts) > 1 and not dtype.is_complex:
        raise NoMeaning("the real part of a complex number, taken by a cast")
    return _tensor(_as_complex(field, parts) if dtype.is_complex else parts)


def _as_complex(field: FieldArithmetic, parts: Parts) -> Parts:
    return parts if len(parts) == 2 else (*parts, field.number(0))


# --- movement -------------------------------------------------------------------------------------------------------


def _moved(field: FieldArithmetic, func: Any, args: Args, named: Named) -> Any:
    """The first argument's elements, elsewhere."""
    if not _is_float(args[0]):
        return without_floats(field, func, args, named)
    parts = _parts(field, args[0])
    moved = [[func(each, *args[1:], **named) for each in part.residues] for part in parts]
    if isinstance(moved[0][0], Tensor):
        return FieldTensor(*(Elements(tuple(x), part.bound) for x, part in zip(moved, parts, strict=True)))
    pieces = zip(*(zip(*each, strict=True) for each in moved), strict=True)
    return [FieldTensor(*(Elements(x, part.bound) for x, part in zip(piece, parts, strict=True))) for piece in pieces]


def _join_of(first: int, last: int) -> Rule:
    """A rule for operations that put the elements of their arguments from `first` to `last` together."""

    def rule(field: FieldArithmetic, func: Any, args: Args, named: Named) -> Any:
        operands = args[first:last]
        if not any(map(_is_float, operands)):
            return without_floats(field, func, args, named)
        if any(map(_is_float, (*args[:first], *args[last:], *named.values()))):
            raise NoMeaning(str(func))
        return _joined(field, operands, lambda values: func(*args[:first], *values, *args[last:], **named))

    return rule


def _join_of_list(field: FieldArithmetic, func: Any, args: Args, named: Named) -> Any:
    if not any(map(_is_float, args[0])):
        return without_floats(field, func, args, named)
    return _joined(field, args[0], lambda values: func(values, *args[1:], **named))


def _joined(field: FieldArithmetic, operands: Sequence[Any], join: Callable[[list[Tensor]], Tensor]) -> FieldTensor:
    held = [_parts(field, operand) for operand in operands]
    if any(len(parts) == 2 for parts in held):
        held = [_tensor(_as_complex(field, parts)).parts for parts in held]
    return FieldTensor(*(_together(parts, join) for parts in zip(*held, strict=True)))


def _together(parts: Sequence[Elements], join: Callable[[list[Tensor]], Tensor]) -> Elements:
    residues = zip(*(part.residues for part in parts), strict=True)
    return Elements(tuple(join(list(each)) for each in residues), joined([part.bound for part in parts]))


def _index_put(field: FieldArithmetic, func: Any, args: Args, named: Named) -> Any:
    if len(args) > 3 or named or not _is_float(args[0]) or any(map(_is_float, args[1])):
        raise NoMeaning(f"{func} that adds up")
    return _joined(field, (args[0], args[2]), lambda values: func(values[0], args[1], values[1]))


def _padded(field: FieldArithmetic, func: Any, args: Args, named: Named) -> Any:
    if not _is_float(args[0]):
        return without_floats(field, func, args, named)
    filling = field.number(args[2] if len(args) > 2 else named.get("value", 0))
    parts = (_real(field, args[0]), filling)
    return FieldTensor(_together(parts, lambda values: func(values[0], args[1], int(values[1]))))


# --- literals -------------------------------------------------------------------------------------------------------


def _filled(position: int) -> Rule:
    """A rule for operations whose argument at `position` fills their result: the literal itself, never rounded."""

    def rule(field: FieldArithmetic, func: Any, args: Args, named: Named) -> Any:
        result = _plain(func, args, named)
        if not _is_inexact(result):
            return result
        value = args[position] if len(args) > position else named["fill_value"]
        (number,) = _parts(field, value)
        return FieldTensor(number.moved(lambda x: x.expand(result.shape).clone()))

    return rule


def _created(field: FieldArithmetic, func: Any, args: Args, named: Named) -> Any:
    result = _plain(func, args, named)
    return FieldTensor(field.tensor(result)) if _is_inexact(result) else result


def _uninitialised(field: FieldArithmetic, func: Any, args: Args, named: Named) -> Any:
    result = _plain(func, args, named)
    if not _is_inexact(result):
        return result
    return FieldTensor(field.undefined(*result.shape))


def _plain(func: Any, args: Args, named: Named) -> Tensor:
    """The operation on tensors of the same shapes without content."""
    args, named = pytree.tree_map(_without_content, (args, named))
    return func(*args, **named)


def _without_content(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, FieldTensor) else value


_PAIRS = (aten.slice_scatter.default, aten.select_scatter.default, aten.copy.default)
_ZEROS_AND_ONES = (
    aten.zeros.default, aten.ones.default, aten.new_zeros.default, aten.new_ones.default, aten.zeros_like.default,
    aten.ones_like.default, aten.arange.default, aten.arange.start, aten.arange.start_step,
)  # fmt: skip

RULES.update(
    {
        **dict.fromkeys((each for each in MOVEMENT if isinstance(each, OpOverload)), _moved),
        **dict.fromkeys(
            (aten._reshape_alias.default, aten.lift_fresh_copy.default, *(SELECTION - {aten.where.self})), _moved
        ),
        **dict.fromkeys(CAST, _cast),
        **dict.fromkeys(_PAIRS, _join_of(0, 2)),
        aten.where.self: _join_of(1, 3),
        aten.cat.default: _join_of_list,
        aten.stack.default: _join_of_list,
        aten.index_put.default: _index_put,
        aten.constant_pad_nd.default: _padded,
        aten.scalar_tensor.default: _filled(0),
        **dict.fromkeys((aten.full.default, aten.full_like.default), _filled(1)),
        aten.new_full.default: _filled(2),
        **dict.fromkeys(_ZEROS_AND_ONES, _created),
        **dict.fromkeys(UNDEFINED, _uninitialised),
    }
)
