"""Opaque stores into caches as engines keep them: keys and values, or all layers, in one tensor."""

from __future__ import annotations

import math
import re

import pytest
import torch
from prologue import EPS, HEAD_DIM, HIDDEN, NUM_HEADS, NUM_KV_HEADS, SECTION, Prologue, arguments
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import fx_fusion
from fx_fusion.testing import assert_declines, assert_fuses, run

BLOCKS, BLOCK_SIZE = 8, 8


pytestmark = pytest.mark.usefixtures("libraries")


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """The graphs that the pass leaves."""
    seen: list[torch.fx.Graph] = []
    usual = fx_fusion.fusion_pass.apply

    def observed(graph, config, **options):
        report = usual(graph, config, **options)
        seen.append(graph)
        return report

    monkeypatch.setattr(fx_fusion.fusion_pass, "apply", observed)
    return seen


# --- keys and values in one tensor, as vLLM keeps them ----------------------------------------------------------------


class OneTensor(Prologue):
    """`views` takes the key's and the value's cache out of one tensor, or out of its part for this layer."""

    def __init__(self, views, layer: int | None = None) -> None:
        super().__init__()
        self.views, self.layer = views, layer

    def forward(self, x, positions, slots, kv_cache):
        q, k, v = self.split(self.project(x))
        cos, sin = self.angles(positions)
        q = self.rotate(self.norm(q, self.q_weight), cos, sin)
        k = self.rotate(self.norm(k, self.k_weight), cos, sin)
        caches = self.views(kv_cache if self.layer is None else kv_cache[self.layer])
        self.put(k, v, *caches, slots)
        return self.o_proj(q.flatten(1))

    def put(self, k, v, k_cache, v_cache, slots):
        scale = torch.ones(())
        torch.ops._C_cache_ops.reshape_and_cache_flash(k, v, k_cache, v_cache, slots, "auto", scale, scale)


class Clamped(OneTensor):
    """Not fused."""

    def norm(self, x, weight):
        return super().norm(x, weight).clamp(-8, 8)


class Layers(torch.nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x, positions, slots, kv_cache):
        for layer in self.layers:
            x = x + layer(x, positions, slots, kv_cache)
        return x


