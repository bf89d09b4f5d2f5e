"""Every row of the table, beside exact arithmetic on fractions; and what has no row."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from fx_fusion.graph.operations import MOVEMENT, aten, prims
from fx_fusion.proof.field.arithmetic import Elements, FieldArithmetic
from fx_fusion.proof.field.interpreter import Over
from fx_fusion.proof.field.operations import RULES
from fx_fusion.proof.field.residues import UNDEFINED
from fx_fusion.proof.field.tensor import FieldTensor
from fx_fusion.proof.field.verdict import DegreeTooHigh, NoMeaning

PRIMES = (1310439359, 1865569271)
ARITHMETIC = FieldArithmetic(PRIMES, {})


def field(values):
    """Numbers as elements of both fields."""
    with _disable_current_modes():
        return FieldTensor(ARITHMETIC.tensor(torch.as_tensor(values, dtype=torch.float64)))


def pairs(values):
    """Complex numbers: real and imaginary parts in the last dimension."""
    with Over(ARITHMETIC):
        return aten.view_as_complex.default(field(values))


def residues(numbers):
    """[fields][elements] of exact fractions."""
    return [[n.numerator * pow(n.denominator, -1, p) % p for n in map(Fraction, numbers)] for p in PRIMES]


def held(tensor):
    """[parts][fields][elements]"""
    return [[each.flatten().tolist() for each in part.residues] for part in tensor.parts]


def compute(call):
    with torch.no_grad(), Over(ARITHMETIC):
        result = call()
    return result if isinstance(result, FieldTensor) else FieldTensor(ARITHMETIC.tensor(result))


# Squares of fractions modulo both primes have the roots that they have in the rationals, up to their sign: these, being
# products of 2, 3, 5 and 7, exactly those.
SMALL = [1.0, 2.0, 3.0, 4.0, 6.0, 8.0]
VALUES = [2.0, -3.0, 5.0, 0.5, -0.25, 7.0]


def each(fn, *columns):
    return [fn(*map(Fraction, row)) for row in zip(*columns, strict=True)]


OTHER = [3.0, 4.0, -2.0, 8.0, 0.125, -1.0]
THIRD = [1.0, -2.0, 5.0, 0.5, 4.0, 3.0]

REAL = {
    "add": (lambda: aten.add.Tensor(field(VALUES), field(OTHER)), lambda: each(lambda a, b: a + b, VALUES, OTHER)),
    "add alpha": (
        lambda: aten.add.Tensor(field(VALUES), field(OTHER), alpha=0.75),
        lambda: each(lambda a, b: a + b * 3 / 4, VALUES, OTHER),
    ),
    "add scalar": (lambda: aten.add.Scalar(field(VALUES), 1e-6), lambda: each(lambda a: a + Fraction(1e-6), VALUES)),
    "sub": (
        lambda: aten.sub.Tensor(field(VALUES), field(OTHER), alpha=3),
        lambda: each(lambda a, b: a - 3 * b, VALUES, OTHER),
    ),
    "sub scalar": (lambda: aten.sub.Scalar(field(VALUES), 0.1), lambda: each(lambda a: a - Fraction(0.1), VALUES)),
    "rsub": (
        lambda: aten.rsub.Scalar(field(VALUES), 1.0, alpha=2.0),
        lambda: each(lambda a: 1 - 2 * a, VALUES),
    ),
    "rsub tensor": (
        lambda: aten.rsub.Tensor(field(VALUES), field(OTHER)),
        lambda: each(lambda a, b: b - a, VALUES, OTHER),
    ),
    "neg": (lambda: aten.neg.default(field(VALUES)), lambda: each(lambda a: -a, VALUES)),
    "mul": (lambda: aten.mul.Tensor(field(VALUES), field(OTHER)), lambda: each(lambda a, b: a * b, VALUES, OTHER)),
    "mul by a mask": (
        lambda: aten.mul.Tensor(field(VALUES), torch.tensor([True, False] * 3)),
        lambda: each(lambda a, b: a * b, VALUES, [1, 0] * 3),
    ),
    "mul scalar": (lambda: aten.mul.Scalar(field(VALUES), -0.1), lambda: each(lambda a: a * Fraction(-0.1), VALUES)),
    "div": (lambda: aten.div.Tensor(field(VALUES), field(OTHER)), lambda: each(lambda a, b: a / b, VALUES, OTHER)),
    "div scalar": (lambda: aten.div.Scalar(field(VALUES), 3.0), lambda: each(lambda a: a / 3, VALUES)),
    "div of integers": (
        lambda: aten.div.Tensor(torch.tensor([1, 2]), torch.tensor([3, -7])),
        lambda: [Fraction(1, 3), Fraction(-2, 7)],
    ),
    "square": (lambda: aten.square.default(field(VALUES)), lambda: each(lambda a: a * a, VALUES)),
    "reciprocal": (lambda: aten.reciprocal.default(field(VALUES)), lambda: each(lambda a: 1 / a, VALUES)),
    "sqrt": (lambda: aten.sqrt.default(field([n * n for n in SMALL])), lambda: SMALL),
    "rsqrt": (lambda: aten.rsqrt.default(field([n * n for n in SMALL])), lambda: each(lambda a: 1 / a, SMALL)),
    "pow 3": (lambda: aten.pow.Tensor_Scalar(field(VALUES), 3), lambda: each(lambda a: a**3, VALUES)),
    "pow -2": (lambda: aten.pow.Tensor_Scalar(field(VALUES), -2), lambda: each(lambda a: a**-2, VALUES)),
    "pow 0": (lambda: aten.pow.Tensor_Scalar(field(VALUES), 0), lambda: [1] * 6),
    "pow -1.5": (
        lambda: aten.pow.Tensor_Scalar(field([n * n for n in SMALL]), -1.5),
        lambda: each(lambda a: a**-3, SMALL),
    ),
    "addcmul": (
        lambda: aten.addcmul.default(field(VALUES), field(OTHER), field(THIRD), value=-0.5),
        lambda: each(lambda a, b, c: a - b * c / 2, VALUES, OTHER, THIRD),
    ),
    "addcdiv": (
        lambda: aten.addcdiv.default(field(VALUES), field(OTHER), field(THIRD), value=2.0),
        lambda: each(lambda a, b, c: a + 2 * b / c, VALUES, OTHER, THIRD),
    ),
    "sum": (lambda: aten.sum.default(field(VALUES)), lambda: [sum(map(Fraction, VALUES))]),
    "sum over a dimension": (
        lambda: aten.sum.dim_IntList(field([VALUES, OTHER]), [1], True),
        lambda: [sum(map(Fraction, VALUES)), sum(map(Fraction, OTHER))],
    ),
    "mean": (lambda: aten.mean.default(field(VALUES)), lambda: [sum(map(Fraction, VALUES)) / 6]),
    "mean over a dimension": (
        lambda: aten.mean.dim(field([VALUES, OTHER]), [0]),
        lambda: each(lambda a, b: (a + b) / 2, VALUES, OTHER),
    ),
    "where": (
        lambda: aten.where.self(torch.tensor([True, False] * 3), field(VALUES), field(OTHER)),
        lambda: [a if i % 2 == 0 else b for i, (a, b) in enumerate(zip(VALUES, OTHER, strict=True))],
    ),
    "cat": (lambda: aten.cat.default([field(VALUES), field(OTHER)], 0), lambda: VALUES + OTHER),
    "stack": (
        lambda: aten.stack.default([field(VALUES), field(OTHER)], 1),
        lambda: [x for pair in zip(VALUES, OTHER, strict=True) for x in pair],
    ),
    "slice_scatter": (
        lambda: aten.slice_scatter.default(field(VALUES), field(OTHER[:2]), 0, 1, 3),
        lambda: [VALUES[0], *OTHER[:2], *VALUES[3:]],
    ),
    "select_scatter": (
        lambda: aten.select_scatter.default(field(VALUES), field(9.0), 0, 2),
        lambda: [*VALUES[:2], 9.0, *VALUES[3:]],
    ),
    "copy": (lambda: aten.copy.default(field(VALUES), field(OTHER)), lambda: OTHER),
    "index_put": (
        lambda: aten.index_put.default(field(VALUES), [torch.tensor([5, 0])], field([1.5, 2.5])),
        lambda: [2.5, *VALUES[1:5], 1.5],
    ),
    "gather": (lambda: aten.gather.default(field(VALUES), 0, torch.tensor([5, 1])), lambda: [VALUES[5], VALUES[1]]),
    "index_select": (
        lambda: aten.index_select.default(field(VALUES), 0, torch.tensor([4])), lambda: [VALUES[4]],
    ),
    "index": (lambda: aten.index.Tensor(field(VALUES), [torch.tensor([3, 3])]), lambda: [VALUES[3]] * 2),
    "embedding": (
        lambda: aten.embedding.default(field([VALUES, OTHER]), torch.tensor([1])), lambda: OTHER,
    ),
    "pad": (
        lambda: aten.constant_pad_nd.default(field(VALUES), [1, 1], -0.5), lambda: [-0.5, *VALUES, -0.5],
    ),
    "split": (lambda: aten.split.Tensor(field(VALUES), 4)[1], lambda: VALUES[4:]),
    "cast": (lambda: prims.convert_element_type.default(field(VALUES), torch.bfloat16), lambda: VALUES),
    "cast of integers": (
        lambda: aten._to_copy.default(torch.tensor([3, -4]), dtype=torch.float32), lambda: [3, -4],
    ),
    "full": (lambda: aten.full.default([2], 1e-6), lambda: [Fraction(1e-6)] * 2),
    "full_like": (lambda: aten.full_like.default(field(VALUES), 0.1), lambda: [Fraction(0.1)] * 6),
    "new_full": (lambda: aten.new_full.default(field(VALUES), [1], 0.1), lambda: [Fraction(0.1)]),
    "scalar_tensor": (lambda: aten.scalar_tensor.default(0.7), lambda: [Fraction(0.7)]),
    "zeros_like": (lambda: aten.zeros_like.default(field(VALUES)), lambda: [0] * 6),
    "ones": (lambda: aten.ones.default([2]), lambda: [1, 1]),
    "arange": (lambda: aten.arange.start_step(0.0, 1.5, 0.5), lambda: [0, Fraction(1, 2), 1]),
    "integers": (
        lambda: aten.add.Tensor(aten.mul.Tensor(torch.tensor([2, 3]), 5), 1), lambda: [11, 16],
    ),
}  # fmt: skip
if hasattr(prims, "fma"):
    REAL["fma"] = (
        lambda: prims.fma.default(field(VALUES), field(OTHER), field(THIRD)),
        lambda: each(lambda a, b, c: a * b + c, VALUES, OTHER, THIRD),
    )

LEFT, RIGHT = [[1.0, 2.0], [-3.0, 0.5]], [[4.0, -1.0], [2.0, 2.0]]


def products(a, b):
    return [(x * u - y * v, x * v + y * u) for (x, y), (u, v) in zip(a, b, strict=True)]


COMPLEX = {
    "product": (lambda: aten.mul.Tensor(pairs(LEFT), pairs(RIGHT)), lambda: products(LEFT, RIGHT)),
    "sum": (
        lambda: aten.add.Tensor(pairs(LEFT), pairs(RIGHT)),
        lambda: [(x + u, y + v) for (x, y), (u, v) in zip(LEFT, RIGHT, strict=True)],
    ),
    "times a real": (
        lambda: aten.mul.Tensor(pairs(LEFT), field([2.0, 3.0])), lambda: [(2.0, 4.0), (-9.0, 1.5)],
    ),
    "less a real": (lambda: aten.sub.Tensor(pairs(LEFT), field([1.0, 1.0])), lambda: [(0.0, 2.0), (-4.0, 0.5)]),
    "made of parts": (
        lambda: aten.complex.default(field([1.0, 2.0]), field([3.0, 4.0])), lambda: [(1.0, 3.0), (2.0, 4.0)],
    ),
    "joined to a real": (
        lambda: aten.cat.default([pairs(LEFT), field([7.0])], 0), lambda: [*map(tuple, LEFT), (7.0, 0.0)],
    ),
    "widened": (
        lambda: aten._to_copy.default(field([5.0]), dtype=torch.complex64), lambda: [(5.0, 0.0)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real(name):
    call, expected = REAL[name]
    assert held(compute(call)) == [residues(expected())]


@pytest.mark.parametrize("name", COMPLEX)
def test_complex(name):
    call, expected = COMPLEX[name]
    real, imaginary = zip(*expected(), strict=True)
    result = compute(call)
    assert held(result) == [residues(real), residues(imaginary)]
    flat = [part for pair in expected() for part in pair]
    assert held(compute(lambda: aten.view_as_real.default(result))) == [residues(flat)]


MOVES = {
    aten.permute.default: ([1, 0],), aten.t.default: (), aten.transpose.int: (0, 1), aten.unsqueeze.default: (0,),
    aten.squeeze.default: (), aten.squeeze.dim: (0,), aten.squeeze.dims: ([0],), aten.expand.default: ([3, 2, 3],),
    aten.slice.Tensor: (1, 1, 3), aten.select.int: (0, 1), aten.clone.default: (), aten.alias.default: (),
    aten.detach.default: (), aten.split.Tensor: (1,), aten.split_with_sizes.default: ([1, 1],),
    aten.unbind.int: (1,), aten.flip.default: ([1],), aten.roll.default: ([1], [1]), aten.repeat.default: ([2, 1],),
    prims.rev.default: ([0],), aten.reshape.default: ([3, 2],), aten.view.default: ([6],),
    aten._unsafe_view.default: ([6],), aten._reshape_alias.default: ([6], [1]), aten.lift_fresh_copy.default: (),
}  # fmt: skip


@pytest.mark.parametrize("op", MOVES, ids=str)
def test_movement(op):
    """Elements go where numbers go."""
    values = torch.arange(1.0, 7.0).reshape(2, 3)
    expected = op(values, *MOVES[op])
    with Over(ARITHMETIC):
        moved = op(field(values), *MOVES[op])
    for piece, numbers in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (moved, expected)), strict=True):
        assert piece.shape == numbers.shape and piece.stride() == piece.parts[0].residues[0].stride()
        assert held(piece) == [residues(numbers.flatten().tolist())]


EXAMPLES = "add sub rsub neg mul div square reciprocal sqrt rsqrt pow addcmul addcdiv sum mean where cat stack"
EXAMPLES += " slice_scatter select_scatter copy index_put gather index_select index embedding constant_pad_nd full"
EXAMPLES += " full_like new_full scalar_tensor zeros_like ones arange fma complex view_as_complex view_as_real"
#: Like others that have an example: made of zeros, ones or nothing.
LIKE_OTHERS = "zeros new_zeros new_ones ones_like empty empty_strided new_empty new_empty_strided empty_like"


def test_every_row_has_an_example():
    named = {op._schema.name.split("::")[1] for op in RULES if op not in MOVES}
    assert named <= {*EXAMPLES.split(), *LIKE_OTHERS.split(), "convert_element_type", "_to_copy"}
    assert {op for op in MOVEMENT if isinstance(op, torch._ops.OpOverload)} <= set(MOVES)


NO_MEANING = {
    "aten.exp.default": lambda: aten.exp.default(field(VALUES)),
    "aten.abs.default": lambda: aten.abs.default(field(VALUES)),
    "aten.clamp.default": lambda: aten.clamp.default(field(VALUES), -1.0, 1.0),
    "aten.round.default": lambda: aten.round.default(field(VALUES)),
    "aten.gt.Scalar": lambda: aten.gt.Scalar(field(VALUES), 0.0),
    "aten.maximum.default": lambda: aten.maximum.default(field(VALUES), field(OTHER)),
    "aten.cumsum.default": lambda: aten.cumsum.default(field(VALUES), 0),
    "aten.sin.default": lambda: aten.sin.default(torch.tensor([1, 2])),
    "convert_element_type": lambda: prims.convert_element_type.default(field(VALUES), torch.int64),
    "a power of 0.25": lambda: aten.pow.Tensor_Scalar(field(VALUES), 0.25),
    "a power of 65": lambda: aten.pow.Tensor_Scalar(field(VALUES), 65),
    "an infinite literal": lambda: aten.add.Scalar(field(VALUES), float("inf")),
    "a division by zero": lambda: aten.div.Scalar(field(VALUES), 0.0),
    "complex": lambda: aten.div.Tensor(field([1.0]), pairs([LEFT[0]])),
    "adds up": lambda: aten.index_put.default(field(VALUES), [torch.tensor([0])], field([1.0]), True),
}


@pytest.mark.parametrize("name", NO_MEANING)
def test_an_operation_without_a_meaning_is_named(name):
    with pytest.raises(NoMeaning, match=name.replace(".", r"\.")):
        compute(NO_MEANING[name])


def test_outside_of_the_mode_nothing_is_computed():
    with pytest.raises(NoMeaning, match="outside of a field"):
        aten.add.Tensor(field(VALUES), 1)


UNDEFINED_RESULTS = {
    "1 / 0": lambda: aten.reciprocal.default(field([0.0, 1.0])),
    "root of a negative": lambda: aten.sqrt.default(field([-1.0, 1.0])),
    "not a number": lambda: aten.cat.default([aten.scalar_tensor.default(float("nan"))[None], field([1.0])], 0),
    "memory": lambda: aten.cat.default([aten.empty.memory_format([1]), field([1.0])], 0),
}


@pytest.mark.parametrize("name", UNDEFINED_RESULTS)
def test_undefined_absorbs(name):
    def call():
        x = UNDEFINED_RESULTS[name]()
        y = aten.mul.Tensor(aten.sub.Tensor(x, 0.5), 0.0)
        y = aten.neg.default(aten.pow.Tensor_Scalar(aten.add.Tensor(y, 1.0), -0.5))
        return aten.cat.default([y, aten.sum.dim_IntList(y, [0], True), aten.mean.dim(y[1:], [0], True)], 0)

    for undefined, one, total, mean in held(compute(call))[0]:
        assert (undefined, total) == (UNDEFINED, UNDEFINED)
        assert one != UNDEFINED and mean == one


def test_the_degree_is_bounded():
    def call():
        x = FieldTensor(Elements(tuple(torch.tensor([3]) for _ in PRIMES)))
        for _ in range(6):
            x = aten.pow.Tensor_Scalar(x, 8)
        return x

    with pytest.raises(DegreeTooHigh, match="a degree of 262144, above 65536"):
        compute(call)
