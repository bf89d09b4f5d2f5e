"""What only looks like the prologue is declined by name; an odd step that can stay outside the call is left there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from prologue import EPS, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, Prologue, arguments
from torch import nn

from fx_fusion.testing import assert_declines, assert_fuses

LOOK_ALIKES: dict[str, tuple[type[Prologue], str]] = {}


def look_alike(code: str):
    def add(cls: type[Prologue]) -> type[Prologue]:
        LOOK_ALIKES[cls.__name__] = (cls, code)
        return cls

    return add


@look_alike("split.columns")
class TokensMixed(Prologue):
    """The projection is cut as one long row: what token 1 gets are other columns than token 0's."""

    def split(self, qkv):
        tokens, parts = qkv.shape[0], []
        for part in qkv.flatten().split([tokens * n * HEAD_DIM for n in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)]):
            parts.append(part.view(tokens, -1, HEAD_DIM))
        return tuple(parts)


@look_alike("norm.not_per_head")
class NormOverTheProjection(Prologue):
    """OLMo2, MiniMax"""

    def __init__(self, dtype=torch.float32):
        super().__init__(dtype)
        self.q_weight = nn.Parameter(torch.rand(NUM_HEADS * HEAD_DIM))
        self.k_weight = nn.Parameter(torch.rand(NUM_KV_HEADS * HEAD_DIM))

    def norm(self, x, weight):
        return super().norm(x.flatten(1), weight).view(x.shape)


@look_alike("proof.not_analytic")
class LayerNorm(Prologue):
    def norm(self, x, weight):
        return F.layer_norm(x, (HEAD_DIM,), weight, None, EPS)


@look_alike("norm.eps")
class EpsOutsideTheRoot(Prologue):
    def norm(self, x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + EPS) * weight


@look_alike("norm.eps")
class NoEps(Prologue):
    def norm(self, x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * weight


@look_alike("norm.eps_is_input")
class EpsInABuffer(Prologue):
    def __init__(self, dtype=torch.float32):
        super().__init__(dtype)
        self.register_buffer("eps", torch.tensor(EPS))

    def norm(self, x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * weight


@look_alike("rope.missing")
class NormAfterTheRotation(Prologue):
    def forward(self, x, positions, slots, k_cache, v_cache):
        q, k, v = self.split(self.project(x))
        cos, sin = self.angles(positions)
        q = self.norm(self.rotate(q, cos, sin), self.q_weight)
        k = self.norm(self.rotate(k, cos, sin), self.k_weight)
        self.store(k_cache, slots, k)
        self.store(v_cache, slots, v)
        return self.consume(q, k, v, k_cache, v_cache)


@look_alike("rope.not_a_rotation")
class SineNegatedInOneHalf(Prologue):
    def rotate(self, x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos + b * sin, b * cos + a * sin], -1)


@look_alike("rope.not_a_rotation")
class LanesPermuted(Prologue):
    def rotate(self, x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b.flip(-1) * sin, b * cos + a * sin], -1)


@look_alike("rope.not_a_rotation")
class CosineSquared(Prologue):
    def rotate(self, x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos * cos - b * sin, b * cos + a * sin], -1)


@look_alike("rope.missing")
class NoRotation(Prologue):
    def rotate(self, x, cos, sin):
        return x


@look_alike("rope.query_missing")
class QueryNotRotated(Prologue):
    def forward(self, x, positions, slots, k_cache, v_cache):
        q, k, v = self.split(self.project(x))
        k = self.rotate(self.norm(k, self.k_weight), *self.angles(positions))
        self.store(k_cache, slots, k)
        self.store(v_cache, slots, v)
        return self.consume(self.norm(q, self.q_weight), k, v, k_cache, v_cache)


@look_alike("rope.differs")
class QueryRotatedByOtherAxes(Prologue):
    def forward(self, x, positions, slots, k_cache, v_cache):
        q, k, v = self.split(self.project(x))
        cos, sin = self.angles(positions)
        k = self.rotate(self.norm(k, self.k_weight), cos, sin)
        q = self.rotate(self.norm(q, self.q_weight), sin, cos)
        self.store(k_cache, slots, k)
        self.store(v_cache, slots, v)
        return self.consume(q, k, v, k_cache, v_cache)


@look_alike("split.v_not_copied")
class ValueRotatedToo(Prologue):
    def forward(self, x, positions, slots, k_cache, v_cache):
        q, k, v = self.split(self.project(x))
        cos, sin = self.angles(positions)
        q, k = self.rotate(self.norm(q, self.q_weight), cos, sin), self.rotate(self.norm(k, self.k_weight), cos, sin)
        self.store(k_cache, slots, k)
        self.store(v_cache, slots, self.rotate(self.norm(v, self.k_weight), cos, sin))
        return self.consume(q, k, v, k_cache, v_cache)


