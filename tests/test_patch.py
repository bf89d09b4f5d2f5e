"""`python -m fx_fusion patch`: what is printed, executed, gives what the model's own lines give."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import two_layers
from models import Run
from prologue import Prologue, arguments
from torch.fx import GraphModule

import fx_fusion
from fx_fusion.cli import patch
from fx_fusion.cli.subject import Subject
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.mutation.mutants import capture
from fx_fusion.patterns.qk_norm_rope_cache.fusion import QkNormRopeCache
from fx_fusion.patterns.qk_norm_rope_cache.source_text import function, operands, place, quoted, written_axes

HERE = Path(__file__).parent


def load(name):
    """tests/patterns is no package: see CONTRIBUTING.md."""
    spec = importlib.util.spec_from_file_location(name, HERE / "patterns" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


SPELLINGS = load("test_spellings").SPELLINGS
STORES = load("test_stores")


def written(source, name):
    namespace = {"fx_fusion": fx_fusion}
    exec(source, namespace)
    return namespace[name]


def read(fn, args, kwargs=None):
    """The first match of the graph of `fn`, the graph's analysis, and a function that runs it up to some nodes."""
    captured = capture(fn, args, kwargs)
    analysis = GraphAnalysis(captured.module.graph)
    fusion = QkNormRopeCache()
    candidates, _ = fusion.find(analysis)
    match = fusion.read(analysis, candidates[0], {}).match

    def values_of(nodes):
        graph = torch.fx.Graph()
        copied = {}
        graph.graph_copy(captured.module.graph, copied)
        graph.output(tuple(copied[node] for node in nodes))
        inputs = [each.clone() if isinstance(each, torch.Tensor) else each for each in captured.inputs]
        return GraphModule(captured.module, graph)(*inputs)

    return match, analysis, values_of


def assert_the_call_is_right(fn, args, kwargs=None):
    match, analysis, values_of = read(fn, args, kwargs)
    source = function("fused", match, {}, "reference")
    given = operands(match, {})
    values = [value.clone() for value in values_of([operand.node for operand in given])]
    batch = [int(match.grid[0])] if match.grid[0] != 1 else []
    with torch.no_grad():
        results = written(source, "fused")(*values, *batch)
    outs = [match.query.out, *([match.key.out] if match.return_k else [])]
    results = results if isinstance(results, tuple) else (results,)
    final = {node.args[0]: node.args[1] for node in analysis.nodes if node.target is torch.ops.aten.copy_.default}
    stores = {stored.store.cache: final[stored.store.cache] for stored in (match.key_store, match.value_store)}
    caches = [values[[operand.node for operand in given].index(cache)] for cache in stores]
    expected = values_of([*outs, *stores.values()])
    assert len(expected) == len(results) + len(caches)
    for actual, wanted in zip((*results, *caches), expected, strict=True):
        assert actual.shape == wanted.shape, source
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
    return source


@pytest.mark.parametrize(
    "name",
    [
        "SplitOverHeads", "OrderVKQ", "NormGemma", "NoNorm", "GptJ", "PartialRotary", "AnglesOneDimensional",
        "AnglesSectioned", "AnglesComputed", "SlotsModulo", "FreshAttention",
    ],
)  # fmt: skip
def test_spellings(name):
    assert_the_call_is_right(SPELLINGS[name](), arguments())


@pytest.mark.parametrize("layout", STORES.LAYOUTS, ids=lambda cls: cls.__name__)
def test_cache_layouts(layout):
    assert_the_call_is_right(layout(), arguments(cache=layout.shape))


@pytest.mark.parametrize("model", ["FirstDimension", "SecondDimension", "ValuesFirst", "SideBySide"])
def test_keys_and_values_in_one_tensor(model):
    model = getattr(STORES, model)
    source = assert_the_call_is_right(model(), STORES.one_tensor_arguments(model))
    assert "kv_cache" in source or "vk_cache" in source


def test_scales():
    class Scaled(Prologue):
        def forward(self, x, positions, slots, k_cache, v_cache, scale):
            self.scale = scale
            return super().forward(x, positions, slots, k_cache, v_cache)

        def store(self, cache, slots, value):
            cache[slots] = value / self.scale

    args = (*arguments(), torch.tensor(0.5))
    assert "k_scale=" in assert_the_call_is_right(Scaled(), args)

    class Fixed(Prologue):
        def store(self, cache, slots, value):
            cache[slots] = value / 0.25

    assert "k_scale=0.25" in assert_the_call_is_right(Fixed(), arguments())


def test_what_has_no_words_says_so():
    class Sliced(Prologue):
        def store(self, cache, slots, value):
            cache[3 : 3 + value.shape[0]] = value

    text, complete = patch.patch(Subject(Sliced(), arguments()))
    assert not complete and "has no snippet: the cache is filled by a slice" in text
    compile(text, "snippet", "exec")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tokens"), [("qwen3_vl_text", 1), ("qwen3_5_text", 5)])
