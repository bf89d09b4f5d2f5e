"""The fusions that a pass applies. The built-in one enters as any other does."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from torch.fx import Graph

from fx_fusion.decline import Decline
from fx_fusion.facts import Facts
from fx_fusion.kernels.contract import Problem


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

    def describe(self, match: Any) -> tuple[str, dict[str, Any], float, Problem]:
        """For the report: in words, as data, the proof's error; and what kernels are asked."""
        ...

    def check(self, facts: Facts, match: Any) -> None:
        """Raises Decline if the rewrite would not be safe where the match stands."""
        ...

    def rewrite(self, graph: Graph, match: Any, kernel: str) -> None: ...


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
        _check(fusion)
        if any(known.name == fusion.name for known in self._fusions):
            raise ValueError(
                f"a fusion named {fusion.name!r} is registered already; remove it first, or choose another name"
            )
        self._fusions.append(fusion)
        return Handle(self._fusions, fusion)

    def fingerprint(self) -> str | None:
        """Changes whenever a registered fusion's code does; None if some code cannot be read."""
        digest = hashlib.sha256()
        for fusion in self:
            source = _source(type(fusion))
            if source is None:
                return None
            digest.update(f"{fusion.name}\n{source}\n{sorted(vars(fusion).items())!r}".encode())
        return digest.hexdigest()


def _check(fusion: Any) -> None:
    if not isinstance(getattr(fusion, "name", None), str):
        raise TypeError(f"register_fusion: expected a Fusion with a string attribute 'name', got {fusion!r}")
    missing = [method for method in _methods() if not callable(getattr(fusion, method, None))]
    if missing:
        raise TypeError(
            f"register_fusion: fusion {fusion.name!r} lacks {', '.join(missing)}; see fx_fusion.registry.Fusion"
        )


def _methods() -> Iterable[str]:
    return ("find", "read", "describe", "check", "rewrite")


def _source(cls: type) -> str | None:
    try:
        return inspect.getsource(inspect.getmodule(cls) or cls)
    except (OSError, TypeError):
        return None


REGISTRY = Registry()


def register_fusion(fusion: Any = None) -> Any:
    """Add a fusion for all later compilations.

    Either ``handle = register_fusion(MyFusion())``, or as a decorator of a class without constructor arguments::

        @register_fusion
        class MyFusion: ...

    Args:
        fusion: an object (or a class) with the methods of :class:`fx_fusion.registry.Fusion`.

    Returns:
        A :class:`Handle` with `remove`; as a decorator, the class.

    Raises:
        TypeError: a method is missing.
        ValueError: the name is taken.
    """
    if fusion is None:
        return _decorate
    return _decorate(fusion) if isinstance(fusion, type) else REGISTRY.add(fusion)


def _decorate(cls: Callable[[], Any]) -> Any:
    REGISTRY.add(cls())
    return cls
