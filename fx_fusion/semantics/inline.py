"""Opaque operations replaced by what they are declared to compute, while fusions look at the graph.

Nothing but a fusion may change the graph: :meth:`Inlined.restore` puts every operation back whose results are still
needed. Where nothing was rewritten, the graph is what it was, node for node.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Set
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from fx_fusion.decline import Decline
from fx_fusion.graph import strided as boxes
from fx_fusion.graph.custom_calls import OpaqueCall, WrittenView, operation, read_call
from fx_fusion.graph.edit import Emitter
from fx_fusion.graph.operations import aten, value_of
from fx_fusion.graph.sizes import Sizes, admissible_sizes
from fx_fusion.graph.torch_compat import OpOverload, pytree
from fx_fusion.semantics.compare import COMPARISONS
from fx_fusion.semantics.declare import MEANINGS
from fx_fusion.semantics.expand import Expansion, insert, refresh
from fx_fusion.semantics.forward import forward_reads
from fx_fusion.semantics.hidden_stores import StandIns
from fx_fusion.semantics.libraries import HIDDEN
from fx_fusion.semantics.meaning import WITHOUT_STORE, Meaning, signature_mismatch
from fx_fusion.semantics.traced import NoMeaning, TracedMeaning, complete, trace


class Inlined:
    """What :func:`inline` did to a graph."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.expansions: list[Expansion] = []
        self.declined: list[Decline] = []
        self.hidden_stores: list[Decline] = []
        self.hidden_attention: list[Decline] = []
        self._of: dict[Node, Expansion] = {}
        self._known: set[Node] = set()

    @functools.cached_property
    def sizes(self) -> Sizes:
        """What symbolic sizes stand for where arguments are made up."""
        return admissible_sizes(self._graph.nodes)[0]

    def assumed(self, match: Any) -> list[str]:
        """What `match` (whatever a fusion read) rests on: each meaning once, with the worst of its comparisons."""
        found: dict[str, Expansion] = {}
        seen: set[Node] = set()
        stack = list(_nodes_in(match))
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self._of:
                expansion = self._of[node]
                title = expansion.meaning.title
                found[title] = max(found.get(title, expansion), expansion, key=_doubt)
                stack.extend(node.all_input_nodes)
        return sorted(expansion.assumption for expansion in found.values())

    def check_stores(self, live: Set[Node], writers: Iterable[Node], replaced: Set[Node]) -> None:
        """An operation that stores what a call is to store must do nothing else: it would stay and store once more,
        into the cache as it was, which would be copied.

        Raises:
            Decline: ``meaning.stays``
        """
        for expansion in [self._of[writer] for writer in writers if writer in self._of]:
            kept = expansion.kept(live, replaced)
            if kept is not None:
                found = (
                    f"{expansion.call.op} stores, and computes more than that ({kept}), so the store cannot be fused"
                )
                raise Decline("meaning.stays", f"{found}. {WITHOUT_STORE}", [expansion.call.node])

    def restore(self, *, rewritten: bool) -> None:
        """Put back every operation whose results are still needed; what stands in its place becomes dead.

        What a fused call reads of an inlined computation (rows of angles, say) stays.
        """
        if not rewritten:
            for expansion in reversed(self.expansions):
                expansion.undo()
                for node in reversed(expansion.inserted):
                    if not node.users:
                        self._graph.erase_node(node)
            return
        live: set[Node] = set()
        _mark(live, [node for node in self._graph.nodes if _is_root(node)])
        for expansion in reversed(self.expansions):
            if expansion.is_needed(live, self._known):
                _mark(live, [user for user in expansion.undo() if user in live])
                _mark(live, self._extract(expansion, live))
        for node in self._graph.nodes:
            if node in live and node in self._of:
                refresh(node)

    def _extract(self, expansion: Expansion, live: set[Node]) -> list[Node]:
        """Nodes that a rewrite made, and that read what the operation computes, read its results; these nodes."""
        own = set(expansion.inserted)
        changed: list[Node] = []
        for index, part, now in expansion.results:
            users = [user for user in now.users if user in live and user not in own]
            if not users:
                continue
            with self._graph.inserting_after(expansion.call.node):
                emit = Emitter(self._graph, expansion.call.node)
                held = next(iter(expansion.call.result(index)), None)
                held = held or emit.call(operator.getitem, expansion.call.node, index)
            if part is not None:
                with self._graph.inserting_after(held):
                    held = boxes.take(Emitter(self._graph, held), held, part.box, part.size, part.order)
            for user in users:
                user.replace_input_with(now, held)
            changed.extend(users)
        return changed


def _doubt(expansion: Expansion) -> float:
    difference = expansion.comparison.difference
    return float("inf") if difference is None else difference


def _is_root(node: Node) -> bool:
    return node.op == "output" or node.target is aten.copy_.default or node.is_impure()


