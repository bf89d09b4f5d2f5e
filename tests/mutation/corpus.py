"""Small models whose prologue fuses: what is mutated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import opaque_ops
import torch
import torch.nn.functional as F
from models import VOCABULARY, Run
from prologue import EPS, HEAD_DIM, HIDDEN, NUM_HEADS, NUM_KV_HEADS, SLOTS, Joint, Prologue, arguments
from torch import nn

import fx_fusion
from fx_fusion.semantics.libraries import sglang, vllm

Case = tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]
CASES: dict[str, Callable[[], Case]] = {}


def case(build: Callable[[], Case]) -> Callable[[], Case]:
    CASES[build.__name__] = build
    return build


def _plain(cls: type[Prologue], dtype: torch.dtype = torch.float32, **given: Any) -> Case:
    return cls(dtype), arguments(dtype=dtype, **given), {}


@case
def packed_mrope() -> Case:
    return _plain(Prologue)


@case
def packed_mrope_bfloat16() -> Case:
    class Float32Norm(Prologue):
        def norm(self, x, weight):
            y = x.float()
            y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS) * weight.float()
            return y.to(x.dtype)

    return _plain(Float32Norm, torch.bfloat16)


@case
def packed_mrope_float16() -> Case:
    return _plain(Prologue, torch.float16)


@case
def separate_rows() -> Case:
    """Three projections, with a bias; cosine and sine computed in the graph."""

    class Separate(Prologue):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(HIDDEN, n * HEAD_DIM) for n in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS))

        def project(self, x):
            return x

        def split(self, x):
            return tuple(p(x).view(x.shape[0], -1, HEAD_DIM) for p in (self.q, self.k, self.v))

        def angles(self, positions):
            frequencies = positions[0].float()[:, None] * 100.0 ** (-torch.arange(0, 1, 2 / HEAD_DIM))
            return frequencies.cos().unsqueeze(1), frequencies.sin().unsqueeze(1)

        def rotate(self, x, cos, sin):
            a, b = x.chunk(2, -1)
            return x * torch.cat([cos, cos], -1) + torch.cat([-b, a], -1) * torch.cat([sin, sin], -1)

    return Separate(), arguments(), {}


@case
def gpt_j_partial() -> Case:
    class GptJPartial(Prologue):
        def angles(self, positions):
            return tuple(part.unsqueeze(1) for part in self.cos_sin_cache[positions[0]].chunk(2, -1))

        def rotate(self, x, cos, sin):
            half = HEAD_DIM // 2
            cos, sin = cos[..., : half // 2], sin[..., : half // 2]
            a, b = x[..., :half:2], x[..., 1:half:2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
            return torch.cat([turned, x[..., half:]], -1)

    return _plain(GptJPartial)


@case
def gemma() -> Case:
    class Gemma(Prologue):
        def norm(self, x, weight):
            y = x.float()
            return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS) * (1.0 + weight.float())).to(x.dtype)

    return _plain(Gemma, torch.bfloat16)


@case
def no_norm() -> Case:
    class NoNorm(Prologue):
        def norm(self, x, weight):
            return x

    return _plain(NoNorm)


@case
def paged_by_block_and_offset() -> Case:
    class Paged(Prologue):
        def store(self, cache, slots, value):
            cache[slots // 8, slots % 8] = value

    return _plain(Paged, cache=(SLOTS // 8, 8, NUM_KV_HEADS, HEAD_DIM))


@case
def paged_heads_first_in_half() -> Case:
    """Caches narrower than the model, slots counted from the end, a ring."""

    class Ring(Prologue):
        def store(self, cache, slots, value):
            slots = slots * 5 % SLOTS
            cache[slots // 8, :, slots % 8 - 8] = value.to(cache.dtype)

    x, positions, slots, *caches = arguments(cache=(SLOTS // 8, NUM_KV_HEADS, 8, HEAD_DIM))
    return Ring(), (x, positions, slots, *(cache.half() for cache in caches)), {}


class PerSequence(Prologue):
    """x [B, S, hidden], positions [3, B, S], slots [S], caches [B, Hk, S, D]; attends over the cache."""

    def split(self, qkv):
        sizes = [NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM]
        return tuple(part.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for part in qkv.split(sizes, -1))

    def store(self, cache, slots, value):
        cache[:, :, slots] = value

    def consume(self, q, k, v, k_cache, v_cache):
        out = F.scaled_dot_product_attention(q, k_cache, v_cache, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


@case
def per_sequence_cache() -> Case:
    caches = torch.randn(2, 2, NUM_KV_HEADS, 32, HEAD_DIM)
    positions = torch.randperm(40)[: 3 * 2 * 5].view(3, 2, 5)
    return PerSequence(), (torch.randn(2, 5, HIDDEN), positions, torch.randperm(32)[:5], *caches), {}


@case
def by_sequence_and_position() -> Case:
    """One index a sequence, an input; one a token."""

    class Indexed(PerSequence):
        def forward(self, x, positions, places, k_cache, v_cache, sequences):
            self.sequences = sequences
            return super().forward(x, positions, places, k_cache, v_cache)

        def store(self, cache, places, value):
            cache[self.sequences[:, None], :, places] = value.transpose(1, 2)

    caches = torch.randn(2, 2, NUM_KV_HEADS, 32, HEAD_DIM)
    positions, places = torch.randperm(40)[:30].view(3, 2, 5), torch.randperm(32)[:10].view(2, 5)
    return Indexed(), (torch.randn(2, 5, HIDDEN), positions, places, *caches, torch.tensor([1, 0])), {}


@case
def key_returned() -> Case:
    class KeyReturned(Prologue):
        def norm(self, x, weight):
            return F.rms_norm(x, (HEAD_DIM,), weight, EPS)

        def consume(self, q, k, v, k_cache, v_cache):
            return super().consume(q, k, v, k_cache, v_cache), k.clone(), v.clone()

    return _plain(KeyReturned)


@case
def fresh_attention() -> Case:
    class Fresh(Prologue):
        def rotate(self, x, cos, sin):
            return x * torch.cat([cos, cos], -1) + x.roll(HEAD_DIM // 2, -1) * torch.cat([-sin, sin], -1)

        def consume(self, q, k, v, k_cache, v_cache):
            q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return self.o_proj(out.squeeze(0).transpose(0, 1).flatten(1))

    return _plain(Fresh)


def _transformers(family: str) -> Case:
    """One layer of a real model, at a decode step after a prefill."""
    run = Run(family)
    inner = getattr(run.model, "model", run.model)
    inner.layers = inner.layers[:1]
    run.prefill()
    tokens = torch.randint(1, VOCABULARY, (run.batch, 1), generator=torch.Generator().manual_seed(2))
    return run.model, (), run.inputs(tokens)


@case
def qwen3_layer() -> Case:
    return _transformers("qwen3")


@case
def qwen3_vl_layer() -> Case:
    return _transformers("qwen3_vl_text")


@case
def two_layers() -> Case:
    """Equal layers are measured once: a mutant of one must not be taken for the other."""

    class TwoLayers(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Prologue(), Prologue()
            self.second.cos_sin_cache = self.first.cos_sin_cache

        def forward(self, x, positions, slots, *caches):
            x = x + self.first(x, positions, slots, *caches[:2])
            return x + self.second(x, positions, slots, *caches[2:])

    return TwoLayers(), (*arguments(), *arguments()[3:]), {}


class OneTensor(Prologue):
    """One input holds keys and values: [2, slots, Hk, D]."""

    def forward(self, x, positions, slots, kv_cache):
        return super().forward(x, positions, slots, *self.parts(kv_cache))

    def parts(self, kv_cache):
        return kv_cache.unbind(0)


@case
def keys_and_values_in_one_tensor() -> Case:
    return OneTensor(), (*arguments()[:3], torch.randn(2, SLOTS, NUM_KV_HEADS, HEAD_DIM)), {}


@case
def stored_at_once() -> Case:
    return Joint(), (*arguments()[:3], torch.randn(Joint.shape)), {}


@case
def keys_and_values_side_by_side() -> Case:
    """[blocks, Hk, block_size, 2 * D]: the lanes of a key, then those of a value."""

    class SideBySide(OneTensor):
        def parts(self, kv_cache):
            return kv_cache[..., :HEAD_DIM], kv_cache[..., HEAD_DIM:]

        def store(self, cache, slots, value):
            cache[slots // 8, :, slots % 8] = value

    return SideBySide(), (*arguments()[:3], torch.randn(SLOTS // 8, NUM_KV_HEADS, 8, 2 * HEAD_DIM)), {}


_OPERATIONS = {"ir_rms_norm": vllm.ir_rms_norm, "rotary_embedding": vllm.c_rotary_embedding}
_LIBRARY = opaque_ops.register("opaque_corpus", {name: name for name in (*_OPERATIONS, "store_cache")})
for _name, _meaning in {**_OPERATIONS, "store_cache": sglang.store_cache}.items():
    fx_fusion.declare_meaning(f"opaque_corpus::{_name}", _meaning)


@case
def opaque_operations() -> Case:
    """Norm, rotation in place on views of the normed heads, and store are operations with a declared meaning."""

    class Opaque(Prologue):
        def forward(self, x, positions, slots, k_cache, v_cache):
            ops = torch.ops.opaque_corpus
            q, k, v = self.split(self.project(x))
            q, k = ops.ir_rms_norm(q, self.q_weight, EPS), ops.ir_rms_norm(k, self.k_weight, EPS)
            ops.rotary_embedding(positions[0], q, k, HEAD_DIM, self.cos_sin_cache, True)
            ops.store_cache(k, v, k_cache, v_cache, slots)
            return self.consume(q, k, v, k_cache, v_cache)

    return _plain(Opaque)


@case
def opaque_store_into_one_tensor() -> Case:
    """An operation stores keys and values into parts of one tensor, which it sees in another shape."""

    class OpaqueStore(OneTensor):
        def forward(self, x, positions, slots, kv_cache):
            q, k, v = self.split(self.project(x))
            cos, sin = self.angles(positions)
            q = self.rotate(self.norm(q, self.q_weight), cos, sin)
            k = self.rotate(self.norm(k, self.k_weight), cos, sin)
            caches = kv_cache.view(2, -1, NUM_KV_HEADS, HEAD_DIM).unbind(0)
            torch.ops.opaque_corpus.store_cache(k, v, *caches, slots)
            return self.consume(q, k, v, *caches)

    return OpaqueStore(), (*arguments()[:3], torch.randn(2, SLOTS // 8, 8, NUM_KV_HEADS, HEAD_DIM)), {}


@case
def float8_scaled() -> Case:
    """Bytes of a float8: keys divided by a number, values by a tensor, both bounded to its range."""

    class Float8(Prologue):
        def __init__(self):
            super().__init__()
            self.register_buffer("v_scale", torch.tensor([0.04]))

        def forward(self, x, positions, slots, k_cache, v_cache):
            self.scales = [self.v_scale, 0.003]
            return super().forward(x, positions, slots, k_cache, v_cache)

        def store(self, cache, slots, value):
            largest = torch.finfo(cache.dtype).max
            stored = (value / self.scales.pop()).clamp(-largest, largest).to(cache.dtype)
            cache.view(torch.uint8)[slots] = stored.view(torch.uint8)

    x, positions, slots, *caches = arguments()
    return Float8(), (x, positions, slots, *(cache.to(torch.float8_e4m3fn) for cache in caches)), {}


@case
def float8_unbounded_bfloat16() -> Case:
    class Float8(Prologue):
        def store(self, cache, slots, value):
            cache[slots] = (value.float() / 0.01).to(cache.dtype)

    x, positions, slots, *caches = arguments(dtype=torch.bfloat16)
    return Float8(torch.bfloat16), (x, positions, slots, *(cache.to(torch.float8_e5m2) for cache in caches)), {}


@case
def slice_store() -> Case:
    class Slice(PerSequence):
        def store(self, cache, slots, value):
            cache[:, :, 7 : 7 + value.shape[2]] = value

    return Slice(), per_sequence_cache()[1], {}


@case
def masked_by_block() -> Case:
    """Negative slots are padding: their block and offset are those of other tokens' rows, and keep what they hold."""

    class Masked(Prologue):
        def store(self, cache, slots, value):
            place = (slots // 8, slots % 8)
            cache[place] = torch.where((slots >= 0)[:, None, None], value, cache[place])

    x, positions, slots, *caches = arguments(cache=(SLOTS // 8, 8, NUM_KV_HEADS, HEAD_DIM))
    slots[1] = -1
    return Masked(), (x, positions, slots, *caches), {}


@case
def masked_by_sign() -> Case:
    class Masked(Prologue):
        def store(self, cache, slots, value):
            safe = slots.clamp(min=0)
            cache[safe] = torch.where((slots >= 0)[:, None, None], value, cache[safe])

    x, positions, slots, *caches = arguments()
    slots[slots == 0] = SLOTS - 1
    slots[1] = -1
    return Masked(), (x, positions, slots, *caches), {}


@case
def shuffle_layout() -> Case:
    """Keys [blocks, Hk, D / 8, 32, 8], values [blocks, Hk, 32 / 8, D, 8]"""

    class Shuffle(Prologue):
        def store(self, cache, slots, value):
            block, offset = slots // 32, slots % 32
            if cache.shape[3] == HEAD_DIM:
                cache[block, :, offset // 8, :, offset % 8] = value
            else:
                cache[block, :, :, offset] = value.unflatten(-1, (-1, 8))

    x, positions, slots, *_ = arguments()
    keys = torch.randn(SLOTS // 32, NUM_KV_HEADS, HEAD_DIM // 8, 32, 8)
    return Shuffle(), (x, positions, slots, keys, torch.randn(SLOTS // 32, NUM_KV_HEADS, 4, HEAD_DIM, 8)), {}


@case
def scattered_into_two_views() -> Case:
    """Two inputs that are views of one tensor, written by scatter."""

    class Scatter(Prologue):
        def store(self, cache, slots, value):
            cache.scatter_(0, slots[:, None, None].expand_as(value), value)

    caches = torch.randn(SLOTS, 2, NUM_KV_HEADS, HEAD_DIM)
    return Scatter(), (*arguments()[:3], caches[:, 0], caches[:, 1]), {}
