"""Concrete sizes for symbolic ones: a region is evaluated at several admissible sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.graph.torch_compat import free_unbacked_symbols, hints, pytree, statically_known_true

#: Small sizes tried for a symbol, besides its lower bound. Neither equal nor multiples of one another, so that a
#: layout that mixes two dimensions up cannot look right at all of them.
_CANDIDATES = (3, 5, 2, 7, 4, 8, 16, 64)

_LARGE = sympy.Integer(1 << 20)


@dataclass(frozen=True)
class Sizes:
    """One admissible value for each symbol of a graph."""

    values: Mapping[sympy.Symbol, int] = field(default_factory=dict[sympy.Symbol, int])

    def concrete(self, size: int | torch.SymInt) -> int:
        """`size` as an int. Raises Decline ``region.sizes`` when it depends on a symbol without a value."""
        if isinstance(size, int):
            return size
        expression = sympy.sympify(sympy.sympify(size.node.expr).xreplace(dict(self.values)))
        if not expression.is_number:
            raise Decline("region.sizes", f"the size {size.node.expr} depends on data")
        return int(expression)

    def shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        return tuple(self.concrete(size) for size in tensor.shape)

    def value(self, node: Node) -> Any:
        """The number that a symbolic node holds at these sizes."""
        value = node.meta["val"]
        return self.concrete(value) if isinstance(value, torch.SymInt) else value


def same(a: Sequence[int | torch.SymInt], b: Sequence[int | torch.SymInt]) -> bool:
    """Are two lists of sizes equal, as far as their expressions show? Comparing SymInts directly would add a guard."""
    return [_expression(size) for size in a] == [_expression(size) for size in b]


def known_to_exceed_one(size: int | torch.SymInt) -> bool:
    """Is `size` a symbol that is two at least, as far as ranges tell? Asking adds no guard."""
    return isinstance(size, torch.SymInt) and statically_known_true(size >= 2)


def steps(value: torch.Tensor) -> list[int | torch.SymInt]:
    """The strides of `value`; that of a dimension of one element says nothing, and is left out."""
    return [stride for size, stride in zip(value.shape, value.stride(), strict=True) if not same([size], [1])]


def depends_on_data(value: Any) -> bool:
    """Has a tensor of the fake `value` a size that is known only when it runs? Each run of it invents a new symbol."""
    tensors = [each for each in pytree.tree_leaves(value) if isinstance(each, torch.Tensor)]
    return any(free_unbacked_symbols(tuple(tensor.shape)) for tensor in tensors)


def quotient(a: int | torch.SymInt, b: int | torch.SymInt) -> int | None:
    """``a // b`` where all symbols are large: if it is one number whatever they stand for, this one."""
    large_a, large_b = (_at_large(_expression(size)) for size in (a, b))
    return large_a // large_b if large_b else None


def _at_large(expression: sympy.Expr) -> int:
    value: Any = expression.xreplace(dict.fromkeys(expression.free_symbols, _LARGE))
    return int(value)


def _expression(size: int | torch.SymInt) -> sympy.Expr:
    return sympy.sympify(size if isinstance(size, int) else size.node.expr)


def admissible_sizes(nodes: Iterable[Node], candidates: Sequence[int] = _CANDIDATES, count: int = 2) -> list[Sizes]:
    """Sizes at which to evaluate regions of `nodes`: one assignment if nothing is symbolic, else `count` distinct ones.

    Ranges and guards come from the shape environment; `candidates` are tried in their order. Symbols that were equal
    when the graph was traced stay equal: the token counts of two inputs are two symbols, and usually one number.
    """
    symbols: dict[sympy.Symbol, None] = {}
    env: Any = None
    for node in nodes:
        for size in _sizes_of(node.meta.get("val")):
            env = size.node.shape_env
            symbols.update(dict.fromkeys(sorted(size.node.expr.free_symbols, key=str)))
    if not symbols:
        return [Sizes()]
    traced_with = hints(env)
    known = {symbol: int(traced_with[symbol]) for symbol in symbols if symbol in traced_with}
    classes = sorted(set(known.values()))
    found: list[Sizes] = []
    for shift in range(len(candidates)):
        chosen = {hint: candidates[(i + shift) % len(candidates)] for i, hint in enumerate(classes)}
        values = {symbol: _clamp(env, symbol, chosen[hint]) for symbol, hint in known.items()}
        sizes = Sizes(values)
        if sizes not in found and _admits(env, values):
            found.append(sizes)
        if len(found) == count:
            return found
    traced = Sizes(known)
    return [*found, traced] if traced not in found else found


def _sizes_of(value: Any) -> Iterable[torch.SymInt]:
    if isinstance(value, torch.SymInt):
        yield value
    elif isinstance(value, torch.Tensor):
        yield from (size for size in (*value.shape, *value.stride()) if isinstance(size, torch.SymInt))


def _clamp(env: Any, symbol: sympy.Symbol, size: int) -> int:
    bounds = env.var_to_range[symbol]
    return int(min(max(size, bounds.lower), bounds.upper))


def _admits(env: Any, values: Mapping[sympy.Symbol, int]) -> bool:
    return all(guard.expr.xreplace(dict(values)) is not sympy.false for guard in env.guards)
