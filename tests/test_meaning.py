"""Opaque operations with a declared meaning: fused, put back, compared, refused."""

from __future__ import annotations

import json
from contextlib import ExitStack, contextmanager

import opaque_ops
import pytest
import torch
from prologue import EPS, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, SECTION, Prologue, arguments
from torch import Tensor

import fx_fusion
from fx_fusion.config import Config
from fx_fusion.fusion_pass import FusionPass, apply
from fx_fusion.mutation.mutants import capture
from fx_fusion.semantics.libraries import vllm
from fx_fusion.testing import assert_declines, assert_fuses, run

LIBRARY = opaque_ops.register("opaque_test", {name: name for name in opaque_ops.SCHEMAS})
OPS = torch.ops.opaque_test

SIZES = [NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM]


def store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    k_cache[slots] = k
    v_cache[slots] = v


def rope_out(q: Tensor, k: Tensor, q_rope: Tensor, k_rope: Tensor, table: Tensor, pos_ids: Tensor) -> None:
    cos, sin = (part.unsqueeze(1) for part in table[pos_ids].chunk(2, -1))
    for x, out in ((q, q_rope), (k, k_rope)):
        a, b = x.chunk(2, -1)
        out.copy_(torch.cat([a * cos - b * sin, b * cos + a * sin], -1))


MEANINGS = {
    "ir_rms_norm": vllm.ir_rms_norm,
    "rms_norm": vllm.c_rms_norm,
    "rotary_embedding": vllm.c_rotary_embedding,
    "mrope": vllm.mrope,
    "store": store,
    "rope_out": rope_out,
}


@pytest.fixture
def declared():
    with ExitStack() as stack:
        for name, fn in MEANINGS.items():
            stack.enter_context(fx_fusion.declare_meaning(getattr(OPS, name), fn))
        yield


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """The graphs that the pass leaves; in each there are as many fused calls as its report says."""
    seen = []
    usual = fx_fusion.fusion_pass.apply

    def observed(graph, config, **options):
        report = usual(graph, config, **options)
        seen.append(graph)
        assert str(graph).count("fx_fusion.qk_norm_rope_cache.default") == len(report.fused)
        return report

    monkeypatch.setattr(fx_fusion.fusion_pass, "apply", observed)
    return seen


def kept(graph) -> list[str]:
    """The opaque operations that are left in a graph."""
    return [name for name in opaque_ops.SCHEMAS if f"opaque_test.{name}.default" in str(graph)]


class Opaque(Prologue):
    """Every step but the projection is an opaque operation; query and key are rotated where they are."""

    def forward(self, x, positions, slots, k_cache, v_cache):
        q, k, v = self.project(x).split(SIZES, -1)
        q, k = self.normed(q, self.q_weight), self.normed(k, self.k_weight)
        q, k = self.rotated(q, k, positions)
        k, v = (each.view(x.shape[0], -1, HEAD_DIM) for each in (k, v))
        self.put(k, v, k_cache, v_cache, slots)
        return self.consume(q.view(x.shape[0], -1, HEAD_DIM), k, v, k_cache, v_cache)

    def normed(self, x, weight):
        return OPS.ir_rms_norm(x.view(x.shape[0], -1, HEAD_DIM), weight, EPS).view(x.shape[0], -1)

    def rotated(self, q, k, positions):
        OPS.mrope(positions, q, k, self.cos_sin_cache, HEAD_DIM, HEAD_DIM, *SECTION, True, True)
        return q, k

    def put(self, k, v, k_cache, v_cache, slots):
        OPS.store(k, v, k_cache, v_cache, slots)


class InPlace(Opaque):
    """No norm: query and key are rotated as views of the packed projection."""

    def normed(self, x, weight):
        return x


class InPlaceAsHeads(InPlace):
    """The views are [T, H, D]."""

    def rotated(self, q, k, positions):
        return super().rotated(*(each.view(each.shape[0], -1, HEAD_DIM) for each in (q, k)), positions)


class SplitOverHeads(InPlace):
    """The projection is [T, H + 2 Hk, D] when it is split."""

    def forward(self, x, positions, slots, k_cache, v_cache):
        heads = self.project(x).view(x.shape[0], -1, HEAD_DIM)
        q, k, v = heads.split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], 1)
        q, k = self.rotated(q, k, positions)
        self.put(k, v, k_cache, v_cache, slots)
        return self.consume(q, k, v, k_cache, v_cache)


