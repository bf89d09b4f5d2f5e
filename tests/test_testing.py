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
    from fx_fusion.kernels import reference

    store = reference.store
    monkeypatch.setattr(reference, "store", lambda value, *rest: store(value * 1.01, *rest))
    with pytest.raises(AssertionError, match=r"state \d+ differs by"):
        testing.assert_fuses(Prologue(), arguments(), count=1)


def test_arguments_are_left_alone():
    args = arguments()
    before = [arg.clone() for arg in args]
    testing.assert_fuses(Prologue(), args, count=1)
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
