"""The walk over dtypes; and the reference against regions that were read wrong."""

from __future__ import annotations

import pytest
import torch
from prologue import Prologue, arguments

from fx_fusion.decline import Decline
from fx_fusion.graph.operations import prims
from fx_fusion.proof import certificate
from proof.branches import branch


@pytest.mark.parametrize(
    ("data", "middle", "code"),
    [
        (torch.float32, torch.bfloat16, "proof.rounding"),
        (torch.bfloat16, torch.float16, "proof.rounding"),
        (torch.float32, torch.float64, "proof.rounding"),
        (torch.bfloat16, torch.float32, None),
        (torch.float32, torch.int32, "proof.not_analytic"),
    ],
)
def test_rounding(data, middle, code):
    def build(call, x):
        return call(prims.convert_element_type.default, call(prims.convert_element_type.default, x, middle), data)

    if code is None:
        certificate.certify(branch(build, data))
        return
    with pytest.raises(Decline) as declined:
        certificate.certify(branch(build, data))
    assert declined.value.code == code


def test_output_in_another_dtype():
    with pytest.raises(Decline) as declined:
        certificate.certify(
            branch(lambda call, x: call(prims.convert_element_type.default, x, torch.float32), torch.bfloat16)
        )
    assert declined.value.code == "rope.output_dtype"


@pytest.mark.parametrize("change", ["eps", "sign", "lane"])
def test_proof_refuses_a_wrong_reading(monkeypatch, change):
    """Whatever the readers say, a reference that differs from the region is refused."""
    from fx_fusion.kernels.qk_norm_rope_cache import reference
    from fx_fusion.testing import assert_declines

    original = reference.norm_rope

    def wrong(x, weight, eps, gemma, cos, sin, rotary_dim, is_neox):
        if change == "eps":
            eps = eps * 1.001
        if change == "sign":
            sin = -sin
        out = original(x, weight, eps, gemma, cos, sin, rotary_dim, is_neox)
        return out.roll(1, -1) if change == "lane" else out

    monkeypatch.setattr(reference, "norm_rope", wrong)
    assert_declines(Prologue(), arguments(), code="proof.mismatch")


def test_proof_sees_an_unread_dependence():
    """A dependence on another head, too small for any reader, is still a difference."""
    from fx_fusion.testing import assert_declines

    class Leaks(Prologue):
        def rotate(self, x, cos, sin):
            y = super().rotate(x, cos, sin)
            return y + 1e-6 * y.flip(1)

    report = assert_declines(Leaks(), arguments(), code="norm.not_per_head")
    assert "more than one head" in str(report)


def _with_a_constant(normalised, weight):
    return (normalised + 1e-30) * weight


def _with_a_square(normalised, weight):
    y = normalised * weight
    return y + 1e-10 * y.square()


@pytest.mark.parametrize("spoilt", [_with_a_constant, _with_a_square])
def test_proof_sees_a_term_that_ordinary_input_hides(spoilt):
    """Below 1e-9 of every ordinary value: the one is all there is of a zero, the other shows under a large weight."""
    from fx_fusion.testing import assert_declines

    class Spoilt(Prologue):
        def norm(self, x, weight):
            return spoilt(super().norm(x, torch.ones_like(weight)), weight)

    assert_declines(Spoilt(), arguments(), code="proof.mismatch")