class NormedInPlace(Opaque):
    """The norm, too, writes to the views of the packed projection that it reads."""

    def normed(self, x, weight):
        heads = x.view(x.shape[0], -1, HEAD_DIM)
        OPS.rms_norm(heads, heads, weight, EPS)
        return x


class NormOut(Opaque):
    """The norm writes to a new tensor."""

    def normed(self, x, weight):
        heads = x.reshape(-1, HEAD_DIM)
        out = torch.empty_like(heads)
        OPS.rms_norm(out, heads, weight, EPS)
        return out.view(x.shape[0], -1)


class PlainRope(Opaque):
    """1-D positions, GPT-J pairs."""

    def rotated(self, q, k, positions):
        OPS.rotary_embedding(positions[0], q, k, HEAD_DIM, self.cos_sin_cache, False)
        return q, k


class RopeOut(Opaque):
    """Reads and writes are two arguments, which are one tensor."""

    def rotated(self, q, k, positions):
        q, k = (each.view(each.shape[0], -1, HEAD_DIM) for each in (q, k))
        OPS.rope_out(q, k, q, k, self.cos_sin_cache, positions[0])
        return q, k


class NormOnly(Opaque):
    """One opaque operation among plain PyTorch."""

    def rotated(self, q, k, positions):
        cos, sin = self.angles(positions)
        return tuple(self.rotate(each.view(each.shape[0], -1, HEAD_DIM), cos, sin) for each in (q, k))

    def put(self, k, v, k_cache, v_cache, slots):
        self.store(k_cache, slots, k)
        self.store(v_cache, slots, v)


class KeyReturned(InPlace):
    def consume(self, q, k, v, k_cache, v_cache):
        return super().consume(q, k, v, k_cache, v_cache), k.clone(), v.clone()


class CacheRead(Opaque):
    """Attention reads what was stored."""

    def consume(self, q, k, v, k_cache, v_cache):
        return super().consume(q, k, v, k_cache, v_cache) + k_cache.mean() + v_cache.sum()


MODELS = [
    Opaque, InPlace, InPlaceAsHeads, SplitOverHeads, NormedInPlace, NormOut, PlainRope, RopeOut, NormOnly, KeyReturned,
    CacheRead,
]  # fmt: skip


@pytest.mark.parametrize("model", MODELS, ids=lambda cls: cls.__name__)
def test_fuses(model, declared, graphs):
    report = assert_fuses(model(), arguments(), count=1)
    assert not kept(graphs[-1])
    assert report.fused[0].assumed
    assert report.fused[0].reading["projection"] == "packed"


@pytest.mark.parametrize(
    "model", [Opaque, InPlace, InPlaceAsHeads, NormedInPlace, KeyReturned], ids=lambda c: c.__name__
)
def test_fuses_as_functionalised_by_vllm(model, declared, graphs):
    """The first way of making operations functional: vLLM turns the second one off."""
    with torch._inductor.config.patch(enable_auto_functionalized_v2=False):
        report = assert_fuses(model(), arguments(), count=1)
    assert report.fused[0].reading["projection"] == "packed"
    assert not kept(graphs[-1])


@pytest.mark.slow
@pytest.mark.parametrize("model", [Opaque, InPlaceAsHeads], ids=lambda cls: cls.__name__)
def test_fuses_with_a_symbolic_number_of_tokens(model, declared):
    given = arguments()
    for tensor, dim in zip(given[:3], (0, 1, 0), strict=True):
        torch._dynamo.mark_dynamic(tensor, dim)
    assert_fuses(model(), given, count=1, dynamic=None)


@pytest.mark.slow
def test_fuses_under_inductor(declared):
    assert_fuses(InPlace(), arguments(), count=1, inner="inductor")


def test_explain(declared):
    report = fx_fusion.explain(Opaque(), *arguments())
    assert len(report.recognised[0].assumed) == 3


# --- what is not fused is left alone ----------------------------------------------------------------------------------


def _image(graph):
    nodes = [(node, node.name, node.target, node.args, node.kwargs, id(node.meta.get("val"))) for node in graph.nodes]
    return nodes, graph.python_code("self").src


