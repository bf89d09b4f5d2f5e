"""Where does the graph write its caches, what is written, and which stores belong to one layer?

A functional graph writes an input by copying its last value back at the end. From there the way leads back through
what puts a part of the cache back (``select_scatter``, ``slice_scatter``, ``as_strided_scatter``) to what writes:

* ``index_put``, ``index_copy`` and ``scatter`` write a value at indices into a view of the cache;
* a scatter whose value is no part of the cache writes it into a slice, as ``cache[:, start : start + n] = k`` does.
"""

from __future__ import annotations

import heapq
import itertools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.graph import operations
from fx_fusion.graph.analysis import GraphAnalysis, freeze
from fx_fusion.graph.custom_calls import operation
from fx_fusion.graph.operations import aten, node_of
from fx_fusion.graph.paths import alias_steps, angles_after_projection, strip_aliases, strip_views
from fx_fusion.graph.sizes import same


@dataclass(frozen=True)
class Mask:
    """``where`` stores a token if `flag` says so (or does not, if `inverted`), else what the cache held already."""

    where: Node
    flag: Node
    inverted: bool


@dataclass(frozen=True)
class Join:
    """``node`` joins two values that are stored at once; a store's own is the one at `position`.

    `after` are the steps that convert what was joined.
    """

    node: Node
    position: int
    after: frozenset[Node]


@dataclass(frozen=True)
class Store:
    """``writer`` puts ``value`` into ``view``, a view of the graph input ``cache``, which is then updated in place.

    Where the view is but a part of the cache (keys and values, or several layers, in one tensor), ``scatters`` put the
    part back, the innermost first. An operation that writes two parts at once takes both out before it puts the first
    one back: then the view is of an earlier value of the cache, and ``since`` tells what was stored in the meantime.
    Where keys and values are joined into one ``value``, each is a store of its own.
    """

    cache: Node
    view: Node
    writer: Node
    value: Node
    scatters: tuple[Node, ...] = ()
    mask: Mask | None = None
    since: tuple[Store, ...] = ()
    join: Join | None = None

    @property
    def own(self) -> Node:
        """The value, or of a join this store's part of it."""
        return joined(self.join.node)[self.join.position] if self.join else self.value

    @property
    def others(self) -> list[Node]:
        """What is joined with the store's own part."""
        return [part for part in joined(self.join.node) if part is not self.own] if self.join else []

    @property
    def base(self) -> Node:
        """The cache's value before this store: ``cache`` itself, or what an earlier store left."""
        return strip_aliases(self.scatters[-1].args[0] if self.scatters else self.view)

    @property
    def after(self) -> Node:
        """The cache's value after this store, as far as the graph names it."""
        return self.scatters[-1] if self.scatters else self.writer

    @property
    def views(self) -> list[Node]:
        """The steps from ``base``, or an earlier value of the cache, to ``view``."""
        return alias_steps(strip_aliases(self.view), self.view)

    @property
    def keeps_order(self) -> bool:
        """Are the elements of ``after`` in the order of those of ``base``, whatever their shapes?"""
        steps = self.part(self.scatters[-1]) if self.scatters else self.views
        return all(step.target in operations.RESHAPE or step.target is aten.alias.default for step in steps)

    @property
    def into_slice(self) -> bool:
        """Is the value put into a slice of the view, rather than at indices?"""
        return self.writer.target in operations.SCATTERS

    @property
    def last_steps(self) -> list[Node]:
        """From what takes the value, a mask or a copy, to the writer."""
        steps = [self.writer]
        while steps[-1] is not self.value:
            source = steps[-1].args[operations.WRITERS.get(steps[-1].target, 1)]
            steps.append(node_of(self.value if self.mask and steps[-1] is self.mask.where else source))
        return steps[:-1]

    def steps_from(self, analysis: GraphAnalysis, source: Node) -> list[Node]:
        """The steps from `source`, on the way to the store's own part, to the value."""
        if self.join is None:
            return analysis.between(source, [self.value])[1:]
        return analysis.between(source, [self.own])[1:] + analysis.between(self.join.node, [self.value])

    def part(self, scatter: Node) -> list[Node]:
        """The steps from ``base`` to the part of it that `scatter` changes a part of."""
        return alias_steps(self.base, node_of(scatter.args[0]))


_JOINS = (aten.cat.default, aten.stack.default)
_INTEGER_CACHES = (torch.uint8, torch.int8)


def find_stores(analysis: GraphAnalysis) -> tuple[list[Store], list[Decline]]:
    """Every in-place cache store of the graph, and a decline for each input that is mutated some other way.

    Integers are no cache, but for bytes that hold a float8.
    """
    stores: list[Store] = []
    declined: list[Decline] = []
    for node in analysis.nodes:
        if node.op != "call_function" or node.target is not aten.copy_.default:
            continue
        cache, final = node_of(node.args[0]), node_of(node.args[1])
        is_float = operations.is_float_tensor(cache)
        if not is_float and cache.meta["val"].dtype not in _INTEGER_CACHES:
            continue
        try:
            chain = _stores_into(analysis, cache, final)
        except Decline as decline:
            declined.extend([decline] if is_float else [])
            continue
        strange = [store for store in chain if not stored_dtype(store).is_floating_point]
        if strange:
            found = f"the cache {cache} holds {stored_dtype(strange[0])}; expected a float or the bytes of a float8"
            declined.append(Decline("store.integer_cache", found, [strange[0].writer]))
            continue
        stores.extend(chain)
    return _without_outsiders(analysis, stores, declined), declined


