"""Mutation testing of graphs: one constant, operand or operation of a fused region is changed at random.

Each mutant must be refused, or be rewritten into what the mutant itself computes. A mutant is a whole functional
post-grad graph, as the pass sees it, in which one thing between the projections and the stores, or the query's
consumer, is different; nothing here asks the pass where that is.

    for mutant in Mutants.of(MyAttention(), inputs, count=300, seed=0):
        fused, report = rewritten(mutant)
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fx_fusion.config import Config
from fx_fusion.fusion_pass import apply
from fx_fusion.graph.edit import fake_run
from fx_fusion.graph.post_grad import compile_post_grad
from fx_fusion.graph.torch_compat import pytree, reset_dynamo
from fx_fusion.graph.tracing import quiet
from fx_fusion.mutation.changes import propose
from fx_fusion.mutation.region import is_store, region, tensor_of
from fx_fusion.report import FusionReport

#: How many proposals in a row may be discarded or already seen before the graph counts as exhausted.
_PATIENCE = 500


@dataclass(frozen=True)
class Mutant:
    """``module(*inputs)`` is the graph ``original`` with one thing changed."""

    description: str
    module: GraphModule
    inputs: tuple[Any, ...]
    projections: tuple[str, ...]
    """The matrix products (or graph inputs, where there are none) that the region starts from, by node name."""


@dataclass
class Mutants:
    """Distinct mutants of one graph, in an order that `seed` fixes; ``discarded`` counts those that could not run.

    `where` picks the nodes of the region that are changed: all of them, unless told otherwise.
    """

    original: Mutant
    count: int
    seed: int
    where: Callable[[Node], bool] = lambda _: True
    discarded: int = field(default=0, init=False)

    @staticmethod
    def of(
        fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, *, count: int, seed: int
    ) -> Mutants:
        """Mutants of the graph of ``fn(*args, **kwargs)``, which is traced, and run once."""
        return Mutants(capture(fn, args, kwargs), count, seed)

    def __iter__(self) -> Iterator[Mutant]:
        chance = random.Random(self.seed)
        seen: set[str] = set()
        found = idle = 0
        while found < self.count and idle < _PATIENCE:
            idle += 1
            graph = copy.deepcopy(self.original.module.graph)
            change = propose(graph, chance, self.where)
            if change is None or change in seen:
                continue
            seen.add(change)
            module = _traced(self.original, graph)
            if module is None:
                self.discarded += 1
                continue
            found, idle = found + 1, 0
            yield Mutant(change, module, self.original.inputs, self.original.projections)


def rewritten(mutant: Mutant) -> tuple[GraphModule, FusionReport]:
    """A copy of the mutant after the pass, with the reference kernel, and what the pass says."""
    module = GraphModule(mutant.module, copy.deepcopy(mutant.module.graph))
    report = apply(module.graph, Config(kernel="reference"))
    module.recompile()
    return module, report


def capture(fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Mutant:
    """The post-grad graph of ``fn(*args, **kwargs)``, unchanged, with copies of the inputs that it was called with.

    Of several graphs, the one that stores into an input.

    Raises:
        ValueError: there are several graphs, and not exactly one stores into an input.
    """
    found: list[tuple[GraphModule, tuple[Any, ...]]] = []

    def finish(gm: GraphModule, _: bool) -> Callable[..., Any]:
        gm.recompile()

        def run(*arguments: Any) -> Any:
            found.append((gm, tuple(copies(arguments))))
            return gm(*arguments)

        return run

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        return compile_post_grad(gm, example_inputs, finish)

    reset_dynamo()
    try:
        with torch.no_grad():
            torch.compile(fn, backend=backend, dynamic=False)(*args, **(kwargs or {}))
    finally:
        reset_dynamo()
    storing = [(gm, inputs) for gm, inputs in found if any(is_store(node) for node in gm.graph.nodes)]
    chosen = storing if len(found) > 1 else found
    if len(chosen) != 1:
        raise ValueError(
            f"of {len(found)} graphs {len(storing)} store into an input; expected one graph, or one that does"
        )
    gm, inputs = chosen[0]
    _, projections = region(gm.graph)
    return Mutant("unchanged", gm, inputs, tuple(node.name for node in projections))


def copies(values: Sequence[Any]) -> list[Any]:
    """Copies with the same strides; what shared storage still does."""
    return copy.deepcopy([value.detach() if isinstance(value, torch.Tensor) else value for value in values])


# --- a mutant is a graph that could have been traced ------------------------------------------------------------------


def _traced(original: Mutant, graph: Graph) -> GraphModule | None:
    """`graph` as a module, or None where it could not have been traced, or does not run."""
    with quiet():
        if not (_refresh(graph) and _is_well_formed(graph) and _is_survivable(graph)):
            return None
    module = GraphModule(original.module, graph)
    return module if _runs(module, original.inputs) else None


def _refresh(graph: Graph) -> bool:
    """Fake values for the nodes that the change reaches; False if some operation refuses its operands."""
    changed: set[Node] = set()
    for node in graph.nodes:
        stale = node.meta.pop("mutated", False) or not changed.isdisjoint(node.all_input_nodes)
        if node.op != "call_function" or not stale:
            continue
        before = node.meta.get("val")
        try:
            node.meta["val"] = fake_run(node, node.meta.get("val"))
        except Exception:
            return False
        if _layouts(before) != _layouts(node.meta["val"]):
            changed.add(node)
    return True


def _layouts(value: Any) -> list[Any]:
    leaves = pytree.tree_leaves(value)
    return [
        (leaf.shape, leaf.dtype, leaf.stride(), leaf.storage_offset()) if isinstance(leaf, torch.Tensor) else leaf
        for leaf in leaves
    ]


def _is_well_formed(graph: Graph) -> bool:
    """AOTAutograd copies back what has the input's own shape and dtype, and nothing else."""
    pairs = [map(tensor_of, node.args) for node in graph.nodes if is_store(node)]
    return all(a is not None and b is not None and (a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)


def _is_survivable(graph: Graph) -> bool:
    """Attention on a CPU divides by how many heads of queries a head of keys serves. Where that is none it takes the
    process along: a division by zero in C++ is no exception.
    """
    attentions = [node for node in graph.nodes if "scaled_dot_product" in str(node.target)]
    pairs = [[value.shape for value in map(tensor_of, node.args[:2]) if value is not None] for node in attentions]
    return all(query.numel() and key.numel() and query[1] % key[1] == 0 for query, key in pairs)


def _runs(module: GraphModule, inputs: Sequence[Any]) -> bool:
    try:
        with torch.no_grad():
            module(*copies(inputs))
    except Exception:
        return False
    return True