@pytest.mark.parametrize("v2", [True, False])
@pytest.mark.parametrize("model", [Opaque, InPlaceAsHeads, NormedInPlace, NormOut], ids=lambda cls: cls.__name__)
def test_a_graph_in_which_nothing_is_rewritten_is_what_it_was(model, v2, declared):
    with torch._inductor.config.patch(enable_auto_functionalized_v2=v2):
        graph = capture(model(), arguments()).module.graph
    before = _image(graph)
    report = apply(graph, Config())
    assert report.recognised and not report.fused
    assert _image(graph) == before


class Layers(torch.nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x, positions, slots, *caches):
        for i, layer in enumerate(self.layers):
            x = x + layer(x, positions, slots, *caches[2 * i : 2 * i + 2])
        return x


class QueryEscapes(Opaque):
    """A second reader of what lies between norm and rotation."""

    def rotated(self, q, k, positions):
        self.seen = k * 2
        return super().rotated(q, k, positions)

    def consume(self, q, k, v, k_cache, v_cache):
        return super().consume(q, k, v, k_cache, v_cache) + self.seen.sum()


@pytest.mark.parametrize("v2", [True, False])
def test_a_layer_that_is_not_rewritten_keeps_its_operations(v2, declared, graphs):
    model, args = Layers(Opaque(), QueryEscapes(), InPlace()), (*arguments(), *arguments()[3:], *arguments()[3:])
    with torch._inductor.config.patch(enable_auto_functionalized_v2=v2):
        report = assert_fuses(model, args, count=2)
        assert [layer.code for layer in report.declined] == ["region.escapes"]
    assert kept(graphs[-1]) == ["ir_rms_norm", "mrope", "store"]


def test_operations_of_rewritten_layers_are_gone(declared, graphs):
    assert_fuses(Layers(Opaque(), InPlace()), (*arguments(), *arguments()[3:]), count=2)
    assert not kept(graphs[-1])


def test_fuel(declared, monkeypatch):
    monkeypatch.setattr(fx_fusion.fusion_pass, "_rewrites_done", 0)
    monkeypatch.setenv("FX_FUSION_FUEL", "1")
    assert_fuses(Layers(InPlace(), NormOut()), (*arguments(), *arguments()[3:]), count=1)


# --- the report -------------------------------------------------------------------------------------------------------


def test_assumptions_are_in_the_report(declared):
    report = assert_fuses(Opaque(), arguments(), count=1)
    text = str(report)
    for name in ("ir_rms_norm = fx_fusion.semantics.libraries.vllm.ir_rms_norm", "store = test_meaning.store"):
        assert f"assumed: opaque_test::{name} (compared on cpu: " in text
    assert "opaque_test::mrope" in " ".join(json.loads(report.to_json())["layers"][0]["assumed"])
    assert fx_fusion.FusionReport.from_json(report.to_json()) == report


def test_a_layer_names_only_what_it_rests_on(declared):
    report = assert_fuses(Layers(InPlace(), NormOnly()), (*arguments(), *arguments()[3:]), count=2)
    first, second = (" ".join(layer.assumed) for layer in report.fused)
    assert "mrope" in first and "ir_rms_norm" not in first
    assert "ir_rms_norm" in second and "mrope" not in second


# --- what is refused --------------------------------------------------------------------------------------------------


@contextmanager
def instead(name, fn, **options):
    """All meanings, but for one operation."""
    with ExitStack() as stack:
        for each, usual in MEANINGS.items():
            if each != name:
                stack.enter_context(fx_fusion.declare_meaning(getattr(OPS, each), usual))
        yield stack.enter_context(fx_fusion.declare_meaning(getattr(OPS, name), fn, **options))


def declined(model, code):
    report = assert_declines(model, arguments(), code=code)
    return next(layer for layer in report.declined if layer.code == code)


def test_without_a_declaration_nothing_fuses():
    assert_declines(Opaque(), arguments(), code="store.unknown_writer")


def _eps_added_twice(x, weight, epsilon, variance_size=None):
    return vllm.ir_rms_norm(x, weight, 2 * epsilon)


def _slots_shifted(k, v, k_cache, v_cache, slots):
    store(k, v, k_cache, v_cache, slots + 1)


