"""Do a region of a graph and a user's pattern compute the same function?

Samples prove identity between analytic functions only (see ``proof/samples.py``). A pattern of a user may hold steps
that are not analytic, or that nobody outside can look into: a clamp, a maximum, a store, a custom operation. Such a
step is *free*: all that is assumed of it is that equal arguments give equal results. So each free step of the region
must be the same operation, with the same literals, on equal arguments, as one of the pattern; what it gives is then a
fresh random value on both sides, and between free steps everything is analytic. A step that occurs in the region alone,
such as a clamp that random data never reaches, has no counterpart, and the region is declined.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.graph import operations
from fx_fusion.graph.sizes import Sizes
from fx_fusion.graph.torch_compat import FakeTensor, HigherOrderOperator, pytree
from fx_fusion.proof.evaluate import Arithmetic, evaluate, schedule
from fx_fusion.proof.region_function import TOLERANCE, relative_difference
from fx_fusion.proof.samples import check_root

#: Scales of random input in float64: ordinary, where a small constant rules, where an exponential saturates, where it
#: overflows, none at all, and far out.
SCALES = (1.0, 1e-4, 30.0, 1e4, 0.0, 1e15)

Values = Mapping[str, torch.Tensor]
"""A value for each tensor parameter."""

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def is_product(node: Node) -> bool:
    return node.target in operations.PRODUCTS


def is_undefined(node: Node) -> bool:
    return node.target in operations.UNDEFINED


def coarsest(nodes: Iterable[Node]) -> torch.dtype:
    """The narrowest floating dtype of `nodes`: a region may round to it anywhere, as its results do."""
    found = [v.dtype for node in nodes if isinstance(v := node.meta.get("val"), torch.Tensor) and v.dtype in _FLOATS]
    return min(found, key=_FLOATS.index, default=torch.float64)


def is_free(node: Node, floor: torch.dtype | None) -> bool:
    """Is `node` a step whose meaning samples cannot prove? Without a `floor`, rounding makes no step free."""
    if node.op != "call_function" or operations.is_symbolic(node) or operations.is_movement(node) or is_undefined(node):
        return False
    if operations.is_cast(node):
        return _is_lossy(node, floor)
    if node.target in operations.SMOOTH or is_product(node):
        return _rounds_below(node, floor)
    if node.target in operations.ROOTS:
        try:
            check_root(node)
        except Decline:
            return True
        return _rounds_below(node, floor)
    return not (operations.is_analytic(node) or operations.is_literal(node))


def _is_lossy(node: Node, floor: torch.dtype | None) -> bool:
    """A cast that rounds more coarsely than the region's own dtypes, computes in float64, or cuts to an integer."""
    source, dtype = node.args[0].meta["val"].dtype, node.meta["val"].dtype  # type: ignore[union-attr]
    if not dtype.is_floating_point:
        return bool(source.is_floating_point) or torch.promote_types(source, dtype) != dtype
    return _rounds_below(node, floor)


def _rounds_below(node: Node, floor: torch.dtype | None) -> bool:
    dtype = node.meta["val"].dtype
    if floor is None:
        return False
    if not dtype.is_floating_point or dtype == floor:
        return False
    finer = torch.float64 if floor != torch.float64 else None
    return dtype == finer or torch.promote_types(dtype, floor) != dtype


def free_key(node: Node) -> tuple[Any, ...]:
    """Equal for free steps that may be the same: the operation, and of a higher-order one, what it calls."""
    if isinstance(node.target, HigherOrderOperator):
        return (node.target.name(), str(node.args[0]) if node.args else "")
    return (str(node.target),)


