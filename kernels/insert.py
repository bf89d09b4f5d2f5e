"""Put a call into a graph as an operation: functional, the tensors that it writes come out as values.

Inductor makes the call work in place again.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fx_fusion.graph.edit import Emitter
from fx_fusion.graph.operations import value_of
from fx_fusion.graph.sizes import same
from fx_fusion.graph.torch_compat import auto_functionalized_v2
from fx_fusion.kernels.call import AnyCall, to_arguments, written_names


@dataclass(frozen=True)
class Results:
    """What a call leaves: its results (None for one that is empty), and each tensor that it wrote as it is afterwards,
    by what it was before.
    """

    results: tuple[Node | None, ...]
    written: dict[Node, Node]


def insert_operation(
    emit: Emitter, overload: Any, implementation: str, call: AnyCall[Node], results: Sequence[torch.Tensor]
) -> Results:
    """Call `overload`, by the kernel `implementation`; `results` are the fake values of what it returns."""
    names = written_names(type(call))
    targets: dict[str, Node] = {name: getattr(call, name) for name in names}
    bases = list(dict.fromkeys(targets.values()))
    inserted = emit.call_with_value(
        (*results, *map(value_after, bases)),
        auto_functionalized_v2,
        overload,
        **{name: node for name, node in call.tensors.items() if name not in names},
        **to_arguments(call.options),  # pyright: ignore[reportAttributeAccessIssue]
        implementation=implementation,
        **{f"_{name}_base_index": bases.index(node) for name, node in targets.items()},
        _all_bases=bases,
    )
    return Results(
        tuple(
            emit.call(operator.getitem, inserted, place) if is_wanted(value) else None
            for place, value in enumerate(results)
        ),
        {base: emit.call(operator.getitem, inserted, len(results) + place) for place, base in enumerate(bases)},
    )


def is_wanted(result: torch.Tensor) -> bool:
    """A result of no element is what a call returns where it was not asked for one."""
    return not same(result.shape, [0])


def value_after(node: Node) -> torch.Tensor:
    """The fake value of a tensor that the call writes, after the call.

    It gets storage of its own: a fake value that shares the input's would make Inductor see the reader of the new
    value as a reader of the old one, and copy the tensor.
    """
    value = value_of(node)
    with value.fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
