"""What only looks like the prologue is declined by name; an odd step that can stay outside the call is left there."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from prologue import EPS, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, SLOTS, Prologue, arguments
from torch import nn

from fx_fusion.testing import assert_declines, assert_fuses

LOOK_ALIKES: dict[str, tuple[type[Prologue], str, str, str]] = {}


def look_alike(code: str, says: str, stage: str):
    """Declined with `code`; the reason matches the pattern `says`; the pass came as far as `stage`."""

    def add(cls: type[Prologue]) -> type[Prologue]:
        LOOK_ALIKES[cls.__name__] = (cls, code, says, stage)
        return cls

    return add


@look_alike("split.columns", "token 0 reads no column of the projection, token 2 columns 64..127", "key, split")
class TokensMixed(Prologue):
    """The projection is cut as one long row: what token 1 gets are other columns than token 0's."""

    def split(self, qkv):
        tokens, parts = qkv.shape[0], []
        for part in qkv.flatten().split([tokens * n * HEAD_DIM for n in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)]):
            parts.append(part.view(tokens, -1, HEAD_DIM))
        return tuple(parts)


@look_alike("norm.not_per_head", "reaches 32 results, head_dim is 16", "key, norm")
class NormOverTheProjection(Prologue):
    """OLMo2, MiniMax"""

    def __init__(self, dtype=torch.float32):
        super().__init__(dtype)
        self.q_weight = nn.Parameter(torch.rand(NUM_HEADS * HEAD_DIM))
        self.k_weight = nn.Parameter(torch.rand(NUM_KV_HEADS * HEAD_DIM))

    def norm(self, x, weight):
        return super().norm(x.flatten(1), weight).view(x.shape)


@look_alike("norm.not_rms", "var_mean.* subtracts the mean", "key")
class LayerNorm(Prologue):
    def norm(self, x, weight):
        return F.layer_norm(x, (HEAD_DIM,), weight, None, EPS)


@look_alike(
    "norm.eps",
    r"multiplies the result by 1\.99.*, expected 2: eps is not added under the root",
    "key, norm",
)
class EpsOutsideTheRoot(Prologue):
    def norm(self, x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + EPS) * weight


@look_alike("norm.eps", "for zero input the result is no number: expected a positive eps", "key, norm")
class NoEps(Prologue):
    def norm(self, x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * weight


@look_alike("norm.eps_is_input", "comes from the graph input .* expected a literal.*mark_dynamic", "key, operands")
class EpsInABuffer(Prologue):
    def __init__(self, dtype=torch.float32):
        super().__init__(dtype)
        self.register_buffer("eps", torch.tensor(EPS))

    def norm(self, x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * weight


@look_alike("rope.missing", "between cat_1 and mul_11 no lane", "key, rotation")
class NormAfterTheRotation(Prologue):
    def forward(self, x, positions, slots, k_cache, v_cache):
        q, k, v = self.split(self.project(x))
        cos, sin = self.angles(positions)
        q = self.norm(self.rotate(q, cos, sin), self.q_weight)
        k = self.norm(self.rotate(k, cos, sin), self.k_weight)
        self.store(k_cache, slots, k)
        self.store(v_cache, slots, v)
        return self.consume(q, k, v, k_cache, v_cache)


@look_alike(
    "rope.not_a_rotation",
    "the sine of a lane measures .* which has its negative",
    "key, rotation",
)
class SineNegatedInOneHalf(Prologue):
    def rotate(self, x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos + b * sin, b * cos + a * sin], -1)


@look_alike("rope.not_a_rotation", "lane 0 with lane 15; expected partners 8 apart", "key, rotation")
class LanesPermuted(Prologue):
    def rotate(self, x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b.flip(-1) * sin, b * cos + a * sin], -1)


@look_alike("rope.not_a_rotation", r"the cosine of a lane measures \d.* expected an element of", "key, rotation")
class CosineSquared(Prologue):
    def rotate(self, x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos * cos - b * sin, b * cos + a * sin], -1)


@look_alike(
    "rope.not_a_rotation",
    "the cosines of a head measure 0.25 times elements of .*: the head is scaled",
    "query, rotation",
)
class QueryScaledBeforeTheRotation(Prologue):
    """The softmax's scale: after the rotation it would stay outside."""

    def norm(self, x, weight):
        return super().norm(x, weight) * (0.25 if weight is self.q_weight else 1.0)


