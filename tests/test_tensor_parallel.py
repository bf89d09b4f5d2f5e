"""A Transformers model whose heads are spread over two ranks: each rank fuses all its layers, with its own heads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import LAYERS, qwen3_vl_text
from tensor_parallel import tokens_of

TESTS = Path(__file__).parent


def ranks(checkpoint, kernel, inner, **environment):
    """What each of two ranks found."""
    root = str(TESTS.parent)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"),
            *(str(TESTS / "tensor_parallel.py"), str(checkpoint), kernel, inner),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([root, str(TESTS), os.environ.get("PYTHONPATH", "")]),
            **environment,
        },
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((checkpoint / f"rank-{rank}.json").read_text()) for rank in range(2)]


def check(tmp_path, kernel, inner, device, **environment):
    torch.manual_seed(0)
    model = qwen3_vl_text().eval()
    model.save_pretrained(tmp_path)
    model.to(device)
    found = ranks(tmp_path, kernel, inner, **environment)
    expected = tokens_of(model, model, device)
    for rank in found:
        assert rank["fused"] == LAYERS
        assert rank["kv_heads"] == [1] * LAYERS, "one of two heads a rank"
        assert rank["tokens"] == expected


@pytest.mark.slow
def test_two_ranks_on_the_cpu(tmp_path):
    pytest.importorskip("accelerate")
    check(tmp_path, "reference", "eager", torch.device("cpu"), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_on_two_gpus(tmp_path):
    pytest.importorskip("accelerate")
    check(tmp_path, "triton", "inductor", torch.device("cuda", 0))
