"""What a launch left in its tensors, held against float64, and every byte that it should not have touched."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from launches import oracle
from launches.problem import Prepared

# How often float32 may have rounded by half a unit, relative to the magnitudes that a rotation adds: in theory up to 25
# times (35 additions of squares, halved by the root; the root itself, 2; norm, weight and rotation, 5), but they do not
# all round the same way, and 3 is the most that is seen. What a cancellation leaves keeps that error: units of the
# result would be no bound for it.
ROUNDINGS = 4
MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
MIN_EXPONENT = {torch.bfloat16: -126, torch.float16: -14, torch.float32: -126}


def snapshot(prepared: Prepared) -> dict[str, np.ndarray]:
    """The bytes of each tensor's storage, to be taken before the launch."""
    return {name: storage_bytes(tensor).copy() for name, tensor in prepared.tensors.items() if tensor is not None}


def check(prepared: Prepared, before: dict[str, np.ndarray]) -> None:
    """Assert that the launch did what it should, and nothing else."""
    check_rotated(prepared, "q", prepared.tensors["q_out"])
    k_rows = prepared.tensors["k_out"] if prepared.variant.return_k else stored_rows(prepared)
    check_rotated(prepared, "k", k_rows)
    expected = with_rows_stored(prepared, before, k_rows)
    for name in before.keys() - {"q_out", "k_out"}:
        check_bytes(prepared, name, expected[name])


def check_bytes(prepared: Prepared, name: str, expected: np.ndarray) -> None:
    tensor = prepared.tensors[name]
    actual = storage_bytes(tensor)
    if tensor.is_floating_point():
        # Which NaN an operation gives is nobody's promise.
        numbers = [torch.from_numpy(data.copy()).view(tensor.dtype).float() for data in (actual, expected)]
        nan = (numbers[0].isnan() & numbers[1].isnan()).repeat_interleave(tensor.dtype.itemsize).numpy()
        actual, expected = np.where(nan, 0, actual), np.where(nan, 0, expected)
    np.testing.assert_array_equal(actual, expected, err_msg=name)


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


def storage_bytes(tensor: Tensor) -> np.ndarray:
    """All bytes of the storage, shared with it."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
