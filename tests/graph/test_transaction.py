"""A rewrite that fails is undone whole: the graph is, node for node, what it was, and the report tells."""

from __future__ import annotations

import pytest
import torch
from prologue import Prologue, arguments
from rowwise import assert_as_eager
from two_layers import stack

from fx_fusion.config import Config
from fx_fusion.decline import Decline
from fx_fusion.fusion import REGISTRY
from fx_fusion.fusion_pass import apply
from fx_fusion.graph.operations import aten
from fx_fusion.graph.transaction import Checkpoint, apply_each
from fx_fusion.mutation.mutants import capture
from fx_fusion.observer import Observer


def image(graph):
    """All that can be told of a graph: order, names, what each node is, holds and is used by, and its fake value."""
    module = graph.owning_module
    return (
        [
            (id(n), n.name, n.op, n.target, n.args, n.kwargs, list(n.users), {k: id(v) for k, v in n.meta.items()})
            for n in graph.nodes
        ],
        len(graph.nodes),
        sorted(vars(module)) if module is not None else None,
        sorted(name for name, _ in module.named_buffers()) if module is not None else None,
        {op: set(graph.find_nodes(op=op)) for op in ("placeholder", "get_attr", "output")},
    )


def layer_graph(layers=1):
    model, given = stack(*(Prologue() for _ in range(layers)))
    return capture(model, given).module.graph


def inserts(graph):
    node = next(n for n in graph.nodes if n.target is aten.mul.Tensor)
    with graph.inserting_before(node):
        for _ in range(3):
            graph.call_function(aten.neg.default, (node.args[0],)).meta["val"] = node.meta["val"]


def replaces_uses(graph):
    node = next(n for n in graph.nodes if n.target is aten.mul.Tensor)
    with graph.inserting_after(node):
        new = graph.call_function(aten.neg.default, (node.args[0],), name=node.name)
    node.replace_all_uses_with(new)
    new.args = (node,)


def swaps_old_for_old(graph):
    first, second = [n for n in graph.nodes if n.target is aten.mul.Tensor][:2]
    first.replace_all_uses_with(second)


def erases(graph):
    """From the end on, as far as nothing is left."""
    graph.erase_node(next(iter(graph.find_nodes(op="output"))))
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op == "call_function":
            graph.erase_node(node)
    graph.output(())


def reorders(graph):
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    nodes[0].prepend(nodes[-1])
    nodes[2].append(nodes[1])


def changes_what_nodes_are(graph):
    node = next(n for n in graph.nodes if n.target is aten.mul.Tensor)
    node.target = aten.add.Tensor
    node.name = "other"
    node.meta["val"] = None
    node.meta["added"] = True
    del node.meta["stack_trace"]
    node.kwargs = {"alpha": 2}


def adds_to_the_module(graph):
    graph.owning_module.register_buffer("added", torch.zeros(3))
    graph.owning_module.remark = "changed"
    with graph.inserting_before(next(iter(graph.nodes))):
        graph.get_attr("added")


EDITS = [inserts, replaces_uses, swaps_old_for_old, erases, reorders, changes_what_nodes_are, adds_to_the_module]


@pytest.mark.parametrize("edit", EDITS)
def test_whatever_was_done_is_undone(edit):
    graph = layer_graph()
    before, code = image(graph), str(graph)
    checkpoint = Checkpoint(graph)
    for _ in range(2):
        edit(graph)
        assert image(graph) != before
        checkpoint.restore()
        assert image(graph) == before and str(graph) == code
        graph.lint()
    inserts(graph)
    assert len({node.name for node in graph.nodes}) == len(graph.nodes)


def test_all_of_it_at_once():
    graph = layer_graph()
    before = image(graph)
    checkpoint = Checkpoint(graph)
    for edit in sorted(EDITS, key=lambda edit: edit is erases):
        edit(graph)
    checkpoint.restore()
    assert image(graph) == before


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("failing", [{0}, {1}, {2}, {0, 2}, {0, 1, 2}, set()])
def test_the_others_are_kept(failing, one_by_one):
    graph, right = layer_graph(), layer_graph()

    def edit(graph, number):
        inserts(graph)
        replaces_uses(graph)
        if number in failing:
            raise RuntimeError(str(number))

    edits = {number: lambda number=number: edit(graph, number) for number in range(3)}
    failed = apply_each(graph, edits, one_by_one=one_by_one)
    for _ in range(3 - len(failing)):
        edit(right, None)
    assert {number: str(error) for number, error in failed.items()} == {number: str(number) for number in failing}
    assert str(graph) == str(right)
    graph.lint()


# --- the pass -------------------------------------------------------------------------------------------------------


