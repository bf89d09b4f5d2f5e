"""Random input for the comparison of a region with a pattern, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from fx_fusion.function_fusions.domain import Float64, Values, random_like
from fx_fusion.graph.tracing import Functional

#: Scales of floats: ordinary, where a small constant rules, where an exponential saturates, where it overflows, none at
#: all, and far out. On the first three nothing overflows float64 that would not be beyond all bounds.
SCALES = (1.0, 1e-4, 0.0, 30.0, 1e4, 1e15, 1e30)
_ORDINARY = 1.0

#: Of large numbers a sine or cosine is noise.
_TURNING = 100.0

#: Tensors that together have more elements get rows of all scales at once instead of one sample for each scale.
_MANY = 1 << 20

#: How far values lie from the literals around which they are drawn.
_SPREADS = (0.0, 1e-12, 1e-6, 1.0)


class Sampler:
    """Values for the tensor parameters of a traced pattern, and the arithmetic of each sample.

    Args:
        literals: numbers that stand in the region or in the pattern: values are drawn around them too, so that a
            function that is another one near ``x = 7`` is found out where 7 stands in the graph.
        turns: is there a sine or cosine?
        same: parameters that are given one tensor, by the parameter that it is drawn for.
    """

    def __init__(
        self,
        pattern: Functional,
        seed: int,
        literals: Sequence[float] = (),
        turns: bool = False,
        same: Mapping[str, str] | None = None,
    ) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._likes = {name: node.meta["val"] for name, node in pattern.inputs.items()}
        self._centres = torch.tensor(sorted({0.0, 1.0, -1.0, *(float(x) for x in literals if abs(x) < 1e6)}))
        self._turns, self._same = turns, same or {}

    def first(self, scale: float = 1.0) -> tuple[Values, Float64]:
        """One ordinary sample."""
        return self._scaled(scale), self._domain(True)

    def nearby(self) -> tuple[Values, Values, Float64]:
        """One ordinary sample, and another one that is off by a thousandth."""
        values = self._scaled(1.0)
        moved = {name: x * 1.001 if x.is_floating_point() or x.is_complex() else x for name, x in values.items()}
        return values, moved, self._domain(True)

    def __iter__(self) -> Iterator[tuple[str, Values, Float64]]:
        """A description, values, and the arithmetic."""
        scales = [scale for scale in SCALES if not (self._turns and scale > _TURNING)]
        several = [scale for scale in scales if 0 < scale < 1e10]
        if sum(like.numel() for like in self._likes.values()) <= _MANY:
            for scale in scales:
                yield f"input of scale {scale:g}", self._scaled(scale), self._domain(scale <= _ORDINARY)
            for _ in range(3):
                yield "input of mixed scales", self._mixed(several), self._domain(False)
        else:
            yield "input of scale 1", self._scaled(1.0), self._domain(True)
            yield "zeros", self._scaled(0.0), self._domain(True)
        for _ in range(2):
            yield "rows of mixed scales", self._by_rows(several), self._domain(False)
        for _ in range(2):
            yield "input near the literals of the graph", self._centred(), self._domain(False)

    def _domain(self, ordinary: bool) -> Float64:
        return Float64(self._generator, ordinary)

    def _scaled(self, scale: float) -> Values:
        return self._each(lambda value: value * scale)

    def _mixed(self, scales: Sequence[float]) -> Values:
        return self._each(lambda value: value * scales[int(self._pick(len(scales), ()))])

    def _by_rows(self, scales: Sequence[float]) -> Values:
        table = torch.tensor(scales, dtype=torch.float64)
        return self._each(lambda value: value * table[self._pick(len(scales), (*value.shape[:-1], 1)[-value.dim() :])])

    def _centred(self) -> Values:
        spreads = torch.tensor(_SPREADS, dtype=torch.float64)
        centres = self._centres.double()

        def centred(value: torch.Tensor) -> torch.Tensor:
            return centres[self._pick(len(centres), value.shape)] + value * spreads[self._pick(4, value.shape)]

        return self._each(centred)

    def _pick(self, count: int, shape: Sequence[int]) -> torch.Tensor:
        return torch.randint(count, tuple(shape), generator=self._generator)

    def _each(self, change: object) -> Values:
        found: dict[str, torch.Tensor] = {}
        for name, like in self._likes.items():
            value = random_like(tuple(map(int, like.shape)), like.dtype, self._generator)
            if value.is_floating_point():
                value = change(value)  # type: ignore[operator]
            elif self._turns and value.dtype != torch.bool and not value.is_complex():
                value = value % 64
            found[name] = value
        return {name: found[self._same.get(name, name)] for name in found}
