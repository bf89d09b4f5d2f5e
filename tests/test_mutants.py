"""The mutator: which nodes it changes, and that what it yields can run."""

from __future__ import annotations

import pytest
import torch
from prologue import Prologue, arguments
from torch.fx.experimental.proxy_tensor import make_fx

from fx_fusion.mutation.mutants import Mutants, _is_survivable, capture, rewritten
from fx_fusion.mutation.region import region


def some(count=20, seed=0):
    torch.manual_seed(0)
    return Mutants.of(Prologue(), arguments(), count=count, seed=seed)


def test_the_region_lies_between_the_projection_and_its_consumer():
    original = capture(Prologue(), arguments())
    inside, projections = region(original.module.graph)
    products = [node for node in original.module.graph.nodes if "mm" in str(node.target)]
    assert [node.name for node in projections] == list(original.projections) == [products[0].name]
    assert not {*products} & {*inside}
    targets = {str(node.target) for node in inside}
    assert {"aten.rsqrt.default", "aten.index.Tensor", "aten.index_put.default", "aten.cat.default"} <= targets


def test_the_captured_graph_runs_and_fuses():
    torch.manual_seed(0)
    model, args = Prologue(), arguments()
    original = capture(model, args)
    assert rewritten(original)[1].fused
    (out,) = original.module(*original.inputs)
    torch.testing.assert_close(out, model(*args))


def test_mutants_are_distinct_and_run():
    mutants = some()
    found = list(mutants)
    assert len({mutant.description for mutant in found}) == len(found) == 20
    for mutant in found:
        mutant.module(*mutant.inputs)
        assert ".py:" in mutant.description


def test_a_seed_fixes_the_mutants():
    assert [m.description for m in some(5)] == [m.description for m in some(5)]
    assert [m.description for m in some(5)] != [m.description for m in some(5, seed=1)]


@pytest.mark.slow
def test_a_mutant_leaves_the_original_alone():
    mutants = some()
    before = mutants.original.module.code
    for mutant in mutants:
        rewritten(mutant)
    assert mutants.original.module.code == before


@pytest.mark.parametrize(("heads", "kv_heads", "runs"), [(4, 2, True), (2, 4, False), (3, 2, False)])
def test_attention_that_would_kill_the_process_is_not_run(heads, kv_heads, runs):
    def attention(q, k):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k)[0]

    q, k = torch.randn(1, heads, 1, 8), torch.randn(1, kv_heads, 5, 8)
    graph = make_fx(attention, tracing_mode="fake")(q, k).graph
    assert _is_survivable(graph) == runs
