"""Reads of a tensor that a call wrote only a part of, led to what they really read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from fx_fusion.graph import operations
from fx_fusion.graph import strided as boxes
from fx_fusion.graph.edit import Emitter, fake_mode_of
from fx_fusion.graph.operations import aten, value_of
from fx_fusion.graph.paths import strip_aliases
from fx_fusion.graph.strided import Box
from fx_fusion.semantics.expand import Expansion


def forward_reads(graph: Graph, expansion: Expansion) -> None:
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


def _scatters(expansion: Expansion) -> list[Node]:
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
    if user.target not in operations.VIEW or user.args[0] is not node:
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
