"""The same through the whole pass: what only looks like the prologue stays, what is it is fused and proved."""

from __future__ import annotations

import copy

import pytest
import torch
from prologue import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, SLOTS, Prologue, arguments

from fx_fusion.report import FusionReport
from fx_fusion.testing import assert_declines, run
from proof.heads import PLANTED, mean_square, normalised, squared


def layer(norm):
    """A prologue whose heads are normalised by `norm`, then weighted."""

    class Layer(Prologue):
        def norm(self, x, weight):
            return norm(x) * weight

    return Layer()


def reported(norm, tokens=5) -> FusionReport:
    return run(layer(norm), arguments(tokens)).report


#: What readers take for the prologue, and the proof refuses; and the step that the report names.
REFUSED = {
    "rational bump": "div", "rational bump of the norm's own": "div", "far-out polynomial": "cat",
    "eps + 1e-20": "rsqrt", "a factor of 1 + 2**-52": "cat", "1e-30 of its square": "cat", "absolute value": "sqrt",
    "S / S": "div", "0 * S / S": "div", "u / u": "div",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    (declined,) = reported(PLANTED[name]).layers
    assert (declined.code, declined.node.split("_")[0]) == ("proof.mismatch", REFUSED[name]), declined
    assert ("heads.py" if REFUSED[name] != "cat" else "prologue.py") in declined.source


@pytest.mark.parametrize("name", sorted(set(PLANTED) - {"eps in the last place"}))
def test_no_planted_error_is_in_a_call(name):
    assert not reported(PLANTED[name]).fused


def test_an_eps_of_its_own():
    """It is the region's: the call gets that very number."""
    (found,) = reported(PLANTED["eps in the last place"]).layers
    assert found.reading["norm"]["k_eps"] == 1e-6 * (1 + 2**-52)


def test_heads_that_sum_to_zero():
    """S / (S + 1e-35) is 1 wherever anything is sampled, and 0 for these heads: eager's result must be kept."""

    class Bumped(Prologue):
        def __init__(self):
            super().__init__()
            with torch.no_grad():
                self.qkv_proj.weight.zero_()
                lanes = 1.0 - 2 * (torch.arange(HEAD_DIM) % 2)
                self.qkv_proj.weight[:, 0] = lanes.repeat(NUM_HEADS + 2 * NUM_KV_HEADS)

        def norm(self, x, weight):
            return super().norm(x, weight) * (squared(x) / (squared(x) + 1e-35))

    model, args = Bumped(), arguments()
    report = assert_declines(model, args, code="proof.mismatch")
    assert "divides by what is no constant times anything that the fused operation divides by" in str(report)
    outcome, eager = run(model, args), copy.deepcopy(args)
    with torch.no_grad():
        model(*eager)
    torch.testing.assert_close(outcome.state[1][3], eager[3])


SPELLED = {
    "quotient": (lambda x: x * mean_square(x).sqrt() / mean_square(x), {}),
    "by 121": (lambda x: x * (121.0 * mean_square(x)).rsqrt() * 11.0, {}),
    "a tenth, tenfold": (lambda x: normalised(x) * 0.1 * 10.0, {"0.1": "1/10"}),
    "by the root of 27": (lambda x: x * (27.0 * mean_square(x)).rsqrt() * 27.0**0.5, {repr(27.0**0.5): "sqrt(27)"}),
    "literals in a tensor": (lambda x: normalised(x) * torch.full((1, 1, HEAD_DIM), 3.0) / 3.0, {}),
    "numbered lanes": (lambda x: normalised(x) * (torch.arange(16) + 1) / (torch.arange(16) + 1), {}),
    "each head by itself": (lambda x: torch.stack([normalised(head) for head in x.unbind(1)], 1), {}),
    "no norm": (lambda x: x, {}),
}


@pytest.mark.parametrize("name", SPELLED)
@pytest.mark.parametrize("tokens", [1, 5])
def test_proved(name, tokens):
    norm, literals = SPELLED[name]
    (found,) = reported(norm, tokens).layers
    assert found.state == "rewritten" and found.proof == "proved" and found.error is None, found
    assert found.literals == literals and found.error_bits is not None and found.error_bits >= 30


def test_the_report_says_what_is_proved():
    report = reported(lambda x: normalised(x) * 0.1 * 10.0)
    assert f"; proved (error below 2^-{report.layers[0].error_bits}), up to 0.1 = 1/10" in str(report)
    assert FusionReport.from_json(report.to_json()) == report


def many(tokens):
    x, positions, _, *caches = arguments()
    cache = [torch.randn(max(SLOTS, tokens), NUM_KV_HEADS, HEAD_DIM) for _ in caches]
    return torch.randn(tokens, x.shape[1]), positions[:, :1].expand(3, tokens), torch.arange(tokens), *cache


@pytest.mark.parametrize("tokens", [16, 17, 1000])
def test_token_counts(tokens):
    """Up to sixteen tokens as they are, more at a few of them."""
    report = run(layer(normalised), many(tokens)).report
    assert [each.proof for each in report.fused] == ["proved"]
    assert not run(layer(PLANTED["eps + 1e-20"]), many(tokens)).report.fused


def test_tokens_that_cannot_be_left_out():
    """A roll along the tokens and back: the region is compared whole."""

    def rolled(x):
        return normalised(x.roll(1, 0)).roll(-1, 0)

    report = run(layer(rolled), many(100)).report
    assert [each.proof for each in report.fused] == ["proved"]

    def rolled_too_far(x):
        return normalised(x.roll(1, 0)).roll(-2, 0)

    assert not run(layer(rolled_too_far), many(100)).report.fused


def test_both_sizes_of_a_symbol():
    args = arguments()
    for each, dim in zip(args[:3], (0, 1, 0), strict=True):
        torch._dynamo.mark_dynamic(each, dim)
    report = run(layer(normalised), args, dynamic=None).report
    static = reported(normalised)
    assert report.fused[0].proof == "proved"
    assert report.fused[0].error_bits < static.fused[0].error_bits


def test_primes_that_a_program_knows():
    report = reported(lambda x: normalised(x) + 2147483647.0 * 1e-25 * normalised(x))
    assert not report.fused


def test_a_region_of_too_high_a_degree():
    def high(x):
        one = x * 0.0 + 1.0
        return normalised(x) * one.pow(64).pow(64).pow(64)

    (declined,) = reported(high).layers
    assert declined.code == "proof.degree" and "a degree of 262144, above 65536" in declined.reason
