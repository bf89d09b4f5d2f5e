"""One graph for all sizes: what is proved at a few of them is true of none, one, and thousands of tokens."""

from __future__ import annotations

import random
import re

import pytest
import torch
from prologue import HEAD_DIM, HIDDEN, NUM_HEADS, NUM_KV_HEADS, POSITIONS, Prologue
from rowwise import assert_as_eager
from test_indices import Sequences

import fx_fusion
from fx_fusion.testing import assert_declines

ROOM = 6000


def flat(tokens, seed=0):
    torch.manual_seed(seed)
    x, positions = torch.randn(tokens, HIDDEN), torch.randint(-POSITIONS, POSITIONS, (3, tokens))
    caches = (torch.randn(ROOM, NUM_KV_HEADS, HEAD_DIM) for _ in range(2))
    return x, positions, torch.randperm(ROOM)[:tokens], *caches


FLAT = ((0, 0), (1, 1), (2, 0))


def grid(batch, seq, room=64, seed=0):
    torch.manual_seed(seed)
    slots = torch.stack([torch.randperm(room)[:seq] for _ in range(batch)]) if batch else torch.empty(0, seq).long()
    caches = (torch.randn(batch, room, NUM_KV_HEADS, HEAD_DIM) for _ in range(2))
    positions = torch.randint(-POSITIONS, POSITIONS, (3, batch, seq))
    return torch.randn(batch, seq, HIDDEN), positions, slots, *caches


GRID = ((0, 0), (0, 1), (1, 1), (1, 2), (2, 0), (2, 1), (3, 0), (4, 0))


class Flat(Prologue):
    """How many heads there are is told without counting elements: there may be none."""

    def split(self, qkv):
        parts = qkv.split([NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM], -1)
        return tuple(part.unflatten(-1, (-1, HEAD_DIM)) for part in parts)


class Masked(Flat):
    def store(self, cache, slots, value):
        cache[slots] = torch.where((slots % 3 != 0)[:, None, None], value, cache[slots])


class Scattered(Flat):
    def store(self, cache, slots, value):
        cache.scatter_(0, slots[:, None, None].expand_as(value), value)


class Paged(Flat):
    def store(self, cache, slots, value):
        cache.view(-1, 8, NUM_KV_HEADS, HEAD_DIM)[slots // 8, slots % 8] = value


class Rows(Flat):
    """Angles are computed, and used as rows."""

    def angles(self, positions):
        angles = positions[0][:, None] * 100.0 ** (-torch.arange(0, 1, 2 / HEAD_DIM))
        return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)


