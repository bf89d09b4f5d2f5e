"""The table of what holds after a rewrite: each rule is broken once, and says so; a right rewrite breaks none."""

from __future__ import annotations

import pytest
import torch
from prologue import Prologue, arguments
from torch.fx import Graph
from two_layers import stack

import fx_fusion
from fx_fusion.config import Config
from fx_fusion.fusion import REGISTRY
from fx_fusion.fusion_pass import apply
from fx_fusion.graph import invariants
from fx_fusion.graph.edit import EMITTED, Emitter
from fx_fusion.graph.invariants import RULES, Before, Violation, check, written_by
from fx_fusion.graph.operations import aten
from fx_fusion.mutation.mutants import capture


class Drawing(Prologue):
    """What is returned is drawn twice besides, and shares memory with an argument."""

    def consume(self, q, k, v, k_cache, v_cache):
        noise = torch.rand(3), torch.rand(3)
        return super().consume(q, k, v, k_cache, v_cache), *noise, noise[0][None], k_cache, v_cache.view(-1)


def traced(cls=Drawing) -> Graph:
    with torch._inductor.config.patch(fallback_random=True):
        return capture(*stack(cls())).module.graph


def fused(cls=Drawing) -> tuple[Graph, Before]:
    """A graph after its rewrite, and what it was before."""
    graph = traced(cls)
    before = Before.of(graph)
    report = apply(graph, Config(kernel="reference"))
    assert report.fused, str(report)
    return graph, before


def call_of(graph):
    return next(node for node in graph.nodes if node.meta.get(EMITTED) and written_by(node))


def draws(graph):
    return [node for node in graph.nodes if node.target is aten.rand.default]


BREAKS = {}


def breaks(*rules: str):
    def add(edit):
        BREAKS[edit.__name__] = edit, rules
        return edit

    return add


@breaks("no cycle", "topological order")
def reads_itself(graph):
    node = next(n for n in graph.nodes if n.target is aten.reshape.default)
    with graph.inserting_after(node):
        other = graph.call_function(aten.neg.default, (node,))
    other.meta["val"] = node.meta["val"]
    node.args = (other, *node.args[1:])


@breaks("topological order")
def out_of_order(graph):
    call = call_of(graph)
    next(iter(call.users)).append(call)


@breaks("inputs")
def another_input(graph):
    with graph.inserting_before(next(iter(graph.nodes))):
        graph.placeholder("another")


@breaks("results")
def a_result_less(graph):
    (results,) = graph.output_node().args
    graph.output_node().args = (results[1:],)


@breaks("results", "fake values")
def a_result_of_another_dtype(graph):
    (results,) = graph.output_node().args
    with graph.inserting_before(graph.output_node()):
        wide = Emitter(graph, results[0]).call(aten.to.dtype, results[0], torch.float64)
        narrow = graph.call_function(aten.neg.default, (wide,))
        narrow.meta["val"] = results[0].meta["val"]
    graph.output_node().args = ((wide, narrow, *results[2:]),)


@breaks("aliases")
def a_result_of_its_own(graph):
    (results,) = graph.output_node().args
    with graph.inserting_before(graph.output_node()):
        copied = Emitter(graph, results[3]).call(aten.clone.default, results[3])
    graph.output_node().args = ((*results[:3], copied, *results[4:]),)


@breaks("fake values")
def a_stale_stride(graph):
    node = next(n for n in graph.nodes if n.target is aten.permute.default)
    value = node.meta["val"]
    with value.fake_mode:
        node.meta["val"] = value.contiguous()
    node.args = (node.args[0], list(node.args[1]))
    node.kwargs = {}
    with graph.inserting_before(node):
        same = Emitter(graph, node).call(aten.alias.default, node.args[0])
    node.args = (same, node.args[1])


@breaks("fake values")
def no_fake_value(graph):
    user = next(iter(draws(graph)[0].users))
    with graph.inserting_before(user):
        new = graph.call_function(aten.alias.default, (draws(graph)[0],))
    user.replace_input_with(draws(graph)[0], new)


