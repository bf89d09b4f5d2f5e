"""Each declared equivalence: the operation as PyTorch computes it beside the form that it is taken for."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from fx_fusion.function_fusions.canonical import Steps
from fx_fusion.function_fusions.equivalences import ATTENTION, MEANING, OPTIONAL, RULES
from fx_fusion.function_fusions.steps import Kind, Step, schedule

aten = torch.ops.aten
SPECIAL = torch.tensor(
    [-math.inf, -7.5, -2.5, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 7.5, math.inf, math.nan, 1.0]
)
ROWS = torch.stack([SPECIAL, SPECIAL.flip(0), SPECIAL.nan_to_num(0.0, 3.0, -3.0), torch.ones(16)])
BOUNDS = (-2.0, 0.0, 1.5)

ONE = {
    "relu": lambda x: aten.relu(x),
    "round": lambda x: aten.round(x),
    "amax": lambda x: aten.amax(x, [-1]),
    "amax kept": lambda x: aten.amax(x, [0], True),
    "amin": lambda x: aten.amin(x, [0, 1]),
    "max": lambda x: aten.max(x),
    "min": lambda x: aten.min(x),
    "max along": lambda x: aten.max(x, -1)[0],
    "max along kept": lambda x: aten.max(x, 0, True)[0],
    "min along": lambda x: aten.min(x, -1)[0],
    "hardtanh": lambda x: aten.hardtanh(x),
    "logsumexp's maximum": lambda x: aten.where(aten.eq(aten.abs(x), math.inf), aten.full([], 0.0), x),
    "finite rows": lambda x: aten.logical_not(
        aten.any(aten.logical_not(aten.mul(aten.eq(x, x), aten.ne(aten.abs(x), math.inf))), [-1], True)
    ),
    "not": lambda x: aten.where(aten.logical_not(aten.lt(x, 0.5)), x, aten.neg(x)),
}
BOUNDED = {
    "clamp_min": lambda x, c: aten.clamp_min(x, c),
    "clamp_max": lambda x, c: aten.clamp_max(x, c),
    "maximum": lambda x, c: aten.maximum(x, aten.full([], c)),
    "maximum, mirrored": lambda x, c: aten.maximum(aten.full([], c), x),
    "minimum": lambda x, c: aten.minimum(x, aten.full([], c)),
    "clamp from below": lambda x, c: aten.clamp(x, c),
    "clamp from above": lambda x, c: aten.clamp(x, None, c),
    "where less": lambda x, c: aten.where(aten.lt(x, c), aten.full([], c), x),
    "where at most": lambda x, c: aten.where(aten.le(x, c), aten.full([], c), x),
    "where greater": lambda x, c: aten.where(aten.gt(x, c), aten.full([], c), x),
    "where at least": lambda x, c: aten.where(aten.ge(x, c), aten.full([], c), x),
    "where greater, itself": lambda x, c: aten.where(aten.gt(x, c), x, aten.full([], c)),
    "lt": lambda x, c: aten.lt(x, c),
    "le": lambda x, c: aten.le(x, c),
    "gt": lambda x, c: aten.gt(x, c),
    "ge": lambda x, c: aten.ge(x, c),
}
TWICE = {
    "clamp": lambda x, a, b: aten.clamp(x, a, b),
    "from below first": lambda x, a, b: aten.clamp_max(aten.clamp_min(x, a), b),
    "from above first": lambda x, a, b: aten.clamp_min(aten.clamp_max(x, b), a),
    "rounded after": lambda x, a, b: aten.round(aten.clamp_max(aten.clamp_min(x, a), b)),
}
CASES = {
    **{name: (f, ()) for name, f in ONE.items()},
    **{f"{name} {c}": (f, (c,)) for name, f in BOUNDED.items() for c in BOUNDS},
    **{f"{name} {a} {b}": (f, (a, b)) for name, f in TWICE.items() for a, b in itertools.product(BOUNDS, BOUNDS)},
}


def canonical(f, *tensors):
    graph = make_fx(f)(*tensors).graph
    steps = Steps(graph.nodes)
    (result,) = graph.output_node().all_input_nodes
    return steps[result], [steps[node] for node in graph.nodes if node.op == "placeholder"]


def computed(result: Step, inputs, tensors):
    """The value of the canonical steps, forms as they are declared to mean."""
    known = dict(zip(inputs, tensors, strict=True))

    def value(leaf):
        return known[leaf] if isinstance(leaf, Step) else leaf

    for step in schedule([result], known):
        args = torch.utils._pytree.tree_map(value, list(step.args))
        kwargs = torch.utils._pytree.tree_map(value, dict(step.kwargs))
        known[step] = MEANING.get(step.target, step.target)(*args, **kwargs)
    return known[result]


def assert_same(a, b):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    same = (a == b) | ((a != a) & (b != b))
    assert same.all(), (a[~same], b[~same])


@pytest.mark.parametrize("name", CASES)
def test_a_spelling_is_its_form(name):
    f, numbers = CASES[name]
    result, inputs = canonical(lambda x: f(x, *numbers), ROWS)
    assert_same(computed(result, inputs, [ROWS]), f(ROWS, *numbers))


def names(f, *tensors):
    result, inputs = canonical(f, *tensors)
    return [step.name for step in schedule([result], inputs) if step.kind is Kind.FREE]


@pytest.mark.parametrize("name", [n for n in TWICE if n != "rounded after"])
def test_spellings_of_a_clamp_are_one(name):
    assert names(lambda x: TWICE[name](x, -2.0, 1.5), ROWS) == ["maximum", "minimum"]


def test_one_form_and_another_are_told_apart():
    """Where a spelling is another function on NaN, or with its bounds crossed, it keeps its own steps."""
    assert names(lambda x: BOUNDED["where greater, itself"](x, 1.5), ROWS) != ["maximum"]
    assert names(lambda x: TWICE["from above first"](x, 1.5, -2.0), ROWS) == ["minimum", "maximum"]
    assert names(lambda x: aten.round(aten.clamp_max(x, 1.5)), ROWS) == ["minimum", "aten.round.default"]
    assert names(lambda x: aten.clamp_max(aten.round(x), 2.0), ROWS) == names(
        lambda x: aten.round(aten.clamp_max(x, 2.0)), ROWS
    )
    assert "amax" not in names(lambda x: aten.max(x, -1)[1], ROWS)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(causal, masked):
    if causal and masked:
        pytest.skip("PyTorch takes one of them")
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    mask = torch.randn(5, 5) if masked else None

    def f(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=0.3)

    result, inputs = canonical(f, q, k, v)
    assert result.target == "attention"
    tensors = dict(zip(inputs, (q, k, v), strict=True))
    args = [tensors.get(a, mask) if isinstance(a, Step) else a for a in result.args]
    torch.testing.assert_close(MEANING["attention"](*args), f(q, k, v))


def test_every_backend_of_attention_is_known():
    """An operation that PyTorch adds has to be declared, or its first result to be seen not to be attention."""
    backends = {name for name in dir(aten) if name.startswith("_scaled_dot_product") and "backward" not in name}
    declared = {op._schema.name.removeprefix("aten::") for op in ATTENTION}
    apart = {"_scaled_dot_product_attention_math", "_scaled_dot_product_attention_math_for_mps"}
    quantised = {name for name in backends if "quantized" in name}
    assert backends - apart - quantised <= declared | {"_scaled_dot_product_attention"}


@pytest.mark.parametrize("form", sorted(OPTIONAL))
def test_what_one_spelling_may_have_alone_cancels(form):
    """A softmax, with anything finite subtracted."""
    assert form in MEANING
    x = torch.randn(4, 16, dtype=torch.float64)
    shift = torch.randn(4, 1, dtype=torch.float64)
    torch.testing.assert_close(torch.softmax(x - shift, -1), torch.softmax(x, -1))


def test_every_rule_is_tried(monkeypatch):
    """A rule that nothing here reaches is one that nobody compared."""
    reached = set()
    rules = {rule for each in RULES.values() for rule in each}

    def watched(rule):
        def watching(step):
            found = rule(step)
            if found is not None:
                reached.add(rule)
            return found

        return watching

    for target, each in list(RULES.items()):
        monkeypatch.setitem(RULES, target, [watched(rule) for rule in each])
    for f, numbers in CASES.values():
        canonical(lambda x: f(x, *numbers), ROWS)  # noqa: B023
    q = torch.randn(2, 3, 5, 8)
    canonical(lambda q: F.scaled_dot_product_attention(q, q, q), q)
    canonical(lambda t, i: aten.index(t, [i]), ROWS, torch.tensor([1, 2]))
    canonical(lambda t: aten.as_strided(aten.exp(t), [64], [1]), ROWS)
    assert rules == reached, {rule.__name__ for rule in rules - reached}


@pytest.mark.parametrize(
    "f",
    [
        lambda t, i: aten.index(t, [i]),
        lambda t, i: aten.embedding(t, i),
        lambda t, i: aten.index_select(t, 0, i),
    ],
)
def test_rows_are_one_step(f):
    result, inputs = canonical(f, torch.randn(7, 3), torch.tensor([0, 6, 3]))
    assert result.kind is Kind.LOOKUP and list(result.args) == inputs


def test_bytes_are_no_rows():
    result, _ = canonical(
        lambda t, i: aten.index(t, [i]), torch.randn(4, 3), torch.tensor([0, 1, 1, 0], dtype=torch.uint8)
    )
    assert result.kind is Kind.FREE
