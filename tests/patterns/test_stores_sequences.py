"""Caches of sequences, addressed by the sequence and the position: ``cache[batch[:, None], :, positions] = k``."""

from __future__ import annotations

import re

import pytest
import torch
from prologue import HEAD_DIM, HIDDEN, NUM_HEADS, NUM_KV_HEADS, Prologue

from fx_fusion.testing import assert_declines, assert_fuses

SEQUENCES, LENGTH = 4, 32


class HeadsFirst(Prologue):
    """x [B, S, hidden], places [B, S], caches [sequences, Hk, length, D]"""

    shape: tuple[int, ...] = (SEQUENCES, NUM_KV_HEADS, LENGTH, HEAD_DIM)

    def forward(self, x, positions, places, k_cache, v_cache, sequences=None):
        self.sequences = torch.arange(x.shape[0]) if sequences is None else sequences
        return super().forward(x, positions, places, k_cache, v_cache)

    def split(self, qkv):
        parts = qkv.split([NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM], -1)
        return tuple(part.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for part in parts)

    def store(self, cache, places, value):
        cache[self.sequences[:, None], :, places] = value.transpose(1, 2)

    def consume(self, q, k, v, *caches):
        return self.o_proj(q.transpose(1, 2).flatten(2)), caches[0].sum(-1)


class TokensFirst(HeadsFirst):
    """Caches [sequences, length, Hk, D]"""

    shape = (SEQUENCES, LENGTH, NUM_KV_HEADS, HEAD_DIM)

    def split(self, qkv):
        return tuple(part.transpose(1, 2) for part in super().split(qkv))

    def angles(self, positions):
        return tuple(rows.squeeze(1).unsqueeze(2) for rows in super().angles(positions))

    def store(self, cache, places, value):
        cache[self.sequences[:, None], places] = value

    def consume(self, q, k, v, *caches):
        return self.o_proj(q.flatten(2)), caches[0].sum(-1)


class EveryHeadIndexed(HeadsFirst):
    def store(self, cache, places, value):
        heads = torch.arange(value.shape[1]).view(1, -1, 1)
        cache[self.sequences[:, None, None], heads, places[:, None]] = value


class PositionFirst(TokensFirst):
    """Caches [length, sequences, Hk, D]"""

    shape = (LENGTH, SEQUENCES, NUM_KV_HEADS, HEAD_DIM)

    def store(self, cache, places, value):
        cache[places, self.sequences[:, None]] = value


class SomeSequences(TokensFirst):
    """Finished sequences store nothing."""

    def store(self, cache, places, value):
        at = self.sequences[:, None], places
        cache[at] = torch.where((self.sequences > 0)[:, None, None, None], value, cache[at])


def given(model, batch, seq, *, sequences=False, dtype=torch.float32):
    places = torch.stack([torch.randperm(LENGTH)[:seq] for _ in range(batch)])
    positions = torch.randint(40, (3, batch, seq))
    args = torch.randn(batch, seq, HIDDEN, dtype=dtype), positions, places, *torch.randn(2, *model.shape, dtype=dtype)
    return (*args, torch.randperm(SEQUENCES)[:batch]) if sequences else args


CASES = [
    (HeadsFirst, "slot in each sequence's cache", "block and offset"),
    (TokensFirst, "slot in each sequence's cache", "block and offset"),
    (EveryHeadIndexed, "slot in each sequence's cache", None),
    (PositionFirst, "slot in each sequence's cache", "block and offset"),
    (SomeSequences, "slot in each sequence's cache", "block and offset"),
]  # of (a model, how it is addressed where the sequences are counted, and where they are an input)


