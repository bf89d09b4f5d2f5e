"""The vector unit: what each instruction computes, lane by lane.

A signature reads like an assignment: "u32 mask = u32 u32" are two results and two sources, in the operands' order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from amdgcn.simulator import arithmetic, lanes, operands
from amdgcn.simulator.assembly import Instruction
from amdgcn.simulator.operands import Read, reader, writer
from amdgcn.simulator.wave import VCC, WAVE_SIZE, Step, Wave

U16, U32, U64 = np.uint16, np.uint32, np.uint64


@dataclass(frozen=True)
class Operation:
    results: list[str]
    sources: list[str]
    compute: Callable[..., Any]
    accumulates: bool = False  # The destination is a last source.
    implicit_vcc: bool = False  # VCC is a last source, not written as an operand.


OPERATIONS: dict[str, Operation] = {}


def operation(name: str, signature: str, compute: Callable[..., Any], **flags: bool) -> None:
    results, _, sources = signature.partition("=")
    OPERATIONS[name] = Operation(results.split(), sources.split(), compute, **flags)


# --- integers -----------------------------------------------------------------------------------------------------


def _u24(a: Any) -> Any:
    """The low 24 bits: multipliers of 24 bits are faster."""
    return a & U32(0xFFFFFF)


def _i24(a: Any) -> Any:
    return (a << np.int32(8)) >> np.int32(8)


operation("v_mov_b32", "u32 = u32", lambda a: a)
operation("v_mov_b64", "u64 = u64", lambda a: a)
operation("v_and_b32", "u32 = u32 u32", lambda a, b: a & b)
operation("v_or_b32", "u32 = u32 u32", lambda a, b: a | b)
operation("v_xor_b32", "u32 = u32 u32", lambda a, b: a ^ b)
operation("v_not_b32", "u32 = u32", lambda a: ~a)
operation("v_and_or_b32", "u32 = u32 u32 u32", lambda a, b, c: a & b | c)
operation("v_or3_b32", "u32 = u32 u32 u32", lambda a, b, c: a | b | c)
operation("v_add_u32", "u32 = u32 u32", lambda a, b: a + b)
operation("v_sub_u32", "u32 = u32 u32", lambda a, b: a - b)
operation("v_subrev_u32", "u32 = u32 u32", lambda a, b: b - a)
operation("v_sub_u16", "u16 = u16 u16", lambda a, b: a - b)
operation("v_add_u16", "u16 = u16 u16", lambda a, b: a + b)
operation("v_add3_u32", "u32 = u32 u32 u32", lambda a, b, c: a + b + c)
operation("v_xad_u32", "u32 = u32 u32 u32", lambda a, b, c: (a ^ b) + c)
operation("v_mul_lo_u32", "u32 = u32 u32", lambda a, b: a * b)
operation("v_mul_u32_u24", "u32 = u32 u32", lambda a, b: _u24(a) * _u24(b))
operation("v_mad_u32_u24", "u32 = u32 u32 u32", lambda a, b, c: _u24(a) * _u24(b) + c)
operation("v_mad_i32_i24", "i32 = i32 i32 i32", lambda a, b, c: _i24(a) * _i24(b) + c)
operation("v_mul_i32_i24", "i32 = i32 i32", lambda a, b: _i24(a) * _i24(b))
operation("v_mul_lo_u16", "u16 = u16 u16", lambda a, b: a * b)
operation("v_mul_hi_u32", "u32 = u32 u32", lambda a, b: (a.astype(U64) * b.astype(U64) >> U64(32)).astype(U32))
operation("v_min_i32", "i32 = i32 i32", np.minimum)
operation("v_max_i32", "i32 = i32 i32", np.maximum)
operation("v_min_u32", "u32 = u32 u32", np.minimum)
operation("v_max_u32", "u32 = u32 u32", np.maximum)


def _carry(total: Any) -> Any:
    return total.astype(U32), total >> U64(32) != 0


operation("v_add_co_u32", "u32 mask = u32 u32", lambda a, b: _carry(a.astype(U64) + b.astype(U64)))
operation("v_addc_co_u32", "u32 mask = u32 u32 mask", lambda a, b, c: _carry(a.astype(U64) + b.astype(U64) + c))
operation("v_sub_co_u32", "u32 mask = u32 u32", lambda a, b: (a - b, a < b))
operation("v_subrev_co_u32", "u32 mask = u32 u32", lambda a, b: (b - a, b < a))
operation("v_subb_co_u32", "u32 mask = u32 u32 mask", lambda a, b, c: _carry(a.astype(U64) - b.astype(U64) - c))


def _mad_u64(a: Any, b: Any, c: Any) -> Any:
    total = a.astype(U64) * b.astype(U64) + c
    return total, total < c


operation("v_mad_u64_u32", "u64 mask = u32 u32 u64", _mad_u64)
operation("v_lshl_add_u64", "u64 = u64 u32 u64", lambda a, b, c: (a << (b & U32(7)).astype(U64)) + c)

# --- shifts and bit fields ----------------------------------------------------------------------------------------

operation("v_lshlrev_b32", "u32 = u32 u32", lambda a, b: b << (a & U32(31)))
operation("v_lshrrev_b32", "u32 = u32 u32", lambda a, b: b >> (a & U32(31)))
operation("v_ashrrev_i32", "i32 = i32 i32", lambda a, b: b >> (a & np.int32(31)))
operation("v_lshlrev_b16", "u16 = u16 u16", lambda a, b: b << (a & U16(15)))
operation("v_lshrrev_b16", "u16 = u16 u16", lambda a, b: b >> (a & U16(15)))
operation("v_lshlrev_b64", "u64 = u32 u64", lambda a, b: b << (a & U32(63)).astype(U64))
operation("v_lshrrev_b64", "u64 = u32 u64", lambda a, b: b >> (a & U32(63)).astype(U64))
operation("v_ashrrev_i64", "i64 = u32 i64", lambda a, b: b >> (a & U32(63)).astype(np.int64))
operation("v_lshl_add_u32", "u32 = u32 u32 u32", lambda a, b, c: (a << (b & U32(31))) + c)
operation("v_add_lshl_u32", "u32 = u32 u32 u32", lambda a, b, c: a + b << (c & U32(31)))
operation("v_lshl_or_b32", "u32 = u32 u32 u32", lambda a, b, c: a << (b & U32(31)) | c)
operation("v_bfe_u32", "u32 = u32 u32 u32", lambda a, b, c: a >> (b & U32(31)) & (U32(1) << (c & U32(31))) - U32(1))
operation("v_bfi_b32", "u32 = u32 u32 u32", lambda a, b, c: a & b | ~a & c)


def _bfe_i32(a: Any, offset: Any, width: Any) -> Any:
    offset, width = (offset & U32(31)).astype(np.int64), (width & U32(31)).astype(np.int64)
    field = a.astype(np.int64) >> offset & (1 << width) - 1
    sign = np.where(width > 0, field >> np.maximum(width - 1, 0) & 1, 0)
    return (field - (sign << width)).astype(np.int32)


operation("v_bfe_i32", "i32 = i32 u32 u32", _bfe_i32)


def _alignbit(high: Any, low: Any, shift: Any) -> Any:
    both = high.astype(U64) << U64(32) | low.astype(U64)
    return (both >> (shift & U32(31)).astype(U64)).astype(U32)


operation("v_alignbit_b32", "u32 = u32 u32 u32", _alignbit)


def _reverse_bits(a: Any) -> Any:
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        a = a >> U32(shift) & U32(mask) | (a & U32(mask)) << U32(shift)
    return a


operation("v_bfrev_b32", "u32 = u32", _reverse_bits)


def _perm(high: Any, low: Any, selector: Any) -> Any:
    """Each byte of the selector names a byte of {high, low}, or a constant."""
    both = high.astype(U64) << U64(32) | low.astype(U64)
    result = U32(0)
    for byte in range(4):
        which = selector >> U32(8 * byte) & U32(0xFF)
        if np.any((which > 7) & (which < 12)):
            raise NotImplementedError("v_perm_b32 with a selector that repeats a sign")
        chosen = (both >> (which & U32(7)).astype(U64) * U64(8) & U64(0xFF)).astype(U32)
        chosen = np.where(which == 12, U32(0), np.where(which > 12, U32(0xFF), chosen))
        result = result | chosen << U32(8 * byte)
    return result


operation("v_perm_b32", "u32 = u32 u32 u32", _perm)

# --- floats -------------------------------------------------------------------------------------------------------

operation("v_add_f32", "f32 = f32 f32", lambda a, b: a + b)
operation("v_sub_f32", "f32 = f32 f32", lambda a, b: a - b)
operation("v_subrev_f32", "f32 = f32 f32", lambda a, b: b - a)
operation("v_mul_f32", "f32 = f32 f32", lambda a, b: a * b)
operation("v_fma_f32", "f32 = f32 f32 f32", arithmetic.fma)
operation("v_fmac_f32", "f32 = f32 f32", arithmetic.fma, accumulates=True)
operation("v_fmamk_f32", "f32 = f32 f32 f32", arithmetic.fma)
operation("v_fmaak_f32", "f32 = f32 f32 f32", arithmetic.fma)
operation("v_div_scale_f32", "f32 mask = f32 f32 f32", arithmetic.div_scale)
operation("v_div_fmas_f32", "f32 = f32 f32 f32", arithmetic.div_fmas, implicit_vcc=True)
operation("v_div_fixup_f32", "f32 = f32 f32 f32", arithmetic.div_fixup)
operation("v_cvt_f32_u32", "f32 = u32", lambda a: a.astype(np.float32))
operation("v_cvt_f32_i32", "f32 = i32", lambda a: a.astype(np.float32))
operation("v_cvt_u32_f32", "u32 = f32", arithmetic.to_unsigned)
operation("v_cvt_f32_f16", "f32 = f16", lambda a: a.astype(np.float32))
operation("v_cvt_f16_f32", "f16 = f32", arithmetic.to_half)
operation("v_pack_b32_f16", "u32 = f16 f16", arithmetic.pack)
operation(
    "v_cvt_pk_f16_f32", "u32 = f32 f32", lambda a, b: arithmetic.pack(arithmetic.to_half(a), arithmetic.to_half(b))
)
operation(
    "v_cvt_pk_bf16_f32",
    "u32 = f32 f32",
    lambda a, b: arithmetic.pack(arithmetic.to_bfloat16(a), arithmetic.to_bfloat16(b)),
)

APPROXIMATE = {
    "v_rcp_f32": arithmetic.reciprocal,
    "v_rcp_iflag_f32": arithmetic.reciprocal,
    "v_rsq_f32": arithmetic.reciprocal_root,
}

# --- comparisons and selection ------------------------------------------------------------------------------------

COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip

for _name, _compare in COMPARISONS.items():
    for _kind in ("u16", "u32", "i32", "u64", "i64"):
        operation(f"v_cmp_{_name}_{_kind}", f"mask = {_kind} {_kind}", _compare)
    if _name != "ne":
        operation(f"v_cmp_{_name}_f32", "mask = f32 f32", _compare)
operation("v_cmp_o_f32", "mask = f32 f32", lambda a, b: ~(np.isnan(a) | np.isnan(b)))
operation("v_cmp_u_f32", "mask = f32 f32", lambda a, b: np.isnan(a) | np.isnan(b))
operation("v_cmp_neq_f32", "mask = f32 f32", np.not_equal)
operation("v_cndmask_b32", "u32 = u32 u32 mask", lambda a, b, choose: np.where(choose, b, a))


# --- decoding -----------------------------------------------------------------------------------------------------


def decode(instruction: Instruction, nearest: bool) -> Step:
    """`nearest`: reciprocals and reciprocal roots are correctly rounded, which the hardware does not promise."""
    name, _, encoding = instruction.mnemonic.rpartition("_")
    if encoding not in ("e32", "e64", "sdwa", "dpp"):
        name, encoding = instruction.mnemonic, ""
    if name in SPECIAL:
        if encoding in ("sdwa", "dpp"):
            raise instruction.unsupported(f"{encoding} of {name}")
        return SPECIAL[name](instruction)
    if name in APPROXIMATE:
        compute = functools.partial(arithmetic.approximate, APPROXIMATE[name], nearest=nearest)
        return _decode(Operation(["f32"], ["f32"], compute), instruction, encoding)
    if name not in OPERATIONS:
        raise instruction.unsupported("unknown instruction")
    return _decode(OPERATIONS[name], instruction, encoding)


def _decode(known: Operation, instruction: Instruction, encoding: str) -> Step:
    instruction.expect_operands(len(known.results) + len(known.sources))
    targets, texts = instruction.operands[: len(known.results)], instruction.operands[len(known.results) :]
    if encoding == "sdwa":
        return _decode_sdwa(known, instruction, targets, texts)
    if encoding == "dpp":
        return _decode_dpp(known, instruction, targets, texts)
    sources = [reader(text, kind, instruction) for text, kind in zip(texts, known.sources, strict=True)]
    return _step(known, sources, targets, instruction)


def _step(known: Operation, sources: list[Read], targets: list[str], instruction: Instruction) -> Step:
    compute = known.compute
    if known.accumulates:
        sources = [*sources, reader(targets[0], known.results[0], instruction)]
    if known.implicit_vcc:
        sources = [*sources, lambda wave: wave.mask(VCC)]
    writes = [writer(text, kind, instruction) for text, kind in zip(targets, known.results, strict=True)]
    if len(writes) == 1:
        write = writes[0]
        return lambda wave: write(wave, compute(*[read(wave) for read in sources]))

    def step(wave: Wave) -> None:
        for write, result in zip(writes, compute(*[read(wave) for read in sources]), strict=True):
            write(wave, result)

    return step


# --- parts of registers (SDWA) ------------------------------------------------------------------------------------

PARTS = {
    "BYTE_0": (0, 8),
    "BYTE_1": (8, 8),
    "BYTE_2": (16, 8),
    "BYTE_3": (24, 8),
    "WORD_0": (0, 16),
    "WORD_1": (16, 16),
}


def _decode_sdwa(known: Operation, instruction: Instruction, targets: list[str], texts: list[str]) -> Step:
    selected = [_part(instruction, f"src{index}_sel") for index in range(2)]
    target, unused = _part(instruction, "dst_sel"), instruction.take("dst_unused", "UNUSED_PAD")
    sources = [
        reader(text, kind, instruction, None if index > 1 else _selector(selected[index]))
        for index, (text, kind) in enumerate(zip(texts, known.sources, strict=True))
    ]
    if target is None:
        return _step(known, sources, targets, instruction)
    if known.results != ["u32"] or unused not in ("UNUSED_PAD", "UNUSED_PRESERVE"):
        raise instruction.unsupported("this destination of SDWA")
    first = operands.register(targets[0], "v", 1, instruction)
    offset, width = target
    field = U32(((1 << width) - 1) << offset)
    kept = ~field if unused == "UNUSED_PRESERVE" else U32(0)

    def step(wave: Wave) -> None:
        value = known.compute(*[read(wave) for read in sources]) << U32(offset) & field
        np.copyto(wave.v[first], value | wave.v[first] & kept, where=wave.exec)

    return step


def _part(instruction: Instruction, modifier: str) -> tuple[int, int] | None:
    text = instruction.take(modifier, "DWORD")
    if text != "DWORD" and text not in PARTS:
        raise instruction.unsupported(f"{modifier}:{text}")
    return PARTS.get(text)


def _selector(part: tuple[int, int] | None) -> Callable[[Read], Read] | None:
    if part is None:
        return None
    offset, width = part
    return lambda read: lambda wave: read(wave) >> U32(offset) & U32((1 << width) - 1)


# --- other lanes (DPP) --------------------------------------------------------------------------------------------


def _decode_dpp(known: Operation, instruction: Instruction, targets: list[str], texts: list[str]) -> Step:
    source, exists, enabled, reads_zero = lanes.take_dpp(instruction)
    first = operands.register(targets[0], "v", 1, instruction)
    if known.results not in (["u32"], ["i32"], ["f32"]):
        raise instruction.unsupported("DPP with this result")

    def move(read: Read) -> Read:
        return lambda wave: np.where(exists & wave.exec[source], read(wave)[source], U32(0))

    sources = [
        reader(text, kind, instruction, move if index == 0 else None)
        for index, (text, kind) in enumerate(zip(texts, known.sources, strict=True))
    ]
    if known.accumulates:
        sources.append(reader(targets[0], known.results[0], instruction))

    def step(wave: Wave) -> None:
        value = known.compute(*[read(wave) for read in sources])
        readable = ALL if reads_zero else exists & wave.exec[source]
        np.copyto(wave.v[first], value.view(U32), where=wave.exec & enabled & readable)

    return step


ALL = np.ones(WAVE_SIZE, bool)

# --- instructions of their own kind -------------------------------------------------------------------------------


def _packed(compute: Callable[..., Any], count: int) -> Callable[[Instruction], Step]:
    """Two float32 at once; op_sel and op_sel_hi choose which half of each source the two results are computed from."""

    def decode_packed(instruction: Instruction) -> Step:
        instruction.expect_operands(1 + count)
        first = operands.register(instruction.operands[0], "v", 2, instruction)
        low = instruction.take_bits("op_sel", [0] * count), instruction.take_bits("neg_lo", [0] * count)
        high = instruction.take_bits("op_sel_hi", [1] * count), instruction.take_bits("neg_hi", [0] * count)
        halves = [
            [
                _half(text, half, bool(negate), instruction)
                for text, half, negate in zip(instruction.operands[1:], *choice, strict=True)
            ]
            for choice in (low, high)
        ]

        def step(wave: Wave) -> None:
            results = [compute(*[read(wave) for read in sources]) for sources in halves]
            for index, result in enumerate(results):
                np.copyto(wave.v[first + index], result.view(U32), where=wave.exec)

        return step

    return decode_packed


def _half(text: str, half: int, negate: bool, instruction: Instruction) -> Read:
    found = operands.parse(text, instruction)
    if isinstance(found, operands.Register):
        if found.count != 2:
            raise instruction.unsupported(f"operand {text}: expected 2 registers")
        text = f"{found.kind}{found.first + half}"
    elif half:
        raise instruction.unsupported(f"the upper half of the constant {text}")
    return reader(f"-{text}" if negate else text, "f32", instruction)


def _packed_move(instruction: Instruction) -> Step:
    """The low result is a half of the first source, the high one a half of the second."""
    instruction.expect_operands(3)
    first = operands.register(instruction.operands[0], "v", 2, instruction)
    choice = instruction.take_bits("op_sel", [0, 0])
    if instruction.take_bits("op_sel_hi", [1, 1]) != [1, 1]:
        raise instruction.unsupported("op_sel_hi")
    sources = [
        _half(text, half, False, instruction) for text, half in zip(instruction.operands[1:], choice, strict=True)
    ]

    def step(wave: Wave) -> None:
        values = [np.array(read(wave).view(U32)) for read in sources]
        for index, value in enumerate(values):
            np.copyto(wave.v[first + index], value, where=wave.exec)

    return step


def _mixed(result: str) -> Callable[[Instruction], Step]:
    """A multiply-add whose sources are float32, or by op_sel_hi one half (by op_sel) of a register as float16."""

    def decode_mixed(instruction: Instruction) -> Step:
        instruction.expect_operands(4)
        first = operands.register(instruction.operands[0], "v", 1, instruction)
        upper, is_half = (instruction.take_bits(name, [0, 0, 0]) for name in ("op_sel", "op_sel_hi"))
        sources = [_mixed_source(*of, instruction) for of in zip(instruction.operands[1:], is_half, upper, strict=True)]

        def step(wave: Wave) -> None:
            value = arithmetic.fma(*[read(wave) for read in sources])
            if result == "f32":
                np.copyto(wave.v[first], value.view(U32), where=wave.exec)
                return
            low = value.astype(np.float16).view(U16).astype(U32)
            np.copyto(wave.v[first], wave.v[first] & U32(0xFFFF0000) | low, where=wave.exec)

        return step

    return decode_mixed


def _mixed_source(text: str, is_half: int, upper: int, instruction: Instruction) -> Read:
    if not is_half:
        if upper:
            raise instruction.unsupported("op_sel of a float32")
        return reader(text, "f32", instruction)
    shift: Callable[[Read], Read] = lambda read: lambda wave: read(wave) >> U32(16 * upper)  # noqa: E731
    half = reader(text, "f16", instruction, shift)
    return lambda wave: half(wave).astype(np.float32)


def _bitop3(width: int) -> Callable[[Instruction], Step]:
    """Any function of three bits, given by its table of truth."""

    def decode_bitop3(instruction: Instruction) -> Step:
        instruction.expect_operands(4)
        table = int(instruction.take("bitop3", "0"), 0)
        first = operands.register(instruction.operands[0], "v", 1, instruction)
        sources = [reader(text, "u32", instruction) for text in instruction.operands[1:]]

        def step(wave: Wave) -> None:
            a, b, c = (read(wave) for read in sources)
            value = U32(0)
            for row in range(8):
                if table >> row & 1:
                    value = value | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
            if width == 16:
                # What becomes of the upper half is not documented: nobody may depend on it.
                value = value & U32(0xFFFF) | U32(0xDEAD0000)
            np.copyto(wave.v[first], value, where=wave.exec)

        return step

    return decode_bitop3


def _readfirstlane(instruction: Instruction) -> Step:
    instruction.expect_operands(2)
    target = operands.register(instruction.operands[0], "s", 1, instruction)
    source = operands.register(instruction.operands[1], "v", 1, instruction)

    def step(wave: Wave) -> None:
        # argmax is the first active lane, and 0 if there is none, as in hardware.
        wave.write(target, int(wave.v[source][np.argmax(wave.exec)]))

    return step


def _readlane(instruction: Instruction) -> Step:
    instruction.expect_operands(3)
    target = operands.register(instruction.operands[0], "s", 1, instruction)
    source = operands.register(instruction.operands[1], "v", 1, instruction)
    lane = _scalar(instruction.operands[2], instruction)
    return lambda wave: wave.write(target, int(wave.v[source][int(lane(wave)) % WAVE_SIZE]))


def _writelane(instruction: Instruction) -> Step:
    instruction.expect_operands(3)
    target = operands.register(instruction.operands[0], "v", 1, instruction)
    value, lane = (_scalar(text, instruction) for text in instruction.operands[1:])

    def step(wave: Wave) -> None:
        wave.v[target, int(lane(wave)) % WAVE_SIZE] = value(wave)

    return step


def _scalar(text: str, instruction: Instruction) -> Read:
    found = operands.parse(text, instruction)
    if isinstance(found, operands.Register) and found.kind == "v":
        raise instruction.unsupported(f"operand {text}: expected one value for all lanes")
    return operands.bits(text, 1, instruction)


SPECIAL: dict[str, Callable[[Instruction], Step]] = {
    "v_pk_add_f32": _packed(lambda a, b: a + b, 2),
    "v_pk_mul_f32": _packed(lambda a, b: a * b, 2),
    "v_pk_fma_f32": _packed(arithmetic.fma, 3),
    "v_pk_mov_b32": _packed_move,
    "v_fma_mix_f32": _mixed("f32"),
    "v_fma_mixlo_f16": _mixed("f16"),
    "v_bitop3_b32": _bitop3(32),
    "v_bitop3_b16": _bitop3(16),
    "v_readfirstlane_b32": _readfirstlane,
    "v_readlane_b32": _readlane,
    "v_writelane_b32": _writelane,
}
