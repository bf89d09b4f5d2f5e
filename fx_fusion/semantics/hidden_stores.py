"""Stores whose cache and slots are not in the graph: an operation finds them when it runs, by the name of a layer.

Before fusions look at a graph, :func:`stand_in` spells each such store out, on graph inputs that stand for the layer's
caches and slots::

    done = store(key, value, layer)          k_cache = k_cache.index_put([slots], where(slots >= 0, key, …))
                                             v_cache = v_cache.index_put([slots], where(slots >= 0, value, …))

Afterwards, :meth:`StandIns.settle` turns a fused call on such inputs into an operation that takes the layer's name, and
takes out whatever else was put in. Where nothing was fused, the graph is what it was, node for node.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from fx_fusion.graph.custom_calls import FusedCall, OpaqueCall, operation, read_call
from fx_fusion.graph.edit import STAND_IN, Emitter
from fx_fusion.graph.operations import aten, value_of
from fx_fusion.graph.paths import strip_views

#: Rows of a cache that stands for one whose size is not known.
_ROWS = 1 << 20


@dataclass(frozen=True)
class Named:
    """What :attr:`HiddenStore.insert` put into the graph: q and k rotated, and the results of the operation before."""

    q: Node
    k: Node
    results: tuple[Node, ...]


@dataclass(frozen=True)
class HiddenStore:
    """An operation that stores keys and values in a cache that it finds when it runs.

    It stores nothing for a token whose slot is negative, and rounds nothing before a conversion to the cache's dtype.

    Attributes:
        name: the operation, ``namespace::name``.
        key, value: its arguments, heads of the tokens, [T, Hk, D] each.
        insert: puts the operation that does all of a fused call, with the same cache and slots, before that call.
        unread: calls that take the stored key besides, but never read it, since the cache holds it by then.
    """

    name: str
    key: str
    value: str
    insert: Callable[[Emitter, OpaqueCall, FusedCall], Named]
    unread: Callable[[OpaqueCall], Sequence[Node]] = lambda call: ()


#: By the name in the schema.
_DECLARED: dict[str, HiddenStore] = {}


def declare_hidden_store(store: HiddenStore) -> None:
    """From now on, norm, rotation and this store can be one call. Declaring one again replaces it."""
    _DECLARED[store.name] = store


def withdraw_hidden_store(name: str) -> None:
    """From now on, the operation `name` stays as it is. Withdrawing twice is allowed."""
    _DECLARED.pop(name, None)


def fingerprint() -> str:
    """Changes with what is declared. The functions come with the package, whose sources are hashed elsewhere."""
    return hashlib.sha256("\n".join(sorted(_DECLARED)).encode()).hexdigest()


@dataclass(frozen=True)
class _StandIn:
    """One hidden store, and what stands for it.

    Attributes:
        inputs: slots, the cache of keys and that of values.
        keeps: takes the key, or what the cache holds already.
        stored: the key as it is read from the cache afterwards.
        copies: what puts the new values into the inputs.
        unread: calls that are given the key, and never read it.
    """

    declared: HiddenStore
    call: OpaqueCall
    inputs: tuple[Node, Node, Node]
    keeps: Node
    stored: Node
    copies: tuple[Node, Node]
    unread: Sequence[Node]


class StandIns:
    """What :func:`stand_in` did to a graph."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._all: list[_StandIn] = []

    def __len__(self) -> int:
        return len(self._all)

    def holds(self, node: Node) -> bool:
        """Is `node` a store that is spelled out?"""
        return any(each.call.node is node for each in self._all)

    def add(self, declared: HiddenStore, call: OpaqueCall) -> None:
        """Spell `call` out. Until that is settled, it, and calls that never read the key, read what is stored."""
        key, value = call.arguments[declared.key], call.arguments[declared.value]
        unread = declared.unread(call)
        slots, *caches = inputs = _inputs(self._graph, key, len(self._all))
        with self._graph.inserting_before(call.node):
            emit = Emitter(self._graph, call.node)
            kept = emit.call(aten.reshape.default, emit.call(aten.ge.Scalar, slots, 0), [-1, 1, 1])
            before = [emit.call(aten.index.Tensor, cache, [slots]) for cache in caches]
            new = [emit.call(aten.where.self, kept, *each) for each in zip((key, value), before, strict=True)]
            after = [emit.call(aten.index_put.default, c, [slots], each) for c, each in zip(caches, new, strict=True)]
            stored = emit.call(aten.index.Tensor, after[0], [slots])
        with self._graph.inserting_before(self._graph.output_node()):
            emit = Emitter(self._graph, call.node)
            k_copy, v_copy = (
                emit.call_with_value(value_of(cache), aten.copy_.default, cache, each)
                for cache, each in zip(caches, after, strict=True)
            )
        for node in (call.node, *unread):
            node.replace_input_with(key, stored)
        self._all.append(_StandIn(declared, call, inputs, new[0], stored, (k_copy, v_copy), unread))

    def settle(self, fused_calls: Iterable[FusedCall]) -> None:
        """Take out all that stands for something; a fused call on it becomes the operation that takes a name.

        Args:
            fused_calls: those of the graph as it is now.
        """
        calls = {base: call for call in fused_calls for base in (call.k_cache, call.v_cache)}
        for each in self._all:
            fused = calls.get(each.inputs[1])
            if fused is None:
                _undo(each)
            else:
                self._name(each, fused)
        self._clean()

    def _name(self, each: _StandIn, fused: FusedCall) -> None:
        mixed = (
            (strip_views(fused.tensors["slots"]), fused.k_cache, fused.v_cache) != each.inputs
            or not fused.options["skip_negative_slots"]
            or any(fused.tensors.get(name) is not None for name in ("blocks", "k_scale", "v_scale"))
        )
        if mixed:
            raise AssertionError(f"the fused call {fused.node} stores otherwise than {each.call.node} does")
        with self._graph.inserting_before(fused.node):
            named = each.declared.insert(Emitter(self._graph, each.call.node), each.call, fused)
        for old, new in ((fused.q, named.q), (fused.k, named.k)):
            if old is not None:
                old.replace_all_uses_with(new)
        for i, new in enumerate(named.results):
            for old in each.call.result(i):
                old.replace_all_uses_with(new)
        # What nobody reads has to be there, in the right shape: the value is.
        value = read_call(each.call.node, each.call.op).arguments[each.declared.value]
        for reader in each.unread:
            reader.replace_input_with(each.stored, value)
        self._graph.erase_node(each.call.node)

    def _clean(self) -> None:
        """Erase what depends on a stand-in, and the stand-ins."""
        for each in self._all:
            for node in each.copies:
                self._graph.erase_node(node)
        inputs = [node for each in self._all for node in each.inputs]
        depend = set(inputs)
        for node in self._graph.nodes:
            if any(parent in depend for parent in node.all_input_nodes):
                depend.add(node)
        for node in reversed([node for node in self._graph.nodes if node in depend]):
            self._graph.erase_node(node)


