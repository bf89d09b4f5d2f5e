"""Where keys and values go in each physical order that vLLM may lay a cache out in."""

from __future__ import annotations

import json
import subprocess

import pytest
from engines.vllm.engine import HERE, PYTHON, environment

pytestmark = [
    pytest.mark.engines,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no engine at {PYTHON}: make engines"),
]


def test_every_layout():
    command = [PYTHON, HERE / "layouts.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=500)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    assert line is not None, done.stderr[-3000:]
    found = json.loads(line.removeprefix("RESULT "))
    assert len(found) == 12 and not {name: problem for name, problem in found.items() if problem}
