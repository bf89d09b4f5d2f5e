"""Shared fixtures. Every test compiles from scratch, into a cache of its own."""

from __future__ import annotations

import opaque_ops
import pytest
import torch

from fx_fusion.graph import invariants
from fx_fusion.report import REPORTS


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """No compile cache, no Dynamo state and no random state leaks from one test into another; rewrites are checked."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    for name in ("FX_FUSION_KERNEL", "FX_FUSION_DISABLE", "FX_FUSION_FUEL", "FX_FUSION_TUNED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(invariants, "ALWAYS", True)
    torch._dynamo.reset()
    REPORTS.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture(params=[True, False], ids=["v2", "v1"])
def functionalised(request):
    """In which of two ways an operation that writes its arguments is made functional."""
    with torch._inductor.config.patch(enable_auto_functionalized_v2=request.param):
        yield


@pytest.fixture
def libraries():
    """Stand-ins for the operations of vLLM and SGLang, under their names."""
    with opaque_ops.registered({**opaque_ops.VLLM, **opaque_ops.SGLANG}):
        yield


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA or ROCm device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
