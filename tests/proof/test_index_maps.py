"""Elements are followed through movement alone, from far out: what only looks like counting does not count."""

from __future__ import annotations

import pytest
import torch
from test_analysis import Builder

from fx_fusion.graph.operations import aten, prims
from fx_fusion.graph.sizes import Sizes
from fx_fusion.proof.index_maps import FIRST, counts, moved_from, numbered

COUNT = 6


def built(steps, source=None):
    build = Builder()
    start = source(build) if source else iota(build)
    return start, steps(build, start)


def iota(build, start=0, step=1, count=COUNT):
    node = build.graph.call_function(prims.iota.default, (count,))
    node.kwargs = {"start": start, "step": step, "dtype": torch.int64, "device": "cpu", "requires_grad": False}
    node.meta["val"] = torch.arange(start, start + step * count, step)
    return node


COUNTING = [
    lambda build, x: x,
    lambda build, x: build(aten.unsqueeze.default, x, 1),
    lambda build, x: build(aten.reshape.default, x, [2, 3]),
    lambda build, x: build(aten.clone.default, build(aten.reshape.default, x, [1, COUNT, 1])),
    lambda build, x: build(aten.flip.default, build(aten.flip.default, x, [0]), [0]),
    lambda build, x: build(aten.roll.default, x, [COUNT], [0]),
    lambda build, x: build(aten.slice.Tensor, x, 0, 0, COUNT),
]

NOT_COUNTING = [
    lambda build, x: build(aten.flip.default, x, [0]),
    lambda build, x: build(aten.roll.default, x, [1], [0]),
    lambda build, x: build(aten.permute.default, build(aten.reshape.default, x, [2, 3]), [1, 0]),
    lambda build, x: build(aten.slice.Tensor, x, 0, 0, 3),
    lambda build, x: build(aten.slice.Tensor, x, 0, 0, COUNT, 2),
    lambda build, x: build(aten.expand.default, build(aten.unsqueeze.default, x, 0), [2, COUNT]),
    lambda build, x: build(aten.repeat.default, x, [2]),
    lambda build, x: build(aten.add.Tensor, x, 0),
    lambda build, x: build(aten.clamp_min.default, x, 0),
    lambda build, x: build(aten.cumsum.default, build(aten.ge.Scalar, x, 0), 0),
    lambda build, x: build(aten.index.Tensor, x, [build(aten.flip.default, x, [0])]),
]


@pytest.mark.parametrize("steps", COUNTING)
def test_what_counts(steps):
    assert counts(built(steps)[1], Sizes())


@pytest.mark.parametrize("steps", NOT_COUNTING)
def test_what_does_not(steps):
    assert not counts(built(steps)[1], Sizes())


@pytest.mark.parametrize("given", [{"start": 1}, {"step": 2}, {"start": 5, "step": -1}])
def test_another_beginning_or_step(given):
    assert not counts(built(COUNTING[0], lambda build: iota(build, **given))[1], Sizes())


def test_an_input_that_may_hold_anything():
    assert not counts(built(COUNTING[1], lambda build: build.input("x", COUNT, dtype=torch.int64))[1], Sizes())


@pytest.mark.parametrize("steps", COUNTING + NOT_COUNTING[:3])
def test_what_is_moved_from_where(steps):
    source, node = built(steps, lambda build: build.input("x", COUNT, dtype=torch.int64))
    found, arrived = moved_from(node, Sizes())
    assert found is source
    assert arrived.shape == node.meta["val"].shape
    assert sorted(arrived.reshape(-1).tolist()) == list(range(COUNT))


def test_no_further_than_all_elements_arrive():
    source, node = built(NOT_COUNTING[3], lambda build: build.input("x", COUNT, dtype=torch.int64))
    found, arrived = moved_from(node, Sizes())
    assert found is node is not source
    assert arrived.tolist() == [0, 1, 2]


def test_elements_are_numbered_where_no_literal_is():
    build = Builder()
    numbers = numbered(build.input("x", 2, 3), Sizes())
    assert numbers.tolist() == [[FIRST, FIRST + 1, FIRST + 2], [FIRST + 3, FIRST + 4, FIRST + 5]]
    assert FIRST > 1 << 32
