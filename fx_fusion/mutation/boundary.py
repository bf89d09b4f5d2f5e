"""Inputs at the edges of what a graph takes: where a computation that looks right on ordinary numbers shows itself.

A trial changes graph inputs, or what comes out of the projections: any number may leave a matrix product, and what
enters a norm decides what it shows. Nothing here comes from the prover's own samples.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fx_fusion.graph.torch_compat import pytree
from fx_fusion.mutation.mutants import Mutant, copies
from fx_fusion.mutation.region import region

Poke = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Trial:
    """Inputs, and what happens to the values of some nodes, by name."""

    name: str
    inputs: list[Any]
    pokes: dict[str, Poke] = field(default_factory=dict)


def trials(mutant: Mutant, count: int, seed: int) -> Iterator[Trial]:
    """The inputs as captured, then `count` others, drawn at random among all that there are."""
    chance = random.Random(seed)
    yield Trial("as captured", copies(mutant.inputs))
    places = _sources(mutant)
    for _ in range(count):
        # Half of them change the projections' results, where most of the region's behaviour is.
        place = chance.choice(mutant.projections if mutant.projections and chance.random() < 0.5 else places)
        yield _trial(mutant, place, chance)


def _sources(mutant: Mutant) -> list[int]:
    """The graph inputs that the region depends on, by position.

    Weights of what comes after it are left alone: chosen badly they cancel, and magnify what is mere rounding.
    """
    inside, projections = region(mutant.module.graph)
    above: set[Node] = set()
    stack = [*inside, *projections]
    while stack:
        node = stack.pop()
        if node not in above:
            above.add(node)
            stack.extend(node.all_input_nodes)
    placeholders = [node for node in mutant.module.graph.nodes if node.op == "placeholder"]
    return [i for i, node in enumerate(placeholders) if node in above and isinstance(mutant.inputs[i], Tensor)]


def _trial(mutant: Mutant, place: Any, chance: random.Random) -> Trial:
    inputs = copies(mutant.inputs)
    if isinstance(place, str):
        name, poke = _float_change(chance)
        return Trial(f"{place}: {name}", inputs, {place: poke})
    value = inputs[place]
    if value.is_floating_point():
        name, poke = _float_change(chance)
        # PyTorch does no arithmetic in float8.
        changed = poke(value.float()).to(value.dtype) if value.dtype.itemsize == 1 else poke(value)
        inputs[place] = _with_strides_of(value, changed)
    else:
        name, inputs[place] = _index_change(value, _landmarks(mutant), chance)
    placeholder = [node for node in mutant.module.graph.nodes if node.op == "placeholder"][place]
    return Trial(f"{placeholder}: {name}", inputs)


def _with_strides_of(like: Tensor, value: Tensor) -> Tensor:
    """Graphs are traced for the strides that their inputs have."""
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).copy_(value)


def _float_change(chance: random.Random) -> tuple[str, Poke]:
    kind = chance.choice(list(_FLOATS))
    seed = chance.randrange(1 << 30)

    def poke(value: Tensor) -> Tensor:
        # In float64 the same numbers come out as in the narrower dtype: they are made in float32, and rounded alike.
        return _FLOATS[kind](value.clone(), torch.Generator().manual_seed(seed))

    return kind, poke


def _at(value: Tensor, generator: torch.Generator, number: float) -> Tensor:
    flat = value.reshape(-1)
    flat[int(torch.randint(flat.numel(), (), generator=generator))] = number
    return flat.reshape(value.shape)


def _row(value: Tensor, generator: torch.Generator, factor: float) -> Tensor:
    if value.dim() == 0:
        return value * factor
    rows = value.reshape(-1, value.shape[-1])
    rows[int(torch.randint(len(rows), (), generator=generator))] *= factor
    return rows.reshape(value.shape)


def _one_hot(value: Tensor, generator: torch.Generator) -> Tensor:
    return _at(torch.zeros_like(value), generator, 1.0)


def _hot_rows(value: Tensor, generator: torch.Generator) -> Tensor:
    """One lane of sixteen in every row, in magnitudes of all sizes."""
    keep = torch.randint(16, value.shape, generator=generator) == 0
    return torch.where(keep, value * _magnitudes(value, generator, 3), torch.zeros_like(value))


def _magnitudes(value: Tensor, generator: torch.Generator, decades: int) -> Tensor:
    powers = torch.randint(-decades, decades + 1, value.shape, generator=generator)
    return (10.0 ** powers.double()).float().to(value.dtype)


def _random(value: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(value.shape, generator=generator).bfloat16().to(value.dtype)


_FLOATS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "random": _random,
    "zero": lambda x, g: torch.zeros_like(x),
    "minus zero": lambda x, g: -torch.zeros_like(x),
    "one-hot": _one_hot,
    "hot rows": _hot_rows,
    "times 1e6": lambda x, g: x * 1e6 if x.dtype != torch.float16 else x * 1e4,
    "times 1e-6": lambda x, g: x * 1e-6,
    "times 1e-3": lambda x, g: x * 1e-3,
    "negated": lambda x, g: -x,
    "one row times 1e4": lambda x, g: _row(x, g, 1e4),
    "one row times 1e-6": lambda x, g: _row(x, g, 1e-6),
    "elements times 1e-3 to 1e3": lambda x, g: x * _magnitudes(x, g, 3),
    "one element 3e4": lambda x, g: _at(x, g, 3e4),
    "one infinity": lambda x, g: _at(x, g, float("inf")),
    "one negative infinity": lambda x, g: _at(x, g, -float("inf")),
    "one NaN": lambda x, g: _at(x, g, float("nan")),
    "NaN in one row": lambda x, g: _row(x, g, float("nan")),
}


def _landmarks(mutant: Mutant) -> list[int]:
    """The integers of the graph, the sizes of its inputs, and their neighbours: where indices begin and end."""
    graph = mutant.module.graph
    numbers = {leaf for n in graph.nodes for leaf in pytree.tree_leaves((n.args, n.kwargs)) if type(leaf) is int}
    shapes: Sequence[tuple[int, ...]] = [tuple(v.shape) for v in mutant.inputs if isinstance(v, Tensor)]
    sizes = {size for shape in shapes for size in shape} | {s[0] * s[1] for s in shapes if len(s) > 1}
    small = {n for n in numbers | sizes | {0} if abs(n) < 1 << 20}
    return sorted({n + d for n in small for d in (-1, 0, 1)} | {-n for n in sizes})


def _index_change(value: Tensor, landmarks: Sequence[int], chance: random.Random) -> tuple[str, Tensor]:
    """Values that stay distinct where they were: two tokens at one slot are nobody's promise."""
    start = chance.choice(landmarks)
    flat = value.reshape(-1)
    kind = chance.choice(["a run from", "a run down from", "one element", "all shifted by", "shuffled"])
    run = torch.arange(flat.numel(), dtype=value.dtype)
    if kind == "a run from":
        changed = start + run
    elif kind == "a run down from":
        changed = start - run
    elif kind == "one element":
        changed = flat.clone()
        others = changed[1:] if flat.numel() > 1 else changed[:0]
        if bool((others == start).any()):
            return "as captured", value
        changed[0] = start
    elif kind == "all shifted by":
        changed = flat + start
    else:
        changed = flat[torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(start & 0xFFFF))]
    return f"{kind} {start}", _with_strides_of(value, changed.to(value.dtype).reshape(value.shape))
