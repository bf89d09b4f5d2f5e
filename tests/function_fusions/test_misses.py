"""A registered fusion that matched nothing says so, and why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fx_fusion
from function_fusions import patterns
from function_fusions.zoo import ENTRIES
from fx_fusion.testing import run as run_fused

X, W = torch.randn(6, 32), torch.rand(32)


def declined(model, *args, pattern=patterns.rms_norm, example=None):
    with fx_fusion.fusions():
        fx_fusion.register_fusion(pattern=pattern, replacement=pattern, name="pattern", example=example)
        report = run_fused(model, args).report
    assert not report.fused
    return report.declined


def test_a_rare_step_that_occurs_nowhere():
    (layer,) = declined(lambda x, w: (x * w).tanh(), X, W)
    assert (layer.code, layer.fusion) == ("fusion.absent", "pattern")
    assert layer.reason == "pattern needs a root, and the graph has none"


def test_that_nothing_is_stored_is_told_too():
    with fx_fusion.fusions("qk_norm_rope_cache"):
        fx_fusion.register_fusion(pattern=patterns.rms_norm, replacement=patterns.rms_norm, name="pattern")
        report = run_fused(lambda x, w: (x * w).tanh(), (X, W)).report
        assert {layer.code for layer in report.declined} == {"store.missing", "fusion.absent"}
        assert not report.concerns
        report = run_fused(lambda x, w: patterns.rms_norm(x, w, 1e-6), (X, W)).report
        assert [layer.fusion for layer in report.layers] == ["pattern"]


def test_a_custom_operation_that_occurs_nowhere():
    (layer,) = declined(
        lambda x, c, s: F.silu(x) + c[s], X, torch.randn(64, 32), torch.arange(6),
        pattern=patterns.silu_store, example=patterns.SILU_STORE_EXAMPLE,
    )  # fmt: skip
    assert layer.code == "fusion.absent" and "own_tests" in layer.reason


def test_what_came_nearest_and_what_differed():
    (layer,) = declined(lambda x, w: x * (x.square().mean(-1, keepdim=True).sqrt() + 1e-6).reciprocal() * w, X, W)
    assert layer.code == "proof.mismatch" and "differ by" in layer.reason
    assert "test_misses.py" in layer.source


def test_the_step_that_differs_is_named():
    (layer,) = declined(lambda x, w: F.rms_norm(x, (32,), None, 1e-6).clamp(-9, 9) * w, X, W)
    assert layer.code == "proof.mismatch" and layer.reason
    gpt = ENTRIES["gpt_oss_swiglu"]
    (layer,) = declined(
        lambda g, u: gpt.pattern(g, u.clamp(max=5.0), 1.702, 7.0).sin() * u, X, X.cos(), pattern=gpt.pattern
    )
    assert layer.reason


def test_places_that_could_be_it_and_take_other_tensors():
    """There are roots, and none of them has two tensors before it."""

    def pattern(x, y, z, weight, eps: float):
        return (x + y) * torch.rsqrt((x + y).square().mean(-1, keepdim=True) + eps) * weight * z

    (layer,) = declined(lambda x: torch.rsqrt(x.square().mean(-1) + 1e-6).sin(), X, pattern=pattern)
    assert layer.code in ("fusion.no_match", "proof.mismatch") and layer.reason


@pytest.mark.parametrize("pattern", [lambda x, y: x * y + y, lambda x: torch.cat([x[:, 16:], x[:, :16]], -1)])
def test_a_pattern_of_nothing_rare(pattern):
    example = tuple(torch.empty(5, 32) for _ in range(pattern.__code__.co_argcount))
    layers = declined(lambda x: x.exp(), X, pattern=pattern, example=example)
    assert layers, "nobody says why"


def test_nothing_to_do_is_not_reported_as_the_latest_graph():
    """The report of a graph with a match is not hidden by one of a graph that has none of the pattern's steps."""
    with fx_fusion.fusions(), torch.no_grad():
        fx_fusion.register_fusion(pattern=patterns.rms_norm, replacement=patterns.my_rms_norm, name="norm")
        options = {"fx_fusion.kernel": "reference", "fx_fusion.inner": "eager"}
        torch._dynamo.reset()
        torch.compile(lambda x, w: patterns.rms_norm(x, w, 1e-6), backend="fx_fusion", options=options)(X, W)
        torch.compile(lambda x: x.tanh(), backend="fx_fusion", options=options)(X)
    assert len(fx_fusion.last_report().fused) == 1


def test_every_equal_layer_is_told_of_its_own_nodes():
    def model(x, w):
        for _ in range(3):
            x = (x * (x.square().mean(-1, keepdim=True).sqrt() + 1e-6).reciprocal() * w).tanh()
        return x

    layers = declined(model, X, W)
    assert len(layers) == 3 and len({layer.node for layer in layers}) == 3
    assert all(layer.node in layer.reason for layer in layers)