@look_alike("rope.not_a_rotation", "the sine of a lane measures", "key, rotation")
class TurnedBackTooFar(Prologue):
    """ComfyUI's spelling, by a fused multiply-add, with a factor that is not quite -1."""

    def rotate(self, x, cos, sin):
        half = HEAD_DIM // 2
        y = x * torch.cat([cos, cos], -1)
        y[..., :half].addcmul_(x[..., half:], sin, value=-1.01)
        y[..., half:].addcmul_(x[..., :half], sin)
        return y


@look_alike(
    "rope.missing", "both fed by 0 tensors besides their data, bmm.* and mm; .* after the last matrix product", "stores"
)
class RotatedByAMatrixProduct(Prologue):
    """What a matrix product gives counts as a projection."""

    def rotate(self, x, cos, sin):
        turn = torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))
        return (turn @ x.unflatten(-1, (-1, 2, 1))).flatten(-3)


@look_alike("rope.missing", "between mm and mul_3 no lane", "key, rotation")
class NoRotation(Prologue):
    def rotate(self, x, cos, sin):
        return x


@look_alike("rope.query_missing", "no other value is rotated by the angles that rotate", "query")
class QueryNotRotated(Prologue):
    def forward(self, x, positions, slots, k_cache, v_cache):
        q, k, v = self.split(self.project(x))
        k = self.rotate(self.norm(k, self.k_weight), *self.angles(positions))
        self.store(k_cache, slots, k)
        self.store(v_cache, slots, v)
        return self.consume(self.norm(q, self.q_weight), k, v, k_cache, v_cache)


@look_alike("rope.differs", "the query is rotated neox over 16 lanes by columns 0:8:1 of .*, the key neox", "query")
class QueryRotatedByOtherAxes(Prologue):
    def forward(self, x, positions, slots, k_cache, v_cache):
        q, k, v = self.split(self.project(x))
        cos, sin = self.angles(positions)
        k = self.rotate(self.norm(k, self.k_weight), cos, sin)
        q = self.rotate(self.norm(q, self.q_weight), sin, cos)
        self.store(k_cache, slots, k)
        self.store(v_cache, slots, v)
        return self.consume(q, k, v, k_cache, v_cache)


@look_alike("split.v_not_copied", "both fed by 4 tensors", "stores")
class ValueRotatedToo(Prologue):
    def forward(self, x, positions, slots, k_cache, v_cache):
        q, k, v = self.split(self.project(x))
        cos, sin = self.angles(positions)
        q, k = self.rotate(self.norm(q, self.q_weight), cos, sin), self.rotate(self.norm(k, self.k_weight), cos, sin)
        self.store(k_cache, slots, k)
        self.store(v_cache, slots, self.rotate(self.norm(v, self.k_weight), cos, sin))
        return self.consume(q, k, v, k_cache, v_cache)


@look_alike("proof.not_analytic", "clamp_max", "key")
class ClampAfterTheNorm(Prologue):
    """Random data never reaches the bound."""

    def norm(self, x, weight):
        return super().norm(x, weight).clamp(-1e4, 1e4)


@look_alike("proof.not_analytic", "clamp_max", "key")
class ClampAfterTheRotation(Prologue):
    def rotate(self, x, cos, sin):
        return super().rotate(x, cos, sin).clamp(-1e4, 1e4)


@look_alike("proof.not_analytic", "a root of something that is not a sum over lanes", "key, norm")
class ClampSpelledWithARoot(Prologue):
    """min(x, 1e4) = (x + 1e4 - |x - 1e4|) / 2, and |y| = sqrt(y²): every op is analytic, the function is not."""

    def norm(self, x, weight):
        y = super().norm(x, weight)
        return (y + 1e4 - (y - 1e4).square().sqrt()) / 2


@look_alike("proof.not_analytic", "stands between the projection and", "key")
class NanToNum(Prologue):
    def norm(self, x, weight):
        return super().norm(x, weight).nan_to_num()


@look_alike("proof.rounding", "torch.bfloat16, coarser than the projection's torch.float32", "key, certificate")
class KeyFakeQuantised(Prologue):
    def norm(self, x, weight):
        return (super().norm(x, weight).bfloat16() * 2).float()


@look_alike("region.escapes", "lies between the projection and cat, and .* uses it too", "key")
class NormalisedKeyEscapes(Prologue):
    def forward(self, x, positions, slots, k_cache, v_cache):
        q, k, v = self.split(self.project(x))
        cos, sin = self.angles(positions)
        normalised = self.norm(k, self.k_weight)
        self.store(k_cache, slots, self.rotate(normalised, cos, sin))
        self.store(v_cache, slots, v)
        return self.rotate(self.norm(q, self.q_weight), cos, sin), normalised * 2


