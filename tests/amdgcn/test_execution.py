"""The AMD machine code, executed, against float64: every value right, every other byte left alone."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton", reason="compiles Triton kernels")

from launches.catalogue import VARIANTS
from launches.checks import check, snapshot, storage_bytes
from launches.problem import Variant, prepare

from amdgcn.aot import CDNA, compile_kernel
from amdgcn.execute import execute
from fx_fusion.kernels.qk_norm_rope_cache.triton.launch import kernel

# What a masked access of Triton's asks for: an offset that is out of every buffer's range.
MASKED = 0x80000000


@pytest.mark.slow
@pytest.mark.parametrize("arch", CDNA)
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_float64(name, arch):
    prepared = prepare(VARIANTS[name])
    binary = compile_kernel(kernel(), prepared.arguments(kernel()), arch, prepared.launch.tile.num_warps)
    before = snapshot(prepared)
    result = execute(prepared, binary)
    assert result.out_of_range <= {MASKED}
    check(prepared, before)


def test_firmware_that_preloads_no_arguments():
    """The kernel then loads them itself, and computes the same."""
    runs = []
    for preload in (True, False):
        prepared = prepare(Variant())
        binary = compile_kernel(kernel(), prepared.arguments(kernel()), "gfx942", prepared.launch.tile.num_warps)
        result = execute(prepared, binary, preload=preload)
        runs.append((result.executed, *(storage_bytes(prepared.tensors[name]) for name in ("q_out", "k_cache"))))
    (executed, *preloaded), (executed_more, *loaded) = runs
    assert executed_more > executed
    np.testing.assert_equal(preloaded, loaded)


@pytest.mark.parametrize("arch", CDNA)
def test_every_instruction_runs(arch):
    """Of the plain kernel, but for those that load arguments where the firmware does not."""
    prepared = prepare(Variant())
    binary = compile_kernel(kernel(), prepared.arguments(kernel()), arch, prepared.launch.tile.num_warps)
    never_ran = execute(prepared, binary).never_ran
    assert all(line.mnemonic.startswith(("s_load", "s_waitcnt", "s_branch")) for line in never_ran), never_ran
