"""Reports: what they say, and that they survive as files."""

from __future__ import annotations

import pytest
import torch
from models import Run
from prologue import Prologue, arguments

import fx_fusion
from fx_fusion.report import REPORTS, FusionReport
from fx_fusion.testing import assert_fuses


def test_round_trips_through_json():
    report = assert_fuses(Prologue(), arguments(), count=1)
    again = FusionReport.from_json(report.to_json())
    assert again == report
    assert again.id == report.id
    assert str(again) == str(report)


@pytest.mark.slow
def test_equal_layers_are_one_line():
    run = Run("qwen3")
    report = fx_fusion.explain(run.model, torch.zeros(2, 1, dtype=torch.int64), past_key_values=run.cache)
    lines = str(report).splitlines()
    assert lines[0].startswith("fx_fusion: 0 of 2 layers fused, 2 recognised")
    assert lines[1].split()[0] == "0-1"
    assert len(lines) == 3


def test_says_what_was_read():
    text = str(assert_fuses(Prologue(), arguments(), count=1))
    for part in ("heads 4/2x16 packed", "RMSNorm eps 1e-06", "rope neox 16", "mRoPE [4, 2, 2] interleaved", "by slot"):
        assert part in text


def test_a_lost_report_file_is_reported_as_such():
    torch._dynamo.utils.counters["inductor"]["fx_fusion:0123456789abcdef"] += 1
    try:
        report = REPORTS.latest()
        assert report.layers[0].code == "report.missing"
        assert "0123456789abcdef.json is gone" in report.layers[0].reason
    finally:
        del torch._dynamo.utils.counters["inductor"]["fx_fusion:0123456789abcdef"]


def test_nothing_is_known_before_a_compilation():
    assert fx_fusion.last_report() is None


def test_a_graph_with_a_store_is_preferred():
    options = {"fx_fusion.kernel": "reference", "fx_fusion.inner": "eager"}
    with torch.no_grad():
        torch.compile(Prologue(), backend="fx_fusion", options=options)(*arguments())
        torch.compile(torch.nn.ReLU(), backend="fx_fusion", options=options)(torch.ones(2))
    assert len(fx_fusion.last_report().fused) == 1
