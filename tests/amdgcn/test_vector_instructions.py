"""The simulated vector unit against Python's integers and fractions, lane by lane."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amdgcn.simulator import vector
from amdgcn.simulator.wave import VCC
from amdgcn.single import MASK32, float32, floats, integers, number, rounded, run, same

seeds = st.integers(0, 1 << 32)
few = settings(max_examples=8, deadline=None)


def signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> bits - 1 & 1 else value


def byte(high: int, low: int, selector: int) -> int:
    return (low >> 8 * selector if selector < 4 else high >> 8 * (selector - 4)) & 0xFF


MASK24 = (1 << 24) - 1

# Functions of 32-bit numbers; results are cut to 32 bits.
INTEGERS = {
    "v_mov_b32_e32": lambda a: a,
    "v_and_b32_e32": lambda a, b: a & b,
    "v_or_b32_e32": lambda a, b: a | b,
    "v_xor_b32_e32": lambda a, b: a ^ b,
    "v_not_b32_e32": lambda a: ~a,
    "v_and_or_b32": lambda a, b, c: (a & b) | c,
    "v_or3_b32": lambda a, b, c: a | b | c,
    "v_add_u32_e32": lambda a, b: a + b,
    "v_sub_u32_e32": lambda a, b: a - b,
    "v_subrev_u32_e32": lambda a, b: b - a,
    "v_add_u16_e32": lambda a, b: a + b & 0xFFFF,
    "v_sub_u16_e32": lambda a, b: a - b & 0xFFFF,
    "v_mul_lo_u16_e32": lambda a, b: a * b & 0xFFFF,
    "v_add3_u32": lambda a, b, c: a + b + c,
    "v_xad_u32": lambda a, b, c: (a ^ b) + c,
    "v_mul_lo_u32": lambda a, b: a * b,
    "v_mul_u32_u24_e32": lambda a, b: (a & MASK24) * (b & MASK24),
    "v_mad_u32_u24": lambda a, b, c: (a & MASK24) * (b & MASK24) + c,
    "v_mul_i32_i24_e32": lambda a, b: signed(a & MASK24, 24) * signed(b & MASK24, 24),
    "v_mad_i32_i24": lambda a, b, c: signed(a & MASK24, 24) * signed(b & MASK24, 24) + c,
    "v_mul_hi_u32": lambda a, b: a * b >> 32,
    "v_min_i32_e32": lambda a, b: min(signed(a), signed(b)),
    "v_max_i32_e32": lambda a, b: max(signed(a), signed(b)),
    "v_min_u32_e32": min,
    "v_max_u32_e32": max,
    "v_lshlrev_b32_e32": lambda a, b: b << a % 32,
    "v_lshrrev_b32_e32": lambda a, b: b >> a % 32,
    "v_ashrrev_i32_e32": lambda a, b: signed(b) >> a % 32,
    "v_lshlrev_b16_e32": lambda a, b: b << a % 16 & 0xFFFF,
    "v_lshrrev_b16_e32": lambda a, b: (b & 0xFFFF) >> a % 16,
    "v_lshl_add_u32": lambda a, b, c: (a << b % 32) + c,
    "v_add_lshl_u32": lambda a, b, c: (a + b & MASK32) << c % 32,
    "v_lshl_or_b32": lambda a, b, c: (a << b % 32) | c,
    "v_bfe_u32": lambda a, b, c: a >> b % 32 & (1 << c % 32) - 1,
    "v_bfe_i32": lambda a, b, c: signed(signed(a) >> b % 32 & (1 << c % 32) - 1, c % 32) if c % 32 else 0,
    "v_bfi_b32": lambda a, b, c: a & b | ~a & c,
    "v_alignbit_b32": lambda a, b, c: (a << 32 | b) >> c % 32,
    "v_bfrev_b32_e32": lambda a: int(f"{a:032b}"[::-1], 2),
    "v_bitop3_b32": lambda a, b, c: a & ~b | c,
}
MODIFIERS = {"v_bitop3_b32": " bitop3:0xba"}


@pytest.mark.parametrize("mnemonic", INTEGERS)
@few
@given(seeds)
def test_integers(mnemonic, seed):
    function = INTEGERS[mnemonic]
    count = 2 if function in (min, max) else function.__code__.co_argcount
    sources = [integers(seed + index) for index in range(count)]
    text = f"{mnemonic} v9, {', '.join(f'v{index}' for index in range(count))}{MODIFIERS.get(mnemonic, '')}"
    wave = run(text, v=dict(enumerate(sources)))
    expected = [function(*map(int, lane)) & MASK32 for lane in zip(*sources, strict=True)]
    assert wave.v[9].tolist() == expected


@given(seeds)
@few
def test_perm(seed):
    high, low = integers(seed), integers(seed + 1)
    selectors = np.random.default_rng(seed).choice([0, 1, 2, 3, 4, 5, 6, 7, 12, 13], (4, 64))
    selector = sum(part.astype(np.uint32) << np.uint32(8 * index) for index, part in enumerate(selectors))
    wave = run("v_perm_b32 v3, v0, v1, v2", v={0: high, 1: low, 2: selector})
    for lane in range(64):
        chosen = [
            {12: 0, 13: 0xFF}.get(int(which), byte(int(high[lane]), int(low[lane]), int(which) & 7))
            for which in selectors[:, lane]
        ]
        assert wave.v[3, lane] == int.from_bytes(bytes(chosen), "little")


def test_bitop3_of_16_bits_leaves_nothing_to_rely_on_above():
    wave = run("v_bitop3_b16 v3, v0, v1, v2 bitop3:0xca", v={0: 0xF0F0, 1: 0x1234, 2: 0xABCD})
    assert wave.v[3, 0] & 0xFFFF == 0xF0F0 & 0x1234 | 0x0F0F & 0xABCD
    assert wave.v[3, 0] >> 16 not in (0, 0xFFFF)


# --- 64 bits and carries ------------------------------------------------------------------------------------------


def joined(low: np.ndarray, high: np.ndarray) -> list[int]:
    return [int(a) | int(b) << 32 for a, b in zip(low, high, strict=True)]


WIDE = {
    "v_lshlrev_b64 v[8:9], v4, v[0:1]": lambda a, b, n: a << n % 64,
    "v_lshrrev_b64 v[8:9], v4, v[0:1]": lambda a, b, n: a >> n % 64,
    "v_ashrrev_i64 v[8:9], v4, v[0:1]": lambda a, b, n: signed(a, 64) >> n % 64,
    "v_lshl_add_u64 v[8:9], v[0:1], v4, v[2:3]": lambda a, b, n: (a << n % 8) + b,
    "v_mov_b64_e32 v[8:9], v[0:1]": lambda a, b, n: a,
}


@pytest.mark.parametrize("text", WIDE)
@few
@given(seeds)
def test_64_bits(text, seed):
    registers = [integers(seed + index) for index in range(4)]
    shift = integers(seed + 4)
    wave = run(text, v={**dict(enumerate(registers)), 4: shift})
    a, b = joined(*registers[:2]), joined(*registers[2:])
    expected = [WIDE[text](*of) & (1 << 64) - 1 for of in zip(a, b, map(int, shift), strict=True)]
    assert joined(wave.v[8], wave.v[9]) == expected


CARRIES = {
    "add": (["v_add_co_u32_e32 v8, vcc, v0, v2", "v_addc_co_u32_e32 v9, vcc, v1, v3, vcc"], lambda a, b: a + b),
    "add e64": (
        ["v_add_co_u32_e64 v8, s[4:5], v0, v2", "v_addc_co_u32_e64 v9, vcc, v1, v3, s[4:5]"], lambda a, b: a + b
    ),
    "sub": (["v_sub_co_u32_e32 v8, vcc, v0, v2", "v_subb_co_u32_e32 v9, vcc, v1, v3, vcc"], lambda a, b: a - b),
    "subrev": (["v_subrev_co_u32_e32 v8, vcc, v2, v0", "v_subb_co_u32_e32 v9, vcc, v1, v3, vcc"], lambda a, b: a - b),
}  # fmt: skip


@pytest.mark.parametrize("name", CARRIES)
@few
@given(seeds)
def test_carries(name, seed):
    lines, function = CARRIES[name]
    registers = [integers(seed + index) for index in range(4)]
    wave = run(*lines, v=dict(enumerate(registers)))
    totals = [function(a, b) for a, b in zip(joined(*registers[:2]), joined(*registers[2:]), strict=True)]
    assert joined(wave.v[8], wave.v[9]) == [total & (1 << 64) - 1 for total in totals]
    assert wave.mask(VCC).tolist() == [not 0 <= total < 1 << 64 for total in totals]


@given(seeds)
@few
def test_mad_u64(seed):
    registers = [integers(seed + index) for index in range(4)]
    wave = run("v_mad_u64_u32 v[8:9], s[6:7], v0, v1, v[2:3]", v=dict(enumerate(registers)))
    products = (int(a) * int(b) for a, b in zip(*registers[:2], strict=True))
    totals = [product + c for product, c in zip(products, joined(*registers[2:]), strict=True)]
    assert joined(wave.v[8], wave.v[9]) == [total & (1 << 64) - 1 for total in totals]
    assert wave.mask(6).tolist() == [total >> 64 != 0 for total in totals]


# --- floats -------------------------------------------------------------------------------------------------------


def exactly(function, *values: float) -> float:
    """A sum of products, rounded once; where it is not finite, what Python says."""
    rough = function(*values)
    if not math.isfinite(rough):
        return rough
    return float32(function(*(Fraction(value) if math.isfinite(value) else 0 for value in values)))


FLOATS = {
    "v_add_f32_e32 v9, v0, v1": lambda a, b, c: a + b,
    "v_sub_f32_e32 v9, v0, v1": lambda a, b, c: a - b,
    "v_subrev_f32_e32 v9, v0, v1": lambda a, b, c: b - a,
    "v_mul_f32_e32 v9, v0, v1": lambda a, b, c: a * b,
    "v_mul_f32_e64 v9, -v0, |v1|": lambda a, b, c: -a * abs(b),
    "v_add_f32_e64 v9, -|v0|, v1": lambda a, b, c: -abs(a) + b,
    "v_fma_f32 v9, v0, v1, v2": lambda a, b, c: a * b + c,
    "v_fma_f32 v9, -v0, v1, 1.0": lambda a, b, c: -a * b + 1,
    "v_fmac_f32_e32 v2, v0, v1": lambda a, b, c: a * b + c,
    "v_fmamk_f32 v9, v0, 0x40400000, v2": lambda a, b, c: a * 3 + c,
    "v_fmaak_f32 v9, v0, v1, 0x40400000": lambda a, b, c: a * b + 3,
}


@pytest.mark.parametrize("text", FLOATS)
@few
@given(seeds)
def test_floats(text, seed):
    sources = [floats(seed + index) for index in range(3)]
    wave = run(text, v=dict(enumerate(sources)))
    lanes = [tuple(map(number, lane)) for lane in zip(*sources, strict=True)]
    with np.errstate(all="ignore"):
        same(wave.v[2 if "fmac" in text else 9], [exactly(FLOATS[text], *lane) for lane in lanes])


@given(st.lists(st.integers(1, 2000), min_size=64, max_size=64), seeds)
@few
def test_fma_where_two_roundings_differ(distances, seed):
    """A hair below the middle of two floats: float64 rounds up to the middle, or to its neighbour."""
    distance = np.array(distances) * 2.0**-23
    a, b = np.float32(2.0**-24 * (1 + distance)), np.float32(1 - distance)
    c = np.float32(1 + (2 * np.random.default_rng(seed).integers(0, 1 << 22, 64) + 1) * 2.0**-23)
    wave = run("v_fma_f32 v9, v0, v1, v2", v={index: value.view(np.uint32) for index, value in enumerate((a, b, c))})
    lanes = [tuple(Fraction(float(value)) for value in lane) for lane in zip(a, b, c, strict=True)]
    same(wave.v[9], [float32(x * y + z) for x, y, z in lanes])


PACKED = {
    "v_pk_mul_f32 v[8:9], v[0:1], v[2:3]": lambda a, b, c, d: (a * c, b * d),
    "v_pk_mul_f32 v[8:9], v[0:1], v[2:3] op_sel_hi:[1,0]": lambda a, b, c, d: (a * c, b * c),
    "v_pk_mul_f32 v[8:9], v[0:1], v[2:3] op_sel:[0,1]": lambda a, b, c, d: (a * d, b * d),
    "v_pk_add_f32 v[8:9], v[0:1], v[2:3] op_sel:[1,0] op_sel_hi:[0,1]": lambda a, b, c, d: (b + c, a + d),
    "v_pk_add_f32 v[8:9], v[0:1], 1.0 op_sel_hi:[1,0]": lambda a, b, c, d: (a + 1, b + 1),
    "v_pk_fma_f32 v[8:9], v[0:1], v[2:3], v[0:1] neg_lo:[1,0,0] neg_hi:[0,0,1]": lambda a, b, c, d: (
        -a * c + a, b * d - b
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", PACKED)
@few
@given(seeds)
def test_packed_floats(text, seed):
    sources = [floats(seed + index) for index in range(4)]
    wave = run(text, v=dict(enumerate(sources)))
    lanes = [tuple(map(number, lane)) for lane in zip(*sources, strict=True)]
    for half in range(2):
        same(wave.v[8 + half], [exactly(lambda *of: PACKED[text](*of)[half], *lane) for lane in lanes])  # noqa: B023


def test_packed_move():
    wave = run("v_pk_mov_b32 v[8:9], v[0:1], v[2:3] op_sel:[1,0]", v={0: 10, 1: 11, 2: 12, 3: 13})
    assert (wave.v[8, 0], wave.v[9, 0]) == (11, 12)


def test_packed_move_onto_itself():
    wave = run("v_pk_mov_b32 v[0:1], v[0:1], v[0:1] op_sel:[1,0]", v={0: 10, 1: 11})
    assert (wave.v[0, 0], wave.v[1, 0]) == (11, 10)


DIVISION = [
    "v_div_scale_f32 v3, s[4:5], v1, v1, v0",
    "v_rcp_f32_e32 v4, v3",
    "v_div_scale_f32 v5, vcc, v0, v1, v0",
    "v_fma_f32 v6, -v3, v4, 1.0",
    "v_fmac_f32_e32 v4, v6, v4",
    "v_mul_f32_e32 v6, v5, v4",
    "v_fma_f32 v7, -v3, v6, v5",
    "v_fmac_f32_e32 v6, v7, v4",
    "v_fma_f32 v3, -v3, v6, v5",
    "v_div_fmas_f32 v3, v3, v4, v6",
    "v_div_fixup_f32 v9, v3, v1, v0",
]


@pytest.mark.parametrize("nearest", [True, False])
@settings(max_examples=60, deadline=None)
@given(seeds)
def test_a_division_is_correctly_rounded(nearest, seed):
    """The compiler's sequence, whichever reciprocal the hardware finds."""
    numerator, denominator = floats(seed), floats(seed + 1)
    wave = run(*DIVISION, v={0: numerator, 1: denominator}, nearest=nearest)
    with np.errstate(all="ignore"):
        expected = numerator.view(np.float32) / denominator.view(np.float32)
    same(wave.v[9], expected.tolist())


