"""The mutator: which nodes it changes, and that what it yields can run."""

from __future__ import annotations

import torch
from prologue import Prologue, arguments

from fx_fusion.mutants import Mutants, capture, region, rewritten


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


def test_a_mutant_leaves_the_original_alone():
    mutants = some()
    before = mutants.original.module.code
    for mutant in mutants:
        rewritten(mutant)
    assert mutants.original.module.code == before
