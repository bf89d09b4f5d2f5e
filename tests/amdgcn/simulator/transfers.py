"""Loads and stores: scalar, global, through buffer descriptors, and LDS with its exchanges between lanes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from amdgcn.simulator import lanes, operands
from amdgcn.simulator.assembly import Instruction
from amdgcn.simulator.memory import Arena, Lds
from amdgcn.simulator.wave import MASK32, WAVE_SIZE, Step, Wave

# The bits that Triton puts into the last word of a descriptor: a raw buffer of 32-bit elements.
RAW_BUFFER = 0x27000
STRIDE_AND_SWIZZLE = 0xFFFF0000


@dataclass
class Memories:
    """What the waves of the workgroup that runs can reach, and the buffer offsets that were out of range so far."""

    arena: Arena
    lds: Lds
    out_of_range: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Transfer:
    """`size` bytes a lane; from or to the upper half of the register; into a half of it, keeping the other."""

    stores: bool
    size: int
    upper: bool = False
    keeps_other_half: bool = False

    @property
    def registers(self) -> int:
        return max(1, self.size // 4)


_LOADS = {
    "ubyte": Transfer(False, 1), "ushort": Transfer(False, 2), "dword": Transfer(False, 4),
    "dwordx2": Transfer(False, 8), "dwordx3": Transfer(False, 12), "dwordx4": Transfer(False, 16),
    "short_d16": Transfer(False, 2, False, True), "short_d16_hi": Transfer(False, 2, True, True),
}  # fmt: skip
_STORES = {
    "byte": Transfer(True, 1), "short": Transfer(True, 2), "short_d16_hi": Transfer(True, 2, True),
    "dword": Transfer(True, 4), "dwordx2": Transfer(True, 8), "dwordx3": Transfer(True, 12),
    "dwordx4": Transfer(True, 16),
}  # fmt: skip
BUFFER = {
    **{f"buffer_load_{name}": transfer for name, transfer in _LOADS.items()},
    **{f"buffer_store_{name}": transfer for name, transfer in _STORES.items()},
}
GLOBAL = {
    **{f"global_load_{name}": transfer for name, transfer in _LOADS.items()},
    **{f"global_store_{name}": transfer for name, transfer in _STORES.items()},
}
LDS = {
    "ds_read_u8": Transfer(False, 1), "ds_read_u16": Transfer(False, 2), "ds_read_b32": Transfer(False, 4),
    "ds_read_b64": Transfer(False, 8), "ds_read_b96": Transfer(False, 12), "ds_read_b128": Transfer(False, 16),
    "ds_read_u16_d16": Transfer(False, 2, False, True), "ds_read_u16_d16_hi": Transfer(False, 2, True, True),
    "ds_write_b8": Transfer(True, 1), "ds_write_b16": Transfer(True, 2), "ds_write_b32": Transfer(True, 4),
    "ds_write_b64": Transfer(True, 8), "ds_write_b96": Transfer(True, 12), "ds_write_b128": Transfer(True, 16),
    "ds_write_b16_d16_hi": Transfer(True, 2, True),
}  # fmt: skip
CACHE_POLICY = ("nt", "sc0", "sc1", "glc", "slc")


def decode(instruction: Instruction, memories: Memories) -> Step | None:
    """None if this is no transfer."""
    name = instruction.mnemonic
    if name.startswith("s_load_dword"):
        return _scalar_load(instruction, memories)
    if name in BUFFER:
        return _buffer(instruction, BUFFER[name], memories)
    if name in GLOBAL:
        return _global(instruction, GLOBAL[name], memories)
    if name in LDS:
        return _lds(instruction, LDS[name], memories)
    pair = re.fullmatch(r"ds_(read|write)2(st64)?_b(32|64)", name)
    if pair is not None:
        return _lds_pair(instruction, pair[1] == "write", int(pair[3]) // 8, 64 if pair[2] else 1, memories)
    if name == "ds_bpermute_b32":
        return _bpermute(instruction)
    if name == "ds_swizzle_b32":
        return _swizzle(instruction)
    return None


def _scalar_load(instruction: Instruction, memories: Memories) -> Step:
    match = re.fullmatch(r"s_load_dword(?:x(2|4|8|16))?", instruction.mnemonic)
    if match is None:
        raise instruction.unsupported("unknown instruction")
    instruction.expect_operands(3)
    count = int(match[1] or 1)
    target = operands.register(instruction.operands[0], "s", count, instruction)
    base = operands.register(instruction.operands[1], "s", 2, instruction)
    offset = operands.bits(instruction.operands[2], 1, instruction)

    def step(wave: Wave) -> None:
        address = np.array([wave.read64(base) + int(offset(wave))], np.uint64)
        for index, value in enumerate(memories.arena.load(address, 4 * count).view(np.uint32)[0]):
            wave.write(target + index, int(value))

    return step


# --- addresses ----------------------------------------------------------------------------------------------------


def _buffer(instruction: Instruction, transfer: Transfer, memories: Memories) -> Step:
    """A raw buffer: beyond its end, which is checked dword by dword, loads give 0 and stores do nothing."""
    instruction.expect_operands(4)
    data, vector, descriptor, scalar = instruction.operands
    if not instruction.take_flag("offen"):
        raise instruction.unsupported("a buffer access without an offset of its own for each lane")
    _ignore_cache_policy(instruction)
    immediate = int(instruction.take("offset", "0"), 0)
    data_register = operands.register(data, "v", transfer.registers, instruction)
    offset_register = operands.register(vector, "v", 1, instruction)
    first = operands.register(descriptor, "s", 4, instruction)
    scalar_offset = operands.bits(scalar, 1, instruction)
    piece = min(transfer.size, 4)

    def step(wave: Wave) -> None:
        low, high, length, flags = wave.s[first : first + 4]
        if flags != RAW_BUFFER or high & STRIDE_AND_SWIZZLE:
            raise instruction.unsupported(f"the buffer descriptor {high:#x}, {flags:#x}")
        shift = int(scalar_offset(wave))
        # As wide as it gets: the hardware does not wrap around.
        start = wave.v[offset_register].astype(np.int64) + immediate
        offsets = start[:, None] + np.arange(0, transfer.size, piece)
        inside = (offsets < max(length - shift, 0)) & wave.exec[:, None]
        outside = ~inside.all(1) & wave.exec
        memories.out_of_range.update(wave.v[offset_register][outside].tolist())
        addresses = (low | high << 32) + shift + offsets[inside]
        if transfer.stores:
            pieces = _outgoing(wave, data_register, transfer).reshape(WAVE_SIZE, -1, piece)
            memories.arena.store(addresses, pieces[inside])
            return
        loaded = np.zeros((*inside.shape, piece), np.uint8)
        loaded[inside] = memories.arena.load(addresses, piece)
        _incoming(wave, data_register, transfer, loaded.reshape(WAVE_SIZE, -1), wave.exec)

    return step


def _global(instruction: Instruction, transfer: Transfer, memories: Memories) -> Step:
    """The address is a pair of vector registers, or a pair of scalar registers and an offset in each lane."""
    instruction.expect_operands(3)
    data, vector = instruction.operands[1::-1] if transfer.stores else instruction.operands[:2]
    scalar = instruction.operands[2]
    _ignore_cache_policy(instruction)
    immediate = int(instruction.take("offset", "0"), 0)
    if scalar == "off":
        first = operands.register(vector, "v", 2, instruction)
        read = operands.bits(f"v[{first}:{first + 1}]", 2, instruction)
        addresses: Callable[[Wave], Any] = lambda wave: read(wave).astype(np.int64) + immediate  # noqa: E731
    else:
        first = operands.register(vector, "v", 1, instruction)
        base = operands.register(scalar, "s", 2, instruction)
        addresses = lambda wave: wave.v[first].astype(np.int64) + (wave.read64(base) + immediate)  # noqa: E731
    data_register = operands.register(data, "v", transfer.registers, instruction)
    return _transfer(data_register, transfer, addresses, lambda: memories.arena)


def _lds(instruction: Instruction, transfer: Transfer, memories: Memories) -> Step:
    instruction.expect_operands(2)
    data, address = instruction.operands[::-1] if transfer.stores else instruction.operands
    immediate = int(instruction.take("offset", "0"), 0)
    data_register = operands.register(data, "v", transfer.registers, instruction)
    first = operands.register(address, "v", 1, instruction)
    return _transfer(
        data_register, transfer, lambda wave: wave.v[first].astype(np.int64) + immediate, lambda: memories.lds
    )


def _lds_pair(instruction: Instruction, stores: bool, size: int, scale: int, memories: Memories) -> Step:
    """Two values, each at an offset of its own, counted in values or in 64 values."""
    instruction.expect_operands(3 if stores else 2)
    offsets = [int(instruction.take(name, "0"), 0) * size * scale for name in ("offset0", "offset1")]
    transfer = Transfer(stores, size)
    if stores:
        address, *texts = instruction.operands
        data = [operands.register(text, "v", transfer.registers, instruction) for text in texts]
    else:
        text, address = instruction.operands
        both = operands.register(text, "v", 2 * transfer.registers, instruction)
        data = [both, both + transfer.registers]
    first = operands.register(address, "v", 1, instruction)

    def step(wave: Wave) -> None:
        # The address may be overwritten by the first of the values.
        start = wave.v[first].astype(np.int64)
        for register, offset in zip(data, offsets, strict=True):
            _transfer(register, transfer, lambda wave, at=start + offset: at, lambda: memories.lds)(wave)

    return step


# --- data ---------------------------------------------------------------------------------------------------------


def _transfer(
    data: int, transfer: Transfer, addresses: Callable[[Wave], Any], memory: Callable[[], Arena | Lds]
) -> Step:
    def step(wave: Wave) -> None:
        active = wave.exec
        where = addresses(wave)[active]
        if transfer.stores:
            memory().store(where, _outgoing(wave, data, transfer)[active])
            return
        loaded = np.zeros((WAVE_SIZE, transfer.size), np.uint8)
        loaded[active] = memory().load(where, transfer.size)
        _incoming(wave, data, transfer, loaded, active)

    return step


def _outgoing(wave: Wave, first: int, transfer: Transfer) -> np.ndarray:
    """Bytes of the data registers, [lanes, size]."""
    words = wave.v[first : first + transfer.registers].T
    if transfer.upper:
        words = words >> np.uint32(16)
    return np.ascontiguousarray(words).view(np.uint8)[:, : transfer.size]


def _incoming(wave: Wave, first: int, transfer: Transfer, loaded: np.ndarray, active: np.ndarray) -> None:
    padded = np.zeros((WAVE_SIZE, 4 * transfer.registers), np.uint8)
    padded[:, : transfer.size] = loaded
    for index, value in enumerate(padded.view(np.uint32).T):
        if transfer.keeps_other_half:
            kept = np.uint32(MASK32 >> 16 if transfer.upper else MASK32 << 16 & MASK32)
            value = wave.v[first + index] & kept | value << np.uint32(16 if transfer.upper else 0)
        np.copyto(wave.v[first + index], value, where=active)


def _ignore_cache_policy(instruction: Instruction) -> None:
    for name in CACHE_POLICY:
        instruction.take_flag(name)


# --- exchanges between lanes --------------------------------------------------------------------------------------


def _bpermute(instruction: Instruction) -> Step:
    """Each lane names, in bytes, the lane that it reads; an inactive one gives 0."""
    instruction.expect_operands(3)
    target, address, data = (operands.register(text, "v", 1, instruction) for text in instruction.operands)
    offset = int(instruction.take("offset", "0"), 0)

    def step(wave: Wave) -> None:
        source = (wave.v[address].astype(np.int64) + offset >> 2) % WAVE_SIZE
        _exchange(wave, target, data, source)

    return step


def _swizzle(instruction: Instruction) -> Step:
    instruction.expect_operands(2)
    target, data = (operands.register(text, "v", 1, instruction) for text in instruction.operands)
    source = lanes.take_swizzle(instruction)
    return lambda wave: _exchange(wave, target, data, source)


def _exchange(wave: Wave, target: int, data: int, source: np.ndarray) -> None:
    value = np.where(wave.exec[source], wave.v[data][source], np.uint32(0))
    np.copyto(wave.v[target], value, where=wave.exec)
