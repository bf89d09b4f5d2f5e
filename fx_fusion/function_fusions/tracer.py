"""Patterns traced at the shapes of a graph, each once."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from fx_fusion.function_fusions.canonical import Steps
from fx_fusion.function_fusions.numbers import Numbers
from fx_fusion.function_fusions.parameters import Kind, Variant
from fx_fusion.function_fusions.pattern import Pattern
from fx_fusion.graph.torch_compat import pytree
from fx_fusion.graph.tracing import Functional, NotTraceable, fakes_like, trace

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

#: Stand for the floats of a pattern while it is traced: float32 holds them exactly, and no program contains them.
_STAND_INS = (0.37158203125, 0.41943359375, 0.29541015625, 0.45361328125)

#: What a function may make of a number before it writes it.
_FORMS: tuple[Callable[[float], float], ...] = (
    lambda x: x,
    lambda x: -x,
    lambda x: 1 / x if x else float("inf"),
    lambda x: -1 / x if x else float("inf"),
)


@dataclass(frozen=True)
class Spelled:
    """A traced pattern, and what stands for the numbers that are written in it."""

    traced: Functional
    steps: Steps
    numbers: Mapping[float, float]


@dataclass
class Tracer:
    _known: dict[Hashable, tuple[Functional, Steps] | NotTraceable] = field(default_factory=dict[Hashable, Any])
    _written: dict[Functional, set[float]] = field(default_factory=dict[Functional, set[float]])

    def trace(self, pattern: Pattern, shapes: Shapes, others: Mapping[str, Any]) -> tuple[Functional, Steps]:
        """
        Raises:
            NotTraceable: the pattern does not take tensors of these shapes.
        """
        key = (id(pattern), tuple(shapes.items()), repr(sorted(others.items(), key=str)))
        if key not in self._known:
            try:
                traced = trace(pattern.fn, fakes_like(shapes), others)
                self._known[key] = traced, Steps(traced.graph.nodes)
            except NotTraceable as error:
                self._known[key] = error
        found = self._known[key]
        if isinstance(found, NotTraceable):
            raise found
        return found

    def trace_with(
        self, pattern: Pattern, shapes: Shapes, variant: Variant, numbers: Numbers, literals: Sequence[float]
    ) -> Spelled:
        """As `trace`; the floats of `numbers` stand for those of one graph, where that shows where they are.

        That is a guess (a function may compute with them first): a place found so is traced again for the proof.
        """
        floats = [p.name for p in pattern.parameters if p.kind is Kind.FLOAT and p.name in numbers]
        stand_ins = dict(zip(floats, _STAND_INS, strict=False))
        traced, steps = self.trace(pattern, shapes, {**variant, **numbers, **stand_ins})
        if traced not in self._written:
            self._written[traced] = set(_floats_of(traced.nodes))
        forms = {form(x): (name, form) for name, x in stand_ins.items() for form in _FORMS}
        written = self._written[traced]
        if {forms[x][0] for x in written if x in forms} != set(floats):
            traced, steps = self.trace(pattern, shapes, {**variant, **numbers})
            return Spelled(traced, steps, respelled(_floats_of(traced.nodes), literals))
        meant = {x: forms[x][1](float(numbers[forms[x][0]])) for x in written if x in forms}
        return Spelled(traced, steps, {**respelled(written, literals), **meant})


def _floats_of(nodes: Sequence[Node]) -> list[float]:
    written = [(list(node.args), dict(node.kwargs)) for node in nodes]
    return [leaf for leaf in pytree.tree_leaves(written) if type(leaf) is float]


def respelled(written: Iterable[float], literals: Sequence[int | float]) -> dict[float, float]:
    """A number that one spelling of an operation rounds to float32 and another does not stands for the region's.

    Kernels round it to float32 either way; in float64 it would make a difference.
    """
    known = {_float32(literal): literal for literal in literals if isinstance(literal, float)}
    return {x: known[_float32(x)] for x in written if _float32(x) in known and x == x}


def _float32(value: float) -> float:
    return ctypes.c_float(value).value
