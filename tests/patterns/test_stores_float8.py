"""Caches in another dtype than the model's: float8 (its bytes too) and float16, with and without a scale."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from prologue import HEAD_DIM, NUM_KV_HEADS, SLOTS, Prologue, arguments

from fx_fusion import placement
from fx_fusion.decline import Decline
from fx_fusion.kernels.qk_norm_rope_cache import reference
from fx_fusion.mutation.mutants import capture
from fx_fusion.patterns.qk_norm_rope_cache.cache_store import conversion
from fx_fusion.testing import assert_declines, run

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def given(cache_dtype, dtype=torch.float32, shape=None, loud=False):
    """Inputs with empty caches; `loud` ones give values far beyond the range of a float8."""
    x, positions, slots, *_ = arguments(dtype=dtype)
    caches = torch.zeros(2, *(shape or (SLOTS, NUM_KV_HEADS, HEAD_DIM))).to(cache_dtype)
    return x * 1e5 if loud else x, positions, slots, *caches


def assert_same_bytes(model, args, *, count=1, steps_of_k=0):
    """As in eager, byte by byte; keys may differ by `steps_of_k` of their dtype, where the model rounds on the way."""
    outcome = run(model, args)
    assert len(outcome.report.fused) == count, str(outcome.report)
    expected = run_in_eager(model, args)
    for i, (actual, wanted) in enumerate(zip(outcome.state[1][3:5], expected[3:5], strict=True)):
        bits = [each.view(torch.uint8 if each.dtype.itemsize == 1 else torch.int16).int() for each in (actual, wanted)]
        allowed = steps_of_k if i == 0 else 0
        assert int((bits[0] - bits[1]).abs().max()) <= allowed, f"cache {i}\n{outcome.report}"
    return outcome.report.fused[0].reading


def run_in_eager(model, args):
    args = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
    with torch.no_grad():
        model(*args)
    return args


# --- how it is spelled ------------------------------------------------------------------------------------------------


class Plain(Prologue):
    def store(self, cache, slots, value):
        cache[slots] = value.to(cache.dtype)


class ThroughBytes(Prologue):
    """What runs where PyTorch indexes no float8."""

    def store(self, cache, slots, value):
        cache.view(torch.uint8).index_copy_(0, slots, value.to(cache.dtype).view(torch.uint8))


class ScatteredBytes(Prologue):
    def store(self, cache, slots, value):
        index = slots[:, None, None].expand_as(value)
        cache.view(torch.uint8).scatter_(0, index, value.to(cache.dtype).view(torch.uint8))


class SlicedBytes(Prologue):
    def store(self, cache, slots, value):
        cache.view(torch.uint8)[3 : 3 + value.shape[0]] = value.to(cache.dtype).view(torch.uint8)


@pytest.mark.parametrize("model", [Plain, ThroughBytes, ScatteredBytes, SlicedBytes], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_spellings(model, dtype):
    facts = assert_same_bytes(model(), given(dtype))
    assert facts["cache_dtype"] == str(dtype)
    assert facts["k_scale"] is facts["v_scale"] is None


class BytesForCaches(Prologue):
    """SGLang's buffers are uint8, whatever float8 they hold."""

    dtype = E4M3

    def store(self, cache, slots, value):
        cache[slots] = value.to(self.dtype).view(torch.uint8)


class ViewedBytesForCaches(BytesForCaches):
    def store(self, cache, slots, value):
        cache.view(self.dtype)[slots] = value.to(self.dtype)


class OtherBytes(BytesForCaches):
    dtype = E5M2


@pytest.mark.parametrize("model", [BytesForCaches, ViewedBytesForCaches, OtherBytes], ids=lambda cls: cls.__name__)
def test_caches_of_bytes(model):
    assert assert_same_bytes(model(), given(torch.uint8))["cache_dtype"] == str(model.dtype)


def test_bytes_of_another_float8_than_the_caches():
    """The bytes are what they are."""
    assert assert_same_bytes(OtherBytesInside(), given(E4M3))["cache_dtype"] == str(E5M2)


class OtherBytesInside(Prologue):
    def store(self, cache, slots, value):
        cache.view(torch.uint8)[slots] = value.to(E5M2).view(torch.uint8)