def test_transformers(family, tokens):
    run = Run(family)
    run.prefill(3)
    source = assert_the_call_is_right(run.model, (), run.inputs(torch.ones(2, tokens, dtype=torch.int64)))
    assert "batch" in source.splitlines()[0]
    assert "k_cache=k_cache.transpose(1, 2)" in source


# --- by hand --------------------------------------------------------------------------------------------------------


def printed(subject, capsys):
    commands = argparse.ArgumentParser().add_subparsers()
    patch.add_to(commands)
    chosen = commands.choices["patch"].parse_args([subject])
    code = chosen.run(chosen)
    return code, capsys.readouterr()


def test_the_snippet_serves_in_the_place_of_the_lines(capsys):
    """As a user would: the printed function in a forward of one's own."""
    code, out = printed("two_layers:shorter", capsys)
    assert code == 0
    fused = written(out.out, "fused_layers_0")

    class ByHand(Prologue):
        def forward(self, x, positions, slots, k_cache, v_cache):
            weights = self.q_weight, self.k_weight
            q = fused(self.project(x), *weights, self.cos_sin_cache, positions, slots, k_cache, v_cache)
            return self.consume(q, None, None, k_cache, v_cache)

    model, args = Prologue(), arguments()
    by_hand = ByHand()
    by_hand.load_state_dict(model.state_dict())
    caches = [cache.clone() for cache in args[3:]]
    with torch.no_grad():
        torch.testing.assert_close(by_hand(*args[:3], *caches), model(*args))
    for ours, theirs in zip(caches, args[3:], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_is_printed(capsys):
    code, out = printed("two_layers:clamped", capsys)
    assert code == 1, "one layer cannot be patched"
    source = out.out
    compile(source, "snippet", "exec")
    assert "layers.0 … layers.2 (2 layers alike)" in source
    assert "q_weight: self.layers.0.q_weight, float32 [16]" in source
    assert "return self.qkv_proj(x)" in source, "where the projection's output comes from"
    assert "stays as it is: proof.not_analytic" in source and "two_layers.py:" in source
    lines = [line for line in source.splitlines() if line.startswith("# -  ")]
    assert [line.split("  ")[-1].strip() for line in lines] == [
        "q, k, v = self.split(self.project(x))",
        "q = self.rotate(self.norm(q, self.q_weight), cos, sin)",
        "k = self.rotate(self.norm(k, self.k_weight), cos, sin)",
        "self.store(k_cache, slots, k)",
        "self.store(v_cache, slots, v)",
    ]


def test_a_statement_of_several_lines_is_replaced_whole():
    class Wide(Prologue):
        def forward(self, x, positions, slots, k_cache, v_cache):
            q, k, v = self.split(self.project(x))
            cos, sin = self.angles(positions)
            q, k = (
                self.rotate(self.norm(q, self.q_weight), cos, sin),
                self.rotate(self.norm(k, self.k_weight), cos, sin),
            )
            self.store(k_cache, slots, k)
            v_cache[
                slots
            ] = v  # fmt: skip
            return self.consume(q, k, v, k_cache, v_cache)

    match, analysis, _ = read(Wide(), arguments())
    where = place(analysis, match)
    text = quoted(where).splitlines()
    assert "q, k, v = self.split" in text[1] and "] = v" in text[-1]
    assert where.function == "forward"


def test_a_kernel_may_be_named():
    model, args = two_layers.shorter()
    text, complete = patch.patch(Subject(model, args), target="gfx942", kernel="aiter")
    assert complete and 'implementation="aiter"' in text
    text, _ = patch.patch(Subject(model, args), target="gfx942")
    assert 'implementation="triton"' in text


def test_a_model_without_a_layer(capsys):
    text, complete = patch.patch(Subject(lambda x: x * 2, (torch.ones(3),)))
    assert not complete and "store.missing" in text
    compile(text, "snippet", "exec")


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ([0] * 8, "[0] * 8"),
        ([0] * 3 + [1] * 3 + [2] * 2, "[0] * 3 + [1] * 3 + [2] * 2"),
        ([0, 1, 2] * 20 + [0] * 4, "[0, 1, 2] * 20 + [0] * 4"),
        ([0, 1, 2] * 4, "[0, 1, 2] * 4"),
        ([0, 2, 1, 0, 2, 1], "[0, 2, 1, 0, 2, 1]"),
        ([0, 1, 2, 0, 1, 0, 0, 1, 0], "[0, 1, 2, 0, 1, 0, 0, 1, 0]"),
    ],
)
def test_axes_are_written_short_and_right(axes, words):
    assert written_axes(axes) == words
    assert eval(words) == axes