@breaks("writes")
def a_lost_write(graph):
    """The cache is copied back as it was."""
    write = next(n for n in graph.nodes if n.target is aten.copy_.default)
    write.args = (write.args[0], write.args[0])


@breaks("writes")
def written_once_less(graph):
    graph.erase_node(next(n for n in graph.nodes if n.target is aten.copy_.default))


@breaks("writes")
def written_into_the_other(graph):
    first, second = (n for n in graph.nodes if n.target is aten.copy_.default)
    first.args, second.args = (first.args[0], second.args[1]), (second.args[0], first.args[1])


@breaks("effects")
def drawn_once_more(graph):
    with graph.inserting_before(draws(graph)[0]):
        graph.node_copy(draws(graph)[0])


@breaks("effects")
def drawn_once_for_two(graph):
    first, second = draws(graph)
    second.replace_all_uses_with(first)
    graph.erase_node(second)


@breaks("order of effects")
def drawn_in_another_order(graph):
    first, second = draws(graph)
    first.prepend(second)


@breaks("old cache")
def the_old_cache_is_read(graph):
    """After the call: what it was before would have to be kept."""
    (base, _), *_ = written_by(call_of(graph))
    (results,) = graph.output_node().args
    with graph.inserting_before(graph.output_node()):
        emit = Emitter(graph, results[0])
        old = emit.call(aten.sum.default, emit.call(aten.reshape.default, base, [-1]))
        plus = emit.call(aten.add.Tensor, results[0], old)
    graph.output_node().args = ((plus, *results[1:]),)


def test_every_rule_is_broken_once():
    assert {rule for _, rules in BREAKS.values() for rule in rules} == {rule.name for rule in RULES}


@pytest.mark.parametrize("name", BREAKS)
def test_a_break_is_told(name):
    edit, rules = BREAKS[name]
    graph, before = fused()
    check(before, graph, ordered=True)
    edit(graph)
    with pytest.raises(Violation) as broken:
        check(before, graph, ordered=True)
    told = {line.strip().split(":")[0] for line in str(broken.value).splitlines()[1:]}
    assert set(rules) <= told


def test_order_may_wait():
    graph, before = fused()
    out_of_order(graph)
    check(before, graph, ordered=False)


# --- in the pass ------------------------------------------------------------------------------------------------------


class Careless:
    """The built-in fusion, whose rewrites leave the values' store out."""

    def __init__(self, fusion):
        self._fusion = fusion

    def __getattr__(self, name):
        return getattr(self._fusion, name)

    def rewrite(self, graph, match, kernel):
        self._fusion.rewrite(graph, match, kernel)
        for write in [n for n in graph.nodes if n.target is aten.copy_.default]:
            write.args = (write.args[0], match.value_store.store.cache)


@pytest.fixture
def careless():
    before = tuple(REGISTRY)
    REGISTRY.replace([Careless(before[0])])
    yield
    REGISTRY.replace(before)


@pytest.mark.parametrize(("strict", "always"), [(True, False), (False, True)])
def test_a_careless_rewrite_is_an_error(careless, monkeypatch, strict, always):
    monkeypatch.setattr(invariants, "ALWAYS", always)
    graph = traced()
    with pytest.raises(Violation, match="does not arrive there"):
        apply(graph, Config(kernel="reference", strict=strict))
    assert not any(node.meta.get(EMITTED) for node in graph.nodes), "and it is undone"


def test_nothing_is_checked_in_the_field(careless, monkeypatch):
    """What it costs is for those who ask."""
    monkeypatch.setattr(invariants, "ALWAYS", False)
    monkeypatch.setattr(Before, "of", None)
    apply(traced(), Config(kernel="reference"))


def test_strict_is_an_option():
    with torch.no_grad():
        options = {"fx_fusion.kernel": "reference", "fx_fusion.inner": "eager", "fx_fusion.strict": True}
        torch.compile(Drawing(), backend="fx_fusion", options=options)(*arguments())
    assert len(fx_fusion.last_report().fused) == 1
