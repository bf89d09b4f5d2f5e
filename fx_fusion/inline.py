"""Opaque operations replaced by what they are declared to compute, while fusions look at the graph.

Nothing but a fusion may change the graph: :meth:`Inlined.restore` puts every operation back whose results are still
needed. Where nothing was rewritten, the graph is what it was, node for node.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from fx_fusion import box as boxes
from fx_fusion import opset
from fx_fusion.box import Box
from fx_fusion.call_forms import OpaqueCall, Part, operation, read_call
from fx_fusion.comparison import COMPARISONS, Comparison
from fx_fusion.decline import Decline
from fx_fusion.emit import Emitter, fake_mode_of
from fx_fusion.meaning import MEANINGS, WITHOUT_STORE, Meaning, signature_mismatch
from fx_fusion.meaning_trace import NoMeaning, TracedMeaning, complete, is_input, trace
from fx_fusion.meanings import HIDDEN
from fx_fusion.nodes import value_of
from fx_fusion.opset import aten
from fx_fusion.region import strip_aliases
from fx_fusion.sizes import Sizes, admissible_sizes


@dataclass
class _Expansion:
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
    results: list[tuple[int, Part | None, Node]] = field(default_factory=list[tuple[int, "Part | None", Node]])
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


class Inlined:
    """What :func:`inline` did to a graph."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.expansions: list[_Expansion] = []
        self.declined: list[Decline] = []
        self.hidden_stores: list[Decline] = []
        self.hidden_attention: list[Decline] = []
        self._of: dict[Node, _Expansion] = {}
        self._known: set[Node] = set()

    @functools.cached_property
    def sizes(self) -> Sizes:
        """What symbolic sizes stand for where arguments are made up."""
        return admissible_sizes(self._graph.nodes)[0]

    def assumed(self, match: Any) -> list[str]:
        """The assumptions that `match` (whatever a fusion read) rests on, each once."""
        found: dict[str, None] = {}
        seen: set[Node] = set()
        stack = list(_nodes_in(match))
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self._of:
                found[self._of[node].assumption] = None
                stack.extend(node.all_input_nodes)
        return sorted(found)

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
                _refresh(node)

    def _extract(self, expansion: _Expansion, live: set[Node]) -> list[Node]:
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


def _only_moves(node: Node) -> bool:
    return opset.is_movement(node) or node.target is aten.slice_scatter.default


def _is_root(node: Node) -> bool:
    return node.op == "output" or node.target is aten.copy_.default or node.is_impure()


def _mark(live: set[Node], nodes: Iterable[Node]) -> None:
    """Add `nodes`, and what they are computed from."""
    stack = list(nodes)
    while stack:
        node = stack.pop()
        live.add(node)
        stack.extend(parent for parent in node.all_input_nodes if parent not in live)


def _refresh(node: Node) -> None:
    """The node's own fake value, where it has that of an equal computation: a view lies where its operand does."""
    args: Any = map_aggregate(node.args, value_of)
    kwargs: Any = map_aggregate(node.kwargs, value_of)
    with fake_mode_of((args, kwargs, node.meta["val"])):
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def inline(graph: Graph) -> Inlined:
    """Replace every call of an operation with a declared meaning, in place."""
    done = Inlined(graph)
    traced: dict[Any, TracedMeaning | str] = {}
    for node in list(graph.nodes):
        op = operation(node)
        if op is None:
            continue
        hidden = HIDDEN.get(op._schema.name)
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
    op: torch._ops.OpOverload,
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
    expansion = _Expansion(call, meaning, comparison)
    _insert(done._graph, expansion, known)
    _forward_reads(done._graph, expansion)
    done.expansions.append(expansion)


def _fake(value: Any) -> Any:
    return pytree.tree_map(value_of, value, is_leaf=lambda each: isinstance(each, Node))


def _part_value(part: Part) -> torch.Tensor:
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


def _check_outputs(node: Node, op: torch._ops.OpOverload, call: OpaqueCall, traced: TracedMeaning) -> None:
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


def _insert(graph: Graph, expansion: _Expansion, traced: TracedMeaning) -> None:
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
        target = aten.reshape.default if node.target in opset.RESHAPE else node.target
        copied = graph.create_node("call_function", target, args, kwargs, name=name)
        copied.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
        if target in opset.VIEW:
            _refresh(copied)
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


