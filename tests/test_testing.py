"""The testing kit fails when it should, and shows the report."""

from __future__ import annotations

import pytest
import torch
from prologue import Prologue, arguments

from fx_fusion import testing


class Clamped(Prologue):
    def norm(self, x, weight):
        return super().norm(x, weight).clamp(-8, 8)


def test_assert_fuses_shows_why_not():
    with pytest.raises(AssertionError, match=r"expected 1 fused calls(.|\n)*proof.not_analytic"):
        testing.assert_fuses(Clamped(), arguments(), count=1)


def test_assert_fuses_without_a_count_wants_something_fused():
    with pytest.raises(AssertionError, match=r"store.missing"):
        testing.assert_fuses(torch.nn.ReLU(), (torch.ones(2),))


def test_assert_declines_shows_what_happened():
    with pytest.raises(AssertionError, match=r"expected a decline with code 'store.missing'(.|\n)*rewritten"):
        testing.assert_declines(Prologue(), arguments(), code="store.missing")


def test_assert_fuses_compares_outputs_and_stores(monkeypatch):
    """A kernel that stores the wrong key is found, though the proof does not run the kernel."""
    from fx_fusion.kernels.qk_norm_rope_cache import reference

    store = reference.store
    monkeypatch.setattr(reference, "store", lambda value, *rest: store(value * 1.01, *rest))
    with pytest.raises(AssertionError, match=r"state \d+ differs by"):
        testing.assert_fuses(Prologue(), arguments(), count=1)


def test_arguments_are_left_alone():
    args = arguments()
    before = [arg.clone() for arg in args]
    testing.assert_fuses(Prologue(), args, count=1)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


def test_assert_equal_after_fusion_in_both_arithmetics():
    report = testing.assert_equal_after_fusion(Prologue(), arguments())
    assert len(report.fused) == 1
    with pytest.raises(AssertionError, match=r"expected something to fuse\n(.|\n)*proof.not_analytic"):
        testing.assert_equal_after_fusion(Clamped(), arguments())


def test_float64_shows_what_rounding_hides(monkeypatch):
    from fx_fusion.kernels.qk_norm_rope_cache import reference

    store = reference.store
    monkeypatch.setattr(reference, "store", lambda value, *rest: store(value * (1 + 1e-3), *rest))
    model, args = Prologue(torch.bfloat16), arguments(dtype=torch.bfloat16)
    testing.assert_fuses(model, args, count=1)
    with pytest.raises(AssertionError, match=r"in float64, value \d+ differs by"):
        testing.assert_equal_after_fusion(model, args)


@pytest.mark.slow
def test_mutants_of_a_users_pattern(monkeypatch):
    from function_fusions import patterns

    import fx_fusion

    def model(x, weight):
        return torch.nn.functional.rms_norm(x, (16,), weight, 1e-6).tanh()

    args = (torch.randn(3, 16), torch.rand(16) + 0.5)
    with fx_fusion.fusions():
        with pytest.raises(AssertionError, match="the unchanged graph does not fuse"):
            testing.mutants(model, args, count=1)
        fx_fusion.register_fusion(pattern=patterns.rms_norm, replacement=patterns.my_rms_norm)
        tally = testing.mutants(model, args, count=25, trials=4)
        assert tally.refused and tally.right and not tally.wrong
        monkeypatch.setattr("fx_fusion.function_fusions.agreement.TOLERANCE", 1.0)
        monkeypatch.setattr("fx_fusion.function_fusions.equivalence.TOLERANCE", 1.0)
        monkeypatch.setattr("fx_fusion.function_fusions.fusion.compare_replacement", lambda *_: 0.0)
        with pytest.raises(AssertionError, match="mutants that were fused wrongly"):
            testing.mutants(model, args, count=25, trials=4)
