"""The same prologue in other words: each must fuse, and what is read off must be the same."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from prologue import EPS, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, SECTION, SLOTS, Prologue, arguments
from torch import nn

from fx_fusion.testing import assert_fuses

SPELLINGS: dict[str, type[Prologue]] = {}


def spelling(cls: type[Prologue]) -> type[Prologue]:
    SPELLINGS[cls.__name__] = cls
    return cls


@spelling
class Plain(Prologue):
    pass


@spelling
class SplitBySlices(Prologue):
    def split(self, qkv):
        ends = (0, NUM_HEADS * HEAD_DIM, (NUM_HEADS + NUM_KV_HEADS) * HEAD_DIM, qkv.shape[-1])
        return tuple(qkv[:, a:b].reshape(qkv.shape[0], -1, HEAD_DIM) for a, b in itertools.pairwise(ends))


@spelling
class SplitOverHeads(Prologue):
    def split(self, qkv):
        return qkv.view(qkv.shape[0], -1, HEAD_DIM).split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], 1)


@spelling
class OrderVKQ(Prologue):
    def split(self, qkv):
        v, k, q = qkv.view(qkv.shape[0], -1, HEAD_DIM).split([NUM_KV_HEADS, NUM_KV_HEADS, NUM_HEADS], 1)
        return q, k, v


@spelling
class QueriesInGroups(Prologue):
    """InternLM2, Falcon: behind the queries of a group lie their key and value. The queries' copy stays outside."""

    def split(self, qkv):
        groups = qkv.view(qkv.shape[0], NUM_KV_HEADS, -1, HEAD_DIM)
        return groups[:, :, :-2].flatten(1, 2), groups[:, :, -2], groups[:, :, -1]


@spelling
class QueriesInGroupsBySizes(Prologue):
    """Megatron"""

    def split(self, qkv):
        sizes = [NUM_HEADS // NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, HEAD_DIM]
        q, k, v = qkv.view(qkv.shape[0], NUM_KV_HEADS, -1).split(sizes, -1)
        return q.reshape(qkv.shape[0], -1, HEAD_DIM), k, v


@spelling
class Bias(Prologue):
    def __init__(self, dtype=torch.float32):
        super().__init__(dtype)
        self.bias = nn.Parameter(torch.randn(self.qkv_proj.out_features, dtype=dtype))

    def project(self, x):
        return self.qkv_proj(x) + self.bias


@spelling
class Dequantised(Prologue):
    def __init__(self, dtype=torch.float32):
        super().__init__(dtype)
        self.scale = nn.Parameter(torch.rand(self.qkv_proj.out_features, dtype=dtype))

    def project(self, x):
        return self.qkv_proj(x) * self.scale


@spelling
class Padded(Prologue):
    """As Inductor pads a matrix product on a GPU, where its benchmark finds that faster."""

    def project(self, x):
        return super().project(F.pad(x, (0, 0, 0, 3)))[: x.shape[0]]


@spelling
class LoRA(Prologue):
    def __init__(self, dtype=torch.float32):
        super().__init__(dtype)
        self.down = nn.Linear(self.qkv_proj.in_features, 4, bias=False, dtype=dtype)
        self.up = nn.Linear(4, self.qkv_proj.out_features, bias=False, dtype=dtype)

    def project(self, x):
        return self.qkv_proj(x) + 0.5 * self.up(self.down(x))


@spelling
class NormByFunctional(Prologue):
    def norm(self, x, weight):
        return F.rms_norm(x, (HEAD_DIM,), weight, EPS)


@spelling
class NormBySquareRootAndDivision(Prologue):
    def norm(self, x, weight):
        y = x.float()
        return (y / torch.sqrt((y * y).sum(-1, keepdim=True) / HEAD_DIM + EPS) * weight.float()).to(x.dtype)


@spelling
class NormGemma(Prologue):
    def norm(self, x, weight):
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS) * (1.0 + weight.float())).to(x.dtype)


@spelling
class NormOnFlatHeads(Prologue):
    def norm(self, x, weight):
        return super().norm(x.reshape(-1, HEAD_DIM), weight).view(x.shape)


@spelling
class NoNorm(Prologue):
    def norm(self, x, weight):
        return x


@spelling
class NormWithoutWeight(Prologue):
    def norm(self, x, weight):
        return super().norm(x, torch.ones_like(weight))