def _axes_swapped(positions, q, k, cos_sin_cache, head_size, rotary_dim, t, h, w, interleaved, is_neox):
    vllm.mrope(
        torch.stack([positions[0], positions[2], positions[1]]),
        q,
        k,
        cos_sin_cache,
        head_size,
        rotary_dim,
        t,
        h,
        w,
        interleaved,
        is_neox,
    )


@pytest.mark.parametrize(
    ("name", "fn", "told"),
    [
        ("ir_rms_norm", _eps_added_twice, "result 0 differs by"),
        ("store", _slots_shifted, "k_cache differs by"),
        ("mrope", _axes_swapped, "q differs by"),
    ],
)
def test_a_wrong_meaning_is_refused_with_numbers(name, fn, told):
    with instead(name, fn):
        layer = declined(Opaque(), "meaning.mismatch")
    assert f"opaque_test.{name}.default and its meaning differ: " in layer.reason
    assert told in layer.reason
    assert "test_meaning.py:" in layer.source


def test_a_meaning_that_raises_is_refused():
    def unfinished(x, weight, epsilon, variance_size=None):
        raise NotImplementedError("not for float32")

    with instead("ir_rms_norm", unfinished):
        assert "it raises NotImplementedError: not for float32" in declined(Opaque(), "meaning.raises").reason


def test_a_meaning_with_a_tensor_of_its_own_is_refused():
    table = torch.ones(HEAD_DIM)
    with instead("ir_rms_norm", lambda x, weight, epsilon, variance_size=None: x * table):
        assert declined(Opaque(), "meaning.raises").reason


@pytest.mark.parametrize(
    ("fn", "told"),
    [
        (
            lambda x, weight, epsilon, variance_size=None: vllm.ir_rms_norm(x, weight, epsilon)[0],
            "torch.float32 [4, 16]",
        ),
        (lambda x, weight, epsilon, variance_size=None: vllm.ir_rms_norm(x, weight, epsilon).half(), "torch.float16"),
    ],
)
def test_a_meaning_with_other_results_is_refused(fn, told):
    with instead("ir_rms_norm", fn):
        assert told in declined(Opaque(), "meaning.outputs").reason


def test_a_meaning_with_another_number_of_results_is_refused():
    with instead("ir_rms_norm", lambda x, weight, epsilon, variance_size=None: (x, x)):
        assert "returns 2 values, the operation 1" in declined(Opaque(), "meaning.raises").reason
    with instead("ir_rms_norm", lambda x, weight, epsilon, variance_size=None: None):
        assert "its meaning gives NoneType" in declined(Opaque(), "meaning.outputs").reason


def test_a_meaning_that_calls_an_operation_that_writes_is_refused():
    def by_another(x, weight, epsilon, variance_size=None):
        result = torch.empty_like(x)
        OPS.rms_norm(result, x, weight, epsilon)
        return result

    with instead("ir_rms_norm", by_another):
        assert "it calls opaque_test.rms_norm.default, which writes" in declined(Opaque(), "meaning.raises").reason


def test_a_meaning_that_writes_more_than_the_operation_is_refused():
    def scales_its_input(x, weight, epsilon, variance_size=None):
        return vllm.ir_rms_norm(x.mul_(1), weight, epsilon)

    with instead("ir_rms_norm", scales_its_input):
        assert "writes 'x'" in declined(Opaque(), "meaning.raises").reason


def test_an_operation_that_writes_in_place_is_named(declared):
    graph = capture(NormOnly(), arguments()).module.graph
    output = graph.output_node()
    with graph.inserting_before(output):
        x = graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)[0]
        store = graph.call_function(OPS.rms_norm.default, (x, x, x, 1e-6))
        store.meta = dict(x.meta)
    report = apply(graph, Config(kernel="reference"))
    assert "run the pass earlier" in next(layer.reason for layer in report.declined if layer.code == "meaning.in_place")


def test_an_operation_that_cannot_run_here_is_not_compared():
    elsewhere = opaque_ops.register("opaque_elsewhere", {"ir_rms_norm": "ir_rms_norm"}, device="CUDA")

    class Elsewhere(NormOnly):
        def normed(self, x, weight):
            heads = x.view(x.shape[0], -1, HEAD_DIM)
            return torch.ops.opaque_elsewhere.ir_rms_norm(heads, weight, EPS).view(x.shape[0], -1)

    with fx_fusion.declare_meaning(torch.ops.opaque_elsewhere.ir_rms_norm, vllm.ir_rms_norm):
        report = fx_fusion.explain(Elsewhere(), *arguments())
    (assumed,) = report.recognised[0].assumed
    assert "not compared: the operation cannot run on cpu here (NotImplementedError: " in assumed
    elsewhere._destroy()


