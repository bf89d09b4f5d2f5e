"""What the analysis costs, by counts: equal layers are measured once, and caches are never made."""

from __future__ import annotations

from dataclasses import dataclass

import prologue
import pytest
import torch
from prologue import Prologue
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from two_layers import Stack

import fx_fusion
from fx_fusion.fusion import REGISTRY
from fx_fusion.patterns.qk_norm_rope_cache.branch import split
from fx_fusion.patterns.qk_norm_rope_cache.branch import table_lookup as cos_sin_table
from fx_fusion.patterns.qk_norm_rope_cache.cache_store import conversion
from fx_fusion.patterns.qk_norm_rope_cache.cache_store import indices as cache_store
from fx_fusion.proof import evaluate, index_maps
from fx_fusion.proof import region_function as probe
from fx_fusion.testing import assert_fuses

EVALUATING = (probe, cache_store, conversion, cos_sin_table, split, index_maps)


class Allocations(TorchDispatchMode):
    """The operations on real tensors, and the bytes of the largest storage that one of them made."""

    def __init__(self):
        super().__init__()
        self.operations = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {_place(value) for value in tree_leaves((args, kwargs)) if _is_real(value)}
        made = [value for value in tree_leaves(result) if _is_real(value) and _place(value) not in given]
        self.operations += bool(made or given)
        self.largest = max([self.largest, *(value.untyped_storage().nbytes() for value in made)])
        return result


def _is_real(value):
    return type(value) in (torch.Tensor, torch.nn.Parameter) and value.device.type == "cpu"


def _place(value):
    return value.untyped_storage().data_ptr()


@dataclass(frozen=True)
class Cost:
    evaluations: int
    operations: int
    largest: int


class Watched:
    """A fusion as it is, watched while it reads. Around the whole pass no mode would do: it disables those."""

    def __init__(self, fusion, evaluations):
        self._fusion, self._evaluations = fusion, evaluations
        self.costs = []

    def __getattr__(self, name):
        return getattr(self._fusion, name)

    def read(self, analysis, candidate, memo):
        before = len(self._evaluations)
        try:
            with Allocations() as allocations:
                return self._fusion.read(analysis, candidate, memo)
        finally:
            made = len(self._evaluations) - before
            self.costs.append(Cost(made, allocations.operations, allocations.largest))


@pytest.fixture
def watched(monkeypatch):
    """The built-in fusion; its `costs` are those of each layer read."""
    evaluations = []

    def counted(outputs, *args, **kwargs):
        evaluations.append(outputs)
        return evaluate.evaluate(outputs, *args, **kwargs)

    for module in EVALUATING:
        monkeypatch.setattr(module, "evaluate", counted)
    before = tuple(REGISTRY)
    fusion = Watched(before[0], evaluations)
    REGISTRY.replace([fusion])
    yield fusion
    REGISTRY.replace(before)


def stack(*layers):
    """Layers of one model: they share the table, the positions and the slots."""
    for layer in layers:
        layer.cos_sin_cache = layers[0].cos_sin_cache
    x, positions, slots, *caches = prologue.arguments()
    return Stack(*layers), (x, positions, slots, *(cache.clone() for _ in layers for cache in caches))


@pytest.mark.slow
def test_equal_layers_are_measured_once(watched):
    costs = {}
    for count in (1, 7):
        watched.costs.clear()
        model, arguments = stack(*(Prologue() for _ in range(count)))
        report = fx_fusion.explain(model, *arguments)
        assert len(report.recognised) == count == len(watched.costs), str(report)
        costs[count] = list(watched.costs)
    (alone,) = costs[1]
    assert alone.evaluations > 0
    assert costs[7] == [alone] + [Cost(evaluations=0, operations=0, largest=0)] * 6


# --- stores that are nearly equal -----------------------------------------------------------------------------------


class OtherSlots(Prologue):
    def store(self, cache, slots, value):
        super().store(cache, slots.flip(0) - 1, value)


class LaterSlots(Prologue):
    def store(self, cache, slots, value):
        super().store(cache[1:], slots, value)


