"""What a user's pattern is made of, as far as spelling cannot change it, and what its tensors look like."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from fx_fusion.function_fusions.canonical import Steps, mark_of
from fx_fusion.function_fusions.equivalences import OPTIONAL
from fx_fusion.function_fusions.steps import Kind, schedule
from fx_fusion.graph import operations
from fx_fusion.graph.tracing import Functional

#: Ways to give the tensors of a cut to the parameters that are looked at.
_ORDERS = 5040


@dataclass(frozen=True)
class Outline:
    """One result of a pattern.

    Attributes:
        takes: the tensor parameters that it depends on.
        required: marks of its rare steps: a region has them all.
        allowed: marks that a region may have.
        depth: steps of the pattern; a region may take several times as many.
        moves: does it nothing but move values?
    """

    takes: tuple[str, ...]
    required: frozenset[object]
    allowed: frozenset[object]
    depth: int
    moves: bool

    @staticmethod
    def of(pattern: Functional, result: Node) -> Outline:
        steps = Steps(pattern.graph.nodes)
        inputs = {steps[node]: name for name, node in pattern.inputs.items()}
        inside = schedule([steps[result]], inputs)
        used = {parent for step in [*inside, steps[result]] for parent in step.parents}
        marks = frozenset(mark for step in inside if (mark := mark_of(step)) is not None)
        moves = all(step.kind in (Kind.MOVEMENT, Kind.LITERAL, Kind.SIZE) for step in inside)
        takes = tuple(name for step, name in inputs.items() if step in used)
        return Outline(takes, marks - OPTIONAL, marks | OPTIONAL, len(inside), moves)

    @property
    def rarity(self) -> tuple[int, int]:
        """The greater, the better a result to look for first."""
        return (len(self.required), len(self.takes))


@dataclass(frozen=True)
class Likeness:
    """What is expected of tensors, from an example and from those that are known already.

    Sizes of the example that mean different things differ, so a size that is known somewhere is known wherever it
    occurs in the example.
    """

    example: Mapping[str, torch.Tensor]
    sizes: Mapping[int, object]

    @staticmethod
    def of(example: Mapping[str, torch.Tensor], pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Likeness:
        """`pairs` of a known tensor and what stands for it in the example, of the same number of dimensions."""
        found: dict[int, object] = {}
        contradictory: set[int] = set()
        for value, like in pairs:
            for size, of_example in zip(value.shape, map(int, like.shape), strict=True):
                expression = _expression(size)
                if found.setdefault(of_example, expression) != expression:
                    contradictory.add(of_example)
        return Likeness(example, {size: real for size, real in found.items() if size not in contradictory})

    def fits(self, name: str, node: Node) -> bool:
        """Has `node` the dimensions expected of the parameter `name`, as far as they are known?"""
        value, like = node.meta["val"], self.example[name]
        if value.dim() != like.dim() or not same_family(value.dtype, like.dtype):
            return False
        for size, of_example in zip(value.shape, map(int, like.shape), strict=True):
            if self.sizes.get(of_example, expression := _expression(size)) != expression:
                return False
        return True


def same_family(a: torch.dtype, b: torch.dtype) -> bool:
    """Both floats, both complex, both truth values, or both integers?"""
    return _family(a) == _family(b)


def _family(dtype: torch.dtype) -> tuple[bool, bool, bool]:
    return dtype.is_floating_point, dtype.is_complex, dtype == torch.bool


def _expression(size: int | torch.SymInt) -> object:
    return size if isinstance(size, int) else size.node.expr


def bindings(
    takes: Sequence[str],
    frontier: Sequence[Node],
    example: Mapping[str, torch.Tensor],
    likeness: Likeness | None,
) -> Iterator[dict[str, Node]]:
    """Ways to give the nodes of a cut to the parameters, every node to one at least; those that look most like the
    example first.

    Floats go to floats. If there is a `likeness`, every tensor must fit it.
    """
    found: list[tuple[int, dict[str, Node]]] = []
    if len(takes) == len(frontier):
        orders: Iterable[Sequence[Node]] = itertools.permutations(frontier)
    else:
        given = itertools.product(frontier, repeat=len(takes))
        orders = (order for order in given if len(set(order)) == len(frontier))
    for order in itertools.islice(orders, _ORDERS):
        if likeness is not None and not all(map(likeness.fits, takes, order)):
            continue
        pairs = [(node.meta["val"], example[name]) for name, node in zip(takes, order, strict=True)]
        if not all(same_family(value.dtype, like.dtype) for value, like in pairs):
            continue
        unlikeness = sum(abs(value.dim() - like.dim()) for value, like in pairs)
        found.append((unlikeness, dict(zip(takes, order, strict=True))))
    found.sort(key=lambda each: each[0])
    yield from (binding for _, binding in found)


def is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def is_candidate(node: Node, moves: bool) -> bool:
    """May a pattern without a rare step be looked for near `node`?"""
    return (operations.is_join(node) or operations.is_movement(node)) if moves else operations.is_arithmetic(node)
