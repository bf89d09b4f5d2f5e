"""Which lane's value each lane gets: DPP, ds_swizzle."""

from __future__ import annotations

import re

import numpy as np

from amdgcn.simulator.assembly import Instruction
from amdgcn.simulator.wave import LANES

ROW, IN_ROW = LANES & ~15, LANES & 15
ALWAYS = np.ones(64, bool)


def take_dpp(instruction: Instruction) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Source lanes, which of them exist, which lanes are written, and whether a missing source reads as 0."""
    controls = [name for name in instruction.modifiers if name == "quad_perm" or name.startswith("row_")]
    controls = [name for name in controls if name != "row_mask"]
    if len(controls) != 1:
        raise instruction.unsupported("expected one control of DPP")
    source, exists = _control(controls[0], instruction)
    rows, banks = (int(instruction.take(name, "0xf"), 0) for name in ("row_mask", "bank_mask"))
    enabled = (rows >> (LANES >> 4) & banks >> (LANES >> 2 & 3) & 1).astype(bool)
    zero = instruction.take("bound_ctrl", "") in ("0", "1")
    return np.where(exists, source, 0), exists, enabled, zero


def _control(name: str, instruction: Instruction) -> tuple[np.ndarray, np.ndarray]:
    if name == "quad_perm":
        order = np.array(instruction.take_bits(name, [0, 1, 2, 3]))
        return (LANES & ~3) + order[LANES & 3], ALWAYS
    text = instruction.take(name, "")
    if name == "row_mirror" and not text:
        return ROW + 15 - IN_ROW, ALWAYS
    if name == "row_half_mirror" and not text:
        return ROW + (IN_ROW ^ 7), ALWAYS
    count = int(text) if text.isdigit() else -1
    if name == "row_shl" and 1 <= count <= 15:
        return LANES + count, IN_ROW + count <= 15
    if name == "row_shr" and 1 <= count <= 15:
        return LANES - count, count <= IN_ROW
    if name == "row_ror" and 1 <= count <= 15:
        return ROW + (IN_ROW - count & 15), ALWAYS
    if name == "row_newbcast" and 0 <= count <= 15:
        return ROW + count, ALWAYS
    if name == "row_bcast" and count == 15:
        return ROW - 1, LANES >= 16
    if name == "row_bcast" and count == 31:
        return np.full(64, 31), LANES >= 32
    raise instruction.unsupported(f"the DPP control {name}:{text}")


def take_swizzle(instruction: Instruction) -> np.ndarray:
    """Source lanes of ds_swizzle_b32."""
    pattern = instruction.take("offset", "")
    swap = re.fullmatch(r"swizzle\(SWAP,(1|2|4|8|16)\)", pattern)
    if swap is None:
        raise instruction.unsupported(f"the pattern {pattern}")
    return LANES ^ int(swap[1])
