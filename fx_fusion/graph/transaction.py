"""Edits of a graph that are kept whole or undone whole: one that raises leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch.fx import Graph, Node

Key = TypeVar("Key")
Edit = Callable[[], None]


def apply_each(graph: Graph, edits: Mapping[Key, Edit], *, one_by_one: bool = False) -> dict[Key, Exception]:
    """Make each of `edits` in turn. Where one raises, the graph is, node for node, what it was before that edit.

    Remembering a graph takes time linear in its nodes, so it is done once, and again before each edit only after one
    has failed: then all are made once more from the beginning.

    Args:
        edits: each changes `graph` alone, and does the same whenever it is called.
        one_by_one: no edit may be made twice.

    Returns:
        What each failing edit raised.
    """
    if not one_by_one:
        before = Checkpoint(graph)
        try:
            for edit in edits.values():
                edit()
        except Exception:
            before.restore()
        else:
            return {}
    failed: dict[Key, Exception] = {}
    for key, edit in edits.items():
        before = Checkpoint(graph)
        try:
            edit()
        except Exception as error:
            before.restore()
            failed[key] = error
    return failed


class Checkpoint:
    """A graph as it is now: its nodes and their order, what each one is, holds and is used by, and all names.

    Attributes of the module that owns the graph belong to it; the tensors behind them do not.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._nodes = [_Held(node) for node in graph.nodes]
        self._insert = graph._insert
        self._names = [_copied(each) for each in vars(graph._graph_namespace).values()]
        self._module = {name: _copied(value) for name, value in vars(graph.owning_module or _NO_MODULE).items()}

    def restore(self) -> None:
        """Undo whatever has happened to the graph since; may be done again later."""
        graph = self._graph
        known = {held.node for held in self._nodes}
        for held in self._nodes:
            if held.node._erased:
                _revive(graph, held.node)
        for held in self._nodes:
            held.restore()
        strangers = [node for node in graph.nodes if node not in known]
        for node in strangers:
            node.args, node.kwargs = (), {}
        for node in strangers:
            graph.erase_node(node)
        for held in self._nodes:
            graph._root.prepend(held.node)
            held.restore_users()
        graph._insert = self._insert
        for now, then in zip(vars(graph._graph_namespace).values(), self._names, strict=True):
            _refill(now, then)
        _restore_module(graph.owning_module or _NO_MODULE, self._module)


class _Held:
    """All that a node is."""

    __slots__ = ("args", "kwargs", "meta", "name", "node", "target", "type", "users")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.name, self.target, self.type = node.name, node.target, node.type
        self.args, self.kwargs = node.args, node.kwargs
        self.meta = dict(node.meta)
        self.users = tuple(node.users)

    def restore(self) -> None:
        node = self.node
        if node.target is not self.target:
            node.target = self.target
        if node.args is not self.args:
            node.args = self.args
        if node.kwargs is not self.kwargs:
            node.kwargs = self.kwargs
        if (node.name, node.type) != (self.name, self.type):
            node.name, node.type = self.name, self.type
        _refill(node.meta, self.meta)

    def restore_users(self) -> None:
        """They are the same again; their order may not be."""
        _refill(self.node.users, dict.fromkeys(self.users))


class _NoModule:
    """Stands for the owner of a graph that has none."""


_NO_MODULE = _NoModule()


def _revive(graph: Graph, node: Node) -> None:
    """Take back a node that was erased, anywhere; its arguments are gone."""
    node._prev = node._next = node  # of the list that it was in
    node._erased = False
    graph._root.prepend(node)
    graph._find_nodes_lookup_table.insert(node)
    graph._len += 1


def _restore_module(module: Any, before: Mapping[str, Any]) -> None:
    now = vars(module)
    for name in [name for name in now if name not in before]:
        del now[name]
    for name, value in before.items():
        if isinstance(value, dict) and isinstance(now.get(name), dict):
            _refill(now[name], value)
        elif now.get(name) is not value and not isinstance(value, (dict, set)):
            now[name] = value


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, set)) else value


def _refill(now: Any, before: Any) -> None:
    """Give a container its contents back; whoever holds it keeps holding it. Values are the same or are not: tensors
    cannot be compared.
    """
    if isinstance(now, dict):
        unchanged = list(now) == list(before) and all(now[key] is value for key, value in before.items())
    else:
        unchanged = not isinstance(now, set) or now == before
    if not unchanged:
        now.clear()
        now.update(before)
