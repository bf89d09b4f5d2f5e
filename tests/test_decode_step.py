"""examples/benchmarks/decode_step.py: runs on the CPU, and keeps what earlier runs measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "examples" / "benchmarks" / "decode_step.py"


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import decode_step

    return decode_step


@pytest.mark.slow
def test_a_tiny_model_on_the_cpu(tmp_path):
    tiny = ("--device", "cpu", "--tiny", "--layers", "1", "--context", "20", "--repeats", "2", "--steps", "1")
    done = run(*tiny, "--batch", "2", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "decode_step.json").read_text())
    found = record["batches"]["2"]
    assert (found["stock"]["fused_layers"], found["fused"]["fused_layers"]) == (0, 1)
    assert found["logits_differ_by"] < 0.05
    assert found["fused"]["tokens_per_second"] == pytest.approx(2000 / found["fused"]["milliseconds"])
    assert record["setup"]["kernel"] == "reference"
    table = (tmp_path / "decode_step.md").read_text()
    assert f"torch {torch.__version__}" in table
    assert "\n| 2 | " in table


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_needs_a_gpu():
    done = run()
    assert done.returncode == 2
    assert "PyTorch finds no GPU here" in done.stderr


def measured(milliseconds):
    return {"milliseconds": milliseconds, "quartile_spread": 0.01, "tokens_per_second": 1000.0, "kernels": 9}


def record(batches, **setup):
    sizes = {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "context": 5}
    machine = {"device": "H200", "torch": "2.13.0"}
    return {
        "date": "2026-11-23",
        "machine": machine,
        "setup": {**sizes, "kernel": "triton", **setup},
        "batches": batches,
    }


def test_a_run_keeps_the_batch_sizes_of_an_earlier_one(script):
    earlier = record({"8": {"stock": measured(1.0)}, "32": {"stock": measured(2.0)}})
    both = script.merged(record({"128": {}, "8": {}}), json.dumps(earlier))
    assert list(both["batches"]) == ["8", "32", "128"]
    assert both["batches"]["8"] == {}


def test_a_run_keeps_nothing_of_another_model(script):
    earlier = json.dumps(record({"8": {}}, context=6))
    assert script.merged(record({"1": {}}), earlier)["batches"] == {"1": {}}
    assert script.merged(record({"1": {}}), None)["batches"] == {"1": {}}


def test_the_table(script):
    text = script.markdown(
        record({"8": {"stock": measured(1.1), "fused": measured(1.0)}, "32": {"stock": measured(2.0)}})
    )
    assert "| 8 | 1.100 (0.010) | 1.000 (0.010) | +10.0 % | 1000 | 1000 | 9 | 9 |" in text
    assert "| 32 | 2.000 (0.010) | - | - | 1000 | - | 9 | - |" in text


def test_pages_of_a_step(script):
    """No two sequences share one, and each writes the last slot of its context."""
    config = script.replace(script.TINY, num_blocks=12)
    step = script.make_step(config, batch=4, context=35, device=torch.device("cpu"))
    assert step.block_tables.shape == (4, 3)
    assert step.block_tables.unique().numel() == 12
    assert torch.equal(step.slot_mapping, step.block_tables[:, 2] * 16 + 2)
    assert (step.positions == 34).all() and step.positions.shape == (3, 4)
