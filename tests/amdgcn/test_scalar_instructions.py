"""The simulated scalar unit against Python's integers; control flow."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amdgcn.simulator import scalar
from amdgcn.simulator.assembly import Unsupported, parse_instruction
from amdgcn.simulator.machine import decode_instruction
from amdgcn.simulator.memory import Arena, Lds
from amdgcn.simulator.transfers import Memories
from amdgcn.simulator.wave import EXEC, VCC, Wave
from amdgcn.single import EDGES, MASK32, run

MASK64 = (1 << 64) - 1
words = st.one_of(st.sampled_from(EDGES), st.integers(0, MASK32))
numbers = st.one_of(words, st.integers(0, MASK64))


def signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> bits - 1 & 1 else value


def fits(value: int) -> bool:
    return -(1 << 31) <= value < 1 << 31


def field(a: int, b: int) -> int:
    return a >> (b & 31) & (1 << (b >> 16 & 127)) - 1


def signed_field(a: int, b: int) -> int:
    width = b >> 16 & 127
    return signed(signed(a) >> (b & 31) & (1 << width) - 1, width) if width else 0


def nonzero(function, bits: int = 32):
    """A result with the SCC that tells whether it is zero."""
    return lambda a, b, scc: (function(a, b), function(a, b) % (1 << bits) != 0)


def keeps(function):
    return lambda a, b, scc: (function(a, b), scc)


# From the sources and SCC to the result and SCC.
BINARY = {
    "s_and_b32": nonzero(lambda a, b: a & b),
    "s_or_b32": nonzero(lambda a, b: a | b),
    "s_xor_b32": nonzero(lambda a, b: a ^ b),
    "s_andn2_b32": nonzero(lambda a, b: a & ~b),
    "s_and_b64": nonzero(lambda a, b: a & b, 64),
    "s_or_b64": nonzero(lambda a, b: a | b, 64),
    "s_xor_b64": nonzero(lambda a, b: a ^ b, 64),
    "s_andn2_b64": nonzero(lambda a, b: a & ~b, 64),
    "s_add_i32": lambda a, b, scc: (a + b, not fits(signed(a) + signed(b))),
    "s_sub_i32": lambda a, b, scc: (a - b, not fits(signed(a) - signed(b))),
    "s_add_u32": lambda a, b, scc: (a + b, a + b > MASK32),
    "s_addc_u32": lambda a, b, scc: (a + b + scc, a + b + scc > MASK32),
    "s_sub_u32": lambda a, b, scc: (a - b, a < b),
    "s_subb_u32": lambda a, b, scc: (a - b - scc, a < b + scc),
    "s_mul_i32": keeps(lambda a, b: a * b),
    "s_mul_hi_u32": keeps(lambda a, b: a * b >> 32),
    "s_mul_hi_i32": keeps(lambda a, b: signed(a) * signed(b) >> 32),
    "s_min_i32": lambda a, b, scc: (min(signed(a), signed(b)), signed(a) < signed(b)),
    "s_max_i32": lambda a, b, scc: (max(signed(a), signed(b)), signed(a) > signed(b)),
    "s_min_u32": lambda a, b, scc: (min(a, b), a < b),
    "s_max_u32": lambda a, b, scc: (max(a, b), a > b),
    "s_lshl_b32": nonzero(lambda a, b: a << b % 32),
    "s_lshr_b32": nonzero(lambda a, b: a >> b % 32),
    "s_ashr_i32": nonzero(lambda a, b: signed(a) >> b % 32),
    "s_lshl_b64": nonzero(lambda a, b: a << b % 64, 64),
    "s_lshr_b64": nonzero(lambda a, b: a >> b % 64, 64),
    "s_ashr_i64": nonzero(lambda a, b: signed(a, 64) >> b % 64, 64),
    "s_bfe_u32": nonzero(field),
    "s_bfe_i32": nonzero(signed_field),
    "s_cselect_b32": lambda a, b, scc: (a if scc else b, scc),
    "s_cselect_b64": lambda a, b, scc: (a if scc else b, scc),
}


@pytest.mark.parametrize("mnemonic", BINARY)
@settings(max_examples=60, deadline=None)
@given(numbers, numbers, st.booleans())
def test_two_sources(mnemonic, a, b, scc):
    wide = mnemonic.endswith("64")
    wide_b = wide and "sh" not in mnemonic
    a, b = a & (MASK64 if wide else MASK32), b & (MASK64 if wide_b else MASK32)
    text = f"{mnemonic} {register(8, wide)}, {register(4, wide)}, {register(6, wide_b)}"
    wave = run(text, s={4: a & MASK32, 5: a >> 32, 6: b & MASK32, 7: b >> 32}, scc=int(scc))
    result, expected_scc = BINARY[mnemonic](a, b, int(scc))
    found = wave.read64(8) if wide else wave.s[8]
    assert (found, wave.scc) == (result & (MASK64 if wide else MASK32), int(expected_scc))


def register(first: int, wide: bool) -> str:
    return f"s[{first}:{first + 1}]" if wide else f"s{first}"


MOVES = {
    "s_mov_b32": lambda a: (a, 1),
    "s_mov_b64": lambda a: (a, 1),
    "s_not_b32": lambda a: (~a, ~a & MASK32 != 0),
    "s_not_b64": lambda a: (~a, ~a & MASK64 != 0),
    "s_abs_i32": lambda a: (abs(signed(a)), a != 0),
    "s_brev_b32": lambda a: (int(f"{a:032b}"[::-1], 2), 1),
}


@pytest.mark.parametrize("mnemonic", MOVES)
@settings(max_examples=20, deadline=None)
@given(numbers)
def test_one_source(mnemonic, a):
    wide = mnemonic.endswith("64")
    mask = MASK64 if wide else MASK32
    wave = run(f"{mnemonic} {register(8, wide)}, {register(4, wide)}", s={4: a & MASK32, 5: a >> 32}, scc=1)
    result, scc = MOVES[mnemonic](a & mask)
    assert (wave.read64(8) if wide else wave.s[8], wave.scc) == (result & mask, int(scc))


def test_literals_of_64_bits():
    assert run("s_mov_b64 s[4:5], 0x80000000").read64(4) == 0x80000000
    assert run("s_mov_b64 s[4:5], -1").read64(4) == MASK64


IN_PLACE = {
    "s_movk_i32 s4, 0x8000": lambda a: (0xFFFF8000, 0),
    "s_addk_i32 s4, 0xfff0": lambda a: (a - 16, not fits(signed(a) - 16)),
    "s_mulk_i32 s4, -3": lambda a: (a * -3, 0),
    "s_bitset0_b32 s4, 7": lambda a: (a & ~128, 0),
    "s_bitset1_b32 s4, 7": lambda a: (a | 128, 0),
}


@pytest.mark.parametrize("text", IN_PLACE)
@settings(max_examples=20, deadline=None)
@given(words)
def test_in_place(text, a):
    wave = run(text, s={4: a})
    result, scc = IN_PLACE[text](a)
    assert (wave.s[4], wave.scc) == (result & MASK32, int(scc))


RELATIONS = {
    "eq": lambda a, b: a == b, "lg": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


@pytest.mark.parametrize("mnemonic", [name for name in scalar.COMPARISONS if name.startswith("s_cmp_")])
@settings(max_examples=20, deadline=None)
@given(numbers, numbers, st.booleans())
def test_comparisons(mnemonic, a, b, equal):
    _, _, relation, kind = mnemonic.split("_")
    b = a if equal else b
    wide = kind == "u64"
    mask = MASK64 if wide else MASK32
    read = signed if kind == "i32" else int
    wave = run(
        f"{mnemonic} {register(4, wide)}, {register(6, wide)}",
        s={4: a & MASK32, 5: a >> 32, 6: b & MASK32, 7: b >> 32},
    )
    assert wave.scc == int(RELATIONS[relation](read(a & mask), read(b & mask)))


def test_comparisons_of_a_bit():
    assert run("s_bitcmp1_b32 s4, 3", s={4: 8}).scc == 1
    assert run("s_bitcmp0_b32 s4, 3", s={4: 8}).scc == 0
    assert run("s_bitcmp0_b32 s4, 35", s={4: 7}).scc == 1


SAVES = {
    "s_and_saveexec_b64": 0b1000,
    "s_or_saveexec_b64": 0b1110,
    "s_andn2_saveexec_b64": 0b0010,
}


@pytest.mark.parametrize("mnemonic", SAVES)
def test_saving_the_active_lanes(mnemonic):
    wave = run(f"{mnemonic} s[8:9], s[4:5]", s={4: 0b1010, 5: 0}, exec_mask=0b1100)
    assert (wave.read64(8), wave.read64(EXEC), wave.scc) == (0b1100, SAVES[mnemonic], 1)
    assert [int(lane) for lane in wave.exec[:4]] == [SAVES[mnemonic] >> lane & 1 for lane in range(4)]


def test_saving_over_the_source():
    wave = run("s_and_saveexec_b64 s[4:5], s[4:5]", s={4: 0b1010, 5: 0}, exec_mask=0b0101)
    assert (wave.read64(4), wave.read64(EXEC), wave.scc) == (0b0101, 0, 0)


def test_writing_half_of_the_active_lanes():
    wave = run("s_mov_b32 exec_lo, 3", "s_mov_b32 exec_hi, 0")
    assert wave.exec.sum() == 2


BRANCHES = {
    "s_branch": lambda scc, vcc, active: True,
    "s_cbranch_scc0": lambda scc, vcc, active: not scc,
    "s_cbranch_scc1": lambda scc, vcc, active: scc,
    "s_cbranch_vccz": lambda scc, vcc, active: not vcc,
    "s_cbranch_vccnz": lambda scc, vcc, active: vcc,
    "s_cbranch_execz": lambda scc, vcc, active: not active,
    "s_cbranch_execnz": lambda scc, vcc, active: active,
}


@pytest.mark.parametrize("scc", [0, 1])
@pytest.mark.parametrize("vcc", [0, 1 << 40])
@pytest.mark.parametrize("active", [0, 1 << 40])
@pytest.mark.parametrize("mnemonic", BRANCHES)
def test_branches(mnemonic, scc, vcc, active):
    step = decode_instruction(parse_instruction(1, f"{mnemonic} .L"), {".L": 17}, Memories(Arena(), Lds(0)))
    wave = Wave()
    wave.scc = scc
    wave.write64(VCC, vcc)
    wave.write64(EXEC, active)
    step(wave)
    assert wave.pc == (17 if BRANCHES[mnemonic](scc, vcc, active) else 0)


def test_a_branch_to_nowhere():
    with pytest.raises(Unsupported, match="unknown label"):
        run("s_branch .Lnowhere")


def test_every_instruction_is_tested():
    assert set(BINARY) == set(scalar.BINARY)
    assert set(MOVES) == set(scalar.MOVES)
    assert set(SAVES) == set(scalar.SAVE_EXEC)
    assert {text.split()[0] for text in IN_PLACE} == set(scalar.IN_PLACE)
    assert {name.removeprefix("s_cbranch_") for name in BRANCHES} == {"s_branch", *scalar.CONDITIONS}
