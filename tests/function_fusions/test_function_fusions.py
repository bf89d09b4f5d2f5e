"""Fusions from plain functions: one registration serves every spelling, size, dtype and eps; each match is proved."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fx_fusion
from function_fusions import patterns
from fx_fusion.testing import assert_declines, assert_fuses
from fx_fusion.testing import run as run_fused

WIDTH = 32


@pytest.fixture
def rms_norm():
    with fx_fusion.fusions():
        yield fx_fusion.register_fusion(pattern=patterns.rms_norm, replacement=patterns.my_rms_norm, name="rms_norm")


@pytest.fixture
def add_rms_norm():
    with fx_fusion.fusions():
        fx_fusion.register_fusion(pattern=patterns.add_rms_norm, replacement=patterns.my_add_rms_norm, name="add_norm")
        yield


@pytest.fixture
def silu_store():
    with fx_fusion.fusions():
        fx_fusion.register_fusion(
            pattern=patterns.silu_store,
            replacement=patterns.my_silu_store,
            name="silu_store",
            example=patterns.SILU_STORE_EXAMPLE,
        )
        yield


class Norms(nn.Module):
    """Residual layers, each with its own weight, normalised as `norm` spells it."""

    def __init__(self, norm, *, eps=1e-6, layers=2, dtype=torch.float32):
        super().__init__()
        self.norm, self.eps = norm, eps
        self.weights = nn.ParameterList([torch.rand(WIDTH) + 0.5 for _ in range(layers)])
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.to(dtype)

    def forward(self, x):
        for weight in self.weights:
            x = x + self.proj(self.norm(x, weight, self.eps))
        return x


def by_library(x, w, eps):
    return F.rms_norm(x, (x.shape[-1],), w, eps)


def by_quotient(x, w, eps):
    y = x.float()
    return (y / (y * y).mean(-1, keepdim=True).add(eps).sqrt()).to(x.dtype) * w


def by_power(x, w, eps):
    return w * (x * (x.square().sum(-1, keepdim=True) / x.shape[-1] + eps).pow(-0.5))


def by_reciprocal(x, w, eps):
    return x * w * torch.reciprocal(torch.sqrt(eps + torch.mean(x**2, dim=-1, keepdim=True)))


def by_rows(x, w, eps):
    y = x.reshape(-1, x.shape[-1])
    return ((y * w) * (torch.einsum("td->t", y * y)[:, None] / y.shape[1] + eps).rsqrt()).view(x.shape)


RMS_SPELLINGS = [by_library, by_quotient, by_power, by_reciprocal, by_rows]


@pytest.mark.parametrize("norm", RMS_SPELLINGS)
def test_a_captured_float_in_any_spelling(rms_norm, norm):
    report = assert_fuses(Norms(norm, eps=1e-5), (torch.randn(2, 5, WIDTH),), count=2)
    assert report.fused[0].reading["numbers"]["eps"] == pytest.approx(1e-5, rel=1e-7)


def test_one_registration_serves_all_sizes_dtypes_and_eps(rms_norm):
    for shape, dtype, eps in (
        ((3, WIDTH), torch.float32, 1e-6),
        ((2, 3, 7, WIDTH), torch.bfloat16, 1e-5),
        ((1, WIDTH), torch.float16, 1e-3),
    ):
        report = assert_fuses(
            Norms(patterns.rms_norm, eps=eps, dtype=dtype), (torch.randn(shape, dtype=dtype),), count=2
        )
        assert report.fused[0].reading["numbers"] == {"eps": eps}


def test_symbolic_sizes(rms_norm):
    x = torch.randn(6, WIDTH)
    torch._dynamo.mark_dynamic(x, 0)
    report = assert_fuses(Norms(by_quotient), (x,), count=2, dynamic=None)
    assert "s" in report.fused[0].reading["tensors"]["x"]


def test_through_inductor(rms_norm):
    assert_fuses(Norms(by_library, layers=1), (torch.randn(4, WIDTH),), count=1, inner="inductor")


class Residuals(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.step = step
        self.weights = nn.ParameterList([torch.rand(WIDTH) + 0.5 for _ in range(2)])
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        residual = x
        for weight in self.weights:
            x, residual = self.step(self.proj(x), residual, weight, 1e-5)
        return x, residual


def swapped(x, residual, w, eps):
    added = residual + x
    return patterns.rms_norm(added, w, eps), added


def in_place(x, residual, w, eps):
    residual = residual.clone()
    residual += x
    return by_power(residual, w, eps), residual


def by_addcmul(x, residual, w, eps):
    added = torch.add(x, residual, alpha=1.0)
    scale = (added.square().mean(-1, keepdim=True) + eps).rsqrt()
    return torch.addcmul(torch.zeros_like(added), added * scale, w), added


def subtracting(x, residual, w, eps):
    added = x - (-residual)
    return by_reciprocal(added, w, eps), added


def flattened(x, residual, w, eps):
    added = (x.flatten(0, -2) + residual.flatten(0, -2)).view(x.shape)
    return by_quotient(added, w, eps), added


@pytest.mark.parametrize("step", [swapped, in_place, by_addcmul, subtracting, flattened])
def test_several_outputs_in_any_spelling(add_rms_norm, step):
    assert_fuses(Residuals(step), (torch.randn(6, WIDTH),), count=2)


class Stores(nn.Module):
    def __init__(self, silu, alpha=1.5):
        super().__init__()
        self.silu, self.alpha = silu, alpha

    def forward(self, x, cache, slots):
        torch.ops.own_tests.store(cache, slots, self.silu(x, self.alpha), 0.25)
        return cache.sum(-1)


STORE_SPELLINGS = [
    lambda x, alpha: F.silu(x) * alpha,
    lambda x, alpha: x * torch.sigmoid(x) * alpha,
    lambda x, alpha: alpha * x / (1 + torch.exp(-x)),
    lambda x, alpha: (x * alpha) * (0.5 + 0.5 * torch.tanh(x / 2)),
    lambda x, alpha: (x.mul(x.neg().exp().add(1).reciprocal())).div(1 / alpha),
]


@pytest.mark.parametrize("silu", STORE_SPELLINGS, ids=range(len(STORE_SPELLINGS)))
def test_a_mutable_operation_in_any_spelling(silu_store, silu):
    args = (torch.randn(4, 3, 16), torch.zeros(100, 3, 16), torch.randperm(100)[:4])
    report = assert_fuses(Stores(silu), args, count=1)
    assert report.fused[0].reading["numbers"] == {"scale": 0.25, "alpha": pytest.approx(1.5)}


def test_a_store_in_place():
    def pattern(x, cache, slots, scale: float):
        cache[slots] = x * scale

    @torch.library.custom_op("own_tests::scale_store", mutates_args={"cache"})
    def scale_store(x: Tensor, cache: Tensor, slots: Tensor, scale: float) -> None:
        cache[slots] = x * scale

    def model(x, cache, slots):
        cache.view(-1, 16).index_copy_(0, slots, x / 4)
        return cache + 1

    example = (torch.empty(5, 16), torch.empty(64, 16), torch.zeros(5, dtype=torch.int64), 0.5)
    with fx_fusion.fusions():
        fx_fusion.register_fusion(pattern=pattern, replacement=lambda **k: scale_store(**k), name="s", example=example)
        args = (torch.randn(4, 16), torch.zeros(8, 8, 16), torch.randperm(64)[:4])
        assert_fuses(model, args, count=1)


# --- what looks alike and is not ---------------------------------------------------------------------------------


def clamped(x, w, eps):
    """A clamp that random data never reaches."""
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)).clamp(-1e4, 1e4) * w


def eps_outside(x, w, eps):
    return x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * w


def over_everything(x, w, eps):
    return x * (x.square().mean() + eps).rsqrt() * w


def centred(x, w, eps):
    return F.layer_norm(x, (x.shape[-1],), w, None, eps)


def fake_quantised(x, w, eps):
    return patterns.rms_norm(x.to(torch.float8_e4m3fn).to(x.dtype) + 0 * x, w, eps)


@pytest.mark.parametrize(
    ("norm", "code"),
    [
        (eps_outside, "proof.mismatch"),
        (over_everything, "proof.mismatch"),
        (centred, None),
        (clamped, None),
    ],
)
def test_look_alikes_are_left_alone(rms_norm, norm, code):
    outcome = run_fused(Norms(norm), (torch.randn(2, 5, WIDTH),))
    assert not outcome.report.fused
    if code:
        assert code in {layer.code for layer in outcome.report.declined}


def test_a_free_step_must_be_the_pattern_s_own():
    """A clamp in the pattern: the same one matches, another bound or another argument does not."""

    def pattern(x, y, low: float):
        return (x * y).clamp(min=low) * y

    def model(low, swap=False):
        def f(x, y):
            z = (y * x if not swap else x * x).clamp(min=low)
            return torch.mul(y, z).sin()

        return f

    args = (torch.randn(4, 8), torch.randn(4, 8))
    with fx_fusion.fusions():
        fx_fusion.register_fusion(pattern=pattern, replacement=lambda x, y, low: pattern(x, y, low), name="clamp")
        assert_fuses(model(-0.5), args, count=1)
        assert not run_fused(model(-0.5, swap=True), args).report.fused
    with fx_fusion.fusions():
        fixed = lambda x, y: (x * y).clamp(min=-0.5) * y  # noqa: E731
        fx_fusion.register_fusion(pattern=fixed, replacement=lambda x, y: fixed(x, y), name="clamp")
        assert_fuses(model(-0.5), args, count=1)
        assert not run_fused(model(-0.25), args).report.fused


def test_a_value_that_is_needed_elsewhere_is_not_fused_away(rms_norm):
    def model(x, w):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return y * w, y.sum()

    assert_declines(model, (torch.randn(3, WIDTH), torch.rand(WIDTH)), code="region.escapes")


# --- replacements --------------------------------------------------------------------------------------------------


def test_a_wrong_replacement_is_refused_at_registration():
    def wrong(x, weight, eps):
        return patterns.rms_norm(x, weight, 10 * eps)

    with pytest.raises(ValueError, match=r"rms_norm: result 0 differs by .* allowed for rounding"):
        fx_fusion.register_fusion(pattern=patterns.rms_norm, replacement=wrong)
    with pytest.raises(ValueError, match="returns 2 tensors, the pattern 1"):
        fx_fusion.register_fusion(pattern=patterns.rms_norm, replacement=lambda x, weight, eps: (x, weight))


def test_a_replacement_wrong_for_one_dtype_is_refused_at_the_match():
    def wrong(x, weight, eps):
        return patterns.rms_norm(x, weight, eps) * (1.1 if x.dtype == torch.bfloat16 else 1)

    with fx_fusion.fusions():
        fx_fusion.register_fusion(pattern=patterns.rms_norm, replacement=wrong)
        assert_fuses(Norms(by_quotient), (torch.randn(3, WIDTH),), count=2)
        model = Norms(patterns.rms_norm, dtype=torch.bfloat16)
        x = torch.randn(3, WIDTH, dtype=torch.bfloat16)
        assert_declines(model, (x,), code="fusion.replacement_differs")


def test_a_replacement_that_changes_an_argument_is_refused():
    def wrong(x, weight, eps):
        result = patterns.rms_norm(x, weight, eps)
        x.zero_()
        return result

    with pytest.raises(ValueError, match="argument x afterwards differs"):
        fx_fusion.register_fusion(pattern=patterns.rms_norm, replacement=wrong)


def test_the_check_is_asked():
    seen = []

    def check(found):
        seen.append((found.tensors["x"].shape, found.numbers))
        return "too narrow" if found.tensors["x"].shape[-1] < 64 else None

    with fx_fusion.fusions():
        fx_fusion.register_fusion(pattern=patterns.rms_norm, replacement=patterns.my_rms_norm, check=check)
        report = assert_declines(Norms(by_quotient), (torch.randn(3, WIDTH),), code="fusion.check")
    assert "too narrow" in report.declined[0].reason
    assert seen[0] == ((3, WIDTH), {"eps": 1e-6})


def test_platforms():
    with fx_fusion.fusions():
        fx_fusion.register_fusion(
            pattern=patterns.rms_norm, replacement=patterns.my_rms_norm, platforms=("cuda", "hip")
        )
        report = run_fused(Norms(by_quotient), (torch.randn(3, WIDTH),)).report
    assert [layer.code for layer in report.recognised] == ["contract.kernel"] * 2


# --- optional parts and alternatives -------------------------------------------------------------------------------


def test_optional_parts_and_alternatives():
    def pattern(x, weight: Tensor | None, eps: float, gemma: bool):
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return y if weight is None else y * ((1 + weight) if gemma else weight)

    models = {
        (False, False): lambda x, w: F.rms_norm(x, (WIDTH,), w, 1e-6).cos(),
        (False, True): lambda x, w: (F.rms_norm(x, (WIDTH,), None, 1e-6) * (w + 1.0)).cos(),
        (True, True): lambda x, w: F.rms_norm(x, (WIDTH,), None, 1e-6).cos(),
    }
    with fx_fusion.fusions():
        fx_fusion.register_fusion(pattern=pattern, replacement=lambda **k: pattern(**k), name="norm")
        for (absent, gemma), model in models.items():
            report = assert_fuses(model, (torch.randn(3, WIDTH), torch.rand(WIDTH)), count=1)
            choices = report.fused[0].reading["choices"]
            assert choices == ({"weight": None, "gemma": gemma} if absent else {"gemma": gemma})


def test_several_patterns_are_alternatives():
    def packed(x):
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    with pytest.raises(TypeError, match="must have the same parameters"):
        fx_fusion.register_fusion(pattern=[packed, lambda gate, up: F.silu(gate) * up], replacement=packed)
    with fx_fusion.fusions():
        other = lambda x: F.gelu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]  # noqa: E731
        with pytest.raises(ValueError, match="differs"):
            fx_fusion.register_fusion(pattern=[packed, other], replacement=packed, name="glu")


# --- registration ---------------------------------------------------------------------------------------------------


def test_as_a_decorator_and_scoped():
    names = lambda: [fusion.name for fusion in fx_fusion.fusion.REGISTRY]  # noqa: E731
    before = names()
    with fx_fusion.fusions("qk_norm_rope_cache"):

        @fx_fusion.register_fusion(pattern=patterns.rms_norm, name="mine")
        def mine(x, weight, eps):
            return patterns.my_rms_norm(x, weight, eps)

        assert names() == ["qk_norm_rope_cache", "mine"]
        assert mine(torch.ones(2, 4), torch.ones(4), 1e-6).shape == (2, 4)
    assert names() == before
    with pytest.raises(ValueError, match="no fusion is named 'other'"), fx_fusion.fusions("other"):
        pass


def test_the_uuid_follows_what_functions_close_over():
    def make(factor):
        def replacement(x, weight, eps):
            return patterns.my_rms_norm(x, weight, eps) * (factor / factor)

        return replacement

    uuids = []
    for factor in (2.0, 3.0, 2.0):
        with fx_fusion.fusions():
            fx_fusion.register_fusion(pattern=patterns.rms_norm, replacement=make(factor))
            uuids.append(fx_fusion.FusionPass().uuid())
    assert uuids[0] == uuids[2] != uuids[1]
    assert None not in uuids


def test_what_cannot_be_hashed_turns_caching_off():
    import threading

    lock = threading.Lock()

    def replacement(x, weight, eps):
        with lock:
            return patterns.my_rms_norm(x, weight, eps)

    with fx_fusion.fusions():
        fx_fusion.register_fusion(pattern=patterns.rms_norm, replacement=replacement)
        assert fx_fusion.FusionPass().uuid() is None


def annotated(x: str):
    return x


def test_bad_registrations_say_what_to_do():
    with pytest.raises(TypeError, match=r"parameter 'x' of pattern is annotated .* expected Tensor"):
        fx_fusion.register_fusion(pattern=annotated, replacement=annotated)
    with pytest.raises(TypeError, match="is called with the parameters of the pattern, x, weight, eps, by name"):
        fx_fusion.register_fusion(pattern=patterns.rms_norm, replacement=lambda x, weight: x)
    with pytest.raises(ValueError, match="pass example="):
        fx_fusion.register_fusion(pattern=lambda x: x.view(13, 17) + 1, replacement=lambda x: x)
    with pytest.raises(ValueError, match="returns its argument 'x' as it came"):
        fx_fusion.register_fusion(pattern=lambda x: x, replacement=lambda x: x)
    with pytest.raises(ValueError, match="draws random numbers"):
        fx_fusion.register_fusion(pattern=lambda x: torch.rand_like(x) + x, replacement=lambda x: x)
    with pytest.raises(TypeError, match=r"example must give a value for each of x, weight, eps; missing \['eps'\]"):
        fx_fusion.register_fusion(
            pattern=patterns.rms_norm, replacement=patterns.my_rms_norm, example=(torch.ones(2, 4), torch.ones(4))
        )
    with pytest.raises(TypeError, match="replacement= is given without pattern="):
        fx_fusion.register_fusion(replacement=patterns.my_rms_norm)


def test_nothing_found_says_how_near_it_came(rms_norm):
    report = run_fused(Norms(eps_outside, layers=1), (torch.randn(3, WIDTH),)).report
    assert "differ by" in report.declined[0].reason
    assert "test_function_fusions.py" in report.declined[0].source


def test_require_counts_own_fusions_without_a_store(rms_norm):
    options = {"fx_fusion.inner": "eager", "fx_fusion.require": 2}
    x = torch.randn(3, WIDTH)
    with torch.no_grad():
        torch.compile(Norms(by_quotient), backend="fx_fusion", options=options)(x)
        assert len(fx_fusion.last_report().fused) == 2
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"fx_fusion\.require=2, but 0 fused calls"):
            torch.compile(Norms(eps_outside), backend="fx_fusion", options=options)(x)
