"""The Triton kernel takes its arguments by position: a call's tensors, the results, sizes and strides, constants."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from launches.catalogue import VARIANTS
from launches.problem import Variant, prepare
from torch._subclasses import FakeTensorMode

from fx_fusion.kernels.call import tensor_names
from fx_fusion.kernels.measure.tuned_file import Shape
from fx_fusion.kernels.qk_norm_rope_cache.call import Call
from fx_fusion.kernels.qk_norm_rope_cache.triton import implementation as triton
from fx_fusion.kernels.qk_norm_rope_cache.triton import launch
from fx_fusion.kernels.qk_norm_rope_cache.typical import typical_call

pytest.importorskip("triton")

RESULTS = ("q_out", "k_out")


def parameters():
    return tuple(launch.kernel().arg_names)


@pytest.mark.parametrize("name", ["plain", "rows", "shuffle", "e4m3fn-scaled", "sequence", "any-size-all-heads"])
def test_the_kernels_parameters_are_in_the_order_of_the_declaration(name):
    plan = prepare(VARIANTS[name]).launch
    assert parameters() == (*tensor_names(Call), *RESULTS, *plan.arguments, *plan.constants)


def test_constants_are_the_kernels_constexprs():
    plan = prepare(Variant()).launch
    assert {each.name for each in launch.kernel().params if each.is_constexpr} == set(plan.constants)


@pytest.mark.parametrize("return_k", [True, False])
def test_a_launch_passes_them_in_this_order(monkeypatch, return_k):
    """On fake tensors of a GPU, to a kernel that keeps what it gets."""
    launched = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *arguments, num_warps: launched.append((grid, arguments, num_warps))

    monkeypatch.setattr(triton, "kernel", Recorder)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(triton, "_plans", {})
    for module in (triton, launch):
        monkeypatch.setattr(module, "wave_size_of", lambda device: 32)
    monkeypatch.setattr(launch, "converts_float8", lambda device: True)
    monkeypatch.setenv("FX_FUSION_TUNED", "off")
    call = typical_call(Shape(4, 2, 64, 64, "bfloat16"), 3, torch.device("cpu"))
    call = replace(call, options=replace(call.options, return_k=return_k))
    with FakeTensorMode():
        call = call.map(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda"))
        q_out, k_out = triton.launch(call)
    ((grid, arguments, num_warps),) = launched
    plan = launch.plan(call)
    expected = {**call.tensors, "q_out": q_out, "k_out": k_out if return_k else None}
    given = dict(zip(parameters(), arguments, strict=True))
    assert all(given[name] is tensor for name, tensor in expected.items())
    assert {name: given[name] for name in (*plan.arguments, *plan.constants)} == plan.arguments | plan.constants
    assert (grid, num_warps) == (plan.grid, plan.tile.num_warps)
