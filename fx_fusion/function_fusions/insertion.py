"""The replacement in the place of the region."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from fx_fusion.decline import Decline
from fx_fusion.function_fusions.fakes import FakeCopies
from fx_fusion.function_fusions.layout import laid_out_like
from fx_fusion.function_fusions.place import Place
from fx_fusion.graph import operations
from fx_fusion.graph.edit import Emitter, fake_run
from fx_fusion.graph.operations import aten, value_of
from fx_fusion.graph.tracing import Functional, NotTraceable, trace

#: Key in ``meta`` of a node that a rewrite replaced: by which node.
_REPLACED = "fx_fusion_replaced_by"


class Traces:
    """Replacements traced on what stands in one graph, each once for all places that look alike."""

    def __init__(self) -> None:
        self._known: dict[object, Functional] = {}

    def of(self, place: Place, replacement: Callable[..., Any]) -> Functional:
        """`replacement`, called with what stands at `place`."""
        values = {name: node.meta["val"] for name, node in place.tensors.items()}
        others = repr(sorted(place.others.items(), key=str))
        key = (id(replacement), others, tuple((name, _described(value)) for name, value in values.items()))
        if key not in self._known:
            try:
                self._known[key] = trace(replacement, values, place.others)
            except NotTraceable as error:
                raise Decline("fusion.replacement_fails", f"traced, the replacement raises {error}") from error
        return self._known[key]


def _described(value: torch.Tensor) -> tuple[str, ...]:
    """All that a replacement may depend on but the values."""
    return (str(value.dtype), str(tuple(value.shape)), str(value.stride()), str(value.device))


def insert(graph: Graph, place: Place, traced: Functional) -> None:
    """Call the `traced` replacement in the place of the region. The graph is left unsorted: see ``tidy.finish``."""
    tensors = {name: _current(node) for name, node in place.tensors.items()}
    with graph.inserting_before(place.results[-1]):
        emit = Emitter(graph, place.anchor)
        copied: dict[Node, Any] = {traced.inputs[name]: node for name, node in tensors.items()}
        fakes = FakeCopies()
        for old, new in copied.items():
            fakes.know(old.meta["val"], new.meta["val"])
        for node in traced.nodes:
            copied[node] = _copy(emit, node, copied, fakes)
        pairs = [(old, laid_out_like(emit, copied[new], old.meta["val"])) for old, new in corresponding(place, traced)]
    for old, node in pairs:
        old.replace_all_uses_with(node)
        old.meta[_REPLACED] = node


def corresponding(place: Place, replacement: Functional) -> list[tuple[Node, Node]]:
    """Each result of the region, and what the replacement gives for it."""
    pattern = place.pattern.example(place.variant).traced
    pairs = list(zip(pattern.returned, replacement.returned, strict=True))
    pairs += [(pattern.mutated[name], replacement.mutated[name]) for name in pattern.mutated]
    return [(place.results[theirs], replacement.results[ours]) for theirs, ours in pairs]


def _copy(emit: Emitter, node: Node, copied: Mapping[Node, Any], fakes: FakeCopies) -> Node:
    args, kwargs = map_aggregate((node.args, node.kwargs), lambda a: copied[a] if isinstance(a, Node) else a)
    target = aten.reshape.default if node.target in operations.RESHAPE else node.target
    new = emit.call_with_value(None, target, *args, **kwargs)
    new.meta["val"] = fakes.value(node, lambda: fake_run(new, node.meta.get("val")))
    if operations.is_opaque(node):
        # A custom operation or a kernel launch gets its tensors with the strides that they have here.
        new.meta["eager_input_vals"] = map_aggregate((tuple(args), dict(kwargs)), value_of)
    return new


def _current(node: Node) -> Node:
    while _REPLACED in node.meta:
        node = node.meta[_REPLACED]
    return node