@pytest.mark.parametrize("mnemonic", ["v_rcp_f32_e32", "v_rcp_iflag_f32_e32", "v_rsq_f32_e32"])
@few
@given(seeds)
def test_approximate_functions(mnemonic, seed):
    """Less than a unit in the last place off, and not always the nearest."""
    values = floats(seed) & np.uint32(0x7FFFFFFF)
    values = np.where((values < 0x00800000) | (values > 0x7E000000), np.uint32(0x40490FDB), values)
    x = values.view(np.float32).astype(np.float64)
    exact = 1 / np.sqrt(x) if "rsq" in mnemonic else 1 / x
    found = run(f"{mnemonic} v1, v0", v={0: values}).v[1].view(np.float32)
    assert (np.abs(found - exact) < np.spacing(exact.astype(np.float32))).all()
    assert (found != run(f"{mnemonic} v1, v0", v={0: values}, nearest=True).v[1].view(np.float32)).any()


def test_approximate_functions_flush_subnormals():
    assert run("v_rcp_f32_e32 v1, v0", v={0: 0x80000001}).v[1, 0] == 0xFF800000
    assert run("v_rsq_f32_e32 v1, v0", v={0: 0x007FFFFF}).v[1, 0] == 0x7F800000
    assert run("v_rcp_f32_e32 v1, v0", v={0: 0x7F000001}).v[1, 0] == 0


