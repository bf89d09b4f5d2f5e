"""The memory of the simulated GPU: global buffers with gaps between them, and a workgroup's LDS."""

from __future__ import annotations

import numpy as np

BASE = 0x7F12_3456_0000
ALIGNMENT = 256
GAP = 4096


class AccessError(Exception):
    """An access outside every buffer."""


class Arena:
    """Global memory. Buffers are far apart: an access that leaves one raises instead of reaching the next."""

    def __init__(self) -> None:
        self._bytes = np.zeros(GAP, np.uint8)
        self._inside = np.zeros(GAP, bool)
        self._places: list[tuple[int, np.ndarray]] = []

    def add(self, data: np.ndarray) -> int:
        """Copy `data`, one dimension of bytes, in; the address of its first byte."""
        assert data.dtype == np.uint8 and data.ndim == 1
        start = -(-len(self._bytes) // ALIGNMENT) * ALIGNMENT
        total = start + len(data) + GAP
        grown, inside = np.zeros(total, np.uint8), np.zeros(total, bool)
        grown[: len(self._bytes)], inside[: len(self._inside)] = self._bytes, self._inside
        grown[start : start + len(data)], inside[start : start + len(data)] = data, True
        self._bytes, self._inside = grown, inside
        self._places.append((start, data))
        return BASE + start

    def copy_back(self) -> None:
        """Into the arrays that were added."""
        for start, data in self._places:
            data[:] = self._bytes[start : start + len(data)]

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """`size` bytes from each address, [len(addresses), size]."""
        return self._bytes[self._index(addresses, size, "load")]

    def store(self, addresses: np.ndarray, data: np.ndarray) -> None:
        self._bytes[self._index(addresses, data.shape[1], "store")] = data

    def _index(self, addresses: np.ndarray, size: int, kind: str) -> np.ndarray:
        first = addresses.astype(np.int64) - BASE
        outside = (first < 0) | (first + size > len(self._bytes))
        index = np.where(outside, 0, first)[:, None] + np.arange(size)
        outside |= ~self._inside[index].all(1)
        if outside.any():
            raise AccessError(f"{kind} of {size} bytes outside every buffer: {_hexadecimal(addresses[outside])}")
        return index


class Lds:
    """A workgroup's shared memory, at first full of garbage."""

    def __init__(self, size: int) -> None:
        self._bytes = np.full(size, 0xA5, np.uint8)

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        return self._bytes[self._index(addresses, size, "load")]

    def store(self, addresses: np.ndarray, data: np.ndarray) -> None:
        self._bytes[self._index(addresses, data.shape[1], "store")] = data

    def _index(self, addresses: np.ndarray, size: int, kind: str) -> np.ndarray:
        first = addresses.astype(np.int64)
        outside = (first < 0) | (first + size > len(self._bytes))
        if outside.any():
            raise AccessError(f"LDS {kind} of {size} bytes, of {len(self._bytes)}: {_hexadecimal(addresses[outside])}")
        return first[:, None] + np.arange(size)


def _hexadecimal(addresses: np.ndarray) -> str:
    return ", ".join(hex(int(address)) for address in addresses[:4])
