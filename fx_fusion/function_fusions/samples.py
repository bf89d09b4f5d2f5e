"""Random input for a pattern: floats of both signs, integers that are valid wherever the pattern indexes with them."""

from __future__ import annotations

import torch

from fx_fusion.decline import Decline
from fx_fusion.function_fusions.equivalence import Comparison, Side, coarsest, random_like
from fx_fusion.graph.sizes import Sizes
from fx_fusion.graph.tracing import Functional
from fx_fusion.proof.evaluate import Arithmetic


class Sampler:
    """Values for the inputs of a traced pattern."""

    def __init__(self, pattern: Functional, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self._shapes = {name: node.meta["val"] for name, node in pattern.inputs.items()}
        self._bounds = _bounds(pattern, self._shapes)

    def values(
        self, scale: float | None, arithmetic: Arithmetic = Arithmetic.FLOAT64, mixed: tuple[float, ...] = ()
    ) -> dict[str, torch.Tensor]:
        """Floats times `scale`; or with `mixed`, each tensor times one of these."""
        found: dict[str, torch.Tensor] = {}
        for name, like in self._shapes.items():
            if name in self._bounds:
                found[name] = distinct(like, self._bounds[name], self.generator)
                continue
            value = random_like(like, self.generator, Arithmetic.FLOAT64)
            if value.is_floating_point():
                pick = int(torch.randint(len(mixed), (), generator=self.generator)) if mixed else 0
                value = value * (mixed[pick] if mixed else scale)
                value = value if arithmetic is Arithmetic.FLOAT64 else value.to(like.dtype)
            found[name] = value
        return found


def distinct(like: torch.Tensor, bound: int, generator: torch.Generator) -> torch.Tensor:
    """Integers below `bound`, none twice where there are enough of them."""
    shape = [int(size) for size in like.shape]
    count = torch.Size(shape).numel()
    if count <= bound:
        return torch.randperm(bound, generator=generator)[:count].reshape(shape).to(like.dtype)
    return torch.randint(0, bound, shape, generator=generator).to(like.dtype)


def is_index(value: torch.Tensor) -> bool:
    return not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool


def _bounds(pattern: Functional, shapes: dict[str, torch.Tensor]) -> dict[str, int]:
    """For each integer input, the largest size of a dimension below which any number is a valid index."""
    whole = [name for name, value in shapes.items() if is_index(value)]
    if not whole:
        return {}
    sizes = sorted({int(size) for value in shapes.values() for size in value.shape if size > 1}, reverse=True)
    side = Side.of({node: name for name, node in pattern.inputs.items()}, pattern.results, Sizes(), coarsest([]))
    bounds = dict.fromkeys(whole, 1)
    for name in whole:
        for size in sizes:
            if _runs(side, shapes, {**bounds, name: size}):
                bounds[name] = size
                break
    return bounds


def _runs(side: Side, shapes: dict[str, torch.Tensor], bounds: dict[str, int]) -> bool:
    generator = torch.Generator().manual_seed(0)
    values = {
        name: torch.full([int(s) for s in like.shape], bounds[name] - 1, dtype=like.dtype)
        if name in bounds
        else random_like(like, generator)
        for name, like in shapes.items()
    }
    try:
        Comparison(side, side).difference(values, generator)
    except Decline:
        return False
    return True