# --- conversions --------------------------------------------------------------------------------------------------


def half_bits(value: float) -> int:
    if math.isfinite(value):
        value = math.copysign(rounded(Fraction(value), 10, -14, 15), value)
    return int(np.float16(value).view(np.uint16))


def bfloat16_bits(value: float) -> int:
    if math.isfinite(value):
        value = math.copysign(rounded(Fraction(value), 7, -126, 127), value)
    return int(np.float32(value).view(np.uint32)) >> 16


@given(seeds)
@few
def test_conversions_to_half(seed):
    values = floats(seed)
    values[::3] = values[::3] & 0xFFFF0000 | 0x8000  # In the middle of two bfloat16.
    values[1::3] = values[1::3] & 0xFFFFE000 | 0x1000  # In the middle of two float16.
    values = np.where(np.isnan(values.view(np.float32)), np.uint32(0), values)
    wave = run(
        "v_cvt_f16_f32_e32 v2, v0", "v_cvt_pk_f16_f32 v3, v0, v1", "v_cvt_pk_bf16_f32 v4, v0, v1",
        v={0: values, 1: values[::-1]},
    )  # fmt: skip
    halves = [half_bits(number(bits)) for bits in values]
    bfloats = [bfloat16_bits(number(bits)) for bits in values]
    assert wave.v[2].tolist() == halves
    assert wave.v[3].tolist() == [low | high << 16 for low, high in zip(halves, halves[::-1], strict=True)]
    assert wave.v[4].tolist() == [low | high << 16 for low, high in zip(bfloats, bfloats[::-1], strict=True)]