def _mark(live: set[Node], nodes: Iterable[Node]) -> None:
    """Add `nodes`, and what they are computed from."""
    stack = list(nodes)
    while stack:
        node = stack.pop()
        live.add(node)
        stack.extend(parent for parent in node.all_input_nodes if parent not in live)


def inline(graph: Graph, stand_ins: StandIns) -> Inlined:
    """Replace every call of an operation with a declared meaning, in place, but for stores that are spelled out."""
    done = Inlined(graph)
    traced: dict[Any, TracedMeaning | str] = {}
    for node in list(graph.nodes):
        op = operation(node)
        if op is None:
            continue
        hidden = HIDDEN.get(op._schema.name)
        if stand_ins.holds(node) or (hidden is not None and hidden.attention and len(stand_ins)):
            continue
        if hidden is not None:
            decline = Decline("meaning.hidden", f"{op._schema.name} {hidden.reason}", [node])
            (done.hidden_attention if hidden.attention else done.hidden_stores).append(decline)
            continue
        meaning = MEANINGS.of(op)
        if meaning is None:
            continue
        try:
            _expand(done, node, op, meaning, traced)
        except Decline as decline:
            done.declined.append(decline)
    done._of = {node: expansion for expansion in done.expansions for node in expansion.inserted}
    done._known = set(graph.nodes)
    return done


def _expand(
    done: Inlined,
    node: Node,
    op: OpOverload,
    meaning: Meaning,
    traced: dict[Any, TracedMeaning | str],
) -> None:
    assert meaning.fn is not None
    problem = signature_mismatch(op, meaning.fn)
    if problem is not None:
        raise Decline("meaning.schema", problem, [node])
    call = read_call(node, op)
    sample = {name: _fake(value) for name, value in call.arguments.items()}
    sample |= {name: _part_value(part) for name, part in call.parts.items()}
    sample = complete(op, sample)
    key = (meaning.name, *_signature(sample))
    try:
        known = traced.get(key) or trace(meaning.fn, op, sample, call.written)
    except NoMeaning as error:
        known = str(error)
    if isinstance(known, str):
        traced[key] = known
        raise Decline("meaning.raises", f"the meaning of {op} cannot be used here: {known}", [node])
    if not known.strided:
        traced[key] = known
    _check_outputs(node, op, call, known)
    comparison = COMPARISONS.of(meaning, op, sample, call.written, done.sizes)
    if comparison.differs:
        raise Decline("meaning.mismatch", f"{op} and its meaning differ: {comparison}", [node])
    expansion = Expansion(call, meaning, comparison)
    insert(done._graph, expansion, known)
    forward_reads(done._graph, expansion)
    done.expansions.append(expansion)


def _fake(value: Any) -> Any:
    return pytree.tree_map(value_of, value, is_leaf=lambda each: isinstance(each, Node))


def _part_value(part: WrittenView) -> torch.Tensor:
    """The view of a base that an operation writes, on fake tensors."""
    value: torch.Tensor = part.base.meta["val"]
    with value.fake_mode:  # type: ignore[attr-defined]
        for target, *args in boxes.views(value, part.box, part.size, part.order):
            value = target(value, *args)
    return value


def _signature(sample: dict[str, Any]) -> tuple[Any, ...]:
    """What the traced meaning depends on. Not where in memory a tensor begins: layers may be parts of one."""
    leaves, spec = pytree.tree_flatten(sample)
    return (str(spec), *(_leaf_signature(leaf) for leaf in leaves))


def _leaf_signature(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        sizes = (*leaf.shape, *leaf.stride())
        return (leaf.dtype, str(leaf.device), leaf.dim(), *map(str, sizes))
    return (type(leaf).__name__, str(leaf))


def _check_outputs(node: Node, op: OpOverload, call: OpaqueCall, traced: TracedMeaning) -> None:
    """The results have the shapes and dtypes that the operation's own fake implementation gives."""
    for i in range(call.returns):
        actual = traced.outputs[i]
        for held in call.result(i):
            expected = held.meta["val"]
            found = None if actual is None else actual.meta["val"]
            if _kind(found) != _kind(expected):
                reason = f"result {i} of {op} is {_words(expected)}, its meaning gives {_words(found)}"
                raise Decline("meaning.outputs", reason, [node])


def _kind(value: Any) -> Any:
    return (value.dtype, tuple(map(str, value.shape))) if isinstance(value, torch.Tensor) else type(value)


def _words(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _nodes_in(value: Any) -> Iterable[Node]:
    """The nodes that dataclasses, containers and attributes of `value` hold."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        each = stack.pop()
        if isinstance(each, Node):
            yield each
        elif id(each) in seen:
            continue
        elif is_dataclass(each) and not isinstance(each, type):
            seen.add(id(each))
            stack.extend(getattr(each, one.name) for one in fields(each))
        elif isinstance(each, dict):
            seen.add(id(each))
            stack.extend((*each.keys(), *each.values()))
        elif isinstance(each, (list, tuple, set, frozenset)):
            seen.add(id(each))
            stack.extend(each)
