"""Slices, scatters, masks, two views of one tensor, and aiter's shuffle layout: where each element lands."""

from __future__ import annotations

import pytest
import torch
from prologue import HEAD_DIM, HIDDEN, NUM_KV_HEADS, SLOTS, Prologue, arguments

from fx_fusion.graph.strided import may_overlap
from fx_fusion.mutation.mutants import capture
from fx_fusion.testing import assert_declines, assert_fuses

BLOCK = 8
PAGES = SLOTS // BLOCK


class PerSequence(Prologue):
    """x [B, S, hidden], positions [3, B, S], caches [B, Hk, S_max, D]"""

    def split(self, qkv):
        q, k, v = qkv.split([64, 32, 32], -1)
        return tuple(part.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for part in (q, k, v))

    def consume(self, q, k, v, k_cache, v_cache):
        return self.o_proj(q.transpose(1, 2).flatten(2)) + k_cache.mean() + v_cache.sum()


class TokensFirst(PerSequence):
    """Caches [B, S_max, Hk, D]"""

    def split(self, qkv):
        return tuple(part.transpose(1, 2) for part in super().split(qkv))

    def angles(self, positions):
        return tuple(part.squeeze(1).unsqueeze(2) for part in super().angles(positions))

    def consume(self, q, k, v, k_cache, v_cache):
        return self.o_proj(q.flatten(2)) + k_cache.mean() + v_cache.sum()


def batch(shape, seq=5, slots=None):
    positions = torch.randperm(40)[: 3 * 2 * seq].view(3, 2, seq)
    slots = torch.randperm(32)[:seq] if slots is None else slots
    return torch.randn(2, seq, HIDDEN), positions, slots, *torch.randn(2, *shape)


HEADS_FIRST, SEQ_FIRST = (2, NUM_KV_HEADS, 32, HEAD_DIM), (3, 32, NUM_KV_HEADS, HEAD_DIM)

# --- slices -----------------------------------------------------------------------------------------------------------


class Rows(Prologue):
    def store(self, cache, slots, value):
        cache[7 : 7 + value.shape[0]] = value


class LastRows(Prologue):
    def store(self, cache, slots, value):
        cache[-value.shape[0] :] = value


class EveryOtherRow(Prologue):
    def store(self, cache, slots, value):
        cache[1 : 2 * value.shape[0] : 2] = value


class Narrowed(Prologue):
    def store(self, cache, slots, value):
        cache.narrow(0, 7, value.shape[0]).copy_(value)


class AllRows(Prologue):
    def store(self, cache, slots, value):
        cache[: value.shape[0]].copy_(value)


@pytest.mark.parametrize("model", [Rows, LastRows, EveryOtherRow, Narrowed, AllRows], ids=lambda cls: cls.__name__)
def test_slices_of_rows(model):
    report = assert_fuses(model(), arguments(), count=1)
    assert report.fused[0].reading["addressed_by"] == "slice"


class Slice(PerSequence):
    def store(self, cache, slots, value):
        cache[:, :, 7 : 7 + value.shape[2]] = value


class Llama(TokensFirst):
    """A cache for more sequences than there are."""

    def store(self, cache, slots, value):
        cache[: value.shape[0], 7 : 7 + value.shape[1]] = value


class SequencesInside(TokensFirst):
    """Caches [S_max, B, Hk, D]"""

    def store(self, cache, slots, value):
        cache[7 : 7 + value.shape[1], :2] = value.transpose(0, 1)


@pytest.mark.parametrize(
    ("model", "shape"), [(Slice, HEADS_FIRST), (Llama, SEQ_FIRST), (SequencesInside, (32, 3, NUM_KV_HEADS, HEAD_DIM))]
)
def test_slices_of_sequences(model, shape):
    assert_fuses(model(), batch(shape), count=1)


def test_one_row():
    class OneRow(PerSequence):
        def store(self, cache, slots, value):
            cache[:, :, 9] = value[:, :, 0]

    assert_fuses(OneRow(), batch(HEADS_FIRST, seq=1), count=1)


def test_a_slice_of_a_part():
    class Layer(PerSequence):
        """[layers, 2, B, Hk, S_max, D]"""

        def forward(self, x, positions, slots, kv_cache):
            return super().forward(x, positions, slots, *kv_cache[1])

        def store(self, cache, slots, value):
            cache[:, :, 3 : 3 + value.shape[2]] = value

    args = batch(HEADS_FIRST)
    assert_fuses(Layer(), (*args[:3], torch.randn(3, 2, *HEADS_FIRST)), count=1)


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_slice_from_a_number_that_changes(inner):
    """One graph for every start: it is part of the cache's offset."""

    class From(PerSequence):
        def norm(self, x, weight):
            return x  # an epsilon would be an input, too

        def store(self, cache, start, value):
            cache[:, :, start : start + value.shape[2]] = value

    args = *batch(HEADS_FIRST, slots=7)[:3], torch.randn(HEADS_FIRST), torch.randn(HEADS_FIRST)
    report = assert_fuses(From(), args, count=1, dynamic=True, inner=inner)
    assert report.fused[0].reading["addressed_by"] == "slice"


