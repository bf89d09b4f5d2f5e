"""The state of one wave of 64 lanes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

WAVE_SIZE = 64
LANES = np.arange(WAVE_SIZE)
NUM_SGPRS = 128
NUM_VGPRS = 512
VCC, M0, EXEC = 106, 124, 126
MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1
POISON = 0xDEADBEEF


class Wave:
    """Registers, at first full of garbage, and where the wave stands in its program."""

    def __init__(self) -> None:
        self.v = np.full((NUM_VGPRS, WAVE_SIZE), POISON, np.uint32)
        self.s = [POISON] * NUM_SGPRS
        self.scc = 0
        self.pc = 0
        self.done = False
        self.at_barrier = False
        self.write64(EXEC, MASK64)

    @property
    def exec(self) -> np.ndarray:
        """Which lanes are active, as booleans."""
        return self._exec

    def write(self, index: int, value: int) -> None:
        self.s[index] = value & MASK32
        if index >= EXEC:
            self._exec = self.mask(EXEC)

    def write64(self, index: int, value: int) -> None:
        self.s[index] = value & MASK32
        self.s[index + 1] = value >> 32 & MASK32
        if index == EXEC:
            self._exec = self.mask(EXEC)

    def read64(self, index: int) -> int:
        return self.s[index] | self.s[index + 1] << 32

    def mask(self, index: int) -> np.ndarray:
        """A pair of scalar registers as one boolean a lane."""
        pair = np.array([self.read64(index)], np.uint64).view(np.uint8)
        return np.unpackbits(pair, bitorder="little").view(bool)

    def write_mask(self, index: int, lanes: np.ndarray) -> None:
        self.write64(index, int(np.packbits(lanes, bitorder="little").view(np.uint64)[0]))


Step = Callable[[Wave], None]
