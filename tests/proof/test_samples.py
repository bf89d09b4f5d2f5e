"""Which steps samples tell anything about."""

from __future__ import annotations

import pytest

from fx_fusion.decline import Decline
from fx_fusion.graph.operations import aten
from fx_fusion.proof.samples import check_analytic
from proof.branches import branch


def mean_square(call, x):
    return call(aten.mean.dim, call(aten.mul.Tensor, x, x), [-1], True)


def inverse_root(call, x):
    return call(aten.rsqrt.default, call(aten.add.Tensor, mean_square(call, x), 1e-6))


def square(call, x):
    return call(aten.mul.Tensor, x, x)


ANALYTIC = {
    "norm": lambda call, x: call(aten.mul.Tensor, x, inverse_root(call, x)),
    "power": lambda call, x: call(aten.pow.Tensor_Scalar, x, 3),
    "inverse root as power": lambda call, x: call(aten.pow.Tensor_Scalar, mean_square(call, x), -0.5),
    "roll": lambda call, x: call(aten.roll.default, x, [1], [1]),
}

NOT_ANALYTIC = {
    "absolute value": lambda call, x: call(aten.abs.default, x),
    "clamp": lambda call, x: call(aten.clamp.default, x, -1.0, 1.0),
    "round": lambda call, x: call(aten.round.default, x),
    "maximum": lambda call, x: call(aten.maximum.default, x, x),
    "root of a square": lambda call, x: call(aten.sqrt.default, square(call, x)),
    "root of a square and eps": lambda call, x: call(aten.sqrt.default, call(aten.add.Tensor, square(call, x), 1e-30)),
    "root as power": lambda call, x: call(aten.pow.Tensor_Scalar, square(call, x), 0.5),
    "root of a sum of one": lambda call, x: call(
        aten.sqrt.default, call(aten.sum.dim_IntList, call(aten.unsqueeze.default, x, -1), [-1])
    ),
    "softplus": lambda call, x: call(aten.softplus.default, x),
}


@pytest.mark.parametrize("name", ANALYTIC)
def test_analytic(name):
    check_analytic(branch(ANALYTIC[name]))


@pytest.mark.parametrize("name", NOT_ANALYTIC)
def test_not_analytic(name):
    with pytest.raises(Decline) as declined:
        check_analytic(branch(NOT_ANALYTIC[name]))
    assert declined.value.code == "proof.not_analytic"
