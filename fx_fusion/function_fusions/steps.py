"""The operations of a graph as the comparison with a pattern sees them: each in one canonical spelling.

A *step* is one operation. Most are a node's own; where several spellings of one operation exist (``equivalences.py``),
all of them become the same step, or the same two.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fx_fusion.graph import operations
from fx_fusion.graph.operations import aten
from fx_fusion.graph.torch_compat import HigherOrderOperator, OpOverload, pytree


class Kind(enum.Enum):
    """What is known of a step."""

    LEAF = "leaf"
    """No operation: a graph input, a parameter."""
    SIZE = "size"
    """A number that the shapes of the graph fix."""
    LITERAL = "literal"
    """Made of literals alone: its value is known."""
    UNDEFINED = "undefined"
    """Memory whose content is not defined: any two of one shape are equal."""
    MOVEMENT = "movement"
    """The same values elsewhere."""
    CAST = "cast"
    ANALYTIC = "analytic"
    """Analytic wherever it is finite."""
    ROOT = "root"
    """Analytic while its argument is positive."""
    LOGARITHM = "logarithm"
    LOOKUP = "lookup"
    """Rows of a table of floats, by integers."""
    FREE = "free"
    """Anything else: all that is assumed is that equal arguments give equal results."""
    BY_STRIDES = "by strides"
    """What it gives depends on how its argument lies in memory: no function of values."""
    RANDOM = "random"


#: Analytic wherever they are finite. (What a mask selects is; the mask is a step of its own.)
_ANALYTIC = operations.ARITHMETIC | operations.SMOOTH | operations.PRODUCTS | {aten.where.self}


@dataclass(eq=False, slots=True)
class Step:
    """
    Attributes:
        target: what computes it; of a canonical spelling, its name.
        args, kwargs: as of a node, with steps in the place of nodes.
        node: where it stands. A node may be two steps: the second then takes the first.
        value: the fake value.
        parents: the steps among the arguments.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    node: Node
    value: Any
    kind: Kind
    parents: tuple[Step, ...]

    @property
    def name(self) -> object:
        """Equal for free steps that may be the same operation."""
        if self.kind is Kind.CAST:
            return ("cast", self.value.dtype)
        if isinstance(self.target, HigherOrderOperator):
            return (self.target.name(), str(self.args[0]) if self.args else "")
        return str(self.target)

    @property
    def rare(self) -> str | None:
        """Which kind of rare analytic step it is; None for those that occur everywhere."""
        if self.kind in (Kind.ROOT, Kind.LOGARITHM):
            return self.kind.value
        return operations.RARE.get(self.target) if self.kind is Kind.ANALYTIC else None

    def __str__(self) -> str:
        return str(self.node)


def plain(node: Node, argument: Callable[[Any], Any]) -> Step:
    """`node` as it is spelled. `argument` puts steps in the place of nodes."""
    args, kwargs = ((), {}) if node.op != "call_function" else (argument(node.args), argument(node.kwargs))
    leaves = pytree.tree_leaves((list(args), dict(kwargs)))
    parents = tuple(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, Step)))
    step = Step(node.target, args, kwargs, node, node.meta.get("val"), Kind.FREE, parents)
    step.kind = _kind(step)
    return step


def _kind(step: Step) -> Kind:
    node, target = step.node, step.target
    if operations.is_symbolic(node):
        return Kind.SIZE
    if node.op != "call_function":
        return Kind.LEAF
    if operations.draws(node):
        return Kind.RANDOM
    if target in operations.UNDEFINED:
        return Kind.UNDEFINED
    if target in operations.BY_STRIDES:
        return Kind.BY_STRIDES
    if _is_literal(step):
        return Kind.LITERAL
    if operations.is_cast(node):
        return Kind.CAST
    if operations.is_movement(node) or target in operations.PAIRS or (operations.is_join(node) and not _converts(step)):
        return Kind.MOVEMENT
    if target in operations.ROOTS:
        return _kind_of_power(step.args[1]) if target is aten.pow.Tensor_Scalar else Kind.ROOT
    if target in operations.LOGARITHMS:
        return Kind.LOGARITHM
    if target in _ANALYTIC:
        return Kind.ANALYTIC
    return Kind.FREE


