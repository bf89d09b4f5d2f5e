"""The Triton kernel's way into a graph, as far as Inductor takes it without a GPU: up to lowering."""

from __future__ import annotations

import pytest
import torch
from models import LAYERS, Run
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation
from torch._inductor.fx_passes import post_grad

import fx_fusion
from fx_fusion.kernels.qk_norm_rope_cache.triton.implementation import Triton

pytest.importorskip("triton")
aten = torch.ops.aten


class Captured(Exception):
    pass


@pytest.fixture
def lowered(monkeypatch):
    """A function that compiles a model as if Triton ran here, and returns the graph as lowering would get it."""
    monkeypatch.setattr(Triton, "unavailable", lambda self, target: None)
    original = post_grad.decompose_triton_kernel_wrapper_functional
    graphs = []

    def decompose(graph):
        original(graph)
        graphs.append(graph)
        raise Captured

    monkeypatch.setattr(post_grad, "decompose_triton_kernel_wrapper_functional", decompose)

    def compile_(model, **inputs):
        torch._dynamo.reset()
        options = {"fx_fusion.kernel": "triton", "fx_fusion.strict": True}
        with pytest.raises(Exception, match="Captured"), torch.no_grad():
            torch.compile(model, backend="fx_fusion", options=options)(**inputs)
        return graphs[-1]

    return compile_


def launches(graph):
    return graph.find_nodes(op="call_function", target=triton_kernel_wrapper_mutation)


@pytest.mark.slow
def test_every_layer_launches_the_kernel_and_no_cache_is_cloned(lowered):
    run = Run("qwen3_vl_text", torch.bfloat16)
    run.prefill()
    graph = lowered(run.model, **run.inputs(torch.ones(2, 1, dtype=torch.int64)))
    assert len(launches(graph)) == LAYERS
    cache_sizes = {cache.numel() for cache in run.caches()}
    clones = [node for node in graph.nodes if node.target in (aten.clone.default, aten.copy_.default)]
    assert not [node for node in clones if node.meta["val"].numel() in cache_sizes], clones


@pytest.mark.slow
def test_operands_arrive_with_the_strides_of_the_launch(lowered):
    run = Run("qwen3", torch.bfloat16)
    run.prefill()
    graph = lowered(run.model, **run.inputs(torch.ones(2, 1, dtype=torch.int64)))
    for node in launches(graph):
        constants = kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])
        for name in ("q", "k", "v"):
            stride = node.kwargs["kwargs"][name].meta["val"].stride()
            assert stride[:3] == tuple(constants[f"{name}_{dim}_stride"] for dim in ("batch", "token", "head"))


@pytest.mark.slow
def test_a_symbolic_number_of_tokens_reaches_the_launch(lowered):
    run = Run("qwen3_vl_text", torch.bfloat16)
    run.prefill()
    inputs = run.inputs(torch.ones(2, 5, dtype=torch.int64))
    torch._dynamo.mark_dynamic(inputs["input_ids"], 1)
    torch._dynamo.mark_dynamic(inputs["position_ids"], 2)
    graph = lowered(run.model, **inputs)
    assert len(launches(graph)) == LAYERS, str(fx_fusion.last_report())
    for node in launches(graph):
        assert isinstance(node.kwargs["kwargs"]["num_tokens"], torch.fx.Node)
        assert isinstance(node.kwargs["grid"][0][0], torch.fx.Node)


def test_a_cache_of_bytes_reaches_the_launch_as_it_is(lowered):
    """The kernel writes bytes of a float8; the graph's tensor stays uint8, and no cache is cloned."""
    from prologue import Prologue, arguments

    class Bytes(Prologue):
        def store(self, cache, slots, value):
            cache[slots] = (value / 0.5).to(torch.float8_e4m3fn).view(torch.uint8)

    names = ("x", "positions", "slots", "k_cache", "v_cache")
    inputs = dict(zip(names, arguments(), strict=True))
    inputs |= {name: torch.zeros_like(inputs[name], dtype=torch.uint8) for name in names[3:]}
    graph = lowered(Bytes(), **inputs)
    (launch,) = launches(graph)
    constants = kernel_side_table.get_constant_args(launch.kwargs["constant_args_idx"])
    assert (constants["K_FLOAT8"], constants["V_FLOAT8"], constants["K_SCALE"]) == ("e4m3fn", "e4m3fn", 0.5)
    assert launch.kwargs["kwargs"]["k_cache"].meta["val"].dtype == torch.uint8
    size = inputs["k_cache"].numel()
    assert not [
        node
        for node in graph.find_nodes(op="call_function", target=aten.clone.default)
        if node.meta["val"].numel() == size
    ]
