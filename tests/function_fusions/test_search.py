"""Where a pattern stands: every layer of many, one search for all that are equal, results that belong together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fx_fusion
from function_fusions import ops, patterns  # noqa: F401  (registers the operations)
from fx_fusion.config import Config
from fx_fusion.function_fusions.equivalence import Comparison
from fx_fusion.function_fusions.search import Search
from fx_fusion.function_fusions.tracer import Tracer
from fx_fusion.fusion_pass import apply
from fx_fusion.mutation.mutants import capture
from fx_fusion.testing import assert_fuses
from fx_fusion.testing import run as run_fused

T, HQ, HK, D, WIDTH = 5, 4, 2, 16, 64


def norm(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def rope(x, cos, sin):
    a, b = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Layer(nn.Module):
    """Norms of the hidden state too, which are no part of what is looked for."""

    def __init__(self):
        super().__init__()
        self.qk = nn.Linear(WIDTH, (HQ + HK) * D, bias=False)
        self.weights = nn.ParameterList([nn.Parameter(torch.rand(n) + 0.5) for n in (WIDTH, D, D)])

    def forward(self, x, cos, sin):
        q, k = self.qk(norm(x, self.weights[0])).view(-1, HQ + HK, D).split([HQ, HK], 1)
        q, k = rope(norm(q, self.weights[1]), cos, sin), rope(norm(k, self.weights[2]), cos, sin)
        return x + torch.ops.own_tests.attend(q, k).flatten(1)


class Model(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x, cos, sin):
        for layer in self.layers:
            x = layer(x, cos, sin)
        return x


def arguments():
    return torch.randn(T, WIDTH), torch.randn(T, D // 2), torch.randn(T, D // 2)


@pytest.fixture
def qk_norm_rope():
    with fx_fusion.fusions():
        fx_fusion.register_fusion(fx_fusion.QkNormRope())
        yield


@pytest.mark.parametrize("layers", [1, 2, 3, 6])
def test_every_layer_of_many_that_share_their_angles(qk_norm_rope, layers):
    report = assert_fuses(Model(layers), arguments(), count=layers)
    assert {str(layer.reading["tensors"]) for layer in report.fused} == {
        "{'q': '[5, 4, 16] float32', 'k': '[5, 2, 16] float32', 'q_weight': '[16] float32', "
        "'k_weight': '[16] float32', 'cos': '[5, 8] float32', 'sin': '[5, 8] float32'}"
    }


@pytest.fixture
def counted(monkeypatch):
    """How often anything was compared, and traced."""
    counts = {"compared": 0, "traced": 0}
    difference, trace = Comparison.difference, Tracer.trace

    def comparing(*args):
        counts["compared"] += 1
        return difference(*args)

    def tracing(self, *args):
        known = len(self._known)
        found = trace(self, *args)
        counts["traced"] += len(self._known) - known
        return found

    monkeypatch.setattr(Comparison, "difference", comparing)
    monkeypatch.setattr(Tracer, "trace", tracing)
    return counts


def test_a_further_equal_layer_needs_no_comparison(qk_norm_rope, counted):
    costs = {}
    for layers in (3, 12):
        counted.update(compared=0, traced=0)
        report = apply(capture(Model(layers), arguments()).module.graph, Config(kernel="reference"))
        assert len(report.fused) == layers
        costs[layers] = dict(counted)
    assert costs[12] == costs[3]


def test_a_place_that_is_no_match_is_compared_once(counted):
    """The norms of the hidden state have no rotation after them: each is looked at, one is compared."""

    def pattern(x, weight, eps: float):
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + eps) * weight

    costs = {}
    with fx_fusion.fusions():
        fx_fusion.register_fusion(pattern=pattern, replacement=pattern, name="norm without mean")
        for layers in (6, 12):
            counted.update(compared=0, traced=0)
            report = apply(capture(Model(layers), arguments()).module.graph, Config(kernel="reference"))
            assert not report.fused and len(report.declined) == 3 * layers, str(report)
            costs[layers] = dict(counted)
    assert costs[12] == costs[6]


def test_a_layer_that_differs_is_compared_by_itself(qk_norm_rope):
    model = Model(4)
    model.layers[2].forward = lambda x, cos, sin: Layer.forward(model.layers[2], x, cos, -sin)
    model.layers[3].forward = lambda x, cos, sin: Layer.forward(model.layers[3], x, cos.sin(), sin)
    report = assert_fuses(model, arguments(), count=4)
    assert [layer.fusion for layer in report.fused] == ["qk_norm_rope"] * 4


class Towers(nn.Module):
    """Two projections side by side, computed in turns: the key nearest in the graph is the other tower's query."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Layer(), Layer()

    def forward(self, x, cos, sin):
        (qa, ka), (qb, kb) = (tower.qk(x).view(-1, HQ + HK, D).split([HQ, HK], 1) for tower in (self.a, self.b))
        qa, qb = rope(norm(qa, self.a.weights[1]), cos, sin), rope(norm(qb, self.b.weights[1]), cos, sin)
        ka, kb = rope(norm(ka, self.a.weights[2]), cos, sin), rope(norm(kb, self.b.weights[2]), cos, sin)
        return torch.ops.own_tests.attend(qa, ka) - torch.ops.own_tests.attend(qb, kb)


