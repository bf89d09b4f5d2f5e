"""A tile: what one program of the Triton kernel serves, which one a launch takes, and which are worth a measurement."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fx_fusion.kernels.qk_norm_rope_cache.cache_layout import Size


@dataclass(frozen=True)
class Tile:
    """What one program serves: so many tokens and heads, with so many warps.

    `heads_per_program` is None for all of `heads`, or an expression of a symbolic number of tokens: `heads` or 1.
    """

    tokens: int
    num_warps: int
    heads: int = 1
    heads_per_program: Size | None = None

    def __str__(self) -> str:
        warps = f"{self.num_warps} warp{'s' if self.num_warps > 1 else ''}"
        return f"{self.tokens} x {self.heads}, {warps}"


def choose_tile(num_tokens: Size, num_heads: int, num_kv_heads: int, head_dim: int, wave_size: int = 32) -> Tile:
    """By how much there is to do: little of it spreads over all processors, much of it shares weights and angles.

    Measured on an H200 (examples/benchmarks/kernel.md) for head_dim 128 and 256; other sizes and AMD's waves of 64 get
    the same number of elements a thread.
    """
    work = num_tokens * (num_heads + 2 * num_kv_heads) * head_dim // 128
    if isinstance(work, torch.SymInt):
        tile = tile_for_any(work, head_dim)
    elif head_dim > 128:
        tile = Tile(2, 1) if work <= 1024 else Tile(2, 1, 2) if work <= 16384 else Tile(2, 1, 4)
    elif work <= 8192:
        tile = Tile(4, 4)
    elif num_kv_heads % 4 == 0:
        tile = Tile(2, 1, 4)
    else:
        tile = Tile(8, 4, 2)
    return _for_width(tile, head_dim, wave_size)


def tile_for_any(work: Size, head_dim: int) -> Tile:
    """One compiled kernel for a symbolic number of tokens: each launch decides how many heads a program serves.

    Measured likewise: from about 100 tokens on, what the heads of a token share is worth more than further programs.
    """
    heads = 4 if head_dim <= 128 else 2
    return Tile(2, 1, heads, heads_per_program=1 + (heads - 1) * torch.sym_min(1, work // 5120))


def _for_width(tile: Tile, head_dim: int, wave_size: int) -> Tile:
    more = max(1, 128 // head_dim) * wave_size // 32
    fewer_warps = min(more, tile.num_warps)
    return replace(tile, num_warps=tile.num_warps // fewer_warps, tokens=tile.tokens * (more // fewer_warps))


#: Elements of one head that a thread holds: fewer are too little for one wide load, more leave processors without work.
_ELEMENTS = range(4, 17)
#: Of all heads of a program. They are loaded together, and beyond this registers spill.
_ALL_ELEMENTS = 64


def candidates(num_kv_heads: int, head_dim: int, wave_size: int) -> list[Tile]:
    """Tiles to measure for heads of `head_dim` lanes, on a device with `wave_size` threads a warp."""
    found: list[Tile] = []
    for heads, num_warps, tokens in itertools.product((1, 2, 4, 8), (1, 2, 4), (1, 2, 4, 8, 16, 32)):
        elements = tokens * head_dim // (num_warps * wave_size)
        # With more heads than k has, the programs of k and v mask most of their work off.
        if elements in _ELEMENTS and heads * elements <= _ALL_ELEMENTS and heads <= max(2, num_kv_heads):
            found.append(Tile(tokens, num_warps, heads))
    return found


# --- JSON -------------------------------------------------------------------------------------------------------------

#: Bounds, so that no file makes Triton refuse to compile.
_LARGEST = {"tokens": 256, "num_warps": 16, "heads": 64}


def tile_to_json(tile: Tile) -> dict[str, int]:
    """Token counts of a file are numbers, never symbols, so `heads_per_program` is always None."""
    return {name: getattr(tile, name) for name in _LARGEST}


def tile_from_json(content: Mapping[str, Any]) -> Tile:
    """
    Raises:
        ValueError: it is no tile; the message says what is wrong.
    """
    if content.keys() != _LARGEST.keys():
        raise ValueError(f"a tile has {', '.join(_LARGEST)}, found {dict(content)!r}")
    return Tile(**{name: _power_of_two(name, content[name], largest) for name, largest in _LARGEST.items()})


def _power_of_two(name: str, value: Any, largest: int) -> int:
    if type(value) is not int or value < 1 or value & (value - 1) or value > largest:
        raise ValueError(f"a tile's {name} must be a power of two up to {largest}, found {value!r}")
    return value