@spelling
class RotateHalf(Prologue):
    def rotate(self, x, cos, sin):
        a, b = x.chunk(2, -1)
        return x * torch.cat([cos, cos], -1) + torch.cat([-b, a], -1) * torch.cat([sin, sin], -1)


@spelling
class RotateByRoll(Prologue):
    def rotate(self, x, cos, sin):
        return x * torch.cat([cos, cos], -1) + x.roll(HEAD_DIM // 2, -1) * torch.cat([-sin, sin], -1)


@spelling
class RotateByAddcmul(Prologue):
    def rotate(self, x, cos, sin):
        a, b = x.chunk(2, -1)
        return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)], -1)


@spelling
class RotateByAddcmulInPlace(Prologue):
    """ComfyUI's text encoders; Dynamo makes a fused multiply-add of it."""

    def rotate(self, x, cos, sin):
        half = HEAD_DIM // 2
        y = x * torch.cat([cos, cos], -1)
        y[..., :half].addcmul_(x[..., half:], sin, value=-1)
        y[..., half:].addcmul_(x[..., :half], sin)
        return y


@spelling
class RotateInPlace(Prologue):
    def rotate(self, x, cos, sin):
        y = x.clone()
        y[..., : HEAD_DIM // 2] = x[..., : HEAD_DIM // 2] * cos - x[..., HEAD_DIM // 2 :] * sin
        y[..., HEAD_DIM // 2 :] = x[..., HEAD_DIM // 2 :] * cos + x[..., : HEAD_DIM // 2] * sin
        return y


@spelling
class GptJ(Prologue):
    def rotate(self, x, cos, sin):
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


@spelling
class PartialRotary(Prologue):
    def rotate(self, x, cos, sin):
        half = HEAD_DIM // 2
        return torch.cat(
            [super().rotate(x[..., :half], cos[..., : half // 2], sin[..., : half // 2]), x[..., half:]], -1
        )


@spelling
class AnglesOneDimensional(Prologue):
    def angles(self, positions):
        return tuple(part.unsqueeze(1) for part in self.cos_sin_cache[positions[0]].chunk(2, -1))


@spelling
class AnglesSectioned(Prologue):
    def interleave(self, x):
        return torch.cat([part[axis] for axis, part in enumerate(x.split(list(SECTION), -1))], -1)


@spelling
class AnglesByWhere(Prologue):
    def interleave(self, x):
        lane = torch.arange(HEAD_DIM // 2)
        height, width = (lane % 3 == 1) & (lane < SECTION[1] * 3), (lane % 3 == 2) & (lane < SECTION[2] * 3)
        return torch.where(height, x[1], torch.where(width, x[2], x[0]))


@spelling
class AnglesComputed(Prologue):
    def angles(self, positions):
        frequencies = positions[0].float()[:, None] * 100.0 ** (-torch.arange(0, 1, 2 / HEAD_DIM))
        dtype = self.cos_sin_cache.dtype
        return frequencies.cos().to(dtype).unsqueeze(1), frequencies.sin().to(dtype).unsqueeze(1)


@spelling
class AnglesOfTwoAxes(Prologue):
    """Cosine of one axis, sine of another: no single lookup, so the rows stay operands."""

    def angles(self, positions):
        cos, _ = self.cos_sin_cache[positions[0]].chunk(2, -1)
        _, sin = self.cos_sin_cache[positions[1]].chunk(2, -1)
        return cos.unsqueeze(1), sin.unsqueeze(1)


@spelling
class AnglesPartlyConstant(Prologue):
    """The first pair never turns: its angles are literals, in no table."""

    def angles(self, positions):
        cos, sin = super().angles(positions)
        turns = torch.arange(HEAD_DIM // 2) > 0
        one, zero = torch.ones((), dtype=cos.dtype), torch.zeros((), dtype=cos.dtype)
        return torch.where(turns, cos, one), torch.where(turns, sin, zero)


@spelling
class AnglesByModuloPositions(Prologue):
    """The odd step stays outside the call: positions are taken after it."""

    def angles(self, positions):
        return super().angles(positions % 7)


@spelling
class SlotsModulo(Prologue):
    """A ring buffer: slots are taken after the modulo."""

    def store(self, cache, slots, value):
        super().store(cache, slots * 5 % SLOTS, value)


@spelling
class QueryScaled(Prologue):
    def consume(self, q, k, v, k_cache, v_cache):
        return self.o_proj((q * 0.25).flatten(1))


@spelling
class KeyReturned(Prologue):
    def consume(self, q, k, v, k_cache, v_cache):
        return super().consume(q, k, v, k_cache, v_cache), k.clone(), v.clone()


@spelling
class FreshAttention(Prologue):
    """Prefill attention on the fresh key and value."""

    def consume(self, q, k, v, k_cache, v_cache):
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.squeeze(0).transpose(0, 1).flatten(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_fuses(name, dtype):
    report = assert_fuses(SPELLINGS[name](dtype), arguments(dtype=dtype), count=1)
    read = report.fused[0].reading
    assert (read["num_heads"], read["num_kv_heads"], read["head_dim"]) == (NUM_HEADS, NUM_KV_HEADS, HEAD_DIM)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_literal_is_never_taken_for_an_element_of_the_table(tokens):
    report = assert_fuses(AnglesPartlyConstant(), arguments(tokens), count=1)
    assert report.fused[0].reading["angles"] == "rows"


@pytest.mark.parametrize("tokens", [1, 2, 4, 13])
def test_fuses_at_any_number_of_tokens(tokens):
    assert_fuses(Prologue(), arguments(tokens), count=1)


def read_of(name):
    return assert_fuses(SPELLINGS[name](), arguments(), count=1).fused[0].reading


def test_reads_mrope():
    read = read_of("Plain")
    assert read["mrope_section"] == list(SECTION)
    assert read["mrope_interleaved"] is True
    assert read["angles"] == "table"
    assert read["projection"] == "packed"


def test_reads_sections():
    assert read_of("AnglesSectioned")["mrope_interleaved"] is False


def test_keeps_rows_that_no_table_holds():
    assert read_of("AnglesComputed")["angles"] == "rows"
    assert read_of("AnglesOfTwoAxes")["angles"] == "rows"


def test_reads_gemma_and_eps():
    assert read_of("NormGemma")["norm"] == {"q_eps": EPS, "k_eps": EPS, "gemma": True}


def test_reads_no_norm():
    assert read_of("NoNorm")["norm"] is None


def test_reads_partial_rotary():
    assert read_of("PartialRotary")["rotary_dim"] == HEAD_DIM // 2


def test_reads_gpt_j():
    assert read_of("GptJ")["rope"] == "gpt-j"


def test_asks_for_fresh_keys_only_where_they_are_used():
    assert read_of("KeyReturned")["return_k"] is True
    assert read_of("FreshAttention")["return_k"] is True
    assert read_of("Plain")["return_k"] is False


class TwoLayersOfOneTable(torch.nn.Module):
    """Two layers alike in all but the columns of the table that they take: equal layers are measured once, these two
    are not equal.
    """

    class Layer(Prologue):
        def __init__(self, offset):
            super().__init__()
            self.offset = offset

        def angles(self, positions):
            rows = self.cos_sin_cache[positions[0]][:, self.offset : self.offset + HEAD_DIM]
            return tuple(part.unsqueeze(1) for part in rows.chunk(2, -1))

    def __init__(self):
        super().__init__()
        self.first, self.second = self.Layer(0), self.Layer(HEAD_DIM)
        wide = torch.rand(40, 2 * HEAD_DIM)
        self.first.cos_sin_cache = self.second.cos_sin_cache = wide

    def forward(self, x, positions, slots, k_cache, v_cache, k_cache_2, v_cache_2):
        x = x + self.first(x, positions, slots, k_cache, v_cache)
        return x + self.second(x, positions, slots, k_cache_2, v_cache_2)


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_layers_that_differ_in_an_offset(inner):
    model, args = TwoLayersOfOneTable(), (*arguments(), *arguments()[3:])
    assert_fuses(model, args, count=2, inner=inner)


@pytest.mark.parametrize("normalised", ["query", "key"])
def test_a_norm_on_one_of_query_and_key_is_reported(normalised):
    class One(Prologue):
        def norm(self, x, weight):
            return super().norm(x, weight) if (weight is self.q_weight) == (normalised == "query") else x

    report = assert_fuses(One(), arguments(), count=1)
    assert {"query": "of q eps 1e-06, of k none", "key": "of q none, of k eps 1e-06"}[normalised] in str(report)
