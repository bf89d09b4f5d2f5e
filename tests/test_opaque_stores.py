"""Opaque stores into caches as engines keep them: keys and values, or all layers, in one tensor."""

from __future__ import annotations

import math
import re

import opaque_ops
import pytest
import torch
from prologue import HEAD_DIM, NUM_KV_HEADS, Prologue, arguments
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import fx_fusion
from fx_fusion.testing import assert_declines, run

BLOCKS, BLOCK_SIZE = 8, 8


@pytest.fixture(autouse=True)
def libraries():
    held = [opaque_ops.register(*each) for each in (*opaque_ops.VLLM.items(), *opaque_ops.SGLANG.items())]
    yield
    for library in held:
        library._destroy()


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
    "select": (lambda kv: (kv.select(1, 0), kv.select(1, 1)), (BLOCKS, 2, *NHD)),
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
    assert report.fused[0].facts["masked"]
    assert "reshape_and_cache_flash" in report.fused[0].assumed[0] and "compared on cpu" in report.fused[0].assumed[0]


@pytest.mark.parametrize("name", ["unbind", "index blocks first", "chunk", "heads first"])
def test_keys_and_values_in_one_tensor_as_functionalised_by_vllm(name, graphs):
    one_tensor(name, False, graphs)


@pytest.mark.parametrize("v2", [True, False])
@pytest.mark.parametrize("name", ["unbind", "heads first"])
def test_all_layers_in_one_tensor(name, v2, graphs):
    """The layer between two fused ones keeps its operation."""
    views, shape = VIEWS[name]
    model = Layers(OneTensor(views, 0), Clamped(views, 1), OneTensor(views, 2))
    with torch._inductor.config.patch(enable_auto_functionalized_v2=v2):
        report = fuses_bit_for_bit(model, given(shape, 3), 2, graphs)
    assert [layer.code for layer in report.declined] == ["proof.not_analytic"]


@pytest.mark.parametrize(("name", "also_blocks"), [("unbind", False), ("unbind", True), ("heads first", True)])
def test_symbolic_sizes(name, also_blocks, graphs):
    """Of tokens, and of blocks: then a part's place in the tensor is a symbol."""
    views, shape = VIEWS[name]
    args = given(shape, 3)
    for tensor, dim in zip(args[:3], (0, 1, 0), strict=True):
        torch._dynamo.mark_dynamic(tensor, dim)
    if also_blocks:
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
