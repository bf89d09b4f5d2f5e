"""Run every variant of the kernel in Triton's interpreter, with float32 throughout.

    TRITON_INTERPRET=1 python tests/kernels/interpreted.py

The interpreter follows the kernel's logic without a GPU or a compiler; its conversions to smaller floats truncate, so
activations are float32 here, and float8, which the kernel rounds in integers, is as it should be. A process of its own,
since Triton decides when a kernel is imported.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from launches.catalogue import VARIANTS
from launches.checks import check, snapshot
from launches.problem import Variant, prepare

from fx_fusion.kernels.qk_norm_rope_cache.triton.launch import kernel


def in_float32(variant: Variant) -> Variant | None:
    """None where a conversion would truncate."""
    half = (torch.bfloat16, torch.float16)
    if variant.cache_dtype in half:
        return None
    return dataclasses.replace(variant, dtype=torch.float32, angle_dtype=torch.float32, weight_dtype=torch.float32)


def main() -> int:
    program, failed, ran = kernel(), [], 0
    for name, variant in VARIANTS.items():
        wide = in_float32(variant)
        if wide is None:
            continue
        prepared = prepare(wide)
        before = snapshot(prepared)
        program[prepared.grid](**prepared.arguments(program), num_warps=1)
        ran += 1
        try:
            check(prepared, before)
        except AssertionError as error:
            failed.append(name)
            print(name, error, sep=": ", file=sys.stderr)
    print(f"{ran} variants, {len(failed)} failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
