"""A declared meaning as ATen operations: traced on fake tensors, functionalised, in Inductor's decompositions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fx_fusion.graph.operations import aten
from fx_fusion.graph.post_grad import placeholders
from fx_fusion.graph.torch_compat import OpOverload, auto_functionalized, auto_functionalized_v2, pytree
from fx_fusion.graph.tracing import NotTraceable, functional_graph
from fx_fusion.semantics.meaning import arrange, call_meaning


class NoMeaning(Exception):
    """The function cannot stand for the operation; the message says why."""


@dataclass(frozen=True)
class TracedMeaning:
    """``graph`` computes the operation's results, then the new values of what it writes.

    Its placeholders are the tensors and symbolic sizes among the arguments, in order (see :func:`leaves`).
    """

    module: GraphModule
    outputs: tuple[Any, ...]
    """For each result a node of the graph, or None."""

    @property
    def strided(self) -> bool:
        """Whether it names places in memory: then it holds for tensors that begin where those it was traced with do."""
        return any("strided" in str(node.target) for node in self.module.graph.nodes)


def trace(
    fn: Callable[..., Any],
    op: OpOverload,
    arguments: Mapping[str, Any],
    written: Sequence[str],
) -> TracedMeaning:
    """Trace ``fn(**arguments)``. It writes its arguments as the operation does, and returns what the operation returns.

    Args:
        arguments: fake tensors, symbolic sizes and literals, by their names in the schema.
        written: which of them the operation writes.

    Raises:
        NoMeaning: `fn` raises, writes something else, holds a tensor of its own, or returns something else.
    """
    flat, spec = pytree.tree_flatten(dict(arguments))
    places = [i for i, value in enumerate(flat) if is_input(value)]
    if not any(isinstance(flat[i], torch.Tensor) for i in places):
        raise NoMeaning("none of its arguments is a tensor")

    def run(*inputs: Any) -> Any:
        values = list(flat)
        for place, value in zip(places, inputs, strict=True):
            values[place] = value
        given = pytree.tree_unflatten(values, spec)
        results = call_meaning(fn, op, given)
        return results, [given[name] for name in written]

    # One tensor may be given as several arguments, which the graph takes apart.
    separate = [flat[i].detach() if isinstance(flat[i], torch.Tensor) else flat[i] for i in places]
    try:
        module = functional_graph(run, separate, {aten.copy.default: _copied})
    except NotTraceable as error:
        raise NoMeaning(f"it raises {error}") from error
    names = [name for name, value in arguments.items() for leaf in pytree.tree_leaves(value) if is_input(leaf)]
    returned = _clean(module, names, written)
    outputs = tuple(pytree.tree_leaves(returned, is_leaf=lambda value: value is None or isinstance(value, Node)))
    after = len(written)
    expected = len(op._schema.returns) + after
    if len(outputs) != expected + (0 if op._schema.returns else 1) and len(outputs) != expected:
        raise NoMeaning(f"it returns {len(outputs) - after} values, the operation {len(op._schema.returns)}")
    return TracedMeaning(module, outputs if op._schema.returns else (None, *outputs[len(outputs) - after :]))


def complete(op: OpOverload, given: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of `op` by name, in the schema's order."""
    return arrange(op, given, by_name=True)[1]


def is_input(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool))


def _copied(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """``target.copy_(source)`` is the source, in the target's shape and dtype."""
    if source.dtype != target.dtype:
        source = source.to(target.dtype)
    return source if source.shape == target.shape else source.expand_as(target)


def _clean(module: GraphModule, names: Sequence[str], written: Sequence[str]) -> Any:
    """Drop what is dead. Returns what the function returns, and what `written` holds afterwards.

    Placeholder i belongs to the argument `names[i]`.
    """
    graph = module.graph
    if graph.find_nodes(op="get_attr"):
        raise NoMeaning("it uses a tensor that is not an argument; pass it, or compute it (torch.arange)")
    writer = next((node for node in graph.nodes if node.target in (auto_functionalized, auto_functionalized_v2)), None)
    if writer is not None:
        raise NoMeaning(f"it calls {writer.args[0]}, which writes in place; write what that does in plain PyTorch")
    output: Any = graph.output_node()
    returned, after = output.args[0]
    for name, before, now in zip(names, placeholders(module), after, strict=True):
        if now is not before and name not in written:
            raise NoMeaning(f"it writes {name!r}, which the operation does not")
    output.args = (returned,)
    graph.eliminate_dead_code()
    impure = next((node for node in graph.nodes if node.op == "call_function" and node.is_impure()), None)
    if impure is not None:
        raise NoMeaning(f"it has a side effect: {impure.target}")
    return returned
