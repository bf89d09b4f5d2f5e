"""Real Transformers models, unmodified, through the real Inductor: every layer fuses, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, LAYERS, VOCABULARY, Run

import fx_fusion
from fx_fusion.proof.region_function import relative_difference

OPTIONS = {"fx_fusion.kernel": "reference", "fx_fusion.require": LAYERS, "fx_fusion.strict": True}


def compiled(run, **changes):
    return torch.compile(run.model, backend="fx_fusion", fullgraph=True, options={**OPTIONS, **changes})


def greedy(run, model=None, steps=5):
    """Prefill in eager, then decode; returns tokens and logits of every step."""
    tokens = run.prefill().argmax(-1, keepdim=True)
    chosen, logits = [tokens], []
    for _ in range(steps):
        logits.append(run.step(tokens, model))
        tokens = logits[-1].argmax(-1, keepdim=True)
        chosen.append(tokens)
    return torch.cat(chosen, 1), torch.stack(logits)


def assert_all_fused(layers=LAYERS):
    report = fx_fusion.last_report()
    assert report is not None
    assert len(report.fused) == layers == len(report.layers), str(report)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_decode_gives_eagers_tokens(family, batch):
    reference, fused = Run(family, batch=batch), Run(family, batch=batch)
    expected, expected_logits = greedy(reference)
    tokens, logits = greedy(fused, compiled(fused))
    assert_all_fused()
    assert torch.equal(tokens, expected)
    assert relative_difference(logits, expected_logits) < 1e-5
    for cache, expected_cache in zip(fused.caches(), reference.caches(), strict=True):
        assert relative_difference(cache, expected_cache) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen3_vl_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_prefill_into_a_filled_cache(family, dtype):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(1, VOCABULARY, (2, 7), generator=generator)
    reference, fused = Run(family, dtype), Run(family, dtype)
    reference.prefill()
    fused.prefill()
    expected, logits = reference.step(tokens), fused.step(tokens, compiled(fused, **{"fx_fusion.inner": "eager"}))
    assert_all_fused()
    tolerance = 1e-5 if dtype == torch.float32 else 6e-2
    assert relative_difference(logits, expected) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen3_vl_text"])
def test_any_length_from_one_graph(family):
    reference, fused = Run(family), Run(family)
    reference.prefill()
    fused.prefill()
    model = torch.compile(fused.model, backend="fx_fusion", options={**OPTIONS, "fx_fusion.inner": "eager"})
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for length in (5, 3, 8):
        tokens = torch.randint(1, VOCABULARY, (2, length))
        inputs = fused.inputs(tokens)
        torch._dynamo.mark_dynamic(tokens, 1)
        if fused.is_3d:
            torch._dynamo.mark_dynamic(inputs["position_ids"], 2)
        with torch.no_grad():
            hidden = model(**inputs)[0][:, -1]
        logits = hidden if hidden.shape[-1] == VOCABULARY else hidden @ fused.head
        assert relative_difference(logits, reference.step(tokens)) < 1e-5
    assert_all_fused()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted + 1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen3_vl_text"])
def test_bfloat16_error_is_no_larger_than_stock_inductors(family):
    """Against float64, teacher-forced: every run decodes the same tokens."""
    torch.manual_seed(3)
    forced = torch.randint(1, VOCABULARY, (6, 2, 1))

    def logits(dtype, backend, options):
        run = Run(family, dtype)
        run.copy_weights(source)
        run.prefill()
        torch._dynamo.reset()
        model = None if backend is None else torch.compile(run.model, backend=backend, options=options)
        return torch.stack([run.step(tokens, model).double() for tokens in forced])

    source = Run(family, torch.bfloat16)
    exact = logits(torch.float64, None, None)
    stock = logits(torch.bfloat16, "inductor", {})
    fused = logits(torch.bfloat16, "fx_fusion", OPTIONS)
    assert_all_fused()
    stock_error, fused_error = ((run - exact).square().mean().sqrt() for run in (stock, fused))
    # Two independent roundings of one computation: equal up to the noise of this sample.
    assert fused_error <= stock_error * 1.1, (fused_error, stock_error)


@pytest.mark.slow
def test_dynamic_cache_is_declined():
    run = Run("qwen3")
    run.cache = None
    model = torch.compile(run.model, backend="fx_fusion", options={"fx_fusion.kernel": "reference"})
    tokens = torch.randint(1, VOCABULARY, (2, 4))
    with torch.no_grad():
        out, expected = model(tokens, use_cache=True).logits, run.model(tokens, use_cache=True).logits
    report = fx_fusion.last_report()
    assert [layer.code for layer in report.layers] == ["store.missing"]
    assert relative_difference(out, expected) < 1e-5


def test_olmo2_norm_over_the_projection_is_declined():
    import transformers as hf

    torch.manual_seed(0)
    config = hf.Olmo2Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    model = hf.Olmo2ForCausalLM(config).eval()
    tokens = torch.randint(1, 97, (2, 4))
    results = []
    for run in (
        model,
        torch.compile(
            model, backend="fx_fusion", options={"fx_fusion.kernel": "reference", "fx_fusion.inner": "eager"}
        ),
    ):
        cache = hf.StaticCache(config=config, max_cache_len=16)
        with torch.no_grad():
            model(tokens, past_key_values=cache)
            results.append(run(tokens[:, :1], past_key_values=cache).logits)
    report = fx_fusion.last_report()
    assert [layer.code for layer in report.layers] == ["norm.not_per_head"] * 2, str(report)
    assert "modeling_olmo2.py" in report.layers[0].source
    assert relative_difference(results[1], results[0]) < 1e-5