# --- declaring --------------------------------------------------------------------------------------------------------


def test_handle_and_uuid():
    before = FusionPass().uuid()
    handle = fx_fusion.declare_meaning(OPS.store, store)
    with_store = FusionPass().uuid()
    handle.remove()
    handle.remove()
    assert FusionPass().uuid() == before != with_store
    with fx_fusion.declare_meaning(OPS.store, _slots_shifted):
        assert FusionPass().uuid() not in (before, with_store)
    assert FusionPass().uuid() == before


def test_uuid_covers_what_a_meaning_refers_to():
    def scaled_by(factor):
        return lambda x, weight, epsilon, variance_size=None: vllm.ir_rms_norm(x, weight, epsilon) * factor

    def uuid(fn):
        with fx_fusion.declare_meaning(OPS.ir_rms_norm, fn):
            return FusionPass().uuid()

    assert uuid(scaled_by(1)) == uuid(scaled_by(1))
    assert len({uuid(scaled_by(factor)) for factor in (1, 2, 1.0)}) == 3
    assert uuid(scaled_by(torch.ones(1))) is None, "a tensor has no stable description: nothing is cached"


def test_decorator():
    @fx_fusion.declare_meaning("opaque_test::rms_norm")
    def norm(result, input, weight, epsilon):
        result.copy_(vllm.rms_norm(input, weight, epsilon))

    try:
        assert callable(norm)
        with pytest.raises(ValueError, match="has a declared meaning already; remove"):
            fx_fusion.declare_meaning(OPS.rms_norm, norm)
    finally:
        del fx_fusion.semantics.declare.MEANINGS._declared["opaque_test::rms_norm.default"]


def test_before_the_library_is_there():
    def two(x, y):
        return x

    with fx_fusion.declare_meaning("opaque_later::ir_rms_norm", two):
        later = opaque_ops.register("opaque_later", {"ir_rms_norm": "ir_rms_norm"})

        class Later(NormOnly):
            def normed(self, x, weight):
                heads = x.view(x.shape[0], -1, HEAD_DIM)
                return torch.ops.opaque_later.ir_rms_norm(heads, weight, EPS).view(x.shape[0], -1)

        assert "takes no argument 'weight'" in declined(Later(), "meaning.schema").reason
        later._destroy()


@pytest.mark.parametrize(
    ("op", "fn", "error", "told"),
    [
        (torch.mm, store, TypeError, "expected an operation .* got <built-in method mm"),
        (torch.ops.aten.mm, store, TypeError, "aten.mm.default is PyTorch's own"),
        ("store", store, TypeError, "expected a name like 'namespace::name', got 'store'"),
        (OPS.store, "store", TypeError, "expected a function or None as the meaning of opaque_test::store"),
        (OPS.store, lambda k, v, k_cache, v_cache: None, TypeError, "takes no argument 'slots'"),
        (OPS.store, lambda v, k, kc, vc, at: None, TypeError, "takes 'v' where the operation has 'k'"),
        (OPS.store, lambda k, v, k_cache, v_cache, slots, more: None, TypeError, "missing a required argument: 'more'"),
    ],
)  # fmt: skip
def test_errors(op, fn, error, told):
    with pytest.raises(error, match=told):
        fx_fusion.declare_meaning(op, fn)


def test_names_of_ones_own():
    def put(new_k, new_v, keys, values, at):
        store(new_k, new_v, keys, values, at)

    with instead("store", put):
        assert_fuses(Opaque(), arguments(), count=1)


# --- the libraries' own names -----------------------------------------------------------------------------------------


class Vllm(Opaque):
    def normed(self, x, weight):
        return torch.ops.vllm_ir.rms_norm(x.view(x.shape[0], -1, HEAD_DIM), weight, EPS).view(x.shape[0], -1)

    def rotated(self, q, k, positions):
        torch.ops.vllm.mrope(positions, q, k, self.cos_sin_cache, HEAD_DIM, HEAD_DIM, *SECTION, True, True)
        return q, k

    def put(self, k, v, k_cache, v_cache, slots):
        self.store(k_cache, slots, k)
        self.store(v_cache, slots, v)


