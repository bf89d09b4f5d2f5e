"""A tile: what one program of the Triton kernel serves, and which tiles are worth a measurement."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from fx_fusion.kernels.cache_layout import Size


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
