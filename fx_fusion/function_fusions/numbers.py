"""What the numbers of a pattern may be in a region: literals that stand there, and sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch.fx import Node

from fx_fusion.graph import operations
from fx_fusion.graph.torch_compat import pytree

Numbers = Mapping[str, int | float]
"""The value of each captured number."""

#: Values tried for the numbers of a pattern, all together, at one place.
_TRIED = 400


def literals_of(nodes: Iterable[Node]) -> list[int | float]:
    """Numbers written in `nodes`, each once, in order."""
    found: dict[int | float, None] = {}
    for node in nodes:
        if operations.is_symbolic(node):
            continue
        for leaf in pytree.tree_leaves((list(node.args), dict(node.kwargs))):
            if type(leaf) in (int, float):
                found[leaf] = None
    return list(found)


def candidates(floats: Sequence[str], ints: Sequence[str], nodes: Sequence[Node]) -> Iterator[dict[str, int | float]]:
    """Ways to give the numbers that stand in `nodes` to these parameters."""
    literals = literals_of(nodes)
    fractions = _fractions(literals) if floats else []
    whole = _whole(literals, nodes) if ints else []
    choices: list[list[int | float]] = [*([whole] * len(ints)), *([fractions] * len(floats))]  # type: ignore[list-item]
    for values in itertools.islice(_likely_first(choices), _TRIED):
        yield dict(zip([*ints, *floats], values, strict=True))


def _likely_first(choices: Sequence[Sequence[int | float]]) -> Iterator[tuple[int | float, ...]]:
    """One of each; those whose places among their choices are small together come first."""
    for total in range(sum(map(len, choices)) - len(choices) + 1):
        yield from _summing(choices, total)


def _summing(choices: Sequence[Sequence[int | float]], total: int) -> Iterator[tuple[int | float, ...]]:
    if not choices:
        yield from [()] if total == 0 else []
        return
    for place in range(min(total + 1, len(choices[0]))):
        for rest in _summing(choices[1:], total - place):
            yield (choices[0][place], *rest)


def _fractions(literals: Sequence[int | float]) -> list[float]:
    """What a float of the pattern may be: a literal; of ``x / 8``, an eighth; a whole number; its opposite."""
    written = [literal for literal in literals if isinstance(literal, float)]
    inverse = [1 / literal for literal in literals if literal and abs(literal) < 1e15]
    whole = [float(literal) for literal in literals if isinstance(literal, int) and abs(literal) < 1e15]
    return list(dict.fromkeys([*written, *whole, *inverse, *(-literal for literal in written), 0.0, 1.0]))


def _whole(literals: Sequence[int | float], nodes: Sequence[Node]) -> list[int]:
    """What an int of the pattern may be: a literal, or the size of a dimension."""
    written = [literal for literal in literals if isinstance(literal, int) and abs(literal) < 1 << 40]
    shapes = [node.meta["val"].shape for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    return list(dict.fromkeys([*written, *(size for shape in shapes for size in shape if isinstance(size, int))]))
