"""docs/compared.md: Inductor's register_replacement and register_fusion on the same patterns and graphs."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.pattern_matcher import PatternMatcherPass, fwd_only, register_replacement

import fx_fusion
from function_fusions import patterns
from function_fusions.test_function_fusions import by_quotient
from fx_fusion.config import Config
from fx_fusion.fusion_pass import apply
from fx_fusion.mutation.mutants import capture


def model(norm, eps):
    return lambda x, w: norm(x, w, eps).tanh()


def graph_of(fn, *args):
    return capture(fn, args).module.graph


def inductor_matches(graph, eps):
    passes = PatternMatcherPass()
    register_replacement(
        lambda x, weight: patterns.rms_norm(x, weight, eps),
        lambda x, weight: patterns.my_rms_norm(x, weight, eps),
        [torch.empty(3, 16), torch.empty(16)],
        fwd_only,
        passes,
    )
    return passes.apply(graph)


def ours(graph):
    with fx_fusion.fusions():
        fx_fusion.register_fusion(pattern=patterns.rms_norm, replacement=patterns.my_rms_norm)
        return apply(graph, Config(kernel="reference"))


ARGS = (torch.randn(3, 16), torch.rand(16))


@pytest.mark.parametrize(
    ("norm", "eps", "inductor"),
    [(patterns.rms_norm, 1e-6, 1), (patterns.rms_norm, 1e-5, 0), (by_quotient, 1e-6, 0)],
    ids=["as the pattern", "another eps", "another spelling"],
)
def test_spelling_and_numbers(norm, eps, inductor):
    assert inductor_matches(graph_of(model(norm, eps), *ARGS), eps=1e-6) == inductor
    report = ours(graph_of(model(norm, eps), *ARGS))
    assert report.fused[0].reading["numbers"] == {"eps": eps}


def test_a_mutable_operation():
    def store_model(x, cache, slots):
        torch.ops.own_tests.store(cache, slots, torch.nn.functional.silu(x) * 1.5, 0.25)

    args = (torch.randn(4, 16), torch.zeros(64, 16), torch.randperm(64)[:4])
    found = "no error"
    try:
        passes = PatternMatcherPass()
        register_replacement(
            lambda x, cache, slots: patterns.silu_store(x, cache, slots, 0.25, 1.5),
            lambda x, cache, slots: patterns.my_silu_store(x, cache, slots, 0.25, 1.5),
            [args[0], args[1], args[2]],
            fwd_only,
            passes,
        )
        matches = passes.apply(graph_of(store_model, *args))
    except Exception as error:
        matches, found = 0, type(error).__name__
    assert matches == 0, found
    with fx_fusion.fusions():
        fx_fusion.register_fusion(
            pattern=patterns.silu_store, replacement=patterns.my_silu_store, example=patterns.SILU_STORE_EXAMPLE
        )
        assert len(apply(graph_of(store_model, *args), Config(kernel="reference")).fused) == 1


def test_a_wrong_replacement():
    def wrong(x, weight, eps):
        return x * weight

    passes = PatternMatcherPass()
    register_replacement(
        lambda x, weight: patterns.rms_norm(x, weight, 1e-6),
        lambda x, weight: wrong(x, weight, 1e-6),
        list(ARGS),
        fwd_only,
        passes,
    )
    assert passes.apply(graph_of(model(patterns.rms_norm, 1e-6), *ARGS)) == 1, "replaced, and nobody looked"
    with pytest.raises(ValueError, match="differs"):
        fx_fusion.register_fusion(pattern=patterns.rms_norm, replacement=wrong)


def test_what_came_near_is_told():
    def off(x, w):
        return (x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-6) * w).tanh()

    assert inductor_matches(graph_of(off, *ARGS), eps=1e-6) == 0
    assert "differ by" in ours(graph_of(off, *ARGS)).declined[0].reason
