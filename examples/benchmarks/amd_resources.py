"""Registers, occupancy and memory instructions of the Triton kernel on AMD GPUs; none is needed.

Writes amd_resources.md beside this file.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import triton

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

from amdgcn.aot import WAVE_SIZES, compile_kernel  # noqa: E402
from amdgcn.launches import prepare  # noqa: E402
from amdgcn.resources import SERVED, resources  # noqa: E402

from fx_fusion.kernels.triton import kernel  # noqa: E402

HEAD = """# What the kernel needs on AMD GPUs

`python examples/benchmarks/amd_resources.py`, Triton {triton}: compiled, not run. 32 query and 8 key heads of 128 lanes in
bfloat16, mRoPE, 8192 tokens, but for what the first column says; the tile is the one that the launch chooses. Occupancy is
waves a SIMD unit, as LLVM counts it from registers. Loads and stores are instructions, by bytes a lane. Nothing spills
to scratch memory.

| launch | GPU | VGPRs | SGPRs | spilled | LDS | occupancy | code bytes | loads | stores |
|---|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    rows = [row(name, arch) for name in SERVED for arch in WAVE_SIZES]
    (HERE / "amd_resources.md").write_text(HEAD.format(triton=triton.__version__) + "\n".join(rows) + "\n")


def row(name: str, arch: str) -> str:
    prepared = prepare(SERVED[name], "meta")
    found = resources(compile_kernel(kernel(), prepared.arguments(kernel()), arch, prepared.launch.tile.num_warps))
    spilled = found.vgpr_spills + found.sgpr_spills + found.scratch_bytes
    cells = [
        name, arch, found.vgprs, found.sgprs, spilled, found.lds_bytes, found.occupancy, found.code_bytes,
        widths(found.loads), widths(found.stores),
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def widths(accesses: Counter[int]) -> str:
    return ", ".join(f"{count} × {width}" for width, count in sorted(accesses.items(), reverse=True))


if __name__ == "__main__":
    main()
