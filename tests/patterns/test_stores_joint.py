"""One store of both: keys and values joined, and stored at once into one tensor."""

from __future__ import annotations

import re

import pytest
import torch
from prologue import HEAD_DIM, HIDDEN, NUM_HEADS, NUM_KV_HEADS, SLOTS, Joint, Prologue, arguments
from torch import nn

from fx_fusion.config import Config
from fx_fusion.reporting.anatomy import Recorder
from fx_fusion.testing import assert_declines, assert_fuses, run
from fx_fusion.trace import explain_to

BLOCK = 8


def given(model, tokens=5, dtype=torch.float32):
    return *arguments(tokens, dtype)[:3], torch.randn(model.shape, dtype=dtype)


class ValuesFirst(Joint):
    def join(self, k, v):
        return torch.stack([v, k], 1)


class OverHeads(Joint):
    """[slots, 2 * Hk, D]"""

    shape = (SLOTS, 2 * NUM_KV_HEADS, HEAD_DIM)

    def join(self, k, v):
        return torch.cat([k, v], 1)


class HeadsTakeTurns(OverHeads):
    """A key head, its value head, the next key head"""

    def join(self, k, v):
        return torch.stack([k, v], 2).flatten(1, 2)


class OverLanes(Joint):
    """[slots, Hk, 2 * D]"""

    shape = (SLOTS, NUM_KV_HEADS, 2 * HEAD_DIM)

    def join(self, k, v):
        return torch.cat([k, v], -1)


class LanesTakeTurns(OverLanes):
    def join(self, k, v):
        return torch.stack([k, v], -1).flatten(-2)


class FirstAxis(Joint):
    """[2, slots, Hk, D]"""

    shape = (2, SLOTS, NUM_KV_HEADS, HEAD_DIM)

    def join(self, k, v):
        return torch.stack([k, v])

    def store(self, cache, slots, value):
        cache[:, slots] = value


class Rows(Joint):
    """[slots, 2 * Hk * D]"""

    shape = (SLOTS, 2 * NUM_KV_HEADS * HEAD_DIM)

    def join(self, k, v):
        return torch.cat([k.flatten(1), v.flatten(1)], -1)