class Failing:
    """The built-in fusion, whose rewriting of some layers fails, before, while or after it has changed the graph."""

    def __init__(self, fusion, when, layers, error=RuntimeError):
        self._fusion, self._when, self._layers, self._error = fusion, when, layers, error
        self._seen = []

    def __getattr__(self, name):
        return getattr(self._fusion, name)

    def rewrite(self, graph, match, kernel):
        if match not in self._seen:
            self._seen.append(match)
        fails = self._seen.index(match) in self._layers
        if fails and self._when == "before":
            raise self._error("before")
        if fails and self._when == "while":
            graph.inserting_before = _raising(graph.inserting_before, self._error)
        try:
            self._fusion.rewrite(graph, match, kernel)
        finally:
            vars(graph).pop("inserting_before", None)
        if fails:
            query = match.match.query
            query.out.replace_all_uses_with(query.data)
            raise self._error("after")


def _raising(method, error):
    class Place:
        def __init__(self, node):
            self.place = method(node)

        def __enter__(self):
            self.place.__enter__()

        def __exit__(self, *details):
            self.place.__exit__(*details)
            raise error("while")

    return Place


@pytest.fixture
def failing(request):
    before = tuple(REGISTRY)

    def replace(*args, **kwargs):
        REGISTRY.replace([Failing(before[0], *args, **kwargs)])

    yield replace
    REGISTRY.replace(before)


@pytest.mark.parametrize("observer", [None, Observer()])
@pytest.mark.parametrize("when", ["before", "while", "after"])
def test_a_failed_rewrite_leaves_nothing_behind(failing, when, observer):
    failing(when, {0})
    graph = layer_graph()
    before = image(graph)
    watching = {} if observer is None else {"observer": observer}
    report = apply(graph, Config(kernel="reference"), **watching)
    assert image(graph) == before
    (layer,) = report.layers
    assert (layer.state, layer.code, layer.stage) == ("declined", "internal.error", "rewrite")
    assert f"RuntimeError: {when}" in layer.reason
    assert layer.source is not None and layer.node is not None


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "while", "after"])
@pytest.mark.parametrize("layers", [{0}, {1}, {2}, {0, 2}])
def test_other_layers_stay_fused(failing, when, layers):
    failing(when, layers)
    model, given = stack(*(Prologue() for _ in range(3)))
    report = assert_as_eager(model, given, strict=False)
    states = ["declined" if number in layers else "rewritten" for number in range(3)]
    assert [layer.state for layer in report.layers] == states, str(report)


def test_a_refusal_keeps_its_code(failing):
    failing("after", {0}, error=lambda text: Decline("region.sizes", text))
    report = apply(layer_graph(), Config(kernel="reference"))
    assert [(layer.code, layer.reason) for layer in report.layers] == [("region.sizes", "after")]


def test_strict_raises_and_undoes_too(failing):
    failing("after", {0})
    graph = layer_graph()
    before = image(graph)
    with pytest.raises(RuntimeError, match="after"):
        apply(graph, Config(kernel="reference", strict=True))
    assert image(graph) == before


@pytest.mark.slow
def test_a_size_that_no_node_holds(monkeypatch):
    """What a rewrite needs and cannot find shows while it is under way."""

    def nowhere(self, expression):
        raise LookupError(f"no node of the graph holds the size {expression}")

    monkeypatch.setattr("fx_fusion.graph.edit.Emitter._find_size", nowhere)
    given = arguments()
    report = assert_as_eager(Prologue(), given, marked=((0, 0), (1, 1), (2, 0)), strict=False)
    assert [layer.code for layer in report.layers] == ["internal.error"], str(report)


class Conjugated(Prologue):
    """Angles as complex numbers, conjugated after they were looked up: the numbers in memory are not the angles."""

    def __init__(self, dtype=torch.float32):
        super().__init__(dtype)
        cos, sin = self.cos_sin_cache.chunk(2, -1)
        self.register_buffer("frequencies", torch.complex(cos.contiguous(), sin.contiguous()))

    def angles(self, positions):
        return self.frequencies[positions[0]].unsqueeze(1), None

    def rotate(self, x, cos, sin):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * cos.conj()).flatten(-2)


def test_conjugated_frequencies():
    report = assert_as_eager(Conjugated(), arguments())
    assert len(report.fused) == 1, str(report)


def test_a_graph_without_an_owner():
    """Nothing but the graph is remembered."""
    graph = layer_graph()
    alone = torch.fx.Graph()
    alone.output(alone.graph_copy(graph, {}))
    before = image(alone)
    checkpoint = Checkpoint(alone)
    inserts(alone)
    checkpoint.restore()
    assert image(alone) == before