BLOCK, PAGES = 8, SLOTS // 8
LAYOUTS = {
    "NHD": ((PAGES, BLOCK, NUM_KV_HEADS, HEAD_DIM), lambda c, s: (s // BLOCK, s % BLOCK)),
    "HND": ((PAGES, NUM_KV_HEADS, BLOCK, HEAD_DIM), lambda c, s: (s // BLOCK, slice(None), s % BLOCK)),
    "BHSD": ((1, NUM_KV_HEADS, SLOTS, HEAD_DIM), lambda c, s: (0, slice(None), s)),
    "packed": ((PAGES, NUM_KV_HEADS, BLOCK, 2 * HEAD_DIM), lambda c, s: (s // BLOCK, slice(None), s % BLOCK)),
}


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, E4M3], ids=str)
def test_layouts(layout, dtype):
    shape, place = LAYOUTS[layout]

    class Paged(Prologue):
        def store(self, cache, slots, value):
            stored = value.to(cache.dtype)
            if stored.dtype.itemsize == 1:
                cache, stored = cache.view(torch.uint8), stored.view(torch.uint8)
            cache[place(cache, slots)] = stored

    assert_same_bytes(Paged(), given(dtype, shape=shape), steps_of_k=1)


def test_side_by_side_in_one_tensor():
    shape, place = LAYOUTS["packed"]

    class Packed(Prologue):
        def forward(self, x, positions, slots, kv_cache):
            return super().forward(x, positions, slots, kv_cache[..., :HEAD_DIM], kv_cache[..., HEAD_DIM:])

        def store(self, cache, slots, value):
            cache.view(torch.uint8)[place(cache, slots)] = value.to(cache.dtype).view(torch.uint8)

    args = given(E4M3, shape=shape)[:4]
    outcome = run(Packed(), args)
    assert outcome.report.fused, str(outcome.report)


# --- beyond the range -------------------------------------------------------------------------------------------------


class Clamped(Prologue):
    def store(self, cache, slots, value):
        largest = torch.finfo(cache.dtype).max
        cache.view(torch.uint8)[slots] = value.clamp(-largest, largest).to(cache.dtype).view(torch.uint8)


class LoudKeys(Clamped):
    """Normalised keys are small: these weights are not."""

    def norm(self, x, weight):
        return super().norm(x, weight * 1e5)


class Unclamped(LoudKeys):
    def store(self, cache, slots, value):
        cache.view(torch.uint8)[slots] = value.to(cache.dtype).view(torch.uint8)


@pytest.mark.parametrize("model", [LoudKeys, Unclamped], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_values_beyond_the_range(model, dtype):
    """Where PyTorch saturates, so does the call; where it gives NaN, so does the call: versions differ."""
    args = given(dtype, loud=True)
    facts = assert_same_bytes(model(), args)
    saturates = bool(torch.tensor(1e6).to(dtype).float() == torch.finfo(dtype).max)
    assert facts["saturate"] == (saturates or model is LoudKeys)


@pytest.mark.parametrize("dtype", sorted(conversion.FLOAT8, key=str), ids=str)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_reference_converts_like_pytorch(source, dtype):
    """At every number of 16 bits, and around each step of the rounding."""
    values = conversion._every_value(source, dtype, torch.device("cpu"))
    assert len(values.unique()) >= 1 << 15
    assert conversion._native_saturation(source, dtype, torch.device("cpu")) is not None
    assert conversion._agrees(source, dtype, torch.device("cpu"), clamped=True)


def test_a_conversion_that_is_not_the_kernels_is_declined(monkeypatch):
    """A PyTorch that rounds otherwise."""
    original = reference.to_cache
    monkeypatch.setattr(reference, "to_cache", lambda value, *rest: original(value * 1.01, *rest))
    for cached in (conversion._native_saturation, conversion._agrees):
        cached.cache_clear()
    try:
        assert_declines(Plain(), given(E4M3), code="store.conversion")
    finally:
        for cached in (conversion._native_saturation, conversion._agrees):
            cached.cache_clear()


class OneSideClamped(Prologue):
    def store(self, cache, slots, value):
        cache[slots] = value.clamp(max=torch.finfo(cache.dtype).max).to(cache.dtype)


class OtherBound(Prologue):
    """240 is the range of AMD's float8, not of this one."""

    def store(self, cache, slots, value):
        cache[slots] = value.clamp(-240, 240).to(cache.dtype)


class KeyClampedInAWiderCache(Prologue):
    def store(self, cache, slots, value):
        cache[slots] = value.clamp(-448, 448)


@pytest.mark.parametrize(
    ("model", "dtype"), [(OneSideClamped, E4M3), (OtherBound, E4M3), (KeyClampedInAWiderCache, torch.float32)]
)
def test_other_clamps_are_declined(model, dtype):
    assert_declines(model(), given(dtype), code="proof.not_analytic")


class OnlyTheKeyClamped(Prologue):
    def forward(self, x, positions, slots, k_cache, v_cache):
        self.bounds = [1e30, torch.finfo(k_cache.dtype).max]
        return super().forward(x, positions, slots, k_cache, v_cache)

    def store(self, cache, slots, value):
        bound = self.bounds.pop()
        cache[slots] = (value if bound == 1e30 else value.clamp(-bound, bound)).to(cache.dtype)


def test_converted_differently():
    """An e5m2 that is not clamped overflows to infinity."""
    assert_declines(OnlyTheKeyClamped(), given(E5M2), code="store.conversions_differ")


def test_a_clamped_value_may_stay_outside():
    class OnlyTheValueClamped(OnlyTheKeyClamped):
        def forward(self, x, positions, slots, k_cache, v_cache):
            self.bounds = [torch.finfo(k_cache.dtype).max, 1e30]
            return Prologue.forward(self, x, positions, slots, k_cache, v_cache)

    assert not assert_same_bytes(OnlyTheValueClamped(), given(E5M2, loud=True))["saturate"]


# --- scales -----------------------------------------------------------------------------------------------------------


class ScaledByANumber(Prologue):
    def store(self, cache, slots, value):
        cache[slots] = (value / 0.37).to(cache.dtype)


class ScaledByAPowerOfTwo(Prologue):
    """The same as a division."""

    def store(self, cache, slots, value):
        cache[slots] = (value * 4).to(cache.dtype)


class ScaledByAConstantTensor(Prologue):
    def store(self, cache, slots, value):
        cache[slots] = (value / torch.tensor(0.37)).to(cache.dtype)


@pytest.mark.parametrize(
    ("model", "scale"), [(ScaledByANumber, 0.37), (ScaledByAPowerOfTwo, 0.25), (ScaledByAConstantTensor, 0.37)]
)
@pytest.mark.parametrize("dtype", [E4M3, torch.float16], ids=str)
def test_scaled_by_a_number(model, scale, dtype):
    facts = assert_same_bytes(model(), given(dtype))
    assert facts["k_scale"] == pytest.approx(scale)
    assert facts["v_scale"] is None if dtype is torch.float16 else facts["v_scale"] == pytest.approx(scale)


class ScaledByATensor(Prologue):
    def __init__(self, dtype=torch.float32, shape=(), scale_dtype=torch.float32):
        super().__init__(dtype)
        self.register_buffer("k_scale", torch.full(shape, 0.37, dtype=scale_dtype))
        self.register_buffer("v_scale", torch.full(shape, 0.21, dtype=scale_dtype))

    def forward(self, x, positions, slots, k_cache, v_cache):
        self.scales = [self.v_scale, self.k_scale]
        return super().forward(x, positions, slots, k_cache, v_cache)

    def store(self, cache, slots, value):
        cache[slots] = (value.float() / self.scales.pop()).to(cache.dtype)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=str)
def test_scaled_by_a_tensor(shape):
    facts = assert_same_bytes(ScaledByATensor(shape=shape), given(E4M3))
    assert isinstance(facts["k_scale"], str)
    assert facts["k_scale"] != facts["v_scale"]


def test_another_scale_in_the_tensor_is_read():
    """The graph holds the tensor, not its value."""
    args, model = given(E4M3), ScaledByATensor()
    compiled = torch.compile(model, backend="fx_fusion", options={"fx_fusion.kernel": "reference"} | EAGER)
    for scale in (0.37, 1.5):
        model.k_scale.fill_(scale)
        actual = [arg.clone() for arg in args]
        with torch.no_grad():
            compiled(*actual)
        assert torch.equal(actual[3].view(torch.uint8), run_in_eager(model, args)[3].view(torch.uint8))


EAGER = {"fx_fusion.inner": "eager", "fx_fusion.require": 1}


@pytest.mark.parametrize("wide", [True, False], ids=["float32", "bfloat16"])
def test_scaled_in_bfloat16(wide):
    """Dividing in bfloat16 rounds once more: the value is divided outside, so that its bytes are the model's."""

    class Scaled(ScaledByATensor):
        def store(self, cache, slots, value):
            scale = self.scales.pop()
            cache[slots] = (value.float() / scale if wide else value / scale).to(cache.dtype)

    facts = assert_same_bytes(Scaled(torch.bfloat16), given(E4M3, torch.bfloat16), steps_of_k=1)
    assert isinstance(facts["k_scale"], str)
    assert (facts["v_scale"] is not None) == wide


class DividedInPlace(Prologue):
    """SGLang's set_kv_buffer"""

    def store(self, cache, slots, value):
        value.div_(0.37)
        cache[slots] = value.to(E4M3).view(torch.uint8)


def test_divided_in_place():
    assert assert_same_bytes(DividedInPlace(), given(torch.uint8))["k_scale"] == 0.37


class ScaleInverted(ScaledByATensor):
    def store(self, cache, slots, value):
        cache[slots] = (value * self.scales.pop()).to(cache.dtype)


class ScaleInvertedNumber(Prologue):
    def store(self, cache, slots, value):
        cache[slots] = (value * (1 / 0.37)).to(cache.dtype)


class TimesAReciprocal(ScaledByATensor):
    """Nearly the same, yet another rounding."""

    def store(self, cache, slots, value):
        cache[slots] = (value * self.scales.pop().reciprocal()).to(cache.dtype)


@pytest.mark.parametrize("model", [ScaleInverted, ScaleInvertedNumber, TimesAReciprocal], ids=lambda cls: cls.__name__)
def test_multiplied_by_the_scale(model):
    report = assert_declines(model(), given(E4M3), code="store.scale_inverted")
    assert "the kernel divides" in str(report)


def test_a_value_multiplied_by_its_scale_stays_outside():
    class Inverted(ScaledByATensor):
        def store(self, cache, slots, value):
            scale = self.scales.pop()
            cache[slots] = (value * scale if self.scales == [] else value / scale).to(cache.dtype)

    facts = assert_same_bytes(Inverted(), given(E4M3))
    assert facts["v_scale"] is None


def test_a_scale_in_float64_is_declined():
    class Wide(ScaledByATensor):
        def store(self, cache, slots, value):
            cache[slots] = (value / self.scales.pop()).to(cache.dtype)

    assert_declines(Wide(scale_dtype=torch.float64), given(E4M3), code="store.scale")


def test_a_scale_for_each_head_is_declined():
    class PerHead(Prologue):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.rand(NUM_KV_HEADS, 1) + 0.5)

        def store(self, cache, slots, value):
            cache[slots] = (value / self.scale).to(cache.dtype)

    report = run(PerHead(), given(E4M3)).report
    assert not report.fused
    assert report.declined[0].code == "rope.rows"


def test_a_scale_on_the_cpu_is_no_operand_of_a_gpus_kernel():
    graph = capture(ScaledByATensor(), given(E4M3)).module.graph
    scale, *_, cache = [node for node in graph.nodes if node.op == "placeholder"]
    cache.meta["val"] = dataclasses.make_dataclass("Far", ["device"])(torch.device("cuda"))
    with pytest.raises(Decline, match=r"placement\.scale_on_host: the scale .* is a tensor on the CPU"):
        placement.check_scales([scale], cache)


# --- what is no float8 ------------------------------------------------------------------------------------------------


class Quantised(Prologue):
    def store(self, cache, slots, value):
        cache[slots] = (value * 10).round().clamp(-128, 127).to(torch.int8)


def test_an_integer_cache_is_declined_by_name():
    report = assert_declines(Quantised(), given(torch.int8), code="store.integer_cache")
    assert "torch.int8" in str(report)


def test_a_float8_without_a_kernel_is_declined():
    class Fnuz(Prologue):
        def store(self, cache, slots, value):
            cache[slots] = value.to(torch.float8_e5m2fnuz).view(torch.uint8)

    assert_declines(Fnuz(), given(torch.uint8), code="store.conversion")
