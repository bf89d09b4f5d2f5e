"""Can all calls of a fusion be made, each after what it takes and before what takes its results?

A call that gives several results needs all its tensors before the first of them. Each place by itself may be in order,
and two together not: where one's second tensor needs the other's first result, and the reverse.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch.fx import Node

from fx_fusion.decline import Decline
from fx_fusion.function_fusions.misses import Miss
from fx_fusion.function_fusions.place import Place
from fx_fusion.graph.analysis import GraphAnalysis


def in_order(analysis: GraphAnalysis, places: Sequence[Place]) -> tuple[list[Place], list[Decline]]:
    """Places that can be rewritten together, the earlier ones first served, and what is said of the others."""
    if all(_is_plain(analysis, place) for place in places) or _is_acyclic(analysis, places):
        return list(places), []
    kept: list[Place] = []
    declines: list[Decline] = []
    for place in places:
        if _is_acyclic(analysis, [*kept, place]):
            kept.append(place)
            continue
        found = "the call for {0} would need a result of another call of this fusion, which needs one of it"
        declines.append(Miss("region.not_convex", found, place.results))
    return kept, declines


def _is_plain(analysis: GraphAnalysis, place: Place) -> bool:
    """Do all its tensors stand before all its results?"""
    order = analysis.order
    return max(map(order.__getitem__, place.tensors.values())) < min(map(order.__getitem__, place.results))


def _is_acyclic(analysis: GraphAnalysis, places: Iterable[Place]) -> bool:
    needs: Mapping[Node, Sequence[Node]] = {
        result: tuple(place.tensors.values()) for place in places for result in place.results
    }
    done: set[Node] = set()
    open_: set[Node] = set()
    for root in analysis.nodes:
        stack = [root] if root in analysis.live else []
        while stack:
            node = stack[-1]
            if node in done:
                stack.pop()
                continue
            missing = [parent for parent in needs.get(node, node.all_input_nodes) if parent not in done]
            if not missing:
                done.add(node)
                open_.discard(node)
                stack.pop()
            elif any(parent in open_ for parent in missing) or node in open_:
                return False
            else:
                open_.add(node)
                stack.extend(missing)
    return True
