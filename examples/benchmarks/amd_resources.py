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

from amdgcn.aot import WAVE_SIZES  # noqa: E402
from amdgcn.resources import SERVED, served  # noqa: E402

HEAD = """# What the kernel needs on AMD GPUs

`python examples/benchmarks/amd_resources.py`, Triton {triton}: compiled, not run. 32 query and 8 key heads of 128 lanes
in bfloat16, mRoPE, 8192 tokens, but for what the first column says. The tile, tokens × heads and warps, is the one that
a launch chooses. Occupancy is waves a SIMD unit as LLVM counts them from registers alone. Spilled are registers and
bytes of scratch memory. Loads and stores are instructions, by bytes a lane.

| launch | GPU | tile | VGPRs | SGPRs | spilled | LDS | occupancy | code bytes | loads | stores |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    rows = [row(name, arch) for name in SERVED for arch in WAVE_SIZES]
    (HERE / "amd_resources.md").write_text(HEAD.format(triton=triton.__version__) + "\n".join(rows) + "\n")


def row(name: str, arch: str) -> str:
    found = served(name, arch)
    tile = SERVED[name].tiled_for(WAVE_SIZES[arch]).tile
    spilled = found.vgpr_spills + found.sgpr_spills + found.scratch_bytes
    cells = [
        name, arch, f"{tile.tokens} × {tile.heads}, {tile.num_warps}", found.vgprs, found.sgprs, spilled,
        found.lds_bytes, found.occupancy, found.code_bytes, widths(found.loads), widths(found.stores),
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def widths(accesses: Counter[int]) -> str:
    return ", ".join(f"{count} × {width}" for width, count in sorted(accesses.items(), reverse=True))


if __name__ == "__main__":
    main()
