"""What the compiler is told about the arguments of a launch."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton", reason="compiles Triton kernels")

from launches.problem import Variant, prepare

from amdgcn.aot import WAVE_SIZES, compile_kernel
from fx_fusion.kernels.qk_norm_rope_cache.triton.launch import kernel

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)


def binary(variant, arch="gfx942", **changed):
    prepared = prepare(variant)
    arguments = {**prepared.arguments(kernel()), **changed}
    return compile_kernel(kernel(), arguments, arch, prepared.launch.tile.num_warps)


@pytest.fixture(scope="module")
def plain():
    return binary(Variant())


def test_constants_are_no_arguments(plain):
    assert "blocks" not in plain.arguments  # None
    assert "k_lane_stride" not in plain.arguments  # 1
    assert "HEAD_DIM" not in plain.arguments


def test_an_aligned_small_tensor(plain):
    assert plain.attributes["q"] == {"tt.divisibility": 16, "tt.pointer_range": 32}


def test_numbers_that_16_divides(plain):
    assert plain.attributes["q_token_stride"] == {"tt.divisibility": 16}
    assert plain.arguments["num_tokens"] == 5
    assert not plain.attributes.get("num_tokens")


def test_a_tensor_that_is_not_aligned():
    q = prepare(Variant()).tensors["q"]
    moved = torch.empty(q.numel() + 4, dtype=q.dtype)[4:].view(q.shape)
    assert binary(Variant(), q=moved).attributes["q"] == {"tt.pointer_range": 32}


def test_a_tensor_of_more_than_2_gib():
    large = torch.empty(1, 1 << 16, 1 << 8, 128, dtype=torch.bfloat16, device="meta")
    assert binary(Variant(), k_cache=large).attributes["k_cache"] == {"tt.divisibility": 16}


@pytest.mark.parametrize("arch", WAVE_SIZES)
def test_waves(arch):
    assert re.search(rf"\.wavefront_size: +{WAVE_SIZES[arch]}$", binary(Variant(), arch).assembly, re.M)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_no_target_converts_float8_in_hardware(dtype):
    """Triton chooses such converters once for a process: here, which target came first would change the code."""
    for arch in WAVE_SIZES:
        assert not re.search(r"v_cvt_\w*[fb][pf]8", binary(Variant(cache_dtype=dtype), arch).assembly)
