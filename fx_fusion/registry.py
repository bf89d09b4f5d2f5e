"""The fusions that a pass applies. The built-in one enters as any other does."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch.fx import Graph

from fx_fusion.decline import Decline
from fx_fusion.facts import Facts
from fx_fusion.fingerprint import Unreadable, fingerprint
from fx_fusion.kernels.contract import Target
from fx_fusion.own.function_fusion import PLATFORMS, Check, FunctionFusion


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
        _check(fusion)
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


def _check(fusion: Any) -> None:
    if not isinstance(getattr(fusion, "name", None), str):
        raise TypeError(f"register_fusion: expected a Fusion with a string attribute 'name', got {fusion!r}")
    missing = [method for method in _methods() if not callable(getattr(fusion, method, None))]
    if missing:
        raise TypeError(
            f"register_fusion: fusion {fusion.name!r} lacks {', '.join(missing)}; see fx_fusion.registry.Fusion"
        )


def _methods() -> Iterable[str]:
    return ("find", "read", "describe", "eligible", "choose", "check", "rewrite")


REGISTRY = Registry()


def register_fusion(
    fusion: Any = None,
    *,
    pattern: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None,
    replacement: Callable[..., Any] | None = None,
    check: Check | None = None,
    name: str | None = None,
    example: Mapping[str, Any] | Sequence[Any] | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> Any:
    """Add a fusion for all later compilations, in the order of registration.

    With plain PyTorch functions::

        handle = register_fusion(pattern=rms_norm, replacement=my_rms_norm, name="rms_norm")

    as a decorator of the replacement::

        @register_fusion(pattern=rms_norm)
        def my_rms_norm(x, weight, eps): ...

    with an object, ``register_fusion(MyFusion())``, or as a decorator of a class without constructor arguments.

    Args:
        fusion: an object (or a class) with the methods of :class:`fx_fusion.registry.Fusion`.
        pattern: what to find: a function, or several with the same parameters (alternatives). A parameter is a tensor
            of the graph, unless annotated otherwise: ``int`` and ``float`` are numbers read off the graph,
            ``Tensor | None`` is an optional part, ``bool`` and ``Literal`` are alternatives. It may change its tensor
            arguments in place, call custom operations, and return several tensors. Sizes, dtypes and strides are those
            of each match.
        replacement: what to put there: takes the parameters of the pattern, by name, returns what it returns and
            changes what it changes.
        check: called with each proved match (:class:`fx_fusion.Found`); False, or a sentence, declines it.
        name: in the report; by default the name of the pattern.
        example: a value for each parameter, in order or by name: small tensors (of which rank, sizes and dtype count)
            and numbers. Needed only where none can be made up.
        platforms: where to rewrite, of ``cpu``, ``cuda`` and ``hip``; elsewhere a match is reported as recognised.

    Returns:
        A :class:`Handle` with `remove`; as a decorator, the class or function.

    Raises:
        TypeError: a method or a parameter is missing or means nothing here.
        ValueError: the name is taken, the pattern cannot be traced, or the replacement differs from it (on the example,
            on the CPU; what cannot run there is compared at its first match).
    """
    if pattern is not None or replacement is not None:
        return _register_functions(fusion, pattern, replacement, check, name, example, platforms)
    if fusion is None:
        return _decorate
    return _decorate(fusion) if isinstance(fusion, type) else REGISTRY.add(fusion)


def _register_functions(
    fusion: Any,
    pattern: Callable[..., Any] | Sequence[Callable[..., Any]] | None,
    replacement: Callable[..., Any] | None,
    check: Check | None,
    name: str | None,
    example: Mapping[str, Any] | Sequence[Any] | None,
    platforms: Sequence[str],
) -> Any:
    if fusion is not None:
        raise TypeError("register_fusion: expected either a fusion, or pattern= and replacement=, got both")
    if pattern is None:
        raise TypeError("register_fusion: replacement= is given without pattern=")

    def add(function: Callable[..., Any]) -> Handle:
        made = FunctionFusion(pattern, function, check=check, name=name, example=example, platforms=platforms)
        return REGISTRY.add(made)

    if replacement is not None:
        return add(replacement)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        add(function)
        return function

    return decorate


def _decorate(cls: Callable[[], Any]) -> Any:
    REGISTRY.add(cls())
    return cls


@contextlib.contextmanager
def fusions(*only: Any) -> Generator[None]:
    """Within the context, compile with the fusions given (handles, fusions or names of registered ones), and no other.

    Fusions that are registered inside the context end with it::

        with fx_fusion.fusions("qk_norm_rope_cache"):
            ...

    Raises:
        ValueError: a name that nothing is registered under.
    """
    before = list(REGISTRY)
    chosen = [_resolve(each, before) for each in only]
    REGISTRY.replace(chosen)
    try:
        yield
    finally:
        REGISTRY.replace(before)


def _resolve(given: Any, registered: Sequence[Fusion]) -> Fusion:
    if isinstance(given, Handle):
        return given.fusion
    if isinstance(given, str):
        found = next((fusion for fusion in registered if fusion.name == given), None)
        if found is None:
            names = ", ".join(repr(fusion.name) for fusion in registered)
            raise ValueError(f"fusions: no fusion is named {given!r}; registered are {names}")
        return found
    _check(given)
    return given
