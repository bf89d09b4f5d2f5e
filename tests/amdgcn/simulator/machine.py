"""Run a kernel: every workgroup of the grid, its waves in turn from barrier to barrier."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from amdgcn.simulator import assembly, scalar, transfers, vector
from amdgcn.simulator.assembly import Assembly, Instruction, Unsupported
from amdgcn.simulator.memory import Arena, Lds
from amdgcn.simulator.transfers import Memories
from amdgcn.simulator.wave import MASK64, WAVE_SIZE, Step, Wave

# What the descriptor must say where it says anything: how floats round, that subnormals are kept, that overflow is
# infinity; and which registers are set up, see _start.
REQUIRED = {
    "float_round_mode_32": 0, "float_round_mode_16_64": 0, "float_denorm_mode_32": 3, "float_denorm_mode_16_64": 3,
    "ieee_mode": 1, "dx10_clamp": 1, "fp16_overflow": 0, "private_segment_fixed_size": 0, "uses_dynamic_stack": 0,
    "enable_private_segment": 0, "system_vgpr_workitem_id": 0, "user_sgpr_kernarg_preload_offset": 0,
    "user_sgpr_kernarg_segment_ptr": 1, "user_sgpr_dispatch_ptr": 0, "user_sgpr_queue_ptr": 0,
    "user_sgpr_dispatch_id": 0, "user_sgpr_private_segment_size": 0,
    "user_sgpr_flat_scratch_init": 0, "system_sgpr_private_segment_wavefront_offset": 0,
    "system_sgpr_workgroup_id_z": 0,
    "system_sgpr_workgroup_info": 0,
}  # fmt: skip


@dataclass
class Result:
    """What a run did besides writing memory. Line numbers tell which instructions never ran."""

    executed: int = 0
    out_of_range: set[int] = field(default_factory=set)
    never_ran: list[Instruction] = field(default_factory=list)


def run(
    text: str,
    arguments: Sequence[int],
    arena: Arena,
    *,
    grid: tuple[int, int],
    num_warps: int,
    lds_bytes: int = 0,
    preload: bool = True,
    nearest: bool = False,
) -> Result:
    """Run the kernel in `text`; arguments are integers, pointers addresses in `arena`.

    Args:
        preload: the firmware loads the first arguments into registers, if the kernel asks for it.
        nearest: reciprocals and reciprocal roots are correctly rounded; the hardware promises one of the two floats
            around the result, and else one of them is chosen.
    """
    program = assembly.parse(text)
    _check_descriptor(program.descriptor)
    segment = _segment(program, arguments)
    address = arena.add(segment)
    memories = Memories(arena, Lds(0))
    steps = decode(program, memories, nearest)
    seen = bytearray(len(steps))
    result = Result(out_of_range=memories.out_of_range)
    with np.errstate(all="ignore"):
        for workgroup in itertools.product(*map(range, grid)):
            memories.lds = Lds(lds_bytes)
            waves = [_start(program, wave, workgroup, address, segment, preload) for wave in range(num_warps)]
            result.executed += _run_workgroup(steps, waves, seen)
    result.never_ran = [line for line, ran in zip(program.instructions, seen, strict=True) if not ran]
    return result


def decode(program: Assembly, memories: Memories, nearest: bool) -> list[Step]:
    """All of it at once, whether it runs or not: nothing that is unknown stays unnoticed."""
    return [decode_instruction(instruction, program.labels, memories, nearest) for instruction in program.instructions]


def decode_instruction(
    instruction: Instruction, labels: dict[str, int], memories: Memories, nearest: bool = False
) -> Step:
    step = transfers.decode(instruction, memories)
    if step is None and instruction.mnemonic.startswith("v_"):
        step = vector.decode(instruction, nearest)
    elif step is None and instruction.mnemonic.startswith("s_"):
        step = scalar.decode(instruction, labels)
    if step is None:
        raise instruction.unsupported("unknown instruction")
    if instruction.modifiers:
        raise instruction.unsupported(f"unknown modifiers: {', '.join(instruction.modifiers)}")
    return step


def _check_descriptor(descriptor: dict[str, int]) -> None:
    for name, value in REQUIRED.items():
        if descriptor.get(name, value) != value:
            raise Unsupported(f".amdhsa_{name} {descriptor[name]}, only {value} is simulated")


def _segment(program: Assembly, arguments: Sequence[int]) -> np.ndarray:
    """The argument segment. Triton appends pointers to scratch memory that this kernel does not use: null."""
    data = bytearray(program.descriptor["kernarg_size"])
    padded = [*arguments, *[0] * (len(program.arguments) - len(arguments))]
    for argument, value in zip(program.arguments, padded, strict=True):
        encoded = struct.pack("<Q", value & MASK64)[: argument.size]
        data[argument.offset : argument.offset + argument.size] = encoded
    return np.frombuffer(bytes(data), np.uint8).copy()


def _start(
    program: Assembly, wave: int, workgroup: tuple[int, int], address: int, segment: np.ndarray, preload: bool
) -> Wave:
    """Registers as the hardware sets them up: a descriptor of scratch memory (gfx90a; left as garbage), the arguments'
    address, preloaded arguments, the workgroup; in the first vector register, the thread.
    """
    started = Wave()
    started.v[0] = np.arange(WAVE_SIZE) + WAVE_SIZE * wave
    pointer = 4 * program.descriptor.get("user_sgpr_private_segment_buffer", 0)
    started.write64(pointer, address)
    count = program.descriptor.get("user_sgpr_kernarg_preload_length", 0)
    if count and preload:
        started.pc = program.preloaded_entry
        for index, value in enumerate(segment[: 4 * count].view(np.uint32)):
            started.write(pointer + 2 + index, int(value))
    register = program.descriptor["user_sgpr_count"]
    for dimension, place in zip("xy", workgroup, strict=True):
        if program.descriptor[f"system_sgpr_workgroup_id_{dimension}"]:
            started.write(register, place)
            register += 1
    return started


def _run_workgroup(steps: list[Step], waves: list[Wave], seen: bytearray) -> int:
    executed = 0
    while running := [wave for wave in waves if not wave.done]:
        for wave in running:
            wave.at_barrier = False
            while not (wave.done or wave.at_barrier):
                seen[wave.pc] = 1
                step = steps[wave.pc]
                wave.pc += 1
                executed += 1
                step(wave)
    return executed