GRIDS = [(*case, 2, 5) for case in CASES] + [(*case, *grid) for case in CASES[:2] for grid in ((3, 1), (1, 3))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "counted", "by_input", "batch", "seq"), GRIDS, ids=lambda value: getattr(value, "__name__", None)
)
def test_fuses(model, counted, by_input, batch, seq):
    dtype = torch.bfloat16 if batch == 3 else torch.float32
    report = assert_fuses(model(dtype), given(model, batch, seq, dtype=dtype), count=1)
    assert report.fused[0].reading["addressed_by"] == counted
    if by_input:
        args = given(model, batch, seq, sequences=True, dtype=dtype)
        report = assert_fuses(model(dtype), args, count=1)
        assert report.fused[0].reading["addressed_by"] == by_input


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "sequences"), [("batch", False), ("seq", True)])
def test_fuses_at_any_size(dim, sequences):
    args = given(HeadsFirst, 2, 5 if dim == "seq" else 1, sequences=sequences)
    for tensor, dims in zip(args, ((0, 1), (1, 2), (0, 1), None, None, (0, None)), strict=False):
        at = dims and dims[dim == "seq"]
        if at is not None:
            torch._dynamo.mark_dynamic(tensor, at)
    assert_fuses(HeadsFirst(), args, count=1, dynamic=None)


@pytest.mark.slow
def test_one_index_a_sequence_under_inductor():
    assert_fuses(SomeSequences(), given(SomeSequences, 2, 3, sequences=True), count=1, inner="inductor")


# --- what only looks like it ------------------------------------------------------------------------------------------


class CountsInTwos(TokensFirst):
    """No sequence's own number: it stays an index."""

    def store(self, cache, places, value):
        cache[(self.sequences * 2)[:, None], places] = value


class CountsDown(TokensFirst):
    def store(self, cache, places, value):
        cache[torch.arange(value.shape[0] - 1, -1, -1)[:, None], places] = value


class CountsFromOne(TokensFirst):
    def store(self, cache, places, value):
        cache[torch.arange(1, value.shape[0] + 1)[:, None], places] = value


@pytest.mark.parametrize("model", [CountsInTwos, CountsDown, CountsFromOne])
def test_another_count_stays_an_index(model):
    report = assert_fuses(model(), given(model, 2, 5), count=1)
    assert report.fused[0].reading["addressed_by"] == "block and offset"


class HeadsTurned(EveryHeadIndexed):
    def store(self, cache, places, value):
        heads = torch.arange(value.shape[1] - 1, -1, -1).view(1, -1, 1)
        cache[self.sequences[:, None, None], heads, places[:, None]] = value


class OtherHeads(EveryHeadIndexed):
    """Which heads, an input says."""

    def store(self, cache, places, value):
        cache[torch.arange(value.shape[0])[:, None, None], self.sequences.view(1, -1, 1), places[:, None]] = value


class OnePlaceForeach(TokensFirst):
    """The place of a sequence's first token, and its number: swapped."""

    def store(self, cache, places, value):
        cache[places[:, :1], torch.arange(value.shape[1]) + self.sequences[:, None]] = value


class KeysElsewhere(TokensFirst):
    """Keys and values of a sequence in different sequences' caches."""

    def forward(self, *args):
        self.stores = 0
        return super().forward(*args)

    def store(self, cache, places, value):
        self.stores += 1
        cache[(self.sequences + self.stores % 2)[:, None], places] = value


class SequenceOfAToken(TokensFirst):
    """An index has the sequences where the tokens should be."""

    def store(self, cache, places, value):
        cache[self.sequences[:, None].expand_as(places).T.reshape(places.shape), places] = value


@pytest.mark.parametrize(
    ("model", "code", "says"),
    [
        (HeadsTurned, "store.index", "does not hold one index per token"),
        (OtherHeads, "store.index", "2 indices address the cache; expected a slot, or a block and an offset"),
        (KeysElsewhere, "store.slots_differ", "the key is stored at"),
    ],
)
def test_declines(model, code, says):
    args = given(model, 2, 5, sequences=True)
    report = assert_declines(model(), (*args[:5], torch.arange(2)), code=code)
    (layer,) = report.declined
    assert re.search(says, layer.reason)
    assert layer.source


def test_an_odd_index_is_computed_outside():
    args = given(SequenceOfAToken, 2, 5, sequences=True)
    assert_fuses(SequenceOfAToken(), args, count=1)
    assert_fuses(OnePlaceForeach(), (*args[:2], torch.tensor([[3] * 5, [1] * 5]), *args[3:5]), count=1)