@dataclass
class Side:
    """A graph between `inputs` and `results`: the region, or the pattern.

    `inputs` tells which parameter a node is; of a region, several nodes that hold the same value may be one. `free` are
    the free steps, each after those it depends on.
    """

    inputs: Mapping[Node, str]
    results: Sequence[Node]
    sizes: Sizes
    free: list[Node] = field(default_factory=list[Node])
    nodes: list[Node] = field(default_factory=list[Node])

    @staticmethod
    def of(inputs: Mapping[Node, str], results: Sequence[Node], sizes: Sizes, floor: torch.dtype) -> Side:
        nodes = schedule(results, inputs)
        return Side(inputs, results, sizes, [node for node in nodes if is_free(node, floor)], nodes)


class Comparison:
    """One region beside one pattern. Which free step of the region is which of the pattern is settled at the first
    sample, and must hold at all others.
    """

    def __init__(self, region: Side, pattern: Side) -> None:
        self.region, self.pattern = region, pattern
        self._counterpart: dict[Node, Node] = {}

    def difference(
        self, values: Values, generator: torch.Generator, arithmetic: Arithmetic = Arithmetic.FLOAT64
    ) -> tuple[float, str]:
        """The largest relative difference between results, for `values` of the inputs, and which result shows it.

        Elements where the region itself is not finite do not count: there the pattern may be the better one. Infinite
        if nothing counts.

        Raises:
            Decline: ``proof.not_analytic`` where a free step has no counterpart, ``region.evaluation``.
        """
        region = _Run(self.region, values, arithmetic)
        pattern = _Run(self.pattern, values, arithmetic)
        for step in self.region.free:
            theirs = self._counterpart.get(step) or self._find(step, region, pattern)
            self._counterpart[step] = theirs
            if theirs not in pattern.known:
                pattern.set_free(theirs, _fresh(theirs, pattern, generator, arithmetic))
            region.set_free(step, pattern.known[theirs], pattern.symbols[theirs])
        worst, where = 0.0, ""
        for mine, theirs in zip(self.region.results, self.pattern.results, strict=True):
            found = _distance(mine, theirs, region, pattern, self.region.sizes)
            if not found <= worst:
                worst, where = found, str(mine)
        return worst, where

    def _find(self, step: Node, region: _Run, pattern: _Run) -> Node:
        same = [theirs for theirs in self.pattern.free if free_key(theirs) == free_key(step)]
        for theirs in same:
            if pattern.is_ready(theirs) and _same_arguments(step, theirs, region, pattern):
                return theirs
        found = f"{step} ({step.target}) is a step that samples cannot prove, and the pattern has no such step"
        raise Decline("proof.not_analytic", found + (" on equal arguments" if same else ""), [step])


class _Run:
    """Values of one side for one sample, computed as they are asked for."""

    def __init__(self, side: Side, values: Values, arithmetic: Arithmetic) -> None:
        self.side, self.arithmetic = side, arithmetic
        self.known: dict[Node, Any] = {node: values[name] for node, name in side.inputs.items()}
        #: What a value is called on both sides: two values of one name are equal, and need not be computed.
        self.symbols: dict[Node, Any] = {node: ("input", name) for node, name in side.inputs.items()}
        self._free = set(side.free)

    def set_free(self, node: Node, value: Any, symbol: Any = None) -> None:
        self.known[node] = value
        self.symbols[node] = symbol or ("free", self.side.free.index(node))

    def is_ready(self, node: Node) -> bool:
        return all(each in self.known or each not in self._free for each in schedule(node.all_input_nodes, self.known))

    def symbol(self, node: Node) -> Any:
        if node in self.symbols:
            return self.symbols[node]
        if node.target is operator.getitem:
            inner = self.symbol(node.args[0])  # type: ignore[arg-type]
            return inner and (inner, node.args[1])
        return None

    def value(self, node: Node) -> Any:
        if node in self.known:
            return self.known[node]
        needed = _reached(node, self.known)
        known = {each: self.known[each] for each in needed}
        return evaluate([node], known, self.side.sizes, self.arithmetic)[0]


def _reached(node: Node, known: Mapping[Node, Any]) -> list[Node]:
    found: dict[Node, None] = {}
    stack, seen = [node], {node}
    while stack:
        for parent in stack.pop().all_input_nodes:
            if parent in known:
                found[parent] = None
            elif parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return list(found)