def test_nan_stays_nan():
    wave = run("v_cvt_pk_bf16_f32 v1, v0, v0", "v_cvt_f16_f32_e32 v2, v0", v={0: 0x7F800001})
    assert wave.v[1, 0] & 0x7FFF > 0x7F80
    assert wave.v[2, 0] & 0x7FFF > 0x7C00


@given(seeds)
@few
def test_conversions_from_half_and_packing(seed):
    bits = integers(seed)
    wave = run("v_cvt_f32_f16_e32 v1, v0", "v_pack_b32_f16 v2, v0, v3", v={0: bits, 3: bits[::-1]})
    same(wave.v[1], bits.astype(np.uint16).view(np.float16).tolist())
    assert wave.v[2].tolist() == [
        int(a) & 0xFFFF | (int(b) & 0xFFFF) << 16 for a, b in zip(bits, bits[::-1], strict=True)
    ]


@given(seeds)
@few
def test_conversions_of_integers(seed):
    bits, values = integers(seed), floats(seed)
    wave = run(
        "v_cvt_f32_u32_e32 v2, v0", "v_cvt_f32_i32_e32 v3, v0", "v_cvt_u32_f32_e32 v4, v1", v={0: bits, 1: values}
    )
    same(wave.v[2], [float32(Fraction(int(a))) for a in bits])
    same(wave.v[3], [float32(Fraction(signed(int(a)))) for a in bits])
    numbers = map(number, values)
    assert wave.v[4].tolist() == [0 if math.isnan(a) else int(min(max(a, 0), float(MASK32))) for a in numbers]


