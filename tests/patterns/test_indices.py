"""Slots, sequences and heads: an index is what it says only if it is moved there, in order, each element once."""

from __future__ import annotations

import pytest
import torch
from prologue import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, SLOTS, Prologue, arguments
from rowwise import assert_as_eager

BATCH, SEQ, ROOM = 4, 3, 16


class Sequences(Prologue):
    """x [B, S, hidden], positions [3, B, S], slots [B, S], caches [B, room, Hk, D]"""

    def split(self, qkv):
        sizes = [NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM]
        return tuple(part.unflatten(-1, (-1, HEAD_DIM)) for part in qkv.split(sizes, -1))

    def angles(self, positions):
        cos, sin = self.cos_sin_cache[positions[0]].chunk(2, -1)
        return cos.unsqueeze(2), sin.unsqueeze(2)

    def forward(self, x, *given):
        self.sequences = self.sequence(x.shape[0])
        return super().forward(x, *given)

    def store(self, cache, slots, value):
        cache[self.sequences[:, None], slots] = value

    def sequence(self, batch):
        return torch.arange(batch)

    def consume(self, q, k, v, k_cache, v_cache):
        return self.o_proj(q.flatten(2))


def sequences(batch=BATCH, seq=SEQ):
    x, positions, _, *_ = arguments(batch * seq)
    slots = torch.stack([torch.randperm(ROOM)[:seq] for _ in range(batch)])
    caches = [torch.randn(batch, ROOM, NUM_KV_HEADS, HEAD_DIM) for _ in range(2)]
    return x.view(batch, seq, -1), positions.view(3, batch, seq), slots, *caches


