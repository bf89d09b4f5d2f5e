"""The vLLM plug-in where there is no vLLM, or where it is off."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _run(code: str, **environment: str) -> str:
    environment = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/bin:/bin", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    return done.stdout + done.stderr


@pytest.mark.parametrize("environment", [{}, {"FX_FUSION_VLLM": ""}], ids=["not set", "empty"])
def test_off_imports_nothing(environment):
    code = "import sys, fx_fusion_vllm; fx_fusion_vllm.load(); print({'fx_fusion', 'torch'} & set(sys.modules))"
    assert _run(code, **environment) == "set()\n"


def test_on_needs_vllm():
    """Without the engine, the switch fails by name rather than doing nothing."""
    told = _run("import fx_fusion_vllm; fx_fusion_vllm.load()", FX_FUSION_VLLM="auto")
    assert "ModuleNotFoundError: No module named 'vllm'" in told


def test_the_package_needs_no_engine():
    code = "import sys, fx_fusion; print([name for name in sys.modules if 'vllm' in name and 'engines' in name])"
    assert _run(code) == "[]\n"
