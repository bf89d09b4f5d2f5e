"""Opaque operations with a declared meaning: fused, put back, compared, refused."""

from __future__ import annotations

import json
from contextlib import ExitStack

import opaque_ops
import pytest
import torch
from prologue import EPS, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, SECTION, Prologue, arguments
from torch import Tensor

import fx_fusion
from fx_fusion.meanings import vllm
from fx_fusion.testing import assert_declines, assert_fuses

LIBRARY = opaque_ops.register("opaque_test")
OPS = torch.ops.opaque_test

SIZES = [NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM]


def store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    k_cache[slots] = k
    v_cache[slots] = v


def rope_out(q: Tensor, k: Tensor, q_rope: Tensor, k_rope: Tensor, table: Tensor, pos_ids: Tensor) -> None:
    cos, sin = (part.unsqueeze(1) for part in table[pos_ids].chunk(2, -1))
    for x, out in ((q, q_rope), (k, k_rope)):
        a, b = x.chunk(2, -1)
        out.copy_(torch.cat([a * cos - b * sin, b * cos + a * sin], -1))


MEANINGS = {
    "ir_rms_norm": vllm.ir_rms_norm,
    "rms_norm": vllm.c_rms_norm,
    "rotary_embedding": vllm.c_rotary_embedding,
    "mrope": vllm.mrope,
    "store": store,
    "rope_out": rope_out,
}


@pytest.fixture
def declared():
    with ExitStack() as stack:
        for name, fn in MEANINGS.items():
            stack.enter_context(fx_fusion.declare_meaning(getattr(OPS, name), fn))
        yield


@pytest.fixture(params=[True, False], ids=["v2", "v1"])
def functionalised(request):
    """In which of two ways an operation that writes its arguments is made functional."""
    with torch._inductor.config.patch(enable_auto_functionalized_v2=request.param):
        yield


class Opaque(Prologue):
    """Every step but the projection is an opaque operation; query and key are rotated where they are."""

    def forward(self, x, positions, slots, k_cache, v_cache):
        q, k, v = self.project(x).split(SIZES, -1)
        q, k = self.normed(q, self.q_weight), self.normed(k, self.k_weight)
        q, k = self.rotated(q, k, positions)
        k, v = (each.view(x.shape[0], -1, HEAD_DIM) for each in (k, v))
        self.put(k, v, k_cache, v_cache, slots)
        return self.consume(q.view(x.shape[0], -1, HEAD_DIM), k, v, k_cache, v_cache)

    def normed(self, x, weight):
        return OPS.ir_rms_norm(x.view(x.shape[0], -1, HEAD_DIM), weight, EPS).view(x.shape[0], -1)

    def rotated(self, q, k, positions):
        OPS.mrope(positions, q, k, self.cos_sin_cache, HEAD_DIM, HEAD_DIM, *SECTION, True, True)
        return q, k

    def put(self, k, v, k_cache, v_cache, slots):
        OPS.store(k, v, k_cache, v_cache, slots)


class InPlace(Opaque):
    """No norm: query and key are rotated as views of the packed projection."""

    def normed(self, x, weight):
        return x


class InPlaceAsHeads(InPlace):
    """The views are [T, H, D]."""

    def rotated(self, q, k, positions):
        return super().rotated(*(each.view(each.shape[0], -1, HEAD_DIM) for each in (q, k)), positions)


class SplitOverHeads(InPlace):
    """The projection is [T, H + 2 Hk, D] when it is split."""

    def forward(self, x, positions, slots, k_cache, v_cache):
        heads = self.project(x).view(x.shape[0], -1, HEAD_DIM)
        q, k, v = heads.split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], 1)
        q, k = self.rotated(q, k, positions)
        self.put(k, v, k_cache, v_cache, slots)
        return self.consume(q, k, v, k_cache, v_cache)


class NormedInPlace(Opaque):
    """The norm, too, writes to the views of the packed projection that it reads."""

    def normed(self, x, weight):
        heads = x.view(x.shape[0], -1, HEAD_DIM)
        OPS.rms_norm(heads, heads, weight, EPS)
        return x


class NormOut(Opaque):
    """The norm writes to a new tensor."""

    def normed(self, x, weight):
        heads = x.reshape(-1, HEAD_DIM)
        out = torch.empty_like(heads)
        OPS.rms_norm(out, heads, weight, EPS)
        return out.view(x.shape[0], -1)


class PlainRope(Opaque):
    """1-D positions, GPT-J pairs."""

    def rotated(self, q, k, positions):
        OPS.rotary_embedding(positions[0], q, k, HEAD_DIM, self.cos_sin_cache, False)
        return q, k


class RopeOut(Opaque):
    """Reads and writes are two arguments, which are one tensor."""

    def rotated(self, q, k, positions):
        q, k = (each.view(each.shape[0], -1, HEAD_DIM) for each in (q, k))
        OPS.rope_out(q, k, q, k, self.cos_sin_cache, positions[0])
        return q, k


class NormOnly(Opaque):
    """One opaque operation among plain PyTorch."""

    def rotated(self, q, k, positions):
        cos, sin = self.angles(positions)
        return tuple(self.rotate(each.view(each.shape[0], -1, HEAD_DIM), cos, sin) for each in (q, k))

    def put(self, k, v, k_cache, v_cache, slots):
        self.store(k_cache, slots, k)
        self.store(v_cache, slots, v)


class KeyReturned(InPlace):
    def consume(self, q, k, v, k_cache, v_cache):
        return super().consume(q, k, v, k_cache, v_cache), k.clone(), v.clone()


class CacheRead(Opaque):
    """Attention reads what was stored."""

    def consume(self, q, k, v, k_cache, v_cache):
        return super().consume(q, k, v, k_cache, v_cache) + k_cache.mean() + v_cache.sum()


MODELS = [
    Opaque, InPlace, InPlaceAsHeads, SplitOverHeads, NormedInPlace, NormOut, PlainRope, RopeOut, NormOnly, KeyReturned,
    CacheRead,
]  # fmt: skip


@pytest.mark.parametrize("model", MODELS, ids=lambda cls: cls.__name__)
def test_fuses(model, declared, functionalised):
    report = assert_fuses(model(), arguments(), count=1)
    assert report.fused[0].assumed
    assert report.fused[0].facts["projection"] == "packed"


def dynamic_arguments() -> tuple[Tensor, ...]:
    given = arguments()
    for tensor, dim in zip(given[:3], (0, 1, 0), strict=True):
        torch._dynamo.mark_dynamic(tensor, dim)
    return given


@pytest.mark.parametrize("model", [Opaque, InPlace, InPlaceAsHeads, NormOut], ids=lambda cls: cls.__name__)
def test_fuses_with_a_symbolic_number_of_tokens(model, declared, functionalised):
    assert_fuses(model(), dynamic_arguments(), count=1, dynamic=None)


def test_assumptions_are_in_the_report(declared):
    report = assert_fuses(Opaque(), arguments(), count=1)
    text = str(report)
    for name in ("ir_rms_norm = fx_fusion.meanings.vllm.ir_rms_norm", "store = test_meaning.store"):
        assert f"assumed: opaque_test::{name} (compared on cpu: " in text
    assert "opaque_test::mrope" in " ".join(json.loads(report.to_json())["layers"][0]["assumed"])
    assert fx_fusion.FusionReport.from_json(report.to_json()) == report


def test_without_a_declaration_nothing_fuses():
    assert_declines(Opaque(), arguments(), code="store.unknown_writer")
