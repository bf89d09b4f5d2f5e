"""Random numbers are drawn at every run: they are no literals, no two of them are one value, and none is lost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from prologue import EPS, HEAD_DIM, POSITIONS, SLOTS, Prologue, arguments
from rowwise import assert_as_eager
from test_analysis import Builder

from fx_fusion.graph import operations
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.operations import aten


class Scale(Prologue):
    """What is stored is divided by one random number, drawn once a call."""

    def forward(self, *given):
        self.scale = torch.rand(()) + 0.5
        return super().forward(*given)

    def store(self, cache, slots, value):
        cache[slots] = value / self.scale


class Weight(Prologue):
    def norm(self, x, weight):
        return super().norm(x, torch.rand(HEAD_DIM) + 0.5)


class SharedWeight(Prologue):
    """One draw for query and key."""

    def forward(self, *given):
        self.q_weight_now = torch.rand(HEAD_DIM) + 0.5
        return super().forward(*given)

    def norm(self, x, weight):
        return super().norm(x, self.q_weight_now)


class Slots(Prologue):
    def forward(self, x, positions, slots, *caches):
        return super().forward(x, positions, torch.randperm(SLOTS)[: x.shape[0]], *caches)


class Positions(Prologue):
    def angles(self, positions):
        return super().angles(torch.randint(0, POSITIONS, positions.shape))


class PositionsEach(Prologue):
    """Query and key are rotated by angles drawn for each of them."""

    def forward(self, x, positions, slots, k_cache, v_cache):
        q, k, v = self.split(self.project(x))
        q = self.rotate(self.norm(q, self.q_weight), *self.angles(torch.randint(0, POSITIONS, positions.shape)))
        k = self.rotate(self.norm(k, self.k_weight), *self.angles(torch.randint(0, POSITIONS, positions.shape)))
        self.store(k_cache, slots, k)
        self.store(v_cache, slots, v)
        return self.consume(q, k, v, k_cache, v_cache)


class Eps(Prologue):
    def norm(self, x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS * (1 + torch.rand(()))) * weight


class EpsHardlyEver(Prologue):
    """A constant most of the time: one draw in four is larger."""

    def norm(self, x, weight):
        eps = torch.where(torch.rand(()) < 0.25, 1.0, EPS)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


class Mask(Prologue):
    """Lanes go missing, hardly ever."""

    def rotate(self, x, cos, sin):
        return super().rotate(x, cos, sin) * (torch.rand(HEAD_DIM) < 0.98)


class Lanes(Prologue):
    """Which lanes keep their value, decided at every run."""

    def rotate(self, x, cos, sin):
        turned = super().rotate(x, cos, sin)
        return torch.where(torch.bernoulli(torch.full((HEAD_DIM,), 0.98)) > 0, turned, x)


class Dropout(Prologue):
    def norm(self, x, weight):
        return F.dropout(super().norm(x, weight), 0.1, training=True)


class NoDropout(Prologue):
    """Drops nothing."""

    def norm(self, x, weight):
        return F.dropout(F.dropout(super().norm(x, weight), 0.0, training=True), 0.5, training=False)


class Unused(Prologue):
    """Drawn before and after for nothing: what is drawn next depends on it."""

    def forward(self, *given):
        torch.rand(3)
        result = super().forward(*given)
        torch.rand(3)
        return result + torch.rand(())


class InAnotherOrder(Prologue):
    """The query draws, and then the slots, which the call needs first."""

    def forward(self, x, positions, slots, k_cache, v_cache):
        q, k, v = self.split(self.project(x))
        cos, sin = self.angles(positions)
        q = self.rotate(self.norm(q, self.q_weight), cos, sin)
        q = q * torch.rand_like(q)
        slots = torch.randperm(SLOTS)[: x.shape[0]]
        self.store(k_cache, slots, self.rotate(self.norm(k, self.k_weight), cos, sin))
        self.store(v_cache, slots, v)
        return self.consume(q, k, v, k_cache, v_cache)


@pytest.mark.parametrize(
    ("cls", "fused"),
    [
        (Scale, 1), (Weight, 1), (SharedWeight, 1), (Slots, 1), (Positions, 1), (PositionsEach, 0), (Eps, 0),
        (EpsHardlyEver, 0), (Mask, 0), (Lanes, 0), (Dropout, 0), (NoDropout, 1), (Unused, 1),
        (InAnotherOrder, 0),
    ],
)  # fmt: skip
def test_random_numbers_are_drawn_anew(cls, fused):
    given = arguments()
    report = assert_as_eager(cls(), *[given] * 12, seeded=True)
    assert len(report.fused) == fused, str(report)


def test_a_random_scale_is_read_at_every_call():
    report = assert_as_eager(Scale(), arguments(), seeded=True)
    assert isinstance(report.fused[0].facts["k_scale"], str), "a tensor's name, no number"


# --- what draws -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "further", "expected"),
    [
        (aten.bernoulli.default, (), True),
        (aten.bernoulli.p, (0.0,), True),
        (aten.rand_like.default, (), True),
        (aten.native_dropout.default, (0.5, True), True),
        (aten.native_dropout.default, (0.5, False), False),
        (aten.native_dropout.default, (0.0, True), False),
        (aten.dropout.default, (0.5, False), False),
        (aten.neg.default, (), False),
    ],
)
def test_what_draws(target, further, expected):
    build = Builder()
    x = build.input("x", 2, 3)
    first, second = (build(target, x, *further) for _ in range(2))
    build.graph.output((first, second))
    analysis = GraphAnalysis(build.graph)
    assert operations.draws(first) == expected
    assert (analysis.value_number(first) != analysis.value_number(second)) == expected


def test_what_is_made_of_random_numbers_is_no_literal():
    build = Builder()
    ones = build(aten.full.default, [3], 1.0)
    drawn = build(aten.lt.Scalar, build(aten.bernoulli.default, ones), 0.5)
    kept = build(aten.lt.Scalar, build(aten.dropout.default, ones, 0.5, False), 0.5)
    assert not operations.is_literal(drawn)
    assert operations.is_literal(kept)
