"""Is the rewrite safe where it stands, and in a captured graph? Static, on fake tensors, before anything changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.fx import Node

from fx_fusion import opset
from fx_fusion.decline import Decline
from fx_fusion.facts import Facts


def check_devices(operands: Iterable[Node]) -> None:
    """Every tensor that the kernel dereferences lies on one device."""
    places: dict[torch.device, Node] = {}
    for node in operands:
        places.setdefault(node.meta["val"].device, node)
    if len(places) > 1:
        found = ", ".join(f"{node} on {device}" for device, node in places.items())
        raise Decline("placement.device", f"expected every operand on one device, found {found}", list(places.values()))


def check_convex(facts: Facts, operands: Sequence[Node], results: Iterable[Node]) -> None:
    """No result of the call may be needed to compute one of its operands."""
    for result in results:
        path = facts.between(result, operands)
        if path:
            raise Decline(
                "region.not_convex", f"{path[-1]} is an operand of the call and depends on {result}", [path[-1], result]
            )


def check_old_cache(facts: Facts, cache: Node, writers: Sequence[Node], operands: Sequence[Node]) -> None:
    """Whoever reads the cache from before the store must be ordered before the call, or the cache would be copied."""
    for reader in _readers(facts, cache, writers):
        if not any(facts.between(reader, [operand]) for operand in operands):
            raise Decline("store.old_cache_read", f"{reader} reads {cache} as it was before the store", [reader])


def _readers(facts: Facts, cache: Node, writers: Sequence[Node]) -> Iterable[Node]:
    stack = [cache]
    while stack:
        node = stack.pop()
        for user in facts.users(node):
            if user.target in opset.VIEW:
                stack.append(user)
            elif not (user in writers and user.args[0] is node) and user.target is not opset.aten.copy_.default:
                yield user


def check_cache_address(cache: Node) -> None:
    """The cache must live at a stable address: a graph input, a parameter or a buffer."""
    if cache.op not in ("placeholder", "get_attr"):
        raise Decline("placement.cache", f"the cache {cache} is computed by the graph; expected a graph input", [cache])