def _undo(each: _StandIn) -> None:
    """The store, and who never reads the key, take what is there for the key now: it may have been replaced."""
    key = each.keeps.args[1]
    assert isinstance(key, Node)
    for node in (each.call.node, *each.unread):
        node.replace_input_with(each.stored, key)


def _inputs(graph: Graph, key: Node, number: int) -> tuple[Node, Node, Node]:
    """Slots [T], and caches [rows, Hk, D] of keys and of values, after the graph's own inputs."""
    like: torch.Tensor = key.meta["val"]
    tokens, *heads = like.shape
    with like.fake_mode:  # type: ignore[attr-defined]
        slots = torch.empty(tokens, dtype=torch.int64, device=like.device)
        caches = [torch.empty(_ROWS, *heads, dtype=like.dtype, device=like.device) for _ in range(2)]
    found: list[Node] = []
    place = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for name, value in zip(("slots", "k_cache", "v_cache"), (slots, *caches), strict=True):
        with graph.inserting_after(place):
            place = graph.placeholder(f"hidden_{name}_{number}")
        place.meta.update({"val": value, STAND_IN: True})
        found.append(place)
    return found[0], found[1], found[2]


def stand_in(graph: Graph) -> StandIns:
    """Spell out every declared store whose key and value are heads of one shape."""
    done = StandIns(graph)
    for node in list(graph.nodes) if _DECLARED else ():
        op = operation(node)
        declared = _DECLARED.get(op._schema.name) if op is not None else None
        if op is None or declared is None:
            continue
        call = read_call(node, op)
        if _is_heads(call.arguments[declared.key], call.arguments[declared.value]):
            done.add(declared, call)
    return done


def _is_heads(key: Any, value: Any) -> bool:
    values = [node.meta["val"] for node in (key, value) if isinstance(node, Node)]
    shapes = [tuple(map(str, each.shape)) for each in values]
    return len(values) == 2 and len(shapes[0]) == 3 and shapes[0] == shapes[1] and values[0].dtype == values[1].dtype
