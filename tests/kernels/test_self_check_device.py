"""The self-check of the fast kernels, on a real device: what a first use would find."""

from __future__ import annotations

import pytest
from launches.catalogue import VARIANTS
from launches.places import on
from launches.problem import prepare

from fx_fusion.kernels.qk_norm_rope_cache import self_check
from fx_fusion.kernels.qk_norm_rope_cache.aiter import implementation as aiter
from fx_fusion.kernels.qk_norm_rope_cache.specialization import Signature
from fx_fusion.kernels.qk_norm_rope_cache.triton import implementation as triton

pytestmark = pytest.mark.gpu

NAMES = ("plain", "gemma", "sectioned", "rope", "shuffle", "HND", "slots-skip", "head-dim-64", "head-dim-256")


def verdict(kernel, launch, name):
    there = on(prepare(VARIANTS[name]), "cuda")
    operands = [tensor for key, tensor in there.tensors.items() if key not in ("q_out", "k_out")]
    options = {**there.options, "return_k": False}
    return self_check.verdict(kernel, launch, Signature.of(*operands, **options))


@pytest.mark.parametrize("name", NAMES)
def test_triton_agrees(name):
    found = verdict("triton", triton.qk_norm_rope_cache, name)
    assert found.reason is None, found


@pytest.mark.parametrize("name", NAMES)
def test_aiter_agrees(name):
    if aiter.installed() is not None:
        pytest.skip(str(aiter.installed()))
    found = verdict("aiter", aiter._launch, name)
    assert found.reason is None, found
