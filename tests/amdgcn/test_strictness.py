"""The simulator never guesses: what it does not know raises, and names its line."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton", reason="compiles Triton kernels")

from launches.problem import Variant, prepare

from amdgcn.aot import compile_kernel
from amdgcn.execute import execute
from amdgcn.simulator import Unsupported, assembly, machine
from amdgcn.single import run
from fx_fusion.kernels.qk_norm_rope_cache.triton.launch import kernel

UNKNOWN = {
    "v_frobnicate_b32 v0, v1": "unknown instruction",
    "s_frobnicate_b32 s0, s1": "unknown instruction",
    "image_load v0, v1, s[0:7]": "unknown instruction",
    "buffer_atomic_add v0, v1, s[0:3], 0 offen": "unknown instruction",
    "v_mfma_f32_32x32x8f16 v[0:15], v[0:1], v[2:3], v[0:15]": "unknown instruction",
    "s_load_dwordx3 s[4:6], s[0:1], 0x0": "unknown instruction",
    "s_cbranch_g_fork s[0:1], s[2:3]": "operands instead of",
    "v_add_u32_e32 v0, v1, v2 clamp": "unknown modifiers: clamp",
    "v_mul_f32_e64 v0, v1, v2 mul:2": "unknown modifiers: mul",
    "v_mul_f32_e64 v0, v1, v2 clamp": "unknown modifiers: clamp",
    "v_add_u16_e64 v0, v1, v2 op_sel:[1,0,0]": "unknown modifiers: op_sel",
    "v_mov_b32_e32 v0, v1 quad_perm:[0,1,2,3]": "unknown modifiers: quad_perm",
    "v_mov_b32_dpp v0, v1 wave_shl:1 row_mask:0xf bank_mask:0xf": "expected one control of DPP",
    "v_mov_b32_dpp v0, v1 row_shl:16 row_mask:0xf bank_mask:0xf": "row_shl:16",
    "v_mov_b32_dpp v0, v1 row_shl:1 row_shr:1 row_mask:0xf bank_mask:0xf": "expected one control of DPP",
    "v_mov_b32_dpp v0, v1 row_shl:1 row_mask:0xf bank_mask:0xf fi:1": "unknown modifiers: fi",
    "v_add_u32_sdwa v0, v1, v2 dst_sel:WORD_2": "dst_sel:WORD_2",
    "v_add_u32_sdwa v0, v1, v2 dst_sel:WORD_1 dst_unused:UNUSED_SEXT": "this destination of SDWA",
    "v_add_u32_sdwa v0, sext(v1), v2 src0_sel:BYTE_0": "operand sext(v1)",
    "v_readfirstlane_b32_dpp s0, v1 row_shl:1": "dpp of v_readfirstlane_b32",
    "v_and_b32_e64 v0, -v1, v2": "a sign modifier on a u32",
    "v_and_b32_e64 v0, |v1|, v2": "a sign modifier on a u32",
    "v_add_u32_e32 v0, src_shared_base, v1": "operand src_shared_base",
    "v_add_u32_e32 v0, a1, v1": "operand a1",
    "v_add_u32_e32 v0, v[1:2], v1": "expected 1 registers",
    "v_lshl_add_u64 v[0:1], v2, 3, v[4:5]": "expected 2 registers",
    "v_cmp_gt_i64_e32 vcc, 0xffffffff, v[2:3]": "as a number of 64 bits",
    "s_mov_b64 s[0:1], 0x100000000": "as a number of 64 bits",
    "v_add_u32_e32 s0, v1, v2": "expected 1 registers v",
    "v_add_u32_e32 v600, v1, v2": "no such register",
    "v_add_u32_e32 v0, 1.5, v2": "operand 1.5",
    "v_add_u32_e32 v0, v1": "2 operands instead of 3",
    "v_pk_mul_f32 v[0:1], v[2:3], 1.0": "the upper half of the constant",
    "v_pk_mul_f32 v[0:1], v[2:3], v[4:5] op_sel:[1]": "op_sel with other than 2 numbers",
    "v_fma_mix_f32 v0, v1, v2, v3 op_sel:[0,0,1]": "op_sel of a float32",
    "v_readlane_b32 s0, v1, v2": "one value for all lanes",
    "s_add_i32 s0, v1, s2": "scalar registers",
    "s_movk_i32 s0, 0x12345": "a literal of 16 bits",
    "s_load_dword s0, s[0:1], 0x0 glc": "unknown modifiers: glc",
    "buffer_load_dword v0, v1, s[0:3], 0 idxen": "without an offset of its own",
    "buffer_load_dword v0, off, s[0:3], 0": "without an offset of its own",
    "buffer_load_dword v0, v1, s[0:3], 0 offen lds": "unknown modifiers: lds",
    "buffer_load_dword v0, v1, s[0:3], 0 offen tfe": "unknown modifiers: tfe",
    "buffer_load_dword v0, v1, s[0:3], 0 offen offen": "offen twice",
    "buffer_load_dwordx2 v0, v1, s[0:3], 0 offen": "expected 2 registers v",
    "buffer_load_dword v0, v1, s[0:1], 0 offen": "expected 4 registers s",
    "global_load_dword v0, v[1:2], off saddr:1": "unknown modifiers: saddr",
    "global_load_dword v0, v1, off": "expected 2 registers v",
    "ds_read_b32 v0, v1 gds": "unknown modifiers: gds",
    "ds_read2_b32 v[0:1], v2 offset:4": "unknown modifiers: offset",
    "ds_swizzle_b32 v0, v1 offset:swizzle(BROADCAST,8,0)": "the pattern",
    "v_add_u32_e32 v0 clamp, v1, v2": "modifiers before the last operand",
}


@pytest.mark.parametrize("text", UNKNOWN)
def test_what_is_unknown_raises(text):
    with pytest.raises(Unsupported) as caught:
        run("s_nop 0", text)
    first, second = str(caught.value).split("\n")
    assert first == f"line 2: {text}"
    assert UNKNOWN[text] in second


def test_a_selector_that_repeats_a_sign():
    with pytest.raises(NotImplementedError, match="v_perm_b32"):
        run("v_perm_b32 v0, v1, v2, s0", s={0: 0x08000000})


@pytest.fixture(scope="module")
def plain():
    prepared = prepare(Variant(seq=1))
    return prepared, compile_kernel(kernel(), prepared.arguments(kernel()), "gfx942", prepared.launch.tile.num_warps)


MODES = {
    ".amdhsa_float_round_mode_32 1": ".amdhsa_float_round_mode_32 0",
    ".amdhsa_float_denorm_mode_32 0": ".amdhsa_float_denorm_mode_32 3",
    ".amdhsa_fp16_overflow 1": ".amdhsa_fp16_overflow 0",
    ".amdhsa_private_segment_fixed_size 64": ".amdhsa_private_segment_fixed_size 0",
    ".amdhsa_system_vgpr_workitem_id 2": ".amdhsa_system_vgpr_workitem_id 0",
}


@pytest.mark.parametrize("changed", MODES)
def test_modes_that_are_not_simulated(plain, changed):
    _, binary = plain
    assert MODES[changed] in binary.assembly
    program = assembly.parse(binary.assembly.replace(MODES[changed], changed))
    with pytest.raises(Unsupported, match=re.escape(changed)):
        machine._check_descriptor(program.descriptor)


def test_kinds_of_arguments(plain):
    _, binary = plain
    with pytest.raises(Unsupported, match="hidden_block_count_x"):
        assembly.parse(binary.assembly.replace("by_value", "hidden_block_count_x", 1))


def test_code_that_never_runs_is_decoded_too(plain):
    prepared, binary = plain
    changed = binary.assembly.replace("\ts_endpgm\n", "\ts_endpgm\n\tv_frobnicate_b32 v0, v1\n", 1)
    with pytest.raises(Unsupported, match="v_frobnicate_b32"):
        execute(prepared, type(binary)(**{**vars(binary), "assembly": changed}))