class VllmText(Vllm):
    """A language model's rotation, and the norm that writes to a tensor it is given."""

    def normed(self, x, weight):
        heads = x.reshape(-1, HEAD_DIM)
        out = torch.empty_like(heads)
        torch.ops._C.rms_norm(out, heads, weight, EPS)
        return out.view(x.shape[0], -1)

    def rotated(self, q, k, positions):
        torch.ops._C.rotary_embedding(positions[0], q, k, HEAD_DIM, self.cos_sin_cache, True)
        return q, k


class Sglang(Opaque):
    def normed(self, x, weight):
        heads = x.reshape(-1, HEAD_DIM)
        out = torch.empty_like(heads)
        torch.ops.sgl_kernel.gemma_rmsnorm(out, heads, weight, EPS, False)
        return out.view(x.shape[0], -1)

    def rotated(self, q, k, positions):
        q, k = (each.view(each.shape[0], -1, HEAD_DIM) for each in (q, k))
        rotate = torch.ops.sgl_kernel.apply_rope_pos_ids_cos_sin_cache
        rotate(q, k, q, k, self.cos_sin_cache, positions[0], False, False, None, None, None, None)
        return q, k

    def put(self, k, v, k_cache, v_cache, slots):
        flat = [each.flatten(1) for each in (k, v, k_cache, v_cache)]
        torch.ops.sglang.store_cache(*flat, slots)


class VllmStore(Vllm):
    """The store that skips padding."""

    dtype = "auto"

    def put(self, k, v, k_cache, v_cache, slots):
        scale = torch.ones(())
        put = torch.ops._C_cache_ops.reshape_and_cache_flash
        put(k, v, k_cache, v_cache, slots, self.dtype, scale, scale)


def paged_arguments() -> tuple[Tensor, ...]:
    """One token is padding."""
    x, positions, slots, *caches = arguments(cache=(8, 8, NUM_KV_HEADS, HEAD_DIM))
    slots[1] = -1
    return x, positions, slots, *caches


def test_a_store_that_skips_padding(libraries, graphs):
    report = assert_fuses(VllmStore(), paged_arguments(), count=1)
    assert report.fused[0].reading["masked"]
    assert "_C_cache_ops" not in str(graphs[-1])


def test_a_cache_whose_blocks_are_not_side_by_side(libraries):
    """[blocks, Hk, block_size, D] in memory."""
    x, positions, slots, *caches = paged_arguments()
    caches = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in caches]
    report = assert_fuses(VllmStore(), (x, positions, slots, *caches), count=1)
    assert report.fused[0].reading["addressed_by"] == "block and offset"


def test_a_quantised_store_is_declined_by_name(libraries):
    class Quantised(VllmStore):
        dtype = "fp8"

    report = fx_fusion.explain(Quantised(), *paged_arguments())
    (layer,) = [layer for layer in report.declined if layer.code == "meaning.raises"]
    assert "kv_cache_dtype='fp8'" in layer.reason


@pytest.mark.parametrize("model", [Vllm, VllmText, Sglang], ids=lambda cls: cls.__name__)
def test_ready_made(model, libraries):
    with torch._inductor.config.patch(enable_auto_functionalized_v2=model is Sglang):
        report = assert_fuses(model(), arguments(), count=1)
    assert all("(compared on cpu: " in assumed for assumed in report.fused[0].assumed)
    assert len(report.fused[0].assumed) == (3 if model is Sglang else 2)


def test_ready_made_may_be_turned_off(libraries):
    with fx_fusion.declare_meaning("vllm_ir::rms_norm", None):
        assert not run(Vllm(), arguments()).report.fused


def test_a_store_in_the_forward_context_is_named(libraries):
    class Hidden(Vllm):
        def put(self, k, v, k_cache, v_cache, slots):
            self.dependence = torch.ops.vllm.unified_kv_cache_update(k, v, "layers.0")

        def consume(self, q, k, v, k_cache, v_cache):
            return super().consume(q, k, v, k_cache, v_cache) + self.dependence.sum()

    layer = declined(Hidden(), "meaning.hidden")
    assert "vllm::unified_kv_cache_update takes cache and slots from vLLM's forward context" in layer.reason
    assert "store.missing" not in str(fx_fusion.last_report())