def joined(node: Node) -> list[Node]:
    """What `node` joins; empty if it joins nothing."""
    return list(node.args[0]) if node.op == "call_function" and node.target in _JOINS else []  # type: ignore[arg-type]


def stored_dtype(store: Store) -> torch.dtype:
    """What the cache's elements are: of bytes, the float8 that they spell."""
    node = store.value
    while operations.is_movement(node) or operations.is_reinterpretation(node):
        source = node_of(node.args[0])
        if operations.is_reinterpretation(node) and operations.is_float_tensor(source):
            return source.meta["val"].dtype
        node = source
    return store.view.meta["val"].dtype


def _without_outsiders(analysis: GraphAnalysis, stores: list[Store], declined: list[Decline]) -> list[Store]:
    """Stores of what this graph computed, each value once."""
    kept: list[Store] = []
    seen: dict[int, Store] = {}
    for store in sorted(stores, key=lambda store: analysis.order[store.writer]):
        source = store.value
        while _keeps_elements(source):
            source = node_of(source.args[0])
        number = analysis.value_number(source)
        if source.op == "placeholder":
            found = f"{store.writer} stores {source}, a graph input: was it computed before a graph break?"
            declined.append(Decline("store.value_is_input", found, [store.writer]))
        elif number in seen:
            found = f"{source} is stored into {seen[number].cache}, and by {store.writer} into {store.cache} again"
            declined.append(Decline("store.value_twice", found, [store.writer]))
        else:
            seen[number] = store
            kept.append(store)
    return kept


def _keeps_elements(node: Node) -> bool:
    """Does `node` hold what its input does, all of it, elsewhere or in another dtype?"""
    if not (operations.is_movement(node) or operations.is_cast(node) or operations.is_reinterpretation(node)):
        return False
    after, before = node.meta["val"], node_of(node.args[0]).meta["val"]
    return isinstance(before, torch.Tensor) and same([before.numel()], [after.numel()])


def _stores_into(analysis: GraphAnalysis, cache: Node, final: Node) -> list[Store]:
    """The stores that make `final` of `cache`, the first one first. Raises Decline at a step that is no store."""
    found: list[Store] = []
    node = strip_aliases(final)
    while node is not cache:
        store = _read_store(analysis, cache, node)
        if store.base.op in ("placeholder", "get_attr") and store.base is not cache:
            raise _unknown(cache, store.base)
        if store.base is not cache and not store.scatters and not store.into_slice:
            found_twice = f"{store.writer} stores into all of {cache}, after an earlier store into it"
            raise Decline("store.repeated", found_twice, [store.writer])
        found.append(store)
        node = store.base
    found.reverse()
    for earlier, later in itertools.pairwise(found):
        if not earlier.keeps_order:
            told = f"{later.writer} stores into {cache} after {earlier.writer}, which reorders its dimensions"
            raise Decline("store.cache_not_viewable", told, [later.writer, earlier.writer])
    return [replace(store, since=_since(store, found[:i])) for i, store in enumerate(found)]


def _since(store: Store, earlier: Sequence[Store]) -> tuple[Store, ...]:
    """Of `earlier`, the stores before `store` in order, those that its view does not see."""
    seen = strip_aliases(store.view)
    first = next((i for i, other in enumerate(earlier) if other.base is seen), len(earlier))
    return tuple(earlier[first:])


def _read_store(analysis: GraphAnalysis, cache: Node, node: Node) -> Store:
    scatters: list[Node] = []
    writer = node
    while writer.target in operations.SCATTERS:
        inner = strip_aliases(writer.args[1])
        if not _writes(inner) or not _was(strip_aliases(writer.args[0]), strip_aliases(inner.args[0])):
            break
        scatters.append(writer)
        writer = inner
    if not _writes(writer):
        raise _unknown(cache, writer)
    written = node_of(writer.args[operations.WRITERS.get(writer.target, 1)])
    if writer.target in operations.SCATTERS and written.target is aten.copy.default:
        written = node_of(written.args[1])
    store = Store(cache, node_of(writer.args[0]), writer, written, tuple(scatters[::-1]))
    if any(strip_aliases(scatter.args[0]) is not store.base for scatter in scatters):
        found = f"{scatters[0]} puts what {writer} stored into another tensor than it was taken from"
        raise Decline("store.cache_not_viewable", found, [scatters[0]])
    if scatters and not store.keeps_order:
        found = f"{scatters[0]} puts what {writer} stored into {cache} with its dimensions in another order"
        raise Decline("store.cache_not_viewable", found, [scatters[0]])
    return _read_mask(analysis, store)


