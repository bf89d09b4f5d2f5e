"""What came near and is no match, said so that it can be said again of an equal place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from torch.fx import Node

from fx_fusion.decline import Decline


class Miss(Decline):
    """A decline whose sentence names its nodes: ``{0}`` the first, ``{1}`` the second, …"""

    def __init__(self, code: str, sentence: str, nodes: Iterable[Node] = (), reached: str = "") -> None:
        nodes = tuple(nodes)
        found = sentence
        for i, node in enumerate(nodes):
            found = found.replace(f"{{{i}}}", str(node))
        super().__init__(code, found, nodes, reached)
        self.sentence = sentence


def relocated(decline: Decline, at: Mapping[Node, Node]) -> Decline:
    """The same of other nodes."""
    nodes = [at.get(node, node) for node in decline.nodes]
    if isinstance(decline, Miss):
        return Miss(decline.code, decline.sentence, nodes, decline.reached)
    return Decline(decline.code, decline.found, nodes, decline.reached)


class Searched(Protocol):
    """What a search leaves behind."""

    nearest: list[tuple[Node, Decline]]
    missing: list[list[object]]
    anchors: int


def misses(name: str, searches: Sequence[Searched], covered: set[Node], found: bool) -> list[Decline]:
    """What the fusion `name` has to say of where it does not stand: what came near, of each place the furthest attempt;
    if nothing was found and nothing came near, why not.
    """
    by_anchor: dict[Node, Decline] = {}
    for anchor, decline in (each for search in searches for each in search.nearest):
        known = by_anchor.get(anchor)
        if anchor not in covered and (known is None or decline.stage > known.stage):
            by_anchor[anchor] = decline
    compared = [decline for decline in by_anchor.values() if decline.code != "fusion.no_match"]
    if found or compared:
        return compared
    if by_anchor:
        furthest = next(iter(by_anchor.values()))
        places = f"{len(by_anchor)} places of the graph could be {name}, and none is"
        return [Decline("fusion.no_match", f"{places}; at the first, {furthest.found}", furthest.nodes)]
    looked = sum(search.anchors for search in searches)
    if looked:
        return [Decline("fusion.no_match", f"{looked} places of the graph could be {name}; none takes such tensors")]
    absent = dict.fromkeys(shown(mark) for search in searches for missing in search.missing for mark in missing[:1])
    if absent:
        return [Decline("fusion.absent", f"{name} needs {' or '.join(absent)}, and the graph has none")]
    return [Decline("fusion.absent", f"the graph computes nothing that {name} could be")]


def shown(mark: object) -> str:
    """A rare step, for people."""
    if isinstance(mark, tuple):
        return f"a cast to {mark[1]}" if mark[0] == "cast" else str(mark[1] or mark[0])
    kinds = {"root": "a root", "exponential": "an exponential", "product": "a matrix product"}
    return kinds.get(str(mark), str(mark))
