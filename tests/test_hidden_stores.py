"""Stores whose cache and slots are not in the graph: an operation finds them by a layer's name when it runs."""

from __future__ import annotations

import contextlib
import operator

import pytest
import torch
from prologue import HEAD_DIM, HIDDEN, NUM_HEADS, NUM_KV_HEADS, Prologue
from torch import Tensor, nn

import fx_fusion
from fx_fusion.decline import Decline
from fx_fusion.graph.operations import value_of
from fx_fusion.observer import Observer
from fx_fusion.patterns.qk_norm_rope_cache.fusion import QkNormRopeCache
from fx_fusion.semantics.hidden_stores import (
    HiddenStore,
    Named,
    declare_hidden_store,
    fingerprint,
    withdraw_hidden_store,
)
from fx_fusion.trace import compile_eager

ROWS = 64
#: Of each layer by name: keys, values and slots, as an engine holds them.
CACHES: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
CALLS: list[str] = []


def _store(key: Tensor, value: Tensor, layer: str) -> Tensor:
    k_cache, v_cache, slots = CACHES[layer]
    CALLS.append("store")
    kept = slots >= 0
    k_cache[slots[kept]] = key[kept]
    v_cache[slots[kept]] = value[kept]
    return key.new_empty(0)


def _attend(query: Tensor, key: Tensor, layer: str, done: Tensor) -> Tensor:
    """Reads the cache alone."""
    k_cache, v_cache, _ = CACHES[layer]
    k_cache, v_cache = (cache.repeat_interleave(NUM_HEADS // NUM_KV_HEADS, 1) for cache in (k_cache, v_cache))
    scores = torch.einsum("thd,shd->hts", query, k_cache) / HEAD_DIM**0.5
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v_cache).contiguous()


def _named(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    positions: Tensor, layer: str, eps: float, axes: list[int], return_k: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    k_cache, v_cache, slots = CACHES[layer]
    CALLS.append("named" if return_k else "named, no key")
    out = fx_fusion.qk_norm_rope_cache(
        q, k, v, q_weight, k_weight, cos, sin, positions, slots[None], None, k_cache[None], v_cache[None],
        q_eps=eps, k_eps=eps, rotary_dim=HEAD_DIM, axes=axes, skip_negative_slots=True, return_k=return_k,
    )  # fmt: skip
    return *out, k.new_empty(0)


def _fake_named(q, k, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape if rest[-1] else (0,)), k.new_empty(0)


@pytest.fixture(scope="module")
def operations():
    library = torch.library.Library("behind", "DEF")
    library.define("store(Tensor key, Tensor value, str layer) -> Tensor")
    library.define("attend(Tensor query, Tensor key, str layer, Tensor done) -> Tensor")
    library.define(
        "named(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, Tensor? "
        "positions, str layer, float eps, int[] axes, bool return_k) -> (Tensor, Tensor, Tensor)"
    )
    for name, function, fake in (
        ("store", _store, lambda key, value, layer: key.new_empty(0)),
        ("attend", _attend, lambda query, *rest: query.new_empty(query.shape)),
        ("named", _named, _fake_named),
    ):
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"behind::{name}", fake, lib=library)
    yield
    library._destroy()


def _insert(emit, store, fused) -> Named:
    names = ("q", "k", "v", "q_weight", "k_weight", "cos", "sin", "positions")
    tensors = [fused.tensors[name] for name in names]
    options = [fused.options[name] for name in ("q_eps", "axes", "return_k")]
    q, k = value_of(fused.node)[:2]
    with q.fake_mode:
        done = k.new_empty(0)
    op = torch.ops.behind.named.default
    call = emit.call_with_value((q, k, done), op, *tensors, store.arguments["layer"], *options)
    parts = [emit.call(operator.getitem, call, i) for i in range(3)]
    return Named(parts[0], parts[1], (parts[2],))


def _unread(store) -> list:
    return [user for user in store.node.users if user.target is torch.ops.behind.attend.default]


@pytest.fixture(params=[True, False], ids=["cache only", "fresh key"])
def declared(request, operations):
    unread = _unread if request.param else lambda store: ()
    declare_hidden_store(HiddenStore("behind::store", "key", "value", _insert, unread))
    yield request.param
    withdraw_hidden_store("behind::store")


class Layer(Prologue):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = self.split(self.project(x))
        cos, sin = self.angles(positions)
        q = self.rotate(self.norm(q, self.q_weight), cos, sin)
        k = self.rotate(self.norm(k, self.k_weight), cos, sin)
        done = torch.ops.behind.store(k, v, self.name)
        attended = torch.ops.behind.attend(q, key=self.read(k), layer=self.name, done=done)
        return x + self.o_proj(attended.flatten(1))

    def read(self, key: Tensor) -> Tensor:
        return key


class Model(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(f"layers.{i}") for i in range(layers))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, positions)
        return x


def _caches(layers: int, tokens: int) -> None:
    CACHES.clear()
    for i in range(layers):
        generator = torch.Generator().manual_seed(i)
        slots = torch.randperm(ROWS, generator=generator)[:tokens]
        slots[1] = -1
        shape = (ROWS, NUM_KV_HEADS, HEAD_DIM)
        CACHES[f"layers.{i}"] = *(torch.randn(shape, generator=generator) for _ in range(2)), slots