@given(seeds)
@few
def test_mixed_precision(seed):
    """Sources of either width; the product of halves and a float32 is rounded once, then perhaps to a half."""
    halves = [(integers(seed + index) & 0xBBFFBBFF).astype(np.uint32) for index in range(2)]
    addend = np.random.default_rng(seed).standard_normal(64).astype(np.float32).view(np.uint32)
    lines = (
        "v_fma_mix_f32 v3, v0, v1, v2 op_sel:[1,0,0] op_sel_hi:[1,1,0]",
        "v_fma_mixlo_f16 v4, v0, v1, -v2 op_sel:[1,0,0] op_sel_hi:[1,1,0]",
    )
    wave = run(*lines, v={0: halves[0], 1: halves[1], 2: addend, 4: 0xABCD0000})
    upper = (halves[0] >> 16).astype(np.uint16).view(np.float16)
    lower = halves[1].astype(np.uint16).view(np.float16)
    lanes = [
        tuple(Fraction(float(x)) for x in lane) for lane in zip(upper, lower, addend.view(np.float32), strict=True)
    ]
    same(wave.v[3], [float32(a * b + c) for a, b, c in lanes])
    assert wave.v[4].tolist() == [0xABCD0000 | half_bits(float32(a * b - c)) for a, b, c in lanes]


# --- comparisons, selection, inactive lanes -----------------------------------------------------------------------