@pytest.mark.slow
def test_a_slice_is_stored_in_place():
    """Inductor's code allocates nothing of the cache's size."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    compiled = torch.compile(Slice(), backend="fx_fusion", options={"fx_fusion.kernel": "reference"})
    args = batch((2, NUM_KV_HEADS, 96, HEAD_DIM))
    with torch.no_grad():
        _, sources = run_and_get_code(compiled, *args)
    assert "qk_norm_rope_cache" in sources[-1]
    assert f"empty_strided_cpu((2, {NUM_KV_HEADS}, 96, {HEAD_DIM})" not in sources[-1]


def test_more_values_than_tokens_are_declined():
    class Broadcast(Prologue):
        def store(self, cache, slots, value):
            cache[7:12] = value[:1]

    assert_declines(Broadcast(), arguments(), code="store.layout")


def test_rows_in_another_order_are_declined():
    class Blocks(Prologue):
        """Pages filled whole: no one slot after the other."""

        def store(self, cache, slots, value):
            cache[:2] = value.unflatten(0, (2, 4))

    assert_declines(Blocks(), arguments(tokens=8, cache=(PAGES, 4, NUM_KV_HEADS, HEAD_DIM)), code="store.layout")


# --- scatter and index_copy -------------------------------------------------------------------------------------------


class Scattered(Prologue):
    def store(self, cache, slots, value):
        cache.scatter_(0, slots[:, None, None].expand_as(value), value)


class ScatteredHeadsFirst(PerSequence):
    def store(self, cache, slots, value):
        cache.scatter_(2, slots.view(1, 1, -1, 1).expand_as(value), value)


@pytest.mark.slow
def test_scatter():
    assert_fuses(Scattered(), arguments(), count=1)
    assert_fuses(ScatteredHeadsFirst(), batch(HEADS_FIRST), count=1)


def test_scatter_of_a_part_is_declined():
    class Part(Prologue):
        """Half of the lanes."""

        def store(self, cache, slots, value):
            cache.scatter_(0, slots[:, None, None].expand(-1, -1, HEAD_DIM // 2).expand(-1, NUM_KV_HEADS, -1), value)

    assert_declines(Part(), arguments(), code="store.layout")


def test_scatter_to_other_slots_for_each_head_is_declined():
    class PerHead(Prologue):
        def store(self, cache, slots, value):
            index = torch.stack([slots, slots + 1], 1)[..., None]
            cache.scatter_(0, index.expand_as(value), value)

    x, positions, slots, *caches = arguments()
    assert_declines(PerHead(), (x, positions, slots.clamp(max=SLOTS - 2), *caches), code="store.index")


# --- masks ------------------------------------------------------------------------------------------------------------


class Masked(Prologue):
    """Padding has slot -1, and no row of its own."""

    mask = staticmethod(lambda slots: slots >= 0)
    safe = staticmethod(lambda slots: slots)

    def store(self, cache, slots, value):
        place = self.safe(slots)
        cache[place] = torch.where(self.mask(slots)[:, None, None], value, cache[place])


class MaskedAndClamped(Masked):
    safe = staticmethod(lambda slots: slots.clamp(min=0))


class MaskedByGreater(MaskedAndClamped):
    mask = staticmethod(lambda slots: slots > -1)


class MaskedAndSelected(Masked):
    safe = staticmethod(lambda slots: torch.where(slots >= 0, slots, 0))


class KeptWhereNegative(Masked):
    def store(self, cache, slots, value):
        cache[slots] = torch.where((slots < 0)[:, None, None], cache[slots], value)


class MaskedByAnotherTest(Masked):
    """Whatever the mask is: here, slots below 5 are not stored either."""

    mask = staticmethod(lambda slots: slots >= 5)


class MaskedByEquality(Masked):
    """Here -2 counts from the end, and is stored."""

    mask = staticmethod(lambda slots: slots != -1)


def padded(shape=None, slots=None):
    """Two tokens are padding; their rows, which count from the end, are nobody else's."""
    x, positions, _, *caches = arguments(cache=shape)
    return x, positions, torch.tensor([9, -1, 5, -2, 3]) if slots is None else slots, *caches