def _arguments(tokens: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, HIDDEN), torch.randperm(40)[: 3 * tokens].view(3, tokens)


class Watched(Observer):
    """The graph before and after the pass."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def starts(self, graph) -> None:
        self.texts.append(str(graph))

    def ends(self, graph, report) -> None:
        graph.lint()
        self.texts.append(str(graph))


def _run(model, inputs, *, dynamic: bool = False, inductor: bool = False):
    """The result and every cache, of the model as it is and compiled; what was seen; what the compiled model called."""
    watched = Watched()
    config = fx_fusion.Config(kernel="reference", strict=True)
    tokens = inputs[0].shape[0]
    for dim, each in enumerate(inputs) if dynamic else ():
        torch._dynamo.mark_dynamic(each, dim)
    with torch.no_grad():
        _caches(len(model.layers), tokens)
        wanted = model(*inputs), [cache.clone() for each in CACHES.values() for cache in each]
        _caches(len(model.layers), tokens)
        CALLS.clear()
        if inductor:
            options = {"post_grad_custom_post_pass": fx_fusion.FusionPass(config, observer=watched)}
            compiled = torch.compile(model, options=options)
        else:
            compiled = torch.compile(model, backend=lambda *given: compile_eager(*given, config, watched))
        got = compiled(*inputs), [cache for each in CACHES.values() for cache in each]
    torch.testing.assert_close(got, wanted)
    return watched, list(CALLS)


@pytest.mark.parametrize("way", ["static", "dynamic", "inductor"])
def test_every_layer_is_one_call(declared, way):
    watched, calls = _run(Model(), _arguments(), dynamic=way == "dynamic", inductor=way == "inductor")
    report = fx_fusion.last_report()
    assert len(report.fused) == 3 and report.stores == 6, report
    assert calls == ["named, no key" if declared else "named"] * 3
    assert "hidden" not in watched.texts[1] and "behind.store" not in watched.texts[1]
    assert "cache by a layer's name, some tokens masked" in report.fused[0].read


def test_without_a_declaration_nothing_changes(operations):
    watched, calls = _run(Model(1), _arguments())
    assert calls == ["store"] and watched.texts[0] == watched.texts[1]
    assert not fx_fusion.last_report().fused


@contextlib.contextmanager
def refused(monkeypatch, *numbers: int):
    """The candidates with these numbers are declined."""
    read, seen = QkNormRopeCache.read, []

    def counted(self, facts, candidate, memo):
        seen.append(candidate)
        if len(seen) - 1 in numbers:
            raise Decline("graph.fuel", "a test refuses it")
        return read(self, facts, candidate, memo)

    with monkeypatch.context() as patch:
        patch.setattr(QkNormRopeCache, "read", counted)
        yield


def test_what_is_not_fused_is_undone_node_for_node(declared, monkeypatch):
    with refused(monkeypatch, 0, 1, 2):
        watched, calls = _run(Model(), _arguments())
    assert watched.texts[0] == watched.texts[1]
    assert calls == ["store"] * 3


def test_some_layers_are_fused_and_others_undone(declared, monkeypatch):
    with refused(monkeypatch, 1):
        _, calls = _run(Model(), _arguments())
    assert [call.partition(",")[0] for call in calls] == ["named", "store", "named"]


def test_a_key_that_is_read_elsewhere_is_returned(declared, monkeypatch):
    """Only who is said to read the cache alone is kept from the key."""
    monkeypatch.setattr(Layer, "read", lambda self, key: key * 1.0)
    _, calls = _run(Model(), _arguments())
    assert calls == ["named"] * 3


def test_the_fusion_without_a_store_serves_what_is_undone(declared, monkeypatch):
    """Norm and rotation of such a layer may be replaced by another fusion: the store reads what that leaves."""
    handle = fx_fusion.register_fusion(fx_fusion.QkNormRope())
    try:
        with refused(monkeypatch, 0):
            _, calls = _run(Model(1), _arguments())
    finally:
        handle.remove()
    assert calls == ["store"]


def test_a_value_of_another_shape_is_left_alone(declared, monkeypatch):
    """Values of fewer lanes than keys are stored by the operation itself."""
    _, calls = _run(Narrow(), _arguments())
    assert calls == ["store"]


class Narrow(Model):
    def __init__(self) -> None:
        super().__init__(1)
        self.layers[0] = NarrowLayer("layers.0")


class NarrowLayer(Layer):
    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        q, k, v = super().split(qkv)
        return q, k, v.reshape(v.shape[0], 1, -1).expand(-1, NUM_KV_HEADS, -1)[..., ::2].contiguous()


def test_a_declaration_changes_the_key_of_the_caches(operations):
    before = fingerprint()
    declare_hidden_store(HiddenStore("behind::store", "key", "value", _insert))
    during = fingerprint(), fx_fusion.FusionPass(fx_fusion.Config(kernel="reference")).uuid()
    withdraw_hidden_store("behind::store")
    assert before != during[0] and fingerprint() == before
    assert fx_fusion.FusionPass(fx_fusion.Config(kernel="reference")).uuid() != during[1]
