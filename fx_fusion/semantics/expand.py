"""One opaque call, and what stands in its place while fusions look at the graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from fx_fusion.graph import operations
from fx_fusion.graph import strided as boxes
from fx_fusion.graph.custom_calls import OpaqueCall, WrittenView
from fx_fusion.graph.edit import Emitter, fake_run
from fx_fusion.graph.operations import aten, value_of
from fx_fusion.graph.torch_compat import auto_functionalized_v2, pytree
from fx_fusion.semantics.compare import Comparison
from fx_fusion.semantics.meaning import Meaning
from fx_fusion.semantics.traced import TracedMeaning, complete, is_input


@dataclass
class Expansion:
    """One call, and what stands in its place.

    Attributes:
        inserted: the nodes that were put into the graph, in the order of their dependence.
        results: (which result of the call, which part of it, what now holds that); None is all of it.
        redirected: (user, before, now), in order.
    """

    call: OpaqueCall
    meaning: Meaning
    comparison: Comparison
    inserted: list[Node] = field(default_factory=list[Node])
    results: list[tuple[int, WrittenView | None, Node]] = field(
        default_factory=list[tuple[int, "WrittenView | None", Node]]
    )
    redirected: list[tuple[Node, Node, Node]] = field(default_factory=list[tuple[Node, Node, Node]])

    @property
    def assumption(self) -> str:
        return f"{self.meaning.title} ({self.comparison})"

    def redirect(self, before: Node, now: Node, users: Iterable[Node]) -> None:
        for user in users:
            user.replace_input_with(before, now)
            self.redirected.append((user, before, now))

    def undo(self) -> list[Node]:
        """Whoever still reads what stands in the call's place reads the call again; these nodes."""
        changed: list[Node] = []
        for user, before, now in reversed(self.redirected):
            if now in user.all_input_nodes:
                user.replace_input_with(now, before)
                changed.append(user)
        self.redirected.clear()
        return changed

    def kept(self, live: Set[Node], replaced: Set[Node]) -> Node | None:
        """What else the operation computes, besides `replaced`, that is used outside; None if nothing is."""
        own = set(self.inserted)
        stack = [now for _, _, now in self.results if any(user in live and user not in own for user in now.users)]
        seen: set[Node] = set()
        while stack:
            node = stack.pop()
            if node in seen or node in replaced or node not in own:
                continue
            seen.add(node)
            if not _only_moves(node):
                return node
            stack.extend(node.all_input_nodes)
        return None

    def is_needed(self, live: set[Node], known: set[Node]) -> bool:
        """Does something live read a result that is still computed here, rather than moved out of a fused call?

        A rewrite replaces the last value that is computed; the views of it that follow stay.
        """
        own = set(self.inserted)
        stack = [now for _, _, now in self.results if any(user in live for user in now.users)]
        replaced = not stack
        seen: set[Node] = set()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node not in known:
                replaced = True
            elif node in own:
                if not _only_moves(node):
                    return True
                stack.extend(node.all_input_nodes)
        return not replaced


def _only_moves(node: Node) -> bool:
    return operations.is_movement(node) or node.target is aten.slice_scatter.default


def insert(graph: Graph, expansion: Expansion, traced: TracedMeaning) -> None:
    """The meaning's nodes before the call, what it wrote put back into the bases, and the call's users led there."""
    call = expansion.call
    first = call.node.prev
    with graph.inserting_before(call.node):
        emit = Emitter(graph, call.node)
        given: dict[str, Any] = dict(call.arguments)
        for name, part in call.parts.items():
            given[name] = boxes.take(emit, part.base, part.box, part.size, part.order)
        inputs = [leaf for leaf in _leaves(complete(call.op, given)) if is_input(value_of(leaf))]
        values = _splice(graph, emit, call, traced, inputs)
        outputs = [_own(emit, values.get(out), inputs) for out in traced.outputs]
        for i, value in enumerate(outputs[: call.returns]):
            _lead(expansion, i, value)
        written = dict(zip(call.written, outputs[call.first_written :], strict=True))
        if call.node.target is auto_functionalized_v2:
            _put_back(expansion, emit, written)
        else:
            for i, name in enumerate(call.written):
                _lead(expansion, call.first_written + i, written[name])
    node = first.next
    while node is not call.node:
        expansion.inserted.append(node)
        node = node.next


def _splice(
    graph: Graph, emit: Emitter, call: OpaqueCall, traced: TracedMeaning, inputs: Sequence[Node]
) -> dict[Any, Any]:
    """Copies of the meaning's nodes; what now holds each of its values. Sizes are the graph's own."""
    values: dict[Any, Any] = {}
    names = iter(inputs)

    def value_here(argument: Any) -> Any:
        return values[argument] if isinstance(argument, Node) else argument

    for node in traced.module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(names)
            continue
        if node.op != "call_function":
            continue
        if isinstance(node.meta.get("val"), torch.SymInt):
            values[node] = emit.size(node.meta["val"])
            continue
        name = f"{call.op._opname}_{node.name}"
        args, kwargs = map_aggregate((node.args, node.kwargs), value_here)
        # Inductor's graphs hold no strict views at this point: what is viewed may get other strides by a rewrite.
        target = aten.reshape.default if node.target in operations.RESHAPE else node.target
        copied = graph.create_node("call_function", target, args, kwargs, name=name)
        copied.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
        if target in operations.VIEW:
            refresh(copied)
        for key in ("stack_trace", "nn_module_stack"):
            if key in call.node.meta:
                copied.meta[key] = call.node.meta[key]
        values[node] = copied
    return values


def _own(emit: Emitter, value: Node | None, inputs: Sequence[Node]) -> Node | None:
    """`value`, or a node of its own where the meaning passes an argument on."""
    if value is None or value not in inputs:
        return value
    return emit.call(aten.reshape.default, value, list(value.meta["val"].shape))


def _put_back(expansion: Expansion, emit: Emitter, written: dict[str, Node | None]) -> None:
    call = expansion.call
    for i, base in enumerate(call.bases):
        value = base
        for name, part in call.parts.items():
            new = written[name]
            if part.base is base and new is not None:
                value = boxes.put(emit, value, part.box, new, part.order)
                expansion.results.append((call.first_written + i, part, new))
        _lead(expansion, call.first_written + i, value)


def _lead(expansion: Expansion, index: int, value: Node | None) -> None:
    """Those who read result `index` of the call read `value`, which from now on has the call's strides."""
    if value is None:
        return
    expansion.results.append((index, None, value))
    for held in expansion.call.result(index):
        value.meta["val"] = held.meta["val"]
        expansion.redirect(held, value, list(held.users))


def refresh(node: Node) -> None:
    """The node's own fake value, where it has that of an equal computation: a view lies where its operand does."""
    node.meta["val"] = fake_run(node, node.meta["val"])


def _leaves(value: Any) -> list[Any]:
    return pytree.tree_leaves(value, is_leaf=lambda each: isinstance(each, Node))
