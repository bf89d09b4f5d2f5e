"""On a CUDA or ROCm device: the same models through the real Inductor, and captured in a graph."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, LAYERS, VOCABULARY, Run

import fx_fusion
from fx_fusion.proof.region_function import relative_difference

pytestmark = pytest.mark.gpu

KERNELS = ("reference", "triton")


def options(kernel, mode=None):
    mode = {"fx_fusion.mode": mode} if mode else {}
    return {"fx_fusion.kernel": kernel, "fx_fusion.require": LAYERS, "fx_fusion.strict": True, **mode}


def decode(run, model=None, steps=5):
    tokens = run.prefill().argmax(-1, keepdim=True)
    chosen, logits = [tokens], []
    for _ in range(steps):
        logits.append(run.step(tokens, model).clone())
        tokens = logits[-1].argmax(-1, keepdim=True)
        chosen.append(tokens)
    return torch.cat(chosen, 1), torch.stack(logits)


# Transformers' fallback for grouped matrix products in float32 synchronises, so a MoE model cannot be captured in it.
CASES = [
    *((family, None) for family in FAMILIES),
    *((family, "reduce-overhead") for family in ("qwen3", "qwen3_vl_text")),
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("family", "mode"), CASES)
def test_decode_gives_eagers_tokens(family, mode, kernel):
    torch.backends.cuda.matmul.allow_tf32 = False
    reference, fused = Run(family, device="cuda"), Run(family, device="cuda")
    expected, expected_logits = decode(reference)
    model = torch.compile(fused.model, backend="fx_fusion", options=options(kernel, mode))
    tokens, logits = decode(fused, model)
    report = fx_fusion.last_report()
    assert [layer.kernel for layer in report.fused] == [kernel] * LAYERS, str(report)
    assert len(report.layers) == LAYERS
    assert torch.equal(tokens, expected)
    assert relative_difference(logits, expected_logits) < 1e-4


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_vl_text"])
def test_bfloat16_error_is_no_larger_than_stock_inductors(family, kernel):
    torch.manual_seed(3)
    forced = torch.randint(1, VOCABULARY, (6, 2, 1), device="cuda")
    source = Run(family, torch.bfloat16)

    def logits(dtype, backend, chosen):
        run = Run(family, dtype, device="cuda")
        run.copy_weights(source)
        run.prefill()
        torch._dynamo.reset()
        model = None if backend is None else torch.compile(run.model, backend=backend, options=chosen)
        return torch.stack([run.step(tokens, model).double() for tokens in forced])

    exact = logits(torch.float64, None, None)
    stock = logits(torch.bfloat16, "inductor", {})
    fused = logits(torch.bfloat16, "fx_fusion", options(kernel))
    stock_error, fused_error = ((run - exact).square().mean().sqrt() for run in (stock, fused))
    assert fused_error <= stock_error * 1.1, (fused_error, stock_error)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_cache_is_copied(kernel):
    """Peak memory of a step grows by far less than one cache."""
    run = Run("qwen3", torch.bfloat16, device="cuda")
    from transformers import StaticCache

    run.cache = StaticCache(config=run.model.config, max_cache_len=1 << 17)
    tokens = run.prefill().argmax(-1, keepdim=True)
    one_cache = run.caches()[0].numel() * 2

    def attention_free(model):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run.step(tokens, model)
        return torch.cuda.max_memory_allocated() - before

    stock = torch.compile(run.model, backend="inductor")
    run.step(tokens, stock)
    usual = attention_free(stock)
    torch._dynamo.reset()
    fused = torch.compile(run.model, backend="fx_fusion", options=options(kernel))
    run.step(tokens, fused)
    assert attention_free(fused) <= usual + one_cache // 8


def test_a_symbolic_number_of_tokens():
    """One graph for several lengths of a further prefill."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.reset()
    model, graphs = None, graph_count()
    for length in (3, 7, 12):
        ids = torch.randint(1, VOCABULARY, (2, length), device="cuda")
        reference, run = Run("qwen3_vl_text", device="cuda"), Run("qwen3_vl_text", device="cuda")
        reference.prefill()
        run.prefill()
        expected = reference.step(ids)
        if model is None:
            model = torch.compile(run.model, backend="fx_fusion", options=options("triton"))
        inputs = run.inputs(ids)
        torch._dynamo.mark_dynamic(inputs["input_ids"], 1)
        torch._dynamo.mark_dynamic(inputs["position_ids"], 2)
        with torch.no_grad():
            actual = model(**inputs)[0][:, -1] @ run.head
        assert relative_difference(actual, expected) < 1e-4
        assert len(fx_fusion.last_report().fused) == LAYERS, str(fx_fusion.last_report())
    assert graph_count() == graphs + 1


def graph_count():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def launches(run, tokens, model):
    """Kernels that one step puts on the device."""
    run.step(tokens, model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run.step(tokens, model)
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if not event.name.startswith("Memcpy")]


def test_a_layer_launches_fewer_kernels():
    counts = {}
    for backend, chosen in (("inductor", {}), ("fx_fusion", options("triton"))):
        torch._dynamo.reset()
        run = Run("qwen3_vl_text", torch.bfloat16, device="cuda")
        tokens = run.prefill().argmax(-1, keepdim=True)
        names = launches(run, tokens, torch.compile(run.model, backend=backend, options=chosen))
        counts[backend] = len(names)
        if backend == "fx_fusion":
            assert sum("qk_norm_rope_cache" in name for name in names) == LAYERS, names
    print(counts)
    assert counts["fx_fusion"] < counts["inductor"], counts