def same(cache):
    return cache


def lanes_first(cache):
    return cache.mT.contiguous().mT


@pytest.mark.parametrize(
    ("second", "relaid"),
    [
        (Prologue, same),
        (OtherSlots, same),
        (LaterSlots, lambda cache: torch.cat([cache, cache[:1]])),
        (Prologue, lanes_first),
        (Prologue, torch.Tensor.half),
        (Prologue, torch.Tensor.double),
    ],
    ids=["equal", "slots", "offset", "strides", "half", "double"],
)
def test_a_store_is_not_taken_for_the_one_before(second, relaid):
    """The same projection, norm and rotation in both layers; what differs is where the second stores, or as what."""
    model, (x, positions, slots, *caches) = stack(Prologue(), second())
    arguments = (x, positions, slots, *caches[:2], *map(relaid, caches[2:]))
    assert_fuses(model, arguments, count=2)


# --- memory ---------------------------------------------------------------------------------------------------------


class Paged(Prologue):
    def store(self, cache, slots, value):
        cache[slots // 16, slots % 16] = value


class PerSequence(Prologue):
    """x [B, S, hidden], positions [3, B, S], slots [S], caches [B, Hk, S, D]"""

    def split(self, qkv):
        return tuple(part.unflatten(-1, (-1, prologue.HEAD_DIM)).transpose(1, 2) for part in qkv.split(widths(), -1))

    def store(self, cache, slots, value):
        cache[:, :, slots] = value

    def consume(self, q, k, v, k_cache, v_cache):
        return self.o_proj(q.transpose(1, 2).flatten(2))


def widths():
    return [count * prologue.HEAD_DIM for count in (prologue.NUM_HEADS, prologue.NUM_KV_HEADS, prologue.NUM_KV_HEADS)]


@pytest.fixture
def full_width(monkeypatch):
    """64 heads of queries, 8 of keys and values, of 128 lanes."""
    sizes = {"NUM_HEADS": 64, "NUM_KV_HEADS": 8, "HEAD_DIM": 128, "SECTION": (24, 20, 20), "POSITIONS": 1 << 16}
    for name, size in sizes.items():
        monkeypatch.setattr(prologue, name, size)


def explained(cls, grid, slots, cache):
    """On the meta device, where nothing is allocated but by the readers."""
    with torch.device("meta"):
        model, x, positions = cls(), torch.empty(*grid, prologue.HIDDEN), torch.empty(3, *grid, dtype=torch.int64)
        stored = torch.empty(slots, dtype=torch.int64), torch.empty(cache), torch.empty(cache)
    return fx_fusion.explain(model, x, positions, *stored)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "grid", "slots", "cache"),
    [(Paged, (32,), 32, (60000, 16, 8, 128)), (PerSequence, (32, 1), 1, (32, 8, 32768, 128))],
)
def test_no_cache_is_made(watched, full_width, cls, grid, slots, cache):
    report = explained(cls, grid, slots, cache)
    assert len(report.recognised) == 1, str(report)
    projected = 32 * sum(widths()) * torch.float64.itemsize
    assert 0 < watched.costs[0].largest <= 2 * projected


class ToAndFro(Prologue):
    """Tokens move to other places and back: a few of them do not stand for all."""

    def norm(self, x, weight):
        return super().norm(x, weight).roll(1, 0).roll(-1, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "state", "code"), [(Prologue, "recognised", "contract.kernel"), (ToAndFro, "declined", "region.too_large")]
)
def test_no_tensor_exceeds_the_bound(watched, full_width, monkeypatch, cls, state, code):
    """A bound that the region of 256 tokens is beyond, and its copy of a few tokens is not."""
    bound = 30 << 20
    monkeypatch.setattr(evaluate, "MEMORY_BOUND", bound)
    report = explained(cls, (256,), 256, (60000, 8, 128))
    assert [(layer.state, layer.code) for layer in report.layers] == [(state, code)], str(report)
    assert 0 < watched.costs[0].largest <= bound