class Paged(Joint):
    """[blocks, 2, block size, Hk, D]"""

    shape = (SLOTS // BLOCK, 2, BLOCK, NUM_KV_HEADS, HEAD_DIM)

    def store(self, cache, slots, value):
        cache[slots // BLOCK, :, slots % BLOCK] = value


class ByIndexCopy(Joint):
    def store(self, cache, slots, value):
        cache.index_copy_(0, slots, value)


class ByScatter(Joint):
    def store(self, cache, slots, value):
        cache.scatter_(0, slots[:, None, None, None].expand_as(value), value)


class Slice(FirstAxis):
    def store(self, cache, slots, value):
        cache[:, 7 : 7 + value.shape[1]] = value


class OfALayer(Joint):
    """[layers, slots, 2, Hk, D]"""

    shape = (3, *Joint.shape)

    def store(self, cache, slots, value):
        cache[1][slots] = value


class Masked(Joint):
    def store(self, cache, slots, value):
        cache[slots] = torch.where((slots >= 10)[:, None, None, None], value, cache[slots])


class NoNorm(OverLanes):
    """Like a head of which the first half turns, but for a layer without another store."""

    def norm(self, x, weight):
        return x


class JointlyReturned(Joint):
    """The joint value is needed besides."""

    def forward(self, x, positions, slots, kv_cache):
        self.seen = []
        return super().forward(x, positions, slots, kv_cache), self.seen[0]

    def store(self, cache, slots, value):
        self.seen.append(value[:, 0] * 2)
        super().store(cache, slots, value)


class ValuesAhead(Joint):
    """The projection's last columns are the query's."""

    def split(self, qkv):
        sizes = [NUM_KV_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM, NUM_HEADS * HEAD_DIM]
        v, k, q = (part.unflatten(-1, (-1, HEAD_DIM)) for part in qkv.split(sizes, -1))
        return q, k, v


class OneTokenFurther(Joint):
    """Each value is stored with the key of the token after it: the odd step stays outside."""

    def join(self, k, v):
        return torch.stack([k, v.roll(1, 0)], 1)


SPELLINGS = [
    Joint, ValuesFirst, OverHeads, HeadsTakeTurns, OverLanes, LanesTakeTurns, FirstAxis, Rows, Paged, ByIndexCopy,
    ByScatter, Slice, OfALayer, Masked, NoNorm, JointlyReturned, ValuesAhead, OneTokenFurther,
]  # fmt: skip


@pytest.mark.parametrize("model", SPELLINGS, ids=lambda cls: cls.__name__)
def test_fuses(model):
    dtype = torch.bfloat16 if SPELLINGS.index(model) % 2 else torch.float32
    report = assert_fuses(model(dtype), given(model, dtype=dtype), count=1)
    assert report.fused[0].reading["return_k"] is (model is JointlyReturned)


@pytest.mark.slow
@pytest.mark.parametrize("model", [OverHeads, Slice], ids=lambda cls: cls.__name__)
def test_fuses_at_any_number_of_tokens(model):
    args = given(model)
    for tensor, dim in zip(args, (0, 1, 0), strict=False):
        torch._dynamo.mark_dynamic(tensor, dim)
    assert_fuses(model(), args, count=1, dynamic=None)


class PerSequence(Joint):
    """x [B, S, hidden], cache [B, 2, Hk, S_max, D]"""

    shape = (2, 2, NUM_KV_HEADS, 32, HEAD_DIM)

    def split(self, qkv):
        parts = qkv.split([NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM], -1)
        return tuple(part.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for part in parts)

    def store(self, cache, slots, value):
        cache[:, :, :, slots] = value

    def consume(self, q, k, v, *caches):
        return self.o_proj(q.transpose(1, 2).flatten(2))


class FirstSequences(PerSequence):
    """[2, more sequences, Hk, S_max, D], in a slice"""

    shape = (2, 3, NUM_KV_HEADS, 32, HEAD_DIM)

    def join(self, k, v):
        return torch.stack([k, v])

    def store(self, cache, slots, value):
        cache[:, :2, :, 4 : 4 + value.shape[3]] = value


@pytest.mark.parametrize("model", [PerSequence, FirstSequences], ids=lambda cls: cls.__name__)
def test_caches_of_sequences(model):
    positions, slots = torch.randperm(40)[:30].view(3, 2, 5), torch.randperm(32)[:5]
    assert_fuses(model(), (torch.randn(2, 5, HIDDEN), positions, slots, torch.randn(model.shape)), count=1)


class Layers(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.layers = nn.ModuleList(cls() for _ in range(3))

    def forward(self, x, positions, slots, *caches):
        for layer, cache in zip(self.layers, caches, strict=True):
            x = x + layer(x, positions, slots, cache) + cache.mean()
        return x


@pytest.mark.parametrize("model", [OverHeads, NoNorm])
def test_layers_are_told_apart(model):
    caches = [torch.randn(model.shape) for _ in range(3)]
    assert_fuses(Layers(model), (*arguments()[:3], *caches), count=3)


def test_a_head_that_turns_in_part_is_no_joint_store():
    """cat([rotated, rest]) without a norm looks like cat([k, v]): the layer's other store tells that it is not."""

    class Partial(Prologue):
        def norm(self, x, weight):
            return x

        def rotate(self, x, cos, sin):
            d = x.shape[-1] // 2
            turned = super().rotate(x[..., :d], cos[..., : d // 2], sin[..., : d // 2])
            return torch.cat([turned, x[..., d:]], -1)

    class Two(Layers):
        def forward(self, x, positions, slots, *caches):
            for layer, pair in zip(self.layers, zip(caches[::2], caches[1::2], strict=True), strict=True):
                x = x + layer(x, positions, slots, *pair)
            return x

    caches = torch.randn(6, SLOTS, NUM_KV_HEADS, HEAD_DIM).unbind()
    report = assert_fuses(Two(Partial), (*arguments()[:3], *map(torch.clone, caches)), count=3)
    assert {layer.reading["rotary_dim"] for layer in report.fused} == {HEAD_DIM // 2}


def test_nothing_of_the_caches_size_is_allocated():
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    model = Joint()
    compiled = torch.compile(model, backend="fx_fusion", options={"fx_fusion.kernel": "reference"})
    args = given(Joint)
    eager = [arg.clone() for arg in args]
    with torch.no_grad():
        _, sources = run_and_get_code(compiled, *args)
        model(*eager)
    torch.testing.assert_close(args[3], eager[3])
    assert "qk_norm_rope_cache" in sources[-1]
    assert f"empty_strided_cpu({Joint.shape}" not in sources[-1]


# --- what is converted after it was joined ----------------------------------------------------------------------------


class Converted(Joint):
    def store(self, cache, slots, value):
        cache[slots] = value.to(cache.dtype)


class ConvertedBefore(Joint):
    def join(self, k, v):
        return torch.stack([k.half(), v.half()], 1)


class Scaled(Joint):
    def store(self, cache, slots, value):
        cache[slots] = (value / 0.3).clamp(-448, 448).to(cache.dtype)


class ScaledBefore(Joint):
    def join(self, k, v):
        return torch.stack([k / 0.3, v / 0.7], 1)

    def store(self, cache, slots, value):
        cache[slots] = value.clamp(-448, 448).to(cache.dtype)


@pytest.mark.parametrize(
    ("model", "dtype", "scales"),
    [
        (Converted, torch.float16, (None, None)),
        (ConvertedBefore, torch.float16, (None, None)),
        (Converted, torch.float8_e4m3fn, (None, None)),
        (Scaled, torch.float8_e4m3fn, (0.3, 0.3)),
        (ScaledBefore, torch.float8_e4m3fn, (0.3, 0.7)),
    ],
)
def test_caches_of_another_dtype(model, dtype, scales):
    args = *arguments()[:3], torch.zeros(Joint.shape).to(dtype)
    layer = model()
    outcome = run(layer, args)
    assert len(outcome.report.fused) == 1, str(outcome.report)
    facts = outcome.report.fused[0].reading
    assert (facts["k_scale"], facts["v_scale"], facts["cache_dtype"]) == (*scales, str(dtype))
    with torch.no_grad():
        layer(*args)
    bits = (
        each.view(torch.uint8 if dtype.itemsize == 1 else torch.int16).int() for each in (outcome.state[1][3], args[3])
    )
    keys, values = next(bits).sub(next(bits)).abs().amax((0, 2, 3)).tolist()
    assert values == 0 and keys <= 1


# --- what is declined -------------------------------------------------------------------------------------------------


class OtherSlots(Joint):
    """Values lie SLOTS rows further on."""

    shape = (2 * SLOTS, NUM_KV_HEADS, HEAD_DIM)

    def join(self, k, v):
        return torch.cat([k, v])

    def store(self, cache, slots, value):
        cache[torch.cat([slots, slots + SLOTS])] = value


class KeysTwice(Joint):
    def join(self, k, v):
        return torch.stack([k, k], 1)


class KeysTwiceOver(Joint):
    def join(self, k, v):
        return torch.stack([k, k.clone()], 1)


class Three(Joint):
    shape = (SLOTS, 3, NUM_KV_HEADS, HEAD_DIM)

    def join(self, k, v):
        return torch.stack([k, v, v * 2], 1)


class NeitherTurns(Joint):
    def rotate(self, x, cos, sin):
        return x

    def norm(self, x, weight):
        return x


class Accumulated(Joint):
    def store(self, cache, slots, value):
        cache.index_put_((slots,), value, accumulate=True)


class ScaledTogether(Joint):
    def join(self, k, v):
        return super().join(k, v) * 1.5


class ClampedTogether(Joint):
    def join(self, k, v):
        return super().join(k, v).clamp(-100, 100)


class ValueHeadsTurned(Joint):
    def join(self, k, v):
        return torch.stack([k, v.flip(1)], 1)


class MaskedOfEach(Joint):
    """Keys and values are masked differently."""

    def store(self, cache, slots, value):
        mask = torch.stack([slots >= 0, slots >= 10], 1)[..., None, None]
        cache[slots] = torch.where(mask, value, cache[slots])


class ReadBetween(Joint):
    """What the cache held is read after it was overwritten."""

    def forward(self, x, positions, slots, kv_cache):
        before = kv_cache.clone()
        return super().forward(x, positions, slots, kv_cache), before * 2


class UnevenPlaces(Joint):
    """Three key heads at places 0, 3 and 1 of six."""

    shape = (SLOTS, 6, HEAD_DIM)

    def split(self, qkv):
        q, k, v = qkv.split([NUM_HEADS * HEAD_DIM, 3 * HEAD_DIM, 3 * HEAD_DIM], -1)
        return tuple(part.unflatten(-1, (-1, HEAD_DIM)) for part in (q, k, v))

    def __init__(self, dtype=torch.float32):
        super().__init__(dtype)
        self.qkv_proj = nn.Linear(HIDDEN, (NUM_HEADS + 6) * HEAD_DIM, bias=False)

    def join(self, k, v):
        return torch.cat([k, v], 1).unflatten(1, (3, 2)).transpose(1, 2).flatten(1, 2)


@pytest.mark.parametrize(
    ("model", "code", "says"),
    [
        (OtherSlots, "store.index", "cat.* holds the places of keys and of values, one after the other"),
        (KeysTwice, "store.unpaired", "nor does it store a key and a value joined"),
        (KeysTwiceOver, "store.unpaired", "nor does it store a key and a value joined"),
        (Three, "store.unpaired", "nor does it store a key and a value joined"),
        (NeitherTurns, "rope.missing", "stores .* and .*, joined, none of which is rotated"),
        (Accumulated, "store.accumulates", "adds to the cache"),
        (ScaledTogether, "store.scale_inverted", "multiplies by the scale"),
        (ClampedTogether, "store.unpaired", "nor does it store a key and a value joined"),
        (ValueHeadsTurned, "store.layout", "dimension 2 of the cache view"),
        (MaskedOfEach, "store.mask", "does not hold one truth value per token"),
        (ReadBetween, "store.old_cache_read", "as it was before the store"),
        (UnevenPlaces, "store.layout", "expected keys and values at constant distances"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_declines(model, code, says):
    report = assert_declines(model(), given(model), code=code)
    (layer,) = report.declined
    assert re.search(says, layer.reason)
    assert re.search(r"tests/(patterns/test_stores_joint|prologue)\.py:\d+$", layer.source)


def test_explain_tells_the_parts_apart():
    recorder = Recorder()
    explain_to(recorder, Joint(), given(Joint), {}, Config(kernel="reference"))
    (layer,) = recorder.graphs[0].layers
    writer = next(step for step in layer.before if step.role == "store" and step.finding)
    assert (writer.branch, writer.finding) == (
        "",
        "stores k into [1, 64, 2, 16] and v into [1, 64, 2, 16] at slot slots",
    )
    assert {step.branch for step in layer.before if step.role in ("norm", "rope")} == {"q", "k"}