RELATIONS = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b, "neq": lambda a, b: a != b,
    "o": lambda a, b: a == a and b == b, "u": lambda a, b: a != a or b != b,
}  # fmt: skip
COMPARISONS = [name for name in vector.OPERATIONS if name.startswith("v_cmp_")]


@pytest.mark.parametrize("mnemonic", COMPARISONS)
@settings(max_examples=3, deadline=None)
@given(seeds)
def test_comparisons(mnemonic, seed):
    _, _, relation, kind = mnemonic.split("_")
    make = floats if kind == "f32" else integers
    registers = [make(seed + index) for index in range(4)]
    registers[2], registers[3] = (np.where(integers(seed) & 1, registers[i], registers[i - 2]) for i in (2, 3))
    read = {
        "u16": lambda low, high: int(low) & 0xFFFF, "u32": lambda low, high: int(low),
        "i32": lambda low, high: signed(int(low)), "f32": lambda low, high: number(low),
        "u64": lambda low, high: int(low) | int(high) << 32,
        "i64": lambda low, high: signed(int(low) | int(high) << 32, 64),
    }[kind]  # fmt: skip
    first, second = ("v[0:1]", "v[2:3]") if kind.endswith("64") else ("v0", "v2")
    active = 0xF0F0F0F0F0F0F0F0
    wave = run(f"{mnemonic}_e64 s[8:9], {first}, {second}", v=dict(enumerate(registers)), exec_mask=active)
    expected = [
        RELATIONS[relation](read(a, b), read(c, d)) and active >> lane & 1 == 1
        for lane, (a, b, c, d) in enumerate(zip(*registers, strict=True))
    ]
    assert wave.mask(8).tolist() == expected


def test_selection_and_inactive_lanes():
    wave = run("v_cndmask_b32_e64 v2, v0, v1, s[4:5]", v={0: 10, 1: 11, 2: 12}, s={4: 0b0110, 5: 0}, exec_mask=0b0011)
    assert wave.v[2, :4].tolist() == [10, 11, 12, 12]


INACTIVE = [
    "v_mov_b32_e32 v8, v0",
    "v_add_u16_e32 v8, v0, v1",
    "v_add_f32_e32 v8, v0, v1",
    "v_fmac_f32_e32 v8, v0, v1",
    "v_mov_b64_e32 v[8:9], v[0:1]",
    "v_pk_mul_f32 v[8:9], v[0:1], v[0:1]",
    "v_pk_mov_b32 v[8:9], v[0:1], v[0:1]",
    "v_fma_mix_f32 v8, v0, v0, v0",
    "v_fma_mixlo_f16 v8, v0, v0, v0",
    "v_bitop3_b32 v8, v0, v0, v0 bitop3:0xff",
    "v_add_u32_sdwa v8, v0, v1 dst_sel:BYTE_1 dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:DWORD",
    "v_mov_b32_dpp v8, v0 row_mirror row_mask:0xf bank_mask:0xf bound_ctrl:1",
    "v_mad_u64_u32 v[8:9], s[4:5], v0, v0, v[0:1]",
    "ds_bpermute_b32 v8, v0, v1",
]


@pytest.mark.parametrize("text", INACTIVE)
def test_inactive_lanes_keep_their_values(text):
    wave = run(text, v={0: 0x40400000, 1: 0x40A00000, 8: 77, 9: 78}, exec_mask=0b10)
    assert wave.v[8:10, [0, 2, 63]].tolist() == [[77] * 3, [78] * 3]
    assert wave.v[8:10, 1].tolist() != [77, 78]


def test_lanes_and_scalars():
    lanes = np.arange(64) + 100
    wave = run(
        "v_readfirstlane_b32 s4, v0", "v_readlane_b32 s5, v0, 63", "v_writelane_b32 v1, s5, 2", v={0: lanes, 1: 7},
        exec_mask=0b1000,
    )  # fmt: skip
    assert (wave.s[4], wave.s[5]) == (103, 163)
    assert wave.v[1, :4].tolist() == [7, 7, 163, 7]  # In spite of the mask.


def test_readfirstlane_without_active_lanes():
    assert run("v_readfirstlane_b32 s4, v0", v={0: np.arange(64) + 100}, exec_mask=0).s[4] == 100


# --- parts of registers and other lanes ---------------------------------------------------------------------------

