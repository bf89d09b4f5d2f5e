"""Registers, memory and widths of the compiled kernel, on every AMD architecture that it is meant for."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="compiles Triton kernels")

from launches.problem import Variant

from amdgcn.aot import WAVE_SIZES
from amdgcn.resources import SERVED, compiled, served
from fx_fusion.kernels.qk_norm_rope_cache.triton.tile import Tile

INDEX = 8  # Bytes of a position or a slot.


@pytest.mark.slow
@pytest.mark.parametrize("arch", WAVE_SIZES)
@pytest.mark.parametrize("name", SERVED)
def test_all_stays_in_registers(name, arch):
    found = served(name, arch)
    assert (found.vgpr_spills, found.sgpr_spills, found.scratch_bytes) == (0, 0, 0)
    # Of the 64 KiB that a workgroup may have, and without which fewer workgroups run at once.
    assert found.lds_bytes <= 16384
    assert found.occupancy >= 2


@pytest.mark.parametrize("arch", WAVE_SIZES)
def test_every_access_is_16_bytes_wide(arch):
    """With eight neighbouring lanes a thread; but for positions and slots, one number a token."""
    found = compiled(Variant(tile=Tile(tokens=WAVE_SIZES[arch] // 8, num_warps=1)), arch)
    assert set(found.stores) == {16}
    assert set(found.loads) == {16, INDEX}


@pytest.mark.parametrize("arch", WAVE_SIZES)
def test_a_layout_that_16_does_not_divide_is_not_wide(arch):
    """The widths are measured, not assumed: with heads of 20 lanes they differ."""
    found = compiled(Variant(head_dim=20), arch)
    assert 16 not in found.stores