class Steps(Prologue):
    """Its steps after the split in one place, for those who change their order."""

    def forward(self, x, positions, slots, k_cache, v_cache):
        q, k, v = self.split(self.project(x))
        return self.steps(q, k, v, positions, slots, k_cache, v_cache)

    def finish(self, q, k, v, slots, k_cache, v_cache):
        self.store(k_cache, slots, k)
        self.store(v_cache, slots, v)
        return self.consume(q, k, v, k_cache, v_cache)

    def turned(self, x, weight, positions):
        return self.rotate(self.norm(x, weight), *self.angles(positions))


@look_alike("rope.differs", "neox over 16 lanes .* the key neox over 8 lanes", "query")
class UnequalWidths(Steps):
    """The query turns whole, the key by half."""

    def steps(self, q, k, v, positions, slots, k_cache, v_cache):
        half = HEAD_DIM // 2
        cos, sin = (rows[..., : half // 2] for rows in self.angles(positions))
        k = self.norm(k, self.k_weight)
        k = torch.cat([self.rotate(k[..., :half], cos, sin), k[..., half:]], -1)
        return self.finish(self.turned(q, self.q_weight, positions), k, v, slots, k_cache, v_cache)


@look_alike("rope.not_a_rotation", "lane 0 with lane 1; expected partners 8 apart", "key, rotation")
class PairsLeaveAsHalves(Prologue):
    """GPT-J's pairs, laid out as halves: a permutation of the lanes."""

    def rotate(self, x, cos, sin):
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@look_alike("rope.differs", "the key neox over 16 lanes by columns 0:8:1 of rev", "query")
class CosineOfAnotherTokenInTheKey(Steps):
    def steps(self, q, k, v, positions, slots, k_cache, v_cache):
        cos, sin = self.angles(positions)
        k = self.rotate(self.norm(k, self.k_weight), cos.flip(0), sin)
        return self.finish(self.turned(q, self.q_weight, positions), k, v, slots, k_cache, v_cache)


@look_alike("rope.query_missing", "no other value is rotated by the angles that rotate", "query")
class TimeAndHeightSwappedInTheQuery(Steps):
    def steps(self, q, k, v, positions, slots, k_cache, v_cache):
        q = self.turned(q, self.q_weight, torch.stack([positions[1], positions[0], positions[2]]))
        return self.finish(q, self.turned(k, self.k_weight, positions), v, slots, k_cache, v_cache)


@look_alike("rope.missing", "between mm and mul_1 no lane", "key, rotation")
class KeyStoredBeforeTheRotation(Steps):
    def steps(self, q, k, v, positions, slots, k_cache, v_cache):
        k = self.norm(k, self.k_weight)
        self.store(k_cache, slots, k)
        self.store(v_cache, slots, v)
        return self.turned(q, self.q_weight, positions).sum(), self.rotate(k, *self.angles(positions))


@look_alike("norm.offset", "for zero input the result is up to 1, expected 0", "key, norm")
class KeyChangedInPlaceBeforeTheStore(Steps):
    """What attention reads and what is stored differ."""

    def steps(self, q, k, v, positions, slots, k_cache, v_cache):
        k = self.turned(k, self.k_weight, positions)
        seen = k.clone()
        k.add_(1.0)
        return self.finish(self.turned(q, self.q_weight, positions), k, v, slots, k_cache, v_cache), seen


@look_alike("proof.not_analytic", "clamp_max", "key")
class ClampBeforeAndAfterTheNorm(Prologue):
    def norm(self, x, weight):
        return super().norm(x.clamp(-100, 100), weight).clamp(-8, 8)


@look_alike("proof.not_analytic", "selects values on the data path and depends on a graph input", "key, operands")
class RotatedOnlyAtSomePositions(Steps):
    def steps(self, q, k, v, positions, slots, k_cache, v_cache):
        later = (positions[0] > 3)[:, None, None]
        q, k = self.norm(q, self.q_weight), self.norm(k, self.k_weight)
        q, k = (torch.where(later, self.rotate(x, *self.angles(positions)), x) for x in (q, k))
        return self.finish(q, k, v, slots, k_cache, v_cache)


@look_alike("norm.offset", "for zero input the result is up to 0.00.*, expected 0", "key, norm")
class AddedAfterTheNorm(Prologue):
    def norm(self, x, weight):
        return super().norm(x, weight) + 1e-3


@look_alike("norm.offset", "for zero input the result is up to 0.001, expected 0", "key, norm")
class AddedAfterTheRotation(Prologue):
    def rotate(self, x, cos, sin):
        return super().rotate(x, cos, sin) + 1e-3


@look_alike("norm.eps", "measures 6.250e-08 .* expected one number of", "key, norm")
class SumInsteadOfMean(Prologue):
    def norm(self, x, weight):
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS) * weight


@look_alike("norm.not_rms", "doubling large input neither", "key, norm")
class RootCubed(Prologue):
    def norm(self, x, weight):
        return x * (x.pow(2).mean(-1, keepdim=True) + EPS).pow(-1.5) * weight


@look_alike("norm.weight", "holds 2 rows of 16, one a head", "key, rotation")
class WeightOfEachHead(Prologue):
    def __init__(self, dtype=torch.float32):
        super().__init__(dtype)
        self.q_weight = nn.Parameter(torch.rand(NUM_HEADS, HEAD_DIM))
        self.k_weight = nn.Parameter(torch.rand(NUM_KV_HEADS, HEAD_DIM))


@look_alike("store.scale_inverted", "multiplies by the scale", "key's store")
class ScaledAfterTheRotation(Prologue):
    def rotate(self, x, cos, sin):
        return super().rotate(x, cos, sin) * 1.5


@look_alike("rope.not_a_rotation", "the cosine of a lane measures", "key, rotation")
class RotatedTwice(Prologue):
    def rotate(self, x, cos, sin):
        return super().rotate(super().rotate(x, cos, sin), cos, sin)


@look_alike("rope.rows", "heads of one token are rotated by different angles", "key, rotation")
class HeadsRotatedDifferently(Prologue):
    def rotate(self, x, cos, sin):
        factor = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        return super().rotate(x, cos * factor, sin * factor)


@look_alike("split.columns", "not heads of 16 consecutive columns at a constant distance", "key, split")
class LanesOfQueryKeyAndValueTakeTurns(Prologue):
    def split(self, qkv):
        q, rest = qkv.split([NUM_HEADS * HEAD_DIM, 2 * NUM_KV_HEADS * HEAD_DIM], -1)
        return q.unflatten(-1, (-1, HEAD_DIM)), *rest.unflatten(-1, (NUM_KV_HEADS, HEAD_DIM, 2)).unbind(-1)


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_declined(name):
    cls, code, says, stage = LOOK_ALIKES[name]
    report = assert_declines(cls(), arguments(), code=code)
    (layer,) = report.declined
    assert re.search(says, layer.reason)
    assert layer.stage == stage
    assert layer.node
    assert re.search(r"tests/(patterns/test_look_alikes|prologue)\.py:\d+$", layer.source)


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


class AnglesWhereOnPositions(Prologue):
    def angles(self, positions):
        cos, sin = super().angles(positions)
        later = (positions[0] > 3)[:, None, None]
        return torch.where(later, cos, 1.0), torch.where(later, sin, 0.0)


class SlotsClamped(Prologue):
    def store(self, cache, slots, value):
        super().store(cache, slots.clamp(0, SLOTS - 1), value)


class SineNegated(Prologue):
    """Turns the other way: by the negated sines, which are rows of their own."""

    def rotate(self, x, cos, sin):
        return super().rotate(x, cos, -sin)


class ValueBiased(Prologue):
    def split(self, qkv):
        q, k, v = super().split(qkv)
        return q, k, v + torch.arange(HEAD_DIM)


class ValueChangedInPlace(Prologue):
    def split(self, qkv):
        q, k, v = super().split(qkv)
        self.seen = v.sum()
        v.add_(1.0)
        return q, k, v

    def consume(self, *tensors):
        return super().consume(*tensors), self.seen


class ClampOfEachHead(Prologue):
    """Between the split and the norm."""

    def norm(self, x, weight):
        return super().norm(x.clamp(-0.1, 0.1), weight)


class AnglesScaled(Prologue):
    """YaRN"""

    def angles(self, positions):
        return tuple(1.2 * rows for rows in super().angles(positions))


class WeightSquared(Prologue):
    def norm(self, x, weight):
        return super().norm(x, weight * weight)


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
        AnglesWhereOnPositions,
        SlotsClamped,
        SineNegated,
        ValueBiased,
        ValueChangedInPlace,
        ClampOfEachHead,
        AnglesScaled,
        WeightSquared,
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