def _put_back(expansion: _Expansion, emit: Emitter, written: dict[str, Node | None]) -> None:
    call = expansion.call
    for i, base in enumerate(call.bases):
        value = base
        for name, part in call.parts.items():
            new = written[name]
            if part.base is base and new is not None:
                value = boxes.put(emit, value, part.box, new, part.order)
                expansion.results.append((call.first_written + i, part, new))
        _lead(expansion, call.first_written + i, value)


def _lead(expansion: _Expansion, index: int, value: Node | None) -> None:
    """Those who read result `index` of the call read `value`, which from now on has the call's strides."""
    if value is None:
        return
    expansion.results.append((index, None, value))
    for held in expansion.call.result(index):
        value.meta["val"] = held.meta["val"]
        expansion.redirect(held, value, list(held.users))


def _forward_reads(graph: Graph, expansion: _Expansion) -> None:
    """Whoever reads a part of a tensor that was written to elsewhere reads the part itself.

    The value columns of a packed projection do not change when query and key are rotated in place; and the rotated
    query is what was written, not the tensor that it was written into. Of an input, a cache, nobody needs to know more
    than which value of it is read.
    """
    for scatter in _scatters(expansion):
        links, root = boxes.chain(scatter)
        if strip_aliases(root).op in ("placeholder", "get_attr"):
            continue
        whole: torch.Tensor = scatter.meta["val"]
        stack: list[tuple[Node, Any, list[Node]]] = [(scatter, whole, [])]
        while stack:
            node, value, steps = stack.pop()
            for user in list(node.users):
                view = _as_alias(user, node, value)
                if view is None:
                    continue
                found = _resolve(links, root, whole, view) if isinstance(view, torch.Tensor) else None
                if found is None:
                    stack.append((user, view, [*steps, user]))
                    continue
                first = user.prev
                with graph.inserting_before(user):
                    now = _read(Emitter(graph, user), *found, [*steps, user], view.shape)
                while first.next is not user:
                    first = first.next
                    expansion.inserted.append(first)
                expansion.redirect(user, now, list(user.users))


def _scatters(expansion: _Expansion) -> list[Node]:
    """Where a value of the expansion is put into a larger tensor, and what is put into that tensor later; and the base
    that the expansion reads, if something was put into it before.
    """
    found: dict[Node, None] = {}
    seen: set[Node] = set()
    stack = [*expansion.call.bases, *(now for _, _, now in expansion.results)]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target is aten.slice_scatter.default:
            found[node] = None
            stack.extend(user for user in node.users if user.target is aten.slice_scatter.default)
            continue
        for user in node.users:
            is_put = user.target is aten.slice_scatter.default and user.args[1] is node
            if is_put or user.target is aten.reshape.default:
                stack.append(user)
    return list(found)


def _as_alias(user: Node, node: Node, value: Any) -> Any:
    """What `user` makes of `value`, which `node` holds, if it is a view of it; else None."""
    if user.target not in opset.VIEW or user.args[0] is not node:
        return None
    target: Any = aten.view.default if user.target is aten.reshape.default else user.target
    args: Any = map_aggregate(user.args[1:], value_of)
    try:
        with fake_mode_of(value):
            return target(value, *args, **user.kwargs)
    except (RuntimeError, ValueError):
        return None


def _resolve(
    links: Sequence[tuple[Box, Node, Node]], root: Node, whole: torch.Tensor, view: torch.Tensor
) -> tuple[Node, Box | None] | None:
    """Where the elements that `view`, a view of the tensor `whole`, reads were before they were put there: which part
    of which value (None: the same part as `view` is).
    """
    box = boxes.box_of(whole, view.shape, view.stride(), view.storage_offset())
    if box is None:
        return None
    for written, value, _ in links:
        if boxes.disjoint(box, written):
            continue
        inside = boxes.within(box, written)
        return None if inside is None else (value, inside)
    return root, None


def _read(emit: Emitter, source: Node, part: Box | None, steps: Sequence[Node], size: Sequence[Any]) -> Node:
    if part is not None:
        return boxes.take(emit, source, part, size)
    for step in steps:
        source = emit.call(step.target, source, *step.args[1:], **step.kwargs)
    return source


def _leaves(value: Any) -> list[Any]:
    return pytree.tree_leaves(value, is_leaf=lambda each: isinstance(each, Node))


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