def _is_literal(step: Step) -> bool:
    if operations.is_opaque(step.node):
        return False
    return all(parent.kind in (Kind.LITERAL, Kind.SIZE) for parent in step.parents)


def _converts(step: Step) -> bool:
    """Does the join bring its parts to another dtype?"""
    dtypes = {parent.value.dtype for parent in step.parents if isinstance(parent.value, torch.Tensor)}
    return dtypes != {step.value.dtype}


def _kind_of_power(exponent: Any) -> Kind:
    if type(exponent) not in (int, float):
        return Kind.FREE
    if float(exponent).is_integer():
        return Kind.ANALYTIC
    return Kind.ROOT if float(2 * exponent).is_integer() else Kind.FREE


def schedule(results: Iterable[Step], inputs: Container[Step]) -> list[Step]:
    """The steps between, each after what it needs."""
    done: dict[Step, None] = {}
    stack = list(results)
    while stack:
        step = stack[-1]
        if step in inputs or step in done:
            stack.pop()
            continue
        needs = [] if step.kind is Kind.SIZE else [p for p in step.parents if p not in done and p not in inputs]
        if needs:
            stack.extend(needs)
            continue
        done[step] = None
        stack.pop()
    return list(done)


def arguments_of(step: Step) -> dict[str, Any]:
    """The arguments of a free step by name, those left out included; dimensions are counted from the first."""
    if not isinstance(step.target, OpOverload):
        return {**{str(i): value for i, value in enumerate(step.args)}, **step.kwargs}
    found: dict[str, Any] = {}
    for i, argument in enumerate(step.target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        found[argument.name] = step.args[i] if i < len(step.args) else step.kwargs.get(argument.name, default)
    rank = next((p.value.dim() for p in step.parents if isinstance(p.value, torch.Tensor)), 0)
    for name in ("dim", "dims"):
        if rank and found.get(name) is not None:
            found[name] = pytree.tree_map(lambda dim: dim % rank if type(dim) is int else dim, found[name])
    return found


# --- what rounds --------------------------------------------------------------------------------------------------


_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def coarsest(steps: Iterable[Step]) -> torch.dtype:
    """The narrowest floating dtype of `steps`, float8 apart: a region may round to it anywhere, as its results do."""
    found = [v.dtype for step in steps if isinstance(v := step.value, torch.Tensor) and v.dtype in _FLOATS]
    return min(found, key=_FLOATS.index, default=torch.float64)


def is_free(step: Step, floor: torch.dtype | None) -> bool:
    """Must the same operation stand on the other side, on equal arguments?

    A step that rounds below `floor` must. Without a floor only float8 is below it.
    """
    if step.kind is Kind.CAST:
        return _loses(step, floor)
    if step.kind is Kind.LOGARITHM:
        return not is_positive(step.args[0], 1.0 if step.target is aten.log1p.default else 0.0) or _rounds(step, floor)
    if step.kind in (Kind.ANALYTIC, Kind.ROOT, Kind.LOOKUP):
        return _rounds(step, floor)
    return step.kind is Kind.FREE


def _loses(cast: Step, floor: torch.dtype | None) -> bool:
    source, dtype = cast.parents[0].value.dtype, cast.value.dtype
    if dtype.is_complex or source.is_complex:
        return False
    if not dtype.is_floating_point:
        return bool(source.is_floating_point) or torch.promote_types(source, dtype) != dtype
    if dtype == torch.float64 and floor not in (None, torch.float64):
        return source != torch.float64
    return _rounds(cast, floor)


def _rounds(step: Step, floor: torch.dtype | None) -> bool:
    leaves = pytree.tree_leaves(step.value)
    dtypes = [leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dtype.is_floating_point]
    if any(dtype.itemsize == 1 for dtype in dtypes):
        return True
    return floor is not None and not all(operations.holds(dtype, floor) for dtype in dtypes)


# --- what is positive, and what divides -------------------------------------------------------------------------------


_ALWAYS_POSITIVE = frozenset({aten.exp.default, aten.exp2.default, aten.sigmoid.default, aten.cosh.default})
_KEEPS_SIGN = frozenset({aten.sum.dim_IntList, aten.mean.dim, aten.sum.default, aten.mean.default})
_SUMS = frozenset({aten.add.Tensor, aten.add.Scalar})
_FACTORS = frozenset({aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar})


def is_positive(value: Any, plus: float = 0.0) -> bool:
    """Is ``value + plus`` positive whatever the inputs are, because it is made of exponentials and literals?

    Squares do not count: a sum of squares and a literal is positive too, and yet 0 to any accuracy.
    """
    if isinstance(value, (int, float)):
        return value + plus > 0
    if not isinstance(value, Step):
        return False
    if plus > 0 and is_positive(value):
        return True
    if value.target in _ALWAYS_POSITIVE:
        return True
    if value.kind is Kind.LITERAL:
        fill = value.args[1] if value.target is aten.full.default else None
        return isinstance(fill, (int, float)) and fill + plus > 0
    if value.kind is Kind.MOVEMENT or value.target in _KEEPS_SIGN or _widens(value):
        return bool(value.parents) and all(map(is_positive, value.parents))
    if value.target in _SUMS and not value.kwargs:
        return all(is_positive(each) or _is_zero(each) for each in value.args[:2])
    if value.target in _FACTORS or value.target is aten.where.self:
        return all(is_positive(each) for each in value.args[-2:])
    return value.kind is Kind.ROOT and is_positive(value.args[0])


def _widens(step: Step) -> bool:
    """Is it a cast that keeps every value?"""
    if step.kind is not Kind.CAST or not step.value.dtype.is_floating_point:
        return False
    source = step.parents[0].value.dtype
    return source.is_floating_point and operations.holds(step.value.dtype, source)


_POWERS = frozenset({aten.pow.Tensor_Scalar, aten.square.default})


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == 0


def divisors(step: Step) -> list[Step]:
    """What `step` divides by, factor by factor: where one of them is zero the step has no value."""
    if step.target in (aten.div.Tensor, aten.div.Scalar):
        return factors(step.args[1])
    if step.target is aten.reciprocal.default:
        return factors(step.args[0])
    if step.target is aten.addcdiv.default:
        return factors(step.args[2])
    if step.target is aten.rsqrt.default or (step.target is aten.pow.Tensor_Scalar and step.args[1] < 0):
        return factors(step.args[0])
    return []


def radicand(root: Step) -> Step:
    """What the root is taken of: of ``sqrt(1 / v)``, v."""
    found: Step = root.args[0]
    while True:
        if found.target is aten.reciprocal.default:
            found = found.args[0]
        elif found.target is aten.div.Tensor and not isinstance(found.args[0], Step):
            found = found.args[1]
        else:
            return found


def factors(value: Any) -> list[Step]:
    """Whose zeros are the zeros of `value`; what is a literal, or positive, has none."""
    found: list[Step] = []
    stack = [value]
    while stack:
        top = stack.pop()
        if not isinstance(top, Step) or top.kind in (Kind.LITERAL, Kind.SIZE) or is_positive(top):
            continue
        if _widens(top) or (top.kind is Kind.MOVEMENT and len(top.parents) == 1):
            stack.append(top.parents[0])
        elif top.kind is Kind.ROOT or top.target in _POWERS:
            stack.append(top.args[0])
        elif top.target in (aten.mul.Tensor, aten.mul.Scalar):
            stack.extend(top.args[:2])
        elif top.target in (aten.div.Tensor, aten.div.Scalar):
            stack.append(top.args[0])
        else:
            found.append(top)
    return found
