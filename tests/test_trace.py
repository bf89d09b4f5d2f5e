"""explain: traced on fake tensors, nothing computed, nothing touched."""

from __future__ import annotations

import pytest
import torch
from models import Run
from prologue import Prologue, arguments
from transformers import StaticCache

import fx_fusion
from fx_fusion.observer import Observer
from fx_fusion.trace import explain_to


def test_leaves_everything_as_it_was():
    model, args = Prologue(), arguments()
    before = [arg.clone() for arg in args]
    report = fx_fusion.explain(model, *args, target="gfx942")
    assert len(report.recognised) == 1
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
    assert not isinstance(model.q_weight, torch._subclasses.FakeTensor)


@pytest.mark.slow
def test_a_lazy_cache_stays_lazy():
    run = Run("qwen3")
    report = fx_fusion.explain(run.model, torch.zeros(2, 1, dtype=torch.int64), past_key_values=run.cache)
    assert len(report.recognised) == 2
    assert not run.cache.layers[0].is_initialized


@pytest.mark.slow
def test_a_model_without_weights_at_full_width():
    """Qwen3-VL-235B's shapes on the meta device, two of its 94 layers."""
    from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextModel

    config = Qwen3VLMoeTextConfig(
        num_hidden_layers=2, hidden_size=4096, num_attention_heads=64, num_key_value_heads=4, head_dim=128,
        moe_intermediate_size=1536, num_experts=128, num_experts_per_tok=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3VLMoeTextModel(config).bfloat16().eval()
    tokens, positions = torch.zeros(8, 1, dtype=torch.int64), torch.zeros(3, 8, 1, dtype=torch.int64)
    cache = StaticCache(config=config, max_cache_len=32768)
    report = fx_fusion.explain(model, input_ids=tokens, position_ids=positions, past_key_values=cache, target="gfx942")
    assert len(report.recognised) == 2 == len(report.layers), str(report)
    assert report.layers[0].reading["num_heads"] == 64
    assert report.layers[0].source.endswith(tuple("0123456789"))


@pytest.mark.slow
def test_another_default_device_changes_nothing():
    """A model that was built there, and one that was not."""
    plain = fx_fusion.explain(Prologue(), *arguments())
    with torch.device("meta"):
        there = fx_fusion.explain(Prologue(), *(torch.empty_like(each, device="meta") for each in arguments()))
    model, args = Prologue(), arguments()
    with torch.device("meta"):
        elsewhere = fx_fusion.explain(model, *args)
    assert [layer.read for layer in there.layers] == [layer.read for layer in plain.layers]
    assert [layer.read for layer in elsewhere.layers] == [layer.read for layer in plain.layers]


def test_an_unknown_target_is_an_error():
    with pytest.raises(fx_fusion.OptionError, match="got 'tpu'"):
        fx_fusion.explain(Prologue(), *arguments(), target="tpu")


def test_reasons_are_told():
    class Clamped(Prologue):
        def norm(self, x, weight):
            return super().norm(x, weight).clamp(-8, 8)

    report = fx_fusion.explain(Clamped(), *arguments())
    assert report.declined[0].code == "proof.not_analytic"
    assert "test_trace.py:" in report.declined[0].source
    assert "clamp" in report.declined[0].reason


def test_an_observer_sees_every_step_and_the_users_names():
    class Recorder(Observer):
        def __init__(self):
            self.seen, self.inputs = [], []

        def names(self, inputs):
            self.inputs = list(inputs)

        def starts(self, graph):
            self.seen.append("starts")

        def reads(self, fusion, analysis, candidate, match, layer):
            self.seen.append(f"reads {layer.state}")
            assert (match is None) == (layer.state == "declined")

        def rewrites(self, layer, graph):
            self.seen.append(f"rewrites by {layer.kernel}")

        def ends(self, graph, report):
            self.seen.append(f"ends with {len(report.fused)} fused")

    recorder = Recorder()
    explain_to(recorder, Prologue(), arguments(), {}, fx_fusion.Config(kernel="reference"))
    assert recorder.seen == ["starts", "reads rewritten", "rewrites by reference", "ends with 1 fused"]
    assert {"x", "slots", "k_cache", "self.q_weight", "self.qkv_proj.weight"} <= set(recorder.inputs)


@pytest.mark.slow
def test_layers_know_their_module():
    run = Run("qwen3")
    report = fx_fusion.explain(run.model, torch.zeros(2, 1, dtype=torch.int64), past_key_values=run.cache)
    assert [layer.module for layer in report.layers] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
