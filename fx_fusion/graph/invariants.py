"""What holds of every graph after a rewrite, as a table that can be run: :data:`RULES`.

Each rule yields a sentence for everything that breaks it. They are run after each rewrite under ``fx_fusion.strict``,
and in the package's own tests; a break is an error of a fusion's, never of the user's program.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from fx_fusion.graph import operations
from fx_fusion.graph.edit import EMITTED, fake_run
from fx_fusion.graph.operations import aten
from fx_fusion.graph.paths import strip_aliases
from fx_fusion.graph.sizes import depends_on_data, same, steps
from fx_fusion.graph.torch_compat import (
    auto_functionalized,
    auto_functionalized_v2,
    get_mutable_args,
    pytree,
    triton_kernel_wrapper_functional,
)

#: Run them after every rewrite, whatever the options say.
ALWAYS = False


class Violation(AssertionError):
    """A graph is not what it must be after a rewrite."""


class Held(NamedTuple):
    """What the graph returned in one place: its fake value, and which tensor it shared memory with: an input by name,
    or the first result that is a view of the same value.
    """

    value: Any
    alias: str | int


@dataclass(frozen=True)
class Before:
    """What a graph was before a rewrite, as far as it must stay so.

    Attributes:
        inputs: the names of its placeholders.
        held: the arguments of each node.
        writes: what copies a value back into an input, in order.
        effects: what else must happen, in order: what draws random numbers, what checks, what is impure.
        results: what it returns.
    """

    inputs: tuple[str, ...]
    held: dict[Node, tuple[Any, Any]]
    writes: tuple[Node, ...]
    effects: tuple[Node, ...]
    results: tuple[Held, ...]

    @staticmethod
    def of(graph: Graph) -> Before:
        nodes = list(graph.nodes)
        return Before(
            tuple(node.name for node in nodes if node.op == "placeholder"),
            {node: (node.args, node.kwargs) for node in nodes},
            tuple(node for node in nodes if _copies_back(node)),
            tuple(node for node in nodes if _has_effect(node)),
            tuple(_results(graph)),
        )


def check(before: Before, graph: Graph, *, ordered: bool) -> None:
    """Raise Violation for what breaks one of :data:`RULES`.

    Args:
        ordered: the graph is in order again; else the rules about order wait until it is.
    """
    broken = [
        f"{rule.name}: {found}"
        for rule in RULES
        if ordered or not rule.needs_order
        for found in rule.broken(before, graph)
    ]
    if broken:
        raise Violation("after a rewrite the graph is not what it must be:\n  " + "\n  ".join(broken))


# --- the rules --------------------------------------------------------------------------------------------------------


def _in_order(before: Before, graph: Graph) -> Iterator[str]:
    """Every value is computed before it is used."""
    seen: set[Node] = set()
    for node in graph.nodes:
        late = next((parent for parent in node.all_input_nodes if parent not in seen), None)
        if late is not None:
            yield f"{node} comes before {late}, which it reads"
        seen.add(node)


def _acyclic(before: Before, graph: Graph) -> Iterator[str]:
    """No value is needed to compute itself, and none comes from outside the graph."""
    nodes = set(graph.nodes)
    waiting = {node: len(node.all_input_nodes) for node in nodes}
    ready = [node for node, count in waiting.items() if not count]
    done = 0
    while ready:
        node = ready.pop()
        done += 1
        for user in node.users:
            if user not in waiting:
                yield f"{user}, which is not in the graph, reads {node}"
                continue
            waiting[user] -= 1
            if not waiting[user]:
                ready.append(user)
    if done < len(nodes):
        stuck = next(node for node in graph.nodes if waiting[node])
        strange = next((parent for parent in stuck.all_input_nodes if parent not in nodes), None)
        yield f"{stuck} reads {strange}, which is not in the graph" if strange else f"{stuck} lies on a cycle"


def _same_inputs(before: Before, graph: Graph) -> Iterator[str]:
    """The graph takes what it took."""
    now = tuple(node.name for node in graph.nodes if node.op == "placeholder")
    if now != before.inputs:
        yield f"the inputs are {list(now)}, they were {list(before.inputs)}"


def _same_results(before: Before, graph: Graph) -> Iterator[str]:
    """The graph returns as many values as it did, of the same dtypes, shapes and devices."""
    now = list(_results(graph))
    if len(now) != len(before.results):
        yield f"{len(now)} values are returned, {len(before.results)} were"
    for i, (held, then) in enumerate(zip(now, before.results, strict=False)):
        if not _is_alike(held.value, then.value):
            yield f"result {i} is {_words(held.value)}, it was {_words(then.value)}"


def _same_aliases(before: Before, graph: Graph) -> Iterator[str]:
    """Results share memory with the inputs, and with each other, that they shared it with."""
    for i, (held, then) in enumerate(zip(_results(graph), before.results, strict=False)):
        if held.alias != then.alias:
            yield f"result {i} shares memory with {held.alias}, it did with {then.alias}"


def _fake_values(before: Before, graph: Graph) -> Iterator[str]:
    """The fake value of whatever is new, or reads something else than it did, is what its arguments make of it."""
    live = _live(graph)
    for node in graph.nodes:
        if node not in live or node.op != "call_function" or before.held.get(node) == (node.args, node.kwargs):
            continue
        if "val" not in node.meta:
            yield f"{node} has no fake value"
        elif not _copies_back(node) and not depends_on_data(node.meta["val"]):
            yield from _differs(node)


def _no_write_is_lost(before: Before, graph: Graph) -> Iterator[str]:
    """Each input that was written is written, once; and what a call writes into an input arrives there."""
    writes = [node for node in graph.nodes if _copies_back(node)]
    targets, were = [node.args[0] for node in writes], [node.args[0] for node in before.writes]
    if targets != were:
        yield f"{list(map(str, targets))} are written, {list(map(str, were))} were"
    live, values = _live(graph), {target: _values_of(node) for target, node in zip(targets, writes, strict=True)}
    for call in _calls(graph):
        for base, result in written_by(call) if call in live else ():
            cache = _input_of(base)
            if cache is not None and (result is None or result not in values.get(cache, ())):
                yield f"what {call} writes into {cache} does not arrive there"


def _effects_stay(before: Before, graph: Graph) -> Iterator[str]:
    """What draws random numbers, checks or is impure is neither dropped nor made twice."""
    now = [node for node in graph.nodes if _has_effect(node)]
    for node in set(before.effects) ^ set(now):
        yield f"{node} ({node.target}) is {'gone' if node in before.effects else 'new'}"


def _effects_in_order(before: Before, graph: Graph) -> Iterator[str]:
    """They happen in the order that they happened in."""
    known = set(before.effects)
    now = [node for node in graph.nodes if node in known]
    if len(now) == len(known) and now != list(before.effects):
        yield f"{list(map(str, now))} happen in this order, it was {list(map(str, before.effects))}"


def _no_stale_reader(before: Before, graph: Graph) -> Iterator[str]:
    """Nobody reads, after a call has written a cache, what the cache was before: it would have to be copied."""
    order, live = {node: i for i, node in enumerate(graph.nodes)}, _live(graph)
    for call in _calls(graph):
        for base, _ in written_by(call) if call in live else ():
            for reader in _readers(strip_aliases(base)):
                if reader in live and reader is not call and order[reader] > order[call]:
                    yield f"{reader} reads {base} as it was before {call}"


class Rule(NamedTuple):
    name: str
    broken: Callable[[Before, Graph], Iterator[str]]
    needs_order: bool = False


RULES: tuple[Rule, ...] = (
    Rule("no cycle", _acyclic),
    Rule("topological order", _in_order, needs_order=True),
    Rule("inputs", _same_inputs),
    Rule("results", _same_results),
    Rule("aliases", _same_aliases),
    Rule("fake values", _fake_values, needs_order=True),
    Rule("writes", _no_write_is_lost),
    Rule("effects", _effects_stay),
    Rule("order of effects", _effects_in_order, needs_order=True),
    Rule("old cache", _no_stale_reader, needs_order=True),
)


# --- what they ask ----------------------------------------------------------------------------------------------------


def written_by(call: Node) -> list[tuple[Node, Node | None]]:
    """The tensors that `call` writes, functionally, and what holds each one afterwards."""
    if call.target is auto_functionalized_v2:
        bases: Sequence[Node] = call.kwargs["_all_bases"]  # type: ignore[assignment]
        returns = len(call.args[0]._schema.returns) or 1  # type: ignore[union-attr]
        return [(base, _item(call, returns + i)) for i, base in enumerate(bases)]
    if call.target is auto_functionalized:
        op: Any = call.args[0]
        names, _ = get_mutable_args(op)
        returns = len(op._schema.returns) or 1
        held = [(call.kwargs.get(name), _item(call, returns + i)) for i, name in enumerate(names)]
        return [(base, result) for base, result in held if isinstance(base, Node)]
    if call.target is triton_kernel_wrapper_functional:
        given: Any = call.kwargs["kwargs"]
        names: Any = call.kwargs["tensors_to_clone"]
        return [(given[name], _item(call, name)) for name in names]
    return []


def _item(call: Node, key: Any) -> Node | None:
    found = (user for user in call.users if user.target is operator.getitem and user.args[1] == key)
    return next(found, None)


def _calls(graph: Graph) -> Iterator[Node]:
    """What rewrites put into the graph to write tensors."""
    return (node for node in graph.nodes if node.meta.get(EMITTED) and written_by(node))


def _input_of(node: Node) -> Node | None:
    """The input that `node` is a value of, as far as views, stores and calls lead back to one."""
    seen: set[Node] = set()
    while node not in seen:
        seen.add(node)
        node = strip_aliases(node)
        if node.op in ("placeholder", "get_attr"):
            return node
        before = _value_before(node)
        if not before:
            return None
        node = before[0]
    return None


def _value_before(node: Node) -> list[Node]:
    """What the tensor that `node` is a value of was before the last write into it; of a part put back, that too."""
    if node.op != "call_function":
        return []
    if node.target in operations.SCATTERS:
        return [each for each in node.args[:2] if isinstance(each, Node)]
    if node.target in operations.WRITERS:
        return [node.args[0]]  # type: ignore[list-item]
    if node.target is operator.getitem and isinstance(node.args[0], Node):
        return [base for base, result in written_by(node.args[0]) if result is node]
    return []


def _values_of(write: Node) -> set[Node]:
    """Every value that the written input has, from the last one back, with the views of it."""
    found: set[Node] = set()
    stack = [write.args[1]]
    while stack:
        node = stack.pop()
        if not isinstance(node, Node) or node in found:
            continue
        found.add(node)
        root = strip_aliases(node)
        stack.extend([root] if root is not node else _value_before(node))
    return found


def _live(graph: Graph) -> set[Node]:
    """What the graph returns, writes or does, and what that is computed from."""
    stack = [node for node in graph.nodes if node.op == "output" or _copies_back(node) or _has_effect(node)]
    live: set[Node] = set()
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack.extend(node.all_input_nodes)
    return live


def _readers(base: Node) -> Iterable[Node]:
    """What reads `base`, through views or as it is."""
    stack, seen = [base], {base}
    while stack:
        for user in stack.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if user.target in operations.VIEW:
                stack.append(user)
            elif not _copies_back(user):
                yield user


def _copies_back(node: Node) -> bool:
    return node.op == "call_function" and node.target is aten.copy_.default


def _has_effect(node: Node) -> bool:
    return node.op == "call_function" and not _copies_back(node) and (operations.draws(node) or node.is_impure(False))


def _results(graph: Graph) -> Iterator[Held]:
    roots: dict[Node, int] = {}
    for i, leaf in enumerate(pytree.tree_leaves(graph.output_node().args, is_leaf=lambda each: isinstance(each, Node))):
        if not isinstance(leaf, Node):
            yield Held(leaf, i)
            continue
        root = strip_aliases(leaf)
        alias = root.name if root.op in ("placeholder", "get_attr") else roots.setdefault(root, i)
        yield Held(leaf.meta.get("val"), alias)


def _is_alike(value: Any, other: Any) -> bool:
    """Of the same dtype, shape and device. Symbols are compared as they are now: some may have become one."""
    if not isinstance(value, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(value) is type(other)
    return (value.dtype, value.device) == (other.dtype, other.device) and same(value.shape, other.shape)


def _differs(node: Node) -> Iterator[str]:
    try:
        derived = pytree.tree_leaves(fake_run(node, node.meta["val"]))
    except Exception as error:
        yield f"{node} cannot be run on the fake values of its arguments: {type(error).__name__}: {error}"
        return
    for value, right in zip(pytree.tree_leaves(node.meta["val"]), derived, strict=True):
        if not isinstance(right, torch.Tensor):
            continue
        if not _is_alike(value, right) or not same(steps(value), steps(right)):
            yield f"{node} ({node.target}) is said to be {_words(value)}, its arguments make it {_words(right)}"


def _words(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return f"{value.dtype} {list(value.shape)} of strides {list(value.stride())} on {value.device}"
