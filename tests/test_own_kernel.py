"""A kernel from outside: known by name, chosen by `auto`, checked by `doctor`, refusing in its own words."""

from __future__ import annotations

import json

import pytest
import torch
from own_kernel import FlatNeox
from prologue import HEAD_DIM, Prologue, arguments

import fx_fusion
from fx_fusion import kernel_registration
from fx_fusion.__main__ import main
from fx_fusion.testing import assert_equal_after_fusion, assert_fuses


@pytest.fixture
def registered():
    registration = fx_fusion.register_kernel(FlatNeox())
    yield registration
    registration.remove()


class PartialRotary(Prologue):
    """Rotates half of the lanes."""

    def rotate(self, x, cos, sin):
        half = HEAD_DIM // 2
        turned = super().rotate(x[..., :half], cos[..., : half // 2], sin[..., : half // 2])
        return torch.cat([turned, x[..., half:]], -1)


def compiled(model, args, **options):
    torch._dynamo.reset()
    options = {"fx_fusion.inner": "eager", **{f"fx_fusion.{name}": value for name, value in options.items()}}
    with torch.no_grad():
        return torch.compile(model, backend="fx_fusion", options=options)(*args)


def test_auto_chooses_it_and_the_result_is_eagers(registered):
    report = assert_fuses(Prologue(), arguments(), count=1, kernel="auto")
    assert [layer.kernel for layer in report.fused] == ["flat_neox"]
    assert report.fused[0].eligible["flat_neox"] is None
    assert_equal_after_fusion(Prologue(), arguments(), kernel="flat_neox")


def test_it_is_gone_when_it_is_removed(registered):
    registered.remove()
    registered.remove()
    with pytest.raises(fx_fusion.OptionError, match="flat_neox"):
        fx_fusion.Config(kernel="flat_neox")


def test_it_refuses_in_its_own_words(registered):
    with pytest.raises(Exception, match="option rotary_dim: expected all 16 lanes in neox pairs, found 8"):
        compiled(PartialRotary(), arguments(), kernel="flat_neox")
    compiled(PartialRotary(), arguments(), kernel="auto")
    (layer,) = fx_fusion.last_report().layers
    assert (layer.state, layer.code) == ("recognised", "contract.kernel")
    assert "flat_neox: option rotary_dim" in layer.reason


def test_doctor_runs_it(registered, capsys):
    main(["doctor", "--kernel", "flat_neox", "--json"])
    found = {kernel["name"]: kernel for kernel in json.loads(capsys.readouterr().out)["kernels"]}
    assert found["flat_neox"]["runs"] and found["flat_neox"]["tried"]


def test_doctor_tells_a_wrong_one(registered, monkeypatch, capsys):
    right = FlatNeox.run
    monkeypatch.setattr(FlatNeox, "run", lambda self, call, setting=None: (right(self, call)[0] * 1.1, call.k))
    assert main(["doctor", "--kernel", "flat_neox"]) == 1
    assert "q_out differs" in " ".join(capsys.readouterr().out.split())


def test_the_compile_caches_know_its_version_and_its_code(registered, monkeypatch):
    first = fx_fusion.FusionPass().uuid()
    monkeypatch.setattr(FlatNeox, "version", lambda self: "2")
    second = fx_fusion.FusionPass().uuid()
    registered.remove()
    assert len({first, second, fx_fusion.FusionPass().uuid()}) == 3


def test_installed_packages_register_theirs(monkeypatch):
    class Entry:
        def load(self):
            return lambda: registrations.append(fx_fusion.register_kernel(FlatNeox()))

    class Broken:
        def load(self):
            raise ImportError("no module named nowhere")

    registrations, warned = [], []
    monkeypatch.setattr(kernel_registration.importlib.metadata, "entry_points", lambda group: [Broken(), Entry()])
    monkeypatch.setattr(kernel_registration.log, "warning", lambda *words: warned.append(words[0] % words[1:]))
    kernel_registration.load_installed()
    registrations[0].remove()
    assert "no module named nowhere" in warned[0]


@pytest.mark.parametrize("wrong", [object(), FlatNeox])
def test_what_is_no_kernel_is_refused(wrong):
    with pytest.raises(TypeError, match=r"expected a fx_fusion\.Implementation with a name"):
        fx_fusion.register_kernel(wrong)


def test_an_unknown_operation_and_a_name_twice_are_refused(registered):
    with pytest.raises(ValueError, match="operation must be one of 'qk_norm_rope_cache', got 'nowhere'"):
        fx_fusion.register_kernel(FlatNeox(), "nowhere")
    with pytest.raises(ValueError, match="a kernel named 'flat_neox' is there already"):
        fx_fusion.register_kernel(FlatNeox())
