"""Meanings of vLLM's operations, against the operations of the wheel."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch
from engines.vllm.engine import HERE, PYTHON, environment

pytestmark = [
    pytest.mark.engines,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no engine at {PYTHON}: make engines"),
]

#: What the build for a CPU does not have.
GPU_ONLY = {
    "_C::fused_qk_norm_rope.default",
    "_C_cache_ops::reshape_and_cache.default",
    "_C_cache_ops::reshape_and_cache_flash.default",
}


@pytest.fixture(scope="module")
def found() -> dict:
    command = [PYTHON, HERE / "meanings.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=500)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    assert line is not None, done.stderr[-3000:]
    return json.loads(line.removeprefix("RESULT "))


def test_schemas(found):
    schemas = found["schemas"]
    assert {name for name, (schema, _) in schemas.items() if schema is None} == GPU_ONLY
    assert not [problem for _, problem in schemas.values() if problem is not None]


def test_the_hidden_store_is_there(found):
    for name in ("vllm::unified_kv_cache_update", "vllm::unified_attention_with_output"):
        assert found["hidden"][name], f"{name} is gone"


#: Faults of the operations on a CPU, which a comparison has to see: strides that are not asked for, and heads
#: [T, H, D] that are taken for sequences.
FAULTY = ("_C::rms_norm, packed heads", "_C::rotary_embedding, heads")


def test_meanings_agree_with_the_operations(found):
    for use, (differs, difference, told) in found["compared"].items():
        if not use.startswith(FAULTY):
            assert not differs and difference is not None and difference < 2e-2, (use, told)


def test_a_comparison_sees_what_the_operations_do_wrong(found):
    faulty = {use: differs for use, (differs, _, _) in found["compared"].items() if use.startswith(FAULTY)}
    assert faulty and all(faulty.values()), faulty


def test_the_sum_is_normalised_before_it_is_rounded(found):
    """256 + 1 is 256 in bfloat16, and what the other lane is divided by depends on it."""
    lane, residual = found["added"]
    assert residual == 256
    nearest = {total: float(torch.tensor(((total**2 + 1) / 2) ** -0.5, dtype=torch.bfloat16)) for total in (256, 257)}
    assert nearest[256] != nearest[257] and lane == nearest[257]
