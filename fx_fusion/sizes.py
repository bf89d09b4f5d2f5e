"""Concrete sizes for symbolic ones: a region is evaluated at several admissible sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import Node

from fx_fusion.decline import Decline

#: Small sizes tried for a symbol, besides its lower bound. Neither equal nor multiples of one another, so that a
#: layout that mixes two dimensions up cannot look right at all of them.
_CANDIDATES = (3, 5, 2, 7, 4, 8, 16, 64)


@dataclass(frozen=True)
class Sizes:
    """One admissible value for each symbol of a graph."""

    values: Mapping[sympy.Symbol, int] = field(default_factory=dict[sympy.Symbol, int])

    def concrete(self, size: int | torch.SymInt) -> int:
        """`size` as an int. Raises Decline ``region.sizes`` when it depends on a symbol without a value."""
        if isinstance(size, int):
            return size
        expression = sympy.sympify(size.node.expr).xreplace(dict(self.values))
        if not expression.is_number:
            raise Decline("region.sizes", f"the size {size.node.expr} depends on data")
        return int(expression)

    def shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        return tuple(self.concrete(size) for size in tensor.shape)

    def value(self, node: Node) -> Any:
        """The number that a symbolic node holds at these sizes."""
        value = node.meta["val"]
        return self.concrete(value) if isinstance(value, torch.SymInt) else value


def admissible_sizes(nodes: Iterable[Node]) -> list[Sizes]:
    """Sizes at which to evaluate `nodes`: one assignment if nothing is symbolic, else two distinct ones.

    Ranges and guards come from the shape environment; small sizes are preferred.
    """
    symbols: dict[sympy.Symbol, None] = {}
    env: Any = None
    for node in nodes:
        for size in _sizes_of(node.meta.get("val")):
            env = size.node.shape_env
            symbols.update(dict.fromkeys(sorted(size.node.expr.free_symbols, key=str)))
    if not symbols:
        return [Sizes()]
    found: list[Sizes] = []
    for shift in range(len(_CANDIDATES)):
        values: dict[sympy.Symbol, int] = {}
        for i, symbol in enumerate(symbols):
            values[symbol] = _clamp(env, symbol, _CANDIDATES[(i + shift) % len(_CANDIDATES)])
        sizes = Sizes(values)
        if sizes not in found and _admits(env, values):
            found.append(sizes)
        if len(found) == 2:
            return found
    hint = Sizes({symbol: _hint(env, symbol) for symbol in symbols})
    return [*found, hint] if hint not in found else found


def _sizes_of(value: Any) -> Iterable[torch.SymInt]:
    if isinstance(value, torch.SymInt):
        yield value
    elif isinstance(value, torch.Tensor):
        yield from (size for size in (*value.shape, *value.stride()) if isinstance(size, torch.SymInt))


def _clamp(env: Any, symbol: sympy.Symbol, size: int) -> int:
    bounds = env.var_to_range.get(symbol)
    if bounds is None:
        raise Decline("region.sizes", f"the symbol {symbol} has no range")
    return int(min(max(size, bounds.lower), bounds.upper))


def _hint(env: Any, symbol: sympy.Symbol) -> int:
    table = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    if symbol not in table:
        raise Decline("region.sizes", f"the size {symbol} depends on data")
    return int(table[symbol])


def _admits(env: Any, values: Mapping[sympy.Symbol, int]) -> bool:
    return all(guard.expr.xreplace(dict(values)) is not sympy.false for guard in env.guards)
