"""The fusions that a pass applies. The built-in one enters as any other does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from torch.fx import Graph

from fx_fusion.decline import Decline
from fx_fusion.fingerprint import Unreadable, fingerprint
from fx_fusion.graph.analysis import Facts
from fx_fusion.kernels.target import Target


class Fusion(Protocol):
    """What can be fused: finding is structural, reading proves, rewriting changes the graph.

    A match is whatever `read` returns; it goes unchanged to the other methods. None keeps state between calls.
    """

    name: str

    def find(self, facts: Facts) -> tuple[list[Any], list[Decline]]:
        """Candidates in graph order (each with an ``anchor`` node), and what can be none."""
        ...

    def read(self, facts: Facts, candidate: Any, memo: dict[object, Any]) -> Any:
        """A proved match. Raises Decline. `memo` is one dict a graph, for work that equal layers share."""
        ...

    def describe(self, match: Any) -> tuple[str, dict[str, Any], float]:
        """For the report: in words, as data, and the proof's error."""
        ...

    def eligible(self, match: Any) -> dict[str, str | None]:
        """For each fast kernel: what it objects to, wherever it may run; None for nothing."""
        ...

    def choose(self, match: Any, kernel: str, target: Target) -> str:
        """What is to be called on `target` where the option ``fx_fusion.kernel`` is `kernel`.

        Raises Decline where the match is to be reported and left alone, KernelUnavailable where a kernel was asked for
        by name and cannot serve.
        """
        ...

    def check(self, facts: Facts, match: Any) -> None:
        """Raises Decline if the rewrite would not be safe where the match stands."""
        ...

    def rewrite(self, graph: Graph, match: Any, kernel: str) -> None:
        """Put a call of `kernel`, as `choose` named it, in the place of the match."""
        ...


class Handle:
    """A registration; `remove` ends it."""

    def __init__(self, fusions: list[Fusion], fusion: Fusion) -> None:
        self._fusions = fusions
        self.fusion = fusion

    def remove(self) -> None:
        """Later compilations no longer apply the fusion. Removing twice is allowed."""
        if self.fusion in self._fusions:
            self._fusions.remove(self.fusion)


class Registry:
    """Fusions in the order in which they are tried."""

    def __init__(self) -> None:
        self._fusions: list[Fusion] = []

    def __iter__(self) -> Iterator[Fusion]:
        return iter(tuple(self._fusions))

    def add(self, fusion: Fusion) -> Handle:
        check_fusion(fusion)
        if any(known.name == fusion.name for known in self._fusions):
            raise ValueError(
                f"a fusion named {fusion.name!r} is registered already; remove it first, or choose another name"
            )
        self._fusions.append(fusion)
        return Handle(self._fusions, fusion)

    def replace(self, fusions: Iterable[Fusion]) -> None:
        """Have exactly these, in this order."""
        self._fusions[:] = fusions

    def fingerprint(self) -> str | None:
        """Changes whenever a registered fusion's code does; None if some code cannot be read."""
        try:
            parts = [fingerprint(getattr(fusion, "identity", fusion)) for fusion in self]
        except Unreadable:
            return None
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def check_fusion(fusion: Any) -> None:
    if not isinstance(getattr(fusion, "name", None), str):
        raise TypeError(f"register_fusion: expected a Fusion with a string attribute 'name', got {fusion!r}")
    missing = [method for method in _methods() if not callable(getattr(fusion, method, None))]
    if missing:
        raise TypeError(
            f"register_fusion: fusion {fusion.name!r} lacks {', '.join(missing)}; see fx_fusion.fusion.Fusion"
        )


def _methods() -> Iterable[str]:
    return ("find", "read", "describe", "eligible", "choose", "check", "rewrite")


REGISTRY = Registry()
