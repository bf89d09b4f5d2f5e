"""What a compiled kernel needs and how wide it reaches into memory, from its assembly; no GPU, no simulation."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import torch
from launches.problem import Variant, prepare

from amdgcn.aot import WAVE_SIZES, Binary, compile_kernel
from fx_fusion.kernels.qk_norm_rope_cache.triton.launch import kernel

# Bytes a lane: of CDNA's names, then of RDNA's.
WIDTHS = {
    "ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12,
    "dwordx4": 16,
    "u8": 1, "i8": 1, "b8": 1, "u16": 2, "i16": 2, "b16": 2, "b32": 4, "b64": 8, "b96": 12, "b128": 16,
}  # fmt: skip
ACCESS = re.compile(
    r"^\s+(?:buffer|global|flat)_(load|store)_(?:d16_)?(?:hi_)?([a-z]+\d*(?:x\d)?)(?:_d16)?(?:_hi)?\s", re.M
)

# What a server launches, for resources alone: the tile is chosen for each GPU.
_PREFILL = {"seq": 8192, "num_heads": 32, "num_kv_heads": 8}
SERVED = {
    "64 tokens": Variant(**{**_PREFILL, "seq": 64}, return_k=False),
    "8192 tokens": Variant(**_PREFILL, return_k=False),
    "8192 tokens, k is returned too": Variant(**_PREFILL),
    "GPT-J pairs": Variant(**_PREFILL, is_neox=False, return_k=False),
    "rows of angles, one a token": Variant(**_PREFILL, table=False, full_width=True, return_k=False),
    "gated q, 1 + weight, head_dim 256, 64 lanes rotate": Variant(
        **{**_PREFILL, "num_heads": 16, "num_kv_heads": 2}, head_dim=256, rotary_dim=64, gated=True, gemma_norm=True,
        return_k=False,
    ),
    "float8 e4m3fn cache, scales on the device": Variant(
        **_PREFILL, cache_dtype=torch.float8_e4m3fn, k_scale="tensor", v_scale="tensor", return_k=False
    ),
    "shuffle layout": Variant(**_PREFILL, cache="shuffle", blocks=True, return_k=False),
    "float32": Variant(**_PREFILL, dtype=torch.float32, return_k=False),
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """Registers of a lane (VGPR) and of a wave (SGPR), bytes of scratch, LDS and code, waves that fit on a SIMD unit,
    and how many loads and stores of vector memory there are by their width in bytes a lane.
    """

    vgprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    scratch_bytes: int
    lds_bytes: int
    occupancy: int
    code_bytes: int
    loads: Counter[int]
    stores: Counter[int]


def served(name: str, arch: str) -> Resources:
    return compiled(SERVED[name].tiled_for(WAVE_SIZES[arch]), arch)


def compiled(variant: Variant, arch: str) -> Resources:
    arguments = prepare(variant, "meta").arguments(kernel())
    return resources(compile_kernel(kernel(), arguments, arch, variant.tile.num_warps))


def resources(binary: Binary) -> Resources:
    text = binary.assembly
    accesses = [(kind, WIDTHS[name]) for kind, name in ACCESS.findall(text)]
    return Resources(
        vgprs=_metadata(text, "vgpr_count"),
        sgprs=_metadata(text, "sgpr_count"),
        vgpr_spills=_metadata(text, "vgpr_spill_count"),
        sgpr_spills=_metadata(text, "sgpr_spill_count"),
        scratch_bytes=_metadata(text, "private_segment_fixed_size"),
        # The text does not know: Triton asks for shared memory at launch.
        lds_bytes=binary.lds_bytes,
        occupancy=_comment(text, "Occupancy"),
        code_bytes=_comment(text, "codeLenInByte"),
        loads=Counter(width for kind, width in accesses if kind == "load"),
        stores=Counter(width for kind, width in accesses if kind == "store"),
    )


def _metadata(text: str, name: str) -> int:
    return _only_number(rf"^ +(?:- )?\.{name}: +(\d+)$", text)


def _comment(text: str, name: str) -> int:
    return _only_number(rf"^; {name} ?[:=] (\d+)$", text)


def _only_number(pattern: str, text: str) -> int:
    (found,) = re.findall(pattern, text, re.M)
    return int(found)
