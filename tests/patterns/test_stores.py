"""Where each element lands: cache layouts, dtypes and index forms."""

from __future__ import annotations

import pytest
import torch
from prologue import HEAD_DIM, NUM_KV_HEADS, SLOTS, Prologue, arguments

from fx_fusion.config import Config
from fx_fusion.fusion_pass import apply
from fx_fusion.mutation.mutants import capture
from fx_fusion.testing import assert_declines, assert_fuses

BLOCK = 8
PAGES = SLOTS // BLOCK


class Flat(Prologue):
    """[slots, Hk * D]"""

    shape = (SLOTS, NUM_KV_HEADS * HEAD_DIM)

    def store(self, cache, slots, value):
        cache[slots] = value.flatten(1)


class PagedNHD(Prologue):
    """[blocks, block_size, Hk, D], a slot"""

    shape = (PAGES, BLOCK, NUM_KV_HEADS, HEAD_DIM)

    def store(self, cache, slots, value):
        cache.view(-1, NUM_KV_HEADS, HEAD_DIM)[slots] = value


class PagedNHDByBlock(PagedNHD):
    """[blocks, block_size, Hk, D], a block and an offset"""

    def store(self, cache, slots, value):
        cache[slots // BLOCK, slots % BLOCK] = value


class PagedHND(Prologue):
    """[blocks, Hk, block_size, D]"""

    shape = (PAGES, NUM_KV_HEADS, BLOCK, HEAD_DIM)

    def store(self, cache, slots, value):
        cache[slots // BLOCK, :, slots % BLOCK] = value


class LanesOutside(Prologue):
    """[Hk, D, slots]: lanes far apart"""

    shape = (NUM_KV_HEADS, HEAD_DIM, SLOTS)

    def store(self, cache, slots, value):
        cache.permute(2, 0, 1)[slots] = value


class ByIndexPut(Prologue):
    shape = (SLOTS, NUM_KV_HEADS, HEAD_DIM)

    def store(self, cache, slots, value):
        cache.index_put_((slots,), value)


class ByIndexCopy(Prologue):
    shape = (SLOTS, NUM_KV_HEADS, HEAD_DIM)

    def store(self, cache, slots, value):
        cache.index_copy_(0, slots, value)


class NegativeSlots(Prologue):
    """PyTorch counts a negative index from the end, and so must the call."""

    shape = (SLOTS, NUM_KV_HEADS, HEAD_DIM)

    def store(self, cache, slots, value):
        cache[slots - SLOTS] = value


LAYOUTS = [Flat, PagedNHD, PagedNHDByBlock, PagedHND, LanesOutside, ByIndexPut, ByIndexCopy, NegativeSlots]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda cls: cls.__name__)
def test_layouts(layout):
    assert_fuses(layout(), arguments(cache=layout.shape), count=1)


def test_reads_a_block_and_an_offset():
    report = assert_fuses(PagedHND(), arguments(cache=PagedHND.shape), count=1)
    read = report.fused[0].reading
    assert read["addressed_by"] == "block and offset"
    assert read["cache_size"] == [str(size) for size in (PAGES, BLOCK, NUM_KV_HEADS, HEAD_DIM)]
    strides = (NUM_KV_HEADS * BLOCK * HEAD_DIM, HEAD_DIM, BLOCK * HEAD_DIM, 1)
    assert read["cache_stride"] == [str(stride) for stride in strides]


def test_cache_in_another_dtype():
    x, positions, slots, k_cache, v_cache = arguments()
    assert_fuses(Prologue(), (x, positions, slots, k_cache.half(), v_cache.half()), count=1)


@pytest.mark.slow
def test_cache_that_is_a_slice_of_a_larger_tensor():
    x, positions, slots, *_ = arguments()
    keys, values = torch.randn(3, SLOTS, NUM_KV_HEADS, HEAD_DIM), torch.randn(3, SLOTS, NUM_KV_HEADS, HEAD_DIM)
    assert_fuses(Prologue(), (x, positions, slots, keys[1], values[2]), count=1)
    assert_fuses(Prologue(), (x, positions, slots, keys[1], values[2]), count=1, inner="inductor")


def test_cache_with_gaps_between_heads():
    x, positions, slots, *_ = arguments()
    keys, values = (torch.randn(SLOTS, NUM_KV_HEADS, 2 * HEAD_DIM)[..., HEAD_DIM:] for _ in range(2))
    assert_fuses(Prologue(), (x, positions, slots, keys, values), count=1)
    assert_fuses(Prologue(), (x, positions, slots, keys, values), count=1, inner="inductor")


class Accumulates(Prologue):
    def store(self, cache, slots, value):
        cache.index_put_((slots,), value, accumulate=True)


class Masked(Prologue):
    def store(self, cache, slots, value):
        cache[slots >= 0] = value


class SlotsDiffer(Prologue):
    def forward(self, x, positions, slots, k_cache, v_cache):
        self.calls = 0
        return super().forward(x, positions, slots, k_cache, v_cache)

    def store(self, cache, slots, value):
        self.calls += 1
        cache[slots if self.calls == 1 else slots.flip(0)] = value


class HeadsSwapped(Prologue):
    """Heads are stored in the order of lanes: not the heads of one token, side by side."""

    def store(self, cache, slots, value):
        cache[slots] = value.flip(1)


class Broadcast(Prologue):
    def store(self, cache, slots, value):
        cache[slots] = value[:1]


class OldCacheRead(Prologue):
    """Something reads the cache from before the store, after it."""

    def forward(self, x, positions, slots, k_cache, v_cache):
        before = k_cache.clone()
        out = super().forward(x, positions, slots, k_cache, v_cache)
        return out, before * 2


class OnlyKeys(Prologue):
    def forward(self, x, positions, slots, k_cache, v_cache):
        q, k, _ = self.split(self.project(x))
        cos, sin = self.angles(positions)
        k = self.rotate(self.norm(k, self.k_weight), cos, sin)
        self.store(k_cache, slots, k)
        return self.rotate(self.norm(q, self.q_weight), cos, sin)


@pytest.mark.parametrize(
    ("cls", "code"),
    [
        (Accumulates, "store.accumulates"),
        (SlotsDiffer, "store.slots_differ"),
        (HeadsSwapped, "store.layout"),
        (Broadcast, "store.value_broadcast"),
        (OldCacheRead, "store.old_cache_read"),
        (OnlyKeys, "store.unpaired"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_declines(cls, code):
    report = assert_declines(cls(), arguments(), code=code)
    layer = next(layer for layer in report.declined if layer.code == code)
    assert layer.reason
    assert ".py:" in (layer.source or "")


def test_declines_a_mask_as_index():
    x, positions, _, *_ = arguments(tokens=5)
    k_cache, v_cache = torch.randn(2, 5, NUM_KV_HEADS, HEAD_DIM)
    assert_declines(Masked(), (x, positions, torch.arange(5), k_cache, v_cache), code="store.index")


# --- keys and values in one tensor --------------------------------------------------------------------------------


class OneTensor(Prologue):
    """One input holds both caches; `parts` takes them out."""

    def forward(self, x, positions, slots, kv_cache):
        return super().forward(x, positions, slots, *self.parts(kv_cache))

    def parts(self, kv_cache):
        raise NotImplementedError


class FirstDimension(OneTensor):
    """[2, blocks, block_size, Hk, D], a slot"""

    shape = (2, PAGES, BLOCK, NUM_KV_HEADS, HEAD_DIM)

    def parts(self, kv_cache):
        return kv_cache.unbind(0)

    def store(self, cache, slots, value):
        cache.view(-1, NUM_KV_HEADS, HEAD_DIM)[slots] = value


class SecondDimension(OneTensor):
    """[blocks, 2, block_size, Hk, D], a block and an offset"""

    shape = (PAGES, 2, BLOCK, NUM_KV_HEADS, HEAD_DIM)

    def parts(self, kv_cache):
        return kv_cache[:, 0], kv_cache[:, 1]

    def store(self, cache, slots, value):
        cache[slots // BLOCK, slots % BLOCK] = value


class ValuesFirst(SecondDimension):
    def parts(self, kv_cache):
        return kv_cache[:, 1], kv_cache[:, 0]


class AsRows(FirstDimension):
    """The tensor is first seen as [2, slots, Hk, D]."""

    def parts(self, kv_cache):
        return kv_cache.view(2, -1, NUM_KV_HEADS, HEAD_DIM).unbind(0)

    def store(self, cache, slots, value):
        cache[slots] = value


class SideBySide(OneTensor):
    """[blocks, Hk, block_size, 2 * D]: the lanes of a key, then those of a value"""

    shape = (PAGES, NUM_KV_HEADS, BLOCK, 2 * HEAD_DIM)

    def parts(self, kv_cache):
        return kv_cache[..., :HEAD_DIM], kv_cache[..., HEAD_DIM:]

    def store(self, cache, slots, value):
        cache[slots // BLOCK, :, slots % BLOCK] = value


def one_tensor_arguments(model):
    return *arguments()[:3], torch.randn(model.shape)


@pytest.mark.slow
@pytest.mark.parametrize("model", [FirstDimension, SecondDimension, ValuesFirst, SideBySide])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_keys_and_values_in_one_tensor(model, inner):
    report = assert_fuses(model(), one_tensor_arguments(model), count=1, inner=inner)
    assert len(report.fused) == 1


def test_a_tensor_of_both_in_another_shape():
    assert_fuses(AsRows(), one_tensor_arguments(AsRows), count=1)


def test_a_tensor_of_both_with_its_dimensions_in_another_order_is_declined():
    class Transposed(AsRows):
        shape = (SLOTS, 2, NUM_KV_HEADS, HEAD_DIM)

        def parts(self, kv_cache):
            return kv_cache.transpose(0, 1)[0], kv_cache.transpose(0, 1)[1]

    report = assert_declines(Transposed(), one_tensor_arguments(Transposed), code="store.cache_not_viewable")
    assert report.declined[0].reason.endswith("_1 with its dimensions in another order")


def test_attention_reads_what_was_stored():
    class Attends(FirstDimension):
        def consume(self, q, k, v, k_cache, v_cache):
            return self.o_proj(q.flatten(1)) + k_cache.mean() + 2 * v_cache.mean()

    assert_fuses(Attends(), one_tensor_arguments(Attends), count=1)


def test_layers_in_one_tensor():
    """[layers, 2, slots, Hk, D]"""

    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Prologue() for _ in range(3)])

        def forward(self, x, positions, slots, kv_cache):
            for layer, (k_cache, v_cache) in zip(self.layers, kv_cache.unbind(0), strict=True):
                x = x + layer(x, positions, slots, k_cache, v_cache) + k_cache.mean()
            return x

    cache = torch.randn(3, 2, SLOTS, NUM_KV_HEADS, HEAD_DIM)
    assert_fuses(Layers(), (*arguments()[:3], cache), count=3)


def test_a_value_that_is_read_between_the_stores_is_declined():
    class Between(FirstDimension):
        def forward(self, x, positions, slots, kv_cache):
            q, k, v = self.split(self.project(x))
            cos, sin = self.angles(positions)
            q = self.rotate(self.norm(q, self.q_weight), cos, sin)
            k = self.rotate(self.norm(k, self.k_weight), cos, sin)
            k_cache, v_cache = self.parts(kv_cache)
            self.store(k_cache, slots, k)
            old = v_cache.sum()
            self.store(v_cache, slots, v)
            return self.o_proj(q.flatten(1)) + old

    assert_declines(Between(), one_tensor_arguments(Between), code="store.old_cache_read")


def test_a_part_that_goes_elsewhere_is_declined():
    class Elsewhere(FirstDimension):
        def forward(self, x, positions, slots, kv_cache):
            q, k, v = self.split(self.project(x))
            cos, sin = self.angles(positions)
            q = self.rotate(self.norm(q, self.q_weight), cos, sin)
            k = self.rotate(self.norm(k, self.k_weight), cos, sin)
            stored = kv_cache[0].view(-1, NUM_KV_HEADS, HEAD_DIM).index_put((slots,), k)
            kv_cache.copy_(torch.select_scatter(kv_cache, stored.view(kv_cache[0].shape), 0, 1))
            stored = kv_cache[0].view(-1, NUM_KV_HEADS, HEAD_DIM).index_put((slots,), v)
            kv_cache.copy_(torch.select_scatter(kv_cache, stored.view(kv_cache[0].shape), 0, 0))
            return self.o_proj(q.flatten(1))

    assert_declines(Elsewhere(), one_tensor_arguments(Elsewhere), code="store.cache_not_viewable")


@pytest.mark.parametrize("model", [FirstDimension, SideBySide])
def test_a_tensor_of_both_is_not_copied(model):
    """Inductor stores in place: the code that it writes allocates nothing of the cache's size."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    compiled = torch.compile(model(), backend="fx_fusion", options={"fx_fusion.kernel": "reference"})
    with torch.no_grad():
        _, sources = run_and_get_code(compiled, *one_tensor_arguments(model))
    shape = tuple(model.shape)
    assert "qk_norm_rope_cache" in sources[-1]
    assert f"empty_strided_cpu({shape}" not in sources[-1]


def test_declines_a_view_that_holds_an_element_twice():
    """An expanded cache: what is written at one slot of the value stands for every slot of the cache."""
    graph = capture(Prologue(), arguments()).module.graph
    writer = next(node for node in graph.nodes if node.target is torch.ops.aten.index_put.default)
    cache = writer.args[0]
    with graph.inserting_before(writer):
        view = graph.call_function(torch.ops.aten.slice.Tensor, (cache, 0, 0, 1))
        expanded = graph.call_function(torch.ops.aten.expand.default, (view, list(cache.meta["val"].shape)))
    with cache.meta["val"].fake_mode:
        view.meta["val"] = cache.meta["val"][:1]
        expanded.meta["val"] = view.meta["val"].expand(cache.meta["val"].shape)
    writer.replace_input_with(cache, expanded)
    report = apply(graph, Config(kernel="reference"))
    assert not report.fused
    assert report.layers[0].code == "store.cache_not_viewable"
