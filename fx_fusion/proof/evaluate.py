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
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate

from fx_fusion.decline import Decline
from fx_fusion.graph import operations
from fx_fusion.graph.sizes import Sizes
from fx_fusion.proof.field.tensor import FieldTensor
from fx_fusion.proof.field.verdict import NoMeaning

#: Bytes that the live values of one evaluation may take together. Beside them a reader, or the reference that the
#: result is compared with, holds a few tensors of the result's size: all in all less than four times as much.
MEMORY_BOUND = 1 << 30


class Arithmetic(enum.Enum):
    FLOAT64 = "float64"
    NATIVE = "native"
    MOVE = "move"


def evaluate(
    outputs: Sequence[Node],
    inputs: Mapping[Node, Any],
    sizes: Sizes,
    arithmetic: Arithmetic = Arithmetic.FLOAT64,
    at: Callable[[Node], None] | None = None,
) -> list[torch.Tensor]:
    """The values of `outputs`, given those of `inputs`.

    Everything between is run; a value is freed after its last use. Nodes that hold sizes take them from `sizes`. `at`
    is told of each node before it is run.

    Raises:
        NoMeaning: under a mode that interprets the operations otherwise, if it has no meaning for one.
        Decline: ``region.evaluation`` if an input is missing or an operation fails, ``region.too_large`` if the live
            values exceed :data:`MEMORY_BOUND`.
    """
    steps = schedule(outputs, inputs)
    remaining = Counter(parent for node in steps for parent in node.all_input_nodes)
    remaining.update(outputs)
    values: dict[Node, Any] = dict(inputs)
    live = sum(_bytes(value) for value in values.values())
    for node in steps:
        check_memory(live + _bytes_to_come(node, sizes), node)
        if at is not None:
            at(node)
        values[node] = _run(node, values, sizes, arithmetic)
        live += _bytes(values[node])
        check_memory(live, node)
        for parent in node.all_input_nodes:
            remaining[parent] -= 1
            if remaining[parent] == 0 and parent not in inputs:
                live -= _bytes(values.pop(parent, None))
    return [values[node] for node in outputs]


def check_memory(size: int, node: Node) -> None:
    """Raise Decline ``region.too_large`` if `size` bytes, needed for `node`, are beyond the bound."""
    if size > MEMORY_BOUND:
        found = f"evaluating {node} takes {size >> 20} MiB; values that live together may take {MEMORY_BOUND >> 20} MiB"
        raise Decline("region.too_large", found, [node])


def _bytes_to_come(node: Node, sizes: Sizes) -> int:
    """What `node` will allocate, as its shape tells: nothing for a view."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or node.target in operations.VIEW:
        return 0
    return torch.Size(sizes.shape(value)).numel() * torch.float64.itemsize


def schedule(outputs: Iterable[Node], inputs: Container[Node]) -> list[Node]:
    """The nodes between, each after what it needs (iterative: a model's graph is deeper than Python's stack)."""
    done: dict[Node, None] = {}
    stack = list(outputs)
    while stack:
        node = stack[-1]
        if node in inputs or node in done:
            stack.pop()
            continue
        needs = (
            []
            if operations.is_symbolic(node)
            else [p for p in node.all_input_nodes if p not in done and p not in inputs]
        )
        if needs:
            stack.extend(needs)
            continue
        done[node] = None
        stack.pop()
    return list(done)


def _run(node: Node, values: Mapping[Node, Any], sizes: Sizes, arithmetic: Arithmetic) -> Any:
    if operations.is_symbolic(node):
        return sizes.value(node)
    if node.op != "call_function":
        raise Decline("region.evaluation", f"{node} is a graph input whose value must not be read", [node])
    if operations.draws(node):
        raise Decline(
            "region.evaluation", f"{node} draws random numbers: one value does not stand for the next", [node]
        )
    if operations.is_cast(node) and arithmetic is not Arithmetic.NATIVE:
        return _cast(node, values, arithmetic)

    def argument(value: Any) -> Any:
        if isinstance(value, Node):
            return values[value] if value in values else sizes.value(value)
        if isinstance(value, torch.SymInt):
            return sizes.concrete(value)
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if isinstance(value, torch.dtype) and arithmetic is Arithmetic.FLOAT64:
            return _widest(value)
        return value

    args = map_aggregate(node.args, argument)
    kwargs = map_aggregate(node.kwargs, argument)
    try:
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    except NoMeaning:
        raise
    except Exception as error:
        raise Decline("region.evaluation", f"{node.target} cannot run on the CPU: {error}", [node]) from error
    if arithmetic is Arithmetic.FLOAT64 and isinstance(result, torch.Tensor):
        return result.to(_widest(result.dtype))
    return result


def _cast(node: Node, values: Mapping[Node, Any], arithmetic: Arithmetic) -> torch.Tensor:
    value: torch.Tensor = values[node.args[0]]  # type: ignore[index]
    if arithmetic is Arithmetic.MOVE:
        return value
    dtype: torch.dtype = node.meta["val"].dtype
    return value.to(_widest(dtype))


def _widest(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def _bytes(value: Any) -> int:
    if isinstance(value, FieldTensor):
        return value.bytes_held
    return value.untyped_storage().nbytes() if isinstance(value, torch.Tensor) and not value._is_view() else 0