#: Each is a permutation of the sequences, or the sequences themselves.
ORDERS = {
    "counted": torch.arange,
    "flipped": lambda n: torch.arange(n).flip(0),
    "flipped_twice": lambda n: torch.arange(n).flip(0).flip(0),
    "rolled": lambda n: torch.arange(n).roll(1),
    "rolled_all_the_way": lambda n: torch.arange(n).roll(n),
    "transposed": lambda n: torch.arange(n).view(2, n // 2).t().reshape(n),
    "counted_down": lambda n: torch.arange(n - 1, -1, -1),
    "from_one": lambda n: torch.arange(1, n + 1) % n,
    "first_of_more": lambda n: torch.arange(2 * n)[:n],
    "last_of_more": lambda n: torch.arange(2 * n)[n:] - n,
    "every_other": lambda n: torch.arange(2 * n)[::2] // 2,
    "a_list": lambda n: torch.tensor([1, 0, 3, 2][:n]),
    "chosen": lambda n: torch.arange(n)[torch.tensor([1, 0, 3, 2][:n])],
    "joined": lambda n: torch.cat([torch.arange(n // 2, n), torch.arange(n // 2)]),
    "halves": lambda n: torch.stack(torch.arange(n).chunk(2), 1).reshape(n),
    "sorted_down": lambda n: torch.arange(n).sort(descending=True).values,
    "exchanged": lambda n: torch.arange(n) ^ 1,
    "expanded": lambda n: torch.arange(n)[None].expand(2, n)[1],
}


@pytest.mark.parametrize("name", ORDERS)
def test_sequences_in_any_order(name):
    model = type("Ordered", (Sequences,), {"sequence": lambda self, n: ORDERS[name](n)})()
    report = assert_as_eager(model, sequences())
    assert len(report.fused) == 1, str(report)


@pytest.mark.parametrize("name", ORDERS)
def test_heads_in_any_order(name):
    """Only heads in their own order are no index; any other order is declined, or stored as it says."""

    class Heads(Prologue):
        def store(self, cache, slots, value):
            heads = ORDERS[name](2) if name not in ("transposed", "halves", "joined") else torch.arange(2).flip(0)
            cache[slots[:, None], heads] = value

    report = assert_as_eager(Heads(), arguments(), strict=False)
    assert len(report.layers) == 1, str(report)
    assert all(layer.code == "store.index" for layer in report.declined), str(report)
    assert name != "counted" or report.fused


def test_one_arange_for_two_dimensions():
    """As many sequences as heads: which of the two is counted, the place in the index says."""

    class Both(Sequences):
        def store(self, cache, slots, value):
            counted = torch.arange(value.shape[0])
            cache[counted[:, None, None], slots[:, :, None], counted] = value

    x, positions, slots, *_ = sequences(batch=NUM_KV_HEADS)
    caches = [torch.randn(NUM_KV_HEADS, ROOM, NUM_KV_HEADS, HEAD_DIM) for _ in range(2)]
    report = assert_as_eager(Both(), (x, positions, slots, *caches))
    assert len(report.fused) == 1, str(report)


# --- slots ------------------------------------------------------------------------------------------------------------


def put(slots):
    slots = slots.clone()
    slots[0] = 0
    return slots


#: What may be stored at: whole tensors of one slot a token, whatever made them.
SLOTS_OF = {
    "first_is_zero": put,
    "sorted": lambda s: s.sort().values,
    "flipped": lambda s: s.flip(0),
    "rolled": lambda s: s.roll(1),
    "shifted": lambda s: (s + 1) % SLOTS,
    "from_the_end": lambda s: s - SLOTS,
    "narrow": lambda s: s.to(torch.int32),
    "chosen": lambda s: s[torch.tensor([0, 2, 1, 4, 3])],
    "by_a_list": lambda s: torch.arange(SLOTS).flip(0)[s],
    "counted_after_the_first": lambda s: s[0] % 8 + torch.arange(s.shape[0]),
}


@pytest.mark.parametrize("name", SLOTS_OF)
@pytest.mark.parametrize("writes", ["index_put", "index_copy", "scatter"])
def test_what_happens_to_slots(name, writes):
    class Changed(Prologue):
        def forward(self, x, positions, slots, *caches):
            return super().forward(x, positions, SLOTS_OF[name](slots), *caches)

        def store(self, cache, slots, value):
            if writes == "index_put":
                cache[slots] = value
            elif writes == "index_copy":
                cache.index_copy_(0, slots.long().remainder(SLOTS), value)
            else:
                cache.scatter_(0, slots.long().remainder(SLOTS)[:, None, None].expand_as(value), value)

    report = assert_as_eager(Changed(), arguments(), arguments())
    assert len(report.fused) == 1, str(report)


@pytest.mark.parametrize("cut", [lambda s: s[:5], lambda s: s[1:6], lambda s: s[::2][:5], lambda s: s.view(2, -1)[0]])
def test_slots_are_a_part_of_what_is_given(cut):
    """There are more slots than tokens: those of the tokens are the ones meant."""

    class Part(Prologue):
        def store(self, cache, slots, value):
            cache.scatter_(0, cut(slots)[:, None, None].expand_as(value), value)

    x, positions, _, *caches = arguments()
    report = assert_as_eager(Part(), (x, positions, torch.randperm(SLOTS)[:10], *caches))
    assert len(report.fused) == 1, str(report)


class Grouped(Prologue):
    """k [blocks, size, Hk, D] at a block and an offset; v [blocks, Hk, size / 8, D, 8] at a block, a group, a place."""

    size, group = 16, 8

    def forward(self, x, positions, slots, k_cache, v_cache):
        self.keys = False
        return super().forward(x, positions, slots, k_cache, v_cache)

    def store(self, cache, slots, value):
        self.keys = not self.keys
        if self.keys:
            cache[slots // self.size, slots % self.size] = value
            return
        offset = slots % self.size
        cache[slots // self.size, :, self.of(offset) // self.group, :, self.of(offset) % self.group] = value

    def of(self, offset):
        return offset


def grouped(slots=None):
    x, positions, given, *_ = arguments(6)
    keys = torch.randn(SLOTS // 16, 16, NUM_KV_HEADS, HEAD_DIM)
    values = torch.randn(SLOTS // 16, NUM_KV_HEADS, 2, HEAD_DIM, 8)
    return x, positions, given if slots is None else slots, keys, values


MIXES = {
    "sorted": lambda o: o.sort().values,
    "running_maximum": lambda o: o.cummax(0).values,
    "flipped_when_sorted": lambda o: o.sort(descending=True).values.flip(0),
    "first_for_all": lambda o: torch.minimum(o, o.amax()),
    "by_their_order": lambda o: o[o.argsort()],
    "later_ones": lambda o: torch.maximum(o, o.roll(1)),
}


@pytest.mark.parametrize("name", MIXES)
def test_slots_that_mix_tokens_are_no_function_of_slots(name):
    """Where slots happen to be in order, each of these gives the slot itself."""
    model = type("Mixed", (Grouped,), {"of": lambda self, offset: MIXES[name](offset)})()
    given = grouped()
    given[2].copy_(given[2].sort(descending=True).values)
    report = assert_as_eager(model, given)
    assert [layer.code for layer in report.layers] == ["store.slots_differ"], str(report)


@pytest.mark.parametrize("of", [lambda o: o, lambda o: o + 0, lambda o: o % 16, lambda o: o & 15])
def test_functions_of_one_slot(of):
    report = assert_as_eager(type("Each", (Grouped,), {"of": lambda self, offset: of(offset)})(), grouped())
    assert len(report.fused) == 1, str(report)


@pytest.mark.parametrize("of", [lambda o: o ^ 1, lambda o: o.clamp(0, 15), lambda o: 15 - o])
def test_other_functions_of_one_slot(of):
    report = assert_as_eager(type("Each", (Grouped,), {"of": lambda self, offset: of(offset)})(), grouped())
    assert [layer.code for layer in report.layers] == ["store.slots_differ"], str(report)


# --- caches of two lengths --------------------------------------------------------------------------------------------


class Kept(Prologue):
    """Tokens that are not kept leave the cache as it is."""

    def forward(self, x, positions, slots, k_cache, v_cache, keep):
        self.keep = keep
        return super().forward(x, positions, slots, k_cache, v_cache)

    def store(self, cache, slots, value):
        cache[slots] = torch.where(self.keep[:, None, None], value, cache[slots])


class LeftOut(Kept):
    def store(self, cache, slots, value):
        cache[slots] = torch.where(self.keep[:, None, None], cache[slots], value)


class NotNegative(Kept):
    """The flag is computed from the slots, but is not their sign."""

    def store(self, cache, slots, value):
        kept = (slots != -1)[:, None, None]
        cache[slots] = torch.where(kept, value, cache[slots])


class BySign(Kept):
    """Negative slots are not stored, whatever the length."""

    def store(self, cache, slots, value):
        cache[slots] = torch.where((slots >= 0)[:, None, None], value, cache[slots])


class Unmasked(Kept):
    def store(self, cache, slots, value):
        cache[slots] = value


def kept(keys, values):
    x, positions, _, *_ = arguments(6)
    caches = (torch.randn(count, NUM_KV_HEADS, HEAD_DIM) for count in (keys, values))
    return x, positions, torch.tensor([-1, 3, -7, 20, -30, 5]), *caches, torch.tensor([1, 1, 1, 0, 0, 1]).bool()


@pytest.mark.parametrize("cls", [Kept, LeftOut, NotNegative, BySign, Unmasked])
@pytest.mark.parametrize("lengths", [(64, 64), (64, 96), (96, 64)])
def test_a_negative_slot_counts_from_each_caches_own_end(cls, lengths):
    report = assert_as_eager(cls(), kept(*lengths))
    alike = lengths[0] == lengths[1] or cls in (BySign, Unmasked)
    assert [layer.code for layer in report.layers] == [None if alike else "store.slots_differ"], str(report)


@pytest.mark.parametrize("cls", [Kept, NotNegative])
def test_two_lengths_that_are_two_symbols(cls):
    """They were one number when the graph was traced."""
    call = kept(64, 64)
    report = assert_as_eager(cls(), call, kept(64, 96), marked=((3, 0), (4, 0)))
    assert all(layer.code == "store.slots_differ" for layer in report.layers), str(report)


# --- bytes are masks --------------------------------------------------------------------------------------------------


class Bytes(Prologue):
    dtype = torch.uint8

    def store(self, cache, slots, value):
        cache[slots.to(self.dtype)] = value


class BytesPut(Bytes):
    def store(self, cache, slots, value):
        cache.index_put_((slots.to(self.dtype),), value)


class BytesInPages(Bytes):
    def store(self, cache, slots, value):
        cache.view(-1, 1, NUM_KV_HEADS, HEAD_DIM)[slots.to(self.dtype), 0] = value


def all_slots(tokens=5):
    x, positions, _, *_ = arguments(tokens)
    caches = (torch.randn(tokens, NUM_KV_HEADS, HEAD_DIM) for _ in range(2))
    return x, positions, torch.ones(tokens, dtype=torch.int64), *caches


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
@pytest.mark.parametrize("cls", [Bytes, BytesPut, BytesInPages])
def test_bytes_and_truth_values_are_masks(cls, dtype):
    report = assert_as_eager(type("Masks", (cls,), {"dtype": dtype})(), all_slots())
    assert not report.fused, str(report)
    if dtype == torch.uint8 and report.declined[0].code == "store.index":
        assert "mask" in report.declined[0].reason


def test_bytes_made_wide_are_indices():
    class Widened(Prologue):
        def store(self, cache, slots, value):
            cache[slots.long()] = value

    x, positions, slots, *caches = arguments()
    report = assert_as_eager(Widened(), (x, positions, slots.to(torch.uint8), *caches))
    assert len(report.fused) == 1, str(report)
