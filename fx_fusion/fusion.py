"""What a fusion is, and the registry of those that a pass applies. The built-in one enters as any other does."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from torch.fx import Graph, Node

from fx_fusion.decline import Decline
from fx_fusion.fingerprint import Unreadable, fingerprint
from fx_fusion.graph.analysis import GraphAnalysis
from fx_fusion.kernels.target import Target
from fx_fusion.proof.evidence import Evidence


class Candidate(Protocol):
    """A place of a graph where a fusion could be. Reports name it by `anchor`."""

    @property
    def anchor(self) -> Node: ...


C = TypeVar("C", bound=Candidate)
M = TypeVar("M")


@dataclass(frozen=True)
class Assessment:
    """What one match comes to.

    Attributes:
        words: what was read off, for people.
        reading: the same for programs.
        known: what the proof found, about which the option ``fx_fusion.trust`` decides; or the largest relative
            difference to the replacement, where samples are all there is.
        eligible: for each fast kernel, what it objects to, wherever it may run; None for nothing.
    """

    words: str
    reading: dict[str, Any]
    known: Evidence | float
    eligible: dict[str, str | None] = field(default_factory=dict[str, "str | None"])


@dataclass(frozen=True)
class NodeRole:
    """What one node is in a layer.

    Attributes:
        role: ``data``, ``split``, ``norm``, ``rope``, ``store``, ``lookup`` (angles from their table) or ``operand``.
        branch: ``q``, ``k``, ``v``, or empty for what they share.
        finding: what a reader read off this very node.
    """

    role: str
    branch: str = ""
    finding: str | None = None


class Fusion(ABC, Generic[C, M]):
    """What can be fused: finding is structural, reading proves, rewriting changes the graph.

    `C` is what `find` returns, `M`, a match, what `read` returns; it goes unchanged to the other methods. None keeps
    state between calls. In order, and each once a candidate: read, assess, check, stores, choose, rewrite.
    """

    #: In reports, and where fusions are chosen by name.
    name: str = ""

    @abstractmethod
    def find(self, analysis: GraphAnalysis) -> tuple[list[C], list[Decline]]:
        """Candidates in graph order, and what can be none."""

    @abstractmethod
    def read(self, analysis: GraphAnalysis, candidate: C, memo: dict[object, Any]) -> M:
        """A proved match. Raises Decline. `memo` is one dict a graph, for work that equal layers share."""

    @abstractmethod
    def assess(self, match: M) -> Assessment:
        """For the report. Raises Decline where a reader stops only now."""

    @abstractmethod
    def check(self, analysis: GraphAnalysis, match: M) -> None:
        """Raises Decline if the rewrite would not be safe where the match stands."""

    @abstractmethod
    def choose(self, match: M, kernel: str, target: Target) -> str:
        """What is to be called on `target` where the option ``fx_fusion.kernel`` is `kernel`.

        Raises Decline where the match is to be reported and left alone, KernelUnavailable where a kernel was asked for
        by name and cannot serve.
        """

    @abstractmethod
    def rewrite(self, graph: Graph, match: M, kernel: str) -> None:
        """Put a call of `kernel`, as `choose` named it, in the place of the match."""

    # --- what a fusion may leave as it is -----------------------------------------------------------------------------

    @property
    def identity(self) -> Any:
        """What compile caches must know of it; by default its class and its attributes."""
        return self

    def absent(self, analysis: GraphAnalysis) -> Decline | None:
        """What to say of a graph where nothing was found; None for nothing. It is told where no fusion says more."""
        return None

    def stores(self, match: M) -> tuple[list[Node], set[Node]]:
        """What writes caches, and all that a call replaces; nothing for a fusion that stores nothing."""
        return [], set()

    def roles(self, analysis: GraphAnalysis, match: M) -> dict[Node, NodeRole]:
        """The role of each node of the match, for ``explain``; empty if there is nothing to tell."""
        return {}

    def region(self, analysis: GraphAnalysis, candidate: C, fault: Node | None) -> list[Node]:
        """What ``explain`` shows of a candidate that has no roles; `fault` is the node that a decline is about."""
        return [candidate.anchor, *([] if fault is None else [fault])]


AnyFusion = Fusion[Any, Any]


class Handle:
    """A registration; `remove` ends it."""

    def __init__(self, fusions: list[AnyFusion], fusion: AnyFusion) -> None:
        self._fusions = fusions
        self.fusion = fusion

    def remove(self) -> None:
        """Later compilations no longer apply the fusion. Removing twice is allowed."""
        if self.fusion in self._fusions:
            self._fusions.remove(self.fusion)


class Registry:
    """Fusions in the order in which they are tried."""

    def __init__(self) -> None:
        self._fusions: list[AnyFusion] = []

    def __iter__(self) -> Iterator[AnyFusion]:
        return iter(tuple(self._fusions))

    def add(self, fusion: AnyFusion) -> Handle:
        check_fusion(fusion)
        if any(known.name == fusion.name for known in self._fusions):
            raise ValueError(
                f"a fusion named {fusion.name!r} is registered already; remove it first, or choose another name"
            )
        self._fusions.append(fusion)
        return Handle(self._fusions, fusion)

    def replace(self, fusions: Iterable[AnyFusion]) -> None:
        """Have exactly these, in this order."""
        self._fusions[:] = fusions

    def fingerprint(self) -> str | None:
        """Changes whenever a registered fusion's code does; None if some code cannot be read."""
        try:
            parts = [fingerprint(fusion.identity) for fusion in self]
        except Unreadable:
            return None
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def check_fusion(fusion: object) -> None:
    """Raises TypeError unless `fusion` is an object of a subclass of :class:`Fusion` that has a name."""
    if not isinstance(fusion, Fusion):
        raise TypeError(f"register_fusion: expected an object of a subclass of fx_fusion.Fusion, got {fusion!r}")
    if not fusion.name:
        raise TypeError(f"register_fusion: {type(fusion).__name__} has no name; set the attribute 'name'")


REGISTRY = Registry()
