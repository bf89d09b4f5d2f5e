"""Rounding, row by row: what is lost in a small row is not excused by a large one."""

from __future__ import annotations

import itertools

import pytest
import torch
from prologue import Prologue, arguments
from torch.fx.experimental.proxy_tensor import make_fx

from fx_fusion.decline import Decline
from fx_fusion.graph.paths import Branch
from fx_fusion.graph.sizes import Sizes
from fx_fusion.proof import floats
from fx_fusion.proof.floats import check_rounding
from fx_fusion.proof.reference import Reference
from fx_fusion.proof.region_function import Probe
from fx_fusion.testing import run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS, LANES = 2, 8
COLUMNS = torch.arange(HEADS * LANES).reshape(HEADS, LANES)


def norm(x, eps=1e-6):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def check(region, fused=norm, dtype=torch.float32, tokens=3):
    """Compare what `region` computes of heads and a weight in `dtype` with `fused` of heads in float32, weighted."""

    def whole(data, weight):
        return region(data.unflatten(-1, (HEADS, LANES)), weight)

    data, weight = torch.zeros(tokens, HEADS * LANES, dtype=dtype), torch.zeros(LANES, dtype=dtype)
    graph = make_fx(whole)(data, weight).graph
    placeholders = graph.find_nodes(op="placeholder")
    (out,) = graph.find_nodes(op="output")
    nodes = tuple(node for node in graph.nodes if node.op == "call_function")
    branch = Branch(placeholders[0], placeholders[0], out.args[0], nodes, (placeholders[1],))

    def expected(data, leaves):
        x = data[:, COLUMNS]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return fused(x) * leaves[placeholders[1]].to(x.dtype)

    probe = Probe(branch, (placeholders[1],), Sizes())
    check_rounding(probe, Reference(expected, COLUMNS, None), torch.Generator().manual_seed(0))


def upcast(fn):
    """In float32, rounded once, then weighted."""
    return lambda x, weight: fn(x.float()).to(x.dtype) * weight


def refused(*args, **kwargs) -> str:
    with pytest.raises(Decline) as declined:
        check(*args, **kwargs)
    assert declined.value.code == "proof.mismatch"
    return declined.value.found


def shifted(by):
    """Over the reals the identity; in floats a loss of everything below a part of `by`."""
    return lambda y: (y + by) - by


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_rounding_as_a_model_does(dtype, tokens):
    check(upcast(norm), dtype=dtype, tokens=tokens)
    check(upcast(lambda x: x), lambda x: x, dtype=dtype, tokens=tokens)
    check(lambda x, weight: x * weight, lambda x: x, dtype=dtype, tokens=tokens)
    check(upcast(lambda x: x / (x.pow(2).sum(-1, keepdim=True) / LANES + 1e-6).sqrt()), dtype=dtype, tokens=tokens)


SHIFTS = [2.0**n for n in (100, 40, 20, 8, 0, -4, -20, -40, -80)]


@pytest.mark.parametrize("by", SHIFTS)
def test_cancellation(by):
    """A shift far above an ordinary value loses that, one far below it the small rows alone; a norm or none."""
    assert "in torch.float32 a row that the fused operation computes as up to" in refused(
        upcast(shifted(by)), lambda x: x
    )
    refused(upcast(lambda x: shifted(by)(norm(x))))
    refused(upcast(lambda x: norm(shifted(by)(x))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by", [2.0**100, 2.0**20, 2.0**10])
def test_cancellation_under_a_narrow_dtype(dtype, by):
    refused(upcast(shifted(by)), lambda x: x, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cancellation_in_a_narrow_dtype(dtype):
    refused(lambda x, weight: shifted(0.25)(x) * weight, lambda x: x, dtype=dtype)


def test_the_largest_row_excuses_no_other(monkeypatch):
    """With all rows of one magnitude, as samples used to be, the loss in small rows is not seen."""
    lossy = upcast(shifted(2.0**-20))
    refused(lossy, lambda x: x)
    monkeypatch.setattr(floats, "magnitudes", lambda dtype: (1.0,) * 6)
    check(lossy, lambda x: x)


def test_one_row_of_many():
    """An error in one head, in rows of any one magnitude, at any number of tokens."""
    for head, tokens, small in itertools.product(range(HEADS), (1, 2, 3, 7), (2.0**-20, 2.0**20)):

        def one_head(x, weight, head=head, small=small):
            own = (torch.arange(HEADS) == head)[:, None]
            return torch.where(own, shifted(small)(norm(x)), norm(x)) * weight

        refused(one_head, tokens=tokens)


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 6, 16])
@pytest.mark.parametrize("heads", [1, 4, 64])
def test_every_head_has_every_magnitude(tokens, heads):
    runs = list(floats._assignments(tokens, heads, 5))
    for head in range(heads):
        assert {int(which[token, head]) for which, _ in runs for token in range(tokens)} == set(range(5))
    assert {scale for _, scale in runs} == set(floats._LEAF_SCALES)


def test_weights_that_are_small():
    """What is lost of a weight shows where weights are small."""
    lossy = lambda x, weight: norm(x) * shifted(1.0)(weight)  # noqa: E731
    refused(lossy)


def test_squares_that_overflow():
    """Squared in float16, rows of some hundreds become 0; in bfloat16 nothing overflows that does not in float32."""
    squares = lambda x, weight: norm(x) * weight  # noqa: E731
    refused(squares, dtype=torch.float16)
    check(squares, dtype=torch.bfloat16)


def test_the_graph_may_overflow_where_the_call_does_not():
    check(upcast(lambda x: norm(x * 2.0**20 * 2.0**-20)))
    check(upcast(lambda x: x * 2.0**20 * 2.0**-20), lambda x: x)


def test_the_call_must_not_overflow_where_the_graph_does_not():
    found = refused(upcast(lambda x: x), lambda x: x * 2.0**20 * 2.0**-20)
    assert "overflows there alone" in found


def test_the_call_must_not_vanish_where_the_graph_does_not():
    """Scaled down before it is squared, a row near the square root of the largest float32 keeps its norm."""

    def scaled(x):
        small = x * 2.0**-40
        return small * torch.rsqrt(small.pow(2).mean(-1, keepdim=True) + 1e-6 * 2.0**-80)

    refused(upcast(scaled))


def test_through_the_pass():
    class Shifted(Prologue):
        def norm(self, x, weight):
            return shifted(2.0**-20)(super().norm(x, torch.ones_like(weight))) * weight

    for dtype in DTYPES:
        assert run(Prologue(dtype), arguments(dtype=dtype)).report.fused
    (layer,) = run(Shifted(), arguments()).report.layers
    assert layer.code in ("proof.mismatch", "norm.eps"), layer


def test_magnitudes():
    """All are numbers of the dtype, the smallest of them subnormal, squares of the second none."""
    for dtype in (*DTYPES, torch.float64):
        found = torch.tensor(floats.magnitudes(dtype), dtype=torch.float64)
        held = found.to(dtype)
        assert bool(held.isfinite().all()) and bool((held > 0).all())
        assert float(held[-1]) < torch.finfo(dtype).tiny
        assert bool((held[1] * held[1]).isinf())


def test_tolerances_cover_every_float_dtype_in_use():
    dtypes = {torch.bfloat16, torch.float16, torch.float32, torch.float64}
    assert set(floats.NATIVE_TOLERANCE) == set(floats.NATIVE_FLOOR) == dtypes