def _was(value: Node, earlier: Node) -> bool:
    """Is `earlier` what the tensor `value` is, or was before something was stored into it?"""
    while value is not earlier and _writes(value):
        value = strip_aliases(value.args[0])
    return value is earlier


def _writes(node: Node) -> bool:
    return node.op == "call_function" and (node.target in operations.WRITERS or node.target in operations.SCATTERS)


def _unknown(cache: Node, node: Node) -> Decline:
    if node.op in ("placeholder", "get_attr"):
        found = f"the input {cache} is overwritten with {node}, or with what is stored into it: another tensor"
        return Decline("store.other_cache", found, [node])
    if node.target in operations.ADDERS:
        return Decline("store.accumulates", f"{node} adds to the cache; expected it to overwrite", [node])
    call = node_of(node.args[0]) if node.target is operator.getitem else node
    op = operation(call)
    if op is not None:
        found = f"the input {cache} is written by {op}, an opaque operation; say what it stores where: "
        found += f'fx_fusion.declare_meaning("{op.name()}", …)'
        return Decline("store.unknown_writer", found, [call])
    found = f"the input {cache} is overwritten with the result of {node.target}, which is no store at indices or slices"
    return Decline("store.unknown_writer", found, [node])


def _read_mask(analysis: GraphAnalysis, store: Store) -> Store:
    """Of ``where(flag, value, cache[slots])``, stored at the same slots, the value and the flag.

    Raises:
        Decline: ``store.accumulates`` for ``value + cache[slots]``.
    """
    node = store.value
    if node.op != "call_function":
        return store
    if node.target is aten.add.Tensor and any(_reads_back(analysis, store, arg) for arg in node.args):
        raise Decline("store.accumulates", f"{node} adds to what the cache holds; expected it to overwrite", [node])
    if node.target is not aten.where.self:
        return store
    flag, *arms = map(node_of, node.args)
    old = [_reads_back(analysis, store, arm) for arm in arms]
    if old.count(True) != 1:
        return store
    value = arms[old.index(False)]
    return Store(store.cache, store.view, store.writer, value, store.scatters, Mask(node, flag, inverted=old[0]))


def _reads_back(analysis: GraphAnalysis, store: Store, node: Any) -> bool:
    """Is `node` what `store` is about to overwrite, element by element?"""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    writer = store.writer
    if store.into_slice:
        reader, place = operations.SCATTERS[writer.target], writer.args[2:]
    elif writer.target is aten.index_put.default:
        reader, place = aten.index.Tensor, writer.args[1:2]
    else:
        return False

    def key(source: Any, arguments: Sequence[Any]) -> tuple[Any, ...]:
        return analysis.value_number(source), freeze(list(arguments), analysis.numbers)

    return node.target is reader and key(node.args[0], node.args[1:]) == key(store.view, place)


# --- which stores belong to one layer ---------------------------------------------------------------------------------


def pair_stores(
    analysis: GraphAnalysis, stores: Sequence[Store]
) -> tuple[list[tuple[Store, Store, Node]], list[Store]]:
    """Stores of one layer, with the value they both come from; and the stores left over.

    All stores walk towards the inputs together, latest node first. The hidden state of a layer depends on everything
    before it, so the stores of a later layer meet, and leave the walk, before those of an earlier layer do.
    """
    carried: dict[Node, dict[int, None]] = {}
    heap: list[int] = []

    def visit(node: Node, tags: Iterable[int]) -> None:
        if node not in carried:
            carried[node] = {}
            heapq.heappush(heap, -analysis.order[node])
        carried[node].update(dict.fromkeys(tags))

    for i, store in enumerate(stores):
        visit(store.own, [i])
    pairs: list[tuple[Store, Store, Node]] = []
    met: set[int] = set()
    while heap:
        node = analysis.nodes[-heapq.heappop(heap)]
        tags = [tag for tag in carried.pop(node) if tag not in met]
        if len(tags) == 2:
            a, b = sorted(tags)
            pairs.append((stores[a], stores[b], strip_views(node)))
            met.update(tags)
            continue
        for parent in node.all_input_nodes if tags else ():
            if not operations.is_symbolic(parent):
                visit(parent, tags)
    pairs.reverse()
    return pairs, [store for i, store in enumerate(stores) if i not in met]


def tell_key_from_value(analysis: GraphAnalysis, a: Store, b: Store, origin: Node) -> tuple[Store, Store]:
    """The key is rotated: more tensors besides the data feed it. Raises Decline if neither or both could be."""
    wide_a, wide_b = (angles_after_projection(analysis, origin, store.own) for store in (a, b))
    if wide_a == wide_b:
        data = (next(filter(operations.is_opaque, reversed(analysis.between(origin, [s.own]))), origin) for s in (a, b))
        found = (
            f"{a.own} and {b.own} are both fed by {wide_a} tensors besides their data, {' and '.join(map(str, data))}; "
            "expected a rotated key and a copied value, after the last matrix product"
        )
        raise Decline("rope.missing" if wide_a == 0 else "split.v_not_copied", found, [a.own, b.own])
    return (a, b) if wide_a > wide_b else (b, a)