NHD = (BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
HND = (NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)

#: How the caches are taken out, and the shape of the tensor.
VIEWS = {
    "unbind": (lambda kv: kv.unbind(0), (2, BLOCKS, *NHD)),
    "unbind blocks first": (lambda kv: kv.unbind(1), (BLOCKS, 2, *NHD)),
    "index": (lambda kv: (kv[0], kv[1]), (2, BLOCKS, *NHD)),
    "index blocks first": (lambda kv: (kv[:, 0], kv[:, 1]), (BLOCKS, 2, *NHD)),
    "chunk": (lambda kv: [part.squeeze(0) for part in kv.chunk(2)], (2, BLOCKS, *NHD)),
    "value first": (lambda kv: kv.unbind(0)[::-1], (2, BLOCKS, *NHD)),
    "heads first": (lambda kv: [part.transpose(1, 2) for part in kv.unbind(1)], (BLOCKS, 2, *HND)),
    "lanes": (lambda kv: kv.chunk(2, -1), (BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, 2 * HEAD_DIM)),
}


def given(shape, layers: int = 0) -> tuple[Tensor, ...]:
    """One token is padding."""
    x, positions, slots, *_ = arguments()
    slots[1] = -1
    return x, positions, slots, torch.randn([layers, *shape] if layers else shape)


def fuses_bit_for_bit(model, args, count: int, graphs, **options):
    """The result is eager's, the cache bit for bit, each fused layer is one call, and its operation is gone."""
    outcome = run(model, args, **options)
    report = outcome.report
    calls = str(graphs[-1]).count("fx_fusion.qk_norm_rope_cache.default")
    assert len(report.fused) == calls == count, report
    assert str(graphs[-1]).count("reshape_and_cache_flash.default") == len(report.layers) - count
    expected = [tensor.clone() for tensor in args]
    with torch.no_grad():
        torch.testing.assert_close(outcome.outputs, model(*expected))
    assert not torch.equal(expected[-1], args[-1])
    assert torch.equal(outcome.state[1][-1], expected[-1])
    return report


def one_tensor(name: str, v2: bool, graphs):
    views, shape = VIEWS[name]
    with torch._inductor.config.patch(enable_auto_functionalized_v2=v2):
        return fuses_bit_for_bit(OneTensor(views), given(shape), 1, graphs)


@pytest.mark.parametrize("name", VIEWS)
def test_keys_and_values_in_one_tensor(name, graphs):
    report = one_tensor(name, True, graphs)
    assert report.fused[0].reading["masked"]
    assert "reshape_and_cache_flash" in report.fused[0].assumed[0] and "compared on cpu" in report.fused[0].assumed[0]


@pytest.mark.parametrize("name", ["unbind", "index blocks first", "heads first"])
def test_keys_and_values_in_one_tensor_as_functionalised_by_vllm(name, graphs):
    one_tensor(name, False, graphs)


@pytest.mark.parametrize(("name", "v2"), [("unbind", True), ("unbind", False), ("heads first", True)])
def test_all_layers_in_one_tensor(name, v2, graphs):
    """The layer between two fused ones keeps its operation."""
    views, shape = VIEWS[name]
    model = Layers(OneTensor(views, 0), Clamped(views, 1), OneTensor(views, 2))
    with torch._inductor.config.patch(enable_auto_functionalized_v2=v2):
        report = fuses_bit_for_bit(model, given(shape, 3), 2, graphs)
    assert [layer.code for layer in report.declined] == ["proof.not_analytic"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unbind", "heads first"])
def test_symbolic_sizes(name, graphs):
    """Of tokens, and of blocks: then a part's place in the tensor is a symbol."""
    views, shape = VIEWS[name]
    args = given(shape, 3)
    for tensor, dim in zip(args[:3], (0, 1, 0), strict=True):
        torch._dynamo.mark_dynamic(tensor, dim)
    torch._dynamo.mark_dynamic(args[-1], 1 + shape.index(BLOCKS))
    fuses_bit_for_bit(OneTensor(views, 2), args, 1, graphs, dynamic=None)


def allocations(code: str, at_least: int) -> int:
    """How many buffers of so many elements the generated code allocates."""
    shapes = re.findall(r"= empty_strided_cpu\(\(([^)]*)\)", code)
    assert shapes
    return sum(math.prod(int(size) for size in shape.split(",") if size.strip()) >= at_least for shape in shapes)


@pytest.mark.slow
def test_no_cache_is_copied():
    """Under Inductor, also next to a layer that keeps its operation."""
    views, shape = VIEWS["unbind"]
    model, args = Layers(OneTensor(views, 0), Clamped(views, 1)), given(shape, 2)
    expected = [tensor.clone() for tensor in args]
    options = {"fx_fusion.kernel": "reference", "fx_fusion.require": 1}
    compiled = torch.compile(model, backend="fx_fusion", options=options)
    with torch.no_grad():
        result, (code,) = run_and_get_code(lambda: compiled(*args))
        torch.testing.assert_close(result, model(*expected))
    torch.testing.assert_close(args[-1], expected[-1])
    assert code.count("qk_norm_rope_cache.default(") == code.count("reshape_and_cache_flash.default(") == 1
    assert allocations(code, args[-1][0, 0].numel()) == 0


# --- other layouts and operations of engines --------------------------------------------------------------------------


class InGroups(OneTensor):
    """vLLM's first paged layout: x lanes of a key side by side, and the slots of a block side by side for values."""

    def put(self, k, v, k_cache, v_cache, slots):
        torch.ops._C_cache_ops.reshape_and_cache(k, v, k_cache, v_cache, slots, "auto", *torch.ones(2))


GROUP = 4
IN_GROUPS = (NUM_KV_HEADS, HEAD_DIM // GROUP, BLOCK_SIZE, GROUP), (NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE)


def taken_apart(kv):
    """[2, the elements of one cache], as vLLM's PagedAttention takes it apart."""
    return [part.view(BLOCKS, *shape) for part, shape in zip(kv.unbind(0), IN_GROUPS, strict=True)]


GROUPED_SHAPE = (2, BLOCKS * NUM_KV_HEADS * HEAD_DIM * BLOCK_SIZE)


def test_lanes_in_groups(functionalised, graphs):
    report = fuses_bit_for_bit(InGroups(taken_apart), given(GROUPED_SHAPE), 1, graphs)
    assert report.fused[0].reading["masked"]
    assert "_C_cache_ops::reshape_and_cache = " in report.fused[0].assumed[0]
    assert "reshape_and_cache.default" not in str(graphs[-1])


def test_quantised_lanes_in_groups_are_declined_by_name():
    class Quantised(InGroups):
        def put(self, k, v, k_cache, v_cache, slots):
            torch.ops._C_cache_ops.reshape_and_cache(k, v, k_cache, v_cache, slots, "fp8_e4m3", *torch.ones(2))

    (layer,) = fx_fusion.explain(Quantised(taken_apart), *given(GROUPED_SHAPE)).declined
    assert layer.code == "meaning.raises" and "kv_cache_dtype='fp8_e4m3'" in layer.reason


class TextRope(OneTensor):
    """vLLM's mrope with one position a token."""

    def forward(self, x, positions, slots, kv_cache):
        q, k, v = (part.flatten(1) for part in self.split(self.project(x)))
        q, k = (self.normed(part, weight) for part, weight in ((q, self.q_weight), (k, self.k_weight)))
        torch.ops.vllm.mrope(positions[0], q, k, self.cos_sin_cache, HEAD_DIM, HEAD_DIM, *SECTION, True, True)
        k, v = (part.view(-1, NUM_KV_HEADS, HEAD_DIM) for part in (k, v))
        self.put(k, v, *self.views(kv_cache), slots)
        return self.o_proj(q)

    def normed(self, x, weight):
        return self.norm(x.view(x.shape[0], -1, HEAD_DIM), weight).flatten(1)


class FusedByVllm(OneTensor):
    """vLLM's own fusion of norm and rotation, on the packed projection; and the norm before, with its residual."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.weight = torch.nn.Parameter(torch.rand(HIDDEN) + 0.5)

    def forward(self, x, positions, slots, kv_cache):
        x, residual = x.clone(), 0.5 * x
        torch.ops._C.fused_add_rms_norm(x, residual, self.weight, EPS)
        qkv, heads = self.project(x), (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
        weights = self.q_weight, self.k_weight
        torch.ops._C.fused_qk_norm_rope(qkv, *heads, HEAD_DIM, EPS, *weights, self.cos_sin_cache, True, positions[0])
        q, k, v = self.split(qkv)
        self.put(k, v, *self.views(kv_cache), slots)
        return self.o_proj(q.flatten(1)) + residual


@pytest.mark.parametrize(
    ("model", "assumed", "left"),
    [
        (TextRope, ["_C_cache_ops::reshape_and_cache_flash", "vllm::mrope"], []),
        (FusedByVllm, ["_C::fused_qk_norm_rope", "_C_cache_ops::reshape_and_cache_flash"], ["_C.fused_add_rms_norm"]),
    ],
    ids=lambda each: each.__name__ if isinstance(each, type) else "",
)
def test_operations_of_vllm(model, assumed, left, functionalised, graphs):
    """A norm that is no part of the prologue stays."""
    views, shape = VIEWS["unbind"]
    report = assert_fuses(model(views), given(shape), count=1)
    assert [each.split(" = ")[0] for each in report.fused[0].assumed] == assumed
    called = re.findall(r"(?:_C|vllm|_C_cache_ops)\.(?=\w+\.default)(\w+)", str(graphs[-1]))
    assert sorted({f"_C.{name}" for name in called}) == left


# --- an engine's own operations ---------------------------------------------------------------------------------------


@pytest.fixture
def engine():
    """`store` and `attend` see keys and values flat; `attend` stores too, `attend_unseen` has a cache of its own."""
    library = torch.library.Library("opaque_engine", "FRAGMENT")
    library.define("store(Tensor k, Tensor v, Tensor! kv_cache, Tensor slots) -> ()")
    library.define("attend(Tensor q, Tensor k, Tensor v, Tensor! kv_cache, Tensor slots) -> Tensor")
    library.define("attend_unseen(Tensor q, Tensor k, Tensor v, str layer) -> Tensor")

    def store(k, v, kv_cache, slots):
        for row, slot in enumerate(slots.tolist()):
            for cache, value in zip(kv_cache, (k, v), strict=True):
                cache.view(-1, value.shape[1])[slot] = value[row]

    def attend(q, k, v, kv_cache, slots):
        store(k, v, kv_cache, slots)
        return 2 * q + kv_cache.sum()

    library.impl("store", store, "CPU")
    library.impl("attend", attend, "CPU")
    library.impl("attend_unseen", lambda q, *_: 2 * q, "CPU")
    for name in ("attend", "attend_unseen"):
        torch.library.register_fake(f"opaque_engine::{name}", lambda q, *_: torch.empty_like(q), lib=library)
    yield torch.ops.opaque_engine
    library._destroy()


def store_meaning(k, v, kv_cache, slots):
    """The cache in another shape than it has."""
    rows = kv_cache.view(2, -1, k.shape[1])
    rows[0, slots], rows[1, slots] = k, v


def attend_meaning(q, k, v, kv_cache, slots):
    store_meaning(k, v, kv_cache, slots)
    return 2 * q + kv_cache.sum()


def in_cache(given):
    given["slots"].copy_(torch.randperm(BLOCKS * BLOCK_SIZE)[: len(given["slots"])])


class Engine(OneTensor):
    """`attention(q, k, v, kv_cache, slots)` stores, and gives what the output projection gets; all of it flat."""

    def __init__(self, attention) -> None:
        super().__init__(lambda kv: kv)
        self.attention = attention

    def forward(self, x, positions, slots, kv_cache):
        q, k, v = self.split(self.project(x))
        cos, sin = self.angles(positions)
        q = self.rotate(self.norm(q, self.q_weight), cos, sin)
        k = self.rotate(self.norm(k, self.k_weight), cos, sin)
        return self.o_proj(self.attention(*(part.flatten(1) for part in (q, k, v)), kv_cache, slots))


def only_stores(q, k, v, kv_cache, slots):
    torch.ops.opaque_engine.store(k, v, kv_cache, slots)
    return q


def attends(q, k, v, kv_cache, slots):
    return torch.ops.opaque_engine.attend(q, k, v, kv_cache, slots)


def attends_unseen(q, k, v, kv_cache, slots):
    return torch.ops.opaque_engine.attend_unseen(q, k, v, "layers.0")


def attends_in_vllm(q, k, v, kv_cache, slots):
    out = torch.empty_like(q)
    torch.ops.vllm.unified_attention_with_output(q, k, v, out, "layers.0")
    return out


def engine_arguments():
    *rest, slots, kv_cache = given((2, BLOCKS, *NHD))
    return *rest, slots.clamp(min=0), kv_cache


def test_a_store_of_ones_own(functionalised, engine, graphs):
    args, model = engine_arguments(), Engine(only_stores)
    with fx_fusion.declare_meaning(engine.store, store_meaning, example=in_cache):
        fuses_bit_for_bit(model, args, 1, graphs)
    assert "opaque_engine." not in str(graphs[-1])


def test_attention_that_stores_as_well_is_declined_by_name(functionalised, engine):
    """It would stay for what it returns, and store once more, into a copy of the cache."""
    with fx_fusion.declare_meaning(engine.attend, attend_meaning, example=in_cache):
        (layer,) = assert_declines(Engine(attends), engine_arguments(), code="meaning.stays").declined
    assert re.search(r"opaque_engine.attend.default stores, and computes more than that \(attend_\w*\)", layer.reason)


@pytest.mark.parametrize(
    ("attention", "code", "told"),
    [
        (only_stores, "store.unknown_writer", 'fx_fusion.declare_meaning("opaque_engine::store", …)'),
        (attends, "store.unknown_writer", "is written by opaque_engine.attend.default, an opaque operation"),
        (attends_unseen, "store.missing", "if the opaque operation opaque_engine.attend_unseen.default stores keys"),
        (
            attends_in_vllm,
            "meaning.hidden",
            "so the store cannot be fused. Norm and rotation can: fx_fusion.regis",
        ),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_store_that_the_graph_does_not_show_is_named(attention, code, told, engine):
    """In one line, at the line that calls it."""
    report = assert_declines(Engine(attention), engine_arguments(), code=code)
    (layer,) = report.declined
    assert told in layer.reason
    assert "test_opaque_stores.py:" in layer.source


@pytest.mark.slow
@pytest.mark.parametrize("attention", [attends, attends_unseen, attends_in_vllm], ids=lambda fn: fn.__name__)
def test_norm_and_rotation_are_fused_without_the_store(attention, engine, graphs):
    """As the report says, of which attention is left."""
    handle = fx_fusion.register_fusion(fx_fusion.QkNormRope())
    with fx_fusion.declare_meaning(engine.attend, attend_meaning, example=in_cache):
        report = assert_fuses(Engine(attention), engine_arguments(), count=1)
    assert report.fused[0].fusion == "qk_norm_rope"
    assert len(re.findall(r"unified_attention_with_output\.default|opaque_engine\.", str(graphs[-1]))) == 1
    handle.remove()


def test_attention_in_vllm_is_not_named_beside_the_store_that_is():
    def attends_after(q, k, v, kv_cache, slots):
        dependence = torch.ops.vllm.unified_kv_cache_update(k, v, "layers.0")
        return attends_in_vllm(q, k, v, kv_cache, slots) + dependence.sum()

    (layer,) = fx_fusion.explain(Engine(attends_after), *engine_arguments()).declined
    assert layer.code == "meaning.hidden" and "unified_kv_cache_update" in layer.reason


def test_what_an_operation_writes_is_told_once(engine):
    """Where its meaning is refused, the input that it writes is not a second reason."""
    with fx_fusion.declare_meaning(engine.store, lambda k, v, kv_cache, slots: kv_cache.add_(1)):
        (layer,) = assert_declines(Engine(only_stores), engine_arguments(), code="meaning.mismatch").declined
    assert "kv_cache differs" in layer.reason


# --- what is refused --------------------------------------------------------------------------------------------------


def same_part(kv):
    return kv[0], kv[0]


def shifted(kv):
    """The value's cache begins in the middle of the key's."""
    flat = kv.view(-1)
    size = kv[0].numel()
    return flat[:size].view(kv.shape[1:]), flat[size // 2 : size // 2 + size].view(kv.shape[1:])


@pytest.mark.parametrize(
    ("views", "told"),
    [
        (same_part, "value_cache and key_cache of auto_functionalized_v2 may overlap in arg"),
        (shifted, "value_cache of auto_functionalized_v2 is no rectangular part of arg"),
    ],
    ids=["same part", "shifted"],
)
def test_parts_that_overlap_are_refused(views, told):
    report = assert_declines(OneTensor(views), given((2, BLOCKS, *NHD)), code="meaning.views")
    assert any(told in layer.reason for layer in report.declined)


def test_one_part_for_both_is_refused_as_functionalised_by_vllm():
    """PyTorch's first way loses what was written first: the graph is not what eager computes."""
    with torch._inductor.config.patch(enable_auto_functionalized_v2=False):
        report = fx_fusion.explain(OneTensor(same_part), *given((2, BLOCKS, *NHD)))
    (layer,) = report.declined
    assert layer.code == "store.overlap"
    assert re.search(r"index_put_1 writes into \w+, which \w+index_put may have stored into since", layer.reason)
