"""Which tile is best, and how long each kernel takes, for each token count of a shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fx_fusion.kernels.measure.bench import Refused
from fx_fusion.kernels.measure.tuned_file import Shape, Timing
from fx_fusion.kernels.qk_norm_rope_cache.triton.tile import Tile, candidates, choose_tile

#: Another tile must beat the built-in rule's by this factor. Less is noise, which a file should not keep.
WORTH_IT = 1.02


class Times(Protocol):
    """Microseconds of a call, as :class:`fx_fusion.kernels.measure.bench.Bench` measures them, or Refused."""

    def triton(self, tile: Tile) -> float: ...
    def aiter(self) -> float: ...


@dataclass(frozen=True)
class Found:
    """What was found for one token count.

    Attributes:
        rule: the tile of the built-in rule.
        rule_us: microseconds of a call with it; None if it was refused.
        best: what the file keeps.
        refusals: why what was not timed was not.
    """

    shape: Shape
    rule: Tile
    rule_us: float | None
    best: Timing
    refusals: tuple[str, ...]

    @property
    def gain(self) -> float | None:
        """How many times as long the rule's tile takes; 1.0 where the rule stays."""
        return None if self.rule_us is None else self.rule_us / self.best.triton_us


def tiles_to_measure(shape: Shape, counts: Sequence[int], wave_size: int, *, quick: bool) -> Mapping[int, list[Tile]]:
    """For each token count: the built-in rule's tile first, then all others; if `quick`, those of the rule only."""
    rule = {count: choose_tile(count, *shape[:3], wave_size) for count in counts}
    others = list(rule.values()) if quick else candidates(shape.num_kv_heads, shape.head_dim, wave_size)
    return {count: list(dict.fromkeys([tile, *others])) for count, tile in rule.items()}


def measure(shape: Shape, num_tokens: int, tiles: Sequence[Tile], times: Times) -> Found:
    """Time each of `tiles`, of which the first is the built-in rule's, and aiter.

    Raises:
        Refused: no tile could be timed.
    """
    timed: dict[Tile, float] = {}
    refusals: list[str] = []
    for tile in tiles:
        try:
            timed[tile] = times.triton(tile)
        except Refused as refused:
            refusals.append(f"tile {tile}: {refused}")
    if not timed:
        raise Refused("\n".join(refusals))
    try:
        aiter_us = times.aiter()
    except Refused as refused:
        aiter_us = None
        refusals.append(f"aiter: {refused}")
    best = _best(timed, rule=tiles[0])
    timing = Timing(num_tokens, best, timed[best], aiter_us)
    return Found(shape, tiles[0], timed.get(tiles[0]), timing, tuple(refusals))


def _best(timed: Mapping[Tile, float], rule: Tile) -> Tile:
    best = min(timed, key=timed.__getitem__)
    return rule if rule in timed and timed[rule] <= WORTH_IT * timed[best] else best
