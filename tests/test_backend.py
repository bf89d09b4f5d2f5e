"""Through the real Inductor: options, generated code, warm caches, environment, and what bad input gets."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import LAYERS, Run
from prologue import Prologue, arguments
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code

import fx_fusion
from fx_fusion import fusion_pass
from fx_fusion.proof.region_function import relative_difference

REFERENCE = {"fx_fusion.kernel": "reference"}
CALL = "torch.ops.fx_fusion.qk_norm_rope_cache.default("


def compile_and_run(model, args, **kwargs):
    with torch.no_grad():
        return torch.compile(model, backend="fx_fusion", **kwargs)(*args)


def test_is_a_listed_backend():
    assert "fx_fusion" in torch._dynamo.list_backends()


def test_entry_point_names_the_backend():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert 'fx_fusion = "fx_fusion.backend:fx_fusion"' in text


@pytest.mark.slow
class TestGeneratedCode:
    def code(self, family="qwen3_vl_text", dtype=torch.bfloat16, tokens=1):
        run = Run(family, dtype)
        run.prefill()
        model = torch.compile(run.model, backend="fx_fusion", options=REFERENCE)
        ids = torch.randint(1, 97, (2, tokens))
        _, sources = run_and_get_code(lambda: run.step(ids, model))
        (source,) = sources
        return source[source.index("def call(") :], run

    @pytest.mark.parametrize("tokens", [1, 5])
    def test_one_call_a_layer_and_no_copy(self, tokens):
        code, run = self.code(tokens=tokens)
        calls = re.findall(re.escape(CALL) + r"(.*)", code)
        assert len(calls) == LAYERS
        for call in calls:
            q, k, v = re.findall(r"reinterpret_tensor\((buf\d+), ", call)[:3]
            for name in (q, k, v):  # each a view of a matrix product's output, written by it and nothing else
                assert re.search(rf"extern_kernels\.(mm|addmm)\(.*out={name}\)", code), name
            assert len(re.findall(r"\barg\d+_1", call)) >= 2
        # The only buffers of a cache's size are the ones in which attention repeats the heads.
        repeated = 2 * run.caches()[0].numel()
        sizes = [eval(shape) for shape in re.findall(r"empty_strided_cpu\((\([^)]*\))", code)]
        large = [size for size in sizes if torch.Size(size).numel() >= run.caches()[0].numel()]
        assert all(torch.Size(size).numel() == repeated for size in large), large

    def test_no_leftover_prologue_kernel(self):
        """No kernel before a call normalises or rotates: what remains are rows of angles and slot arithmetic."""
        code, _ = self.code()
        for layer, before in enumerate(code.split(CALL)[:-1]):
            since_projection = before.rpartition("extern_kernels.mm(")[2]
            kernels = re.findall(r"\n\s+(cpp_fused\w+)\(", since_projection)
            assert len(kernels) <= 1, (layer, kernels)
            assert not any("rsqrt" in kernel or "neg" in kernel for kernel in kernels)


def test_serving_style_call_reads_the_table_and_the_caches_in_place():
    x, positions, slots, k_cache, v_cache = arguments(dtype=torch.bfloat16)
    model = Prologue(torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(model, backend="fx_fusion", options=REFERENCE)
        _, (code,) = run_and_get_code(lambda: compiled(x, positions, slots, k_cache, v_cache))
    (call,) = re.findall(re.escape(CALL) + r"(.*)", code)
    packed = set(re.findall(r"reinterpret_tensor\((buf\d+), ", call))
    assert len(packed) == 1, "q, k and v are views of one projection"
    body = code[code.index("def call(") :]
    assert "cpp_fused" not in body, "nothing is left of the prologue, its lookups and its interleaving"


def test_mode_and_inductor_options_pass_through():
    seen = {}

    class Probe(CustomGraphPass):
        def __call__(self, graph):
            seen["epilogue_fusion"] = torch._inductor.config.epilogue_fusion
            seen["nodes"] = [str(node.target) for node in graph.nodes]

        def uuid(self):
            return "probe"

    options = {**REFERENCE, "epilogue_fusion": False, "post_grad_custom_pre_pass": Probe()}
    compile_and_run(Prologue(), arguments(), options=options)
    assert seen["epilogue_fusion"] is False
    assert not any("fx_fusion" in name for name in seen["nodes"]), "a pass that was there runs first"
    assert len(fx_fusion.last_report().fused) == 1


@pytest.mark.slow
def test_mode_without_options():
    compile_and_run(Prologue(), arguments(), mode="max-autotune-no-cudagraphs")
    assert len(fx_fusion.last_report().recognised) == 1


def test_fusion_pass_in_another_pipeline():
    fused = torch.compile(
        Prologue(), options={"post_grad_custom_pre_pass": fx_fusion.FusionPass(fx_fusion.Config(kernel="reference"))}
    )
    with torch.no_grad():
        fused(*arguments())
    assert len(fx_fusion.last_report().fused) == 1


@pytest.mark.slow
def test_auto_rewrites_nothing_on_a_cpu_and_says_so():
    compile_and_run(Prologue(), arguments())
    report = fx_fusion.last_report()
    assert not report.fused
    assert len(report.recognised) == 1
    assert report.layers[0].code == "contract.kernel"
    assert "runs on AMD GPUs" in str(report)
    assert len(report.eligible("triton")) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fx_fusion.kernle": "auto"}, "unknown option 'fx_fusion.kernle'; fx_fusion's options are fx_fusion.kernel"),
        ({"fx_fusion.kernel": "cutlass"}, "fx_fusion.kernel must be one of 'auto', 'triton', 'aiter', 'reference'"),
        ({"fx_fusion.require": "all"}, "fx_fusion.require must be an integer of at least 0, got 'all'"),
        ({"fx_fusion.require": True}, "fx_fusion.require must be an integer"),
        ({"fx_fusion.strict": 1}, "fx_fusion.strict must be True or False, got 1"),
        ({"fx_fusion.inner": "jit"}, "fx_fusion.inner must be one of 'inductor', 'eager', got 'jit'"),
        ({"fx_fusion.mode": "fast"}, "fx_fusion.mode must be one of 'default', 'reduce-overhead'"),
        ({"fx_fusion.target": "tpu"}, "target must be 'cpu', 'cuda', 'hip', 'gfx…' or 'sm_…', got 'tpu'"),
        ({"fx_fusion.kernel": "aiter"}, "fx_fusion.kernel='aiter' cannot serve this call: aiter runs on AMD GPUs"),
        ({"fx_fusion.kernel": "triton"}, "fx_fusion.kernel='triton' cannot serve this call"),
        ({"epilogue_fusoin": True}, "epilogue_fusoin"),
    ],
)
def test_bad_options_are_errors(options, message):
    with pytest.raises(Exception, match=re.escape(message)):
        compile_and_run(Prologue(), arguments(), options=options)


def test_require_fails_with_the_report():
    with pytest.raises(BackendCompilerFailed, match=r"fx_fusion.require=2, but 1 fused calls") as failed:
        compile_and_run(Prologue(), arguments(), options={**REFERENCE, "fx_fusion.require": 2})
    assert "rewritten by reference" in str(failed.value)


@pytest.mark.slow
def test_require_ignores_graphs_without_a_store():
    with torch.no_grad():
        compiled = torch.compile(torch.nn.ReLU(), backend="fx_fusion", options={"fx_fusion.require": 1})
        assert compiled(torch.ones(2)).sum() == 2


@pytest.mark.slow
def test_training_is_declined_and_still_trains():
    model, (x, positions, slots, *_) = Prologue(), arguments()

    def loss(run):
        model.zero_grad()
        run(x, positions, slots, torch.zeros(64, 2, 16), torch.zeros(64, 2, 16)).sum().backward()
        return model.o_proj.weight.grad.clone()

    expected = loss(model)
    actual = loss(torch.compile(model, backend="fx_fusion", options=REFERENCE))
    assert {layer.code for layer in fx_fusion.last_report().layers} == {"graph.training"}
    assert relative_difference(actual, expected) < 1e-5


def test_environment_chooses_the_kernel(monkeypatch):
    monkeypatch.setenv("FX_FUSION_KERNEL", "reference")
    compile_and_run(Prologue(), arguments())
    assert len(fx_fusion.last_report().fused) == 1


def test_environment_with_an_unknown_kernel(monkeypatch):
    monkeypatch.setenv("FX_FUSION_KERNEL", "cutlass")
    with pytest.raises(BackendCompilerFailed, match="FX_FUSION_KERNEL must be one of auto, triton"):
        compile_and_run(Prologue(), arguments())


@pytest.mark.slow
def test_environment_disables(monkeypatch):
    monkeypatch.setenv("FX_FUSION_DISABLE", "1")
    compile_and_run(Prologue(), arguments(), options=REFERENCE)
    assert [layer.code for layer in fx_fusion.last_report().layers] == ["graph.disabled"]


@pytest.mark.slow
def test_fuel_stops_after_n(monkeypatch):
    from fx_fusion import fusion_pass

    monkeypatch.setattr(fusion_pass, "_rewrites_done", 0)
    monkeypatch.setenv("FX_FUSION_FUEL", "1")
    run = Run("qwen3")
    run.prefill()
    options = {**REFERENCE, "fx_fusion.inner": "eager"}
    run.step(torch.ones(2, 1, dtype=torch.int64), torch.compile(run.model, backend="fx_fusion", options=options))
    report = fx_fusion.last_report()
    assert (len(report.fused), len(report.recognised)) == (1, 2)
    assert report.layers[1].code == "graph.fuel"


def test_a_reader_that_raises_declines(monkeypatch):
    from fx_fusion.patterns.qk_norm_rope_cache import match as qk_norm_rope_cache

    def broken(*_):
        raise ZeroDivisionError("broken on purpose")

    monkeypatch.setattr(qk_norm_rope_cache, "tell_key_from_value", broken)
    compile_and_run(Prologue(), arguments(), options={**REFERENCE, "fx_fusion.inner": "eager"})
    (layer,) = fx_fusion.last_report().layers
    assert (layer.code, layer.reason) == ("internal.error", "ZeroDivisionError: broken on purpose")
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="broken on purpose"):
        compile_and_run(
            Prologue(), arguments(), options={**REFERENCE, "fx_fusion.inner": "eager", "fx_fusion.strict": True}
        )


WARM = """
import sys, torch, fx_fusion
sys.path.insert(0, {tests!r})
from prologue import Prologue, arguments
torch.manual_seed(0)
model, args = Prologue(), arguments()
options = {{"fx_fusion.kernel": "reference", "fx_fusion.require": {require}}}
with torch.no_grad():
    torch.compile(model, backend="fx_fusion", options=options)(*args)
