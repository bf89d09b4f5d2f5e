"""The AMD machine code, executed, against float64: every value right, every other byte left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="compiles Triton kernels")

from amdgcn import oracle
from amdgcn.aot import CDNA, compile_kernel
from amdgcn.execute import execute, storage_bytes
from amdgcn.launches import Prepared, Variant, prepare
from fx_fusion.kernels.triton import Tile, kernel

# What a masked access of Triton's asks for: an offset that is out of every buffer's range.
MASKED = 0x80000000
# In units of float32's rounding, 2**-24, of the magnitudes that a rotation adds: up to 35 additions of squares, halved
# by the root; the root itself, 2; norm, weight and rotation, 1 each for five operations. Such errors do not all point
# one way: at most 4 of the 25 are seen.
ROUNDINGS = 8
MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
MIN_EXPONENT = {torch.bfloat16: -126, torch.float16: -14, torch.float32: -126}

E4M3FN, E4M3FNUZ, E5M2 = torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2
FLOAT32 = torch.float32
MISPLACED = {"seq": 13, "slots": "misplaced"}

VARIANTS = {
    "plain": Variant(),
    "decode-tile": Variant(tile=Tile(2, 1)),
    "four-warps": Variant(seq=9, tile=Tile(8, 4)),
    "two-warps": Variant(seq=17, tile=Tile(16, 2)),
    "many-heads-a-program": Variant(tile=Tile(8, 1, 4)),
    "heads-left-over": Variant(num_heads=5, num_kv_heads=3, tile=Tile(2, 1, 2)),
    "one-token": Variant(seq=1),
    "batch": Variant(batch=3, seq=3),
    "float16": Variant(dtype=torch.float16),
    "float32": Variant(dtype=FLOAT32),
    "float32-four-warps": Variant(dtype=FLOAT32, is_neox=False, tile=Tile(8, 4)),
    "HND": Variant(cache="HND", blocks=True),
    "sequence": Variant(cache="sequence", batch=3),
    "packed": Variant(cache="packed", blocks=True),
    "whole": Variant(cache="whole", blocks=True),
    "shuffle": Variant(cache="shuffle", blocks=True),
    "shuffle-float32": Variant(cache="shuffle", dtype=FLOAT32),
    "shuffle-float8": Variant(cache="shuffle", cache_dtype=E4M3FNUZ, blocks=True),
    "shuffle-two-warps": Variant(cache="shuffle", seq=17, tile=Tile(16, 2)),
    "gptj": Variant(is_neox=False),
    "gptj-two-warps": Variant(is_neox=False, seq=17, tile=Tile(16, 2)),
    "gptj-full-width": Variant(is_neox=False, full_width=True),
    "sectioned": Variant(axes="sectioned"),
    "any-axes": Variant(axes="any"),
    "any-axes-full-width": Variant(axes="any", full_width=True),
    "rope": Variant(axes="one"),
    "rows": Variant(table=False, batch=2, seq=3),
    "rows-full-width": Variant(table=False, full_width=True),
    "rows-gptj": Variant(table=False, is_neox=False),
    "partial": Variant(rotary_dim=32),
    "partial-gptj": Variant(rotary_dim=64, is_neox=False),
    "gated-gemma": Variant(
        head_dim=256, rotary_dim=64, gated=True, gemma_norm=True, num_heads=3, num_kv_heads=1, axes="sectioned"
    ),
    "gated": Variant(gated=True),
    "gemma": Variant(gemma_norm=True),
    "no-norm": Variant(q_eps=None, k_eps=None, q_weights=False, k_weights=False),
    "no-weights": Variant(q_weights=False, k_weights=False),
    "two-eps": Variant(q_eps=0.5, k_eps=2.0),
    "norm-of-q-alone": Variant(k_eps=None, k_weights=False),
    "norm-of-k-alone": Variant(q_eps=None, q_weights=False),
    "float32-weights-and-tables": Variant(weight_dtype=FLOAT32, angle_dtype=FLOAT32),
    "float32-gemma": Variant(weight_dtype=FLOAT32, gemma_norm=True, dtype=torch.float16),
    "int32": Variant(index_dtype=torch.int32, blocks=True),
    "head-dim-64": Variant(head_dim=64),
    "head-dim-80": Variant(head_dim=80),
    "head-dim-80-gptj": Variant(head_dim=80, rotary_dim=32, is_neox=False, dtype=torch.float16, tile=Tile(4, 2)),
    "head-dim-96": Variant(head_dim=96),
    "head-dim-256": Variant(head_dim=256),
    "no-k": Variant(return_k=False),
    "e4m3fn": Variant(cache_dtype=E4M3FN),
    "e4m3fnuz": Variant(cache_dtype=E4M3FNUZ),
    "e5m2": Variant(cache_dtype=E5M2),
    "e4m3fn-scaled": Variant(cache_dtype=E4M3FN, k_scale=0.007, v_scale="tensor"),
    "e4m3fnuz-scaled": Variant(cache_dtype=E4M3FNUZ, k_scale="tensor", v_scale=0.3),
    "e5m2-scaled": Variant(cache_dtype=E5M2, k_scale=1e-4, v_scale="tensor"),
    "e4m3fn-saturated": Variant(cache_dtype=E4M3FN, k_scale=0.007, v_scale="tensor", saturate=True),
    "e4m3fnuz-saturated": Variant(cache_dtype=E4M3FNUZ, k_scale="tensor", v_scale=0.011, saturate=True),
    "e5m2-saturated": Variant(cache_dtype=E5M2, k_scale=1e-4, v_scale=1e-5, saturate=True),
    "float32-to-e4m3fn": Variant(dtype=FLOAT32, cache_dtype=E4M3FN, k_scale="tensor", v_scale=0.3),
    "float16-to-e5m2": Variant(dtype=torch.float16, cache_dtype=E5M2, axes="one"),
    "bfloat16-to-float32": Variant(cache_dtype=FLOAT32),
    "float32-to-bfloat16": Variant(dtype=FLOAT32, cache_dtype=torch.bfloat16),
    "float32-to-float16": Variant(dtype=FLOAT32, cache_dtype=torch.float16),
    "slots-wrap": Variant(**MISPLACED),
    "slots-wrap-in-blocks": Variant(**MISPLACED, blocks=True, cache="HND"),
    "slots-skip": Variant(**MISPLACED, skip_negative_slots=True),
    "slots-skip-shuffle": Variant(**MISPLACED, skip_negative_slots=True, cache="shuffle"),
    "slots-skip-int32": Variant(**MISPLACED, skip_negative_slots=True, index_dtype=torch.int32, blocks=True),
    "positions-outside": Variant(seq=9, positions="outside"),
    "positions-outside-int32": Variant(
        seq=9, positions="outside", axes="one", index_dtype=torch.int32, full_width=True
    ),
}


@pytest.mark.parametrize("arch", CDNA)
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_float64(name, arch):
    prepared = prepare(VARIANTS[name])
    binary = compile_kernel(kernel(), prepared.arguments(kernel()), arch, prepared.launch.tile.num_warps)
    before = {name: storage_bytes(tensor).copy() for name, tensor in prepared.tensors.items() if tensor is not None}
    result = execute(prepared, binary)

    assert result.out_of_range <= {MASKED}
    check_rotated(prepared, "q", prepared.tensors["q_out"])
    k_rows = prepared.tensors["k_out"] if prepared.variant.return_k else stored_rows(prepared)
    check_rotated(prepared, "k", k_rows)
    expected = with_rows_stored(prepared, before, k_rows)
    for tensor_name in before.keys() - {"q_out", "k_out"}:
        np.testing.assert_array_equal(
            storage_bytes(prepared.tensors[tensor_name]), expected[tensor_name], err_msg=tensor_name
        )


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


# --- checks -------------------------------------------------------------------------------------------------------


def check_rotated(prepared: Prepared, name: str, rows: torch.Tensor) -> None:
    """Rounded once: half a unit in the last place off, and what float32 arithmetic loses where a rotation cancels."""
    exact = oracle.rotated(prepared, name)
    actual = rows.double().numpy()
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(exact.value))
    with np.errstate(invalid="ignore"):
        excess = np.abs(actual - exact.value) - unit_in_last_place(exact.value, rows.dtype) / 2
        roundings = np.nanmax(excess / (exact.magnitude * 2.0**-24 + 1e-300))
    assert roundings <= ROUNDINGS


def unit_in_last_place(value: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    _, exponent = np.frexp(value)
    return np.ldexp(1.0, np.maximum(exponent - 1, MIN_EXPONENT[dtype]) - MANTISSA[dtype])


def stored_rows(prepared: Prepared) -> torch.Tensor:
    """All rows of k, taken from its cache."""
    variant = prepared.variant
    rows = torch.empty(variant.batch, variant.seq, variant.num_kv_heads, variant.head_dim, dtype=variant.dtype)
    places = oracle.places(prepared)
    assert len(places) == variant.batch * variant.seq
    for token, place in places.items():
        rows[token] = oracle.row(prepared, "k", prepared.tensors["k_cache"], *place).reshape(rows[token].shape)
    return rows


def with_rows_stored(prepared: Prepared, before: dict[str, np.ndarray], k_rows: torch.Tensor) -> dict[str, np.ndarray]:
    """The bytes of each tensor's storage as they should be after the launch."""
    expected = {name: torch.from_numpy(data.copy()) for name, data in before.items()}
    if prepared.variant.cache in ("packed", "whole"):
        expected["v_cache"] = expected["k_cache"]
    for name, rows in (("k", k_rows), ("v", prepared.tensors["v"])):
        actual = prepared.tensors[f"{name}_cache"]
        storage = expected[f"{name}_cache"].view(actual.dtype)
        cache = storage.as_strided(actual.shape, actual.stride(), actual.storage_offset())
        values = oracle.converted(prepared, name, rows)
        for token, place in oracle.places(prepared).items():
            row = oracle.row(prepared, name, cache, *place)
            row.copy_(values[token].reshape(row.shape))
    return {name: data.numpy() for name, data in expected.items()}
