"""Read AMD assembly text as the compiler prints it: instructions, labels, kernel descriptor, places of arguments."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class Unsupported(Exception):
    """The simulator does not know this; it never guesses."""


@dataclass
class Instruction:
    """One line. Whoever decodes it takes the modifiers that it knows; what is left over is unknown."""

    number: int
    text: str
    mnemonic: str
    operands: list[str]
    modifiers: dict[str, str] = field(default_factory=dict)

    def take(self, modifier: str, default: str) -> str:
        return self.modifiers.pop(modifier, default)

    def take_flag(self, modifier: str) -> bool:
        value = self.modifiers.pop(modifier, None)
        if value:
            raise self.unsupported(f"{modifier} takes no value")
        return value is not None

    def take_bits(self, modifier: str, default: list[int]) -> list[int]:
        text = self.modifiers.pop(modifier, None)
        if text is None:
            return default
        if not re.fullmatch(r"\[\d+(,\d+)*\]", text) or text.count(",") != len(default) - 1:
            raise self.unsupported(f"{modifier} with other than {len(default)} numbers")
        return [int(number) for number in text[1:-1].split(",")]

    def expect_operands(self, count: int) -> None:
        if len(self.operands) != count:
            raise self.unsupported(f"{len(self.operands)} operands instead of {count}")

    def unsupported(self, what: str) -> Unsupported:
        return Unsupported(f"line {self.number}: {self.text}\n{what}")


@dataclass(frozen=True)
class Argument:
    """Where one argument lies in the kernel's argument segment."""

    offset: int
    size: int


@dataclass(frozen=True)
class Assembly:
    """One kernel. `labels` and `preloaded_entry` are indices into `instructions`."""

    instructions: list[Instruction]
    labels: dict[str, int]
    preloaded_entry: int
    descriptor: dict[str, int]
    arguments: list[Argument]


def parse(text: str) -> Assembly:
    lines = text.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(".Lfunc_begin0:"))
    end = next(i for i, line in enumerate(lines) if line.startswith(".Lfunc_end0:"))
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    preloaded_entry = 0
    for number, line in enumerate(lines[begin:end], begin + 1):
        code = line.split(";")[0].strip()
        if code.endswith(":"):
            labels[code[:-1]] = len(instructions)
        elif re.match(r"\.p2align\s+8", code):
            # Firmware that loads arguments into registers enters here, behind the code that loads them itself.
            preloaded_entry = len(instructions)
        elif code.startswith(".section"):
            continue
        elif code and not code.startswith("."):
            instructions.append(parse_instruction(number, code))
    return Assembly(instructions, labels, preloaded_entry, _descriptor(text), _arguments(text))


def parse_instruction(number: int, code: str) -> Instruction:
    mnemonic, _, rest = code.partition(" ")
    instruction = Instruction(number, " ".join(code.split()), mnemonic, [])
    if mnemonic in ("s_waitcnt", "s_nop"):
        instruction.operands = rest.split()
        return instruction
    pieces = [_split(piece, " ") for piece in _split(rest, ",")]
    for piece in pieces[:-1]:
        if len(piece) != 1:
            raise instruction.unsupported(f"modifiers before the last operand: {piece}")
    for piece in pieces:
        instruction.operands.append(piece[0])
    for modifier in pieces[-1][1:] if pieces else []:
        name, _, value = modifier.partition(":")
        if name in instruction.modifiers:
            raise instruction.unsupported(f"{name} twice")
        instruction.modifiers[name] = value
    return instruction


def _split(text: str, separator: str) -> list[str]:
    """Split outside brackets; no empty pieces."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character in "[(") - (character in "])")
        if character == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece.strip() for piece in pieces if piece.strip()]


def _descriptor(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"^\s*\.amdhsa_(\w+) (\d+)$", text, re.M)}


def _arguments(text: str) -> list[Argument]:
    metadata = text[text.index(".amdgpu_metadata") :]
    section = metadata[metadata.index(".args:") : metadata.index(".group_segment_fixed_size:")]
    found = re.findall(r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)\s+\.value_kind:\s+(\w+)", section)
    if section.count(".offset:") != len(found):
        raise Unsupported("arguments that are not described by offset, size and kind")
    for _, _, kind in found:
        if kind not in ("global_buffer", "by_value"):
            raise Unsupported(f"an argument of kind {kind}")
    return [Argument(int(offset), int(size)) for offset, size, _ in found]
