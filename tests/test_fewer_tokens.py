"""The copy of a computation at fewer tokens: it computes the same of some tokens, or there is none."""

from __future__ import annotations

import pytest
import torch
from test_analysis import Builder

from fx_fusion.graph.operations import aten
from fx_fusion.graph.sizes import Sizes
from fx_fusion.proof.evaluate import Arithmetic, evaluate
from fx_fusion.proof.token_reduction import fewer_tokens

SEQ, HEADS, DIM = 19, 4, 8


def branch(steps, shape=(1, SEQ, HEADS * DIM)):
    """`steps` applied to data of `shape`, given a row of angles for each token and a weight for each lane."""
    build = Builder()
    data = build.input("data", *shape)
    leaves = {"angles": build.input("angles", 1, SEQ, DIM), "weight": build.input("weight", DIM)}
    out = steps(build, data, **leaves)
    return [data, *leaves.values()], out


def shortened(steps, shape=(1, SEQ, HEADS * DIM), tokens=SEQ):
    inputs, out = branch(steps, shape)
    return inputs, out, fewer_tokens(inputs, [out], inputs[0], tokens)


def agrees(inputs, out, copies):
    """Are the original's results, for the tokens that remain, what the copy computes of those tokens?"""
    values = {node: torch.randn(node.meta["val"].shape, dtype=torch.float64) for node in inputs}
    (expected,) = evaluate([out], values, Sizes())
    for kept in ([0, 1, 2], [16, 17, 18], [2, 11, 18]):
        few = {copies[node]: pick(value, copies[node], kept) for node, value in values.items()}
        (actual,) = evaluate([copies[out]], few, Sizes())
        torch.testing.assert_close(actual, pick(expected, copies[out], kept), rtol=1e-12, atol=1e-12)


def pick(value, copy, kept):
    """The `kept` tokens of a value, along the one dimension in which its copy is shorter (tokens come first there)."""
    shorter = [dim for dim, size in enumerate(copy.meta["val"].shape) if size != value.shape[dim]]
    if not shorter:
        return value
    (dim,) = shorter
    return value.unflatten(dim, (SEQ, -1)).index_select(dim, torch.tensor(kept)).flatten(dim, dim + 1)


def heads(build, data):
    return build(aten.permute.default, build(aten.reshape.default, data, [1, SEQ, HEADS, DIM]), [0, 2, 1, 3])