SDWA = {
    "dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1 src1_sel:BYTE_0": 0xAABB + 0x44,
    "dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:BYTE_3 src1_sel:DWORD": 0xAA + 0x11223344,
    "dst_sel:BYTE_1 dst_unused:UNUSED_PAD src0_sel:BYTE_0 src1_sel:BYTE_2": (0xDD + 0x22 & 0xFF) << 8,
    "dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:WORD_0 src1_sel:BYTE_1": 0xCCDD + 0x33 << 16 | 0x7777,
}


@pytest.mark.parametrize("modifiers", SDWA)
def test_parts_of_registers(modifiers):
    wave = run(f"v_add_u32_sdwa v2, v0, v1 {modifiers}", v={0: 0xAABBCCDD, 1: 0x11223344, 2: 0x77777777})
    assert wave.v[2, 0] == SDWA[modifiers]


DPP = {
    "quad_perm:[1,0,3,2]": lambda lane: lane ^ 1,
    "quad_perm:[3,3,0,1]": lambda lane: lane // 4 * 4 + (3, 3, 0, 1)[lane % 4],
    "row_shl:4": lambda lane: lane + 4 if lane % 16 < 12 else None,
    "row_shr:8": lambda lane: lane - 8 if lane % 16 >= 8 else None,
    "row_ror:3": lambda lane: lane // 16 * 16 + (lane - 3) % 16,
    "row_mirror": lambda lane: lane // 16 * 16 + 15 - lane % 16,
    "row_half_mirror": lambda lane: lane // 8 * 8 + 7 - lane % 8,
    "row_newbcast:5": lambda lane: lane // 16 * 16 + 5,
    "row_bcast:15": lambda lane: lane // 16 * 16 - 1 if lane >= 16 else None,
    "row_bcast:31": lambda lane: 31 if lane >= 32 else None,
}


@pytest.mark.parametrize("bound", ["", " bound_ctrl:1"])
@pytest.mark.parametrize("control", DPP)
def test_other_lanes(control, bound):
    """A lane without a source keeps its value, or reads 0; an inactive source is none."""
    wave = run(
        f"v_mov_b32_dpp v1, v0 {control} row_mask:0xf bank_mask:0xf{bound}",
        v={0: np.arange(64) + 100, 1: 7}, exec_mask=(1 << 64) - 1 & ~(1 << 9),
    )  # fmt: skip
    for lane in range(64):
        source = DPP[control](lane)
        missing = source in (None, 9)
        expected = 7 if lane == 9 or (missing and not bound) else 0 if missing else source + 100
        assert wave.v[1, lane] == expected, lane


def test_rows_and_banks():
    wave = run("v_mov_b32_dpp v1, v0 quad_perm:[0,1,2,3] row_mask:0xa bank_mask:0x6", v={0: 1, 1: 0})
    assert wave.v[1].tolist() == [int(lane // 16 in (1, 3) and lane % 16 // 4 in (1, 2)) for lane in range(64)]


def test_dpp_of_an_addition():
    wave = run("v_add_f32_dpp v2, v0, v1 row_shr:1 row_mask:0xf bank_mask:0xf", v={0: 0x3F800000, 1: 0x40000000, 2: 5})
    assert wave.v[2, 0] == 5
    assert wave.v[2, 1] == 0x40400000


def test_every_instruction_is_tested():
    texts = [
        *INTEGERS,
        *WIDE,
        *FLOATS,
        *PACKED,
        *DIVISION,
        *COMPARISONS,
        *(line for lines, _ in CARRIES.values() for line in lines),
    ]
    tested = {text.split()[0].removesuffix("_e32").removesuffix("_e64") for text in texts}
    alone = {
        "v_perm_b32", "v_mad_u64_u32", "v_bitop3_b16", "v_pk_mov_b32", "v_rcp_iflag_f32", "v_rsq_f32", "v_cvt_f16_f32",
        "v_cvt_pk_f16_f32", "v_cvt_pk_bf16_f32", "v_cvt_f32_f16", "v_pack_b32_f16", "v_cvt_f32_u32", "v_cvt_f32_i32",
        "v_cvt_u32_f32", "v_fma_mix_f32", "v_fma_mixlo_f16", "v_cndmask_b32", "v_readfirstlane_b32", "v_readlane_b32",
        "v_writelane_b32",
    }  # fmt: skip
    assert {*vector.OPERATIONS, *vector.APPROXIMATE, *vector.SPECIAL} == tested | alone
