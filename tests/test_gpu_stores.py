"""On a CUDA or ROCm device: converted, scaled, sliced and masked stores by the Triton kernel, under Inductor."""

from __future__ import annotations

import pytest
import torch
from on_gpu import fused_and_eager
from prologue import HEAD_DIM, HIDDEN, NUM_HEADS, NUM_KV_HEADS, SLOTS, Joint, Prologue, arguments

pytestmark = pytest.mark.gpu

SHAPE = (SLOTS, NUM_KV_HEADS, HEAD_DIM)


class Bytes(Prologue):
    """A cache of uint8 that holds a float8; keys and values divided by a tensor and clamped."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor([0.37]))

    def store(self, cache, slots, value):
        stored = (value / self.scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        cache[slots] = stored.view(torch.uint8)


class Number(Prologue):
    """A float8 cache, keys and values divided by a number; what is beyond the range is what eager makes of it."""

    def store(self, cache, slots, value):
        cache.view(torch.uint8)[slots] = (value / 0.5).to(cache.dtype).view(torch.uint8)


class Slice(Prologue):
    def store(self, cache, slots, value):
        cache[7 : 7 + value.shape[0]] = value


class Masked(Prologue):
    def store(self, cache, slots, value):
        place = slots // 8, slots % 8
        pages = cache.view(-1, 8, NUM_KV_HEADS, HEAD_DIM)
        pages[place] = torch.where((slots >= 0)[:, None, None], value, pages[place])


CASES = [(Bytes, torch.uint8), (Number, torch.float8_e4m3fn), (Slice, torch.float32), (Masked, torch.float32)]


@pytest.mark.parametrize(("model", "dtype"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_stores_as_in_eager(model, dtype):
    torch.manual_seed(0)
    x, positions, slots, *_ = arguments()
    slots[1] = -1 if model is Masked else slots[1]
    fused, eager, *_ = fused_and_eager(model(), (x, positions, slots, *torch.zeros(2, *SHAPE).to(dtype)))
    assert torch.allclose(fused[0], eager[0], rtol=1e-4, atol=1e-4)
    for got, want in zip(fused[-2:], eager[-2:], strict=True):
        if dtype.itemsize == 1:
            # A key that differs in its last bit may be rounded to the next float8.
            assert int((got.view(torch.uint8).int() - want.view(torch.uint8).int()).abs().max()) <= 1
        else:
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


class LanesTakeTurns(Joint):
    """[slots, Hk, 2 * D]: of every two lanes, the first is a key's."""

    shape = (SLOTS, NUM_KV_HEADS, 2 * HEAD_DIM)

    def join(self, k, v):
        return torch.stack([k, v], -1).flatten(-2)


class HeadsTakeTurnsInASlice(Joint):
    shape = (SLOTS, 2 * NUM_KV_HEADS, HEAD_DIM)

    def join(self, k, v):
        return torch.stack([k, v], 2).flatten(1, 2)

    def store(self, cache, slots, value):
        cache[7 : 7 + value.shape[0]] = value


class BySequenceAndPosition(Prologue):
    """One index a sequence, one a token."""

    def split(self, qkv):
        parts = qkv.split([NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM], -1)
        return tuple(part.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for part in parts)

    def forward(self, x, positions, places, k_cache, v_cache, sequences):
        self.sequences = sequences
        return super().forward(x, positions, places, k_cache, v_cache)

    def store(self, cache, places, value):
        cache[self.sequences[:, None], :, places] = value.transpose(1, 2)

    def consume(self, q, k, v, *caches):
        return self.o_proj(q.transpose(1, 2).flatten(2))


def _by_sequence():
    caches = torch.randn(2, 4, NUM_KV_HEADS, 32, HEAD_DIM)
    positions, places = torch.randperm(40)[:30].view(3, 2, 5), torch.randperm(32)[:10].view(2, 5)
    return torch.randn(2, 5, HIDDEN), positions, places, *caches, torch.tensor([2, 1])


@pytest.mark.parametrize("model", [Joint, LanesTakeTurns, HeadsTakeTurnsInASlice, BySequenceAndPosition])
def test_stores_at_once_and_by_sequence_as_in_eager(model):
    torch.manual_seed(0)
    given = _by_sequence() if model is BySequenceAndPosition else (*arguments()[:3], torch.randn(model.shape))
    fused, eager, *_ = fused_and_eager(model(), given)
    for got, want in zip(fused, eager, strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
