"""What the operation computes, in float64 with numpy, written from its definition alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from launches.problem import Prepared


@dataclass(frozen=True)
class Rotated:
    """Exact values, and the sum of the magnitudes that were added to get each: float32 rounds in proportion to that."""

    value: np.ndarray
    magnitude: np.ndarray


def rotated(prepared: Prepared, name: str) -> Rotated:
    """The heads of q or k after norm and rotation, [B, S, heads, D]."""
    variant, tensors = prepared.variant, prepared.tensors
    y = _float64(tensors[name])
    eps = variant.q_eps if name == "q" else variant.k_eps
    if eps is not None:
        y = y / np.sqrt(np.mean(y * y, -1, keepdims=True) + eps)
    if tensors[f"{name}_weight"] is not None:
        weight = _float64(tensors[f"{name}_weight"])
        y = y * (1 + weight if variant.gemma_norm else weight)
    cos, sin = (_angles(prepared, table)[:, :, None] for table in ("cos", "sin"))
    value, magnitude = y.copy(), np.abs(y)
    half = variant.rotated // 2
    for pair in range(half):
        a, b = (pair, pair + half) if variant.is_neox else (2 * pair, 2 * pair + 1)
        for lane, other, sign in ((a, b, -1), (b, a, 1)):
            kept, turned = y[..., lane] * cos[..., lane], y[..., other] * sin[..., lane]
            value[..., lane] = kept + sign * turned
            magnitude[..., lane] = np.abs(kept) + np.abs(turned)
    return Rotated(value, magnitude)


def _angles(prepared: Prepared, name: str) -> np.ndarray:
    """The cosine or sine for each rotated lane, [B, S, rotary_dim]; NaN outside the table."""
    variant = prepared.variant
    rows, positions = _float64(prepared.tensors[name]), prepared.tensors["positions"]
    half = variant.rotated // 2
    pair_of_lane = [lane % half if variant.is_neox else lane // 2 for lane in range(variant.rotated)]
    column_of_lane = list(range(variant.rotated)) if variant.full_width else pair_of_lane
    if positions is None:
        return rows[..., column_of_lane]
    axes = variant.axis_of_pairs()
    angles = np.full((variant.batch, variant.seq, variant.rotated), np.nan)
    for lane, (pair, column) in enumerate(zip(pair_of_lane, column_of_lane, strict=True)):
        for (batch, seq), position in np.ndenumerate(positions[axes[pair]].numpy()):
            if -len(rows) <= position < len(rows):
                angles[batch, seq, lane] = rows[position, column]
    return angles


def _float64(tensor: Tensor | None) -> np.ndarray:
    assert tensor is not None
    return tensor.double().numpy()


# --- caches -------------------------------------------------------------------------------------------------------


def converted(prepared: Prepared, name: str, value: Tensor) -> Tensor:
    """Rows of k or v as their cache holds them."""
    variant = prepared.variant
    scale = variant.k_scale if name == "k" else variant.v_scale
    if scale == "tensor":
        scale = prepared.tensors[f"{name}_scale"].item()
    if scale is not None:
        value = torch.from_numpy(value.float().numpy() / np.float32(scale))
    if variant.stored_dtype.itemsize > 1:
        return value.to(variant.stored_dtype)
    bytes_ = float8_bytes(value.float().numpy(), variant.stored_dtype, variant.saturate)
    return torch.from_numpy(bytes_).view(variant.stored_dtype)


def float8_bytes(value: np.ndarray, dtype: torch.dtype, saturate: bool) -> np.ndarray:
    """The nearest float8, ties to the even one, by search among all; what is beyond has the next byte: NaN or infinity.

    Not ``Tensor.to``: whether that saturates depends on PyTorch's version.
    """
    signless = dtype == torch.float8_e4m3fnuz
    every = torch.arange(256).to(torch.uint8).view(dtype).double().numpy()
    finite = every[:128][np.isfinite(every[:128])]
    candidates = np.append(finite, 2 * finite[-1] - finite[-2])
    magnitude = np.abs(np.nan_to_num(value.astype(np.float64), nan=0.0, posinf=np.inf, neginf=np.inf))
    upper = np.clip(np.searchsorted(candidates, magnitude), 1, len(finite))
    middle = (candidates[upper - 1] + candidates[upper]) / 2
    takes_upper = (magnitude > middle) | (magnitude == middle) & (upper % 2 == 0)
    byte = np.where(takes_upper, upper, upper - 1)
    byte = np.minimum(byte, len(finite) - 1) if saturate else byte
    byte = np.where(np.isnan(value), 0x80 if signless else 0x7F, byte)
    sign = np.where(np.signbit(value) & ~(signless & (byte == 0)), 0x80, 0)
    return (byte | sign).astype(np.uint8)


def places(prepared: Prepared) -> dict[tuple[int, int], tuple[int, int]]:
    """Block and slot of each token (batch, seq) that is stored."""
    variant, slots, blocks = prepared.variant, prepared.tensors["slots"], prepared.tensors["blocks"]
    cache = prepared.tensors["k_cache"]
    count, size = cache.shape[0], (cache.shape[3] if variant.cache == "shuffle" else cache.shape[1])
    found = {}
    for batch, seq in np.ndindex(variant.batch, variant.seq):
        slot = int(slots.expand(variant.batch, -1)[batch, seq])
        block = batch % count if blocks is None else int(blocks.expand(variant.batch, -1)[batch, seq])
        if slot < 0 and not variant.skip_negative_slots:
            slot += size
        if 0 <= slot < size and 0 <= block < count:
            found[batch, seq] = block, slot
    return found


def row(prepared: Prepared, name: str, cache: Tensor, block: int, slot: int) -> Tensor:
    """The view of one slot, [heads, D]; of k in the shuffle layout [heads, D / x, x]."""
    if prepared.variant.cache != "shuffle":
        return cache[block, slot]
    if name == "k":
        return cache[block, :, :, slot, :]
    group = cache.shape[-1]
    return cache[block, :, slot // group, :, slot % group]
