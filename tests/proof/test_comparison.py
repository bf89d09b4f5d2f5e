"""What is proved, and what is refused that float64 cannot tell apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fx_fusion.proof.field import Comparison, Differs, NotEvaluable, Proved, compare
from fx_fusion.proof.field.draw import scaled_to_squares
from proof.heads import (
    EPS,
    HEADS,
    LANES,
    PLANTED,
    SHAPES,
    SPELLED,
    SQUARES,
    TOKENS,
    comparison,
    fused,
    mean_square,
    normalised,
    region_of,
    with_roots,
)


@pytest.mark.parametrize("name", SPELLED)
def test_proved(name):
    norm, literals = SPELLED[name]
    verdict = compare(comparison(norm))
    assert isinstance(verdict, Proved), verdict
    assert verdict.literals == literals and verdict.bits >= 32 and verdict.trials >= 3


@pytest.mark.parametrize("name", PLANTED)
def test_refused(name):
    """Whatever primes and points are drawn: they depend on the text."""
    for text in ("one", "other"):
        verdict = compare(replace(comparison(PLANTED[name]), text=text))
        assert isinstance(verdict, Differs), verdict


def test_two_errors_in_the_reference():
    """The region is right, what is said about it is not."""
    for eps in (EPS + 1e-20, EPS * (1 + 2**-52), 0.0):
        assert isinstance(compare(comparison(expected=lambda inputs, eps=eps: fused(inputs, eps))), Differs)
    negated = compare(comparison(expected=lambda inputs: -fused(inputs)))
    assert isinstance(negated, Differs) and "192 of 192 results differ" in negated.found


def test_no_root_at_all():
    plain = Comparison(region_of(lambda x: x), lambda inputs: fused(inputs, None), SHAPES)
    verdict = compare(plain)
    assert isinstance(verdict, Proved) and verdict.bits >= 50
    for norm in (lambda x: x * mean_square(x).sqrt() / mean_square(x).sqrt(), lambda x: x + (x * 1e-20).pow(3)):
        assert isinstance(compare(Comparison(region_of(norm), plain.reference, SHAPES)), Differs)


def test_without_points_that_are_prepared():
    """Half of all roots do not exist then; the others are compared often enough."""
    unprepared = Comparison(region_of(normalised), fused, SHAPES)
    verdict = compare(unprepared)
    assert isinstance(verdict, Proved) and verdict.trials >= 3
    one = Comparison(lambda i, at: normalised(i["x"]), lambda i: normalised(i["x"]), {"x": (1, 8)})
    assert isinstance(compare(one), Proved)
    assert isinstance(compare(Comparison(region_of(PLANTED["eps + 1e-20"]), fused, SHAPES)), Differs)


@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (1, 8), (64, 2), (256, 64)])
def test_sizes(tokens, heads):
    """One root in all, with which a constant could be anything in a single field; and so many that residues repeat."""
    lanes = 4
    shapes = {"x": (tokens, heads, lanes)}

    def prepare(field, values, fresh):
        values["x"] = scaled_to_squares(field, values["x"], EPS, fresh)

    def compared(region):
        return compare(
            Comparison(
                lambda inputs, at: region(inputs["x"]), lambda inputs: normalised(inputs["x"]), shapes, prepare, SQUARES
            )
        )

    verdict = compared(normalised)
    assert isinstance(verdict, Proved) and verdict.bits >= 32
    assert isinstance(compared(lambda x: x * (9.0 * mean_square(x)).rsqrt() * 3.0), Proved)
    for name in ("rational bump of the norm's own", "u / u", "eps + 1e-20", "absolute value", "S / S"):
        assert isinstance(compared(PLANTED[name]), Differs), name
    if heads > 1:
        assert isinstance(compared(PLANTED["another head's root"]), Differs)


OWN = slice(1, 1 + HEADS)


def joint(own, shown=OWN, scale=1.0):
    """All of seven heads are normalised at once; the result depends on some of them."""

    def norm(x):
        y = x * torch.rsqrt(scale * mean_square(x))
        return y[:, shown] if own is None else y[:, shown] + 0.0 * y[:, own]

    shapes = {**SHAPES, "x": (TOKENS, 7 * LANES)}

    def region(inputs, at):
        y = norm(inputs["x"].reshape(TOKENS, 7, LANES)) * inputs["weight"]
        a, b = y.chunk(2, -1)
        cos, sin = inputs["cos"].unsqueeze(1), inputs["sin"].unsqueeze(1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)[None]

    def expected(inputs):
        heads = inputs["x"].reshape(TOKENS, 7, LANES)[:, OWN]
        return fused({**inputs, "x": heads.reshape(TOKENS, -1)})

    def prepare(field, values, fresh):
        heads = values["x"].reshape(TOKENS, 7, LANES)
        part = {"x": heads[:, OWN].reshape(TOKENS, -1)}
        with_roots(field, part, fresh)
        heads[:, OWN] = part["x"].reshape(TOKENS, HEADS, LANES)

    return compare(Comparison(region, expected, shapes, prepare, SQUARES))


def test_a_norm_of_more_heads_than_are_used():
    """Those of other heads have no root, so that a result that depends on them is undefined."""
    assert isinstance(joint(None), Proved)
    assert isinstance(joint(None, slice(2, 2 + HEADS)), Differs)
    leaked = joint(slice(2, 2 + HEADS))
    assert isinstance(leaked, Differs) and "are not defined where the fused operation is" in leaked.found


def test_a_root_and_a_divisor_are_named():
    def region(norm):
        def steps(inputs, at):
            at("before")
            y = norm(inputs["x"].reshape(TOKENS, HEADS, LANES), at)
            at("after")
            return region_of(lambda _: y)(inputs, at)

        return Comparison(steps, fused, SHAPES, with_roots, SQUARES)

    def rooted(x, at):
        y = normalised(x)
        at("culprit")
        return y.square().sqrt()

    def divided(x, at):
        y = normalised(x)
        at("culprit")
        return y / x * x

    for norm in (rooted, divided):
        verdict = compare(region(norm))
        assert isinstance(verdict, Differs) and verdict.sites == ("culprit",), verdict


def test_an_operation_without_a_meaning_is_told_with_its_step():
    def steps(inputs, at):
        at("exponential")
        return inputs["x"].exp()

    verdict = compare(Comparison(steps, fused, SHAPES))
    assert verdict == NotEvaluable("aten.exp.default", ("exponential",))


def power_of(x, exponent):
    """By squarings and products."""
    if exponent == 1:
        return x
    half = power_of(x, exponent // 2).square()
    return half * x if exponent % 2 else half


def test_a_degree_beyond_what_points_can_tell():
    """Modulo p a power of p does nothing: of all degrees that are admitted, none comes near."""
    for exponent in (2**31 - 1, 2**17):
        verdict = compare(Comparison(lambda i, at, e=exponent: power_of(i["x"], e), lambda i: i["x"], {"x": (4,)}))
        assert isinstance(verdict, NotEvaluable) and verdict.too_high and "above 65536" in verdict.what
    high = Comparison(lambda i, at: power_of(i["x"], 65536), lambda i: power_of(i["x"], 65536), {"x": (4,)})
    verdict = compare(high)
    assert isinstance(verdict, Proved) and verdict.degree == 65536 and verdict.trials >= 3
    order = Comparison(lambda i, at: power_of(i["x"], 840) * 0 + 1.0, lambda i: power_of(i["x"], 840), {"x": (4,)})
    assert isinstance(compare(order), Differs)


def test_literals_as_large_as_they_come_take_more_fields():
    """The bound follows from what the region holds."""

    def scaled(x):
        for _ in range(12):
            x = x * 1e-300 * 1.7e300
        return x

    verdict = compare(Comparison(lambda i, at: scaled(i["x"]), lambda i: scaled(i["x"]), {"x": (4,)}))
    assert isinstance(verdict, Proved) and verdict.bits >= 32
    small = compare(Comparison(lambda i, at: i["x"] * 1.5, lambda i: i["x"] * 1.5, {"x": (4,)}))
    assert isinstance(small, Proved) and small.bits / small.trials > verdict.bits / verdict.trials


def test_shapes_must_agree():
    verdict = compare(Comparison(lambda i, at: i["x"], lambda i: i["x"].reshape(2, 2), {"x": (4,)}))
    assert verdict == Differs("the region gives [4], the fused operation [2, 2]")


def test_nothing_is_proved_by_nothing():
    verdict = compare(Comparison(lambda i, at: i["x"], lambda i: i["x"], {"x": (0, 4)}))
    assert verdict == Differs("there is no result to be compared")


def test_a_reference_that_is_never_defined():
    verdict = compare(Comparison(lambda i, at: i["x"], lambda i: (i["x"] - i["x"]).rsqrt(), {"x": (4,)}))
    assert isinstance(verdict, Differs) and "hardly ever defined" in verdict.found
