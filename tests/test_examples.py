"""The examples run, and assert what they claim."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_serving_model():
    printed = run("qwen3_vl_serving.py", "--steps", "6")
    assert "4 of 4 layers fused" in printed
    assert "mRoPE [12, 10, 10] interleaved" in printed
    assert "tokens equal eager's" in printed


@pytest.mark.slow
def test_demo():
    printed = run("demo.py")
    assert "4 of 4 layers fused" in printed
    assert "yes" in printed


@pytest.mark.slow
def test_opaque_operations():
    printed = run("opaque_ops.py")
    assert "1 of 1 layers fused" in printed
    assert "assumed: engine::rope_ = __main__.rope_meaning (compared on cpu: " in printed
    assert "query and caches equal eager's" in printed


@pytest.mark.slow
def test_own_fusion():
    printed = run("own_fusion.py")
    assert "3 of 3 layers fused" in printed
    assert "eps 9.999999974752427e-07" in printed and "eps 9.999999747378752e-06" in printed