def test_results_of_one_projection_belong_together(qk_norm_rope):
    report = assert_fuses(Towers(), arguments(), count=2)
    assert {layer.reading["tensors"]["k"] for layer in report.fused} == {"[5, 2, 16] float32"}


class KeyLater(Layer):
    """The key is projected when the query is ready: one of the call's operands comes after one of its results."""

    def __init__(self):
        super().__init__()
        self.k = nn.Linear(WIDTH, HK * D, bias=False)
        self.q = nn.Linear(WIDTH, HQ * D, bias=False)

    def forward(self, x, cos, sin):
        q = rope(norm(self.q(x).unflatten(-1, (-1, D)), self.weights[1]), cos, sin)
        k = rope(norm(self.k(x).unflatten(-1, (-1, D)), self.weights[2]), cos, sin)
        return x + torch.ops.own_tests.attend(q, k).flatten(1)


def test_an_operand_after_a_result(qk_norm_rope):
    model = Model(3)
    model.layers = nn.ModuleList(KeyLater() for _ in range(3))
    assert_fuses(model, arguments(), count=3)


def two_ways(x, y):
    return x.exp() * 2.0, y.exp() * 3.0


def crossed(x, y):
    """Each pair by itself could be one call. Both could not: each would need a result of the other first."""
    a = x.exp() * 2.0
    b = (a @ y).exp() * 3.0
    c = y.exp() * 2.0
    d = (c @ x).exp() * 3.0
    return a + d, c + b


def test_two_calls_that_need_each_other(monkeypatch):
    args = (torch.randn(8, 8) / 9, torch.randn(8, 8) / 9)
    with fx_fusion.fusions():
        fx_fusion.register_fusion(pattern=two_ways, replacement=two_ways, name="two")
        fused = len(run_fused(crossed, args).report.fused)
        expected, actual = crossed(*args), run_fused(crossed, args).outputs
    torch.testing.assert_close(actual, expected)
    assert fused >= 1


def test_the_order_of_calls():
    """Of two places that are in order each, and not together, the first is kept."""
    from fx_fusion.function_fusions.order import in_order
    from fx_fusion.function_fusions.place import Place
    from fx_fusion.graph.analysis import GraphAnalysis

    graph = capture(crossed, (torch.randn(8, 8), torch.randn(8, 8))).module.graph
    analysis = GraphAnalysis(graph)
    x, y = (node for node in graph.nodes if node.op == "placeholder")
    products = [node for node in graph.nodes if node.target is torch.ops.aten.mm.default]
    results = [node for node in graph.nodes if node.target is torch.ops.aten.mul.Tensor]
    a, b, c, d = results
    with fx_fusion.fusions():
        handle = fx_fusion.register_fusion(pattern=two_ways, replacement=two_ways, name="two")
    (pattern,) = handle.fusion._patterns
    first = Place.of(analysis, pattern, {}, {"x": x, "y": products[1]}, {}, (a, d))
    second = Place.of(analysis, pattern, {}, {"x": y, "y": products[0]}, {}, (c, b))
    assert in_order(analysis, [first]) == ([first], []) and in_order(analysis, [second]) == ([second], [])
    kept, declines = in_order(analysis, [first, second])
    assert kept == [first] and [decline.code for decline in declines] == ["region.not_convex"]


def test_equal_windows_are_searched_once():
    """Residual layers do not make them grow: a norm's window ends where a region would need more tensors."""
    from fx_fusion.graph.analysis import GraphAnalysis

    with fx_fusion.fusions():
        handle = fx_fusion.register_fusion(pattern=patterns.rms_norm, replacement=patterns.my_rms_norm)
        (pattern,) = handle.fusion._patterns
    searched = {}
    for layers in (6, 12):
        search = Search(GraphAnalysis(capture(Model(layers), arguments()).module.graph), pattern, Tracer())
        assert len(list(search.places(set()))) == 3 * layers
        searched[layers] = len(search._known)
    assert searched[6] == searched[12]
