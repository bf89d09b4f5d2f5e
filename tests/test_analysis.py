"""The parts that stand under the readers: analysis, evaluation, sizes, placement."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Graph

from fx_fusion.decline import CODES, STAGES, Decline, source_line
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.graph.operations import aten, prims
from fx_fusion.graph.sizes import Sizes
from fx_fusion.graph.store_site import Store
from fx_fusion.placement import check_cache_address, check_convex, check_devices, check_old_cache, check_order
from fx_fusion.proof import evaluate as evaluation
from fx_fusion.proof.evaluate import Arithmetic, evaluate


class Builder:
    """A small graph whose nodes carry values."""

    def __init__(self):
        self.graph = Graph()

    def input(self, name, *shape, dtype=torch.float32, device="cpu"):
        node = self.graph.placeholder(name)
        node.meta["val"] = torch.zeros(shape, dtype=dtype, device=device)
        return node

    def __call__(self, target, *args):
        node = self.graph.call_function(target, args)
        node.meta["val"] = target(*torch.fx.node.map_arg(args, lambda n: n.meta["val"]))
        return node


def test_equal_values_have_one_number():
    build = Builder()
    x = build.input("x", 2, 3)
    a, b, c = (build(aten.mul.Tensor, x, factor) for factor in (2.0, 2.0, 2))
    build.graph.output((a, b, c))
    analysis = GraphAnalysis(build.graph)
    assert analysis.value_number(a) == analysis.value_number(b)
    assert analysis.value_number(a) != analysis.value_number(c), "1 == 1.0 in Python, but they are different arguments"
    assert analysis.canonical(b) is a


def test_random_values_are_never_equal():
    build = Builder()
    x = build.input("x", 2, 3)
    a, b = (build(aten.bernoulli.default, x) for _ in range(2))
    build.graph.output((a, b))
    analysis = GraphAnalysis(build.graph)
    assert analysis.value_number(a) != analysis.value_number(b)


def test_latest_common_ancestors():
    build = Builder()
    x, stranger = build.input("x", 2, 3), build.input("stranger", 2, 3)
    shared = build(aten.neg.default, x)
    a, b = build(aten.mul.Tensor, shared, 2.0), build(aten.mul.Tensor, shared, 3.0)
    after_a, cousin = build(aten.neg.default, a), build(aten.mul.Tensor, x, 4.0)
    build.graph.output((after_a, b, cousin, stranger))
    found = GraphAnalysis(build.graph).latest_common_ancestors(a, [b, after_a, shared, cousin, stranger, a])
    assert found == {b: shared, after_a: a, shared: shared, cousin: x, a: a}


def test_dead_nodes_are_no_users():
    build = Builder()
    x = build.input("x", 2, 3)
    dead, alive = build(aten.neg.default, x), build(aten.mul.Tensor, x, 2.0)
    build.graph.output(alive)
    analysis = GraphAnalysis(build.graph)
    assert dead not in analysis.live
    assert analysis.users(x) == [alive]


def test_float64_and_native_arithmetic():
    build = Builder()
    x = build.input("x", 4, dtype=torch.bfloat16)
    wide = build(prims.convert_element_type.default, x, torch.float32)
    out = build(prims.convert_element_type.default, build(aten.mul.Tensor, wide, 1.0 / 3.0), torch.bfloat16)
    value = torch.tensor([1.0, 2.0, 3.0, 4.0])
    (exact,) = evaluate([out], {x: value.double()}, Sizes())
    (native,) = evaluate([out], {x: value.bfloat16()}, Sizes(), Arithmetic.NATIVE)
    assert exact.dtype == torch.float64
    assert torch.equal(exact, value.double() / 3.0)
    assert native.dtype == torch.bfloat16


def test_inputs_are_never_read():
    build = Builder()
    x, y = build.input("x", 2), build.input("y", 2)
    out = build(aten.add.Tensor, x, y)
    with pytest.raises(Decline, match="graph input whose value must not be read") as declined:
        evaluate([out], {x: torch.zeros(2)}, Sizes())
    assert declined.value.code == "region.evaluation"


def test_an_operation_that_fails_is_a_decline():
    build = Builder()
    x = build.input("x", 4)
    out = build(aten.reshape.default, x, [2, 2])
    with pytest.raises(Decline, match="cannot run on the CPU") as declined:
        evaluate([out], {x: torch.zeros(3)}, Sizes())
    assert declined.value.nodes == (out,)


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(evaluation, "MEMORY_BOUND", 1 << 20)
    build = Builder()
    x = build.input("x", 1 << 10)
    small = build(aten.neg.default, build(aten.neg.default, build(aten.neg.default, x)))
    evaluate([small], {x: torch.zeros(1 << 15, dtype=torch.float64)}, Sizes())  # freed after each last use
    with pytest.raises(Decline) as declined:
        evaluate([small], {x: torch.zeros(1 << 17, dtype=torch.float64)}, Sizes())
    assert declined.value.code == "region.too_large"


def test_devices_must_agree():
    build = Builder()
    x, scale = build.input("x", 2, device="meta"), build.input("scale")
    with pytest.raises(Decline, match="x on meta, scale on cpu; move scale there") as declined:
        check_devices([x, scale])
    assert declined.value.code == "placement.on_host"
    check_devices([x])


def test_a_result_must_feed_no_operand():
    build = Builder()
    x = build.input("x", 2)
    result = build(aten.neg.default, x)
    operand = build(aten.mul.Tensor, result, 2.0)
    build.graph.output(operand)
    analysis = GraphAnalysis(build.graph)
    with pytest.raises(Decline) as declined:
        check_convex(analysis, [operand], [result])
    assert declined.value.code == "region.not_convex"
    check_convex(analysis, [x], [result])


def test_a_cache_must_be_an_input():
    build = Builder()
    x = build.input("x", 2)
    check_cache_address(x)
    with pytest.raises(Decline) as declined:
        check_cache_address(build(aten.neg.default, x))
    assert declined.value.code == "placement.cache"


def cache_with_a_store(late_reader):
    build = Builder()
    cache, slots = build.input("cache", 4, 2), build.input("slots", 1, dtype=torch.int64)
    operand = build(aten.mul.Tensor, build(aten.select.int, cache, 0, 0), 2.0)
    written = build(aten.index_put.default, cache, [slots], operand)
    late = [build(aten.sum.default, cache)] if late_reader else []
    build.graph.output((operand, written, *late))
    return GraphAnalysis(build.graph), Store(cache, cache, written, operand), operand


def test_a_reader_ordered_before_the_call_is_fine():
    analysis, store, operand = cache_with_a_store(late_reader=False)
    check_old_cache(analysis, [store], [operand])


def test_a_reader_of_the_old_cache_after_the_call_is_declined():
    analysis, store, operand = cache_with_a_store(late_reader=True)
    with pytest.raises(Decline, match="reads cache as it was before the store"):
        check_old_cache(analysis, [store], [operand])


def test_a_store_between_those_of_keys_and_values_is_declined():
    build = Builder()
    cache, slots = build.input("cache", 3, 4, 2), build.input("slots", 1, dtype=torch.int64)
    value = build.input("value", 1, 2)
    stores, base = [], cache
    for part in range(3):
        view = build(aten.select.int, base, 0, part)
        writer = build(aten.index_put.default, view, [slots], value)
        base = build(aten.select_scatter.default, base, writer, 0, part)
        stores.append(Store(cache, view, writer, value, (base,)))
    check_order(stores[:2])
    check_order(stores[1:])
    with pytest.raises(Decline) as declined:
        check_order([stores[0], stores[2]])
    assert declined.value.code == "store.order"


def test_every_code_has_a_stage_and_a_meaning():
    for code, meaning in CODES.items():
        assert code.split(".")[0] in STAGES
        assert meaning.endswith(".")
    with pytest.raises(ValueError, match="unknown decline code"):
        Decline("norm.odd", "")


def test_source_line_is_the_users():
    build = Builder()
    node = build.input("x", 1)
    assert source_line(node) is None
    inside = torch.__file__.replace("__init__.py", "functional.py")
    node.meta["stack_trace"] = f'File "/home/me/model.py", line 7, in forward\n  File "{inside}", line 3, in mul'
    assert source_line(node) == "/home/me/model.py:7"


@pytest.mark.parametrize(
    "change",
    [
        "nothing",
        "offset",
        "dtype",
        "strides",
        "storage",
        "index dtype",
        "one index twice",
        "another operand",
        "literal",
    ],
)
def test_structures_are_equal_only_where_the_same_is_computed(change):
    build = Builder()

    def layer(changed):
        dtype = torch.bfloat16 if changed == "dtype" else torch.float32
        cache, value = build.input("cache", 8, 2), build.input("value", 4, 2, dtype=dtype)
        cache.meta["val"] = cache.meta["val"].to(dtype)
        if changed == "strides":
            value.meta["val"] = torch.zeros(2, 4).t()
        if changed == "storage":
            cache.meta["val"] = torch.zeros(18)[2:].view(8, 2)
        slots = build.input("slots", 2, dtype=torch.int32 if changed == "index dtype" else torch.int64)
        if changed == "another operand":
            cache = value
        lanes = build(aten.mul.Scalar, build(aten.arange.default, 2), 0 if changed == "literal" else 1)
        value = build(aten.index.Tensor, value, [None, lanes])
        part = build(aten.slice.Tensor, value, 0, int(changed == "offset"), 2 + int(changed == "offset"))
        indices = [slots, slots] if changed == "one index twice" else [slots]
        source = build(aten.select.int, part, 1, 0) if changed == "one index twice" else part
        return [value, part, build(aten.index_put.default, cache, indices, source)]

    first, second = layer("nothing"), layer(change)
    build.graph.output((first[-1], second[-1]))
    analysis = GraphAnalysis(build.graph)
    (one, fed), (other, _) = analysis.structure(first), analysis.structure(second)
    assert (one == other) == (change == "nothing")
    assert [node.name for node in fed] == ["value", "mul_scalar", "cache", "slots"]
