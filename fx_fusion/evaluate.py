"""Run part of an FX graph on concrete CPU tensors.

Three arithmetics answer three questions:

* ``FLOAT64`` raises every float to float64: rounding disappears, so two regions compute the same function or they
  do not, and 1e-9 tells them apart;
* ``NATIVE`` computes in the dtypes that the graph records: what the user's model does;
* ``MOVE`` runs movement on integer element numbers: where does each element come from, exactly.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate

from fx_fusion import opset
from fx_fusion.decline import Decline
from fx_fusion.sizes import Sizes

#: Bytes that the live values of one evaluation may take together.
MEMORY_BOUND = 4 << 30


class Arithmetic(enum.Enum):
    FLOAT64 = "float64"
    NATIVE = "native"
    MOVE = "move"


def evaluate(
    outputs: Sequence[Node],
    inputs: Mapping[Node, Any],
    sizes: Sizes,
    arithmetic: Arithmetic = Arithmetic.FLOAT64,
) -> list[torch.Tensor]:
    """The values of `outputs`, given those of `inputs`.

    Everything between is run; a value is freed after its last use. Nodes that hold sizes take them from `sizes`.

    Raises:
        Decline: ``region.evaluation`` if an input is missing or an operation fails, ``region.too_large`` if the live
            values exceed :data:`MEMORY_BOUND`.
    """
    schedule = _schedule(outputs, inputs)
    remaining = Counter(parent for node in schedule for parent in node.all_input_nodes)
    remaining.update(outputs)
    values: dict[Node, Any] = dict(inputs)
    live = sum(_bytes(value) for value in values.values())
    for node in schedule:
        values[node] = _run(node, values, sizes, arithmetic)
        live += _bytes(values[node])
        if live > MEMORY_BOUND:
            raise Decline("region.too_large", f"evaluating {node} takes more than {MEMORY_BOUND >> 30} GiB", [node])
        for parent in node.all_input_nodes:
            remaining[parent] -= 1
            if remaining[parent] == 0 and parent not in inputs:
                live -= _bytes(values.pop(parent, None))
    return [values[node] for node in outputs]


def _schedule(outputs: Sequence[Node], inputs: Mapping[Node, Any]) -> list[Node]:
    """The nodes to run, each after what it needs (iterative: a model's graph is deeper than Python's stack)."""
    done: dict[Node, None] = {}
    stack = list(outputs)
    while stack:
        node = stack[-1]
        if node in inputs or node in done:
            stack.pop()
            continue
        needs = (
            [] if opset.is_symbolic(node) else [p for p in node.all_input_nodes if p not in done and p not in inputs]
        )
        if needs:
            stack.extend(needs)
            continue
        done[node] = None
        stack.pop()
    return list(done)


def _run(node: Node, values: Mapping[Node, Any], sizes: Sizes, arithmetic: Arithmetic) -> Any:
    if opset.is_symbolic(node):
        return sizes.value(node)
    if node.op != "call_function":
        raise Decline("region.evaluation", f"{node} is a graph input whose value must not be read", [node])
    if opset.is_cast(node) and arithmetic is not Arithmetic.NATIVE:
        return _cast(node, values, arithmetic)

    def argument(value: Any) -> Any:
        if isinstance(value, Node):
            return values[value] if value in values else sizes.value(value)
        if isinstance(value, torch.SymInt):
            return sizes.concrete(value)
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if isinstance(value, torch.dtype) and arithmetic is Arithmetic.FLOAT64 and value.is_floating_point:
            return torch.float64
        return value

    args = map_aggregate(node.args, argument)
    kwargs = map_aggregate(node.kwargs, argument)
    try:
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:
        raise Decline("region.evaluation", f"{node.target} cannot run on the CPU: {error}", [node]) from error
    if arithmetic is Arithmetic.FLOAT64 and isinstance(result, torch.Tensor) and result.is_floating_point():
        return result.to(torch.float64)
    return result


def _cast(node: Node, values: Mapping[Node, Any], arithmetic: Arithmetic) -> torch.Tensor:
    value: torch.Tensor = values[node.args[0]]  # type: ignore[index]
    if arithmetic is Arithmetic.MOVE:
        return value
    dtype: torch.dtype = node.meta["val"].dtype
    return value.to(torch.float64 if dtype.is_floating_point else dtype)


def _bytes(value: Any) -> int:
    return value.untyped_storage().nbytes() if isinstance(value, torch.Tensor) and not value._is_view() else 0
