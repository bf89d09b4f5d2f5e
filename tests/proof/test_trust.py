"""What no field interprets is sampled; whether that is enough is an option."""

from __future__ import annotations

import pytest
import torch
from prologue import Prologue, arguments

from fx_fusion.config import Config, OptionError
from fx_fusion.decline import Decline
from fx_fusion.fusion_pass import FusionPass
from fx_fusion.proof.evidence import Sampled, require, weakest
from fx_fusion.proof.field import Proved
from fx_fusion.report import REPORTS
from fx_fusion.testing import run
from proof.heads import mean_square, normalised


class FourthRoots(Prologue):
    """The norm's root as two roots of it: analytic, and no field has it."""

    def norm(self, x, weight):
        return x * mean_square(x).pow(-0.25) * mean_square(x).pow(-0.25) * weight


class FourthRootsAndMore(FourthRoots):
    def norm(self, x, weight):
        return super().norm(x, weight) * 1.001


class RootsOfSquares(FourthRoots):
    """Not analytic: an absolute value."""

    def norm(self, x, weight):
        y = normalised(x) * weight
        return y * (y.square().pow(0.25) / y.square().pow(0.25))


def compiled(model, **options):
    torch._dynamo.reset()
    before = REPORTS.snapshot()
    options = {"kernel": "reference", "inner": "eager", "strict": True, **options}
    named = {f"fx_fusion.{name}": value for name, value in options.items()}
    with torch.no_grad():
        torch.compile(model, backend="fx_fusion", dynamic=False, options=named)(*arguments())
    (report,) = REPORTS.since(before)
    return report


def test_declined_by_default():
    report = compiled(FourthRoots())
    assert [layer.code for layer in report.layers] == ["proof.sampled"]
    (declined,) = report.layers
    assert declined.reason.startswith("a power of -0.25 has no meaning in a finite field, so the region was sampled")
    assert "fx_fusion.trust='sampled'" in declined.reason and declined.stage == "proof"
    assert "test_trust.py" in declined.source and declined.node.startswith("pow")


def test_accepted_where_samples_are_enough():
    report = compiled(FourthRoots(), trust="sampled")
    (layer,) = report.fused
    assert layer.proof == "sampled" and layer.error < 1e-9 and layer.error_bits is None
    assert "; sampled, error " in str(report)


@pytest.mark.parametrize("model", [FourthRootsAndMore, RootsOfSquares])
def test_samples_must_agree_and_tell_something(model):
    for trust in ("proved", "sampled"):
        assert not compiled(model(), trust=trust).fused


def test_what_is_proved_is_proved_under_either():
    for trust in ("proved", "sampled"):
        assert [layer.proof for layer in compiled(Prologue(), trust=trust).layers] == ["proved"]


def test_equal_layers_share_what_is_known():
    class Two(FourthRoots):
        def forward(self, x, positions, slots, *caches):
            first = super().forward(x, positions, slots, caches[0], caches[1])
            return super().forward(first, positions, slots, caches[2], caches[3])

    args = arguments()
    args = (*args, *(cache.clone() for cache in args[3:]))
    report = run(Two(), args).report
    assert [layer.code for layer in report.layers] == ["proof.sampled"] * 2
    assert report.layers[0].node != report.layers[1].node


def test_the_option_is_part_of_the_cache_key():
    proved, sampled = (FusionPass(Config(trust=trust)).uuid() for trust in ("proved", "sampled"))
    assert proved != sampled
    with pytest.raises(OptionError, match=r"fx_fusion.trust must be one of 'proved', 'sampled', got 'hoped'"):
        Config(trust="hoped")


def test_the_weakest_part_counts():
    strong, weak = Proved(40, 3, 6), Proved(38, 4, 9, {0.1: "1/10"})
    both = weakest([strong, weak])
    assert both == Proved(37, 3, 9, {0.1: "1/10"})
    assert weakest([strong]) == strong
    one, other = Sampled(1e-12, "aten.exp.default"), Sampled(1e-11, "aten.tanh.default")
    assert weakest([strong, one, other]) == Sampled(1e-11, "aten.exp.default")


def test_require():
    require(Proved(40, 3, 6), "proved")
    require(1e-16, "proved")
    require(Sampled(0.0, "aten.exp.default"), "sampled")
    with pytest.raises(Decline) as declined:
        require(Sampled(0.0, "aten.exp.default"), "proved")
    assert declined.value.code == "proof.sampled" and "aten.exp.default" in declined.value.found
