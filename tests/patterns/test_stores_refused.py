"""What only looks like a store of this layer's keys and values is declined by name."""

from __future__ import annotations

import pytest
import torch
from prologue import HEAD_DIM, NUM_KV_HEADS, SLOTS, Prologue, arguments
from torch import nn

from fx_fusion.testing import assert_declines, assert_fuses


class Accumulates(Prologue):
    def store(self, cache, slots, value):
        cache[slots] += value


class AccumulatesInASlice(Prologue):
    def store(self, cache, slots, value):
        cache[3 : 3 + value.shape[0]] += value


class AddsByIndex(Prologue):
    def store(self, cache, slots, value):
        cache.index_add_(0, slots, value)


class AddsByScatter(Prologue):
    def store(self, cache, slots, value):
        cache.scatter_add_(0, slots[:, None, None].expand_as(value), value)


class Replaced(Prologue):
    """The cache is computed anew."""

    def store(self, cache, slots, value):
        cache.copy_(cache * 0.5 + value.mean())


class Swapped(Prologue):
    """Each cache gets what the other one held, and this layer's keys or values."""

    def consume(self, q, k, v, k_cache, v_cache):
        keys = k_cache.clone()
        k_cache.copy_(v_cache)
        v_cache.copy_(keys)
        return super().consume(q, k, v, k_cache, v_cache)


class OtherSlots(Prologue):
    def forward(self, x, positions, slots, k_cache, v_cache):
        self.slots = [slots + 1, slots]
        return super().forward(x, positions, slots.clamp(max=SLOTS - 2), k_cache, v_cache)

    def store(self, cache, slots, value):
        cache[self.slots.pop() % SLOTS] = value


class KeyBeforeTheRotation(Prologue):
    def forward(self, x, positions, slots, k_cache, v_cache):
        q, k, v = self.split(self.project(x))
        cos, sin = self.angles(positions)
        k = self.norm(k, self.k_weight)
        self.store(k_cache, slots, k)
        self.store(v_cache, slots, v)
        q, k = self.rotate(self.norm(q, self.q_weight), cos, sin), self.rotate(k, cos, sin)
        return self.consume(q, k, v, k_cache, v_cache) + k.sum()


class KeyFakeQuantised(Prologue):
    def rotate(self, x, cos, sin):
        return super().rotate(x, cos, sin).to(torch.float8_e4m3fn).float()


class TwiceIntoOneCache(Prologue):
    def consume(self, q, k, v, k_cache, v_cache):
        self.store(v_cache, torch.arange(5), v * 2)
        return super().consume(q, k, v, k_cache, v_cache)


CASES = {
    Accumulates: "store.accumulates",
    AccumulatesInASlice: "store.accumulates",
    AddsByIndex: "store.accumulates",
    AddsByScatter: "store.accumulates",
    Replaced: "store.unknown_writer",
    Swapped: "store.other_cache",
    OtherSlots: "store.slots_differ",
    KeyBeforeTheRotation: "rope.missing",
    KeyFakeQuantised: "proof.rounding",
    TwiceIntoOneCache: "store.repeated",
}


@pytest.mark.parametrize("model", CASES, ids=lambda cls: cls.__name__)
def test_declined(model):
    report = assert_declines(model(), arguments(), code=CASES[model])
    layer = next(layer for layer in report.declined if layer.code == CASES[model])
    assert ".py:" in (layer.source or "") or model is Swapped  # copies between inputs: the trace keeps no line


def test_an_unknown_writer_is_named():
    report = assert_declines(Replaced(), arguments(), code="store.unknown_writer")
    assert "is overwritten with the result of aten." in str(report)


class ValueTwice(Prologue):
    """A backup of the values."""

    def forward(self, x, positions, slots, k_cache, v_cache, backup):
        self.backup = backup
        return super().forward(x, positions, slots, k_cache, v_cache)

    def consume(self, q, k, v, k_cache, v_cache):
        self.store(self.backup, slots=torch.arange(5), value=v)
        return super().consume(q, k, v, k_cache, v_cache)


def test_a_value_stored_twice():
    """The second store is left where it is; the layer itself is fused."""
    args = *arguments(), torch.randn(SLOTS, NUM_KV_HEADS, HEAD_DIM)
    report = assert_fuses(ValueTwice(), args, count=1)
    assert [layer.code for layer in report.declined] == ["store.value_twice"]


class OneTensor(Prologue):
    def forward(self, x, positions, slots, kv_cache):
        return super().forward(x, positions, slots, *self.parts(kv_cache))


@pytest.mark.parametrize(
    ("parts", "shape"),
    [
        (lambda kv: (kv[0], kv[0]), (2, SLOTS, NUM_KV_HEADS, HEAD_DIM)),
        (lambda kv: (kv[:-1], kv[1:]), (SLOTS + 1, NUM_KV_HEADS, HEAD_DIM)),
        (lambda kv: (kv[..., :HEAD_DIM], kv[..., 8 : 8 + HEAD_DIM]), (SLOTS, NUM_KV_HEADS, 2 * HEAD_DIM)),
    ],
    ids=["one part", "shifted by a row", "half the lanes"],
)
def test_keys_and_values_that_overlap(parts, shape):
    class Overlapping(OneTensor):
        def parts(self, kv_cache):
            return parts(kv_cache)

    assert_declines(Overlapping(), (*arguments()[:3], torch.randn(shape)), code="store.overlap")


class Layers(nn.Module):
    """`writes` says which layers do."""

    def __init__(self, writes, shared):
        super().__init__()
        self.layers = nn.ModuleList([Prologue() for _ in writes])
        self.shared = shared
        for layer, stores in zip(self.layers, writes, strict=True):
            if not stores:
                layer.store = lambda *_: None

    def forward(self, x, positions, slots, *caches):
        for i, layer in enumerate(self.layers):
            k_cache, v_cache = caches[:2] if self.shared else caches[2 * i : 2 * i + 2]
            x = x + layer(x, positions, slots, k_cache, v_cache) + k_cache.mean()
        return x


def test_two_layers_that_write_one_cache():
    report = assert_declines(Layers([True, True], shared=True), arguments(), code="store.repeated")
    assert "after an earlier store" in str(report)


def test_a_layer_that_must_not_write():
    """It reads what an earlier layer stored, as Gemma 3n's last layers do: nothing of it is touched."""
    assert_fuses(Layers([True, False], shared=True), arguments(), count=1)


def test_clamped_or_quantised_values_stay_outside():
    class Clamped(Prologue):
        def split(self, qkv):
            q, k, v = super().split(qkv)
            return q, k, v.clamp(-0.05, 0.05)

    class Quantised(Prologue):
        def split(self, qkv):
            q, k, v = super().split(qkv)
            return q, k, v.to(torch.float8_e4m3fn).float()

    for model in (Clamped, Quantised):
        assert_fuses(model(), arguments(), count=1)
