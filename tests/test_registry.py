"""Fusions enter and leave through one door."""

from __future__ import annotations

import pytest
import torch
from prologue import Prologue, arguments

import fx_fusion
from fx_fusion.fusion import REGISTRY


class Nothing(fx_fusion.Fusion):
    """A fusion that finds nothing."""

    name = "nothing"

    def find(self, analysis):
        return [], []

    def read(self, analysis, candidate, memo):
        raise AssertionError

    def assess(self, match):
        raise AssertionError

    def check(self, analysis, match):
        raise AssertionError

    def choose(self, match, kernel, target):
        raise AssertionError

    def rewrite(self, graph, match, kernel):
        raise AssertionError


def test_the_built_in_fusion_is_registered():
    assert [fusion.name for fusion in REGISTRY] == ["qk_norm_rope_cache"]


def test_handle_removes_and_uuid_follows():
    before = fx_fusion.FusionPass().uuid()
    handle = fx_fusion.register_fusion(Nothing())
    assert fx_fusion.FusionPass().uuid() != before
    handle.remove()
    handle.remove()
    assert fx_fusion.FusionPass().uuid() == before


def test_decorator():
    try:
        assert fx_fusion.register_fusion(Nothing) is Nothing
        assert "nothing" in [fusion.name for fusion in REGISTRY]
    finally:
        for fusion in REGISTRY:
            if fusion.name == "nothing":
                fx_fusion.Handle(REGISTRY._fusions, fusion).remove()


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="'qk_norm_rope_cache' is registered already"):
        fx_fusion.register_fusion(fx_fusion.QkNormRopeCache())


def test_what_is_missing_is_named():
    class Half(fx_fusion.Fusion):
        name = "half"

        def find(self, analysis):
            return [], []

    with pytest.raises(TypeError, match=r"Half.*assess.*check.*choose.*read.*rewrite"):
        fx_fusion.register_fusion(Half)


def test_the_methods_alone_make_no_fusion():
    class Alike:
        name = "alike"
        find = Nothing.find

    class Nameless(Nothing):
        name = ""

    with pytest.raises(TypeError, match=r"expected an object of a subclass of fx_fusion\.Fusion, got .*Alike"):
        fx_fusion.register_fusion(Alike())
    with pytest.raises(TypeError, match="Nameless has no name"):
        fx_fusion.register_fusion(Nameless())


def test_without_the_built_in_fusion_nothing_fuses():
    (built_in,) = REGISTRY
    handle = fx_fusion.Handle(REGISTRY._fusions, built_in)
    handle.remove()
    try:
        with torch.no_grad():
            options = {"fx_fusion.kernel": "reference", "fx_fusion.inner": "eager"}
            torch.compile(Prologue(), backend="fx_fusion", options=options)(*arguments())
        assert not fx_fusion.last_report().layers
    finally:
        fx_fusion.register_fusion(built_in)