BY_SIGN = [Masked, MaskedAndClamped, MaskedByGreater, MaskedAndSelected, KeptWhereNegative]


@pytest.mark.parametrize("model", [*BY_SIGN, MaskedByAnotherTest, MaskedByEquality], ids=lambda cls: cls.__name__)
def test_masked(model):
    report = assert_fuses(model(), padded(), count=1)
    assert report.fused[0].reading["masked"]
    # A mask that says what the slot's sign says leaves nothing to compute outside the call.
    assert model not in BY_SIGN or not report.fused[0].reading["index_arithmetic"]


@pytest.mark.parametrize("tokens", [[-1, -1, -1, -1, -1], [0, SLOTS - 1, -2, 1, 4 - SLOTS], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("model", [MaskedAndClamped, MaskedByAnotherTest])
def test_masked_at_the_ends(model, tokens):
    """Every token, none, and the first and the last slot; row 0 holds what a clamped slot would write."""
    slots = torch.tensor(tokens)
    if model is MaskedAndClamped and 0 in tokens and min(tokens) < 0:
        slots = slots + (slots >= 0)
        slots[slots == SLOTS] = 7
    assert_fuses(model(), padded(slots=slots), count=1)


@pytest.mark.slow
def test_masked_by_block_and_offset():
    class Paged(Prologue):
        def store(self, cache, slots, value):
            place = slots // BLOCK, slots % BLOCK
            cache[place] = torch.where((slots >= 0)[:, None, None], value, cache[place])

    assert_fuses(Paged(), padded((PAGES, BLOCK, NUM_KV_HEADS, HEAD_DIM)), count=1)
    assert_fuses(Paged(), padded((PAGES, BLOCK, NUM_KV_HEADS, HEAD_DIM)), count=1, inner="inductor")


def test_masked_by_a_mask_of_its_own():
    class Given(Prologue):
        def forward(self, x, positions, slots, k_cache, v_cache, mask):
            self.mask = mask
            return super().forward(x, positions, slots, k_cache, v_cache)

        def store(self, cache, slots, value):
            cache[slots] = torch.where(self.mask[:, None, None], value, cache[slots])

    args = padded(slots=torch.tensor([4, -3, 0, 7, -SLOTS + 9]))
    assert_fuses(Given(), (*args, torch.tensor([True, True, False, False, True])), count=1)


def test_masked_slices():
    class Given(Prologue):
        def store(self, cache, slots, value):
            rows = slice(7, 7 + value.shape[0])
            cache[rows] = torch.where((slots > 10)[:, None, None], value, cache[rows])

    assert_fuses(Given(), arguments(), count=1)


class MaskedByHead(Prologue):
    def store(self, cache, slots, value):
        mask = torch.arange(NUM_KV_HEADS) > 0
        cache[slots] = torch.where(mask[None, :, None] & (slots >= 0)[:, None, None], value, cache[slots])


class KeyMasked(Masked):
    def forward(self, x, positions, slots, k_cache, v_cache):
        self.masks = [lambda s: s >= 0, lambda s: s >= 1]
        return super().forward(x, positions, slots, k_cache, v_cache)

    def mask(self, slots):
        return self.masks.pop()(slots)


class PutsBackAnotherRow(Prologue):
    def store(self, cache, slots, value):
        cache[slots] = torch.where((slots >= 0)[:, None, None], value, cache[slots - 1])


@pytest.mark.parametrize(
    ("model", "code"),
    [(MaskedByHead, "store.mask"), (KeyMasked, "store.slots_differ"), (PutsBackAnotherRow, "proof.not_analytic")],
)
def test_other_masks_are_declined(model, code):
    assert_declines(model(), padded(), code=code)


def test_padding_in_a_dummy_row_stays_outside():
    class Dummy(Prologue):
        def store(self, cache, slots, value):
            cache[torch.where(slots < 0, SLOTS - 1, slots)] = value

    args = padded(slots=torch.tensor([9, 7, 5, -2, 3]))
    assert not assert_fuses(Dummy(), args, count=1).fused[0].reading["masked"]


def test_selected_tokens_break_the_graph_and_are_declined_by_name():
    class Selected(Prologue):
        def store(self, cache, slots, value):
            kept = slots >= 0
            cache[slots[kept]] = value[kept]

    assert_declines(Selected(), padded(), code="store.value_is_input")


# --- one tensor, two inputs -------------------------------------------------------------------------------------------


class Paged(Prologue):
    def store(self, cache, slots, value):
        cache[slots // BLOCK, slots % BLOCK] = value


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_two_views_of_one_tensor_as_inputs(inner):
    """[blocks, 2, block_size, Hk, D], of which the model gets kv[:, 0] and kv[:, 1]."""
    kv = torch.randn(PAGES, 2, BLOCK, NUM_KV_HEADS, HEAD_DIM)
    args = (*arguments()[:3], kv[:, 0], kv[:, 1])
    targets = {node.target for node in capture(Paged(), args).module.graph.nodes}
    assert torch.ops.aten.as_strided_scatter.default in targets
    assert_fuses(Paged(), args, count=1, inner=inner)


def test_a_slice_of_two_views_of_one_tensor():
    kv = torch.randn(SLOTS, NUM_KV_HEADS, 2 * HEAD_DIM)
    assert_fuses(Rows(), (*arguments()[:3], kv[..., :HEAD_DIM], kv[..., HEAD_DIM:]), count=1)


@pytest.mark.slow
def test_two_views_at_a_distance_known_at_run_time_are_declined():
    """Inductor copied one of them, and counted its offset twice."""

    class From(PerSequence):
        def norm(self, x, weight):
            return x

        def store(self, cache, start, value):
            cache[:, :, start : start + value.shape[2]] = value

    args = batch(HEADS_FIRST, slots=7)
    assert args[3].untyped_storage().data_ptr() == args[4].untyped_storage().data_ptr()
    assert_declines(From(), args, code="placement.shared_storage", dynamic=True)


# --- aiter's shuffle layout -------------------------------------------------------------------------------------------


class Shuffled(Prologue):
    """k [blocks, Hk, D / x, block_size, x], v [blocks, Hk, block_size / x, D, x]"""

    size, x = 16, 8

    def forward(self, x, positions, slots, k_cache, v_cache):
        self.stores = [self.store_value, self.store_key]
        return super().forward(x, positions, slots, k_cache, v_cache)

    def store(self, cache, slots, value):
        self.stores.pop()(cache, slots, value)

    def store_key(self, cache, slots, value):
        cache[slots // self.size, :, :, slots % self.size] = value.unflatten(-1, (-1, self.x))

    def store_value(self, cache, slots, value):
        offset = slots % self.size
        cache[slots // self.size, :, offset // self.x, :, offset % self.x] = value


def shuffled(dtype=torch.float32, size=16, x=8):
    keys = torch.zeros(SLOTS // size, NUM_KV_HEADS, HEAD_DIM // x, size, x)
    values = torch.zeros(SLOTS // size, NUM_KV_HEADS, size // x, HEAD_DIM, x)
    return *arguments()[:3], keys.to(dtype), values.to(dtype)


def test_shuffle_layout():
    assert_fuses(Shuffled(), shuffled(), count=1)
    x, positions, slots, *caches = shuffled()
    assert_fuses(Shuffled(), (x, positions, slots - SLOTS, *caches), count=1)


def test_shuffle_layout_of_float8():
    class Bytes(Shuffled):
        size, x = 32, 16

        def store(self, cache, slots, value):
            super().store(cache.view(torch.uint8), slots, (value / 0.02).to(cache.dtype).view(torch.uint8))

    assert_fuses(Bytes(), shuffled(torch.float8_e4m3fn, 32, 16), count=1)


class OtherGroup(Shuffled):
    def store_value(self, cache, slots, value):
        offset = slots % self.size
        cache[slots // self.size, :, offset % 2, :, offset // 2] = value


class OffByOne(Shuffled):
    def store_value(self, cache, slots, value):
        offset = (slots + 1) % self.size
        cache[slots // self.size, :, offset // self.x, :, offset % self.x] = value


@pytest.mark.parametrize("model", [OtherGroup, OffByOne])
def test_another_place_in_the_group_is_declined(model):
    assert_declines(model(), shuffled(), code="store.slots_differ")


# --- overlap ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (([(8, 32), (4, 1)], 0), ([(8, 32), (4, 1)], 4), False),
        (([(8, 32), (4, 1)], 0), ([(8, 32), (4, 1)], 3), True),
        (([(8, 32), (4, 1)], 0), ([(8, 32), (4, 1)], 32 * 8 - 4), False),
        (([(8, 32), (4, 1)], 0), ([(8, 32), (4, 1)], 32 * 7), True),
        (([(8, 64), (4, 2), (2, 8)], 0), ([(8, 64), (8, 4)], 32), False),
        (([(8, 64), (4, 2), (2, 8)], 0), ([(8, 64), (8, 4)], 12), True),
        (([(5, 0)], 3), ([(2, 1)], 2), True),
    ],
)
def test_overlap(first, second, expected):
    assert may_overlap(*first, *second) is expected
    assert may_overlap(*second, *first) is expected
