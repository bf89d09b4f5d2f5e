"""PyTorch's own means show what happened: TORCH_LOGS, structured traces, counters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_layers

import fx_fusion

HERE = Path(__file__).parent
PROGRAM = """
import torch, fx_fusion, two_layers
model, args = two_layers.clamped()
options = {"fx_fusion.kernel": "reference", "fx_fusion.inner": "eager"}
with torch.no_grad():
    torch.compile(model, backend="fx_fusion", options=options)(*args)
print(dict(torch._dynamo.utils.counters["fx_fusion"]))
"""


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """What one compilation in a process of its own prints, and the folder of its structured trace."""
    folder = tmp_path_factory.mktemp("trace")
    environment = {
        **os.environ, "TORCH_LOGS": "fx_fusion", "TORCH_TRACE": str(folder),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done, folder


@pytest.mark.slow
def test_torch_logs_prints_the_report(logged):
    done, _ = logged
    assert "fx_fusion: 2 of 3 layers fused" in done.stderr
    assert "proof.not_analytic" in done.stderr


@pytest.mark.slow
def test_the_structured_trace_holds_the_report(logged):
    _, folder = logged
    lines = "\n".join(path.read_text() for path in folder.glob("*.log")).splitlines()
    (at,) = [i for i, line in enumerate(lines) if '"fx_fusion_report"' in line]
    assert json.loads(lines[at][lines[at].index("{") :])["artifact"]["encoding"] == "json"
    payload = []
    for line in lines[at + 1 :]:
        if not line.startswith("\t"):
            break
        payload.append(line)
    report = fx_fusion.FusionReport.from_json("".join(payload))
    assert (len(report.fused), len(report.declined)) == (2, 1)


def test_counters(logged):
    done, _ = logged
    assert "{'graphs': 1, 'rewritten': 2, 'recognised': 2, 'declined proof.not_analytic': 1}" in done.stdout


def test_logs_can_be_set_from_python(capfd):
    import logging

    torch._logging.set_logs(modules={"fx_fusion": logging.INFO})
    try:
        model, args = two_layers.shorter()
        fx_fusion.explain(model, *args)
        assert "0 of 2 layers fused, 2 recognised" in capfd.readouterr().err
    finally:
        torch._logging.set_logs()
