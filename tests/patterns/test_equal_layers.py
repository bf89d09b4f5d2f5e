"""Equal layers are measured once. What corresponds to what, what they compute tells, never the order of nodes."""

from __future__ import annotations

import itertools

import pytest
import torch
from prologue import HEAD_DIM, HIDDEN, NUM_KV_HEADS, SECTION, Prologue, arguments
from rowwise import assert_as_eager
from torch import nn
from two_layers import Stack


class Sectioned(Prologue):
    """Cosines and sines are parts of the same rows, each put together for itself: in one order, or in the other."""

    order: tuple[int, ...] = (0, 1, 2, 3)

    def angles(self, positions):
        return self.cos_sin_cache[positions].chunk(2, -1)

    def rotate(self, x, cos, sin):
        """The four products, computed in `order`, and put together alike."""
        a, b = x.chunk(2, -1)
        cos, sin = mixed(cos), mixed(sin)
        makers = (lambda: a * cos, lambda: b * sin, lambda: b * cos, lambda: a * sin)
        found = {i: makers[i]() for i in self.order}
        return torch.cat([found[0] - found[1], found[2] + found[3]], -1)


class HalfTurned(Sectioned):
    """``rotate_half``, the sines made first or last."""

    def rotate(self, x, cos, sin):
        a, b = x.chunk(2, -1)
        turned = torch.cat([-b, a], -1)
        if self.order[0] == 0:
            plain, crossed = x * twice(mixed(cos)), turned * twice(mixed(sin))
        else:
            crossed = turned * twice(mixed(sin))
            plain = x * twice(mixed(cos))
        return plain + crossed


class Weighted(Sectioned):
    """The weight, a part of the rows of a table as well, is taken before the angles or after."""

    def forward(self, *given):
        self.weights = torch.cat([self.q_weight[8:], self.q_weight[:8]]), self.k_weight
        return super().forward(*given)

    def norm(self, x, weight):
        return super().norm(x, self.weights[weight is self.k_weight])


def mixed(rows):
    """[T, 1, pairs] of [3, T, pairs]"""
    return torch.cat([part[i] for i, part in enumerate(rows.split(SECTION, -1))], -1).unsqueeze(1)


def twice(half):
    return torch.cat([half, half], -1)


def layers(cls, orders):
    made = []
    for order in orders:
        layer = cls()
        layer.order = order
        layer.cos_sin_cache = torch.randn_like(layer.cos_sin_cache)
        made.append(layer)
    x, positions, slots, *_ = arguments()
    caches = [cache for _ in made for cache in arguments()[3:]]
    return Stack(*made), (x, positions, slots, *caches)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Sectioned, Weighted, HalfTurned])
def test_cosines_and_sines_change_places_in_the_graph(cls):
    model, given = layers(cls, [(0, 1, 2, 3), (1, 0, 3, 2), (3, 2, 1, 0)])
    report = assert_as_eager(model, given)
    assert len(report.fused) == 3, str(report)


@pytest.mark.slow
def test_every_order_of_the_products():
    model, given = layers(Sectioned, list(itertools.permutations(range(4)))[::3])
    report = assert_as_eager(model, given)
    assert len(report.fused) == 8, str(report)


def test_query_and_key_in_different_orders():
    """They have as many heads: one reading serves both."""

    class Alike(Sectioned):
        def __init__(self):
            super().__init__()
            self.o_proj = nn.Linear(NUM_KV_HEADS * HEAD_DIM, HIDDEN, bias=False)

        def split(self, qkv):
            q, k, v = super().split(qkv)
            return q[:, :NUM_KV_HEADS], k, v

        def rotate(self, x, cos, sin):
            self.order = (0, 1, 2, 3) if self.order[0] else (1, 0, 3, 2)
            return super().rotate(x, cos, sin)

    report = assert_as_eager(Alike(), arguments())
    assert len(report.fused) == 1, str(report)