@look_alike("proof.not_analytic")
class ClampAfterTheNorm(Prologue):
    """Random data never reaches the bound."""

    def norm(self, x, weight):
        return super().norm(x, weight).clamp(-1e4, 1e4)


@look_alike("proof.not_analytic")
class ClampAfterTheRotation(Prologue):
    def rotate(self, x, cos, sin):
        return super().rotate(x, cos, sin).clamp(-1e4, 1e4)


@look_alike("proof.not_analytic")
class ClampSpelledWithARoot(Prologue):
    """min(x, 1e4) = (x + 1e4 - |x - 1e4|) / 2, and |y| = sqrt(y²): every op is analytic, the function is not."""

    def norm(self, x, weight):
        y = super().norm(x, weight)
        return (y + 1e4 - (y - 1e4).square().sqrt()) / 2


@look_alike("proof.not_analytic")
class NanToNum(Prologue):
    def norm(self, x, weight):
        return super().norm(x, weight).nan_to_num()


@look_alike("proof.rounding")
class KeyFakeQuantised(Prologue):
    def norm(self, x, weight):
        return (super().norm(x, weight).bfloat16() * 2).float()


@look_alike("region.escapes")
class NormalisedKeyEscapes(Prologue):
    def forward(self, x, positions, slots, k_cache, v_cache):
        q, k, v = self.split(self.project(x))
        cos, sin = self.angles(positions)
        normalised = self.norm(k, self.k_weight)
        self.store(k_cache, slots, self.rotate(normalised, cos, sin))
        self.store(v_cache, slots, v)
        return self.rotate(self.norm(q, self.q_weight), cos, sin), normalised * 2


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_declined(name):
    cls, code = LOOK_ALIKES[name]
    report = assert_declines(cls(), arguments(), code=code)
    layer = next(layer for layer in report.declined if layer.code == code)
    assert layer.reason
    assert ".py:" in (layer.source or "")


def test_norm_over_the_projection_says_what_was_measured():
    report = assert_declines(NormOverTheProjection(), arguments(), code="norm.not_per_head")
    assert f"reaches {NUM_KV_HEADS * HEAD_DIM} results, head_dim is {HEAD_DIM}" in str(report)


class LayerNormWrittenOut(Prologue):
    """Centring is left outside; the rest is an RMSNorm."""

    def norm(self, x, weight):
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS) * weight


class HeadsUnevenlySpaced(Prologue):
    def split(self, qkv):
        heads = qkv.view(qkv.shape[0], -1, HEAD_DIM)
        q = torch.cat([heads[:, :3], heads[:, 4:5]], 1)
        return q, torch.cat([heads[:, 3:4], heads[:, 5:6]], 1), heads[:, 6:]


class ValueFakeQuantised(Prologue):
    def forward(self, x, positions, slots, k_cache, v_cache):
        self.stores = 0
        return super().forward(x, positions, slots, k_cache, v_cache)

    def store(self, cache, slots, value):
        self.stores += 1
        super().store(cache, slots, (value.bfloat16() * 2).float() if self.stores == 2 else value)


class ClampBeforeTheNorm(Prologue):
    def project(self, x):
        return super().project(x).clamp(-0.1, 0.1)


class ValueScaled(Prologue):
    def split(self, qkv):
        q, k, v = super().split(qkv)
        return q, k, v * 1.5


class ValueClamped(Prologue):
    def split(self, qkv):
        q, k, v = super().split(qkv)
        return q, k, v.clamp(-0.2, 0.2)


class PositionsClamped(Prologue):
    def angles(self, positions):
        return super().angles(positions.clamp(3, 20))


@pytest.mark.parametrize(
    "cls",
    [
        HeadsUnevenlySpaced,
        ValueFakeQuantised,
        LayerNormWrittenOut,
        ClampBeforeTheNorm,
        ValueScaled,
        ValueClamped,
        PositionsClamped,
    ],
    ids=lambda cls: cls.__name__,
)
def test_odd_step_stays_outside(cls):
    assert_fuses(cls(), arguments(), count=1)


def test_graph_without_a_store():
    class Mlp(nn.Module):
        def forward(self, x):
            return F.silu(x) * 2

    assert_declines(Mlp(), (torch.randn(3, 4),), code="store.missing")