counters = torch._dynamo.utils.counters
hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
report = fx_fusion.last_report()
print("hits", hits, "fused", len(report.fused), "pass ran", counters["fx_fusion"]["graphs"])
"""


@pytest.mark.slow
def test_a_second_process_with_a_warm_cache_tells_the_truth(tmp_path):
    def process(require=1):
        source = WARM.format(tests=str(Path(__file__).parent), require=require)
        return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)

    first, second = process(), process()
    assert "hits 0 fused 1 pass ran 1" in first.stdout, first.stderr
    assert "fused 1 pass ran 0" in second.stdout, second.stderr
    assert "hits 0" not in second.stdout
    for demanding in (process(require=2), process(require=2)):
        assert "NotFused: fx_fusion.require=2, but 1 fused calls" in demanding.stderr


def test_uuid_covers_every_module():
    """One that is left out would be changed, and old results be served from a compile cache."""
    names = [name for name in sys.modules if name.split(".")[0] == "fx_fusion"]
    files = {Path(module.__file__).resolve() for name in names if (module := sys.modules[name]).__file__}
    assert {path.resolve() for path in fusion_pass._sources()} >= files
    assert len(files) > 60


def test_uuid_follows_what_the_result_depends_on(monkeypatch):
    uuid = fx_fusion.FusionPass().uuid()
    assert uuid == fx_fusion.FusionPass().uuid()
    assert uuid != fx_fusion.FusionPass(fx_fusion.Config(kernel="reference")).uuid()
    monkeypatch.setenv("FX_FUSION_DISABLE", "1")
    assert uuid != fx_fusion.FusionPass().uuid()
    monkeypatch.setenv("FX_FUSION_FUEL", "3")
    assert fx_fusion.FusionPass().uuid() is None


@pytest.mark.slow
def test_two_models_that_differ_in_a_buffer_only():
    """Values of graph inputs are operands: the second model must not get the first one's."""
    first, second = Prologue(), Prologue()
    second.load_state_dict({name: value * 2 for name, value in first.state_dict().items()})
    for model in (first, second):
        args = arguments()
        caches = [cache.clone() for cache in args[3:]]
        with torch.no_grad():
            expected = model(*args[:3], *caches)
            actual = torch.compile(model, backend="fx_fusion", options=REFERENCE)(*args)
        assert relative_difference(actual, expected) < 1e-5
        assert relative_difference(args[3], caches[0]) < 1e-5


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fuses_and_is_proved_in_either_mode(mode):
    options = {"fx_fusion.inner": "eager", "fx_fusion.kernel": "reference", "fx_fusion.strict": True}
    with mode():
        torch.compile(Prologue(), backend="fx_fusion", options=options)(*arguments())
    assert [layer.proof for layer in fx_fusion.last_report().fused] == ["proved"]