def rotated(build, data, angles, weight):
    x = build(aten.mul.Tensor, heads(build, data), weight)
    square = build(aten.mean.dim, build(aten.pow.Tensor_Scalar, x, 2), [-1], True)
    x = build(aten.mul.Tensor, x, build(aten.rsqrt.default, square))
    a, b = (build(aten.slice.Tensor, x, 3, first, first + DIM // 2) for first in (0, DIM // 2))
    y = build(aten.cat.default, [build(aten.neg.default, b), a], -1)
    return build(aten.mul.Tensor, y, build(aten.unsqueeze.default, angles, 1))


def test_a_rotation_is_copied_at_three_tokens():
    inputs, out, copies = shortened(rotated)
    assert list(copies[out].meta["val"].shape) == [1, HEADS, 3, DIM]
    assert [list(copies[node].meta["val"].shape) for node in inputs] == [[1, 3, HEADS * DIM], [1, 3, DIM], [DIM]]


def adds_a_lane_dimension(build, data, angles, weight):
    x = heads(build, data)
    parts = [build(aten.select.int, x, -1, lane) for lane in (1, 0)]
    pairs = build(aten.stack.default, parts, 1)
    flat = build(aten.reshape.default, pairs, [2 * HEADS, SEQ])
    return build(aten.flip.default, build(aten.unsqueeze.default, flat, 0), [1])


def flat_tokens(build, data, angles, weight):
    x = build(aten.reshape.default, data, [SEQ * HEADS, DIM])
    return build(aten.add.Tensor, x, build(aten.expand.default, weight, [SEQ * HEADS, DIM]))


def scattered_lanes(build, data, angles, weight):
    x = heads(build, data)
    half = build(aten.mul.Tensor, build(aten.slice.Tensor, x, 3, 0, 4), 2.0)
    x = build(aten.slice_scatter.default, x, half, 3, 4, 8)
    x = build(aten.select_scatter.default, x, build(aten.select.int, x, -1, 0), -1, 3)
    return build(aten.roll.default, x, [1], [3])


@pytest.mark.parametrize("steps", [rotated, adds_a_lane_dimension, flat_tokens, scattered_lanes])
def test_the_copy_computes_the_same_of_any_few_tokens(steps):
    inputs, out, copies = shortened(steps)
    assert copies
    agrees(inputs, out, copies)
    assert copies[out].meta["val"].numel() == out.meta["val"].numel() // SEQ * 3


def of_tokens(op, *args):
    return lambda build, data, angles, weight: build(op, heads(build, data), *args)


def position_mask(build, data, angles, weight):
    """The first token is treated otherwise than the rest."""
    number = build(aten.arange.default, SEQ)
    return build(aten.mul.Tensor, heads(build, data), build(aten.unsqueeze.default, number, 1))


def next_tokens_angles(build, data, angles, weight):
    shifted = build(aten.roll.default, angles, [1], [1])
    return build(aten.mul.Tensor, heads(build, data), build(aten.unsqueeze.default, shifted, 1))


def shifted_by_slices(build, data, angles, weight):
    x = heads(build, data)
    parts = [build(aten.slice.Tensor, x, 2, 1, SEQ), build(aten.slice.Tensor, x, 2, 0, 1)]
    return build(aten.cat.default, parts, 2)


def first_token_for_all(build, data, angles, weight):
    x = heads(build, data)
    return build(aten.mul.Tensor, x, build(aten.slice.Tensor, x, 2, 0, 1))


def first_angles_for_all(build, data, angles, weight):
    first = build(aten.expand.default, build(aten.slice.Tensor, angles, 1, 0, 1), [1, SEQ, DIM])
    return build(aten.mul.Tensor, heads(build, data), build(aten.unsqueeze.default, first, 1))


def tokens_as_heads(build, data, angles, weight):
    """Reads [heads, tokens] where [tokens, heads] lie."""
    return build(aten.mul.Tensor, build(aten.reshape.default, data, [1, HEADS, SEQ, DIM]), weight)


def one_token_changed(build, data, angles, weight):
    x = heads(build, data)
    return build(aten.select_scatter.default, x, build(aten.select.int, x, 2, 3), 2, 5)


def some_tokens_changed(build, data, angles, weight):
    x = heads(build, data)
    return build(aten.slice_scatter.default, x, build(aten.slice.Tensor, x, 2, 0, 4), 2, 8, 12)


def shuffled(build, data, angles, weight):
    order = build(aten.arange.default, SEQ)
    return build(aten.index.Tensor, heads(build, data), [None, None, order])


@pytest.mark.parametrize(
    "steps",
    [
        of_tokens(aten.roll.default, [1], [2]),
        of_tokens(aten.roll.default, [DIM]),
        of_tokens(aten.flip.default, [-2]),
        of_tokens(aten.cumsum.default, 2),
        of_tokens(aten.mean.dim, [-2], True),
        of_tokens(aten.sum.dim_IntList, [1, 2], True),
        position_mask,
        next_tokens_angles,
        shifted_by_slices,
        first_token_for_all,
        tokens_as_heads,
        one_token_changed,
        some_tokens_changed,
        shuffled,
    ],
)
def test_where_tokens_mix_there_is_no_copy(steps):
    assert not shortened(steps)[2]


@pytest.mark.parametrize("times", [[1, 1, 2, 1], [2, 1, 1, 3], [3, 1, 1, 1, 1]])
def test_all_tokens_repeated(times):
    """The copy repeats those that remain as often."""
    inputs, out, copies = shortened(of_tokens(aten.repeat.default, times))
    few = copies[inputs[0]].meta["val"].shape[1]
    data = torch.randn(1, few, HEADS * DIM, dtype=torch.float64)
    (actual,) = evaluate([copies[out]], {copies[inputs[0]]: data}, Sizes())
    assert few < SEQ and torch.equal(actual, data.view(1, few, HEADS, DIM).transpose(1, 2).repeat(times))


def repeated_for_each_token(build, data, angles, weight):
    x = build(aten.reshape.default, data, [SEQ, HEADS * DIM])
    return build(aten.mul.Tensor, x, build(aten.repeat.default, weight, [SEQ, HEADS]))


def filled_for_each_token(build, data, angles, weight):
    x = build(aten.reshape.default, data, [SEQ, HEADS * DIM])
    return build(aten.mul.Tensor, x, build(aten.full.default, [SEQ, 1], 3.0))


@pytest.mark.parametrize("steps", [repeated_for_each_token, filled_for_each_token])
def test_what_is_the_same_for_each_token(steps):
    inputs, out, copies = shortened(steps)
    agrees(inputs, out, copies)
    assert list(copies[out].meta["val"].shape) == [3, HEADS * DIM]


def test_a_value_taken_from_one_token_is_none_that_all_have():
    """The angles of the first token alone: tokens of the data may be left out, none of the angles'."""
    inputs, _, copies = shortened(first_angles_for_all)
    assert not copies or list(copies[inputs[1]].meta["val"].shape) == [1, SEQ, DIM]


def test_a_permutation_of_tokens_remains_one():
    """[pairs, 2] to [2, pairs]: pairs of tokens may be left out, and what is left is permuted as all were."""
    build = Builder()
    data = build.input("x", 1, 40, 2)
    out = build(aten.permute.default, build(aten.reshape.default, data, [1, 20, 2, 2]), [0, 2, 1, 3])
    copies = fewer_tokens([data], [out], data, 40)
    (moved,) = evaluate([copies[out]], {copies[data]: torch.arange(12).reshape(1, 6, 2)}, Sizes(), Arithmetic.MOVE)
    assert (moved[..., 0] // 2).flatten().tolist() == [0, 2, 4, 1, 3, 5]


def test_sizes_that_coincide_are_told_apart():
    """As many tokens as lanes."""
    build = Builder()
    data, angles, weight = build.input("x", 1, 32, 4, 32), build.input("angles", 32, 1, 32), build.input("weight", 32)
    out = build(aten.mul.Tensor, build(aten.mul.Tensor, data, angles), weight)
    copies = fewer_tokens([data, angles, weight], [out], data, 32)
    shapes = [list(copies[node].meta["val"].shape) for node in (data, angles, weight, out)]
    assert shapes == [[1, 3, 4, 32], [3, 1, 32], [32], [1, 3, 4, 32]]


def test_sequences_and_positions_are_both_shortened():
    build = Builder()
    data = build.input("x", 24 * 40, 32)
    out = build(aten.permute.default, build(aten.reshape.default, data, [24, 40, 4, 8]), [0, 2, 1, 3])
    copies = fewer_tokens([data], [out], data, 24 * 40)
    assert list(copies[data].meta["val"].shape) == [15, 32]
    assert list(copies[out].meta["val"].shape) == [5, 4, 3, 8]


def test_few_tokens_stay_as_they_are():
    build = Builder()
    data = build.input("x", 16, 8)
    out = build(aten.neg.default, data)
    assert not fewer_tokens([data], [out], data, 16)