class FirstRows(Flat):
    """As many rows of a table as there are tokens."""

    def angles(self, positions):
        rows = self.cos_sin_cache.repeat(ROOM // POSITIONS, 1)[: positions.shape[1]]
        return tuple(half.unsqueeze(1) for half in rows.chunk(2, -1))


def sizes(seed, count):
    """None, one, few, and many; first some of no special size, with which the graph is made."""
    chance = random.Random(seed)
    drawn = [chance.choice([chance.randint(2, 40), chance.randint(1000, 5000)]) for _ in range(count - 2)]
    return [drawn[0], 0, 1, *drawn[1:]]


@pytest.mark.parametrize("cls", [Flat, Masked, Scattered, Paged, Rows, FirstRows], ids=lambda cls: cls.__name__)
def test_any_number_of_tokens(cls):
    drawn = sizes(cls.__name__, 6)
    report = assert_as_eager(cls(), *(flat(tokens, seed) for seed, tokens in enumerate(drawn)), marked=FLAT)
    assert report.fused, str(report)
    for layer in report.declined:  # of a single token, PyTorch stores what is kept in another shape than it reads
        empty = layer.code == "region.sizes" and "is empty" in layer.reason
        assert empty or cls is Masked, str(report)


class Transposed(Sequences):
    """Heads first; the cache's too."""

    def split(self, qkv):
        return tuple(part.transpose(1, 2) for part in super().split(qkv))

    def angles(self, positions):
        return tuple(rows.transpose(1, 2) for rows in super().angles(positions))

    def store(self, cache, slots, value):
        cache.transpose(1, 2)[
            torch.arange(value.shape[0])[:, None, None], torch.arange(NUM_KV_HEADS)[:, None], slots[:, None]
        ] = value

    def consume(self, q, k, v, k_cache, v_cache):
        return self.o_proj(q.transpose(1, 2).flatten(2))


class AsOneRow(Sequences):
    """All tokens in a row, but for the store."""

    def split(self, qkv):
        self.grid = qkv.shape[:2]
        return Flat.split(self, qkv.flatten(0, 1))

    def angles(self, positions):
        return tuple(rows.unsqueeze(1) for rows in self.cos_sin_cache[positions[0].flatten()].chunk(2, -1))

    def store(self, cache, slots, value):
        super().store(cache, slots, value.unflatten(0, self.grid))

    def consume(self, q, k, v, k_cache, v_cache):
        return self.o_proj(q.flatten(1)).unflatten(0, self.grid)


class SharedPositions(Sequences):
    """One row of positions for all sequences."""

    def angles(self, positions):
        return super().angles(positions[:, :1])


@pytest.mark.parametrize("cls", [Sequences, Transposed, AsOneRow, SharedPositions], ids=lambda cls: cls.__name__)
def test_any_number_of_sequences(cls):
    chance = random.Random(cls.__name__)
    drawn = [(chance.randint(2, 7), chance.randint(2, 60)) for _ in range(4)] + [(1, 9), (3, 1), (40, 50), (0, 4)]
    report = assert_as_eager(cls(), *(grid(*each, seed=seed) for seed, each in enumerate(drawn)), marked=GRID)
    assert report.fused, str(report)


# --- a symbol that is more than an extent -----------------------------------------------------------------------------


def variant(**methods):
    return type("Variant", (Prologue,), methods)


def tokens_of(x):
    return x.shape[0]


REFUSED = {
    "mask": variant(
        rotate=lambda self, x, c, s: torch.where(
            (torch.arange(tokens_of(x)) < 100)[:, None, None], Prologue.rotate(self, x, c, s), x
        )
    ),
    "mask_of_lanes": variant(
        rotate=lambda self, x, c, s: torch.where(
            torch.arange(HEAD_DIM) < tokens_of(x) // 100, x, Prologue.rotate(self, x, c, s)
        )
    ),
    "factor": variant(norm=lambda self, x, w: Prologue.norm(self, x, w) * (tokens_of(x) // 100 + 1)),
    "eps": variant(
        norm=lambda self, x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6 * (tokens_of(x) // 100 + 1)) * w
    ),
    "roll_of_lanes": variant(rotate=lambda self, x, c, s: Prologue.rotate(self, x, c, s).roll(tokens_of(x) // 100, 1)),
    "roll_of_tokens": variant(rotate=lambda self, x, c, s: Prologue.rotate(self, x, c, s).roll(15, 0)),
    "stored_divided": variant(
        store=lambda self, cache, slots, v: cache.index_put_((slots,), v / (tokens_of(v) // 100 + 1))
    ),
}  # fmt: skip


class ValueHeadsFrom(Prologue):
    def split(self, qkv):
        heads = qkv.unflatten(-1, (-1, HEAD_DIM))
        return heads[:, :4], heads[:, 4:6], heads.narrow(1, 5 + qkv.shape[0] // 100, 2)


REFUSED["value_heads_from"] = ValueHeadsFrom


@pytest.mark.parametrize("name", REFUSED)
def test_more_than_an_extent(name):
    """At few tokens nothing shows: with 120 something else is computed."""
    report = assert_as_eager(REFUSED[name](), flat(6), flat(120), marked=FLAT)
    assert not report.fused, str(report)


@pytest.mark.parametrize("name", ["mask", "factor", "roll_of_lanes", "stored_divided", "value_heads_from"])
def test_the_symbol_is_named(name):
    call = flat(6)
    for argument, dim in FLAT:
        torch._dynamo.mark_dynamic(call[argument], dim)
    report = assert_declines(REFUSED[name](), call, code="region.sizes", dynamic=None)
    (layer,) = report.declined
    assert re.match(r"the size s\d+ is a symbol, and (it reaches \w+ \(aten|iota\w* counts up to it)", layer.reason)
    assert layer.source


OUTSIDE = {
    "summand": variant(norm=lambda self, x, w: Prologue.norm(self, x + tokens_of(x) // 100, w)),
    "first_tokens": variant(rotate=lambda self, x, c, s: torch.cat([Prologue.rotate(self, x, c, s)[:100], x[100:]])),
    "weight_from": variant(
        norm=lambda self, x, w: Prologue.norm(self, x, torch.cat([w, w * 2])[tokens_of(x) // 100 :][:HEAD_DIM])
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_may_stay_outside_of_the_call(name):
    """Before the data begins, or in what is computed once for all tokens; or a guard keeps the sizes apart."""
    report = assert_as_eager(OUTSIDE[name](), flat(6), flat(120), marked=FLAT)
    assert report.fused, str(report)


POSITIONS_BY_SIZE = {
    "from_a_token_on": lambda p: torch.where(torch.arange(p.shape[1]) < 100, p, 0),
    "rolled": lambda p: p.roll(p.shape[1] // 100, 1),
    "rolled_by_a_number": lambda p: p.roll(15, 1),
    "shifted": lambda p: (p + p.shape[1] // 100) % POSITIONS,
}


@pytest.mark.parametrize("name", POSITIONS_BY_SIZE)
def test_positions_that_depend_on_how_many_there_are(name):
    """They are operands as they are computed."""

    class ByPosition(Prologue):
        def angles(self, positions):
            return super().angles(POSITIONS_BY_SIZE[name](positions))

    report = assert_as_eager(ByPosition(), flat(6), flat(120), marked=FLAT)
    assert len(report.fused) == 1, str(report)


def test_slots_of_another_number():
    """Inputs of two symbols: eager refuses what does not fit, and so does the call."""
    x, positions, slots, *caches = flat(6)
    compiled = torch.compile(
        Prologue(), backend="fx_fusion", options={"fx_fusion.inner": "eager", "fx_fusion.kernel": "reference"}
    )
    for tensor, dim in ((x, 0), (positions, 1), (slots, 0)):
        torch._dynamo.mark_dynamic(tensor, dim)
    with torch.no_grad():
        compiled(x, positions, slots, *caches)
        assert fx_fusion.last_report().fused
        with pytest.raises(Exception, match=r"shape|size|expand"):
            compiled(x, positions, torch.arange(9), *caches)