def _distance(mine: Node, theirs: Node, region: _Run, pattern: _Run, sizes: Sizes) -> float:
    symbol = region.symbol(mine)
    if symbol is not None and symbol == pattern.symbol(theirs):
        return 0.0
    if sizes.shape(mine.meta["val"]) != tuple(theirs.meta["val"].shape):
        return float("inf")
    actual, expected = region.value(mine), pattern.value(theirs)
    if not actual.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    finite = actual.isfinite()
    if actual.numel() and not finite.any():
        return float("inf")
    return relative_difference(torch.where(finite, actual.double(), 0), torch.where(finite, expected.double(), 0))


def _same_arguments(mine: Node, theirs: Node, region: _Run, pattern: _Run) -> bool:
    ours, spec = pytree.tree_flatten((list(mine.args), dict(mine.kwargs)))
    other, other_spec = pytree.tree_flatten((list(theirs.args), dict(theirs.kwargs)))
    if spec != other_spec:
        return False
    return all(_same_argument(a, b, region, pattern) for a, b in zip(ours, other, strict=True))


def _same_argument(a: Any, b: Any, region: _Run, pattern: _Run) -> bool:
    sizes = region.side.sizes
    a = sizes.concrete(a) if isinstance(a, torch.SymInt) else a
    if isinstance(a, Node) and operations.is_symbolic(a):
        a = sizes.value(a)
    if isinstance(b, Node) and operations.is_symbolic(b):
        b = b.meta["val"]
    if not isinstance(a, Node) or not isinstance(b, Node):
        if isinstance(a, torch.device):
            return isinstance(b, torch.device)
        return (isinstance(a, bool) is isinstance(b, bool)) and a == b
    x, y = a.meta.get("val"), b.meta.get("val")
    symbol = region.symbol(a)
    if symbol is not None and symbol == pattern.symbol(b):
        return True
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return False
    if x.dtype != y.dtype or sizes.shape(x) != tuple(y.shape):
        return False
    if is_undefined(a) and is_undefined(b):
        return True
    return _distance(a, b, region, pattern, sizes) < TOLERANCE


def _fresh(node: Node, run: _Run, generator: torch.Generator, arithmetic: Arithmetic) -> Any:
    """A random value of the shape of the free step `node`.

    Integers may index something: theirs are the operation's own results on this sample, shuffled.
    """
    value = node.meta["val"]
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    if all(leaf.is_floating_point() or leaf.dtype == torch.bool for leaf in tensors):
        return pytree.tree_map(lambda leaf: random_like(leaf, generator, arithmetic), value)
    try:
        computed = evaluate([node], {n: run.known[n] for n in _reached(node, run.known)}, run.side.sizes, arithmetic)[0]
    except Decline:
        return pytree.tree_map(lambda leaf: random_like(leaf, generator, arithmetic), value)
    return pytree.tree_map(lambda leaf: _shuffled(leaf, generator, arithmetic), computed)


def random_like(leaf: Any, generator: torch.Generator, arithmetic: Arithmetic = Arithmetic.FLOAT64) -> Any:
    """Random values of this shape: floats of both signs, small integers, both truth values; float64 if so asked."""
    if not isinstance(leaf, (torch.Tensor, FakeTensor)):
        return leaf
    shape = [int(size) for size in leaf.shape]
    if leaf.is_floating_point():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        return value if arithmetic is Arithmetic.FLOAT64 else value.to(leaf.dtype)
    return torch.randint(0, 2, shape, generator=generator).to(leaf.dtype)


def _shuffled(leaf: Any, generator: torch.Generator, arithmetic: Arithmetic) -> Any:
    if not isinstance(leaf, torch.Tensor) or leaf.is_floating_point() or leaf.dtype == torch.bool:
        return random_like(leaf, generator, arithmetic)
    return leaf.reshape(-1)[torch.randperm(leaf.numel(), generator=generator)].reshape(leaf.shape)
