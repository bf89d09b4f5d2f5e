"""The self-check of the fast kernels, on a real device: what a first use would find."""

from __future__ import annotations

from dataclasses import replace

import pytest
from launches.catalogue import VARIANTS
from launches.places import on
from launches.problem import prepare

from fx_fusion.kernels.qk_norm_rope_cache import self_check
from fx_fusion.kernels.qk_norm_rope_cache.aiter import implementation as aiter
from fx_fusion.kernels.qk_norm_rope_cache.operation import OPERATION
from fx_fusion.kernels.qk_norm_rope_cache.specialization import Specialization

pytestmark = pytest.mark.gpu

NAMES = ("plain", "gemma", "sectioned", "rope", "shuffle", "HND", "slots-skip", "head-dim-64", "head-dim-256")


def verdict(kernel, name):
    call = on(prepare(VARIANTS[name]), "cuda").call
    call = replace(call, options=replace(call.options, return_k=False))
    return self_check.verdict(kernel, OPERATION.implementation(kernel).trial, Specialization.of(call))


@pytest.mark.parametrize("name", NAMES)
def test_triton_agrees(name):
    found = verdict("triton", name)
    assert found.reason is None, found


@pytest.mark.parametrize("name", NAMES)
def test_aiter_agrees(name):
    if aiter.installed() is not None:
        pytest.skip(str(aiter.installed()))
    found = verdict("aiter", name)
    assert found.reason is None, found
